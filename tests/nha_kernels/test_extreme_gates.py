"""Gates that hurt: 0, -60 a step, -inf, mixtures of them, and write strengths that are not 1 - alpha."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .helpers import (
    Arguments,
    Case,
    assert_gradients,
    backends,
    backends_and,
    backends_and_dtypes,
    budget,
    call,
    cast,
    decode,
    error,
    everything,
    gradients,
    has_lse_gradient,
    judge,
    leaves,
    make,
    one_block_a_segment,
    parts,
    precise,
    skip_unserved,
)

GATES = {
    "0": Case(gates="0"),
    "0, strength": Case(gates="0", strength=True),
    "-60": Case(gates="-60"),
    "-60, no delay": Case(gates="-60", delay=0),
    "-20 to -60": Case(gates="strong"),
    "-20 to -60, strength": Case(gates="strong", strength=True),
    "-13, at which a clamp may begin": Case(gates="-13"),
    "-1e-6": Case(gates="-1e-6", past=(30,)),
    "-inf": Case(gates="-inf"),
    "-inf, state": Case(gates="-inf", past=(30,)),
    "one token of -100 among mild ones": Case(gates="spikes"),
    "one token of -100 among mild ones, state": Case(gates="spikes", past=(30,), window=20, delay=33),
    "all kinds": Case(gates="mixed"),
    "all kinds, strength": Case(gates="mixed", strength=True),
    "all kinds, packed, state": Case(gates="mixed", lengths=(17, 1, 62), past=(30, 2, 0)),
}
FEW = {"-60", "one token of -100 among mild ones", "all kinds"}


def table(*, needs_grad: bool) -> list[Any]:
    rows = []
    for param in backends_and_dtypes(without=["naive"], needs_grad=needs_grad):
        backend, dtype = param.values
        names = ["every case"] if param.marks else list(GATES)
        if backend == "triton" and dtype != torch.bfloat16 and not param.marks:
            names = [name for name in GATES if name in FEW and (dtype == precise(backend) or name == "all kinds")]
        rows += [pytest.param(*param.values, name, id=f"{param.id}-{name}", marks=param.marks) for name in names]
    return rows


def inputs(name: str, backend: str, dtype: torch.dtype) -> Arguments:
    args = make(GATES[name], dtype)
    skip_unserved(backend, args)
    return args


@pytest.mark.parametrize(("backend", "dtype", "name"), table(needs_grad=False))
def test_outputs(backend: str, dtype: torch.dtype, name: str) -> None:
    args = inputs(name, backend, dtype)
    judge(args).accept(call(args, backend))


@pytest.mark.parametrize(("backend", "dtype", "name"), table(needs_grad=True))
def test_gradients(backend: str, dtype: torch.dtype, name: str) -> None:
    args = inputs(name, backend, dtype)
    lse = has_lse_gradient(backend)
    reference = gradients(cast(args, torch.float64), everything("naive", lse=lse))
    assert all(grad.isfinite().all() for grad in reference.values())
    naive = gradients(args, everything("naive", lse=lse))
    assert_gradients(gradients(args, everything(backend, lse=lse)), reference, naive, dtype)


@pytest.mark.parametrize("name", [name for name, case in GATES.items() if case.lengths is None])
def test_decoding(name: str) -> None:
    args = make(GATES[name], torch.float32)
    judge(args).accept(decode(args))


@pytest.mark.parametrize("name", ["-60", "-inf", "one token of -100 among mild ones", "all kinds"])
def test_across_segments(name: str) -> None:
    """Where one segment hands its slots to the next."""
    args = make(GATES[name], torch.float32)
    with one_block_a_segment():
        judge(args).accept(call(args, "chunked"))


@pytest.mark.parametrize(("backend", "size"), backends_and(("10", "300"), few=["10"]))
def test_strengths_that_are_not_normalised(backend: str, size: str) -> None:
    """A strength is any number: large, or negative. The logits grow with it, and the softmax becomes a maximum."""
    args = make(Case(tokens=40, strength=True), precise(backend))
    args["s"] = (args["s"] - 0.3) * float(size)
    skip_unserved(backend, args)
    judge(args).accept(call(args, backend))


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_gradients_of_strengths_that_are_not_normalised(backend: str) -> None:
    args = make(Case(strength=True, gates="mixed"), precise(backend, needs_grad=True))
    args["s"] = (args["s"] - 0.3) * 10
    skip_unserved(backend, leaves(args)[0])
    lse = has_lse_gradient(backend)
    reference = gradients(cast(args, torch.float64), everything("naive", lse=lse))
    naive = gradients(args, everything("naive", lse=lse))
    assert_gradients(gradients(args, everything(backend, lse=lse)), reference, naive, args["q"].dtype)


@pytest.mark.parametrize("backend", backends())
def test_large_logits_neither_overflow_nor_vanish(backend: str) -> None:
    """Logits of several hundred: exp() of them is infinite in fp32, unless the maximum is taken off first."""
    args = make(Case(tokens=40, scale=40.0), precise(backend))
    skip_unserved(backend, args)
    judge(args).accept(call(args, backend))


@pytest.mark.parametrize("step", [-1.0, -5.0, -13.0, -20.0, -40.0, -60.0])
def test_fp32_of_chunked_is_exact_to_its_own_rounding(step: float) -> None:
    """Not only relative to naive: with explicit strengths nothing cancels, so nothing may be lost beyond rounding."""
    args = make(Case(tokens=150, gates=str(step), strength=True, window=5), torch.float32)
    answer = parts(call(cast(args, torch.float64), "naive"))
    for name, x in parts(call(args, "chunked")).items():
        assert error(x, answer[name]) <= budget(0.0, torch.float32), name
