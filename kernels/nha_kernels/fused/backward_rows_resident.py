"""The backward pass seen from the rows, on Hopper, with the slots on the chip: what `backward_rows` finds, and on the
way the slots before every 32 tokens, which the slots' own pass needs.

As in `resident` a program takes one segment and one kv head, and walks its tiles of 16 tokens times 4 query heads;
rings, slots and decays are the same. Its warps divide the work:

    load     k and v of 16 tokens at a time, into a ring of R blocks, gates into one of G, q and do of a tile
    rotate   with a rotary embedding the keys of each block, as in `resident`, and a tile's q for the window
    state    holds K~ and V~ in fp32 registers, publishes them for every tile, and sends them to memory
    slots    a tile's logits with the slots: their weights, their gradients, `terms`
    window   the logits with the window's keys; and dq, also from the slots' logits, which are there in shared memory.
             It sends to memory what the slots' partition leaves there, and dq from the same place

A weight is p = exp(logit - lse). The sum of all weights and delta = sum(p * (do . value)) have a part in each of the
two partitions, which they tell each other. Weights and gradients of logits leave with the rows' decays on them,
2^(c + ANCHOR) with the anchor of `primitives`, which is RAISED above that of the slots here.

Sizes as in `resident`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients, empty_rows
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
from .primitives import EARLY, LOG2E, Launch
from .resident import (
    ANCHOR,
    HEADS,
    LEAVING,
    TOKENS,
    ResidentConfig,
    Starts,
    describe_rows,
    describe_tokens,
    first_reason,
    rotate_block,
    row_decay,
    state_partition,
)
from .rotary import head_angles, load_head_angles, load_near_angles, query_angles, rotate, turn_queries
from .segment_ends import BM, ends_launches

RAISED = gl.constexpr(2.0**8)
# R and G by whether there is a rotary embedding, and bytes of a gate: what shared memory has room for with heads of 128
RINGS = {(False, 2): (8, 4), (False, 4): (7, 3), (True, 2): (6, 5), (True, 4): (6, 3)}


@dataclass(frozen=True, slots=True)
class ResidentRowsConfig(ResidentConfig):
    """How this kernel is launched. registers: of a thread of the slots' partition."""

    REGISTERS: ClassVar[Mapping[tuple[int, bool], int]] = {
        (64, False): 160, (128, False): 160, (64, True): 152, (128, True): 152,
    }  # fmt: skip


def why_not_resident(problem: Problem) -> str | None:
    """The sentence that says why a backward pass is not for this kernel, or None."""
    return first_reason(
        problem,
        (problem.head_dim == problem.value_dim and problem.head_dim in (64, 128), "takes D = Dv = 64 or 128"),
        (problem.window in (16, 32, 48, 64), "takes W of 16, 32, 48 or 64"),
        (2 <= problem.group <= 8, "takes groups of 2 to 8 query heads"),
        (problem.slots % 8 == 0, "takes slots in multiples of 8"),
    )


