"""Gradients: against finite differences in float64, then every differentiable backend against naive in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from nha_kernels import UnsupportedCall, native_hybrid_attention, nha_decode_step

from .helpers import (
    ON_GPU,
    Arguments,
    Case,
    assert_gradients,
    assert_same_gradients,
    backends,
    backends_and,
    backends_and_dtypes,
    call,
    cast,
    dtypes,
    error,
    everything,
    gradients,
    has_lse_gradient,
    leaves,
    make,
    one_block_a_segment,
    part,
    short,
    skip_unserved,
)
from .test_backends import cases

GRADCHECK = {
    "plain": Case(tokens=5),
    "one token": Case(tokens=1),
    "no window, no delay": Case(tokens=5, window=0),
    "no delay": Case(tokens=5, delay=0),
    "delay above the window": Case(tokens=6, window=2, delay=3),
    "strength, given positions": Case(tokens=5, strength=True, given=True),
    "rope": Case(tokens=5, rope=True),
    "masked": Case(tokens=5, mask=True),
    "masked, no window": Case(tokens=5, window=0, delay=2, mask=True),
    "state": Case(tokens=4, past=(4,), delay=4),
    "packed, everything": Case(
        tokens=5, lengths=(1, 0, 4), past=(2, 1, 3), strength=True, given=True, mask=True, scale=0.7
    ),
}


def function_of_leaves(args: Arguments, backend: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The call as a function of its differentiable inputs, for gradcheck: o, lse and the final slots."""
    args, found = leaves(args)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(found, values, strict=True))
        slots = {name: named.pop(name) for name in ("slot_k", "slot_v") if name in named}
        changed = {**args, **named}
        if slots:
            changed["initial_state"] = replace(args["initial_state"], **slots)
        o, state, lse = call(changed, backend)
        # A row with nothing to attend to has lse = -inf, which has no difference quotient.
        return o, state.slot_k, state.slot_v, torch.where(lse.isneginf(), torch.zeros_like(lse), lse)

    return run, list(found.values())


@pytest.mark.parametrize("name", GRADCHECK)
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_against_finite_differences(backend: str, name: str) -> None:
    case = GRADCHECK[name]
    small = replace(case, head_dim=2, value_dim=3, slots=2, group=1 + (case.past is None), kv_heads=1)
    small = replace(small, window=3) if case.window == Case().window else small
    # gradcheck compares numbers in Python, thousands of them: on a GPU each would be a copy.
    run, inputs = function_of_leaves(make(small, device="cpu"), backend)
    assert torch.autograd.gradcheck(run, inputs)


def test_against_finite_differences_across_blocks() -> None:
    """Long enough for several blocks and segments; along random directions, since there are many numbers."""
    case = Case(tokens=140, window=70, delay=20, head_dim=2, slots=2, kv_heads=1, group=1, past=(30,))
    run, inputs = function_of_leaves(make(case, device="cpu"), "chunked")
    with one_block_a_segment():
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_through_the_remembered_tokens() -> None:
    """The state's ring is differentiable too: k, v, g of one call reach the outputs of the next."""
    args, found = leaves(make(Case(tokens=6, window=3, delay=4, head_dim=2, slots=2, kv_heads=1), device="cpu"))

    def run(*values: Tensor) -> Tensor:
        both = {**args, **dict(zip(found, values, strict=True))}
        _, state, _ = call(part(both, [(0, 4)]), "chunked")
        o, _, _ = call(dict(part(both, [(4, 6)]), initial_state=state), "chunked")
        return o

    assert torch.autograd.gradcheck(run, list(found.values()))


CASES = {
    "plain": Case(),
    "one token": Case(tokens=1, batch=2, past=(3, 20)),
    "length no block divides": Case(tokens=67, window=9),
    "no window": Case(window=0, delay=5),
    "only itself": Case(window=1),
    "window over everything": Case(tokens=40, window=64, delay=0),
    "delay above the window": Case(window=4, delay=21),
    "masked, state": Case(tokens=24, batch=3, window=12, past=(0, 3, 40), mask=True),
    "one slot": Case(slots=1),
    "80 slots": Case(tokens=50, slots=80),
    "group of 7": Case(tokens=50, group=7, kv_heads=1),
    "other value size": Case(tokens=50, value_dim=32),
    "strength": Case(strength=True),
    "rope, state": Case(tokens=40, batch=2, past=(3, 50), rope=True),
    "given positions": Case(given=True),
    "packed": Case(tokens=70, lengths=(1, 0, 40, 3, 26), past=(9, 4, 0, 30, 1), rope=True),
    "gates in the dtype of q": Case(gates_like_q=True, strength=True),
    "everything": Case(
        tokens=70, lengths=(33, 1, 36), past=(7, 0, 20), given=True, strength=True, mask=True, scale=0.2
    ),
}
REAL = {
    "Llama-3-8B": Case(tokens=500, window=64, kv_heads=8, group=4, head_dim=128, slots=64, rope=True),
    "Qwen2.5-7B": Case(tokens=400, lengths=(150, 1, 249), window=64, kv_heads=4, group=7, head_dim=128, slots=64),
}


