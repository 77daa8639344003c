"""The backward pass seen from the window's keys, on Hopper: what `backward_window` finds, and what tokens get by way of
the slots from behind their segment, `Behind`. What they get from inside it the slots' pass has written already.

A program takes KEYS tokens of one kv head, half of them each of two partitions; a third loads the tiles of rows, 16
tokens times 4 query heads, that see one of them in their window. Keys are the rows of all products.

Let E be the gradient of the slots behind the segment, and c what is left of a slot from behind a token up to there:
c E adds to the gradient of the slots behind the token. So its k and v get s c E. A gate gets all that it lets decay:
s c (k . E + v . E) of the segment's tokens before its own, and the same of the slots that the segment begins with. Of
those before the program's first token, slots and tokens, the sum is what was stored there, S . E, decayed.

Sizes as in `resident`.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients
from .backward_rows_resident import SEGMENT, ResidentStates
from .backward_slots_resident import Behind
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
from .primitives import FORGET, LOG2E, Launch
from .resident import HEADS, TOKENS, describe_rows, describe_tokens
from .resident_single import add_up
from .rotary import load_angles, query_angles, rotate, rotate_rows
from .segment_ends import BM, strength

KEYS = gl.constexpr(16 * SEGMENT)  # of a program
STAGES = gl.constexpr(3)  # tiles of rows under way


@gluon.jit
def load_partition(
    d_q, d_do, d_k, d_v, d_g, d_ends, d_states, s_q, s_do, s_k, s_v, s_g, keys_full, rows_full, rows_empty,
    n, h, first, tiles, segment, state, meets,
    D: gl.constexpr, PARTS: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Keys, values and gates of both halves, then tile after tile, which begin with the first key's token; then, where
    there is E, in the place of a tile each E, S, and the keys again if those that are there were rotated."""
    HALF: gl.constexpr = KEYS // 2
    BEHIND: gl.constexpr = d_ends is not None
    GATE_BYTES: gl.constexpr = d_g.dtype.primitive_bitwidth // 8 if BEHIND else 0
    for half in gl.static_range(2):
        mbarrier.expect(keys_full.index(half), HALF * (2 * D * 2 + BM * GATE_BYTES))
        if BEHIND:
            load_async(d_g, [n, first + half * HALF, h, 0], keys_full.index(half), s_g.index(half))
        load_async(d_k, [n, first + half * HALF, h, 0], keys_full.index(half), s_k.index(half))
        load_async(d_v, [n, first + half * HALF, h, 0], keys_full.index(half), s_v.index(half))
    for turn in range(tiles * PARTS):
        place = turn % STAGES
        t = first + turn // PARTS * TOKENS
        mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(rows_full.index(place), 2 * TOKENS * HEADS * D * 2)
        load_async(d_q, [n, t, h, turn % PARTS * HEADS, 0], rows_full.index(place), s_q.index(place))
        load_async(d_do, [n, t, h, turn % PARTS * HEADS, 0], rows_full.index(place), s_do.index(place))
    if BEHIND:
        if meets:
            for extra in gl.static_range(3 if ROPE else 2):
                turn = tiles * PARTS + extra
                place = turn % STAGES
                mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
                mbarrier.expect(rows_full.index(place), 2 * BM * D * 2)
                if extra == 2:
                    s_lower = s_q.index(place).reshape([1, HALF, 1, D])
                    s_upper = s_do.index(place).reshape([1, HALF, 1, D])
                    load_async(d_k, [n, first, h, 0], rows_full.index(place), s_lower)
                    load_async(d_k, [n, first + HALF, h, 0], rows_full.index(place), s_upper)
                else:
                    s_of_k = s_q.index(place).reshape([1, 1, BM, D])
                    s_of_v = s_do.index(place).reshape([1, 1, BM, D])
                    if extra == 0:
                        load_async(d_ends, [segment, h, 0, 0], rows_full.index(place), s_of_k)
                        load_async(d_ends, [segment, h, 0, D], rows_full.index(place), s_of_v)
                    else:
                        load_async(d_states, [state, h, 0, 0], rows_full.index(place), s_of_k)
                        load_async(d_states, [state, h, 0, D], rows_full.index(place), s_of_v)


