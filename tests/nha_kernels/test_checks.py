"""Bad input: every argument, its error's type, and a message that names it, what was expected and what came."""

# One bad input a line, to be read as a table.
# ruff: noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from nha_kernels import explain, native_hybrid_attention
from nha_kernels.registry import IMPLEMENTATIONS

from .helpers import DEVICE, ON_GPU, Arguments, Case, call, judge, make
from .test_backends import cases

# Sizes that differ from one another, so that a message cannot be right by accident.
PLAIN = Case(tokens=5, batch=2, kv_heads=2, group=3, head_dim=8, value_dim=10, slots=7, window=4)
PACKED = Case(tokens=12, lengths=(5, 7), window=4)
ROPE = Case(tokens=5, window=4, head_dim=8, rope=True)


def offsets(*numbers: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def half(name: str) -> Callable[[Arguments], Arguments]:
    return lambda args: {name: args[name].half()}


def new(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Arguments], Arguments]:
    return lambda args: {name: change(args[name])}


def like(
    name: str, source: str, change: Callable[[torch.Tensor], Any] = lambda x: x
) -> Callable[[Arguments], Arguments]:
    return lambda args: {name: change(args[source])}


def value(name: str, x: Any) -> Callable[[Arguments], Arguments]:
    return lambda args: {name: x}


def tables(cos: Callable[[torch.Tensor], Any], sin: Callable[[torch.Tensor], Any]) -> Callable[[Arguments], Arguments]:
    return lambda args: {"rope": (cos(args["rope"][0]), sin(args["rope"][1]))}


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def with_value(x: torch.Tensor, number: float) -> torch.Tensor:
    x = x.clone()
    x[0, 3, 1, 2] = number
    return x