def assert_gradients_of(args: Arguments, backend: str) -> None:
    """Of o, lse (where a backend has a gradient for it) and the final slots, in the dtype of the call."""
    skip_unserved(backend, leaves(args)[0])
    lse = has_lse_gradient(backend)
    reference = gradients(cast(args, torch.float64), everything("naive", lse=lse))
    naive = gradients(args, everything("naive", lse=lse))
    assert_gradients(gradients(args, everything(backend, lse=lse)), reference, naive, args["q"].dtype)


def table() -> list[Any]:
    rows = []
    for param in backends_and_dtypes(without=["naive"], needs_grad=True):
        names = ["every case"] if param.marks else CASES
        rows += [pytest.param(*param.values, name, id=f"{param.id}-{name}", marks=param.marks) for name in names]
    return rows


@pytest.mark.parametrize(("backend", "dtype", "name"), table())
def test_is_as_exact_as_its_dtype_allows(backend: str, dtype: torch.dtype, name: str) -> None:
    assert_gradients_of(make(CASES[name], dtype), backend)


@pytest.mark.skipif(not ON_GPU, reason="shapes of real models take a GPU")
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("backend", backends(without=["naive"], needs_grad=True) if ON_GPU else ["flash"])
def test_shapes_of_real_models(backend: str, name: str) -> None:
    assert_gradients_of(make(REAL[name], torch.bfloat16), backend)


@pytest.mark.parametrize("name", ["plain", "packed", "window over everything", "strength"])
def test_across_segments(name: str) -> None:
    args = make(replace(CASES[name], tokens=200, lengths=None, past=None))
    reference = gradients(args, everything("naive"))
    with one_block_a_segment():
        assert_gradients(gradients(args, everything("chunked")), reference, reference, torch.float64)


@given(case=cases(longest=100))
@settings(max_examples=25)
def test_chunked_for_any_shape(case: Case) -> None:
    args = make(case)
    reference = gradients(args, everything("naive"))
    with one_block_a_segment() if case.seed % 2 else nullcontext():
        assert_gradients(gradients(args, everything("chunked")), reference, reference, torch.float64)


