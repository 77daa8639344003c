"""The forward on Hopper with the slots on the chip, for heads of size 256 and one query head a kv head.

As `resident`, where K~ and V~ do not fit into one warpgroup's registers, and no group of query heads fills a tile: the
64 rows of a tile are 64 tokens here, and two programs share the columns of the values.

A program takes one segment, one head and DV columns of the values. Its warps divide the work:

    load     k and v in blocks of 32 tokens, into rings of RK and RV blocks, gates and q of a tile, by the copy engine
    state    8 warps. Holds K~ and V~ in fp32 registers. For every tile it publishes them in bf16, with the tile's
             decays, and then absorbs the 64 tokens that leave the window
    output   4 warps: a tile's logits against slots and window, one softmax, the values, o

With delay = W, the tokens that leave while tile i is served are blocks 2 i and 2 i + 1: token j of these 64 lies in the
window of the tile's token t for t < j <= t + W, and in its slots for j <= t. The decay between two of them spans too
much for one anchor, so they are cut into 4 parts of 16. With S the slots before the tile, slot by slot, for a row t of
part a,

    q_t . K~ = 2^(c_t) X_a + sum_{j <= t, j in a} (q_t . k_j) s_j 2^(c_t - c_j)       c: log2 decay since part a began
    X_0 = q_t . S        X_(b+1) = 2^(c of all of b) X_b + sum_{j in b} (q_t . k_j) s_j 2^(c of what in b follows j)

and the values likewise from the other side. Within a part the anchor of `primitives` splits the factor; between parts
all factors are at most 1.

Sizes as in `primitives`. BM: slots of a block, those beyond M masked. NEXT: blocks of the window after the first two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..problem import Problem
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
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .primitives import ANCHOR, LOG2E, STRONGEST, Launch, wait_for_previous
from .resident import PROGRAMS, ResidentConfig, first_reason
from .segment_ends import BM, load_slots

TOKENS = gl.constexpr(64)  # of a tile
PART = gl.constexpr(16)  # tokens that share an anchor
BLOCK = gl.constexpr(32)  # tokens of a block of the rings


def why_not_large(problem: Problem) -> str | None:
    """The sentence that says why a call is not for this kernel, or None."""
    gate_bits = 8 * problem.gate_dtype.itemsize
    widest = 64 if gate_bits == 16 else 32  # what shared memory has room for
    return first_reason(
        problem,
        (problem.head_dim == problem.value_dim == 256, "takes D = Dv = 256"),
        (problem.group == 1, "takes one query head a kv head"),
        (1 <= problem.window <= widest, f"takes W of 1 to {widest} with gates of {gate_bits} bits"),
    )


@gluon.jit
def multiply(a, b):
    return a * b


@gluon.jit
def multiply_others(a, others_a, b, others_b):
    """Products, and those of all but the last: in a scan, what each one comes after."""
    return a * b, a * others_b


@gluon.jit
def decays(b_g, layout: gl.constexpr):
    """From a tile's gates [PARTS, PART, BM]: s times the decay from a token to its part's end, and to the tile's end;
    s 2^(-c - A) and 2^(c + A); the decay of a part [PARTS, BM], and of the tile [BM].

    As products, for which one exponential a gate is enough. `layout`: of the gates, a part of a slot in each thread.
    """
    bf16: gl.constexpr = gl.bfloat16
    token: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, layout))
    b_g = b_g.to(gl.float32)
    b_keep = gl.exp2(b_g * LOG2E)
    # s = 1 - exp(g). Where that would cancel, four terms of its series: right to 1e-5, far beyond the bf16 to come.
    b_series = 1.0 + b_g * (0.5 + b_g * (1 / 6 + b_g * (1 / 24)))
    b_strength = gl.where(b_g > -0.02, -b_g * b_series, 1.0 - b_keep)
    b_cut = gl.maximum(b_keep, 2.0 ** (STRONGEST * LOG2E))
    first = gl.expand_dims(gl.expand_dims(gl.arange(0, PART, layout=token) == 0, 0), 2)
    b_decay = gl.associative_scan(gl.where(first, b_cut * 2.0**ANCHOR, b_cut), 1, multiply)  # within 2^-104 .. 2^104
    b_near = (b_strength / b_decay).to(bf16)
    _, b_later = gl.associative_scan((b_keep, gl.full_like(b_keep, 1.0)), 1, multiply_others, reverse=True)
    b_part = gl.reduce(b_keep, 1, multiply)
    across: gl.constexpr = gl.BlockedLayout([TOKENS // PART, 1], [1, 32], [1, 8], [1, 0])
    b_parts = gl.convert_layout(b_part, across)
    _, b_after = gl.associative_scan((b_parts, gl.full_like(b_parts, 1.0)), 0, multiply_others, reverse=True)
    b_factor = b_strength * b_later
    b_weight = b_factor * gl.expand_dims(gl.convert_layout(b_after, b_part.type.layout), 1)
    return b_factor.to(bf16), b_weight.to(bf16), b_near, b_decay, b_part, gl.reduce(b_parts, 0, multiply)


@gluon.jit
def load_partition(
    d_q, d_k, d_v, d_g, s_q, s_k, s_v, s_g, q_full, q_free, k_full, k_free, v_full, v_free, g_full, g_free,
    n, h, column, t0, tiles,
    D: gl.constexpr, DV: gl.constexpr, W: gl.constexpr, NEXT: gl.constexpr, RK: gl.constexpr, RV: gl.constexpr,
):  # fmt: skip
    """Block x of a ring holds the tokens from t0 - W + 32 x on; those outside of the sequence read as 0."""
    GATE_BYTES: gl.constexpr = d_g.dtype.primitive_bitwidth // 8
    for i in range(-1, tiles):
        if i + 1 < tiles:  # gates are needed first, a tile ahead
            mbarrier.wait(g_free.index(0), i & 1)
            mbarrier.expect(g_full.index(0), TOKENS * BM * GATE_BYTES)
            load_async(d_g, [n, t0 - W + (i + 1) * TOKENS, h, 0], g_full.index(0), s_g)
        if i >= 0:
            mbarrier.wait(q_free.index(0), (i & 1) ^ 1)
            mbarrier.expect(q_full.index(0), TOKENS * D * 2)
            load_async(d_q, [n, t0 + i * TOKENS, h, 0], q_full.index(0), s_q)
            first = gl.where(i == 0, 0, 2 * i + NEXT)
            for x in range(first, 2 * i + 2 + NEXT):
                place = x % RK
                mbarrier.wait(k_free.index(place), ((x // RK) & 1) ^ 1)
                mbarrier.expect(k_full.index(place), BLOCK * D * 2)
                load_async(d_k, [n, t0 - W + x * BLOCK, h, 0], k_full.index(place), s_k.index(place))
            for x in range(first, 2 * i + 2 + NEXT):
                place = x % RV
                mbarrier.wait(v_free.index(place), ((x // RV) & 1) ^ 1)
                mbarrier.expect(v_full.index(place), BLOCK * DV * 2)
                load_async(d_v, [n, t0 - W + x * BLOCK, h, column], v_full.index(place), s_v.index(place))


@gluon.jit
def state_partition(
    p_before, s_k, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_weight, s_near, s_decay, s_part,
    k_full, k_free, v_full, v_free, g_full, g_free, slots_full, slots_free, rest_full, rest_free, row, column, tiles,
    M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, RK: gl.constexpr, RV: gl.constexpr,
):  # fmt: skip
    """K~ [BM, D] and V~ [BM, DV], and every tile's decays."""
    keys: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, D // 2, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, DV // 2, 16]
    )
    # A thread takes a slot of a part, so that products over tokens stay within it.
    gates: gl.constexpr = gl.BlockedLayout([1, PART, 1], [1, 1, 32], [4, 1, 2], [2, 1, 0])
    PARTS: gl.constexpr = TOKENS // PART
    if p_before is not None:
        wait_for_previous()
    b_k = load_slots(p_before, row, 0, M, D, D, keys)
    b_v = load_slots(p_before, row, D + column, M, D, DV, values)
    mbarrier.wait(g_full.index(0), 0)
    b_g = s_g.reshape([PARTS, PART, BM]).load(gates)
    b_factor, b_weight, b_near, b_decay, b_part, b_keep = decays(b_g, gates)
    barrier()
    mbarrier.arrive(g_free.index(0), count=1)
    for i in range(tiles):
        mbarrier.wait(slots_free.index(0), (i & 1) ^ 1)
        s_slot_k.store(b_k.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(slots_full.index(0), count=1)
        mbarrier.wait(rest_free.index(0), (i & 1) ^ 1)
        s_factor.store(b_factor.reshape([TOKENS, BM]))
        s_near.store(b_near.reshape([TOKENS, BM]))
        s_decay.store(b_decay.reshape([TOKENS, BM]))
        s_part.store(b_part)
        s_weight.store(b_weight.reshape([TOKENS, BM]))
        s_slot_v.reshape([BM, DV]).store(b_v.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(rest_full.index(0), count=1)

        b_k = b_k * gl.convert_layout(b_keep, gl.SliceLayout(1, keys))[:, None]
        b_v = b_v * gl.convert_layout(b_keep, gl.SliceLayout(1, values))[:, None]
        following = gl.minimum(i + 1, tiles - 1)
        for x in gl.static_range(2):
            mbarrier.wait(k_full.index((2 * i + x) % RK), ((2 * i + x) // RK) & 1)
            mbarrier.wait(v_full.index((2 * i + x) % RV), ((2 * i + x) // RV) & 1)
        mbarrier.wait(g_full.index(0), following & 1)
        for x in gl.static_range(2):
            s_left = s_weight.slice(x * BLOCK, BLOCK).permute((1, 0))  # [BM, BLOCK]
            b_k = warpgroup_mma(s_left, s_k.index((2 * i + x) % RK).reshape([BLOCK, D]), b_k, is_async=True)
            b_v = warpgroup_mma(s_left, s_v.index((2 * i + x) % RV).reshape([BLOCK, DV]), b_v, is_async=True)
        # Meanwhile, the next tile's decays.
        b_g = s_g.reshape([PARTS, PART, BM]).load(gates)
        b_factor, b_weight, b_near, b_decay, b_part, b_keep = decays(b_g, gates)
        b_k, b_v = warpgroup_mma_wait(0, deps=[b_k, b_v])
        barrier()  # all warps' products are over, and their gates are read
        mbarrier.arrive(g_free.index(0), count=1)
        for x in gl.static_range(2):
            mbarrier.arrive(k_free.index((2 * i + x) % RK), count=1)
            mbarrier.arrive(v_free.index((2 * i + x) % RV), count=1)


@gluon.jit
def output_partition(
    d_o, p_lse, s_q, s_k, s_v, s_slot_k, s_slot_v, s_factor, s_near, s_decay, s_part, s_row,
    q_full, q_free, k_full, k_free, v_full, v_free, slots_full, slots_free, rest_full, rest_free,
    n, h, column, t0, tiles, T, H, scale,
    M: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, W: gl.constexpr, NEXT: gl.constexpr,
    RK: gl.constexpr, RV: gl.constexpr, MASK_EMPTY: gl.constexpr,
):  # fmt: skip
    slots: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=slots, k_width=2)
    of_slots: gl.constexpr = gl.SliceLayout(1, slots)
    of_keys: gl.constexpr = gl.SliceLayout(1, keys)
    bf16: gl.constexpr = gl.bfloat16
    inf: gl.constexpr = float("inf")

    j = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, keys))[None, :]
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, slots))[None, :]
    to_log2 = scale * LOG2E
    b_zero = gl.zeros([TOKENS, BLOCK], gl.float32, keys)
    s_value = s_slot_v.reshape([TOKENS, DV])

    for i in range(tiles):
        first = t0 + i * TOKENS
        # Rows of the tile. From memory, so that no mask made of them is kept in registers from tile to tile.
        t = s_row.load(of_keys)[:, None]
        part = s_row.load(of_slots)[:, None] // PART
        gap = t - j  # [TOKENS, BLOCK]
        s_query = s_q.reshape([TOKENS, D])
        mbarrier.wait(q_full.index(0), i & 1)
        for x in gl.static_range(2 + NEXT):
            mbarrier.wait(k_full.index((2 * i + x) % RK), ((2 * i + x) // RK) & 1)
        mbarrier.wait(slots_full.index(0), i & 1)
        b_slot = gl.zeros([TOKENS, BM], gl.float32, slots)
        b_slot = warpgroup_mma(s_query, s_slot_k.permute((1, 0)), b_slot, use_acc=False, is_async=True)
        b_logit = ()  # [TOKENS, BLOCK] each
        for x in gl.static_range(2 + NEXT):
            s_key = s_k.index((2 * i + x) % RK).reshape([BLOCK, D]).permute((1, 0))
            b_logit = b_logit + (warpgroup_mma(s_query, s_key, b_zero, use_acc=False, is_async=True),)
        waited = warpgroup_mma_wait(0, deps=(b_slot,) + b_logit)
        b_slot = waited[0]
        b_logit = waited[1:]
        barrier()
        mbarrier.arrive(q_free.index(0), count=1)
        mbarrier.arrive(slots_free.index(0), count=1)
        for x in gl.static_range(2):
            mbarrier.arrive(k_free.index((2 * i + x) % RK), count=1)
        mbarrier.wait(rest_full.index(0), i & 1)

        # Logits of the slots: part by part what came in before a row's own part, then that of its own.
        for b in gl.static_range(3):
            b_slot = b_slot * gl.where(part > b, s_part.slice(b, 1).load(slots), 1.0)
            mask = (t // PART > b) & (j // PART == b % 2)
            b_pair = gl.convert_layout(gl.where(mask, b_logit[b // 2], 0.0).to(bf16), left)
            b_slot = warpgroup_mma(b_pair, s_factor.slice(b // 2 * BLOCK, BLOCK), b_slot, is_async=True)
            b_slot = warpgroup_mma_wait(0, deps=(b_slot, b_pair))[0]
        b_slot = b_slot * 2.0**-ANCHOR
        b_pairs = ()
        for x in gl.static_range(2):
            mask = (gap >= x * BLOCK) & (j // PART + x * 2 == t // PART)
            b_pairs = b_pairs + (gl.convert_layout(gl.where(mask, b_logit[x], 0.0).to(bf16), left),)
        for x in gl.static_range(2):
            b_slot = warpgroup_mma(b_pairs[x], s_near.slice(x * BLOCK, BLOCK), b_slot, is_async=True)
        # One softmax with the window's: of the first 64 tokens those after t, and none before the sequence.
        before = gl.maximum(W - first - t, 1)
        b_window = ()
        for x in gl.static_range(2 + NEXT):
            b_x = b_logit[x]
            if x < 2:
                b_x = gl.where(gap + before <= x * BLOCK, b_x, -inf)
            if x * BLOCK + BLOCK - 1 > W:
                b_x = gl.where(gap >= x * BLOCK - W, b_x, -inf)
            b_window = b_window + (b_x,)
            if x == 0:
                b_most = b_x
            else:
                b_most = gl.maximum(b_most, b_x)
        b_max = gl.convert_layout(gl.max(b_most, 1), of_slots)  # [TOKENS]
        b_decay = s_decay.load(slots)  # [TOKENS, BM]
        b_slot = warpgroup_mma_wait(0, deps=(b_slot,) + b_pairs)[0] * b_decay
        if M < BM:
            b_slot = gl.where(m < M, b_slot, -inf)
        if MASK_EMPTY:
            empty = s_row.load(of_slots)[:, None] + first < W
            b_slot = gl.where(empty, -inf, b_slot)
        b_max = gl.maximum(gl.max(b_slot, 1), b_max) * to_log2
        b_slot = gl.exp2(b_slot * to_log2 - b_max[:, None])
        b_sum = gl.sum(b_slot, 1)  # [TOKENS]
        b_slot = b_slot * b_decay
        b_top = gl.convert_layout(b_max, of_keys)[:, None]
        b_most = b_zero
        b_p = ()
        for x in gl.static_range(2 + NEXT):
            b_x = gl.exp2(b_window[x] * to_log2 - b_top)
            b_most = b_most + b_x
            b_p = b_p + (gl.convert_layout(b_x.to(bf16), left),)
        b_sum += gl.convert_layout(gl.sum(b_most, 1), of_slots)
        for x in gl.static_range(2 + NEXT):
            mbarrier.wait(v_full.index((2 * i + x) % RV), ((2 * i + x) // RV) & 1)

        # What the slots weigh of the tile's tokens: of a row's own part, then back from part to part.
        b_own = gl.convert_layout(b_slot.to(bf16), left)
        b_new0 = warpgroup_mma(b_own, s_near.slice(0, BLOCK).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_new1 = warpgroup_mma(b_own, s_near.slice(BLOCK, BLOCK).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_slot = b_slot * 2.0**-ANCHOR
        b_left = gl.convert_layout(b_slot.to(bf16), left)
        s_far = s_factor.slice(BLOCK, BLOCK).permute((1, 0))
        b_two = warpgroup_mma(b_left, s_far, b_zero, use_acc=False, is_async=True)
        b_slot = b_slot * gl.where(part > 2, s_part.slice(2, 1).load(slots), 1.0)
        b_new0, b_new1, b_two, _, _ = warpgroup_mma_wait(0, deps=(b_new0, b_new1, b_two, b_own, b_left))
        b_new0 = gl.where((gap >= 0) & (j // PART == t // PART), b_new0, 0.0)
        b_new1 = gl.where(gap >= BLOCK, gl.where(j // PART + 2 == t // PART, b_new1, b_two), 0.0)
        b_new1 = gl.convert_layout(b_new1.to(bf16), left)
        b_left = gl.convert_layout(b_slot.to(bf16), left)
        s_far = s_factor.slice(0, BLOCK).permute((1, 0))
        b_one = warpgroup_mma(b_left, s_far, b_zero, use_acc=False, is_async=True)
        b_slot = b_slot * gl.where(part > 1, s_part.slice(1, 1).load(slots), 1.0)
        b_own = gl.convert_layout(b_slot.to(bf16), left)
        b_none = warpgroup_mma(b_own, s_far, b_zero, use_acc=False, is_async=True)
        b_slot = b_slot * gl.where(part > 0, s_part.slice(0, 1).load(slots), 1.0)
        b_one, b_none, _, _ = warpgroup_mma_wait(0, deps=(b_one, b_none, b_left, b_own))
        b_new0 = gl.where(j // PART < t // PART, gl.where(j < PART, b_none, b_one), b_new0)
        # Where one of the two is, the other is 0.
        b_new = (gl.convert_layout(b_new0.to(bf16), left), b_new1)
        b_left = (gl.convert_layout(b_slot.to(bf16), left),)
        for x in gl.static_range(2 + NEXT):
            b_x = b_p[x]
            if x < 2:
                b_x = b_x + b_new[x]
            b_left = b_left + (b_x,)

        # The values.
        b_o = gl.zeros([TOKENS, DV], gl.float32, values)
        b_o = warpgroup_mma(b_left[0], s_value, b_o, use_acc=False, is_async=True)
        for x in gl.static_range(2 + NEXT):
            b_o = warpgroup_mma(b_left[1 + x], s_v.index((2 * i + x) % RV).reshape([BLOCK, DV]), b_o, is_async=True)
        b_o = warpgroup_mma_wait(0, deps=(b_o,) + b_left)[0]
        barrier()
        for x in gl.static_range(2):
            mbarrier.arrive(v_free.index((2 * i + x) % RV), count=1)
        # o leaves through the place of V~, which is handed back with the tile's decays once it is gone.
        b_o = b_o * gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, values))[:, None]
        s_value.store(b_o.to(bf16))
        fence_async_shared()
        barrier()
        store_async(d_o, [n, first, h, column], s_slot_v)
        if p_lse is not None:
            row = first + gl.arange(0, TOKENS, layout=of_slots)
            p_row = p_lse + (n.to(gl.int64) * T + row) * H + h
            gl.store(p_row, (b_max + gl.log2(b_sum)) / LOG2E, mask=(row < T) & (column == 0))
        store_wait(0)
        barrier()
        mbarrier.arrive(rest_free.index(0), count=1)


@gluon.jit(do_not_specialize=["T", "tiles", "segments"])
def large_kernel(
    d_q, d_k, d_v, d_g, d_o, p_before, p_lse, T, tiles, segments, scale,
    H: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, M: gl.constexpr, W: gl.constexpr,
    RK: gl.constexpr, RV: gl.constexpr, MASK_EMPTY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One segment of `tiles` tiles, one head, DV columns of the values. d_q, d_k, d_v, d_o: [N, T, H, D];
    d_g: [N, T, H, M]; p_before [N * segments, H, M, 2 D] fp32 or None; p_lse [N, T, H] fp32 or None."""
    NEXT: gl.constexpr = (W + BLOCK - 1) // BLOCK
    column = gl.program_id(0) % (D // DV) * DV
    h = gl.program_id(0) // (D // DV) % H
    segment = gl.program_id(0) // (D // DV * H)
    n = segment // segments
    row = segment.to(gl.int64) * H + h
    t0 = segment % segments * tiles * TOKENS
    tiles = gl.minimum(tiles, (T - t0 + TOKENS - 1) // TOKENS)

    bf16: gl.constexpr = gl.bfloat16
    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_q = gl.allocate_shared_memory(bf16, [1, TOKENS, 1, D], tile_layout(4))
    s_k = gl.allocate_shared_memory(bf16, [RK, 1, BLOCK, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [RV, 1, BLOCK, 1, DV], tile_layout(4))
    s_g = gl.allocate_shared_memory(d_g.dtype, [1, TOKENS, 1, BM], tile_layout(4, GATE_BITS))
    s_slot_k = gl.allocate_shared_memory(bf16, [BM, D], tile_layout(2))
    # V~ [BM, DV], and o [TOKENS, DV] on its way out: as many rows.
    gl.static_assert(BM == TOKENS)
    s_slot_v = gl.allocate_shared_memory(bf16, [1, TOKENS, 1, DV], tile_layout(4))
    s_factor = gl.allocate_shared_memory(bf16, [TOKENS, BM], tile_layout(2))
    s_near = gl.allocate_shared_memory(bf16, [TOKENS, BM], tile_layout(2))
    s_weight = gl.allocate_shared_memory(bf16, [TOKENS, BM], tile_layout(2))
    s_decay = gl.allocate_shared_memory(gl.float32, [TOKENS, BM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    s_part = gl.allocate_shared_memory(gl.float32, [TOKENS // PART, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    s_row = gl.allocate_shared_memory(gl.int32, [TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_row.store(gl.arange(0, TOKENS, layout=gl.BlockedLayout([1], [32], [8], [0])))
    q_full = barriers(1, 1)
    q_free = barriers(1, 1)
    k_full = barriers(RK, 1)
    k_free = barriers(RK, 2)  # by the state and by the output
    v_full = barriers(RV, 1)
    v_free = barriers(RV, 2)
    g_full = barriers(1, 1)
    g_free = barriers(1, 1)
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
                p_before, s_k, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_weight, s_near, s_decay, s_part, k_full,
                k_free, v_full, v_free, g_full, g_free, slots_full, slots_free, rest_full, rest_free, row, column,
                tiles, M, D, DV, RK, RV,
            )),
            (output_partition, (
                d_o, p_lse, s_q, s_k, s_v, s_slot_k, s_slot_v, s_factor, s_near, s_decay, s_part, s_row, q_full, q_free,
                k_full, k_free, v_full, v_free, slots_full, slots_free, rest_full, rest_free, n, h, column, t0, tiles,
                T, H, scale, M, D, DV, W, NEXT, RK, RV, MASK_EMPTY,
            )),
            (load_partition, (
                d_q, d_k, d_v, d_g, s_q, s_k, s_v, s_g, q_full, q_free, k_full, k_free, v_full, v_free, g_full, g_free,
                n, h, column, t0, tiles, D, DV, W, NEXT, RK, RV,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


def large_launch(
    problem: Problem, config: ResidentConfig, q: Tensor, k: Tensor, v: Tensor, g: Tensor, o: Tensor,
    shared: dict[str, Any],
) -> Launch:  # fmt: skip
    """As `resident_launch`."""
    dim, programs = problem.head_dim, PROGRAMS[problem.head_dim]
    columns = dim // programs
    arguments = dict(
        shared, d_q=descriptor(q, [1, TOKENS.value, 1, dim]), d_k=descriptor(k, [1, BLOCK.value, 1, dim]),
        d_v=descriptor(v, [1, BLOCK.value, 1, columns]), d_g=descriptor(g, [1, TOKENS.value, 1, BM.value]),
        d_o=descriptor(o, [1, TOKENS.value, 1, columns]), tiles=config.tokens // TOKENS.value, DV=columns,
        W=problem.window, RK=4, RV=3 if problem.window <= BLOCK.value else 4,
    )  # fmt: skip
    grid = (problem.batch * shared["segments"] * problem.kv_heads * programs,)
    return Launch(large_kernel, grid, arguments, {"num_warps": 8})
