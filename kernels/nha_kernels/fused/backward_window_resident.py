"""The backward pass seen from the window's keys, on Hopper: what `backward_window` finds, and what tokens get by way of
the slots from behind their segment, `Behind`. What they get from inside it the slots' pass has written already.

A program takes KEYS tokens of one kv head, and one warp of it loads: S and E of below, tile after tile of rows, 16
tokens times 4 query heads, that see one of the tokens in their window, and last what the slots' pass has written. Two
programs share a multiprocessor, so that one multiplies while the other begins or ends. Keys are the rows of all
products.

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
from .backward_rows_resident import ResidentStates
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
    unknown_place,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .primitives import FORGET, LOG2E, Launch
from .resident import HEADS, TOKENS, describe_rows, describe_tokens
from .resident_single import add_up
from .rotary import load_near_angles, query_angles, rotate
from .segment_ends import BM, strength

KEYS = gl.constexpr(64)  # of a program. A segment is a multiple of it.
STAGES = gl.constexpr(2)  # tiles of rows under way, or what takes the place of one


@gluon.jit
def load_partition(
    d_q, d_do, d_k, d_v, d_given_k, d_given_v, d_ends, d_states, p_lse, p_delta, s_q, s_do, s_k, s_v, s_rows,
    keys_full, rows_full, rows_empty, n, h, first, tiles, entered, T, HQ, segment, state,
    D: gl.constexpr, NG: gl.constexpr, PARTS: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """The tiles begin with the first key's token. s_rows: the log-sum-exps and deltas of each place. With a rotary
    embedding E's part of keys comes once more, at the end."""
    ROWS: gl.constexpr = TOKENS * HEADS
    BYTES: gl.constexpr = 2 * ROWS * D * 2
    inf: gl.constexpr = float("inf")
    mbarrier.expect(keys_full.index(0), BYTES)
    load_async(d_k, [n, first, h, 0], keys_full.index(0), s_k.index(0))
    load_async(d_v, [n, first, h, 0], keys_full.index(0), s_v.index(0))
    turn = first * 0
    if d_ends is not None:
        if first < entered:
            for x in gl.static_range(2):
                s_of_k = s_q.index(x).reshape([1, 1, BM, D])
                s_of_v = s_do.index(x).reshape([1, 1, BM, D])
                mbarrier.expect(rows_full.index(x), BYTES)
                if x == 0:
                    load_async(d_states, [state, h, 0, 0], rows_full.index(x), s_of_k)
                    load_async(d_states, [state, h, 0, D], rows_full.index(x), s_of_v)
                else:
                    load_async(d_ends, [segment, h, 0, 0], rows_full.index(x), s_of_k)
                    load_async(d_ends, [segment, h, 0, D], rows_full.index(x), s_of_v)
                mbarrier.arrive(rows_full.index(x), count=1)
            turn += 2
    r = gl.arange(0, ROWS, layout=gl.BlockedLayout([2], [32], [1], [0]))
    for tile in range(tiles * PARTS):
        place = turn % STAGES
        part = tile % PARTS
        t = first + tile // PARTS * TOKENS
        head = part * HEADS + r % HEADS
        m_row = (t + r // HEADS < T) & (head < NG)
        row = (n.to(gl.int64) * T + t + r // HEADS) * HQ + h * NG + head
        b_lse = gl.load(p_lse + row, mask=m_row, other=inf)
        b_delta = gl.load(p_delta + row, mask=m_row, other=0.0)
        mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(rows_full.index(place), BYTES)
        load_async(d_q, [n, t, h, part * HEADS, 0], rows_full.index(place), s_q.index(place))
        load_async(d_do, [n, t, h, part * HEADS, 0], rows_full.index(place), s_do.index(place))
        s_rows.index(2 * place).store(b_lse)
        s_rows.index(2 * place + 1).store(b_delta)
        barrier()
        mbarrier.arrive(rows_full.index(place), count=1)
        turn += 1
    if d_given_k is not None:
        if first < entered:
            place = turn % STAGES
            mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
            mbarrier.expect(rows_full.index(place), BYTES)
            s_of_k = s_q.index(place).reshape([1, KEYS, 1, D])
            s_of_v = s_do.index(place).reshape([1, KEYS, 1, D])
            load_async(d_given_k, [n, first, h, 0], rows_full.index(place), s_of_k)
            load_async(d_given_v, [n, first, h, 0], rows_full.index(place), s_of_v)
            mbarrier.arrive(rows_full.index(place), count=1)
            turn += 1
    if ROPE:
        if d_ends is not None:
            if first < entered:
                place = turn % STAGES
                mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
                mbarrier.expect(rows_full.index(place), BM * D * 2)
                s_of_k = s_q.index(place).reshape([1, 1, BM, D])
                load_async(d_ends, [segment, h, 0, 0], rows_full.index(place), s_of_k)
                mbarrier.arrive(rows_full.index(place), count=1)


@gluon.jit
def meet_behind(
    p_g, p_dg, p_rest, s_key, s_value, s_state_k, s_state_v, s_end_k, s_end_v, s_sum, mask, m_slot, tiles, unscale,
    square: gl.constexpr,
):  # fmt: skip
    """Adds to the gradients of the tokens' gates in memory, p_dg, what they get by way of E, s_end_k and s_end_v
    [BM, D]. p_g, p_dg and mask [KEYS, BM]; p_rest, m_slot [BM]: the gates behind the program's tokens, in log2. Gives
    s c of every token [KEYS, BM], as a left operand."""
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    TERMS: gl.constexpr = 1 if p_g.dtype.element_ty == gl.bfloat16 else 2
    bf16: gl.constexpr = gl.bfloat16
    b_g = gl.maximum(gl.load(p_g, mask=mask, other=0.0).to(gl.float32), FORGET)  # [KEYS, BM]
    b_rest = gl.load(p_rest, mask=m_slot, other=0.0)  # [BM]
    b_meet = gl.full_like(b_g, 0.0)
    b_meet = warpgroup_mma(s_key, s_end_k.permute((1, 0)), b_meet, use_acc=False, is_async=True)
    b_meet = warpgroup_mma(s_value, s_end_v.permute((1, 0)), b_meet, is_async=True)
    b_begin = gl.full_like(b_g, 0.0)  # [BM, BM], of which the diagonal is S . E
    b_begin = warpgroup_mma(s_state_k, s_end_k.permute((1, 0)), b_begin, use_acc=False, is_async=True)
    b_begin = warpgroup_mma(s_state_v, s_end_v.permute((1, 0)), b_begin, is_async=True)
    b_meet, b_begin = warpgroup_mma_wait(0, deps=(b_meet, b_begin))
    row = gl.arange(0, BM, layout=gl.SliceLayout(1, square))
    column = gl.arange(0, BM, layout=gl.SliceLayout(0, square))
    b_begin = gl.sum(gl.where(row[:, None] == column[None, :], b_begin, 0.0), 0) * unscale
    b_begin = b_begin * gl.exp2(gl.sum(b_g, 0) * LOG2E + b_rest)
    # Plus 0, which the compiler does not know: ptxas 12.8 was seen to leave out the parts of a left operand that are
    # constants.
    i = tiles // 64 + gl.arange(0, KEYS, layout=gl.SliceLayout(1, left))[:, None]
    j = gl.arange(0, KEYS, layout=gl.SliceLayout(0, left))[None, :]
    b_decay = gl.exp2(add_up(b_g, s_sum, (j > i).to(bf16), TERMS) * LOG2E + b_rest[None, :])
    b_strength = strength(b_g)
    b_meet = b_meet * b_decay
    b_left = gl.convert_layout((b_strength * b_decay).to(bf16), left)
    b_given = b_strength * b_meet
    b_kept = b_meet * gl.exp2(b_g * LOG2E)
    barrier()  # for all warps the sum above is over
    b_dg = add_up(b_given, s_sum, (j < i).to(bf16), 2)
    b_dg += b_begin[None, :] - b_kept
    b_dg += gl.load(p_dg, mask=mask, other=0.0).to(gl.float32)
    gl.store(p_dg, b_dg.to(p_dg.dtype.element_ty), mask=mask)
    return b_left


@gluon.jit
def keys_partition(
    d_dk, d_dv, d_given_k, p_g, p_dg, p_rest, rope, s_q, s_do, s_k, s_v, s_rows, s_sum, keys_full, rows_full,
    rows_empty, n, h, first, tiles, entered, T, H, W, rest, scale, unscale,
    D: gl.constexpr, M: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """All but the loads. rest: the row of p_rest behind the program's tokens."""
    ROWS: gl.constexpr = TOKENS * HEADS
    square: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=square, k_width=2)
    bf16: gl.constexpr = gl.bfloat16
    key = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, square))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, square))
    s_key = s_k.index(0).reshape([KEYS, D])
    s_value = s_v.index(0).reshape([KEYS, D])
    b_none = gl.zeros([KEYS, ROWS], gl.float32, square)
    b_dk = gl.zeros([KEYS, D], gl.float32, acc)
    b_dv = gl.zeros([KEYS, D], gl.float32, acc)
    turn = first * 0
    mbarrier.wait(keys_full.index(0), 0)
    if p_rest is not None:
        if first < entered:
            m = gl.arange(0, BM, layout=gl.SliceLayout(0, square))
            place = ((n.to(gl.int64) * T + key) * H + h)[:, None] * M + m[None, :]
            s_end_k = s_q.index(1).reshape([BM, D])
            s_end_v = s_do.index(1).reshape([BM, D])
            mbarrier.wait(rows_full.index(0), 0)
            mbarrier.wait(rows_full.index(1), 0)
            b_left = meet_behind(
                p_g + place, p_dg + place, p_rest + rest * M + m, s_key, s_value, s_q.index(0).reshape([BM, D]),
                s_do.index(0).reshape([BM, D]), s_end_k, s_end_v, s_sum, (key < entered)[:, None] & (m < M)[None, :],
                m < M, tiles, unscale, square,
            )  # fmt: skip
            if rope is None:
                b_dk = warpgroup_mma(b_left, s_end_k, b_dk, is_async=True)
                b_dv = warpgroup_mma(b_left, s_end_v, b_dv, is_async=True)
                b_dk, b_dv, b_left = warpgroup_mma_wait(0, deps=(b_dk, b_dv, b_left))
                barrier()
                mbarrier.arrive(rows_empty.index(0), count=1)
                mbarrier.arrive(rows_empty.index(1), count=1)
            else:
                barrier()  # for all warps the last sum is over
                s_sum.store(b_left)
            turn += 2
    if rope is not None:
        # The keys turn in their place, and their gradient turns back at the end; only then E adds to it. No gradient is
        # there yet: with both in registers there would be none for angles.
        b_cos, b_sin = load_near_angles(rope, first, T, 1, query_angles(KEYS, D // 2))
        s_key.store(rotate(s_key.load(left), b_cos, b_sin))
        fence_async_shared()
        barrier()
        if p_rest is not None:
            if first < entered:
                b_dv = warpgroup_mma(s_sum, s_do.index(1).reshape([BM, D]), b_dv, is_async=True)
                b_dv = warpgroup_mma_wait(0, deps=(b_dv,))
                barrier()
                mbarrier.arrive(rows_empty.index(0), count=1)
                mbarrier.arrive(rows_empty.index(1), count=1)

    for tile in range(tiles * PARTS):
        place = turn % STAGES
        only = unknown_place(0, tile, tiles * PARTS)
        age = (first + tile // PARTS * TOKENS + only - key)[:, None] + (r // HEADS)[None, :]
        m_visible = (age >= 0) & (age < W)
        mbarrier.wait(rows_full.index(place), (turn // STAGES) & 1)
        s_row = s_q.index(place).reshape([ROWS, D])
        s_out = s_do.index(place).reshape([ROWS, D])
        s_key = s_k.index(only).reshape([KEYS, D])
        s_value = s_v.index(only).reshape([KEYS, D])
        b_p = warpgroup_mma(s_key, s_row.permute((1, 0)), b_none, use_acc=False, is_async=True)  # [KEYS, ROWS]
        b_da = warpgroup_mma(s_value, s_out.permute((1, 0)), b_none, use_acc=False, is_async=True)
        b_lse = s_rows.index(2 * place).load(gl.SliceLayout(0, square))[None, :]
        b_delta = s_rows.index(2 * place + 1).load(gl.SliceLayout(0, square))[None, :]
        b_p, b_da = warpgroup_mma_wait(0, deps=(b_p, b_da))
        b_p = gl.where(m_visible, gl.exp2(b_p * (scale * LOG2E) - b_lse), 0.0)
        b_da = gl.convert_layout((b_p * (b_da - b_delta) * scale).to(bf16), left)
        b_p = gl.convert_layout(b_p.to(bf16), left)
        b_dv = warpgroup_mma(b_p, s_out, b_dv, is_async=True)
        b_dk = warpgroup_mma(b_da, s_row, b_dk, is_async=True)
        b_dv, b_dk, b_p, b_da = warpgroup_mma_wait(0, deps=(b_dv, b_dk, b_p, b_da))
        barrier()
        mbarrier.arrive(rows_empty.index(place), count=1)
        turn += 1

    if rope is not None:  # `first`, but not to the compiler, which would keep its addresses all the while
        b_cos, b_sin = load_near_angles(rope, first + gl.minimum(tiles, 0), T, 1, query_angles(KEYS, D // 2))
    # The values first: what they held is free while the keys' gradient turns back.
    if d_given_k is not None:
        if first < entered:
            place = turn % STAGES
            mbarrier.wait(rows_full.index(place), (turn // STAGES) & 1)
            b_dv += s_do.index(place).reshape([KEYS, D]).load(acc).to(gl.float32)
    s_value.store(b_dv.to(bf16))
    if rope is not None:
        b_dk = rotate(b_dk, b_cos, -b_sin)
        if p_rest is not None:
            if first < entered:
                mbarrier.wait(rows_full.index((turn + 1) % STAGES), ((turn + 1) // STAGES) & 1)
                b_dk = warpgroup_mma(s_sum, s_q.index((turn + 1) % STAGES).reshape([BM, D]), b_dk, is_async=True)
                b_dk = warpgroup_mma_wait(0, deps=(b_dk,))
    if d_given_k is not None:
        if first < entered:
            b_dk += s_q.index(turn % STAGES).reshape([KEYS, D]).load(acc).to(gl.float32)
    s_key.store(b_dk.to(bf16))
    fence_async_shared()
    barrier()
    store_async(d_dk, [n, first, h, 0], s_k.index(0))
    store_async(d_dv, [n, first, h, 0], s_v.index(0))
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "W", "entered", "pieces", "segments", "blocks"])
def resident_window_kernel(
    d_q, d_do, d_k, d_v, d_dk, d_dv, d_given_k, d_given_v, d_ends, d_states, p_g, p_dg, p_lse, p_delta, p_rest, rope,
    T, W, entered, pieces, segments, blocks, scale, unscale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """KEYS tokens of one kv head. d_q (turned, if there is a rotary embedding), d_do: [N, T, H, NG, D]; d_k, d_v, d_dk,
    d_dv: [N, T, H, D]; d_given_k, d_given_v: the first `entered` tokens of the last two, or None; p_g, p_dg [N, T, H,
    M]; p_lse, p_delta: as in `RowGradients`; rope as in `resident`. d_ends and p_rest: as `Behind`, d_states: as
    `ResidentStates`, for segments of so many blocks; None where nothing lies behind."""
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    h = gl.program_id(0) % H
    piece = gl.program_id(0) // H
    n = piece // pieces
    first = piece % pieces * KEYS
    tiles = (gl.minimum(KEYS + W - 1, T - first) + TOKENS - 1) // TOKENS
    start = n * segments * blocks  # of the sequence's blocks
    block = start + first // TOKENS
    last_block = start + (entered + TOKENS - 1) // TOKENS - 1
    rest = gl.minimum(block + KEYS // TOKENS - 1, last_block).to(gl.int64) * H + h

    bf16: gl.constexpr = gl.bfloat16
    ROWS: gl.constexpr = TOKENS * HEADS
    gl.static_assert(KEYS == BM and KEYS == ROWS)  # so keys, slots and rows take each other's places, and share layouts
    gl.static_assert(STAGES >= 2)  # of S and E, and in the end of what the slots gave and E
    s_q = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_do = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_k = gl.allocate_shared_memory(bf16, [1, 1, KEYS, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [1, 1, KEYS, 1, D], tile_layout(4))
    s_rows = gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    s_sum = gl.allocate_shared_memory(bf16, [KEYS, BM], tile_layout(2))
    keys_full = barriers(1, 1)
    rows_full = barriers(STAGES, 2)
    rows_empty = barriers(STAGES, 1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (keys_partition, (
                d_dk, d_dv, d_given_k, p_g, p_dg, p_rest, rope, s_q, s_do, s_k, s_v, s_rows, s_sum, keys_full,
                rows_full, rows_empty, n, h, first, tiles, entered, T, H, W, rest, scale, unscale, D, M, PARTS,
            )),
            (load_partition, (
                d_q, d_do, d_k, d_v, d_given_k, d_given_v, d_ends, d_states, p_lse, p_delta, s_q, s_do, s_k, s_v,
                s_rows, keys_full, rows_full, rows_empty, n, h, first, tiles, entered, T, HQ, block // blocks,
                block // 2, D, NG, PARTS, rope is not None,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def resident_window_launch(
    problem: Problem, inputs: Inputs, rows: RowGradients, stored: ResidentStates, behind: Behind | None,
    grad_o: Tensor, dk: Tensor, dv: Tensor, dg: Tensor,
) -> Launch:  # fmt: skip
    """The launch that adds to dk, dv [B, T, H, D] and dg [B, T, H, M], which hold what tokens that entered the slots
    got from inside their segment. inputs.q: turned, if there is a rotary embedding."""
    tokens, heads, keys = problem.tokens, problem.kv_heads, KEYS.value
    entered = tokens - problem.delay
    pieces = -(-tokens // keys)
    given_k, given_v = (describe_tokens(x[:, :entered], keys) if entered > 0 else None for x in (dk, dv))
    arguments = dict(
        d_q=describe_rows(problem, inputs.q), d_do=describe_rows(problem, grad_o),
        d_k=describe_tokens(inputs.k, keys), d_v=describe_tokens(inputs.v, keys), d_dk=describe_tokens(dk, keys),
        d_dv=describe_tokens(dv, keys), d_given_k=given_k, d_given_v=given_v, d_ends=None, d_states=None,
        p_g=inputs.g, p_dg=dg, p_lse=rows.lse, p_delta=rows.delta, p_rest=None, rope=inputs.rope, T=tokens,
        W=problem.window, entered=entered, pieces=pieces, segments=stored.segments, blocks=stored.blocks,
        scale=float(inputs.scale), unscale=1 / stored.scale, HQ=problem.q_heads, H=heads, D=problem.head_dim,
        M=problem.slots,
    )  # fmt: skip
    if behind is not None:
        arguments |= dict(d_ends=behind.descriptor(), d_states=stored.descriptor(), p_rest=behind.rest)
    # So many registers that two programs find room.
    options = {"num_warps": 4, "maxnreg": 128}
    return Launch(resident_window_kernel, (problem.batch * pieces * heads,), arguments, options)
