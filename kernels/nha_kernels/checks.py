"""Is a call valid? Every error names the argument, what was expected and what came, before anything is launched."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from operator import index
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

from .problem import Inputs, Problem, accumulate_dtype, history_length
from .state import NHAState

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_call(
    inputs: Inputs,
    window_size: int,
    slot_delay: int | None,
    mask_empty_slots: bool,
    output_final_state: bool,
    return_lse: bool,
    state_name: str = "initial_state",
) -> Problem:
    """Check every argument of a call and describe it; raises ValueError or TypeError.

    Values (g <= 0, the order of cu_seqlens, positions within the rope tables) are checked on the CPU. On other devices
    that would wait for the device, so it is done only where the environment says NHA_CHECK_VALUES=1.
    """
    window_size = _integer("window_size", window_size)
    delay = window_size if slot_delay is None else _integer("slot_delay", slot_delay)
    _check_flags(mask_empty_slots=mask_empty_slots, output_final_state=output_final_state, return_lse=return_lse)
    q, k, v, g = inputs.q, inputs.k, inputs.v, inputs.g
    tensors = _tensors(inputs)
    _check_tensors(tensors, inputs)

    batch, tokens, q_heads, head_dim = q.shape
    kv_heads, value_dim, slots = k.shape[2], v.shape[3], g.shape[3]
    for size, name in zip(q.shape, ("B", "T", "HQ", "D"), strict=True):
        if size < 1:
            _fail("q", f"every size of [B, T, HQ, D] to be at least 1, {name} too", _shape(q))
    _check_shape("k", k, (batch, tokens, max(kv_heads, 1), head_dim), "[B, T, H, D] with B, T and D of q and H >= 1")
    _check_shape("v", v, (batch, tokens, kv_heads, max(value_dim, 1)), "[B, T, H, Dv] with B, T and H of k and Dv >= 1")
    _check_shape("g", g, (batch, tokens, kv_heads, max(slots, 1)), "[B, T, H, M] with B, T and H of k and M >= 1")
    if q_heads % kv_heads:
        _fail("q", f"HQ to be a multiple of k's H = {kv_heads}", f"HQ = {q_heads}")
    if inputs.s is not None:
        _check_shape("s", inputs.s, tuple(g.shape), "the shape of g, [B, T, H, M]")
    if inputs.q_window is not None:
        _check_shape("q_window", inputs.q_window, tuple(q.shape), "the shape of q, [B, T, HQ, D]")
    if inputs.k_window is not None:
        _check_shape("k_window", inputs.k_window, tuple(k.shape), "the shape of k, [B, T, H, D]")
    if isinstance(inputs.scale, bool) or not isinstance(inputs.scale, (int, float)):
        _fail("scale", "a finite number > 0", f"{inputs.scale!r} of type {type(inputs.scale).__name__}", TypeError)
    if not 0 < inputs.scale < math.inf:
        _fail("scale", "a finite number > 0", str(inputs.scale))

    sequences = batch
    if inputs.cu_seqlens is not None:
        sequences = _check_cu_seqlens(inputs.cu_seqlens, q)
    if inputs.rope is not None:
        _check_rope(inputs, tokens, head_dim)
    state = inputs.state
    if state is not None:
        check_state(state, state_name, inputs, sequences, window_size, delay)
    if values_are_checked(g):
        check_values(inputs, state_name)
    everything = [*tensors.values(), *(() if state is None else state.tensors().values())]
    return Problem.of(
        inputs, window_size, delay, mask_empty_slots=mask_empty_slots, output_final_state=output_final_state,
        return_lse=return_lse, needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in everything),
    )  # fmt: skip


def check_state(state: NHAState, argument: str, inputs: Inputs, sequences: int, window: int, delay: int) -> None:
    """A state must belong to calls of the same window, delay, sizes, dtype, device and optional inputs."""
    if not isinstance(state, NHAState):
        _fail(argument, "an NHAState", type(state).__name__, TypeError)
    for name, here, there in (
        ("window_size", window, state.window_size),
        ("slot_delay", delay, state.slot_delay),
    ):
        if here != there:
            _fail(argument, f"a state of calls with {name} = {here}, as in this call", f"{name} = {there}")
    for name in ("s", "k_window"):
        given, kept = getattr(inputs, name) is not None, getattr(state, name) is not None
        if given != kept:
            calls = {True: f"calls that give {name}", False: f"calls without {name}"}
            _fail(argument, f"a state of {calls[given]}, as this one", f"one of {calls[kept]}")
    heads, slots = inputs.k.shape[2], inputs.g.shape[3]
    ring = (sequences, state.capacity, heads)
    wide = accumulate_dtype(inputs.q.dtype)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {
        "slot_k": ((sequences, heads, slots, inputs.k.shape[3]), wide),
        "slot_v": ((sequences, heads, slots, inputs.v.shape[3]), wide),
        "k": ((*ring, inputs.k.shape[3]), inputs.k.dtype),
        "v": ((*ring, inputs.v.shape[3]), inputs.v.dtype),
        "g": ((*ring, slots), inputs.g.dtype),
        "s": ((*ring, slots), None if inputs.s is None else inputs.s.dtype),
        "k_window": ((*ring, inputs.k.shape[3]), inputs.k.dtype),
        "seen": ((sequences,), torch.int64),
    }
    for name, x in state.tensors().items():
        shape, dtype = expected[name]
        if tuple(x.shape) != shape:
            _fail(f"{argument}.{name}", f"shape {list(shape)}", _shape(x))
        if x.dtype != dtype:
            _fail(f"{argument}.{name}", f"dtype {dtype}", str(x.dtype), TypeError)
        if x.device != inputs.q.device:
            _fail(f"{argument}.{name}", f"device {inputs.q.device}, that of q", str(x.device))


def values_are_checked(x: Tensor) -> bool:
    """On the CPU always, elsewhere (where it waits for the device) if NHA_CHECK_VALUES=1; never while tracing."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return x.device.type == "cpu" or os.environ.get("NHA_CHECK_VALUES") == "1"