# case, what to change, the error, its message.
Bad = tuple[Case, Callable[[Arguments], Arguments], type[Exception], str]
BAD: dict[str, Bad] = {
    # q
    "q is a list": (PLAIN, value("q", [1.0]), TypeError, r"^q: expected a torch\.Tensor; got list"),
    "q is None": (PLAIN, value("q", None), TypeError, r"^q: expected a torch\.Tensor; got NoneType"),
    "q has 3 dimensions": (PLAIN, new("q", lambda x: x[0]), ValueError, r"^q: expected 4 dimensions; got 3 \(shape \[5, 6, 8\]\)"),
    "q has 5 dimensions": (PLAIN, new("q", lambda x: x[None]), ValueError, r"^q: expected 4 dimensions; got 5"),
    "q holds integers": (PLAIN, new("q", lambda x: x.int()), TypeError, r"^q: expected a floating dtype.*; got torch\.int32"),
    "q is complex": (PLAIN, new("q", lambda x: x + 0j), TypeError, r"^q: expected a floating dtype.*; got torch\.complex64"),
    "q has an 8-bit dtype": (PLAIN, new("q", lambda x: x.to(torch.float8_e4m3fn)), TypeError, r"^q: expected a floating dtype.*; got torch\.float8"),
    "HQ is not a multiple of H": (PLAIN, new("q", lambda x: x[:, :, :5]), ValueError, r"^q: expected HQ to be a multiple of k's H = 2; got HQ = 5"),
    "fewer query heads than kv heads": (PLAIN, new("q", lambda x: x[:, :, :1]), ValueError, r"^q: expected HQ to be a multiple of k's H = 2; got HQ = 1"),
    "q has no tokens": (PLAIN, new("q", lambda x: x[:, :0]), ValueError, r"^q: expected every size .* at least 1, T too; got shape \[2, 0, 6, 8\]"),
    "q has no batch": (PLAIN, new("q", lambda x: x[:0]), ValueError, r"^q: expected every size .* at least 1, B too; got shape \[0, 5, 6, 8\]"),
    "q has no heads": (PLAIN, new("q", lambda x: x[:, :, :0]), ValueError, r"^q: expected every size .* at least 1, HQ too; got shape \[2, 5, 0, 8\]"),
    "q has no features": (PLAIN, new("q", lambda x: x[..., :0]), ValueError, r"^q: expected every size .* at least 1, D too; got shape \[2, 5, 6, 0\]"),
    # k
    "k is a number": (PLAIN, value("k", 1.0), TypeError, r"^k: expected a torch\.Tensor; got float"),
    "k has 3 dimensions": (PLAIN, new("k", lambda x: x[0]), ValueError, r"^k: expected 4 dimensions; got 3"),
    "k has another B": (PLAIN, new("k", lambda x: x[:1]), ValueError, r"^k: expected .*\[2, 5, 2, 8\]; got shape \[1, 5, 2, 8\]"),
    "k has another T": (PLAIN, new("k", lambda x: x[:, :4]), ValueError, r"^k: expected .*\[2, 5, 2, 8\]; got shape \[2, 4, 2, 8\]"),
    "k has another D": (PLAIN, new("k", lambda x: x[..., :7]), ValueError, r"^k: expected .*\[2, 5, 2, 8\]; got shape \[2, 5, 2, 7\]"),
    "k has no heads": (PLAIN, new("k", lambda x: x[:, :, :0]), ValueError, r"^k: expected .*H >= 1.*; got shape \[2, 5, 0, 8\]"),
    "k has another dtype": (PLAIN, half("k"), TypeError, r"^k: expected dtype torch\.float32, that of q; got torch\.float16"),
    # v
    "v is None": (PLAIN, value("v", None), TypeError, r"^v: expected a torch\.Tensor; got NoneType"),
    "v has 2 dimensions": (PLAIN, new("v", lambda x: x[0, 0]), ValueError, r"^v: expected 4 dimensions; got 2"),
    "v has another T": (PLAIN, new("v", lambda x: x[:, :4]), ValueError, r"^v: expected .*\[2, 5, 2, 10\]; got shape \[2, 4, 2, 10\]"),
    "v has another H": (PLAIN, new("v", lambda x: x[:, :, :1]), ValueError, r"^v: expected .*\[2, 5, 2, 10\]; got shape \[2, 5, 1, 10\]"),
    "v has no features": (PLAIN, new("v", lambda x: x[..., :0]), ValueError, r"^v: expected .*Dv >= 1.*; got shape \[2, 5, 2, 0\]"),
    "v has another dtype": (PLAIN, half("v"), TypeError, r"^v: expected dtype torch\.float32, that of q; got torch\.float16"),
    # g
    "g is a string": (PLAIN, value("g", "g"), TypeError, r"^g: expected a torch\.Tensor; got str"),
    "g has 3 dimensions": (PLAIN, new("g", lambda x: x[..., 0]), ValueError, r"^g: expected 4 dimensions; got 3"),
    "g has another H": (PLAIN, new("g", lambda x: x[:, :, :1]), ValueError, r"^g: expected .*\[2, 5, 2, 7\]; got shape \[2, 5, 1, 7\]"),
    "g has another T": (PLAIN, new("g", lambda x: x[:, 1:]), ValueError, r"^g: expected .*\[2, 5, 2, 7\]; got shape \[2, 4, 2, 7\]"),
    "g has no slots": (PLAIN, new("g", lambda x: x[..., :0]), ValueError, r"^g: expected .*M >= 1.*; got shape \[2, 5, 2, 0\]"),
    "g has neither q's dtype nor fp32": (PLAIN, new("g", lambda x: x.bfloat16()), TypeError, r"^g: expected dtype torch\.float32.*; got torch\.bfloat16"),
    # s
    "s is a number": (PLAIN, value("s", 1.0), TypeError, r"^s: expected a torch\.Tensor; got float"),
    "s has another M": (PLAIN, like("s", "g", lambda x: x[..., 1:]), ValueError, r"^s: expected the shape of g.*\[2, 5, 2, 7\]; got shape \[2, 5, 2, 6\]"),
    "s has 3 dimensions": (PLAIN, like("s", "g", lambda x: x[0]), ValueError, r"^s: expected the shape of g.*; got shape \[5, 2, 7\]"),
    "s has another dtype": (PLAIN, like("s", "g", lambda x: x.half()), TypeError, r"^s: expected dtype torch\.float32.*; got torch\.float16"),
    # q_window, k_window
    "q_window is a list": (PLAIN, value("q_window", []), TypeError, r"^q_window: expected a torch\.Tensor; got list"),
    "q_window is k": (PLAIN, like("q_window", "k"), ValueError, r"^q_window: expected the shape of q.*\[2, 5, 6, 8\]; got shape \[2, 5, 2, 8\]"),
    "q_window has another dtype": (PLAIN, like("q_window", "q", lambda x: x.double()), TypeError, r"^q_window: expected dtype torch\.float32, that of q; got torch\.float64"),
    "k_window is q": (PLAIN, like("k_window", "q"), ValueError, r"^k_window: expected the shape of k.*\[2, 5, 2, 8\]; got shape \[2, 5, 6, 8\]"),
    "k_window has another dtype": (PLAIN, like("k_window", "k", lambda x: x.half()), TypeError, r"^k_window: expected dtype torch\.float32, that of q; got torch\.float16"),
    # rope
    "rope is one tensor": (ROPE, lambda args: {"rope": args["rope"][0]}, TypeError, r"^rope: expected a pair \(cos, sin\); got Tensor"),
    "rope is three tensors": (ROPE, lambda args: {"rope": (*args["rope"], args["rope"][0])}, TypeError, r"^rope: expected a pair \(cos, sin\)"),
    "rope's cos is a list": (ROPE, tables(lambda x: x.tolist(), same), TypeError, r"^rope\[0\]: expected a torch\.Tensor; got list"),
    "rope's sin is None": (ROPE, tables(same, lambda x: None), TypeError, r"^rope\[1\]: expected a torch\.Tensor; got NoneType"),
    "rope's tables have D columns": (ROPE, tables(lambda x: x.repeat(1, 2), same), ValueError, r"^rope\[0\]: expected a table \[P, D/2\] = \[P, 4\]; got shape \[5, 8\]"),
    "rope's sin has 3 dimensions": (ROPE, tables(same, lambda x: x[None]), ValueError, r"^rope\[1\]: expected a table \[P, D/2\] = \[P, 4\]; got shape \[1, 5, 4\]"),
    "rope's tables hold integers": (ROPE, tables(lambda x: x.int(), same), TypeError, r"^rope\[0\]: expected a floating dtype; got torch\.int32"),
    "rope's tables differ in length": (ROPE, tables(same, lambda x: x.repeat(2, 1)), ValueError, r"^rope: expected cos and sin of one shape; got shape \[5, 4\] and shape \[10, 4\]"),
    "rope's tables are too short": (ROPE, tables(lambda x: x[:4], lambda x: x[:4]), ValueError, r"^rope: expected tables of at least T = 5 positions; got 4"),
    "rope and q_window": (ROPE, like("q_window", "q"), ValueError, r"^rope: expected either rope, or q_window and k_window; got both"),
    "rope and k_window": (ROPE, like("k_window", "k"), ValueError, r"^rope: expected either rope, or q_window and k_window; got both"),
    "rope and an odd head size": (PLAIN, lambda args: {"q": args["q"][..., :7], "k": args["k"][..., :7], "rope": (torch.ones(5, 3, device=DEVICE),) * 2}, ValueError, r"^rope: expected an even head size D; got D = 7"),
    # numbers
    "window_size is negative": (PLAIN, value("window_size", -1), ValueError, r"^window_size: expected an integer >= 0; got -1"),
    "window_size is a float": (PLAIN, value("window_size", 4.0), TypeError, r"^window_size: expected an integer >= 0; got 4\.0 of type float"),
    "window_size is None": (PLAIN, value("window_size", None), TypeError, r"^window_size: expected an integer >= 0; got None"),
    "window_size is a bool": (PLAIN, value("window_size", True), TypeError, r"^window_size: expected an integer >= 0; got True of type bool"),
    "window_size is a pair": (PLAIN, value("window_size", (4, 0)), TypeError, r"^window_size: expected an integer >= 0; got \(4, 0\)"),
    "slot_delay is negative": (PLAIN, value("slot_delay", -2), ValueError, r"^slot_delay: expected an integer >= 0; got -2"),
    "slot_delay is a string": (PLAIN, value("slot_delay", "4"), TypeError, r"^slot_delay: expected an integer >= 0; got '4' of type str"),
    "scale is infinite": (PLAIN, value("scale", math.inf), ValueError, r"^scale: expected a finite number > 0; got inf"),
    "scale is NaN": (PLAIN, value("scale", math.nan), ValueError, r"^scale: expected a finite number > 0; got nan"),
    "scale is 0": (PLAIN, value("scale", 0.0), ValueError, r"^scale: expected a finite number > 0; got 0\.0"),
    "scale is negative": (PLAIN, value("scale", -0.5), ValueError, r"^scale: expected a finite number > 0; got -0\.5"),
    "scale is a bool": (PLAIN, value("scale", True), TypeError, r"^scale: expected a finite number > 0; got True of type bool"),
    "scale is a string": (PLAIN, value("scale", "1"), TypeError, r"^scale: expected a finite number > 0; got '1'"),
    "scale is a tensor": (PLAIN, value("scale", torch.ones(2)), TypeError, r"^scale: expected a finite number > 0; got "),
    # switches
    "mask_empty_slots is a number": (PLAIN, value("mask_empty_slots", 1), TypeError, r"^mask_empty_slots: expected True or False; got 1 of type int"),
    "output_final_state is None": (PLAIN, value("output_final_state", None), TypeError, r"^output_final_state: expected True or False; got None"),
    "return_lse is a string": (PLAIN, value("return_lse", "yes"), TypeError, r"^return_lse: expected True or False; got 'yes'"),
    "backend is unknown": (PLAIN, value("backend", "cuda"), ValueError, r"^backend: expected one of \('auto', 'naive', 'chunked', .*\); got 'cuda'"),
    "backend is None": (PLAIN, value("backend", None), TypeError, r"^backend: expected one of .*; got NoneType"),
    # cu_seqlens: what its description says
    "cu_seqlens is a list": (PACKED, value("cu_seqlens", [0, 5, 12]), TypeError, r"^cu_seqlens: expected a torch\.Tensor; got list"),
    "cu_seqlens is int64": (PACKED, new("cu_seqlens", lambda x: x.long()), TypeError, r"^cu_seqlens: expected dtype torch\.int32; got torch\.int64"),
    "cu_seqlens is a matrix": (PACKED, new("cu_seqlens", lambda x: x[None]), ValueError, r"^cu_seqlens: expected shape \[N \+ 1\] with N >= 1; got shape \[1, 3\]"),
    "cu_seqlens has one number": (PACKED, value("cu_seqlens", offsets(0)), ValueError, r"^cu_seqlens: expected shape \[N \+ 1\] with N >= 1; got shape \[1\]"),
    "cu_seqlens with a batch": (PLAIN, value("cu_seqlens", offsets(0, 5)), ValueError, r"^q: expected B = 1 where cu_seqlens packs the sequences; got B = 2"),
}  # fmt: skip
# What only the contents tell.
BAD_VALUES: dict[str, Bad] = {
    "g is positive": (PLAIN, new("g", lambda x: with_value(x, 0.25)), ValueError, r"^g: expected log forget gates <= 0 everywhere.*; got a largest value of 0\.25"),
    "g is NaN": (PLAIN, new("g", lambda x: with_value(x, math.nan)), ValueError, r"^g: expected log forget gates <= 0 everywhere, not NaN; got .*nan"),
    "g is inf": (PLAIN, new("g", lambda x: with_value(x, math.inf)), ValueError, r"^g: expected log forget gates <= 0 everywhere.*; got .*inf"),
    "cu_seqlens does not start at 0": (PACKED, value("cu_seqlens", offsets(1, 5, 12)), ValueError, r"^cu_seqlens: expected offsets that start at 0, never fall and end at T = 12; got \[1, 5, 12\]"),
    "cu_seqlens does not end at T": (PACKED, value("cu_seqlens", offsets(0, 5, 11)), ValueError, r"^cu_seqlens: expected .* end at T = 12; got \[0, 5, 11\]"),
    "cu_seqlens ends beyond T": (PACKED, value("cu_seqlens", offsets(0, 5, 13)), ValueError, r"^cu_seqlens: expected .* end at T = 12; got \[0, 5, 13\]"),
    "cu_seqlens falls": (PACKED, value("cu_seqlens", offsets(0, 8, 5, 12)), ValueError, r"^cu_seqlens: expected .*never fall.*; got \[0, 8, 5, 12\]"),
    "rope's tables are too short for the state": (Case(tokens=5, window=4, past=(9,), rope=True), tables(lambda x: x[:13], lambda x: x[:13]), ValueError, r"^rope: expected tables of at least 14 positions; got 13"),
    "rope's tables are too short for a packed sequence": (Case(tokens=12, lengths=(5, 7), window=4, rope=True), tables(lambda x: x[:6], lambda x: x[:6]), ValueError, r"^rope: expected tables of at least 7 positions; got 6"),
}  # fmt: skip


