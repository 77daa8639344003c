"""What the fused kernels share: where tokens lie, how gates decay, how rows rotate, how a launch is described.

Sizes: B batch, T tokens, N sequences, HQ query heads, H kv heads, NG = HQ / H, D and DV head sizes, M slots, W window,
C tokens between two stored states. Positions count from the first token of a sequence in this call; negative ones are
recent tokens of the initial state, kept in a ring of R places.
Names: p_ pointer, m_ mask, b_ a block in registers, with its shape behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..problem import Inputs, Problem

LOG2E = tl.constexpr(1.4426950408889634)
# In bf16 all decays of a tile of up to 16 tokens share one exponent anchor. A step's decay is cut off at 2^-13 (with
# natural gates: -9), so 16 steps span 2^-208, and an anchor in the middle keeps every factor within 2^-104 .. 2^104.
ANCHOR = tl.constexpr(104.0)
STRONGEST = tl.constexpr(-9.0)
# Below this exp() is 0 in fp32. It stands for -inf, which a sum with 0 * -inf would turn into NaN.
FORGET = tl.constexpr(-1.0e4)

# Programmatic dependent launch, from Hopper on: a kernel launched EARLY may start once every program of the kernel
# before it has called `start_next`, or has ended. What was written since the last launch that was not EARLY may be
# touched only behind `wait_for_previous`, which waits until the kernel before has ended and its writes are visible.
# Every program of an EARLY kernel calls it: else that kernel could end before the one ahead of it, and the kernel
# behind would wait for the wrong one. A call's first launch is never EARLY: so whatever came before the call is over,
# and its inputs are there without a wait.
EARLY = {"launch_pdl": True}
start_next = gdc_launch_dependents
wait_for_previous = gdc_wait


class Tokens(NamedTuple):
    """Pointers to k [*, H, D], v [*, H, DV], g and s [*, H, M] (s may be None), k_window [*, H, D]."""

    k: Any
    v: Any
    g: Any
    s: Any
    k_window: Any


class Layout(NamedTuple):
    """Whose tokens lie where: cu_seqlens [N + 1] or None, and for each sequence the tokens seen before [N] or None.

    Programs go over pieces of sequences (segments or tiles). Packed: sequence [pieces] int32 says whose a piece is (N:
    nobody's), first [N + 1] int32 each sequence's first piece. Dense: None; every sequence has the same number.
    """

    cu_seqlens: Any
    seen: Any
    sequence: Any
    first: Any


@triton.jit
def find_piece(layout, piece, pieces, T):
    """The sequence of a piece (-1: nobody's), its index in it, and the sequence's first token, length and past."""
    if layout.cu_seqlens is None:
        n = piece // pieces
        index = piece % pieces
        start = n.to(tl.int64) * T
        length = T
    else:
        n = tl.load(layout.sequence + piece)
        index = piece - tl.load(layout.first + n)
        start = tl.load(layout.cu_seqlens + n).to(tl.int64)
        length = tl.load(layout.cu_seqlens + n + 1) - start.to(tl.int32)
    if layout.seen is None:
        seen = 0
    else:
        seen = tl.load(layout.seen + n).to(tl.int32)
    return n, index, start, length, seen


@triton.jit
def load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, size, column, m_column):
    """Rows of one kv head, [rows, columns]: from the call, or for negative positions from the ring; else 0."""
    m_call = m_exists & (position >= 0)
    row = (start + position) * H + h
    b_x = tl.load(p_call + row[:, None] * size + column[None, :], mask=m_call[:, None] & m_column[None, :], other=0.0)
    if p_recent is not None:
        m_ring = m_exists & (position < 0)
        place = tl.where(m_ring, seen + position, 0) % R
        row = (n.to(tl.int64) * R + place) * H + h
        mask = m_ring[:, None] & m_column[None, :]
        b_ring = tl.load(p_recent + row[:, None] * size + column[None, :], mask=mask, other=0.0)
        b_x = tl.where(m_ring[:, None], b_ring, b_x)
    return b_x


@triton.jit
def load_tokens_transposed(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, size, column, m_column):
    """The same, [columns, rows]: a transposed product is computed directly, since a transposed result may be wrong."""
    m_call = m_exists & (position >= 0)
    row = (start + position) * H + h
    b_x = tl.load(p_call + row[None, :] * size + column[:, None], mask=m_call[None, :] & m_column[:, None], other=0.0)
    if p_recent is not None:
        m_ring = m_exists & (position < 0)
        place = tl.where(m_ring, seen + position, 0) % R
        row = (n.to(tl.int64) * R + place) * H + h
        mask = m_ring[None, :] & m_column[:, None]
        b_ring = tl.load(p_recent + row[None, :] * size + column[:, None], mask=mask, other=0.0)
        b_x = tl.where(m_ring[None, :], b_ring, b_x)
    return b_x


@triton.jit
def store_tokens(p_call, p_recent, b_x, start, n, seen, position, m_exists, h, H, R, size, column, m_column):
    """Write rows [rows, columns] where `load_tokens` reads them."""
    m_call = m_exists & (position >= 0)
    row = (start + position) * H + h
    b_x = b_x.to(p_call.dtype.element_ty)
    tl.store(p_call + row[:, None] * size + column[None, :], b_x, mask=m_call[:, None] & m_column[None, :])
    if p_recent is not None:
        m_ring = m_exists & (position < 0)
        place = tl.where(m_ring, seen + position, 0) % R
        row = (n.to(tl.int64) * R + place) * H + h
        tl.store(p_recent + row[:, None] * size + column[None, :], b_x, mask=m_ring[:, None] & m_column[None, :])


@triton.jit
def at_least(b_g, lowest: tl.constexpr):
    """Gates no stronger than `lowest`, in their own dtype."""
    return tl.maximum(b_g.to(tl.float32), lowest).to(b_g.dtype)


@triton.jit
def dot(b_a, b_b):
    """A product without tf32: fp32 inputs are multiplied as fp32."""
    return tl.dot(b_a, b_b, input_precision="ieee")


@triton.jit
def sum_gates(m_rows, b_g, dtype):
    """Sums of gates over 0/1 (or -1) masks, as a product: m_rows [X, J] with b_g [J, Y] -> [X, Y] fp32, in log2.

    fp32 gates beside 16-bit tensors (of `dtype`) go in as two 16-bit terms, which carry all that matters of each.
    """
    b_mask = m_rows.to(dtype)
    if b_g.dtype == dtype:
        return dot(b_mask, b_g) * LOG2E
    else:
        b_high = b_g.to(dtype)
        b_low = (b_g - b_high.to(tl.float32)).to(dtype)
        return (dot(b_mask, b_high) + dot(b_mask, b_low)) * LOG2E


@triton.jit
def sum_gates_transposed(b_g, m_columns, dtype):
    """The same, transposed: b_g [Y, J] with m_columns [J, X] -> [Y, X]."""
    b_mask = m_columns.to(dtype)
    if b_g.dtype == dtype:
        return dot(b_g, b_mask) * LOG2E
    else:
        b_high = b_g.to(dtype)
        b_low = (b_g - b_high.to(tl.float32)).to(dtype)
        return (dot(b_high, b_mask) + dot(b_low, b_mask)) * LOG2E


@triton.jit
def write_strength(b_g, b_s):
    """s = 1 - exp(g), or what the call gave, in fp32."""
    if b_s is None:
        # Weak gates would cancel; down to -0.1 six terms of the series are exact to fp32.
        b_x = b_g.to(tl.float32)
        b_series = 1.0 + b_x * (0.5 + b_x * (1 / 6 + b_x * (1 / 24 + b_x * (1 / 120 + b_x * (1 / 720)))))
        return tl.where(b_x > -0.1, -b_x * b_series, 1.0 - tl.exp2(b_x * LOG2E))
    else:
        return b_s.to(tl.float32)


@triton.jit
def rotate(b_lower, b_upper, p_cos, p_sin, position, m_row, P, column, m_column, HALF: tl.constexpr):
    """Both halves [rows, D/2] rotated to their positions; NaN, not a guess, beyond the P rows of the tables."""
    m_table = m_row & (position < P)
    offset = position[:, None] * HALF + column[None, :]
    mask = m_table[:, None] & m_column[None, :]
    absent = tl.where(m_row[:, None] & m_column[None, :], float("nan"), 0.0)
    b_cos = tl.where(mask, tl.load(p_cos + offset, mask=mask, other=0.0).to(tl.float32), absent)
    b_sin = tl.where(mask, tl.load(p_sin + offset, mask=mask, other=0.0).to(tl.float32), absent)
    b_x, b_y = b_lower.to(tl.float32), b_upper.to(tl.float32)
    return (b_x * b_cos - b_y * b_sin).to(b_lower.dtype), (b_y * b_cos + b_x * b_sin).to(b_lower.dtype)


@cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where kernels are emulated."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch: everything but the doing, so that it can also be compiled for a GPU that is not there."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)

    def __call__(self) -> None:
        if all(self.grid):
            self.kernel[self.grid](**self.arguments, **self.options)


@dataclass(frozen=True, slots=True)
class Operands:
    """A call's tensors as the kernels take them: contiguous, the state's recent tokens apart.

    recent_places: of the ring, R. window and delay are clamped to what exists, beyond which they change nothing: so all
    positions fit in 32 bits.
    """

    tokens: Tokens
    recent: Tokens
    cu_seqlens: Tensor | None
    seen: Tensor | None
    recent_places: int
    window: int
    delay: int

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Operands:
        """Gather the operands of a call; copies only what is not contiguous."""
        state = inputs.state
        if state is not None and state.capacity == 0:
            # Nothing was seen yet, or nothing of it matters any more: then the slots alone are the state.
            state = state.with_full_capacity() if problem.delay > 0 else None
        places = 0 if state is None else state.capacity
        cu_seqlens = inputs.cu_seqlens
        if cu_seqlens is not None:  # unchecked where that would wait for the device; in bounds they must be
            cu_seqlens = cu_seqlens.clamp(0, problem.tokens).cummax(0).values
        return cls(
            tokens=_contiguous(inputs.k, inputs.v, inputs.g, inputs.s, inputs.k_window),
            recent=Tokens(None, None, None, None, None)
            if state is None
            else _contiguous(state.k, state.v, state.g, state.s, state.k_window),
            cu_seqlens=cu_seqlens,
            seen=None if state is None else state.seen.contiguous(),
            recent_places=places,
            window=min(problem.window, problem.tokens + places),
            delay=min(problem.delay, problem.tokens + places),
        )

    def pieces(self, problem: Problem, extra: int, size: int) -> tuple[int, Layout]:
        """Cut each sequence, `extra` tokens longer, into pieces of `size`: their number, and whose they are.

        The number is of pieces a sequence; of packed sequences, whose lengths only the device knows, an upper bound for
        all together.
        """
        if self.cu_seqlens is None:
            return -(-max(0, problem.tokens + extra) // size), Layout(None, self.seen, None, None)
        length = self.cu_seqlens.diff()
        count = torch.where(length > 0, (length + extra + size - 1).clamp(min=0) // size, 0)
        bound = (problem.tokens + problem.sequences * max(0, extra)) // size + problem.sequences
        return bound, Layout(self.cu_seqlens, self.seen, *map_pieces(count, bound))


def _contiguous(k: Tensor, v: Tensor, g: Tensor, s: Tensor | None, k_window: Tensor | None) -> Tokens:
    k = k.contiguous()
    k_window = k if k_window is None else k_window.contiguous()
    return Tokens(k, v.contiguous(), g.contiguous(), None if s is None else s.contiguous(), k_window)


def map_pieces(count: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Number the pieces of N sequences, `count` [N] each, without a wait for the device.

    Gives sequence [bound] int32 (N where there is no such piece) and first [N + 1] int32.
    """
    first = torch.cat((count.new_zeros(1), count.cumsum(0)))
    piece = torch.arange(bound, device=count.device)
    sequence = torch.searchsorted(first[1:].contiguous(), piece, right=True)
    return sequence.to(torch.int32), first.to(torch.int32)
