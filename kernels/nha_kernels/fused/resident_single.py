"""The forward on Hopper with the slots on the chip, for one query head a kv head.

As `resident`, but no group of query heads fills a tile: its 64 rows are 64 tokens of a head. Heads of 256 do not fit
whole: two programs share the columns of their values.

A program takes one segment, one head and DV columns of the values. Its warps divide the work:

    load     k and v in blocks of 64 tokens, into rings of R blocks, gates and q of a tile, by the copy engine
    count    by which steps a tile is taken in
    state    8 warps. Holds K~ and V~ in fp32 registers. For every step it publishes them in bf16, with the decays, and
             then absorbs the tokens that leave the window
    output   4 warps: a tile's logits against slots and window, one softmax, the values, o

With delay = W, block i holds the tokens that leave while tile i is served: its token j lies in the window of the tile's
token t for t < j <= t + W, and in its slots for j <= t. The window reaches into the first W tokens of block i + 1. With
S the slots before block i,

    q_t . K~ = 2^(c_t) (q_t . S) + sum_{j <= t} (q_t . k_j) s_j 2^(c_t - c_j)          c: log2 decay since block i began

slot by slot, and the values likewise from the other side. 2^(c_t + A) goes with the rows and 2^(-c_j - A) with tokens
and S, which is kept times 2^-A: as long as a tile's gates add up to no less than 2^-208 in any slot, each of them stays
within bf16's exponents. The slots take a block in with the same factors: S <- 2^c (S + sum_j s_j 2^(-c_j) k_j), with c
of the whole block.

Where gates are stronger, a tile is taken in by several steps, each of some parts of 16 tokens: in a step, the block's
other tokens have gates and strengths of 0, and only the step's own rows are written. A step ends before the part that
would exceed the sum; a single part that does has its gates cut off at 2^-13 a token (`STRONGEST`). So what a row meets
hangs on gates of its own part and of those before it only, which are all in its past as long as W >= 15: that a step
ends later or sooner changes no bit of it.

The sums c are products with a triangle of ones: gates stay in the layout of the products, rows of 64 slots, and what
the partitions hand each other moves without bank conflicts.

Sizes as in `primitives`. BM: slots of a block, those beyond M masked. NEXT: W, rounded up to what a product takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..problem import Inputs, Problem
from .hopper import (
    barrier,
    barriers,
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    load_async,
    mbarrier,
    mma_v2,
    tile_layout,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .primitives import FORGET, LOG2E, STRONGEST, Launch, wait_for_previous
from .resident import ANCHOR, PROGRAMS, ResidentConfig, first_reason
from .segment_ends import BM, load_slots, strength

TOKENS = gl.constexpr(64)  # of a tile, and of a block of the rings
PART = gl.constexpr(16)  # tokens that share an anchor whatever their gates
PARTS = gl.constexpr(4)
STATE_WARPS = gl.constexpr(8)
RING = {64: 4, 128: 3, 256: 2}  # R by head size: what shared memory has room for


@dataclass(frozen=True, slots=True)
class SingleConfig(ResidentConfig):
    """The same of this kernel."""

    REGISTERS: ClassVar[Mapping[tuple[int, bool], int]] = {(64, False): 184, (128, False): 168, (256, False): 152}


def why_not_single(problem: Problem) -> str | None:
    """The sentence that says why a call is not for this kernel, or None."""
    return first_reason(
        problem,
        (problem.head_dim == problem.value_dim and problem.head_dim in PROGRAMS, "takes D = Dv = 64, 128 or 256"),
        (problem.group == 1, "takes one query head a kv head"),
        (16 <= problem.window <= 64, "takes W of 16 to 64"),
        (problem.positions == "none", "takes no rotary embedding"),
        # Shared memory has no room for wider ones.
        (problem.head_dim < 256 or problem.gate_dtype.itemsize == 2, "takes gates of 16 bits with heads of 256"),
    )


@gluon.jit
def add_up(b_g, s_sum, upto, TERMS: gl.constexpr):
    """Sums of b_g [rows, BM] over those rows that upto [rows, rows], ones and zeros, has for each: a product. upto: in
    shared memory, or as a left operand in registers."""
    b_sum = gl.full_like(b_g, 0.0)
    if TERMS == 2:  # fp32 gates go in as two terms of bf16
        b_rest = b_g - b_g.to(gl.bfloat16).to(gl.float32)
        s_sum.store(b_rest.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        b_sum = warpgroup_mma(upto, s_sum, b_sum, is_async=True)
        b_sum, upto = warpgroup_mma_wait(0, deps=(b_sum, upto))
        barrier()
    s_sum.store(b_g.to(gl.bfloat16))
    fence_async_shared()
    barrier()
    b_sum = warpgroup_mma(upto, s_sum, b_sum, is_async=True)
    return warpgroup_mma_wait(0, deps=(b_sum, upto))[0]


@gluon.jit
def sum_part(s_gate, x: gl.constexpr, b_sum, gates: gl.constexpr):
    """b_sum [BM, 8] and the gates of part x, the same in all columns, in bf16: near enough to choose by."""
    b_one = gl.full([PART, 8], 1.0, gl.bfloat16, gl.DotOperandLayout(1, b_sum.type.layout, 2))
    return mma_v2(s_gate.slice(x * PART, PART).permute((1, 0)).load(gates).to(gl.bfloat16), b_one, b_sum)


@gluon.jit
def count_partition(s_g, s_marks, g_full, g_free, marks_full, tiles):
    """The steps of each tile: bit x is set where one begins with part x, and bit PARTS + x where this part alone is
    more than an anchor spans. They can be read until those of tile i + 4 are written."""
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    gates: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=sums, k_width=2)
    s_gate = s_g.reshape([TOKENS, BM])
    for i in range(tiles):
        mbarrier.wait(g_full.index(0), i & 1)
        b_zero = gl.zeros([BM, 8], gl.float32, sums)
        b_sum = b_zero
        for x in gl.static_range(PARTS):
            b_sum = sum_part(s_gate, x, b_sum, gates)
        marks = 1
        if gl.min(gl.min(b_sum, 1), 0) < PART * STRONGEST:
            b_sum = b_zero
            for x in gl.static_range(PARTS):
                b_sum = sum_part(s_gate, x, b_sum, gates)
                if gl.min(gl.min(b_sum, 1), 0) < PART * STRONGEST:
                    marks = marks | (1 << x)
                    b_sum = sum_part(s_gate, x, b_zero, gates)
                    if gl.min(gl.min(b_sum, 1), 0) < PART * STRONGEST:
                        marks = marks | (1 << (PARTS + x))
        s_marks.index(i % 4).store(gl.full([1], marks, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        barrier()
        mbarrier.arrive(g_free.index(0), count=1)
        mbarrier.arrive(marks_full.index(i % 2), count=1)


@gluon.jit
def read_marks(s_marks, i, warps: gl.constexpr):
    """Those of tile i, for a partition of so many warps."""
    return gl.max(s_marks.index(i % 4).load(gl.BlockedLayout([1], [32], [warps], [0])), 0)


@gluon.jit
def end_of_step(marks, part):
    """The part behind the last one of the step that begins with `part`."""
    end = gl.where((part < 3) & ((marks & 8) > 0), 3, PARTS)
    end = gl.where((part < 2) & ((marks & 4) > 0), 2, end)
    return gl.where((part < 1) & ((marks & 2) > 0), 1, end)


@gluon.jit
def gates_again(s_g, s_sum, layout: gl.constexpr):
    """The gates that were last put into s_sum, in fp32: from there where bf16 holds them, else from their place."""
    if s_g.dtype == gl.bfloat16:
        return s_sum.load(layout).to(gl.float32)
    else:
        return gl.maximum(s_g.load(layout), FORGET)


@gluon.jit
def factors(b_g, b_sum):
    """s_j 2^(-c_j - A), in bf16, and 2^(c_j + A): the same to the bit, whatever steps their tile is taken in by."""
    b_factor = strength(b_g) * gl.exp2(gl.fma(b_sum, -LOG2E, -ANCHOR))
    return b_factor.to(gl.bfloat16), gl.exp2(gl.fma(b_sum, LOG2E, ANCHOR))


@gluon.jit
def load_partition(
    d_q, d_k, d_v, d_g, s_q, s_k, s_v, s_g, q_full, q_free, k_full, k_free, v_full, v_free, g_full, g_free,
    n, h, column, t0, tiles,
    D: gl.constexpr, DV: gl.constexpr, W: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """Block x of a ring holds the tokens from t0 - W + 64 x on; those outside of the sequence read as 0."""
    GATE_BYTES: gl.constexpr = d_g.dtype.primitive_bitwidth // 8
    for x in range(tiles + 1):
        place = x % R
        mbarrier.wait(k_free.index(place), ((x // R) & 1) ^ 1)
        mbarrier.expect(k_full.index(place), TOKENS * D * 2)
        load_async(d_k, [n, t0 - W + x * TOKENS, h, 0], k_full.index(place), s_k.index(place))
        mbarrier.wait(v_free.index(place), ((x // R) & 1) ^ 1)
        mbarrier.expect(v_full.index(place), TOKENS * DV * 2)
        load_async(d_v, [n, t0 - W + x * TOKENS, h, column], v_full.index(place), s_v.index(place))
        # Now all is there that the tile before needs: in several steps, it may be what keeps the place of the gates.
        if x < tiles:
            mbarrier.wait(g_free.index(0), (x & 1) ^ 1)
            mbarrier.expect(g_full.index(0), TOKENS * BM * GATE_BYTES)
            load_async(d_g, [n, t0 - W + x * TOKENS, h, 0], g_full.index(0), s_g)
            mbarrier.wait(q_free.index(0), (x & 1) ^ 1)
            mbarrier.expect(q_full.index(0), TOKENS * D * 2)
            load_async(d_q, [n, t0 + x * TOKENS, h, 0], q_full.index(0), s_q.index(0))


@gluon.constexpr_function
def wide_layout(columns: int) -> Any:
    """Of a product [64, columns] by both warpgroups of the state."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, columns // 2, 16])


