"""Baselines against the formulas they stand for, and the sentences of those that cannot run."""

from __future__ import annotations

import dataclasses
import sys
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nhabench import baselines as module
from nhabench.baselines import baselines, blocked_window, chunked_linear, linear_direct, masked_softmax
from nhabench.check import check_baseline
from nhabench.contender import Contender, Unsupported
from nhabench.inputs import Inputs, make_inputs
from nhabench.workloads import Case, Workload

CPU = torch.device("cpu")


def named(name: str) -> Contender:
    return next(contender for contender in baselines() if contender.name == name)


def inputs_of(workload: Workload, length: int, dtype: str = "float32", batch: int = 1) -> Inputs:
    return make_inputs(Case(workload, batch, length, dtype), CPU)


def test_the_softmax_definition_is_causal_attention(tiny: Workload) -> None:
    x = inputs_of(tiny, 40, batch=2).to(torch.float64)
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(masked_softmax(x, 40), expected)


@pytest.mark.parametrize("name", ["sdpa-math", "window"])
def test_softmax_baselines_see_rotated_queries_and_keys(name: str, tiny: Workload) -> None:
    inputs = inputs_of(tiny.changed(rope=True), 40)
    verdict = check_baseline(named(name), inputs)
    assert verdict is not None
    assert verdict.correct, verdict.sentence
    plain = dataclasses.replace(inputs, rope=None)
    assert not torch.allclose(named(name).bind(plain)(), named(name).bind(inputs)(), atol=1e-2)