def check_values(inputs: Inputs, state_name: str) -> None:
    """The checks that read the tensors' contents."""
    g = inputs.g.detach()
    if not bool((g <= 0).all()):
        _fail("g", "log forget gates <= 0 everywhere, not NaN", f"a largest value of {g.max().item():g}")
    seen = 0
    if inputs.state is not None:
        seen = int(inputs.state.seen.max())
        if int(inputs.state.seen.min()) < 0:
            _fail(f"{state_name}.seen", "token counts >= 0", f"{int(inputs.state.seen.min())}")
        history = history_length(inputs.state.window_size, inputs.state.slot_delay)
        if inputs.state.capacity < min(seen, history):
            _fail(f"{state_name}.seen", f"at most the {inputs.state.capacity} tokens that it has room for", str(seen))
    tokens = inputs.q.shape[1]
    if inputs.cu_seqlens is not None:
        bounds = inputs.cu_seqlens.tolist()
        check_offsets(bounds, tokens)
        tokens = max(b - a for a, b in pairwise(bounds))
    if inputs.rope is not None and seen + tokens > len(inputs.rope[0]):
        _fail("rope", f"tables of at least {seen + tokens} positions", f"{len(inputs.rope[0])}")


def check_offsets(bounds: list[int], tokens: int) -> None:
    """cu_seqlens, read on the host."""
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in pairwise(bounds)):
        expected = f"offsets that start at 0, never fall and end at T = {tokens}"
        _fail("cu_seqlens", expected, str(bounds if len(bounds) <= 12 else [*bounds[:6], "...", *bounds[-5:]]))


def _check_tensors(tensors: dict[str, Tensor], inputs: Inputs) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            _fail(name, "a torch.Tensor", type(x).__name__, TypeError)
    q = inputs.q
    for name in ("q", "k", "v", "g"):
        x = getattr(inputs, name)
        if x.ndim != 4:
            _fail(name, "4 dimensions", f"{x.ndim} ({_shape(x)})")
    if q.dtype not in FLOATS:
        _fail("q", "a floating dtype of 16, 32 or 64 bits", str(q.dtype), TypeError)
    for name, x in tensors.items():
        if x.device != q.device:
            _fail(name, f"device {q.device}, that of q", str(x.device))
        if name in ("k", "v", "q_window", "k_window") and x.dtype != q.dtype:
            _fail(name, f"dtype {q.dtype}, that of q", str(x.dtype), TypeError)
        if name in ("g", "s") and x.dtype not in (torch.float32, q.dtype):
            _fail(name, f"dtype torch.float32 or {q.dtype}, that of q", str(x.dtype), TypeError)


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> int:
    if cu_seqlens.dtype != torch.int32:
        _fail("cu_seqlens", "dtype torch.int32", str(cu_seqlens.dtype), TypeError)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        _fail("cu_seqlens", "shape [N + 1] with N >= 1", _shape(cu_seqlens))
    if q.shape[0] != 1:
        _fail("q", "B = 1 where cu_seqlens packs the sequences", f"B = {q.shape[0]}")
    return len(cu_seqlens) - 1


def _check_rope(inputs: Inputs, tokens: int, head_dim: int) -> None:
    assert inputs.rope is not None
    if inputs.q_window is not None or inputs.k_window is not None:
        _fail("rope", "either rope, or q_window and k_window", "both")
    if head_dim % 2:
        _fail("rope", "an even head size D", f"D = {head_dim}")
    cos, sin = inputs.rope
    for name, x in (("rope[0]", cos), ("rope[1]", sin)):
        if x.ndim != 2 or x.shape[1] != head_dim // 2:
            _fail(name, f"a table [P, D/2] = [P, {head_dim // 2}]", _shape(x))
        if x.dtype not in FLOATS:
            _fail(name, "a floating dtype", str(x.dtype), TypeError)
    if cos.shape != sin.shape:
        _fail("rope", "cos and sin of one shape", f"{_shape(cos)} and {_shape(sin)}")
    if inputs.cu_seqlens is None and len(cos) < tokens:
        _fail("rope", f"tables of at least T = {tokens} positions", f"{len(cos)}")


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        _fail(name, "an integer >= 0", f"{value!r} of type {type(value).__name__}", TypeError)
    # What torch.compile takes for an int that varies is an int, and has no __index__.
    number = value if isinstance(value, int) else index(value)
    if number < 0:
        _fail(name, "an integer >= 0", str(value))
    return number


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            _fail(name, "True or False", f"{value!r} of type {type(value).__name__}", TypeError)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        _fail(name, f"{meaning}: {list(shape)}", _shape(x))


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    named = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "s", "q_window", "k_window", "cu_seqlens")}
    if inputs.rope is not None:
        if not isinstance(inputs.rope, (tuple, list)) or len(inputs.rope) != 2:
            _fail("rope", "a pair (cos, sin)", type(inputs.rope).__name__, TypeError)
        named["rope[0]"], named["rope[1]"] = inputs.rope
    required = ("q", "k", "v", "g", "rope[0]", "rope[1]")
    return {name: x for name, x in named.items() if x is not None or name in required}


def _shape(x: Tensor) -> str:
    return f"shape {list(x.shape)}"


def _fail(name: str, expected: str, came: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{name}: expected {expected}; got {came}")
