"""The backward pass seen from the window's keys, on Hopper: what `backward_window` finds, where the slots' pass has
written its part of the gradients already.

A program takes KEYS tokens of one kv head, half of them each of two partitions; a third loads the tiles of rows, 16
tokens times 4 query heads, that see one of them in their window. Keys are the rows of all products.

Sizes as in `resident`.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients
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
from .primitives import LOG2E, Launch
from .resident import HEADS, TOKENS, describe_rows, describe_tokens
from .rotary import load_angles, query_angles, rotate, rotate_rows

KEYS = gl.constexpr(128)  # of a program
STAGES = gl.constexpr(3)  # tiles of rows under way


@gluon.jit
def load_partition(
    d_q, d_do, d_k, d_v, s_q, s_do, s_k, s_v, keys_full, rows_full, rows_empty, n, h, first, tiles,
    D: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Keys and values of both halves, then tile after tile, which begin with the first key's token."""
    HALF: gl.constexpr = KEYS // 2
    for half in gl.static_range(2):
        mbarrier.expect(keys_full.index(half), 2 * HALF * D * 2)
        load_async(d_k, [n, first + half * HALF, h, 0], keys_full.index(half), s_k.index(half))
        load_async(d_v, [n, first + half * HALF, h, 0], keys_full.index(half), s_v.index(half))
    for turn in range(tiles * PARTS):
        place = turn % STAGES
        t = first + turn // PARTS * TOKENS
        mbarrier.wait(rows_empty.index(place), ((turn // STAGES) & 1) ^ 1)
        mbarrier.expect(rows_full.index(place), 2 * TOKENS * HEADS * D * 2)
        load_async(d_q, [n, t, h, turn % PARTS * HEADS, 0], rows_full.index(place), s_q.index(place))
        load_async(d_do, [n, t, h, turn % PARTS * HEADS, 0], rows_full.index(place), s_do.index(place))


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
def keys_partition(
    d_dk, d_dv, p_dk, p_dv, p_lse, p_delta, rope, s_q, s_do, s_k, s_v, keys_full, rows_full, rows_rotated,
    rows_empty, n, h, first, tiles, T, H, HQ, W, entered, scale, half: gl.constexpr,
    D: gl.constexpr, NG: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The keys of one half. p_dk, p_dv [N, T, H, D]: as d_dk, d_dv; what the slots gave the first `entered` tokens."""
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
    b_dk += gl.load(p_dk + place, mask=m_entered, other=0.0).to(gl.float32)
    b_dv += gl.load(p_dv + place, mask=m_entered, other=0.0).to(gl.float32)
    s_key.store(b_dk.to(bf16))
    s_value.store(b_dv.to(bf16))
    fence_async_shared()
    barrier()
    store_async(d_dk, [n, begin, h, 0], s_k.index(half))
    store_async(d_dv, [n, begin, h, 0], s_v.index(half))
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "W", "entered", "pieces"])
def resident_window_kernel(
    d_q, d_do, d_k, d_v, d_dk, d_dv, p_dk, p_dv, p_lse, p_delta, rope, T, W, entered, pieces, scale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """KEYS tokens of one kv head. d_q, d_do: [N, T, H, NG, D]; d_k, d_v, d_dk, d_dv: [N, T, H, D]; p_lse, p_delta: as
    in `RowGradients`; rope as in `resident`."""
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    h = gl.program_id(0) % H
    piece = gl.program_id(0) // H
    n = piece // pieces
    first = piece % pieces * KEYS
    tiles = (gl.minimum(KEYS + W - 1, T - first) + TOKENS - 1) // TOKENS

    bf16: gl.constexpr = gl.bfloat16
    s_q = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_do = gl.allocate_shared_memory(bf16, [STAGES, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_k = gl.allocate_shared_memory(bf16, [2, 1, KEYS // 2, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [2, 1, KEYS // 2, 1, D], tile_layout(4))
    keys_full = barriers(2, 1)
    rows_full = barriers(STAGES, 1)
    rows_empty = barriers(STAGES, 2)
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
                d_dk, d_dv, p_dk, p_dv, p_lse, p_delta, rope, s_q, s_do, s_k, s_v, keys_rotated, rows_full,
                rows_rotated, rows_empty, n, h, first, tiles, T, H, HQ, W, entered, scale, 0, D, NG, PARTS,
            )),
            (keys_partition, (
                d_dk, d_dv, p_dk, p_dv, p_lse, p_delta, rope, s_q, s_do, s_k, s_v, keys_rotated, rows_full,
                rows_rotated, rows_empty, n, h, first, tiles, T, H, HQ, W, entered, scale, 1, D, NG, PARTS,
            )),
            (load_partition, (
                d_q, d_do, d_k, d_v, s_q, s_do, s_k, s_v, keys_full, rows_full, rows_empty, n, h, first, tiles, D,
                PARTS,
            )),
            (rotate_partition, (
                rope, s_q, s_k, keys_full, rows_full, keys_rotated, rows_rotated, first, tiles, T, D, PARTS,
            )),
        ],
        [4, 1, 2],
        [232 if ROPE else 240, HELPER, HELPER],
    )  # fmt: skip


def resident_window_launch(
    problem: Problem, inputs: Inputs, rows: RowGradients, grad_o: Tensor, dk: Tensor, dv: Tensor
) -> Launch:
    """The launch that adds to dk, dv [B, T, H, D], which hold what the slots gave the tokens that entered them."""
    tokens, heads, half = problem.tokens, problem.kv_heads, KEYS.value // 2
    pieces = -(-tokens // KEYS.value)
    arguments = dict(
        d_q=describe_rows(problem, inputs.q), d_do=describe_rows(problem, grad_o),
        d_k=describe_tokens(inputs.k, half), d_v=describe_tokens(inputs.v, half),
        d_dk=describe_tokens(dk, half), d_dv=describe_tokens(dv, half), p_dk=dk, p_dv=dv, p_lse=rows.lse,
        p_delta=rows.delta, rope=inputs.rope, T=tokens, W=problem.window, entered=tokens - problem.delay, pieces=pieces,
        scale=float(inputs.scale), HQ=problem.q_heads, H=heads, D=problem.head_dim,
    )  # fmt: skip
    return Launch(resident_window_kernel, (problem.batch * pieces * heads,), arguments, {"num_warps": 4})
