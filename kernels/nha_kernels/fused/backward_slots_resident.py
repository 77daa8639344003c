"""The backward pass seen from the slots, on Hopper: what `backward_slots` finds, by a kernel that walks each segment
once, from its last block to its first.

All is linear in A, the gradient of the slots. So a walk begins with none behind its segment, and says what its own rows
come to in front of it. A scan makes of that what lies behind each segment, `Behind`, and what this adds to gradients is
left to the pass over the window's keys, which has keys and values at hand.

A program takes one segment and one kv head; a step is a block of 16 slot tokens e and the rows t = e + delay that met
it last. Its warps divide the work:

    load     rows (q, do, and the slots' weights and gradients of logits), tokens (k, v, gates, and what the rows found
             for the gates' gradient), and the stored slots
    slots    holds A, the gradient of K~ and V~ behind the block, in fp32 registers. Publishes it in bf16, meets the
             stored slots with it, and adds the block's rows
    keys     for the block's tokens, all that goes by way of K~: the gradient of k, and its share of the gates'
    values   the same for V~ and v; to its share of the gates' gradient it adds all that is of neither, and hands that
             to `keys`, which writes the whole

Products have the slots, the rows or the columns of k and v for their 64 rows, and the tokens for their 16 columns.
Decays are those of `backward_slots` with the one anchor.

Sizes as in `resident`. Y: q for keys, do for values; X: k, v; P: the weights of `RowGradients`, gradients of logits
for keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients
from .backward_rows_resident import ResidentStates
from .hopper import (
    barrier,
    barriers,
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    load_async,
    mbarrier,
    store_async,
    store_wait,
    tile_layout,
    unknown_place,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .primitives import ANCHOR, LOG2E, STRONGEST, Launch
from .resident import ERASED, HEADS, TOKENS, describe_rows, describe_tokens
from .segment_ends import BM, NO_PIECES, strength
from .states import scan_launch

STAGES = gl.constexpr(2)  # steps whose rows and tokens are under way


@gluon.jit
def earlier_and_later(b_x, b_y, s_earlier, EXACT: gl.constexpr):
    """For each token of [BM, TOKENS], in registers as products leave it: the sum of x over the tokens before it, and of
    y over those behind it. By products, of two terms in bf16 each, or of one that is EXACT: a scan would have all warps
    shuffle, and with sums from the right twice as much.

    s_earlier [TOKENS, TOKENS]: 1 where the first is before the second, else 0."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=b_x.type.layout, k_width=2)
    bf16: gl.constexpr = gl.bfloat16
    s_later = s_earlier.permute((1, 0))
    b_none = gl.zeros_like(b_x)
    b_x_high = b_x.to(bf16)
    b_y_high = b_y.to(bf16)
    b_x_left = gl.convert_layout(b_x_high, left)
    b_y_left = gl.convert_layout(b_y_high, left)
    b_before = warpgroup_mma(b_x_left, s_earlier, b_none, use_acc=False, is_async=True)
    b_behind = warpgroup_mma(b_y_left, s_later, b_none, use_acc=False, is_async=True)
    if EXACT:
        b_before, b_behind, _, _ = warpgroup_mma_wait(0, deps=(b_before, b_behind, b_x_left, b_y_left))
    else:
        b_x_low = gl.convert_layout((b_x - b_x_high.to(gl.float32)).to(bf16), left)
        b_y_low = gl.convert_layout((b_y - b_y_high.to(gl.float32)).to(bf16), left)
        b_before = warpgroup_mma(b_x_low, s_earlier, b_before, is_async=True)
        b_behind = warpgroup_mma(b_y_low, s_later, b_behind, is_async=True)
        b_before, b_behind, _, _, _, _ = warpgroup_mma_wait(
            0, deps=(b_before, b_behind, b_x_left, b_y_left, b_x_low, b_y_low)
        )
    return b_before, b_behind


@gluon.jit
def weigh(s_p, left: gl.constexpr):
    """Anchored weights of a tile as the left operand of a product, [BM, ROWS], without the anchor."""
    b_p = s_p.reshape([TOKENS * HEADS, BM]).permute((1, 0)).load(left)
    return (b_p.to(gl.float32) * 2.0**-ANCHOR).to(gl.bfloat16)