def test_the_linear_definition_is_the_recurrence(tiny: Workload) -> None:
    x = inputs_of(tiny, 21).to(torch.float64)
    state = torch.zeros(2, 16, 16, dtype=torch.float64)
    rows = []
    for t in range(21):
        state = state + x.k[0, t, :, :, None] * x.v[0, t, :, None, :]
        rows.append(torch.einsum("hd,hde->he", x.q[0, t], state.repeat_interleave(2, 0)) / 4)
    torch.testing.assert_close(linear_direct(x)[0], torch.stack(rows))


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 70), window=st.integers(1, 80), heads=st.sampled_from([(1, 1), (4, 2), (7, 1)]),
    batch=st.integers(1, 3),
)  # fmt: skip
def test_blocks_are_the_window(length: int, window: int, heads: tuple[int, int], batch: int) -> None:
    x = inputs_of(Workload("w", *heads, head_dim=8), length, batch=batch).to(torch.float64)
    torch.testing.assert_close(blocked_window(x.q, x.k, x.v, window), masked_softmax(x, window))


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 150), chunk=st.sampled_from([1, 16, 64]), heads=st.sampled_from([(1, 1), (4, 2), (7, 1)]))
def test_chunks_are_linear_attention(length: int, chunk: int, heads: tuple[int, int]) -> None:
    x = inputs_of(Workload("w", *heads, head_dim=8), length, batch=2).to(torch.float64)
    # States are summed in fp32: its rounding is what is left.
    torch.testing.assert_close(chunked_linear(x.q, x.k, x.v, chunk), linear_direct(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math", "window", "linear"])
def test_what_runs_on_a_cpu_is_right(name: str, dtype: str, tiny: Workload) -> None:
    verdict = check_baseline(named(name), inputs_of(tiny, 200, dtype))
    assert verdict is not None
    assert verdict.correct, verdict.sentence
    assert verdict.distance.total < 0.02


def test_a_baseline_that_computes_something_else_is_incorrect(tiny: Workload) -> None:
    window, full = named("window"), named("sdpa-flash")
    swapped = Contender("x", "x", "window", window.floor, full.bind, exact=window.exact)
    verdict = check_baseline(swapped, inputs_of(tiny, 200))
    assert verdict is not None
    assert not verdict.correct
    assert "allowed" in verdict.sentence


def test_whatever_cannot_run_on_a_cpu_says_why(tiny: Workload) -> None:
    reasons = {contender.name: contender.missing(CPU) for contender in baselines()}
    assert {name for name, reason in reasons.items() if reason is None} == {
        "sdpa-flash",
        "sdpa-math",
        "window",
        "linear",
    }
    for reason in reasons.values():
        assert reason is None or (reason.endswith(".") and len(reason.split()) >= 4)


def test_limits_are_named(tiny: Workload) -> None:
    big = Case(tiny, 1, 131072, "float32")
    assert named("sdpa-math").cannot(big, CPU) == "Its T x T matrices take 512 GiB, over the limit of 4 GiB set here."
    no_window = Case(tiny.changed(window=0), 1, 64, "float32")
    assert named("window").cannot(no_window, CPU) == "The window is 0: there is nothing to attend to."
    assert named("sdpa-math").cannot(Case(tiny, 1, 512, "float32"), CPU) is None


def test_a_kernel_that_torch_lacks_is_unsupported_with_torchs_reasons(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> torch.Tensor:
        warnings.warn("Head size must be 8. (Triggered internally at x.cpp:1)", stacklevel=1)
        warnings.warn("Flash attention kernel not used because: (Triggered internally at x.cpp:2)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(module, "_run_sdpa", refuse)
    call = named("sdpa-flash").bind(inputs_of(tiny, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the first try, which a bench ignores as well
        with pytest.raises(Unsupported, match=r"for this case: Head size must be 8\.$"):
            call()


def test_memory_efficient_attention_repeats_heads_itself(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.update(options, heads=(q.shape[1], k.shape[1], v.shape[1]))
        return q

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", attention)
    named("sdpa-efficient").bind(inputs_of(tiny, 8))()
    assert seen == {"is_causal": True, "enable_gqa": False, "heads": (4, 4, 4)}
    named("sdpa-flash").bind(inputs_of(tiny, 8))()
    assert seen == {"is_causal": True, "enable_gqa": True, "heads": (4, 2, 2)}


@pytest.mark.parametrize(
    ("name", "path", "shapes"),
    [
        ("gla", "fla.ops.gla.chunk_gla", [(1, 8, 4, 16)] * 4),
        ("gsa", "fla.ops.gsa.chunk_gsa", [(1, 8, 4, 16)] * 3 + [(1, 8, 4, 8)] * 2),
        ("simple-gla", "fla.ops.simple_gla.chunk_simple_gla", [(1, 8, 4, 16)] * 3 + [(1, 8, 4)]),
        (
            "gated-delta-rule",
            "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
            [(1, 8, 4, 16)] * 3 + [(1, 8, 4), (1, 8, 4)],
        ),
    ],
)
def test_flash_linear_attention_gets_what_its_kernels_take(
    name: str, path: str, shapes: list[tuple[int, ...]], tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[torch.Tensor] = []

    def kernel(*operands: torch.Tensor) -> tuple[torch.Tensor, None]:
        got.extend(operands)
        return operands[0], None

    package, function = path.rsplit(".", 1)
    fake = types.ModuleType(package)
    setattr(fake, function, kernel)
    monkeypatch.setitem(sys.modules, package, fake)
    x = inputs_of(tiny, 8, "bfloat16")
    assert named(name).bind(x)().shape == x.q.shape
    assert [tuple(tensor.shape) for tensor in got] == shapes
    torch.testing.assert_close(got[2][:, :, 1], x.v[:, :, 0])  # two query heads to a kv head
    gate = got[4] if name == "gsa" else got[3]
    assert bool((gate <= 0).all())
    if name == "gsa":
        torch.testing.assert_close(got[3].float(), 1 - gate.float().exp(), atol=4e-3, rtol=0)
    if name == "gated-delta-rule":
        torch.testing.assert_close(got[1].float().norm(dim=-1), torch.ones(1, 8, 4), atol=1e-2, rtol=0)
        assert bool(((got[4] > 0) & (got[4] < 1)).all())


@pytest.mark.parametrize("result", ["tensor", "tuple"])
def test_flash_attn_is_called_causally(result: str, tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Any:
        assert causal
        assert (q.shape[2], k.shape[2]) == (4, 2)
        return q if result == "tensor" else (q, None)

    fake = types.ModuleType("flash_attn_interface")
    fake.flash_attn_func = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    x = inputs_of(tiny, 8, "bfloat16")
    assert torch.equal(named("flash-attn-3").bind(x)(), x.q)
    assert (
        named("flash-attn-3").cannot(Case(tiny, 1, 8, "float32"), CPU)
        == "flash-attn-3 takes 16-bit inputs, not float32."
    )
