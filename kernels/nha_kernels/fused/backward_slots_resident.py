"""The backward pass seen from the slots, on Hopper: what `backward_slots` finds in its second run, by a kernel that
walks each segment once, from its last block to its first.

A program takes one segment and one kv head; a step is a block of 16 slot tokens e and the rows t = e + delay that met
it last. Its warps divide the work:

    load     rows (q, do, and the slots' weights and gradients of logits), tokens (k, v, gates), and the stored slots
    slots    holds A, the gradient of K~ and V~ behind the block, in fp32 registers. Publishes it in bf16, meets the
             stored slots with it, and adds the block's rows
    keys     for the block's tokens, all that goes by way of K~: the gradient of k, and its share of the gates'
    values   the same for V~ and v; its share of the gates' gradient goes to `keys`, which writes the whole

Products have the slots, the rows or the columns of k and v for their 64 rows, and the tokens for their 16 columns.
Decays are those of `backward_slots` with the one anchor.

Sizes as in `resident`. Y: q for keys, do for values; X: k, v; P: the weights of `RowGradients`, gradients of logits
for keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients
from .backward_rows_resident import ResidentStates
from .hopper import (
    barrier,
    barriers,
    fence_async_shared,
    gl,
    gluon,
    load_async,
    mbarrier,
    store_async,
    store_wait,
    tile_layout,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .primitives import ANCHOR, LOG2E, STRONGEST, Launch
from .resident import ERASED, HEADS, TOKENS, add, describe_rows, describe_tokens
from .segment_ends import BM, NO_PIECES, load_slots, strength
from .states import scan_launch

STAGES = gl.constexpr(2)  # steps whose rows and tokens are under way


@gluon.jit
def add_before(a, x, b, y):
    """For a scan: (a, x) is the sum of what comes before the last element, and that element."""
    return a + x + b, y


@gluon.jit
def load_rows(
    d_q, d_do, d_da, d_p, d_g, s_q, s_do, s_da, s_p, s_g, full, turn, turns, n, h, e0, delay,
    PARTS: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """The rows of a turn, and their tokens' gates, into a place of the ring."""
    place = turn % AHEAD
    pred = turn < turns
    e = e0 + turn // PARTS * TOKENS
    head = turn % PARTS * HEADS
    D: gl.constexpr = s_q.shape[5]
    BYTES: gl.constexpr = TOKENS * (2 * HEADS * (D + BM) * 2 + BM * (d_g.dtype.primitive_bitwidth // 8))
    mbarrier.expect(full.index(place), BYTES, pred=pred)
    load_async(d_g, [n, e, h, 0], full.index(place), s_g.index(place), pred=pred)
    load_async(d_q, [n, e + delay, h, head, 0], full.index(place), s_q.index(place), pred=pred)
    load_async(d_do, [n, e + delay, h, head, 0], full.index(place), s_do.index(place), pred=pred)
    load_async(d_da, [n, e + delay, h, head, 0], full.index(place), s_da.index(place), pred=pred)
    load_async(d_p, [n, e + delay, h, head, 0], full.index(place), s_p.index(place), pred=pred)


@gluon.jit
def weigh(s_p, b_scale, left: gl.constexpr):
    """Anchored weights of a tile as the left operand of a product, [BM, ROWS]: without the anchor, times b_scale [BM]
    in the layout of `left`'s parent; None: 1."""
    b_p = s_p.reshape([TOKENS * HEADS, BM]).permute((1, 0)).load(left).to(gl.float32) * 2.0**-ANCHOR
    if b_scale is not None:
        b_p = gl.convert_layout(gl.convert_layout(b_p, left.parent, assert_trivial=True) * b_scale[:, None], left)
    return b_p.to(gl.bfloat16)


@gluon.jit(do_not_specialize=["entered", "delay", "segments", "chunks"])
def front_kernel(
    d_q, d_do, d_da, d_p, d_g, p_ends, p_totals, entered, delay, segments, chunks,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """What the rows of one segment come to for the slots in front of it, p_ends [segments, H, M, 2 D], and the sum of
    its gates in log2, p_totals [segments, H, M]; fp32. Other arguments as in `resident_slots_kernel`.

    From the first block to the last: so the decay back to the segment's begin is known as the rows come, and nothing
    that was summed decays.
    """
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    ROWS: gl.constexpr = TOKENS * HEADS
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    tokens: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    bf16: gl.constexpr = gl.bfloat16
    h = gl.program_id(0) % H
    segment = gl.program_id(0) // H
    n = segment // segments
    e0 = segment % segments * chunks * TOKENS
    turns = gl.minimum(chunks, (entered - e0 + TOKENS - 1) // TOKENS) * PARTS

    s_q = gl.allocate_shared_memory(bf16, [AHEAD, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_do = gl.allocate_shared_memory(bf16, [AHEAD, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_da = gl.allocate_shared_memory(bf16, [AHEAD, 1, TOKENS, 1, HEADS, BM], tile_layout(5))
    s_p = gl.allocate_shared_memory(bf16, [AHEAD, 1, TOKENS, 1, HEADS, BM], tile_layout(5))
    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_g = gl.allocate_shared_memory(d_g.dtype, [AHEAD, 1, TOKENS, 1, BM], tile_layout(4, GATE_BITS))
    full = barriers(AHEAD, 1)
    fence_async_shared()
    barrier()
    for turn in gl.static_range(AHEAD):
        load_rows(
            d_q, d_do, d_da, d_p, d_g, s_q, s_do, s_da, s_p, s_g, full, turn, turns, n, h, e0, delay, PARTS, AHEAD
        )
    b_k = gl.zeros([BM, D], gl.float32, acc)
    b_v = gl.zeros([BM, D], gl.float32, acc)
    b_sum = gl.zeros([BM], gl.float32, gl.SliceLayout(1, square))  # of the gates before this block, in log2
    for turn in range(turns):
        place = turn % AHEAD
        mbarrier.wait(full.index(place), (turn // AHEAD) & 1)
        b_decay = gl.exp2(b_sum)
        b_da = weigh(s_da.index(place), b_decay, left)
        b_p = weigh(s_p.index(place), b_decay, left)
        b_k = warpgroup_mma(b_da, s_q.index(place).reshape([ROWS, D]), b_k, is_async=True)
        b_v = warpgroup_mma(b_p, s_do.index(place).reshape([ROWS, D]), b_v, is_async=True)
        b_g = s_g.index(place).reshape([TOKENS, BM]).permute((1, 0)).load(tokens).to(gl.float32)  # [BM, TOKENS]
        b_step = gl.sum(gl.maximum(b_g, ERASED) * LOG2E, 1)
        if turn % PARTS == PARTS - 1:
            b_sum += gl.convert_layout(b_step, gl.SliceLayout(1, square))
        b_k, b_v, b_da, b_p = warpgroup_mma_wait(0, deps=(b_k, b_v, b_da, b_p))
        barrier()  # all warps are done with this place
        load_rows(
            d_q, d_do, d_da, d_p, d_g, s_q, s_do, s_da, s_p, s_g, full, turn + AHEAD, turns, n, h, e0, delay, PARTS,
            AHEAD,
        )  # fmt: skip

    m = gl.arange(0, BM, layout=gl.SliceLayout(1, acc))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, acc))
    row = (segment.to(gl.int64) * H + h) * M
    p_row = p_ends + (row + m)[:, None] * (2 * D) + d[None, :]
    m_row = (m < M)[:, None] & (d < D)[None, :]
    gl.store(p_row, b_k, mask=m_row)
    gl.store(p_row + D, b_v, mask=m_row)
    slot = gl.arange(0, BM, layout=gl.SliceLayout(1, square))
    gl.store(p_totals + row + slot, b_sum, mask=slot < M)


@gluon.jit
def pair_turn(step, blocks):
    """The how manieth pair of blocks a step belongs to. The slots before its first block are stored."""
    return (blocks - 1) // 2 - (blocks - 1 - step) // 2


@gluon.jit
def leaving(b_g):
    """From a block's gates [BM, TOKENS], in fp32: what is left of each token behind the block, and of what was before
    it [BM]."""
    b_log2 = gl.maximum(b_g, ERASED) * LOG2E
    b_total = gl.sum(b_log2, 1)
    return gl.exp2(b_total[:, None] - gl.associative_scan(b_log2, 1, add)), gl.exp2(b_total)


@gluon.jit
def load_partition(
    d_q, d_do, d_da, d_p, d_k, d_v, d_g, d_states, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state_k, s_state_v,
    rows_full, rows_empty, tokens_full, tokens_empty, state_full, state_empty, n, h, e0, delay, chunk, blocks,
    D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """What lies outside of the call, or behind the last token that enters the slots, reads as 0."""
    GATE_BYTES: gl.constexpr = d_g.dtype.primitive_bitwidth // 8
    for step in range(blocks):
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
            load_async(d_states, [chunk + block // 2, h, 0, 0], state_full.index(0), s_state_k)
            load_async(d_states, [chunk + block // 2, h, 0, D], state_full.index(0), s_state_v)


@gluon.jit
def slots_partition(
    p_ends, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state_k, s_state_v, s_a_k, s_a_v, s_beyond, rows_full, rows_empty,
    tokens_full, tokens_empty, state_full, state_empty, a_full, a_empty, beyond_full, row, blocks, unscale,
    M: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """A of K~ and V~, [BM, D] each. p_ends [segments, H, M, 2 D] fp32: A behind the segment; None: zero."""
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    tokens: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    gates: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])  # [BM, TOKENS], where sums run over tokens
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    of_acc: gl.constexpr = gl.SliceLayout(1, acc)
    ROWS: gl.constexpr = TOKENS * HEADS
    b_k = load_slots(p_ends, row, 0, M, D, D, acc)
    b_v = load_slots(p_ends, row, D, M, D, D, acc)
    for step in range(blocks):
        stage = step % STAGES
        mbarrier.wait(a_empty.index(0), (step & 1) ^ 1)
        s_a_k.store(b_k.to(gl.bfloat16))
        s_a_v.store(b_v.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(a_full.index(0), count=1)

        # What gates in front of the block meet behind it.
        mbarrier.wait(tokens_full.index(stage), (step // STAGES) & 1)
        b_g = s_g.index(stage).reshape([TOKENS, BM]).permute((1, 0)).load(tokens).to(gl.float32)  # [BM, TOKENS]
        b_total = gl.exp2(gl.sum(gl.maximum(b_g, ERASED) * LOG2E, 1))
        b_total = gl.convert_layout(b_total, of_acc)  # [BM]
        mbarrier.wait(state_full.index(0), pair_turn(step, blocks) & 1)
        b_beyond = gl.sum(b_k * (s_state_k.reshape([BM, D]).load(acc).to(gl.float32) * unscale), 1)
        b_beyond += gl.sum(b_v * (s_state_v.reshape([BM, D]).load(acc).to(gl.float32) * unscale), 1)
        first = (blocks - 1 - step) % 2 == 0  # of a pair
        if not first:  # between the stored slots and this block is the other
            other = (step + 1) % STAGES
            mbarrier.wait(tokens_full.index(other), ((step + 1) // STAGES) & 1)
            b_meet = gl.zeros([BM, TOKENS], gl.float32, tokens)
            s_token = s_k.index(other).reshape([TOKENS, D]).permute((1, 0))
            b_meet = warpgroup_mma(s_a_k, s_token, b_meet, use_acc=False, is_async=True)
            s_token = s_v.index(other).reshape([TOKENS, D]).permute((1, 0))
            b_meet = warpgroup_mma(s_a_v, s_token, b_meet, is_async=True)
            b_other = s_g.index(other).reshape([TOKENS, BM]).permute((1, 0)).load(gates).to(gl.float32)
            b_left, b_kept = leaving(b_other)
            b_meet = gl.convert_layout(warpgroup_mma_wait(0, deps=(b_meet,)), gates) * strength(b_other)
            b_beyond = b_beyond * gl.convert_layout(b_kept, of_acc)
            b_beyond += gl.convert_layout(gl.sum(b_meet * b_left, 1), of_acc)
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
            b_da = weigh(s_da.index(place), None, left)
            b_p = weigh(s_p.index(place), None, left)
            b_k = warpgroup_mma(b_da, s_q.index(place).reshape([ROWS, D]), b_k, is_async=True)
            b_v = warpgroup_mma(b_p, s_do.index(place).reshape([ROWS, D]), b_v, is_async=True)
            b_k, b_v, b_da, b_p = warpgroup_mma_wait(0, deps=(b_k, b_v, b_da, b_p))
            barrier()
            mbarrier.arrive(rows_empty.index(place), count=1)


@gluon.jit
def tokens_partition(
    d_dx, p_dg, p_terms, s_x, s_y, s_p, s_g, s_a, s_beyond, s_share, s_dx, s_written, s_left, s_later, s_own, s_w,
    rows_full, rows_empty, tokens_full, tokens_empty, a_full, a_empty, beyond_full, share_full, share_empty,
    n, h, e0, entered, delay, blocks, T, N, H,
    IS_K: gl.constexpr, TERMS: gl.constexpr, M: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The gradient of x, d_dx [N, entered, H, D], and of the gates, p_dg [N, T, H, M]."""
    ROWS: gl.constexpr = TOKENS * HEADS
    tokens: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    gates: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])  # [BM, TOKENS], where sums run over tokens
    bf16: gl.constexpr = gl.bfloat16
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, tokens))
    tok = gl.arange(0, ROWS, layout=gl.SliceLayout(1, tokens)) // HEADS
    u = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gates))
    m = gl.arange(0, BM, layout=gl.SliceLayout(1, gates))
    m_upto = j[None, :] <= tok[:, None]  # [ROWS, TOKENS]
    m_own = j[None, :] == tok[:, None]
    m_slot = (m < M)[:, None]
    b_none = gl.zeros([ROWS, TOKENS], gl.float32, tokens)  # [BM, TOKENS] as well
    b_zero = gl.zeros([D, TOKENS], gl.float32, tokens)
    for step in range(blocks):
        stage = step % STAGES
        e = e0 + (blocks - 1 - step) * TOKENS + u
        b_rows = gl.zeros([BM, TOKENS], gl.float32, gates)
        if IS_K:
            m_term = m_slot & (e + delay < T)[None, :]
            for share in gl.static_range(TERMS):
                p_term = p_terms + ((share * N + n).to(gl.int64) * T + e + delay)[None, :] * (H * M)
                b_rows = b_rows + gl.load(p_term + (h * M + m)[:, None], mask=m_term, other=0.0)

        mbarrier.wait(tokens_full.index(stage), (step // STAGES) & 1)
        b_g = s_g.index(stage).reshape([TOKENS, BM]).permute((1, 0)).load(gates).to(gl.float32)  # [BM, TOKENS]
        b_strength = strength(b_g)
        b_after, _ = leaving(b_g)
        b_cut = gl.maximum(b_g, STRONGEST)
        b_token = gl.exp2(-gl.associative_scan(b_cut * LOG2E, 1, add) - ANCHOR)
        b_written = (b_token * b_strength).to(bf16)
        s_written.store(b_written)
        s_left.store((b_strength * b_after).to(bf16))
        fence_async_shared()
        barrier()

        s_token = s_x.index(stage).reshape([TOKENS, D]).permute((1, 0))  # [D, TOKENS]
        mbarrier.wait(a_full.index(0), step & 1)
        b_behind = warpgroup_mma(s_a, s_token, b_none, use_acc=False, is_async=True)  # [BM, TOKENS]
        b_dx = warpgroup_mma(s_a.permute((1, 0)), s_left, b_zero, use_acc=False, is_async=True)  # [D, TOKENS]
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
            b_w = warpgroup_mma(s_weight, s_written, b_none, use_acc=False, is_async=True)
            b_dots, b_w = warpgroup_mma_wait(0, deps=(b_dots, b_w))
            s_later.store(gl.where(m_upto & (j[None, :] != tok[:, None]), b_dots, 0.0).to(bf16))
            s_own.store(gl.where(m_own, b_dots, 0.0).to(bf16))
            s_w.store(gl.where(m_upto, b_w, 0.0).to(bf16))
            fence_async_shared()
            barrier()
            b_later = warpgroup_mma(s_weight.permute((1, 0)), s_later, b_later, is_async=True)
            b_own = warpgroup_mma(s_weight.permute((1, 0)), s_own, b_own, is_async=True)
            b_dx = warpgroup_mma(s_row.permute((1, 0)), s_w, b_dx, is_async=True)
            b_later, b_own, b_dx = warpgroup_mma_wait(0, deps=(b_later, b_own, b_dx))
            barrier()
            mbarrier.arrive(rows_empty.index(place), count=1)

        store_wait(0)
        barrier()
        s_dx.reshape([TOKENS, D]).permute((1, 0)).store(b_dx.to(bf16))
        fence_async_shared()
        barrier()
        store_async(d_dx, [n, e0 + (blocks - 1 - step) * TOKENS, h, 0], s_dx)
        b_behind = gl.convert_layout(b_behind, gates) * b_after
        b_later = gl.convert_layout(b_later, gates)
        b_own = gl.convert_layout(b_own, gates)
        b_tokens, _ = gl.associative_scan((gl.full_like(b_behind, 0.0), b_strength * b_behind), 1, add_before)
        b_rows = gl.associative_scan(b_rows - b_later * b_written.to(gl.float32), 1, add, reverse=True)
        b_dg = b_rows * gl.exp2((b_g - b_cut) * LOG2E) + b_tokens
        b_dg -= (b_behind + (b_later + b_own) * b_token) * gl.exp2(b_g * LOG2E)
        mbarrier.arrive(tokens_empty.index(stage), count=1)
        if IS_K:
            mbarrier.wait(beyond_full.index(step % 2), (step // 2) & 1)
            b_dg += s_beyond.index(step % 2).load(gl.SliceLayout(1, gates))[:, None]
            mbarrier.wait(share_full.index(0), step & 1)
            b_dg += s_share.load(gates)
            barrier()
            mbarrier.arrive(share_empty.index(0), count=1)
            p_token = p_dg + ((n.to(gl.int64) * T + e) * H + h)[None, :] * M + m[:, None]
            gl.store(p_token, b_dg.to(p_dg.dtype.element_ty), mask=m_slot & (e < entered)[None, :])
        else:
            mbarrier.wait(share_empty.index(0), (step & 1) ^ 1)
            s_share.store(b_dg)
            barrier()
            mbarrier.arrive(share_full.index(0), count=1)
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "entered", "delay", "segments", "chunks"])
def resident_slots_kernel(
    d_q, d_do, d_da, d_p, d_k, d_v, d_g, d_states, d_dk, d_dv, p_ends, p_terms, p_dg, T, N, entered, delay, segments,
    chunks, unscale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """One segment of `chunks` blocks and one kv head. d_q, d_do: [N, T, H, NG, D]; d_da, d_p: [N, T, H, NG, M];
    d_k, d_v, d_dk, d_dv: [N, entered, H, D]; d_g: [N, entered, H, M]; d_states [N * segments * chunks / 2, H, M, 2 D],
    times 1 / unscale; p_ends as in `slots_kernel`; p_terms as in `RowGradients`; p_dg [N, T, H, M]."""
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
    s_state_k = gl.allocate_shared_memory(bf16, [1, 1, BM, D], tile_layout(4))
    s_state_v = gl.allocate_shared_memory(bf16, [1, 1, BM, D], tile_layout(4))
    s_a_k = gl.allocate_shared_memory(bf16, [BM, D], tile_layout(2))
    s_a_v = gl.allocate_shared_memory(bf16, [BM, D], tile_layout(2))
    s_beyond = gl.allocate_shared_memory(gl.float32, [2, BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    narrow: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    s_share = gl.allocate_shared_memory(gl.float32, [BM, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    # For keys and for values.
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
    share_full = barriers(1, 1)
    share_empty = barriers(1, 1)
    fence_async_shared()
    barrier()
    # Written out, since in a variable the sizes would no longer be constants.
    gl.warp_specialize(
        [
            (slots_partition, (
                p_ends, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state_k, s_state_v, s_a_k, s_a_v, s_beyond, rows_full,
                rows_empty, tokens_full, tokens_empty, state_full, state_empty, a_full, a_empty, beyond_full,
                segment.to(gl.int64) * H + h, blocks, unscale, M, D, PARTS,
            )),
            (tokens_partition, (
                d_dk, p_dg, p_terms, s_k, s_q, s_da, s_g, s_a_k, s_beyond, s_share, s_dx.index(0), s_written.index(0),
                s_left.index(0), s_later.index(0), s_own.index(0), s_w.index(0), rows_full, rows_empty, tokens_full,
                tokens_empty, a_full, a_empty, beyond_full, share_full, share_empty, n, h, e0, entered, delay, blocks,
                T, N, H, True, TERMS, M, D, PARTS,
            )),
            (tokens_partition, (
                d_dv, p_dg, p_terms, s_v, s_do, s_p, s_g, s_a_v, s_beyond, s_share, s_dx.index(1), s_written.index(1),
                s_left.index(1), s_later.index(1), s_own.index(1), s_w.index(1), rows_full, rows_empty, tokens_full,
                tokens_empty, a_full, a_empty, beyond_full, share_full, share_empty, n, h, e0, entered, delay, blocks,
                T, N, H, False, TERMS, M, D, PARTS,
            )),
            (load_partition, (
                d_q, d_do, d_da, d_p, d_k, d_v, d_g, d_states, s_q, s_do, s_da, s_p, s_k, s_v, s_g, s_state_k,
                s_state_v, rows_full, rows_empty, tokens_full, tokens_empty, state_full, state_empty, n, h, e0, delay,
                segment * chunks // 2, blocks, D, PARTS,
            )),
        ],
        [4, 4, 1],
        [152, 136, 24],
    )  # fmt: skip


def resident_slots_launches(
    problem: Problem, inputs: Inputs, stored: ResidentStates, rows: RowGradients, grad_o: Tensor,
    grad_final: Tensor | None, dk: Tensor, dv: Tensor, dg: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches, in order, that fill dk, dv [B, T, H, D] and dg [B, T, H, M] where tokens enter the slots;
    grad_final [N, H, M, E] fp32: of the slots after the call (None: zero)."""
    heads, dim, entered = problem.kv_heads, problem.head_dim, problem.tokens - problem.delay
    if entered <= 0:
        return []
    pieces = problem.batch * stored.segments
    ends = grad_final  # behind a single segment
    if stored.segments > 1:
        ends = torch.empty(pieces, heads, problem.slots, 2 * dim, dtype=torch.float32, device=dk.device)
        totals = ends.new_empty(ends.shape[:3])
    k, v, g, dk, dv = (x[:, :entered] for x in (inputs.k, inputs.v, inputs.g, dk, dv))
    shared = dict(
        d_q=describe_rows(problem, inputs.q), d_do=describe_rows(problem, grad_o),
        d_da=describe_rows(problem, rows.logits), d_p=describe_rows(problem, rows.weights), d_g=describe_tokens(g),
        p_ends=ends, entered=entered, delay=problem.delay, segments=stored.segments,
        chunks=stored.blocks, HQ=problem.q_heads, H=heads, D=dim, M=problem.slots,
    )  # fmt: skip
    whole = dict(
        shared, d_k=describe_tokens(k), d_v=describe_tokens(v), d_dk=describe_tokens(dk), d_dv=describe_tokens(dv),
        d_states=stored.descriptor(), p_terms=rows.terms, p_dg=dg, T=problem.tokens, N=problem.batch,
        unscale=1 / stored.scale, TERMS=len(rows.terms),
    )  # fmt: skip
    grid, options = (pieces * heads,), {"num_warps": 4}
    last = Launch(resident_slots_kernel, grid, whole, options)
    if stored.segments == 1 or ends is None:
        return [last]
    return [
        Launch(front_kernel, grid, dict(shared, p_totals=totals, AHEAD=3), options),
        scan_launch(problem, NO_PIECES, ends, totals, grad_final, None, stored.segments, backward=True),
        last,
    ]