@gluon.jit
def state_partition(
    p_before, s_k, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_decay, s_marks, s_row, s_sum, s_upto,
    k_full, k_free, v_full, v_free, g_full, g_free, marks_full, slots_full, slots_free, rest_full, rest_free, row,
    column, tiles,
    M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """K~ [BM, D] and V~ [BM, DV], both times 2^-A, and every step's decays."""
    keys: gl.constexpr = wide_layout(D)
    values: gl.constexpr = wide_layout(DV)
    rows: gl.constexpr = wide_layout(BM)
    ends: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 8, 16])
    of_keys: gl.constexpr = gl.SliceLayout(1, keys)
    of_values: gl.constexpr = gl.SliceLayout(1, values)
    TERMS: gl.constexpr = 1 if s_g.dtype == gl.bfloat16 else 2
    s_gate = s_g.reshape([TOKENS, BM])
    mbarrier.wait(g_full.index(0), 0)
    b_sum = add_up(gl.maximum(s_gate.load(rows).to(gl.float32), FORGET), s_sum, s_upto, TERMS)
    b_factor, b_decay = factors(gates_again(s_gate, s_sum, rows), b_sum)
    if TERMS == 1:
        mbarrier.arrive(g_free.index(0), count=1)
    if p_before is not None:
        wait_for_previous()  # not before: until here nothing depends on it
    b_k = load_slots(p_before, row, 0, M, D, D, keys) * 2.0**-ANCHOR
    b_v = load_slots(p_before, row, D + column, M, D, DV, values) * 2.0**-ANCHOR
    turn = 0  # steps so far
    for i in range(tiles):
        place = i % R
        # The last token's decay, which is the least of the last eight, is that of all.
        s_end = s_decay.slice(TOKENS - 8, 8).permute((1, 0))
        mbarrier.wait(marks_full.index(i % 2), (i // 2) & 1)
        marks = read_marks(s_marks, i, STATE_WARPS)
        part = 0
        while part < PARTS:
            mbarrier.wait(slots_free.index(0), (turn & 1) ^ 1)
            s_slot_k.index(0).store(b_k.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            mbarrier.arrive(slots_full.index(0), count=1)
            mbarrier.wait(rest_free.index(0), (turn & 1) ^ 1)
            s_slot_v.index(0).store(b_v.to(gl.bfloat16))
            end = end_of_step(marks, part)
            if end - part < PARTS:
                t = s_row.load(gl.SliceLayout(1, rows))[:, None] // PART
                b_part = gl.where((t >= part) & (t < end), gates_again(s_gate, s_sum, rows), 0.0)
                # Where gates are cut off, K~ and V~ lose at once what they lose beyond that.
                lowest = gl.where(((marks >> (PARTS + part)) & 1) > 0, STRONGEST, FORGET)
                b_over = add_up(gl.minimum(b_part - lowest, 0.0), s_factor.index(0), s_upto, TERMS)
                s_decay.store(gl.exp2(b_over * LOG2E))
                barrier()
                b_over = gl.min(s_end.load(ends), 1)
                b_k = b_k * gl.convert_layout(b_over, of_keys)[:, None]
                b_v = b_v * gl.convert_layout(b_over, of_values)[:, None]
                barrier()
                b_upto = add_up(gl.maximum(b_part, lowest), s_factor.index(0), s_upto, TERMS)
                barrier()
                b_factor, b_decay = factors(b_part, b_upto)
            s_factor.index(0).store(b_factor)
            s_decay.store(b_decay)
            fence_async_shared()
            barrier()
            mbarrier.arrive(rest_full.index(0), count=1)
            last = end == PARTS
            if TERMS == 2:
                mbarrier.arrive(g_free.index(0), count=1, pred=last)
            turn += 1

            b_end = s_end.load(ends)
            if last:
                mbarrier.wait(g_full.index(0), gl.minimum(i + 1, tiles - 1) & 1)
                b_upto = add_up(gl.maximum(s_gate.load(rows).to(gl.float32), FORGET), s_sum, s_upto, TERMS)
                if TERMS == 1:
                    mbarrier.arrive(g_free.index(0), count=1)
            else:  # what takes their place is not used
                b_upto = gl.zeros([TOKENS, BM], gl.float32, rows)
            mbarrier.wait(k_full.index(place), (i // R) & 1)
            mbarrier.wait(v_full.index(place), (i // R) & 1)
            s_left = s_factor.index(0).permute((1, 0))  # [BM, TOKENS]
            b_k = warpgroup_mma(s_left, s_k.index(place).reshape([TOKENS, D]), b_k, is_async=True)
            b_v = warpgroup_mma(s_left, s_v.index(place).reshape([TOKENS, DV]), b_v, is_async=True)
            # Meanwhile, those of the next tile.
            b_factor, b_decay = factors(gates_again(s_gate, s_sum, rows), b_upto)
            b_k, b_v = warpgroup_mma_wait(0, deps=[b_k, b_v])
            barrier()
            mbarrier.arrive(k_free.index(place), count=1, pred=last)
            mbarrier.arrive(v_free.index(place), count=1, pred=last)
            b_end = gl.min(b_end, 1)
            b_k = b_k * gl.convert_layout(b_end, of_keys)[:, None] * 2.0**-ANCHOR
            b_v = b_v * gl.convert_layout(b_end, of_values)[:, None] * 2.0**-ANCHOR
            part = end


@gluon.constexpr_function
def store_layout(columns: int) -> Any:
    """Of o [64, columns] on its way to memory: as in a product, but 8 neighbouring columns a thread, which go in one
    piece. Its rows stay with their threads, four of which exchange columns."""
    further = [[0, 32 << x] for x in range((columns // 32).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *further, [8, 0]], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, columns],
    )  # fmt: skip


@gluon.jit
def zero_of(s_zero, x: gl.constexpr):
    """0, but not for the compiler, which would else keep the address of each product in registers from tile to tile."""
    return gl.max(s_zero.slice(x, 1).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def output_partition(
    p_o, p_lse, s_q, s_k, s_v, s_slot_k, s_slot_v, s_factor, s_decay, s_marks, s_row, s_zero,
    q_full, q_free, k_full, k_free, v_full, v_free, slots_full, slots_free, rest_full, rest_free,
    n, h, column, t0, tiles, T, scale,
    H: gl.constexpr, M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, W: gl.constexpr, NEXT: gl.constexpr,
    R: gl.constexpr, MASK_EMPTY: gl.constexpr,
):  # fmt: skip
    slots: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    nexts: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, NEXT, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=slots, k_width=2)
    stored: gl.constexpr = store_layout(DV)
    of_slots: gl.constexpr = gl.SliceLayout(1, slots)
    of_nexts: gl.constexpr = gl.SliceLayout(1, nexts)
    of_values: gl.constexpr = gl.SliceLayout(1, values)
    bf16: gl.constexpr = gl.bfloat16
    inf: gl.constexpr = float("inf")

    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, slots))[None, :]
    j_next = gl.arange(0, NEXT, layout=gl.SliceLayout(0, nexts))[None, :] + (TOKENS - W)
    d = gl.arange(0, DV, layout=gl.SliceLayout(0, stored))[None, :]
    to_log2 = scale * LOG2E
    b_zero = gl.zeros([TOKENS, BM], gl.float32, slots)
    gl.static_assert(BM == TOKENS)
    turn = 0
    for i in range(tiles):
        first = t0 + i * TOKENS
        mbarrier.wait(q_full.index(0), i & 1)
        mbarrier.wait(k_full.index(i % R), (i // R) & 1)
        mbarrier.wait(k_full.index((i + 1) % R), ((i + 1) // R) & 1)
        part = 0
        while part < PARTS:
            # Rows of the tile. From memory, so that no mask made of them is kept in registers from tile to tile.
            t = s_row.load(of_slots)[:, None]
            at_own = zero_of(s_zero, 0)
            at_slots = zero_of(s_zero, 1)
            at_next = zero_of(s_zero, 2)
            at_factor = zero_of(s_zero, 3)
            at_new = zero_of(s_zero, 4)
            at_values = zero_of(s_zero, 5)
            mbarrier.wait(slots_full.index(0), turn & 1)
            s_key = s_k.index(i % R + at_own).reshape([TOKENS, D]).permute((1, 0))
            b_own = warpgroup_mma(s_q.index(at_own).reshape([TOKENS, D]), s_key, b_zero, use_acc=False, is_async=True)
            s_key = s_slot_k.index(at_slots).permute((1, 0))
            b_slot = warpgroup_mma(
                s_q.index(at_slots).reshape([TOKENS, D]), s_key, b_zero, use_acc=False, is_async=True
            )
            s_key = s_k.index((i + 1) % R + at_next).reshape([TOKENS, D]).slice(0, NEXT).permute((1, 0))
            b_next = gl.zeros([TOKENS, NEXT], gl.float32, nexts)
            b_next = warpgroup_mma(s_q.index(at_next).reshape([TOKENS, D]), s_key, b_next, use_acc=False, is_async=True)
            b_own, b_slot, b_next = warpgroup_mma_wait(0, deps=(b_own, b_slot, b_next))
            # Of the first 64 tokens those up to a row are in its slots, those after it in its window.
            b_pair = gl.convert_layout(gl.where(j <= t, b_own, 0.0).to(bf16), left)
            barrier()
            mbarrier.arrive(slots_free.index(0), count=1)
            mbarrier.wait(rest_full.index(0), turn & 1)
            end = end_of_step(read_marks(s_marks, i, 4), part)
            last = end == PARTS
            mbarrier.arrive(q_free.index(0), count=1, pred=last)
            mbarrier.arrive(k_free.index(i % R), count=1, pred=last)
            b_slot = warpgroup_mma(b_pair, s_factor.index(at_factor), b_slot, is_async=True)
            b_own = gl.where(j <= gl.maximum(t, W - 1 - first), -inf, b_own)  # and none before the sequence
            if W < TOKENS:
                b_own = gl.where(j <= t + W, b_own, -inf)
            b_next = gl.where(j_next <= s_row.load(of_nexts)[:, None], b_next, -inf)
            b_max = gl.maximum(gl.max(b_own, 1), gl.convert_layout(gl.max(b_next, 1), of_slots))  # [TOKENS]
            b_decay = s_decay.load(slots)  # [TOKENS, BM]
            b_slot, _ = warpgroup_mma_wait(0, deps=(b_slot, b_pair))
            b_slot = b_slot * b_decay
            if M < BM:
                b_slot = gl.where(j < M, b_slot, -inf)
            if MASK_EMPTY:
                b_slot = gl.where(t + first < W, -inf, b_slot)
            b_max = gl.maximum(gl.max(b_slot, 1), b_max) * to_log2
            b_slot = gl.exp2(b_slot * to_log2 - b_max[:, None])
            b_sum = gl.sum(b_slot, 1)  # [TOKENS]
            b_slot = gl.convert_layout((b_slot * b_decay).to(bf16), left)
            # What the slots weigh of the first 64 tokens.
            s_right = s_factor.index(at_new).permute((1, 0))
            b_new = warpgroup_mma(b_slot, s_right, b_zero, use_acc=False, is_async=True)
            b_own = gl.exp2(b_own * to_log2 - b_max[:, None])
            b_next = gl.exp2(b_next * to_log2 - gl.convert_layout(b_max, of_nexts)[:, None])
            b_sum += gl.sum(b_own, 1) + gl.convert_layout(gl.sum(b_next, 1), of_slots)
            b_next = gl.convert_layout(b_next.to(bf16), left)
            mbarrier.wait(v_full.index(i % R), (i // R) & 1)
            mbarrier.wait(v_full.index((i + 1) % R), ((i + 1) // R) & 1)
            s_value = s_v.index((i + 1) % R + at_values).reshape([TOKENS, DV]).slice(0, NEXT)
            b_o = gl.zeros([TOKENS, DV], gl.float32, values)
            if D == 256:  # no registers for o while the weights are still made
                b_new, b_slot = warpgroup_mma_wait(0, deps=(b_new, b_slot))
                b_own = gl.where(j <= s_row.load(of_slots)[:, None], b_new, b_own)
                b_own = gl.convert_layout(b_own.to(bf16), left)
                b_o = warpgroup_mma(b_slot, s_slot_v.index(at_values), b_o, use_acc=False, is_async=True)
                b_o = warpgroup_mma(b_next, s_value, b_o, is_async=True)
            else:
                b_o = warpgroup_mma(b_slot, s_slot_v.index(at_values), b_o, use_acc=False, is_async=True)
                b_o = warpgroup_mma(b_next, s_value, b_o, is_async=True)
                b_new = warpgroup_mma_wait(2, deps=(b_new,))
                b_own = gl.where(j <= s_row.load(of_slots)[:, None], b_new, b_own)
                b_own = gl.convert_layout(b_own.to(bf16), left)
            b_o = warpgroup_mma(b_own, s_v.index(i % R + at_values).reshape([TOKENS, DV]), b_o, is_async=True)
            b_o = warpgroup_mma_wait(0, deps=(b_o, b_slot, b_next, b_own))[0]
            barrier()
            mbarrier.arrive(rest_free.index(0), count=1)
            mbarrier.arrive(v_free.index(i % R), count=1, pred=last)
            b_o = b_o * gl.convert_layout(1.0 / b_sum, of_values)[:, None]
            t = s_row.load(gl.SliceLayout(1, stored))
            mine = (first + t < T) & (t // PART >= part) & (t // PART < end)
            p_row = p_o + ((n.to(gl.int64) * T + first + t) * H + h)[:, None] * D + column + d
            gl.store(p_row, gl.convert_layout(b_o.to(bf16), stored), mask=mine[:, None])
            if p_lse is not None:
                t = s_row.load(of_slots)
                mine = (first + t < T) & (t // PART >= part) & (t // PART < end)
                p_row = p_lse + (n.to(gl.int64) * T + first + t) * H + h
                gl.store(p_row, (b_max + gl.log2(b_sum)) / LOG2E, mask=mine & (column == 0))
            turn += 1
            part = end


@gluon.jit(do_not_specialize=["T", "tiles", "segments"])
def single_kernel(
    d_q, d_k, d_v, d_g, p_o, p_before, p_lse, T, tiles, segments, scale,
    H: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, M: gl.constexpr, W: gl.constexpr, NEXT: gl.constexpr,
    R: gl.constexpr, MASK_EMPTY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One segment of `tiles` tiles, one head, DV columns of the values. d_q, d_k, d_v: [N, T, H, D];
    d_g: [N, T, H, M]; p_o [N, T, H, D]; p_before [N * segments, H, M, 2 D] fp32 or None; p_lse [N, T, H] fp32 or
    None."""
    column = gl.program_id(0) % (D // DV) * DV
    h = gl.program_id(0) // (D // DV) % H
    segment = gl.program_id(0) // (D // DV * H)
    n = segment // segments
    row = segment.to(gl.int64) * H + h
    t0 = segment % segments * tiles * TOKENS
    tiles = gl.minimum(tiles, (T - t0 + TOKENS - 1) // TOKENS)

    bf16: gl.constexpr = gl.bfloat16
    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_q = gl.allocate_shared_memory(bf16, [1, 1, TOKENS, 1, D], tile_layout(4))
    s_k = gl.allocate_shared_memory(bf16, [R, 1, TOKENS, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [R, 1, TOKENS, 1, DV], tile_layout(4))
    s_g = gl.allocate_shared_memory(d_g.dtype, [1, TOKENS, 1, BM], tile_layout(4, GATE_BITS))
    s_slot_k = gl.allocate_shared_memory(bf16, [1, BM, D], tile_layout(2))
    s_slot_v = gl.allocate_shared_memory(bf16, [1, BM, DV], tile_layout(2))
    s_factor = gl.allocate_shared_memory(bf16, [1, TOKENS, BM], tile_layout(2))
    s_decay = gl.allocate_shared_memory(gl.float32, [TOKENS, BM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    s_sum = gl.allocate_shared_memory(bf16, [TOKENS, BM], tile_layout(2))
    s_upto = gl.allocate_shared_memory(bf16, [TOKENS, TOKENS], tile_layout(2))
    triangle: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [STATE_WARPS, 1], [1, 0])
    t = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, triangle))[:, None]
    s_upto.store((gl.arange(0, TOKENS, layout=gl.SliceLayout(0, triangle))[None, :] <= t).to(bf16))
    s_marks = gl.allocate_shared_memory(gl.int32, [4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_row = gl.allocate_shared_memory(gl.int32, [TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_row.store(gl.arange(0, TOKENS, layout=gl.BlockedLayout([1], [32], [STATE_WARPS], [0])))
    s_zero = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_zero.store(gl.full([8], 0, gl.int32, gl.BlockedLayout([1], [32], [STATE_WARPS], [0])))
    q_full = barriers(1, 1)
    q_free = barriers(1, 1)
    k_full = barriers(R, 1)
    k_free = barriers(R, 2)  # by the state and by the output
    v_full = barriers(R, 1)
    v_free = barriers(R, 2)
    g_full = barriers(1, 1)
    g_free = barriers(1, 2)  # by the state and by who counts
    marks_full = barriers(2, 1)
    slots_full = barriers(1, 1)
    slots_free = barriers(1, 1)
    rest_full = barriers(1, 1)  # the decays and V~
    rest_free = barriers(1, 1)
    fence_async_shared()
    barrier()
    # Written out, since in a variable the sizes would no longer be constants.
    gl.warp_specialize(
        [
            (state_partition, (
                p_before, s_k, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_decay, s_marks, s_row, s_sum, s_upto, k_full,
                k_free, v_full, v_free, g_full, g_free, marks_full, slots_full, slots_free, rest_full, rest_free, row,
                column, tiles, M, D, DV, R,
            )),
            (output_partition, (
                p_o, p_lse, s_q, s_k, s_v, s_slot_k, s_slot_v, s_factor, s_decay, s_marks, s_row, s_zero, q_full,
                q_free, k_full, k_free, v_full, v_free, slots_full, slots_free, rest_full, rest_free, n, h, column, t0,
                tiles, T, scale, H, M, D, DV, W, NEXT, R, MASK_EMPTY,
            )),
            (load_partition, (
                d_q, d_k, d_v, d_g, s_q, s_k, s_v, s_g, q_full, q_free, k_full, k_free, v_full, v_free, g_full, g_free,
                n, h, column, t0, tiles, D, DV, W, R,
            )),
            (count_partition, (s_g, s_marks, g_full, g_free, marks_full, tiles)),
        ],
        [4, 1, 1],
        [REGISTERS, 32, 32],
    )  # fmt: skip


def single_launch(
    problem: Problem, config: ResidentConfig, inputs: Inputs, o: Tensor, shared: dict[str, Any]
) -> Launch:  # fmt: skip
    """As `resident_launch`."""
    dim, programs = problem.head_dim, PROGRAMS[problem.head_dim]
    columns = dim // programs
    tokens = TOKENS.value
    arguments = dict(
        shared, d_q=descriptor(inputs.q, [1, tokens, 1, dim]), d_k=descriptor(inputs.k, [1, tokens, 1, dim]),
        d_v=descriptor(inputs.v, [1, tokens, 1, columns]), d_g=descriptor(inputs.g, [1, tokens, 1, BM.value]), p_o=o,
        tiles=config.tokens // tokens, DV=columns, W=problem.window,
        NEXT=next(x for x in (16, 32, 64) if x >= problem.window), R=RING[dim],
    )  # fmt: skip
    grid = (problem.batch * shared["segments"] * problem.kv_heads * programs,)
    return Launch(single_kernel, grid, arguments, {"num_warps": STATE_WARPS.value})