@gluon.jit
def pair_turn(step, blocks):
    """The how manieth pair of blocks a step belongs to. The slots before its first block are stored."""
    return (blocks - 1) // 2 - (blocks - 1 - step) // 2


@gluon.jit
def load_gates(s_g, tokens: gl.constexpr):
    """A block's gates, [BM, TOKENS], fp32."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=tokens, k_width=2)  # which comes by fewer loads
    return gl.convert_layout(s_g.reshape([TOKENS, BM]).permute((1, 0)).load(left).to(gl.float32), tokens)


@gluon.jit
def load_partition(
    d_q, d_do, d_da, d_p, d_k, d_v, d_g, d_states, d_terms, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state,
    s_terms, rows_full, rows_empty, tokens_full, tokens_empty, state_full, state_empty, terms_full, terms_empty,
    n, h, e0, delay, chunk, blocks, N, D: gl.constexpr, PARTS: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """What lies outside of the call, or behind the last token that enters the slots, reads as 0."""
    GATE_BYTES: gl.constexpr = d_g.dtype.primitive_bitwidth // 8
    for step in range(blocks + 1):
        if step < blocks:
            block = blocks - 1 - step
            e = e0 + block * TOKENS
            stage = step % STAGES
            mbarrier.wait(tokens_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(tokens_full.index(stage), TOKENS * (2 * D * 2 + BM * GATE_BYTES))
            load_async(d_g, [n, e, h, 0], tokens_full.index(stage), s_g.index(stage))
            load_async(d_k, [n, e, h, 0], tokens_full.index(stage), s_k.index(stage))
            load_async(d_v, [n, e, h, 0], tokens_full.index(stage), s_v.index(stage))
            for part in gl.static_range(PARTS):
                turn = step * PARTS + part
                place = turn % STAGES
                t = e + delay
                mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
                mbarrier.expect(rows_full.index(place), 2 * TOKENS * HEADS * (D + BM) * 2)
                load_async(d_q, [n, t, h, part * HEADS, 0], rows_full.index(place), s_q.index(place))
                load_async(d_do, [n, t, h, part * HEADS, 0], rows_full.index(place), s_do.index(place))
                load_async(d_da, [n, t, h, part * HEADS, 0], rows_full.index(place), s_da.index(place))
                load_async(d_p, [n, t, h, part * HEADS, 0], rows_full.index(place), s_p.index(place))
            if (step == 0) | (block % 2 == 1):
                mbarrier.wait(state_empty.index(0), (pair_turn(step, blocks) & 1) ^ 1)
                mbarrier.expect(state_full.index(0), 2 * BM * D * 2)
                load_async(d_states, [chunk + block // 2, h, 0, 0], state_full.index(0), s_state.index(0))
                load_async(d_states, [chunk + block // 2, h, 0, D], state_full.index(0), s_state.index(1))
        if step > 0:
            # Those of the step before: of all places theirs is the last to be free, and they are needed last.
            t = e0 + (blocks - step) * TOKENS + delay
            mbarrier.wait(terms_empty.index(0), step & 1)
            mbarrier.expect(terms_full.index(0), TERMS * TOKENS * BM * 4)
            for term in gl.static_range(TERMS):
                load_async(d_terms, [term * N + n, t, h, 0], terms_full.index(0), s_terms.index(term))


@gluon.jit
def slots_partition(
    p_front, p_totals, p_rest, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state, s_a, s_beyond, s_earlier,
    rows_full, rows_empty, tokens_full, tokens_empty, state_full, state_empty, a_full, a_empty, beyond_full,
    segment, h, chunks, blocks, H, unscale,
    M: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """A of K~ and V~, [BM, D] each; in the end, in front of the segment, it goes to p_front. The others as in
    `resident_slots_kernel`."""
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    tokens: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    of_acc: gl.constexpr = gl.SliceLayout(1, acc)
    ROWS: gl.constexpr = TOKENS * HEADS
    EXACT: gl.constexpr = s_g.dtype.primitive_bitwidth == 16  # gates in bf16
    diagonal = gl.arange(0, BM, layout=gl.SliceLayout(1, square))[:, None]
    diagonal = diagonal == gl.arange(0, BM, layout=gl.SliceLayout(0, square))[None, :]
    b_k = gl.zeros([BM, D], gl.float32, acc)
    b_v = gl.zeros([BM, D], gl.float32, acc)
    b_rest = gl.zeros([BM], gl.float32, of_acc)
    m = gl.arange(0, BM, layout=of_acc)
    for step in range(blocks):
        stage = step % STAGES
        mbarrier.wait(a_empty.index(0), (step & 1) ^ 1)
        s_a.index(0).store(b_k.to(gl.bfloat16))
        s_a.index(1).store(b_v.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(a_full.index(0), count=1)

        # What gates in front of the block meet behind it: of slots with slots, each with itself.
        of_k = unknown_place(0, step, blocks)
        of_v = unknown_place(1, step, blocks)
        mbarrier.wait(tokens_full.index(stage), (step // STAGES) & 1)
        mbarrier.wait(state_full.index(0), pair_turn(step, blocks) & 1)
        b_pairs = gl.zeros([BM, BM], gl.float32, square)
        s_before = s_state.index(of_k).reshape([BM, D]).permute((1, 0))
        b_pairs = warpgroup_mma(s_a.index(of_k), s_before, b_pairs, use_acc=False, is_async=True)
        s_before = s_state.index(of_v).reshape([BM, D]).permute((1, 0))
        b_pairs = warpgroup_mma(s_a.index(of_v), s_before, b_pairs, is_async=True)
        b_step = gl.sum(gl.maximum(load_gates(s_g.index(stage), tokens), ERASED) * LOG2E, 1)
        b_step = gl.convert_layout(b_step, of_acc)  # [BM]
        block = segment.to(gl.int64) * chunks + blocks - 1 - step
        gl.store(p_rest + (block * H + h) * M + m, b_rest, mask=m < M)
        b_rest += b_step
        b_total = gl.exp2(b_step)
        b_pairs = warpgroup_mma_wait(0, deps=(b_pairs,))
        b_beyond = gl.convert_layout(gl.sum(gl.where(diagonal, b_pairs, 0.0), 1), of_acc) * unscale
        first = (blocks - 1 - step) % 2 == 0  # of a pair
        if not first:  # between the stored slots and this block is the other
            other = (step + 1) % STAGES
            mbarrier.wait(tokens_full.index(other), ((step + 1) // STAGES) & 1)
            b_meet = gl.zeros([BM, TOKENS], gl.float32, tokens)
            s_token = s_k.index(other).reshape([TOKENS, D]).permute((1, 0))
            b_meet = warpgroup_mma(s_a.index(of_k), s_token, b_meet, use_acc=False, is_async=True)
            s_token = s_v.index(other).reshape([TOKENS, D]).permute((1, 0))
            b_meet = warpgroup_mma(s_a.index(of_v), s_token, b_meet, is_async=True)
            b_other = load_gates(s_g.index(other), tokens)
            b_strength = strength(b_other)
            b_other = gl.maximum(b_other, ERASED)
            b_meet = warpgroup_mma_wait(0, deps=(b_meet,))
            b_before, b_after = earlier_and_later(b_other, b_other, s_earlier.index(of_k), EXACT)
            b_meet = gl.sum(b_meet * b_strength * gl.exp2(b_after * LOG2E), 1)
            b_kept = gl.exp2(gl.max(b_before + b_other + b_after, 1) * LOG2E)  # of all columns the same
            b_beyond = b_beyond * gl.convert_layout(b_kept, of_acc) + gl.convert_layout(b_meet, of_acc)
        s_beyond.index(step % 2).store(b_beyond * b_total)
        barrier()
        mbarrier.arrive(beyond_full.index(step % 2), count=1)
        mbarrier.arrive(state_empty.index(0), count=1, pred=first)
        mbarrier.arrive(tokens_empty.index(stage), count=1)

        b_k = b_k * b_total[:, None]
        b_v = b_v * b_total[:, None]
        for part in range(PARTS):
            turn = step * PARTS + part
            place = turn % STAGES
            mbarrier.wait(rows_full.index(place), (turn // STAGES) & 1)
            b_da = weigh(s_da.index(place), left)
            b_p = weigh(s_p.index(place), left)
            b_k = warpgroup_mma(b_da, s_q.index(place).reshape([ROWS, D]), b_k, is_async=True)
            b_v = warpgroup_mma(b_p, s_do.index(place).reshape([ROWS, D]), b_v, is_async=True)
            b_k, b_v, b_da, b_p = warpgroup_mma_wait(0, deps=(b_k, b_v, b_da, b_p))
            barrier()
            mbarrier.arrive(rows_empty.index(place), count=1)

    d = gl.arange(0, D, layout=gl.SliceLayout(0, acc))
    row = (segment.to(gl.int64) * H + h) * M + m
    p_row = p_front + row[:, None] * (2 * D) + d[None, :]
    m_row = (m < M)[:, None] & (d < D)[None, :]
    gl.store(p_row, b_k, mask=m_row)
    gl.store(p_row + D, b_v, mask=m_row)
    gl.store(p_totals + row, b_rest, mask=m < M)


@gluon.jit
def tokens_partition(
    d_dx, p_dg, s_x, s_y, s_p, s_g, s_a, s_beyond, s_terms, s_earlier, s_dx, s_written, s_left, s_later, s_own,
    s_w, rows_full, rows_empty, tokens_full, tokens_empty, a_full, a_empty, beyond_full, terms_full, terms_empty,
    share_full, n, h, e0, entered, blocks, T, H,
    IS_K: gl.constexpr, TERMS: gl.constexpr, M: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The gradient of x, d_dx [N, entered, H, D], and of the gates, p_dg [N, T, H, M].

    What `values` hands to `keys` lies where the first of the terms was."""
    ROWS: gl.constexpr = TOKENS * HEADS
    tokens: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    EXACT: gl.constexpr = s_g.dtype.primitive_bitwidth == 16  # gates in bf16
    bf16: gl.constexpr = gl.bfloat16
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tokens))
    tok = gl.arange(0, ROWS, layout=gl.SliceLayout(1, tokens)) // HEADS
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, tokens))
    m_upto = j[None, :] <= tok[:, None]  # [ROWS, TOKENS]
    m_own = j[None, :] == tok[:, None]
    m_slot = (m < M)[:, None]
    b_none = gl.zeros([ROWS, TOKENS], gl.float32, tokens)  # [BM, TOKENS] as well
    b_zero = gl.zeros([D, TOKENS], gl.float32, tokens)
    for step in range(blocks):
        stage = step % STAGES
        mine = unknown_place(0 if IS_K else 1, step, blocks)
        mbarrier.wait(tokens_full.index(stage), (step // STAGES) & 1)
        b_g = load_gates(s_g.index(stage), tokens)
        b_strength = strength(b_g)
        b_cut = gl.maximum(b_g, STRONGEST)
        b_before, b_after = earlier_and_later(b_cut, gl.maximum(b_g, ERASED), s_earlier.index(mine), EXACT)
        b_token = gl.exp2((b_before + b_cut) * -LOG2E - ANCHOR)
        b_after = gl.exp2(b_after * LOG2E)  # what is left behind the block
        b_written = (b_token * b_strength).to(bf16)
        s_written.index(mine).store(b_written)
        s_left.index(mine).store((b_strength * b_after).to(bf16))
        fence_async_shared()
        barrier()

        s_token = s_x.index(stage).reshape([TOKENS, D]).permute((1, 0))  # [D, TOKENS]
        mbarrier.wait(a_full.index(0), step & 1)
        b_behind = warpgroup_mma(s_a.index(mine), s_token, b_none, use_acc=False, is_async=True)  # [BM, TOKENS]
        b_dx = warpgroup_mma(
            s_a.index(mine).permute((1, 0)), s_left.index(mine), b_zero, use_acc=False, is_async=True
        )  # [D, TOKENS]
        b_behind, b_dx = warpgroup_mma_wait(0, deps=(b_behind, b_dx))
        barrier()
        mbarrier.arrive(a_empty.index(0), count=1)
        b_later = b_none  # of the rows in the block, behind their own token and at it
        b_own = b_none
        for part in range(PARTS):
            turn = step * PARTS + part
            place = turn % STAGES
            mbarrier.wait(rows_full.index(place), (turn // STAGES) & 1)
            s_row = s_y.index(place).reshape([ROWS, D])
            s_weight = s_p.index(place).reshape([ROWS, BM])
            b_dots = warpgroup_mma(s_row, s_token, b_none, use_acc=False, is_async=True)  # [ROWS, TOKENS]
            b_w = warpgroup_mma(s_weight, s_written.index(mine), b_none, use_acc=False, is_async=True)
            b_dots, b_w = warpgroup_mma_wait(0, deps=(b_dots, b_w))
            s_later.index(mine).store(gl.where(m_upto & (j[None, :] != tok[:, None]), b_dots, 0.0).to(bf16))
            s_own.index(mine).store(gl.where(m_own, b_dots, 0.0).to(bf16))
            s_w.index(mine).store(gl.where(m_upto, b_w, 0.0).to(bf16))
            fence_async_shared()
            barrier()
            mbarrier.arrive(tokens_empty.index(stage), count=1, pred=part + 1 == PARTS)  # of no more use
            b_later = warpgroup_mma(s_weight.permute((1, 0)), s_later.index(mine), b_later, is_async=True)
            b_own = warpgroup_mma(s_weight.permute((1, 0)), s_own.index(mine), b_own, is_async=True)
            b_dx = warpgroup_mma(s_row.permute((1, 0)), s_w.index(mine), b_dx, is_async=True)
            b_later, b_own, b_dx = warpgroup_mma_wait(0, deps=(b_later, b_own, b_dx))
            barrier()
            mbarrier.arrive(rows_empty.index(place), count=1)

        store_wait(0)
        barrier()
        s_dx.index(mine).reshape([TOKENS, D]).permute((1, 0)).store(b_dx.to(bf16))
        fence_async_shared()
        barrier()
        store_async(d_dx, [n, e0 + (blocks - 1 - step) * TOKENS, h, 0], s_dx.index(mine))
        b_behind = b_behind * b_after
        b_rows = -b_later * b_written.to(gl.float32)
        if not IS_K:
            mbarrier.wait(terms_full.index(0), step & 1)
            for term in gl.static_range(TERMS):
                b_rows += s_terms.index(term).reshape([TOKENS, BM]).permute((1, 0)).load(tokens)
        b_tokens, b_behind_rows = earlier_and_later(b_strength * b_behind, b_rows, s_earlier.index(mine), False)
        b_rows += b_behind_rows
        b_dg = b_rows * gl.exp2((b_g - b_cut) * LOG2E) + b_tokens
        b_dg -= (b_behind + (b_later + b_own) * b_token) * gl.exp2(b_g * LOG2E)
        s_share = s_terms.index(0).reshape([TOKENS, BM]).permute((1, 0))
        if IS_K:
            mbarrier.wait(share_full.index(0), step & 1)
            b_dg += s_share.load(tokens)
            fence_async_shared()  # the copy engine is next to write there
            barrier()
            mbarrier.arrive(terms_empty.index(0), count=1)
            e = e0 + (blocks - 1 - step) * TOKENS + j
            p_token = p_dg + ((n.to(gl.int64) * T + e) * H + h)[None, :] * M + m[:, None]
            gl.store(p_token, b_dg.to(p_dg.dtype.element_ty), mask=m_slot & (e < entered)[None, :])
        else:
            mbarrier.wait(beyond_full.index(step % 2), (step // 2) & 1)
            b_dg += s_beyond.index(step % 2).load(gl.SliceLayout(1, tokens))[:, None]
            s_share.store(b_dg)
            fence_async_shared()
            barrier()
            mbarrier.arrive(share_full.index(0), count=1)
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "entered", "delay", "segments", "chunks"])
def resident_slots_kernel(
    d_q, d_do, d_da, d_p, d_k, d_v, d_g, d_states, d_terms, d_dk, d_dv, p_front, p_totals, p_rest, p_dg,
    T, N, entered, delay, segments, chunks, unscale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """One segment of `chunks` blocks and one kv head. d_q, d_do: [N, T, H, NG, D]; d_da, d_p: [N, T, H, NG, M];
    d_k, d_v, d_dk, d_dv: [N, entered, H, D]; d_g: [N, entered, H, M]; d_states [N * segments * chunks / 2, H, M, 2 D],
    times 1 / unscale; d_terms [TERMS * N, T, H, M]; p_dg [N, T, H, M]; p_front [N * segments, H, M, 2 D] fp32: what the
    rows of each segment come to for the slots in front of it; p_totals [N * segments, H, M] fp32: the sum of its gates,
    in log2; p_rest [N * segments * chunks, H, M] fp32: of those behind each block."""
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    h = gl.program_id(0) % H
    segment = gl.program_id(0) // H
    n = segment // segments
    e0 = segment % segments * chunks * TOKENS
    blocks = gl.minimum(chunks, (entered - e0 + TOKENS - 1) // TOKENS)

    bf16: gl.constexpr = gl.bfloat16
    s_q = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_do = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_da = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, BM], tile_layout(5))
    s_p = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, BM], tile_layout(5))
    s_k = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, D], tile_layout(4))
    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_g = gl.allocate_shared_memory(d_g.dtype, [STAGES, 1, TOKENS, 1, BM], tile_layout(4, GATE_BITS))
    s_state = gl.allocate_shared_memory(bf16, [2, 1, 1, BM, D], tile_layout(4))  # of K~ and of V~
    s_beyond = gl.allocate_shared_memory(gl.float32, [2, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    narrow: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    s_terms = gl.allocate_shared_memory(gl.float32, [TERMS, 1, TOKENS, 1, BM], tile_layout(4, 32))
    # For keys and for values.
    s_earlier = gl.allocate_shared_memory(bf16, [2, TOKENS, TOKENS], narrow)
    s_a = gl.allocate_shared_memory(bf16, [2, BM, D], tile_layout(2))
    s_dx = gl.allocate_shared_memory(bf16, [2, 1, TOKENS, 1, D], tile_layout(4))
    s_written = gl.allocate_shared_memory(bf16, [2, BM, TOKENS], narrow)
    s_left = gl.allocate_shared_memory(bf16, [2, BM, TOKENS], narrow)
    s_later = gl.allocate_shared_memory(bf16, [2, TOKENS * HEADS, TOKENS], narrow)
    s_own = gl.allocate_shared_memory(bf16, [2, TOKENS * HEADS, TOKENS], narrow)
    s_w = gl.allocate_shared_memory(bf16, [2, TOKENS * HEADS, TOKENS], narrow)
    rows_full = barriers(STAGES, 1)
    rows_empty = barriers(STAGES, 3)
    tokens_full = barriers(STAGES, 1)
    tokens_empty = barriers(STAGES, 3)
    state_full = barriers(1, 1)
    state_empty = barriers(1, 1)
    a_full = barriers(1, 1)
    a_empty = barriers(1, 2)
    beyond_full = barriers(2, 1)
    terms_full = barriers(1, 1)
    terms_empty = barriers(1, 1)
    share_full = barriers(1, 1)
    triangle: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, triangle))[:, None]
    b_earlier = (j < gl.arange(0, TOKENS, layout=gl.SliceLayout(0, triangle))[None, :]).to(bf16)
    s_earlier.index(0).store(b_earlier)
    s_earlier.index(1).store(b_earlier)
    fence_async_shared()
    barrier()
    # Written out, since in a variable the sizes would no longer be constants.
    gl.warp_specialize(
        [
            (slots_partition, (
                p_front, p_totals, p_rest, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state, s_a, s_beyond, s_earlier,
                rows_full, rows_empty, tokens_full, tokens_empty, state_full, state_empty, a_full, a_empty,
                beyond_full, segment, h, chunks, blocks, H, unscale, M, D, PARTS,
            )),
            (tokens_partition, (
                d_dk, p_dg, s_k, s_q, s_da, s_g, s_a, s_beyond, s_terms, s_earlier, s_dx, s_written, s_left, s_later,
                s_own, s_w, rows_full, rows_empty, tokens_full, tokens_empty, a_full, a_empty, beyond_full, terms_full,
                terms_empty, share_full, n, h, e0, entered, blocks, T, H, True, TERMS, M, D, PARTS,
            )),
            (tokens_partition, (
                d_dv, p_dg, s_v, s_do, s_p, s_g, s_a, s_beyond, s_terms, s_earlier, s_dx, s_written, s_left, s_later,
                s_own, s_w, rows_full, rows_empty, tokens_full, tokens_empty, a_full, a_empty, beyond_full, terms_full,
                terms_empty, share_full, n, h, e0, entered, blocks, T, H, False, TERMS, M, D, PARTS,
            )),
            (load_partition, (
                d_q, d_do, d_da, d_p, d_k, d_v, d_g, d_states, d_terms, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state,
                s_terms, rows_full, rows_empty, tokens_full, tokens_empty, state_full, state_empty, terms_full,
                terms_empty, n, h, e0, delay, segment * chunks // 2, blocks, N, D, PARTS, TERMS,
            )),
        ],
        [4, 4, 1],
        [136, 136, 24],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Behind:
    """The gradient of the slots behind each segment: ends [B * segments, H, M, 2 D], in the dtype of the call, and by
    which gates it decays up to each block of 16 tokens, rest [B * segments * blocks, H, M] fp32, log2. blocks: of a
    segment."""

    ends: Tensor
    rest: Tensor
    blocks: int

    def descriptor(self) -> Any:
        """K~'s or V~'s of one segment, as the copy engine takes them."""
        return descriptor(self.ends, [1, 1, BM.value, self.ends.shape[-1] // 2])


def resident_slots_launches(
    problem: Problem, inputs: Inputs, stored: ResidentStates, rows: RowGradients, grad_o: Tensor,
    grad_final: Tensor | None, dk: Tensor, dv: Tensor, dg: Tensor,
) -> tuple[list[Launch], Behind | None]:  # fmt: skip
    """The launches, in order, and what they fill: dk, dv [B, T, H, D] and dg [B, T, H, M] where tokens enter the slots,
    but for what adds to them by way of `Behind` (None: nothing); grad_final [N, H, M, E] fp32: of the slots after the
    call (None: zero)."""
    heads, dim, entered = problem.kv_heads, problem.head_dim, problem.tokens - problem.delay
    if entered <= 0:
        return [], None
    pieces = problem.batch * stored.segments
    front = torch.empty(pieces, heads, problem.slots, 2 * dim, dtype=torch.float32, device=dk.device)
    totals = front.new_empty(front.shape[:3])
    rest = front.new_empty(pieces * stored.blocks, *totals.shape[1:])
    k, v, g, dk, dv = (x[:, :entered] for x in (inputs.k, inputs.v, inputs.g, dk, dv))
    arguments = dict(
        d_q=describe_rows(problem, inputs.q), d_do=describe_rows(problem, grad_o),
        d_da=describe_rows(problem, rows.logits), d_p=describe_rows(problem, rows.weights), d_k=describe_tokens(k),
        d_v=describe_tokens(v), d_g=describe_tokens(g), d_states=stored.descriptor(),
        d_terms=describe_tokens(rows.terms.view(-1, problem.tokens, heads, problem.slots)), d_dk=describe_tokens(dk),
        d_dv=describe_tokens(dv), p_front=front, p_totals=totals, p_rest=rest, p_dg=dg,
        T=problem.tokens, N=problem.batch, entered=entered, delay=problem.delay, segments=stored.segments,
        chunks=stored.blocks, unscale=1 / stored.scale, HQ=problem.q_heads, H=heads, D=dim, M=problem.slots,
        TERMS=len(rows.terms),
    )  # fmt: skip
    walk = Launch(resident_slots_kernel, (pieces * heads,), arguments, {"num_warps": 4})
    if stored.segments == 1 and grad_final is None:
        return [walk], None
    behind = Behind(torch.empty_like(front, dtype=problem.dtype), rest, stored.blocks)
    scan = scan_launch(
        problem, NO_PIECES, front, totals, grad_final, None, stored.segments, backward=True, out=behind.ends
    )
    return [walk, scan], behind