@pytest.mark.parametrize("step", ["mild", "-5", "-13", "-20", "-60"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=short)
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_of_a_gate_through_the_default_strength(backend: str, dtype: torch.dtype, step: str) -> None:
    """By the chain rule, from an explicit s: d/dg = (d/dg at fixed s) - exp(g) d/ds. Both parts shrink with exp(g), so
    neither may drown in the rounding of 1 - exp(g) or of its derivative, however strong the gate."""
    args = make(Case(tokens=40, gates=step), dtype)
    explicit = cast(args, torch.float64)
    explicit["s"] = -explicit["g"].expm1()
    split = gradients(explicit, everything("naive"))
    expected = split["g"] - explicit["g"].exp() * split["s"]
    # The budget: what fp32 loses where nothing can drown, in the two parts alone.
    narrow = {**cast(explicit, dtype), "g": args["g"]}
    apart = gradients(narrow, everything("naive"))
    lost = apart["g"] - args["g"].exp() * apart["s"]
    got = gradients(args, everything(backend))["g"]
    assert_gradients({"g": got}, {"g": expected}, {"g": lost}, dtype)


@pytest.mark.parametrize("only", ["o", "lse", "slots"])
def test_what_is_not_used_has_no_part(only: str) -> None:
    """A loss of one result alone: the others' gradients arrive as nothing at all, and must count as zero."""
    args = make(Case(tokens=30, past=(9,)))

    def run(args: Arguments, backend: str) -> tuple[Tensor, ...]:
        o, state, lse = call(args, backend)
        return {"o": (o,), "lse": (lse,), "slots": (state.slot_k, state.slot_v)}[only]

    reference = gradients(args, lambda args: run(args, "naive"))
    assert_gradients(gradients(args, lambda args: run(args, "chunked")), reference, reference, torch.float64)


@pytest.mark.parametrize(
    ("backend", "wanted"),
    backends_and(["q", "k", "v", "g", "s", "q_window", "k_window", "slot_k"], few=["g", "k_window"], needs_grad=True),
)
def test_one_input_alone_may_want_a_gradient(backend: str, wanted: str) -> None:
    args = make(Case(tokens=20, past=(5,), strength=True, given=True), dtypes(backend, needs_grad=True)[0])
    all_args, found = leaves(args)
    skip_unserved(backend, all_args)
    o, state = native_hybrid_attention(**all_args, output_final_state=True, backend=backend)
    grads = torch.autograd.grad(o.double().sum() + state.slot_v.sum(), list(found.values()), allow_unused=True)
    expected = dict(zip(found, grads, strict=True))[wanted]
    for name, x in found.items():
        x.requires_grad_(name == wanted)
    o, state = native_hybrid_attention(**all_args, output_final_state=True, backend=backend)
    (got,) = torch.autograd.grad(o.double().sum() + state.slot_v.sum(), [found[wanted]])
    assert torch.count_nonzero(got) > 0
    assert_same_gradients({wanted: got}, {wanted: expected})


@pytest.mark.parametrize("backend", backends(without=["naive"], needs_grad=True))
def test_the_tables_of_a_rotary_embedding_have_gradients(backend: str) -> None:
    args = make(Case(tokens=24, past=(5,), rope=True), dtypes(backend, needs_grad=True)[0])

    def of_tables(args: Arguments, backend: str) -> dict[str, Tensor]:
        args, _ = leaves(args)
        tables = tuple(table.detach().requires_grad_() for table in args["rope"])
        o, _ = native_hybrid_attention(**{**args, "rope": tables, "backend": backend})
        return dict(zip(("cos", "sin"), torch.autograd.grad(o.double().square().sum(), tables), strict=True))

    wide = cast(args, torch.float64)
    assert_gradients(of_tables(args, backend), of_tables(wide, "naive"), of_tables(args, "naive"), args["q"].dtype)


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_a_state_that_moves_on_does_not_change_a_backward_still_to_come(backend: str) -> None:
    args = make(Case(tokens=30, past=(9,), window=8), dtypes(backend, needs_grad=True)[0])
    args["initial_state"] = args["initial_state"].with_full_capacity()
    q, k, v, g = (args[name].detach().requires_grad_() for name in "qkvg")
    state = args["initial_state"].clone()
    rest = {name: x for name, x in args.items() if name not in ("q", "k", "v", "g", "initial_state")}
    rest |= {"initial_state": state, "backend": backend}
    (expected,) = torch.autograd.grad(native_hybrid_attention(q, k, v, g, **rest)[0].sum(), k)
    o, _ = native_hybrid_attention(q, k, v, g, **rest)
    with torch.no_grad():
        nha_decode_step(q[:, :1], k[:, :1], v[:, :1], g[:, :1], state, args["window_size"])
    assert state.seen.tolist() == [10]
    assert torch.equal(torch.autograd.grad(o.sum(), k)[0], expected)


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_gradients_have_the_dtype_and_layout_of_their_inputs(backend: str) -> None:
    args = make(Case(tokens=20), dtypes(backend, needs_grad=True)[-1])
    found = leaves(args)[1]
    for name, grad in gradients(args, everything(backend, lse=False)).items():
        assert (grad.dtype, grad.shape) == (found[name].dtype, found[name].shape)


@pytest.mark.parametrize("backend", backends(without=["naive"], needs_grad=True))
def test_a_second_derivative_is_refused(backend: str) -> None:
    args, found = leaves(make(Case(tokens=10), dtypes(backend, needs_grad=True)[0]))
    o, _ = native_hybrid_attention(**args, backend=backend)
    with pytest.raises(RuntimeError, match=rf"{backend} is differentiable once.*create_graph.*naive"):
        torch.autograd.grad(o.square().sum(), [found["q"]], create_graph=True)


def test_naive_has_a_second_derivative() -> None:
    args = make(Case(tokens=4, window=2, head_dim=2, slots=2, kv_heads=1, group=1), device="cpu")
    args, found = leaves(args)

    def run(*values: Tensor) -> Tensor:
        o, _ = native_hybrid_attention(**{**args, **dict(zip(found, values, strict=True))}, backend="naive")
        return o

    assert torch.autograd.gradgradcheck(run, list(found.values()))


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_the_gradient_of_the_lse_is_right_or_refused(backend: str) -> None:
    """Never silently dropped."""
    dtype = dtypes(backend, needs_grad=True)[0]
    args, found = leaves(make(Case(tokens=20), dtype))
    if has_lse_gradient(backend):
        _, _, lse = native_hybrid_attention(**args, return_lse=True, backend=backend)
        (grad,) = torch.autograd.grad(lse.sum(), [found["q"]])
        assert torch.count_nonzero(grad) > 0
    else:
        with pytest.raises(UnsupportedCall, match="log-sum-exp"):
            native_hybrid_attention(**args, return_lse=True, backend=backend)
        with torch.no_grad():
            native_hybrid_attention(**args, return_lse=True, backend=backend)


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    args, _ = leaves(make(Case(tokens=20)))
    with torch.no_grad():
        o, state, lse = call(args, "chunked")
    assert not any(x.requires_grad for x in (o, lse, *state.tensors().values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_in_inference_mode(dtype: torch.dtype) -> None:
    args = make(Case(tokens=20), dtype)
    expected = call(args, "chunked")
    with torch.inference_mode():
        got = call(args, "chunked")
    assert error(got.o, expected.o) == 0
