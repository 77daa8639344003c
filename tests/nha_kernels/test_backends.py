"""Every implementation against naive in float64: outputs, log-sum-exp, slots and what the state remembers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_kernels import NHAState, native_hybrid_attention

from .helpers import (
    HEAD,
    ON_GPU,
    Case,
    backends,
    backends_and_dtypes,
    call,
    decode,
    judge,
    make,
    one_block_a_segment,
    one_by_one,
    precise,
    short,
    skip_unserved,
    why_not,
)

# One feature or awkward size each. Every backend takes all of them, or says why not. Head sizes and slot counts repeat
# on purpose: a compiled kernel is made for each new one.
CASES = {
    "plain": Case(),
    "one token": Case(tokens=1, batch=2),
    "one token, state": Case(tokens=1, batch=2, past=(5, 30)),
    "shorter than the window": Case(tokens=5, window=12),
    "length no block divides": Case(tokens=67, window=9),
    "batch": Case(tokens=33, batch=3, window=4),
    "no window": Case(window=0),
    "no window, no delay": Case(window=0, delay=0),
    "no window, delay": Case(window=0, delay=7),
    "only itself": Case(window=1),
    "window over everything": Case(tokens=40, window=64),
    "window over everything, overlap": Case(tokens=40, window=40, delay=0),
    "no delay": Case(delay=0),
    "delay of one": Case(delay=1),
    "delay below the window": Case(window=20, delay=9),
    "delay above the window": Case(window=4, delay=21),
    "delay over everything": Case(tokens=30, window=4, delay=50),
    "masked": Case(mask=True),
    "masked, no window": Case(window=0, delay=5, mask=True),
    "masked, state": Case(tokens=24, batch=3, window=12, past=(0, 3, 40), mask=True),
    "one slot": Case(slots=1),
    "80 slots": Case(tokens=50, slots=80),
    "group of 7": Case(tokens=50, group=7, kv_heads=1),
    "group of 1": Case(tokens=50, group=1),
    "other value size": Case(tokens=50, value_dim=2 * HEAD),
    "strength": Case(strength=True),
    "rope": Case(rope=True),
    "rope, state": Case(tokens=40, batch=2, past=(3, 50), rope=True),
    "given positions": Case(given=True),
    "scale": Case(scale=0.3),
    "longer than a segment": Case(tokens=150, kv_heads=1, past=(20,), delay=5),
    "packed": Case(tokens=70, lengths=(1, 0, 40, 3, 26)),
    "packed, starts and ends with nothing": Case(tokens=70, lengths=(0, 69, 1, 0)),
    "packed, rope, state": Case(tokens=70, lengths=(1, 0, 40, 3, 26), past=(9, 4, 0, 30, 1), rope=True),
    "packed, delay, masked": Case(tokens=70, lengths=(20, 1, 49), window=3, delay=11, mask=True),
    "state": Case(tokens=40, batch=2, past=(4, 60)),
    "state, delay above the window": Case(tokens=40, batch=2, past=(4, 60), window=3, delay=10),
    "state, window above the delay": Case(tokens=40, batch=2, past=(4, 60), window=20, delay=2),
    "state, window over everything": Case(tokens=40, batch=2, past=(4, 60), window=128),
    "everything": Case(
        tokens=70, lengths=(33, 1, 36), past=(7, 0, 20), given=True, strength=True, mask=True, scale=0.2
    ),
    "everything, rope": Case(tokens=70, lengths=(33, 1, 36), past=(7, 0, 20), rope=True, strength=True, mask=True),
    "gates in the dtype of q": Case(gates_like_q=True),
}
# Triton takes seconds to compile each new kind of call: the cases that matter most to indexing and masks.
FEW = {
    "one token, state", "length no block divides", "no window", "window over everything, overlap",
    "delay above the window", "masked, state", "80 slots", "group of 7", "other value size", "packed, rope, state",
    "everything", "longer than a segment",
}  # fmt: skip
# The shapes of real models, where a GPU makes them quick.
REAL = {
    "Llama-3-8B": Case(tokens=777, window=64, kv_heads=8, group=4, head_dim=128, slots=64, rope=True),
    "Qwen2.5-7B": Case(
        tokens=500, lengths=(200, 1, 299), window=64, kv_heads=4, group=7, head_dim=128, slots=64, past=(100, 0, 40)
    ),
    "NHA-340M": Case(tokens=500, batch=2, window=32, kv_heads=4, group=1, head_dim=256, slots=64),
}


def table() -> list[Any]:
    """(backend, dtype, name of a case): all of them, but for Triton the few ones except in bf16."""
    rows = []
    for param in backends_and_dtypes(without=["naive"]):
        backend, dtype = param.values
        names = CASES if backend != "triton" or dtype == torch.bfloat16 else [name for name in CASES if name in FEW]
        if param.marks:
            names = ["every case"]
        elif backend == "triton" and dtype == torch.float16:
            names = ["length no block divides", "everything"]
        rows += [pytest.param(backend, dtype, name, id=f"{param.id}-{name}", marks=param.marks) for name in names]
    return rows


@pytest.mark.parametrize(("backend", "dtype", "name"), table())
def test_is_as_exact_as_its_dtype_allows(backend: str, dtype: torch.dtype, name: str) -> None:
    args = make(CASES[name], dtype)
    skip_unserved(backend, args)
    judge(args).accept(call(args, backend))


@pytest.mark.skipif(not ON_GPU, reason="shapes of real models take a GPU")
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("backend", backends(without=["naive"]) if ON_GPU else ["triton"])
def test_shapes_of_real_models(backend: str, name: str) -> None:
    args = make(REAL[name], torch.bfloat16)
    skip_unserved(backend, args)
    judge(args).accept(call(args, backend))


@st.composite
def cases(draw: st.DrawFn, longest: int) -> Case:
    """Any valid call of bounded size."""
    rope = draw(st.booleans())
    head_dim = draw(st.sampled_from((6, 8, 32)))
    return replace(
        draw(lengths_and_windows(longest)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 2, 7))),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from((head_dim, 5))),
        slots=draw(st.sampled_from((1, 3, 16, 80))),
        strength=draw(st.booleans()),
        rope=rope,
        given=not rope and draw(st.booleans()),
        mask=draw(st.booleans()),
    )


@st.composite
def lengths_and_windows(draw: st.DrawFn, longest: int) -> Case:
    """What varies without a new kernel to compile."""
    packed = draw(st.booleans())
    lengths = tuple(draw(st.lists(st.integers(0, longest // 3), min_size=1, max_size=5))) if packed else None
    if lengths is not None and sum(lengths) == 0:
        lengths = (*lengths, 1)
    batch = 1 if packed else draw(st.integers(1, 3))
    sequences = batch if lengths is None else len(lengths)
    past = tuple(draw(st.lists(st.integers(0, 40), min_size=sequences, max_size=sequences)))
    window = draw(st.sampled_from((0, 1, 2, 5, 16, 17, 64, 200)))
    return Case(
        tokens=draw(st.integers(1, longest)) if lengths is None else sum(lengths),
        batch=batch,
        lengths=lengths,
        past=past if any(past) and draw(st.booleans()) else None,
        window=window,
        delay=draw(st.none() | st.sampled_from((0, 1, 3, window + 1, 40))),
        scale=draw(st.none() | st.just(0.2)),
        gates=draw(st.sampled_from(("mild", "strong", "spikes", "mixed"))),
        seed=draw(st.integers(0, 2**16)),
    )


@given(case=cases(longest=150), fine=st.booleans())
@settings(max_examples=60)
def test_chunked_for_any_shape(case: Case, fine: bool) -> None:
    args = make(case, torch.float32)
    with one_block_a_segment() if fine else nullcontext():
        judge(args).accept(call(args, "chunked"))


@given(case=cases(longest=40))
@settings(max_examples=25)
def test_decode_for_any_shape(case: Case) -> None:
    for args in one_by_one(make(case, torch.float32)):
        judge(args).accept(decode(args))


@pytest.mark.skipif(not ON_GPU, reason="many shapes take a GPU; the table of cases has the emulator's")
@pytest.mark.parametrize("backend", backends(without=["naive", "chunked"]) if ON_GPU else ["triton"])
def test_kernels_for_any_shape(backend: str) -> None:
    served = 0

    @given(case=lengths_and_windows(longest=300))
    @settings(max_examples=40)
    def check(case: Case) -> None:
        nonlocal served
        args = make(case, torch.bfloat16)
        if why_not(backend, args) is None:
            served += 1
            judge(args).accept(call(args, backend))

    check()
    assert served > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=short)
def test_decode_is_as_exact_as_its_dtype_allows(dtype: torch.dtype) -> None:
    args = make(Case(tokens=40, batch=2, past=(4, 60), rope=True, strength=True), dtype)
    judge(args).accept(decode(args))


@pytest.mark.parametrize("backend", backends())
def test_gives_the_same_bits_twice(backend: str) -> None:
    args = make(CASES["packed, rope, state"], precise(backend))
    skip_unserved(backend, args)
    first, second = call(args, backend), call(args, backend)
    for name in ("o", "lse"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    for name in ("slot_k", "slot_v"):
        assert torch.equal(getattr(first.state, name), getattr(second.state, name))


@pytest.mark.parametrize("backend", backends())
def test_returns_what_was_asked_for(backend: str) -> None:
    args = make(Case(tokens=20), precise(backend))
    o, state = native_hybrid_attention(**args, backend=backend)
    assert state is None
    assert o.shape == (1, 20, 4, HEAD)
    assert o.dtype == precise(backend)
    o, state, lse = native_hybrid_attention(**args, return_lse=True, backend=backend)
    assert state is None
    assert lse.shape == (1, 20, 4)
    assert lse.dtype == (torch.float64 if o.dtype == torch.float64 else torch.float32)
    o, state = native_hybrid_attention(**args, output_final_state=True, backend=backend)
    assert isinstance(state, NHAState)
