"""NHAState, and decoding in place: sizes, room, counts, CUDA graphs, and what they refuse."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import NHAState, native_hybrid_attention, nha_decode_step

from .helpers import (
    DEVICE,
    ON_GPU,
    TOKEN_ARGUMENTS,
    Arguments,
    Case,
    assert_same_recent,
    call,
    clone,
    decode,
    judge,
    make,
    part,
    recent,
    short,
    zero_state,
)

# ---- A state that has seen nothing ----


@pytest.mark.parametrize(
    ("window", "delay", "room"),
    [(0, None, 0), (1, 0, 0), (1, None, 1), (8, None, 8), (8, 0, 7), (8, 3, 7), (3, 8, 8), (0, 5, 5)],
)
def test_zeros_has_room_for_what_window_and_delay_need(window: int, delay: int | None, room: int) -> None:
    state = NHAState.zeros(3, 2, 16, 8, window, value_dim=5, slot_delay=delay, device=DEVICE)
    assert state.capacity == room
    assert {name: tuple(x.shape) for name, x in state.tensors().items()} == {
        "slot_k": (3, 2, 16, 8),
        "slot_v": (3, 2, 16, 5),
        "k": (3, room, 2, 8),
        "v": (3, room, 2, 5),
        "g": (3, room, 2, 16),
        "seen": (3,),
    }
    assert not any(x.count_nonzero() for x in state.tensors().values())
    assert (state.window_size, state.slot_delay) == (window, window if delay is None else delay)
    assert all(x.device.type == DEVICE for x in state.tensors().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=short)
def test_zeros_keeps_slots_in_fp32_at_least(dtype: torch.dtype) -> None:
    state = NHAState.zeros(1, 1, 4, 8, 2, dtype=dtype, with_s=True, with_k_window=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {state.slot_k.dtype, state.slot_v.dtype} == {wide}
    assert state.s is not None
    assert state.k_window is not None
    assert {x.dtype for x in (state.k, state.v, state.g, state.s, state.k_window)} == {dtype}
    assert NHAState.zeros(1, 1, 4, 8, 2, dtype=dtype, gate_dtype=torch.float32).g.dtype == torch.float32
    assert state.seen.dtype == torch.int64
    assert state.k_window.shape == state.k.shape
    assert state.s.shape == state.g.shape


@pytest.mark.parametrize("mask", [False, True])
def test_zeros_is_the_beginning(mask: bool) -> None:
    args = make(Case(tokens=40, batch=2, delay=11, rope=True, strength=True, mask=mask))
    judge(args).accept(call({**args, "initial_state": zero_state(args)}, "chunked"))


def test_it_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        NHAState.zeros(1, 1, 4, 8, 2).seen = torch.ones(1)  # type: ignore[misc]


# ---- What it remembers ----


@pytest.mark.parametrize(("window", "delay"), [(5, None), (5, 0), (3, 9), (9, 3), (1, 0)])
def test_it_remembers_the_last_tokens_and_no_others(window: int, delay: int | None) -> None:
    args = make(Case(tokens=23, lengths=(2, 0, 21), window=window, delay=delay, strength=True, given=True))
    state = call(args, "chunked").state
    room = max(window if delay is None else delay, window - 1)
    starts = (0, 2, 2)
    for n, (length, tokens) in enumerate(zip((2, 0, 21), recent(state), strict=True)):
        assert sorted(tokens) == list(range(max(0, length - room), length))
        for position, token in tokens.items():
            assert token.keys() == {"k", "v", "g", "s", "k_window"}
            for name, x in token.items():
                assert torch.equal(x, args[name][0, starts[n] + position])
    assert state.seen.tolist() == [2, 0, 21]


def test_it_has_no_more_room_than_tokens_were_seen() -> None:
    args = make(Case(tokens=3, window=16))
    assert call(args, "chunked").state.capacity == 3
    assert call(make(Case(tokens=3, window=2)), "chunked").state.capacity == 2


def test_room_is_added_without_forgetting() -> None:
    args = make(Case(tokens=5, window=16, delay=20, strength=True, given=True))
    state = call(args, "chunked").state
    grown = state.with_full_capacity()
    assert (state.capacity, grown.capacity) == (5, 20)
    assert_same_recent(grown, state)
    assert grown.with_full_capacity() is grown
    assert torch.equal(grown.slot_k, state.slot_k)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_room_changes_nothing(backend: str) -> None:
    args = make(Case(tokens=30, batch=2, past=(1, 6), window=12, delay=15, rope=True))
    grown = {**args, "initial_state": args["initial_state"].with_full_capacity()}
    assert grown["initial_state"].capacity > args["initial_state"].capacity
    judge(args).accept(call(grown, backend))


def test_the_count_stays_on_the_device() -> None:
    """Reading it would wait for the GPU: an int anywhere would."""
    state = call(make(Case(tokens=3, lengths=(1, 2))), "chunked").state
    assert isinstance(state.seen, Tensor)
    assert state.seen.device.type == DEVICE
    assert state.seen.tolist() == [1, 2]


def test_detach_and_clone() -> None:
    args = make(Case(tokens=6))
    args["k"].requires_grad_()
    state = call(args, "chunked").state
    assert state.slot_k.requires_grad
    assert state.k.requires_grad
    assert not any(x.requires_grad for x in state.detach().tensors().values())
    copied = state.detach().clone()
    for name, x in copied.tensors().items():
        assert torch.equal(x, state.tensors()[name])
        assert x.untyped_storage().data_ptr() != state.tensors()[name].untyped_storage().data_ptr()


# ---- Decoding ----


def token(args: Arguments, t: int) -> Arguments:
    """The arguments of nha_decode_step for token t."""
    step = {name: args[name][:, t : t + 1] for name in TOKEN_ARGUMENTS if args.get(name) is not None}
    rest = {
        name: args[name] for name in ("window_size", "slot_delay", "scale", "rope", "mask_empty_slots") if name in args
    }
    return {**step, **rest}


def test_a_step_works_in_place() -> None:
    args = make(Case(tokens=20, batch=2, delay=9, strength=True, given=True))
    state = zero_state(args)
    tensors = state.tensors()
    for t in range(20):
        o = nha_decode_step(**token(args, t), state=state)
        assert isinstance(o, Tensor)
        assert o.shape == (2, 1, 4, args["v"].shape[-1])
    assert all(state.tensors()[name] is x for name, x in tensors.items())
    assert state.seen.tolist() == [20, 20]
    o, lse = nha_decode_step(**token(args, 0), state=state, return_lse=True)
    assert lse.shape == (2, 1, 4)
    assert lse.dtype == torch.float64


def test_sequences_may_have_seen_different_numbers_of_tokens() -> None:
    args = make(Case(tokens=15, batch=3, past=(0, 3, 40), window=6, delay=9, rope=True, mask=True))
    judge(args).accept(decode(args))


def test_a_step_leaves_its_inputs_alone() -> None:
    args = make(Case(tokens=1, batch=2, past=(3, 5), strength=True, given=True))
    before = clone(args)
    decode(args)
    for name in TOKEN_ARGUMENTS:
        assert torch.equal(args[name], before[name])
    for name, x in args["initial_state"].tensors().items():
        assert torch.equal(x, before["initial_state"].tensors()[name])


@pytest.mark.parametrize("mask", [False, True])
def test_a_step_without_a_window(mask: bool) -> None:
    args = make(Case(tokens=12, batch=2, window=0, delay=4, mask=mask))
    judge(args).accept(decode(args))


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_a_captured_step_can_be_replayed(dtype: torch.dtype) -> None:
    """Whatever the state holds: the graph is captured once, on an empty state, and replayed over a whole sequence."""
    case = Case(tokens=40, batch=2, window=6, delay=9, rope=True, strength=True)
    args = make(case, dtype)
    state = zero_state(args)
    buffers = {name: x.clone() if isinstance(x, Tensor) else x for name, x in token(args, 0).items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        nha_decode_step(**buffers, state=state.clone(), return_lse=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = nha_decode_step(**buffers, state=state, return_lse=True)
    for x in state.tensors().values():
        x.zero_()
    rows = []
    for t in range(case.tokens):
        for name, x in token(args, t).items():
            if isinstance(x, Tensor):
                buffers[name].copy_(x)
        graph.replay()
        rows.append((o.clone(), lse.clone()))
    expected = decode(args)
    assert torch.equal(torch.cat([o for o, _ in rows], dim=1), expected.o)
    assert torch.equal(torch.cat([lse for _, lse in rows], dim=1), expected.lse)
    assert state.seen.tolist() == [40, 40]


# ---- What decoding refuses ----

PLAIN = Case(tokens=2, batch=2, window=4)


def test_a_step_needs_room() -> None:
    args = make(PLAIN)
    small = call(part(args, [(0, 1)]), "chunked").state
    with pytest.raises(ValueError, match=r"state: expected room for 4 recent tokens.*with_full_capacity.*got 1"):
        nha_decode_step(**token(args, 1), state=small)
    nha_decode_step(**token(args, 1), state=small.with_full_capacity())


def test_a_step_takes_one_token() -> None:
    args = make(PLAIN)
    plain = {name: args[name] for name in (*"qkvg", "window_size")}
    with pytest.raises(ValueError, match=r"q: expected T = 1.*got T = 2"):
        nha_decode_step(**plain, state=zero_state(args))


def test_a_step_needs_a_state() -> None:
    with pytest.raises(TypeError, match=r"state: expected an NHAState; got NoneType"):
        nha_decode_step(**token(make(PLAIN), 0), state=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"state: expected an NHAState; got dict"):
        nha_decode_step(**token(make(PLAIN), 0), state={})  # type: ignore[arg-type]


def test_a_step_has_no_gradient() -> None:
    args = make(PLAIN)
    args["v"].requires_grad_()
    with pytest.raises(ValueError, match=r"expected no gradient.*decode step"):
        nha_decode_step(**token(args, 0), state=zero_state(args))
    with torch.no_grad():
        nha_decode_step(**token(args, 0), state=zero_state(args))


def test_a_refused_step_leaves_the_state_alone() -> None:
    args = make(PLAIN)
    state = zero_state(args)
    bad = {**token(args, 0), "v": args["v"]}
    with pytest.raises(ValueError, match=r"^v: expected"):
        nha_decode_step(**bad, state=state)
    assert not any(x.count_nonzero() for x in state.tensors().values())


# ---- A state of other calls ----

STATEFUL = Case(tokens=6, batch=2, past=(3, 9), window=4, delay=5, strength=True, given=True)


def other_states() -> dict[str, tuple[Any, type[Exception], str]]:
    args = make(STATEFUL, torch.float32)
    state: NHAState = args["initial_state"]
    return {
        "no state": ({}, TypeError, r"initial_state: expected an NHAState; got dict"),
        "another window": (
            replace(state, window_size=3),
            ValueError,
            r"initial_state: .*window_size = 4.*got window_size = 3",
        ),
        "another delay": (
            replace(state, slot_delay=4),
            ValueError,
            r"initial_state: .*slot_delay = 5.*got slot_delay = 4",
        ),
        "without s": (
            replace(state, s=None),
            ValueError,
            r"initial_state: expected .* that give s.*; got .* without s",
        ),
        "without k_window": (
            replace(state, k_window=None),
            ValueError,
            r"initial_state: expected .* give k_window.*; got .* without k_window",
        ),
        "one sequence less": (
            replace(state, **{name: x[:1] for name, x in state.tensors().items()}),
            ValueError,
            r"initial_state\.slot_k: expected shape \[2, 2, 16, \d+\]; got shape \[1, 2, 16, \d+\]",
        ),
        "another number of slots": (
            replace(state, slot_v=state.slot_v[:, :, :-1]),
            ValueError,
            r"initial_state\.slot_v: expected shape .* 16, .*15",
        ),
        "another head size": (replace(state, v=state.v[..., :-1]), ValueError, r"initial_state\.v: expected shape"),
        "rings of different lengths": (
            replace(state, g=state.g[:, :-1]),
            ValueError,
            r"initial_state\.g: expected shape",
        ),
        "slots in 16 bits": (
            replace(state, slot_k=state.slot_k.bfloat16()),
            TypeError,
            r"initial_state\.slot_k: .*float32; got torch\.bfloat16",
        ),
        "keys of another dtype": (
            replace(state, k=state.k.half()),
            TypeError,
            r"initial_state\.k: .*float32; got torch\.float16",
        ),
        "counts of another dtype": (
            replace(state, seen=state.seen.int()),
            TypeError,
            r"initial_state\.seen: .*int64; got torch\.int32",
        ),
        "a count for another number of sequences": (
            replace(state, seen=state.seen[:1]),
            ValueError,
            r"initial_state\.seen: expected shape \[2\]",
        ),
    }


@pytest.mark.parametrize("name", other_states())
def test_a_state_of_other_calls_is_refused(name: str) -> None:
    args = make(STATEFUL, torch.float32)
    state, kind, message = other_states()[name]
    with pytest.raises(kind, match=message):
        native_hybrid_attention(**{**args, "initial_state": state})


@pytest.mark.parametrize("name", [name for name in other_states() if name != "no state"])
def test_a_decoding_step_names_the_argument_as_it_has_it(name: str) -> None:
    args = make(replace(STATEFUL, tokens=1), torch.float32)
    state, kind, message = other_states()[name]
    with pytest.raises(kind, match="^" + message.replace("initial_state", "state", 1)):
        nha_decode_step(**token(args, 0), state=state)


def test_a_count_beyond_the_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that has lost tokens which the call would have to see."""
    monkeypatch.setenv("NHA_CHECK_VALUES", "1")
    args = make(Case(tokens=6, past=(2,), window=8), torch.float32)
    args["initial_state"].seen.fill_(5)
    with pytest.raises(ValueError, match=r"^initial_state\.seen: expected at most the 2 tokens .*; got 5"):
        native_hybrid_attention(**args)


def test_a_state_of_calls_that_gave_more_is_refused() -> None:
    args = make(STATEFUL, torch.float32)
    without = {name: x for name, x in args.items() if name != "s"}
    with pytest.raises(ValueError, match=r"initial_state: expected .* without s.*; got .* that give s"):
        native_hybrid_attention(**without)


@pytest.mark.skipif(not ON_GPU, reason="a second device is the GPU")
def test_a_state_on_another_device_is_refused() -> None:
    args = make(STATEFUL, torch.float32)
    args["initial_state"] = make(STATEFUL, torch.float32, device="cpu")["initial_state"]
    with pytest.raises(ValueError, match=r"initial_state\.slot_k: expected device cuda:0.*; got cpu"):
        native_hybrid_attention(**args)


def test_a_negative_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NHA_CHECK_VALUES", "1")
    args = make(STATEFUL, torch.float32)
    args["initial_state"].seen[1] = -1
    with pytest.raises(ValueError, match=r"initial_state\.seen: expected token counts >= 0; got -1"):
        native_hybrid_attention(**args)
