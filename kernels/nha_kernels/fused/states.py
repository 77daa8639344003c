"""The slots at every C-th token, in parallel over time.

The recurrence K~ <- diag(alpha) K~ + s k^T is diagonal, so a sequence is cut into segments of L tokens: each segment's
own contribution from zero slots (`segment_kernel`), a scan over the segments' ends (`scan_kernel`), and the segments
once more, now from the slots that they begin with, writing what each chunk of C tokens meets (`segment_kernel` with
WRITE).

E = D + DV: K~ and V~ stand side by side. A stream position p absorbs token p; it runs from -PAST, the oldest multiple
of C that reaches `delay` tokens back, where there is an initial state, else from 0, and stops `delay` tokens before the
end: those wait for the next call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from .primitives import (
    EARLY,
    FORGET,
    LOG2E,
    Launch,
    Layout,
    Operands,
    at_least,
    dot,
    find_piece,
    load_tokens,
    load_tokens_transposed,
    start_next,
    sum_gates_transposed,
    wait_for_previous,
    write_strength,
)


@dataclass(frozen=True, slots=True)
class StatesConfig:
    """How the state pass is launched.

    chunk: tokens between two stored states, C, at most 32. segment: tokens of one program, L. block: tokens of one step
    without WRITE (with it: the chunk). All powers of two >= 16, each dividing the next larger. columns: of K~ or V~ a
    program.
    """

    chunk: int
    segment: int
    block: int
    columns: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        # With states every 64 tokens the output is computed wrongly on Hopper where ptxas 12.8 compiles it.
        if self.chunk not in (16, 32):
            raise ValueError(f"chunk: expected 16 or 32; got {self.chunk}")

    @classmethod
    def default(cls, problem: Problem, chunk: int) -> StatesConfig:
        """By head size and dtype; no search, no measurement."""
        columns = min(128, max(16, triton.next_power_of_2(max(problem.head_dim, problem.value_dim))))
        segment = _segment_length(problem)
        if problem.dtype == torch.float32:  # twice the bytes and no tensor cores: small steps
            return cls(chunk=chunk, segment=segment, block=chunk, columns=min(64, columns), warps=4, stages=1)
        return cls(chunk=chunk, segment=segment, block=64, columns=columns, warps=4, stages=2)


def _segment_length(problem: Problem) -> int:
    """Long enough to amortise a segment's start, short enough for two waves of programs on a large GPU."""
    columns = -(-problem.head_dim // 128) + -(-problem.value_dim // 128)
    programs_per_token = problem.batch * problem.kv_heads * columns * -(-problem.slots // 64)
    length = problem.tokens * programs_per_token // 512
    if problem.packed:  # states are stored by whole segments: many short sequences must not pay for long ones
        length = min(length, 2 * problem.tokens // problem.sequences)
    return min(1024, max(64, triton.next_power_of_2(length + 1) // 2))


@dataclass(frozen=True, slots=True)
class StoredStates:
    """What the state pass writes: states [segments * L / C, H, M, E], the slots before every chunk, and the final slots
    [N, H, M, E] fp32 if asked for. segments, layout: as `Operands.pieces` gives them. totals [segments, H, M] fp32: the
    sum of each segment's gates, in log2."""

    states: Tensor
    final: Tensor | None
    segments: int
    layout: Layout
    chunk: int
    chunks_a_segment: int
    totals: Tensor


@triton.jit(do_not_specialize=["T", "R", "delay", "segments", "N"])
def segment_kernel(
    tokens, recent, layout, p_ends, p_totals, p_states, T, R, delay, segments, N,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    C: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """One segment, one kv head, BD columns of K~ or V~, BM slots.

    p_ends [segments, H, M, E] fp32: written with the segment's own contribution; with WRITE, read: the slots before it.
    p_totals [segments, H, M] fp32: the sum of its gates, in log2.
    p_states [segments * L / C, H, M, E]: with WRITE, the slots before each chunk.
    """
    E: tl.constexpr = D + DV
    K_BLOCKS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = K_BLOCKS + (DV + BD - 1) // BD
    segment = tl.program_id(0)
    h = tl.program_id(1) // BLOCKS
    block = tl.program_id(1) % BLOCKS
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    if layout.cu_seqlens is not None:
        if tl.load(layout.sequence + segment) >= N:
            return
    n, index, start, length, seen = find_piece(layout, segment, segments, T)

    is_k = block < K_BLOCKS
    if D == DV:
        size = D
    else:
        size = tl.where(is_k, D, DV)
    column = tl.where(is_k, block, block - K_BLOCKS) * BD + tl.arange(0, BD)
    m_column = column < size
    p_x = tokens.k if is_k else tokens.v
    if recent.k is None:
        p_recent = None
        past = 0
        oldest = 0
    else:
        p_recent = recent.k if is_k else recent.v
        past = (delay + C - 1) // C * C
        oldest = -tl.minimum(seen, delay)
    m_slot = m < M

    # [BM, BD] of this segment's place in p_ends
    row = (segment.to(tl.int64) * H + h) * M + m
    e = column + tl.where(is_k, 0, D)
    p_end = p_ends + row[:, None] * E + e[None, :]
    m_end = m_slot[:, None] & m_column[None, :]
    if WRITE:
        b_state = tl.load(p_end, mask=m_end, other=0.0)
    else:
        b_state = tl.zeros([BM, BD], tl.float32)
    b_total = tl.zeros([BM], tl.float32)

    j = tl.arange(0, BT)
    m_later = (j[:, None] > j[None, :]).to(tl.float32)  # [BT, BT]: the gates between a token and the block's end
    for begin in range(0, L, BT):
        if WRITE:  # a step is a chunk
            chunk = segment.to(tl.int64) * (L // C) + begin // C
            p_state = p_states + ((chunk * H + h) * M + m)[:, None] * E + e[None, :]
            tl.store(p_state, b_state.to(p_states.dtype.element_ty), mask=m_end)
        position = index * L - past + begin + j
        m_exists = (position >= oldest) & (position < length - delay)
        b_g = load_tokens_transposed(
            tokens.g, recent.g, start, n, seen, position, m_exists, h, H, R, M, m, m_slot
        )  # [BM, BT]
        if tokens.s is None:
            b_s = None
        else:
            b_s = load_tokens_transposed(
                tokens.s, recent.s, start, n, seen, position, m_exists, h, H, R, M, m, m_slot
            )  # [BM, BT]
        b_x = load_tokens(
            p_x, p_recent, start, n, seen, position, m_exists, h, H, R, size, column, m_column
        )  # [BT, BD]
        b_strength = write_strength(b_g, b_s)
        b_g = at_least(b_g, FORGET)
        b_later = sum_gates_transposed(b_g, m_later, b_x.dtype)  # [BM, BT]
        b_step = tl.sum(b_g.to(tl.float32), 1) * LOG2E  # [BM]
        b_weight = (b_strength * tl.exp2(b_later)).to(b_x.dtype)  # [BM, BT]
        b_state = b_state * tl.exp2(b_step)[:, None] + dot(b_weight, b_x)
        b_total += b_step

    if not WRITE:
        tl.store(p_end, b_state, mask=m_end)
        if block == 0:
            tl.store(p_totals + row, b_total, mask=m_slot)


@triton.jit(do_not_specialize=["segments"])
def scan_kernel(
    layout, p_ends, p_totals, p_initial, p_final, p_out, segments,
    H: tl.constexpr, M: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, AHEAD: tl.constexpr,
    IS_EARLY: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """One sequence, one kv head, BM slots, BE columns: turn the segments' contributions into the slots before each.
    BACKWARD: from the last to the first, so that a segment gets what those behind it come to.

    p_ends [segments, H, M, E] fp32; p_out: likewise, of any dtype, or the same; p_initial, p_final [N, H, M, E] fp32
    (either may be None).
    IS_EARLY: launched so, as is the kernel behind it.
    """
    if IS_EARLY:
        start_next()
        wait_for_previous()
    n = tl.program_id(0)
    h = tl.program_id(1)
    m = tl.program_id(2) // ((E + BE - 1) // BE) * BM + tl.arange(0, BM)
    e = tl.program_id(2) % ((E + BE - 1) // BE) * BE + tl.arange(0, BE)
    m_slot = m < M
    m_state = m_slot[:, None] & (e < E)[None, :]
    if layout.cu_seqlens is None:
        first = n * segments
        count = segments
    else:
        first = tl.load(layout.first + n)
        count = tl.load(layout.first + n + 1) - first
    own = ((n.to(tl.int64) * H + h) * M + m)[:, None] * E + e[None, :]
    if p_initial is None:
        b_state = tl.zeros([BM, BE], tl.float32)
    else:
        b_state = tl.load(p_initial + own, mask=m_state, other=0.0)
    if BACKWARD:
        first += count - 1
        step = -H * M
    else:
        step = H * M
    row = (first.to(tl.int64) * H + h) * M + m
    for _ in tl.range(0, count, num_stages=AHEAD):
        place = row[:, None] * E + e[None, :]  # [BM, BE]
        b_end = tl.load(p_ends + place, mask=m_state, other=0.0)
        b_decay = tl.exp2(tl.load(p_totals + row, mask=m_slot, other=0.0))  # [BM]
        tl.store(p_out + place, b_state.to(p_out.dtype.element_ty), mask=m_state)
        b_state = b_state * b_decay[:, None] + b_end
        row += step
    if p_final is not None:
        tl.store(p_final + own, b_state, mask=m_state)


def state_launches(
    problem: Problem, operands: Operands, initial: Tensor | None, config: StatesConfig
) -> tuple[list[Launch], StoredStates]:
    """The launches of the state pass, in order; initial [N, H, M, E]: the slots before the call (None: zero)."""
    heads, slots, dim, value_dim = problem.kv_heads, problem.slots, problem.head_dim, problem.value_dim
    width = dim + value_dim
    past = -(-operands.delay // config.chunk) * config.chunk if operands.recent_places else 0
    segments, layout = operands.pieces(problem, past - operands.delay, config.segment)
    pieces = segments if problem.packed else segments * problem.sequences
    chunks = config.segment // config.chunk

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=operands.tokens.k.device)

    ends, totals = empty(pieces, heads, slots, width), empty(pieces, heads, slots)
    stored = StoredStates(
        states=empty(pieces * chunks, heads, slots, width, dtype=problem.dtype),
        final=empty(problem.sequences, heads, slots, width) if problem.output_final_state else None,
        segments=segments, layout=layout, chunk=config.chunk, chunks_a_segment=chunks, totals=totals,
    )  # fmt: skip
    slot_block = min(64, max(16, triton.next_power_of_2(slots)))
    segment = dict(
        tokens=operands.tokens, recent=operands.recent, layout=layout, p_ends=ends, p_totals=totals,
        p_states=stored.states, T=problem.tokens, R=operands.recent_places, delay=operands.delay, segments=segments,
        N=problem.sequences, H=heads, D=dim, DV=value_dim, M=slots, C=config.chunk, L=config.segment, BM=slot_block,
        BD=config.columns,
    )  # fmt: skip
    blocks = -(-dim // config.columns) + -(-value_dim // config.columns)
    grid = (pieces, heads * blocks, -(-slots // slot_block))
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return [
        Launch(segment_kernel, grid, {**segment, "BT": config.block, "WRITE": False}, options),
        scan_launch(problem, layout, ends, totals, initial, stored.final, segments),
        Launch(segment_kernel, grid, {**segment, "BT": config.chunk, "WRITE": True}, options),
    ], stored


def scan_launch(
    problem: Problem, layout: Layout, ends: Tensor, totals: Tensor, initial: Tensor | None, final: Tensor | None,
    segments: int, early: bool = False, backward: bool = False, out: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch that turns ends [pieces, H, M, E] into the slots before each segment, in place or in `out`; arguments
    as `scan_kernel`'s."""
    heads, slots, width = problem.kv_heads, problem.slots, problem.head_dim + problem.value_dim
    columns = min(128, triton.next_power_of_2(width))
    # Early programs keep away those of the next kernel, which need a whole processor: so few warps in all, each with
    # many segments under way.
    rows, warps, ahead = (8, 4, 8) if early else (1, 1, 4)
    arguments = dict(
        layout=layout, p_ends=ends, p_totals=totals, p_initial=initial, p_final=final,
        p_out=ends if out is None else out, segments=segments, H=heads,
        M=slots, E=width, BM=rows, BE=columns, AHEAD=ahead, IS_EARLY=early, BACKWARD=backward,
    )  # fmt: skip
    grid = (problem.sequences, heads, -(-slots // rows) * -(-width // columns))
    return Launch(scan_kernel, grid, arguments, {"num_warps": warps, **(EARLY if early else {})})