@gluon.jit
def rotate_partition(
    rope, s_q, s_k, keys_full, rows_full, keys_rotated, rows_rotated, first, tiles, T,
    D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """With a rotary embedding, keys and queries in their places, by two warps."""
    if rope is not None:
        HALF: gl.constexpr = KEYS // 2
        for half in gl.static_range(2):
            mbarrier.wait(keys_full.index(half), 0)
            rotate_rows(rope, s_k.index(half).reshape([HALF, D]), first + half * HALF, T, HALF, 1, D)
            fence_async_shared()
            barrier()
            mbarrier.arrive(keys_rotated.index(half), count=1)
        for turn in range(tiles * PARTS):
            place = turn % STAGES
            mbarrier.wait(rows_full.index(place), (turn // STAGES) & 1)
            s_row = s_q.index(place).reshape([TOKENS * HEADS, D])
            rotate_rows(rope, s_row, first + turn // PARTS * TOKENS, T, TOKENS * HEADS, HEADS, D)
            fence_async_shared()
            barrier()
            mbarrier.arrive(rows_rotated.index(place), count=1)


@gluon.jit
def add_behind(
    b_dk, b_dv, p_dg, p_rest, s_x, s_value, s_gate, s_end_k, s_end_v, s_state_k, s_state_v, s_sum, s_later, s_carry,
    carry_full, token, m_token, rest, unscale, half: gl.constexpr,
    M: gl.constexpr, square: gl.constexpr,
):  # fmt: skip
    """What E, s_end_k and s_end_v [BM, D], adds to the gradients of a half's tokens: to b_dk and b_dv [HALF, D], and in
    memory to that of the gates, p_dg + token * M. s_x, s_value [HALF, D], s_gate [HALF, BM]: the tokens' own. rest: the
    row of p_rest behind the half. By s_carry the second half learns what it has before it."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    of_slots: gl.constexpr = gl.SliceLayout(0, square)
    TERMS: gl.constexpr = 1 if s_gate.dtype == gl.bfloat16 else 2
    bf16: gl.constexpr = gl.bfloat16
    m = gl.arange(0, BM, layout=of_slots)
    b_rest = gl.load(p_rest + rest * M + m, mask=m < M, other=0.0)  # [BM]
    b_g = gl.maximum(s_gate.load(square).to(gl.float32), FORGET)  # [HALF, BM]
    b_decay = gl.exp2(add_up(b_g, s_sum, s_later, TERMS) * LOG2E + b_rest[None, :])
    b_meet = gl.full_like(b_g, 0.0)
    b_meet = warpgroup_mma(s_x, s_end_k.permute((1, 0)), b_meet, use_acc=False, is_async=True)
    b_meet = warpgroup_mma(s_value, s_end_v.permute((1, 0)), b_meet, is_async=True)
    b_meet = warpgroup_mma_wait(0, deps=(b_meet,)) * b_decay
    b_strength = strength(b_g)
    b_left = gl.convert_layout((b_strength * b_decay).to(bf16), left)
    b_dk = warpgroup_mma(b_left, s_end_k, b_dk, is_async=True)
    b_dv = warpgroup_mma(b_left, s_end_v, b_dv, is_async=True)
    b_dk, b_dv, b_left = warpgroup_mma_wait(0, deps=(b_dk, b_dv, b_left))
    barrier()  # for all warps the sum above is over

    b_given = b_strength * b_meet
    b_dg = add_up(b_given, s_sum, s_later.permute((1, 0)), 2)
    if half == 0:
        acc: gl.constexpr = b_dk.type.layout
        b_begin = gl.sum(s_state_k.load(acc).to(gl.float32) * unscale * s_end_k.load(acc).to(gl.float32), 1)
        b_begin += gl.sum(s_state_v.load(acc).to(gl.float32) * unscale * s_end_v.load(acc).to(gl.float32), 1)
        b_begin = gl.convert_layout(b_begin, of_slots) * gl.exp2(gl.sum(b_g, 0) * LOG2E + b_rest)
        s_carry.store(b_begin + gl.sum(b_given, 0))
        barrier()
        mbarrier.arrive(carry_full.index(0), count=1)
    else:
        mbarrier.wait(carry_full.index(0), 0)
        b_begin = s_carry.load(of_slots)
    b_dg += b_begin[None, :] - b_meet * gl.exp2(b_g * LOG2E)
    p_token = p_dg + token[:, None] * M + m[None, :]
    mask = m_token[:, None] & (m < M)[None, :]
    b_dg += gl.load(p_token, mask=mask, other=0.0).to(gl.float32)
    gl.store(p_token, b_dg.to(p_dg.dtype.element_ty), mask=mask)
    return b_dk, b_dv


@gluon.jit
def keys_partition(
    d_dk, d_dv, p_dk, p_dv, p_dg, p_lse, p_delta, p_rest, rope, s_q, s_do, s_k, s_v, s_g, s_sum, s_later, s_carry,
    keys_full, rows_full, rows_rotated, rows_empty, carry_full, n, h, first, tiles, T, H, HQ, W, entered, block,
    last_block, meets, scale, unscale, half: gl.constexpr,
    D: gl.constexpr, M: gl.constexpr, NG: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The keys of one half. p_dk, p_dv [N, T, H, D]: as d_dk, d_dv; what the slots gave the first `entered` tokens. The
    rows of p_rest: block, of the program's first one, up to last_block."""
    HALF: gl.constexpr = KEYS // 2
    ROWS: gl.constexpr = TOKENS * HEADS
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    bf16: gl.constexpr = gl.bfloat16
    inf: gl.constexpr = float("inf")
    begin = first + half * HALF
    key = begin + gl.arange(0, HALF, layout=gl.SliceLayout(1, square))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, square))
    s_key = s_k.index(half).reshape([HALF, D])
    s_value = s_v.index(half).reshape([HALF, D])
    b_none = gl.zeros([HALF, ROWS], gl.float32, square)
    b_dk = gl.zeros([HALF, D], gl.float32, acc)
    b_dv = gl.zeros([HALF, D], gl.float32, acc)
    mbarrier.wait(keys_full.index(half), 0)
    for turn in range(tiles * PARTS):
        place = turn % STAGES
        tile = first + turn // PARTS * TOKENS
        t = tile + r // HEADS
        head = turn % PARTS * HEADS + r % HEADS
        m_row = (t < T) & (head < NG)
        row = (n.to(gl.int64) * T + t) * HQ + h * NG + head
        b_lse = gl.load(p_lse + row, mask=m_row, other=inf)[None, :]
        b_delta = gl.load(p_delta + row, mask=m_row, other=0.0)[None, :]
        mbarrier.wait(rows_full.index(place), (turn // STAGES) & 1)
        if rope is not None:
            mbarrier.wait(rows_rotated.index(place), (turn // STAGES) & 1)
        if (tile + TOKENS > begin) & (tile < begin + HALF + W - 1):  # the other half's otherwise
            s_row = s_q.index(place).reshape([ROWS, D])
            s_out = s_do.index(place).reshape([ROWS, D])
            b_p = warpgroup_mma(s_key, s_row.permute((1, 0)), b_none, use_acc=False, is_async=True)  # [HALF, ROWS]
            b_da = warpgroup_mma(s_value, s_out.permute((1, 0)), b_none, use_acc=False, is_async=True)
            b_p, b_da = warpgroup_mma_wait(0, deps=(b_p, b_da))
            m_visible = (key[:, None] <= t[None, :]) & (key[:, None] > t[None, :] - W)
            b_p = gl.where(m_visible, gl.exp2(b_p * (scale * LOG2E) - b_lse), 0.0)
            b_da = gl.convert_layout((b_p * (b_da - b_delta) * scale).to(bf16), left)
            b_p = gl.convert_layout(b_p.to(bf16), left)
            b_dv = warpgroup_mma(b_p, s_out, b_dv, is_async=True)
            b_dk = warpgroup_mma(b_da, s_row, b_dk, is_async=True)
            b_dv, b_dk, b_p, b_da = warpgroup_mma_wait(0, deps=(b_dv, b_dk, b_p, b_da))
        barrier()
        mbarrier.arrive(rows_empty.index(place), count=1)

    x = begin + gl.arange(0, HALF, layout=gl.SliceLayout(1, acc))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, acc))
    place = ((n.to(gl.int64) * T + x) * H + h)[:, None] * D + d[None, :]
    m_entered = (x < entered)[:, None] & (d < D)[None, :]
    if rope is not None:  # back
        b_cos, b_sin = load_angles(rope, begin, T, 1, query_angles(HALF, D // 2))
        b_dk = rotate(b_dk, b_cos, -b_sin)
    if p_rest is not None:
        if meets:
            end = tiles * PARTS  # E's turn
            for turn in range(end, end + (2 if rope is None else 3)):
                mbarrier.wait(rows_full.index(turn % STAGES), (turn // STAGES) & 1)
            s_end_k = s_q.index(end % STAGES).reshape([BM, D])
            s_end_v = s_do.index(end % STAGES).reshape([BM, D])
            s_state_k = s_q.index((end + 1) % STAGES).reshape([BM, D])
            s_state_v = s_do.index((end + 1) % STAGES).reshape([BM, D])
            s_x = s_key
            if rope is not None:
                if half == 0:
                    s_x = s_q.index((end + 2) % STAGES).reshape([HALF, D])
                else:
                    s_x = s_do.index((end + 2) % STAGES).reshape([HALF, D])
            b_dk, b_dv = add_behind(
                b_dk, b_dv, p_dg, p_rest, s_x, s_value, s_g.index(half).reshape([HALF, BM]), s_end_k, s_end_v,
                s_state_k, s_state_v, s_sum.index(half), s_later, s_carry, carry_full,
                (n.to(gl.int64) * T + key) * H + h, key < entered,
                gl.minimum(block + 4 * half + 3, last_block).to(gl.int64) * H + h, unscale, half, M, square,
            )  # fmt: skip
            barrier()  # all warps are done with keys and values, whose places are written below
    b_dk += gl.load(p_dk + place, mask=m_entered, other=0.0).to(gl.float32)
    b_dv += gl.load(p_dv + place, mask=m_entered, other=0.0).to(gl.float32)
    s_key.store(b_dk.to(bf16))
    s_value.store(b_dv.to(bf16))
    fence_async_shared()
    barrier()
    store_async(d_dk, [n, begin, h, 0], s_k.index(half))
    store_async(d_dv, [n, begin, h, 0], s_v.index(half))
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "W", "entered", "pieces", "segments", "blocks"])
def resident_window_kernel(
    d_q, d_do, d_k, d_v, d_g, d_dk, d_dv, d_ends, d_states, p_dk, p_dv, p_dg, p_lse, p_delta, p_rest, rope,
    T, W, entered, pieces, segments, blocks, scale, unscale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """KEYS tokens of one kv head. d_q, d_do: [N, T, H, NG, D]; d_k, d_v, d_dk, d_dv: [N, T, H, D]; d_g [N, entered, H,
    M]; p_dg [N, T, H, M]; p_lse, p_delta: as in `RowGradients`; rope as in `resident`. d_ends and p_rest: as `Behind`,
    d_states: as `ResidentStates`, for segments of so many blocks; with d_g None where nothing lies behind."""
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    h = gl.program_id(0) % H
    piece = gl.program_id(0) // H
    n = piece // pieces
    first = piece % pieces * KEYS
    tiles = (gl.minimum(KEYS + W - 1, T - first) + TOKENS - 1) // TOKENS
    meets = first < entered
    start = n * segments * blocks  # of the sequence's blocks
    block = start + first // TOKENS
    last_block = start + (entered + TOKENS - 1) // TOKENS - 1

    bf16: gl.constexpr = gl.bfloat16
    HALF: gl.constexpr = KEYS // 2
    # So a half's keys, a tile's rows and the slots share layouts, and what comes after the tiles their places.
    gl.static_assert(HALF == BM and HALF == TOKENS * HEADS)
    s_q = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_do = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_k = gl.allocate_shared_memory(bf16, [2, 1, HALF, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [2, 1, HALF, 1, D], tile_layout(4))
    keys_full = barriers(2, 1)
    rows_full = barriers(STAGES, 1)
    rows_empty = barriers(STAGES, 2)
    # Without E these are not used; they stand for what is not there.
    s_g = s_k
    s_sum = s_k
    s_later = s_k
    s_carry = s_k
    carry_full = keys_full
    if d_ends is not None:
        GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
        s_g = gl.allocate_shared_memory(d_g.dtype, [2, 1, HALF, 1, BM], tile_layout(4, GATE_BITS))
        s_sum = gl.allocate_shared_memory(bf16, [2, HALF, BM], tile_layout(2))
        s_later = gl.allocate_shared_memory(bf16, [HALF, HALF], tile_layout(2))  # [token, j]: is token j later?
        s_carry = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        carry_full = barriers(1, 1)
        triangle: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        j = gl.arange(0, HALF, layout=gl.SliceLayout(0, triangle))[None, :]
        s_later.store((j > gl.arange(0, HALF, layout=gl.SliceLayout(1, triangle))[:, None]).to(bf16))
    keys_rotated = keys_full
    rows_rotated = rows_full
    ROPE: gl.constexpr = rope is not None
    if ROPE:
        keys_rotated = barriers(2, 1)
        rows_rotated = barriers(STAGES, 1)
    HELPER: gl.constexpr = 40 if ROPE else 24
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (keys_partition, (
                d_dk, d_dv, p_dk, p_dv, p_dg, p_lse, p_delta, p_rest, rope, s_q, s_do, s_k, s_v, s_g, s_sum, s_later,
                s_carry, keys_rotated, rows_full, rows_rotated, rows_empty, carry_full, n, h, first, tiles, T, H, HQ,
                W, entered, block, last_block, meets, scale, unscale, 0, D, M, NG, PARTS,
            )),
            (keys_partition, (
                d_dk, d_dv, p_dk, p_dv, p_dg, p_lse, p_delta, p_rest, rope, s_q, s_do, s_k, s_v, s_g, s_sum, s_later,
                s_carry, keys_rotated, rows_full, rows_rotated, rows_empty, carry_full, n, h, first, tiles, T, H, HQ,
                W, entered, block, last_block, meets, scale, unscale, 1, D, M, NG, PARTS,
            )),
            (load_partition, (
                d_q, d_do, d_k, d_v, d_g, d_ends, d_states, s_q, s_do, s_k, s_v, s_g, keys_full, rows_full, rows_empty,
                n, h, first, tiles, block // blocks, block // 2, meets, D, PARTS, ROPE,
            )),
            (rotate_partition, (
                rope, s_q, s_k, keys_full, rows_full, keys_rotated, rows_rotated, first, tiles, T, D, PARTS,
            )),
        ],
        [4, 1, 2],
        [232 if ROPE else 240, HELPER, HELPER],
    )  # fmt: skip


def resident_window_launch(
    problem: Problem, inputs: Inputs, rows: RowGradients, stored: ResidentStates, behind: Behind | None,
    grad_o: Tensor, dk: Tensor, dv: Tensor, dg: Tensor,
) -> Launch:  # fmt: skip
    """The launch that adds to dk, dv [B, T, H, D] and dg [B, T, H, M], which hold what tokens that entered the slots
    got from inside their segment."""
    tokens, heads, half = problem.tokens, problem.kv_heads, KEYS.value // 2
    entered = tokens - problem.delay
    pieces = -(-tokens // KEYS.value)
    arguments = dict(
        d_q=describe_rows(problem, inputs.q), d_do=describe_rows(problem, grad_o),
        d_k=describe_tokens(inputs.k, half), d_v=describe_tokens(inputs.v, half), d_g=None,
        d_dk=describe_tokens(dk, half), d_dv=describe_tokens(dv, half), d_ends=None, d_states=None, p_dk=dk, p_dv=dv,
        p_dg=dg, p_lse=rows.lse, p_delta=rows.delta, p_rest=None, rope=inputs.rope, T=tokens, W=problem.window,
        entered=entered, pieces=pieces, segments=stored.segments, blocks=stored.blocks, scale=float(inputs.scale),
        unscale=1 / stored.scale, HQ=problem.q_heads, H=heads, D=problem.head_dim, M=problem.slots,
    )  # fmt: skip
    if behind is not None:
        arguments |= dict(
            d_g=describe_tokens(inputs.g[:, :entered], half), d_ends=behind.descriptor(),
            d_states=stored.descriptor(), p_rest=behind.rest,
        )  # fmt: skip
    return Launch(resident_window_kernel, (problem.batch * pieces * heads,), arguments, {"num_warps": 4})