def bad_arguments(bad: Bad) -> Arguments:
    case, change, _, _ = bad
    args = make(case, torch.float32)
    return {**args, **change(args)}


def assert_refused(bad: Bad) -> None:
    """With the right message, and before anything is launched."""
    args = bad_arguments(bad)

    def run(*_: Any) -> None:
        pytest.fail("an implementation was run")

    with pytest.MonkeyPatch.context() as patch:
        for name, implementation in IMPLEMENTATIONS.items():
            patch.setitem(IMPLEMENTATIONS, name, replace(implementation, run=run))
        with pytest.raises(bad[2], match=bad[3]):
            native_hybrid_attention(**args)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    assert_refused(BAD[name])


@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NHA_CHECK_VALUES", "1")
    assert_refused(BAD_VALUES[name])


@pytest.mark.parametrize("name", [name for name in BAD if "backend" not in name])
def test_explain_checks_the_same(name: str) -> None:
    with pytest.raises(BAD[name][2], match=BAD[name][3]):
        explain(**bad_arguments(BAD[name]))


@pytest.mark.skipif(ON_GPU, reason="on a GPU values are checked on request, since it waits for the GPU")
@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_are_always_checked_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NHA_CHECK_VALUES", raising=False)
    assert_refused(BAD_VALUES[name])