@gluon.jit
def load_partition(
    d_q, d_do, d_k, d_v, d_g, s_q, s_do, s_k, s_v, s_g, s_leaving, q_full, q_empty, kv_full, g_full, leaving_full,
    done, absorbed, n, h, t0, tiles,
    D: gl.constexpr, WB: gl.constexpr, R: gl.constexpr, G: gl.constexpr, PARTS: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Block x of a ring holds the tokens from t0 + 16 (x - WB) on; those outside of the sequence read as 0."""
    GATE_BYTES: gl.constexpr = d_g.dtype.primitive_bitwidth // 8
    for x in range(tiles + WB):
        place = x % R
        if x >= R:  # what was in this place: tiles up to x - R have met it
            mbarrier.wait(done.index(place), ((x - R) // R) & 1)
            mbarrier.wait(absorbed.index(place), ((x - R) // R) & 1)
        mbarrier.expect(kv_full.index(place), 2 * TOKENS * D * 2)
        load_async(d_k, [n, t0 + (x - WB) * TOKENS, h, 0], kv_full.index(place), s_k.index(place))
        load_async(d_v, [n, t0 + (x - WB) * TOKENS, h, 0], kv_full.index(place), s_v.index(place))
        i = x - WB
        if i + 1 >= 0 and i + 1 < tiles:
            if i + 1 >= G:
                mbarrier.wait(absorbed.index((i + 1 - G) % R), ((i + 1 - G) // R) & 1)
            gate = (i + 1) % G
            mbarrier.expect(g_full.index(gate), TOKENS * BM * GATE_BYTES)
            load_async(d_g, [n, t0 + (i + 1 - WB) * TOKENS, h, 0], g_full.index(gate), s_g.index(gate))
        if i >= 0:
            if ROPE:
                if i >= LEAVING:
                    mbarrier.wait(done.index((i - LEAVING) % R), ((i - LEAVING) // R) & 1)
                    mbarrier.wait(absorbed.index((i - LEAVING) % R), ((i - LEAVING) // R) & 1)
                left = i % LEAVING
                mbarrier.expect(leaving_full.index(left), TOKENS * D * 2)
                load_async(d_k, [n, t0 + (i - WB) * TOKENS, h, 0], leaving_full.index(left), s_leaving.index(left))
            for part in gl.static_range(PARTS):
                mbarrier.wait(q_empty.index(0), ((i * PARTS + part) & 1) ^ 1)
                mbarrier.expect(q_full.index(0), 2 * TOKENS * HEADS * D * 2)
                load_async(d_q, [n, t0 + i * TOKENS, h, part * HEADS, 0], q_full.index(0), s_q.index(0))
                load_async(d_do, [n, t0 + i * TOKENS, h, part * HEADS, 0], q_full.index(0), s_do.index(0))


@gluon.jit
def tile_rows(n, h, t, part, T, HQ, NG: gl.constexpr, layout: gl.constexpr):
    """Of the tile that begins with token t, the rows' places in [N, T, HQ], and which there are."""
    r = gl.arange(0, TOKENS * HEADS, layout=layout)
    t = t + r // HEADS
    head = part * HEADS + r % HEADS
    return (n.to(gl.int64) * T + t) * HQ + h * NG + head, (t < T) & (head < NG)


@gluon.jit
def load_lse(p_lse, n, h, t0, turn, T, HQ, NG: gl.constexpr, PARTS: gl.constexpr, layout: gl.constexpr):
    """Of a turn's rows, in log2; infinite for those that attend to nothing."""
    inf: gl.constexpr = float("inf")
    row, m_row = tile_rows(n, h, t0 + turn // PARTS * TOKENS, turn % PARTS, T, HQ, NG, layout)
    b_lse = gl.load(p_lse + row, mask=m_row, other=inf) * LOG2E
    return gl.where(b_lse == -inf, inf, b_lse)


@gluon.jit
def share_sums(s_sums, sums_full, turn, b_sum, b_delta, me: gl.constexpr):
    """Partial sums of the weights and of delta [ROWS] -> 1 / the whole sum, and delta."""
    layout: gl.constexpr = b_sum.type.layout
    place = turn % 2 * 4
    s_sums.index(place + 2 * me).store(b_sum)
    s_sums.index(place + 2 * me + 1).store(b_delta)
    barrier()
    mbarrier.arrive(sums_full.index(me), count=1)
    mbarrier.wait(sums_full.index(1 - me), turn & 1)
    # In one order, so that both get the same bits.
    b_sum = s_sums.index(place).load(layout) + s_sums.index(place + 2).load(layout)
    b_delta = s_sums.index(place + 1).load(layout) + s_sums.index(place + 3).load(layout)
    b_inverse = 1.0 / gl.where(b_sum == 0.0, 1.0, b_sum)
    return b_inverse, b_delta * b_inverse


@gluon.jit
def slots_partition(
    p_lse, p_dlse, p_sums, p_delta, p_terms, s_q, s_do, s_leaving, s_v, s_slot_k, s_slot_v, s_factor,
    s_decay, s_strength, s_sums, s_staged, q_full, q_empty, kv_full, leaving_full, slots_full, done, sums_full,
    staged_full, staged_empty, n, h, t0, tiles, T, N, H, HQ, scale,
    M: gl.constexpr, D: gl.constexpr, NG: gl.constexpr, WB: gl.constexpr, R: gl.constexpr, L: gl.constexpr,
    PARTS: gl.constexpr, MASK_EMPTY: gl.constexpr,
):  # fmt: skip
    """The slots' side of every tile."""
    ROWS: gl.constexpr = TOKENS * HEADS
    slots: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=slots, k_width=2)
    of_slots: gl.constexpr = gl.SliceLayout(1, slots)
    bf16: gl.constexpr = gl.bfloat16
    tok = gl.arange(0, ROWS, layout=gl.SliceLayout(1, keys)) // HEADS
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, keys))
    m_before = j[None, :] < tok[:, None]  # [ROWS, TOKENS]
    m_own = j[None, :] == tok[:, None]
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, slots))
    b_none = gl.zeros([ROWS, TOKENS], gl.float32, keys)
    b_nothing = gl.zeros([ROWS, BM], gl.float32, slots)
    b_lse = load_lse(p_lse, n, h, t0, 0, T, HQ, NG, PARTS, of_slots)

    for turn in range(tiles * PARTS):
        i = turn // PARTS
        part = turn % PARTS
        stage = i % 2
        only = unknown_place(0, turn, tiles * PARTS)
        s_query = s_q.index(only).reshape([ROWS, D])
        s_out = s_do.index(only).reshape([ROWS, D])
        row, m_row = tile_rows(n, h, t0 + i * TOKENS, part, T, HQ, NG, of_slots)
        mbarrier.wait(kv_full.index(i % R), (i // R) & 1)
        if L < R:
            mbarrier.wait(leaving_full.index(i % L), (i // L) & 1)
        mbarrier.wait(slots_full.index(stage), (i // 2) & 1)
        mbarrier.wait(q_full.index(0), turn & 1)

        # What the rows meet, apart from what comes of their own token.
        s_key = s_leaving.index(i % L).reshape([TOKENS, D]).permute((1, 0))
        s_value = s_v.index(i % R).reshape([TOKENS, D]).permute((1, 0))
        b_dots = warpgroup_mma(s_query, s_key, b_none, use_acc=False, is_async=True)  # [ROWS, TOKENS]
        s_slot = s_slot_k.index(stage).reshape([BM, D]).permute((1, 0))
        b_logit = warpgroup_mma(s_query, s_slot, b_nothing, use_acc=False, is_async=True)  # [ROWS, BM]
        b_values = warpgroup_mma(s_out, s_value, b_none, use_acc=False, is_async=True)
        s_slot = s_slot_v.index(stage).reshape([BM, D]).permute((1, 0))
        b_value = warpgroup_mma(s_out, s_slot, b_nothing, use_acc=False, is_async=True)
        b_dots, b_values, b_logit, b_value = warpgroup_mma_wait(1, deps=(b_dots, b_values, b_logit, b_value))
        b_pair = gl.convert_layout(gl.where(m_before, b_dots, 0.0).to(bf16), left)
        b_pair_value = gl.convert_layout(gl.where(m_before, b_values, 0.0).to(bf16), left)
        b_logit = warpgroup_mma(b_pair, s_factor.index(stage), b_logit, is_async=True)
        b_value = warpgroup_mma(b_pair_value, s_factor.index(stage), b_value, is_async=True)
        b_own = gl.convert_layout(gl.sum(gl.where(m_own, b_dots, 0.0), 1), of_slots)[:, None]
        b_own_value = gl.convert_layout(gl.sum(gl.where(m_own, b_values, 0.0), 1), of_slots)[:, None]
        b_logit, b_value, b_pair, b_pair_value = warpgroup_mma_wait(0, deps=(b_logit, b_value, b_pair, b_pair_value))
        barrier()
        mbarrier.arrive(q_empty.index(0), count=1)
        b_decay = row_decay(s_decay.index(stage), slots)  # [ROWS, BM]
        b_logit = b_logit * b_decay * scale
        b_value = b_value * b_decay
        b_strength = row_decay(s_strength.index(stage), slots)
        b_p = gl.exp2((b_logit + b_strength * (b_own * scale)) * LOG2E - b_lse[:, None])
        if M < BM:
            b_p = gl.where((m < M)[None, :], b_p, 0.0)
        if MASK_EMPTY:
            b_p = gl.where(t0 + (i - WB) * TOKENS < 0, 0.0, b_p)
        b_delta = gl.sum(b_p * (b_value + b_strength * b_own_value), 1)
        # Also lest the window's partition miss a turn of the sums: it is done with those of the last tile.
        mbarrier.wait(staged_empty.index(0), turn & 1)
        b_inverse, b_delta = share_sums(s_sums, sums_full, turn, gl.sum(b_p, 1), b_delta, 0)

        gl.store(p_sums + row, b_lse - gl.log2(b_inverse), mask=m_row)
        b_lse = load_lse(p_lse, n, h, t0, turn + 1, T, HQ, NG, PARTS, of_slots)  # long before it is needed
        if p_dlse is not None:
            b_delta -= gl.load(p_dlse + row, mask=m_row, other=0.0)
        gl.store(p_delta + row, b_delta, mask=m_row)
        # Read anew: registers do not hold them all this while.
        b_decay = row_decay(s_decay.index(stage), slots)
        b_strength = row_decay(s_strength.index(stage), slots)
        b_p = b_p * b_inverse[:, None]
        b_da = b_p * (b_value + b_strength * b_own_value - b_delta[:, None])
        b_terms = gl.sum((b_da * b_logit + b_p * b_value).reshape([TOKENS, HEADS, BM]), 1)  # [TOKENS, BM]
        terms: gl.constexpr = b_terms.type.layout
        t = t0 + i * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, terms))
        slot = gl.arange(0, BM, layout=gl.SliceLayout(0, terms))
        p_term = p_terms + (((part * N + n).to(gl.int64) * T + t) * H + h)[:, None] * M + slot[None, :]
        gl.store(p_term, b_terms, mask=(t < T)[:, None] & (slot < M)[None, :])
        b_decay = b_decay * RAISED
        b_p = (b_p * b_decay).to(bf16)
        b_da = (b_da * (b_decay * scale)).to(bf16)
        s_staged.index(0).reshape([ROWS, BM]).store(b_p)
        s_staged.index(1).reshape([ROWS, BM]).store(b_da)
        fence_async_shared()
        barrier()
        mbarrier.arrive(staged_full.index(0), count=1)
        if part == PARTS - 1:
            mbarrier.arrive(done.index(i % R), count=1)


@gluon.jit
def window_partition(
    d_dq, d_p, d_da, p_lse, p_dlse, rope, s_turned, s_do, s_k, s_v, s_leaving, s_slot_k, s_factor, s_sums, s_staged,
    q_full, turned_full, q_empty, keys_full, done, sums_full, staged_full, staged_empty, n, h, t0, tiles, T, HQ, scale,
    D: gl.constexpr, NG: gl.constexpr, WB: gl.constexpr, R: gl.constexpr, L: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The window's side of every tile, and the gradient of q. Block i + x of the ring is the x-th that it meets."""
    ROWS: gl.constexpr = TOKENS * HEADS
    slots: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    columns: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=slots, k_width=2)
    of_keys: gl.constexpr = gl.SliceLayout(1, keys)
    bf16: gl.constexpr = gl.bfloat16
    inf: gl.constexpr = float("inf")
    tok = gl.arange(0, ROWS, layout=of_keys) // HEADS
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, keys))
    m_upto = j[None, :] <= tok[:, None]  # [ROWS, TOKENS]
    b_none = gl.zeros([ROWS, TOKENS], gl.float32, keys)
    for x in gl.static_range(WB):
        mbarrier.wait(keys_full.index(x), 0)
    b_lse = load_lse(p_lse, n, h, t0, 0, T, HQ, NG, PARTS, of_keys)

    for turn in range(tiles * PARTS):
        i = turn // PARTS
        part = turn % PARTS
        first = t0 + (i - WB) * TOKENS  # token of block i
        only = unknown_place(0, turn, tiles * PARTS)
        s_query = s_turned.index(only).reshape([ROWS, D])
        s_out = s_do.index(only).reshape([ROWS, D])
        row, m_row = tile_rows(n, h, t0 + i * TOKENS, part, T, HQ, NG, of_keys)
        mbarrier.wait(keys_full.index((i + WB) % R), ((i + WB) // R) & 1)
        mbarrier.wait(q_full.index(0), turn & 1)
        if rope is not None:
            mbarrier.wait(turned_full.index(0), turn & 1)
        b_logits = ()  # [ROWS, TOKENS] each
        b_values = ()
        for x in gl.static_range(WB + 1):
            s_key = s_k.index((i + x) % R).reshape([TOKENS, D]).permute((1, 0))
            s_value = s_v.index((i + x) % R).reshape([TOKENS, D]).permute((1, 0))
            b_logits = b_logits + (warpgroup_mma(s_query, s_key, b_none, use_acc=False, is_async=True),)
            b_values = b_values + (warpgroup_mma(s_out, s_value, b_none, use_acc=False, is_async=True),)
        waited = warpgroup_mma_wait(0, deps=b_logits + b_values)
        b_values = waited[WB + 1 : 2 * WB + 2]
        store_wait(0)  # of the last tile
        barrier()
        mbarrier.arrive(q_empty.index(0), count=1)
        mbarrier.arrive(staged_empty.index(0), count=1)
        b_p = ()
        b_sum = b_none
        b_delta = b_none
        for x in gl.static_range(WB + 1):
            b_top = gl.where(first + x * TOKENS >= 0, b_lse, inf)  # blocks before the sequence
            b_x = gl.exp2(waited[x] * (scale * LOG2E) - b_top[:, None])
            if x == 0:
                b_x = gl.where(m_upto, 0.0, b_x)
            if x == WB:
                b_x = gl.where(m_upto, b_x, 0.0)
            b_p = b_p + (b_x,)
            b_sum = b_sum + b_x
            b_delta = b_delta + b_x * b_values[x]
        b_lse = load_lse(p_lse, n, h, t0, turn + 1, T, HQ, NG, PARTS, of_keys)  # long before it is needed
        b_inverse, b_delta = share_sums(s_sums, sums_full, turn, gl.sum(b_sum, 1), gl.sum(b_delta, 1), 1)
        if p_dlse is not None:
            b_delta -= gl.load(p_dlse + row, mask=m_row, other=0.0)
        b_inverse = (b_inverse * (scale * RAISED))[:, None]
        b_da = ()
        for x in gl.static_range(WB + 1):
            b_x = b_p[x] * b_inverse * (b_values[x] - b_delta[:, None])
            b_da = b_da + (gl.convert_layout(b_x.to(bf16), left),)
        b_dq = gl.zeros([ROWS, D], gl.float32, columns)
        for x in gl.static_range(WB + 1):
            b_dq = warpgroup_mma(b_da[x], s_k.index((i + x) % R).reshape([TOKENS, D]), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq,) + b_da)[0]
        if rope is not None:  # and back
            b_cos, b_sin = load_near_angles(rope, t0 + i * TOKENS, T, HEADS, query_angles(ROWS, D // 2))
            b_dq = rotate(b_dq, b_cos, -b_sin)

        # What the slots' logits add: by way of the slots before block i, and of its tokens.
        mbarrier.wait(staged_full.index(0), turn & 1)
        store_async(d_p, [n, t0 + i * TOKENS, h, part * HEADS, 0], s_staged.index(0))
        store_async(d_da, [n, t0 + i * TOKENS, h, part * HEADS, 0], s_staged.index(1))
        s_slot_da = s_staged.index(1 + only).reshape([ROWS, BM])
        s_factors = s_factor.index(i % 2).permute((1, 0))
        b_w = warpgroup_mma(s_slot_da, s_factors, b_none, use_acc=False, is_async=True)  # [ROWS, TOKENS]
        b_dq = warpgroup_mma(s_slot_da, s_slot_k.index(i % 2).reshape([BM, D]), b_dq, is_async=True)
        b_w, b_dq = warpgroup_mma_wait(1, deps=(b_w, b_dq))
        b_w = gl.convert_layout(gl.where(m_upto, b_w, 0.0).to(bf16), left)
        b_dq = warpgroup_mma(b_w, s_leaving.index(i % L).reshape([TOKENS, D]), b_dq, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=(b_dq, b_w))[0]
        store_wait(0)  # and now the gradient takes the place of what was sent
        barrier()
        if part == PARTS - 1:
            mbarrier.arrive(done.index(i % R), count=1)
        b_dq = (b_dq * (1 / RAISED)).to(bf16)
        if D == BM:
            s_staged.index(0).reshape([ROWS, BM]).store(b_dq)
        else:
            b_lower, b_upper = gl.split(b_dq.reshape([ROWS, 2, BM]).permute((0, 2, 1)))
            s_staged.index(0).reshape([ROWS, BM]).store(b_lower)
            s_staged.index(1).reshape([ROWS, BM]).store(b_upper)
        fence_async_shared()
        barrier()
        for x in gl.static_range(D // BM):
            store_async(d_dq, [n, t0 + i * TOKENS, h, part * HEADS, x * BM], s_staged.index(x))
    store_wait(0)


@gluon.jit
def rotate_partition(
    d_turned, rope, s_k, s_q, s_turned, kv_full, keys_full, q_full, turned_full, n, h, t0, tiles, T,
    D: gl.constexpr, WB: gl.constexpr, R: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The keys of every block in their place, and q of every tile to s_turned, and to memory. A tile's q is there only
    when the window's partition is done with that of the last."""
    ROWS: gl.constexpr = TOKENS * HEADS
    layout: gl.constexpr = head_angles(HEADS, D // 2)
    if rope is not None:
        for x in range(tiles + WB):
            rotate_block(rope, s_k, kv_full, keys_full, x, t0, T, D, WB, R)
            i = x - WB
            if i >= 0:
                for part in range(PARTS):
                    b_cos, b_sin = load_head_angles(rope, t0 + i * TOKENS, T, layout)
                    mbarrier.wait(q_full.index(0), (i * PARTS + part) & 1)
                    store_wait(0)  # of the last tile
                    barrier()
                    s_from = s_q.index(0).reshape([ROWS, D])
                    s_to = s_turned.index(0).reshape([ROWS, D])
                    turn_queries(rope, b_cos, b_sin, s_from, s_to, t0 + i * TOKENS, T, ROWS, HEADS, layout)
                    fence_async_shared()
                    barrier()
                    mbarrier.arrive(turned_full.index(0), count=1)
                    store_async(d_turned, [n, t0 + i * TOKENS, h, part * HEADS, 0], s_turned.index(0))
        store_wait(0)


@gluon.jit(do_not_specialize=["T", "N", "tiles", "segments", "chunks"])
def resident_rows_kernel(
    d_q, d_do, d_k, d_v, d_g, d_dq, d_turned, d_p, d_da, d_states, p_before, p_lse, p_dlse, p_sums, p_delta, p_terms,
    rope, T, N, tiles, segments, chunks, scale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr, WB: gl.constexpr, R: gl.constexpr,
    G: gl.constexpr, MASK_EMPTY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One segment of `tiles` tiles and one kv head. d_q, d_do, d_turned, d_dq (BM columns at a time): [N, T, H, NG, D];
    d_p, d_da: [N, T, H, NG, M]; d_k, d_v: [N, T, H, D]; d_g: [N, T, H, M]; d_states [N * chunks, H, M, 2 D]:
    `ResidentStates`; p_before and rope as in `resident`; the other pointers as in `RowGradients`."""
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    h = gl.program_id(0) % H
    segment = gl.program_id(0) // H
    n = segment // segments
    start = segment % segments * tiles
    t0 = start * TOKENS
    tiles = gl.minimum(tiles, (T - t0 + TOKENS - 1) // TOKENS)

    bf16: gl.constexpr = gl.bfloat16
    s_q = gl.allocate_shared_memory(bf16, [1, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_do = gl.allocate_shared_memory(bf16, [1, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_staged = gl.allocate_shared_memory(bf16, [2, 1, TOKENS, 1, HEADS, BM], tile_layout(5))
    s_k = gl.allocate_shared_memory(bf16, [R, 1, TOKENS, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [R, 1, TOKENS, 1, D], tile_layout(4))
    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_g = gl.allocate_shared_memory(d_g.dtype, [G, 1, TOKENS, 1, BM], tile_layout(4, GATE_BITS))
    # Two stages, so that the state is a tile ahead.
    s_slot_k = gl.allocate_shared_memory(bf16, [2, 1, 1, BM, D], tile_layout(4))
    s_slot_v = gl.allocate_shared_memory(bf16, [2, 1, 1, BM, D], tile_layout(4))
    s_factor = gl.allocate_shared_memory(bf16, [2, TOKENS, BM], tile_layout(2))
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    s_decay = gl.allocate_shared_memory(gl.float32, [2, TOKENS, BM], plain)
    s_strength = gl.allocate_shared_memory(gl.float32, [2, TOKENS, BM], plain)
    s_weight = gl.allocate_shared_memory(bf16, [TOKENS, BM], tile_layout(2))
    s_sums = gl.allocate_shared_memory(gl.float32, [8, TOKENS * HEADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = barriers(1, 1)
    q_empty = barriers(1, 2)
    slots_full = barriers(2, 1)
    kv_full = barriers(R, 1)
    g_full = barriers(G, 1)
    done = barriers(R, 2)
    absorbed = barriers(R, 1)
    sums_full = barriers(2, 1)
    staged_full = barriers(1, 1)
    staged_empty = barriers(1, 1)
    ROPE: gl.constexpr = rope is not None
    # Without an embedding, the keys that leave the window are those in it.
    L: gl.constexpr = LEAVING if ROPE else R
    s_leaving = s_k
    leaving_full = kv_full
    keys_full = kv_full
    s_turned = s_q
    turned_full = q_full
    if ROPE:
        s_turned = gl.allocate_shared_memory(bf16, [1, 1, TOKENS, 1, HEADS, D], tile_layout(5))
        turned_full = barriers(1, 1)
        s_leaving = gl.allocate_shared_memory(bf16, [L, 1, TOKENS, 1, D], tile_layout(4))
        leaving_full = barriers(L, 1)
        keys_full = barriers(R, 1)
    WINDOW: gl.constexpr = 144 if ROPE else 152  # registers of a thread
    HELPER: gl.constexpr = 40 if ROPE else 24
    fence_async_shared()
    barrier()
    # Written out, since in a variable the sizes would no longer be constants.
    gl.warp_specialize(
        [
            (state_partition, (
                d_states, p_before, s_leaving, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_decay, s_strength, s_weight,
                kv_full, g_full, leaving_full, slots_full, done, absorbed, h, tiles, segment, n * chunks, start - WB,
                H, M, D, R, G, L,
            )),
            (slots_partition, (
                p_lse, p_dlse, p_sums, p_delta, p_terms, s_q, s_do, s_leaving, s_v, s_slot_k, s_slot_v,
                s_factor, s_decay, s_strength, s_sums, s_staged, q_full, q_empty, kv_full, leaving_full, slots_full,
                done, sums_full, staged_full, staged_empty, n, h, t0, tiles, T, N, H, HQ, scale, M, D, NG, WB, R, L,
                PARTS, MASK_EMPTY,
            )),
            (window_partition, (
                d_dq, d_p, d_da, p_lse, p_dlse, rope, s_turned, s_do, s_k, s_v, s_leaving, s_slot_k, s_factor, s_sums,
                s_staged, q_full, turned_full, q_empty, keys_full, done, sums_full, staged_full, staged_empty, n, h,
                t0, tiles, T, HQ, scale, D, NG, WB, R, L, PARTS,
            )),
            (load_partition, (
                d_q, d_do, d_k, d_v, d_g, s_q, s_do, s_k, s_v, s_g, s_leaving, q_full, q_empty, kv_full, g_full,
                leaving_full, done, absorbed, n, h, t0, tiles, D, WB, R, G, PARTS, ROPE,
            )),
            (rotate_partition, (
                d_turned, rope, s_k, s_q, s_turned, kv_full, keys_full, q_full, turned_full, n, h, t0, tiles, T,
                D, WB, R, PARTS,
            )),
        ],
        [4, 4, 1, 2],
        [REGISTERS, WINDOW, HELPER, HELPER],
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResidentStates:
    """The slots before every 32 tokens, times `scale`: states [B * segments * blocks / 2, H, M, 2 D]. segments: of a
    sequence, `blocks` blocks of 16 tokens each."""

    states: Tensor
    segments: int
    blocks: int
    scale: float

    @classmethod
    def empty(cls, problem: Problem, tiles: int, device: torch.device) -> ResidentStates:
        """Room for them, in segments of so many blocks."""
        segments = -(-max(1, problem.tokens - problem.delay) // (tiles * TOKENS.value))
        slots = (problem.kv_heads, problem.slots, 2 * problem.head_dim)
        states = torch.empty(problem.batch * segments * tiles // 2, *slots, dtype=problem.dtype, device=device)
        return cls(states, segments, tiles, 2.0**-ANCHOR.value)

    def descriptor(self) -> Any:
        """K~ or V~ of one state, as the copy engine takes them."""
        return descriptor(self.states, [1, 1, BM.value, self.states.shape[-1] // 2])


def describe_columns(problem: Problem, x: Tensor) -> Any:
    """x [B, T, HQ, D] as the copy engine takes it, tile by tile and BM columns at a time."""
    x = x.view(problem.batch, problem.tokens, problem.kv_heads, problem.group, problem.head_dim)
    return descriptor(x, [1, TOKENS.value, 1, HEADS.value, BM.value])


def resident_rows_launches(
    problem: Problem, inputs: Inputs, lse: Tensor, grad_o: Tensor, grad_lse: Tensor | None, config: ResidentRowsConfig,
    starts: Starts | None,
) -> tuple[list[Launch], ResidentStates, RowGradients, Tensor]:  # fmt: skip
    """The launches in order, and what they fill, the last of it q as the window meets it: turned, if there is a rotary
    embedding. starts: of the forward pass, whose segments these then are; None: found anew."""
    batch, tokens, heads = problem.batch, problem.tokens, problem.kv_heads
    k, v, g = inputs.k, inputs.v, inputs.g
    if starts is not None:
        config = replace(config, tiles=starts.tiles)
    segments = -(-tokens // config.tokens)
    stored = ResidentStates.empty(problem, config.tiles, k.device)
    rows = empty_rows(problem, -(-problem.group // HEADS.value), k.device, apart=False)
    turned = None if inputs.rope is None else torch.empty_like(inputs.q)
    launches: list[Launch] = []
    if starts is None:
        launches, before = ends_launches(problem, k, v, g, config.tokens, None)
    else:
        before = starts.before

    ring, gates = RINGS[inputs.rope is not None, problem.gate_dtype.itemsize]
    arguments = dict(
        d_q=describe_rows(problem, inputs.q), d_do=describe_rows(problem, grad_o), d_k=describe_tokens(k),
        d_v=describe_tokens(v), d_g=describe_tokens(g), d_dq=describe_columns(problem, rows.q),
        d_turned=None if turned is None else describe_rows(problem, turned),
        d_p=describe_rows(problem, rows.weights), d_da=describe_rows(problem, rows.logits),
        d_states=stored.descriptor(), p_before=before, p_lse=lse, p_dlse=grad_lse, p_sums=rows.lse,
        p_delta=rows.delta, p_terms=rows.terms, rope=inputs.rope, T=tokens, N=batch, tiles=config.tiles,
        segments=segments, chunks=stored.segments * stored.blocks // 2, scale=float(inputs.scale), HQ=problem.q_heads,
        H=heads, D=problem.head_dim, M=problem.slots, WB=problem.window // TOKENS.value, R=ring, G=gates,
        MASK_EMPTY=problem.mask_empty_slots, REGISTERS=config.registers,
    )  # fmt: skip
    options = {"num_warps": 4, **(EARLY if launches else {})}
    launches.append(Launch(resident_rows_kernel, (batch * segments * heads,), arguments, options))
    return launches, stored, rows, inputs.q if turned is None else turned