@pytest.mark.skipif(not ON_GPU, reason="on the CPU values are always checked")
def test_values_are_checked_on_a_gpu_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    args = bad_arguments(BAD_VALUES["g is positive"])
    monkeypatch.setenv("NHA_CHECK_VALUES", "0")
    native_hybrid_attention(**args, backend="chunked")
    monkeypatch.setenv("NHA_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=r"^g: "):
        native_hybrid_attention(**args, backend="chunked")


@pytest.mark.skipif(not ON_GPU, reason="a second device is the GPU")
@pytest.mark.parametrize("name", ["k", "v", "g", "s", "q_window", "k_window", "cu_seqlens"])
def test_mixed_devices_are_refused(name: str) -> None:
    args = make(Case(tokens=12, lengths=(5, 7), strength=True, given=True), torch.float32)
    args[name] = args[name].cpu()
    with pytest.raises(ValueError, match=rf"^{name}: expected device cuda:0, that of q; got cpu"):
        native_hybrid_attention(**args)


@pytest.mark.parametrize("name", ["k", "v", "g", "s", "q_window", "k_window", "cu_seqlens"])
def test_mixed_devices_are_refused_without_a_gpu(name: str) -> None:
    """The meta device has shapes and no numbers, and is everywhere."""
    args = make(Case(tokens=12, lengths=(5, 7), strength=True, given=True), torch.float32)
    args[name] = args[name].to("meta")
    with pytest.raises(ValueError, match=rf"^{name}: expected device {DEVICE}.*, that of q; got meta"):
        native_hybrid_attention(**args)


# ---- Nothing valid is refused ----

VALID: dict[str, tuple[Case, Callable[[Arguments], Arguments]]] = {
    "gates of 0": (Case(tokens=5, gates="0"), lambda args: {}),
    "gates of -inf": (Case(tokens=5, gates="-inf"), lambda args: {}),
    "gates of -0.0": (Case(tokens=5, gates="-0.0"), lambda args: {}),
    "a scale that is an integer": (Case(tokens=5), value("scale", 1)),
    "a window and a delay of numpy": (Case(tokens=5), lambda args: {"window_size": np.int64(3), "slot_delay": np.int32(2)}),
    "offsets with a stride": (Case(tokens=5), value("cu_seqlens", offsets(0, 9, 2, 9, 5)[::2])),
    "negative strengths": (Case(tokens=5), like("s", "g")),
    "tables longer than the sequence": (ROPE, tables(lambda x: x.repeat(3, 1), lambda x: x.repeat(3, 1))),
    "tables in 16 bits": (ROPE, tables(lambda x: x.bfloat16(), lambda x: x.bfloat16())),
    "rope as a list": (ROPE, lambda args: {"rope": list(args["rope"])}),
    "q_window alone": (Case(tokens=5), like("q_window", "q")),
    "k_window alone": (Case(tokens=5), like("k_window", "k")),
    "one packed sequence": (Case(tokens=5), value("cu_seqlens", offsets(0, 5))),
    "packed sequences without tokens": (Case(tokens=5), value("cu_seqlens", offsets(0, 0, 5, 5, 5))),
    "a huge window": (Case(tokens=5), value("window_size", 2**40)),
    "a huge delay": (Case(tokens=5), value("slot_delay", 2**40)),
    "a parameter": (Case(tokens=5), new("q", torch.nn.Parameter)),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("backend", ["auto", "naive", "chunked"])
def test_nothing_valid_is_refused(backend: str, name: str) -> None:
    case, change = VALID[name]
    args = make(case, torch.float32)
    args |= change(args)
    judge(args).accept(call(args, backend))


@given(case=cases(longest=20))
@settings(max_examples=40)
def test_auto_serves_every_valid_call(case: Case) -> None:
    call(make(case, torch.float32, device="cpu"), "auto")
