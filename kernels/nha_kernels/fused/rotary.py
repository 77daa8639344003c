"""Rotary embedding in kernels for Hopper: queries in registers, keys where they lie in shared memory.

A thread has columns c and c + D/2 of the same row, so that nothing moves between threads.
"""

from __future__ import annotations

from typing import Any

from .hopper import gl, gluon


@gluon.constexpr_function
def query_angles(rows: int, half: int) -> Any:
    """Layout of the angles [rows, half] of queries, for four warps: each thread has those of its elements of a left
    operand of wgmma."""
    further = [[0, 16 << x] for x in range((half // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8], *further], lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[rows, half],
    )  # fmt: skip


@gluon.constexpr_function
def columns_apart(angles: Any) -> Any:
    """`query_angles` as [rows, half / 8, 8]: of the middle one, every thread has all."""
    rows, half = angles.shape
    reg, lane, warp = (
        [[row, column // 8, column % 8] for row, column in bases]
        for bases in (angles.reg_bases, angles.lane_bases, angles.warp_bases)
    )
    return gl.DistributedLinearLayout(reg, lane, warp, [], [rows, half // 8, 8])


@gluon.constexpr_function
def key_angles(rows: int, half: int) -> Any:
    """Layout of the angles [rows, half] of 8 keys, for two warps."""
    columns = [[0, 1 << x] for x in range(half.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=columns[:-3], lane_bases=[*columns[-3:], [1, 0], [2, 0]], warp_bases=[[4, 0]], block_bases=[],
        shape=[rows, half],
    )  # fmt: skip


@gluon.constexpr_function
def head_angles(heads: int, half: int) -> Any:
    """Layout of a few tokens' queries with half of their columns [tokens, heads, half], for two warps: each thread has
    two columns, and all heads, which share their angles."""
    columns = [[0, 0, 1 << x] for x in range(half.bit_length() - 1)]
    of_heads = [[0, 1 << x, 0] for x in range(heads.bit_length() - 1)]
    tokens = [[1 << x, 0, 0] for x in range(7 - len(columns))]
    return gl.DistributedLinearLayout(
        reg_bases=[*columns[:1], *of_heads], lane_bases=[*columns[1:], *tokens[:-1]], warp_bases=tokens[-1:],
        block_bases=[], shape=[1 << len(tokens), heads, half],
    )  # fmt: skip


@gluon.constexpr_function
def head_rows(angles: Any) -> Any:
    """Layout, as rows [tokens * heads, 2 half], of what is rotated by `head_angles`."""
    tokens, heads, half = angles.shape
    reg, lane, warp = (
        [[token * heads + head, column] for token, head, column in bases]
        for bases in (angles.reg_bases, angles.lane_bases, angles.warp_bases)
    )
    return gl.DistributedLinearLayout([*reg, [0, half]], lane, warp, [], [tokens * heads, 2 * half])


@gluon.constexpr_function
def both_halves(angles: Any) -> Any:
    """Layout of what is rotated by angles of that layout."""
    rows, half = angles.shape
    return gl.DistributedLinearLayout(
        reg_bases=[*angles.reg_bases, [0, half]], lane_bases=angles.lane_bases, warp_bases=angles.warp_bases,
        block_bases=[], shape=[rows, 2 * half],
    )  # fmt: skip


@gluon.jit
def load_angles(rope, first, T, HEADS: gl.constexpr, layout: gl.constexpr):
    """cos and sin [rows, D/2] of the tokens from `first` on, HEADS rows each; outside of a sequence, of its ends.

    rope: the tables [P, D/2], P >= T.
    """
    ROWS: gl.constexpr = layout.shape[0]
    HALF: gl.constexpr = layout.shape[1]
    t = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)) // HEADS
    row = gl.minimum(gl.maximum(t, 0), T - 1).to(gl.int64) * HALF
    offset = row[:, None] + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))[None, :]
    # Read again and again, and known by this as what no launch before has written.
    return gl.load(rope[0] + offset, eviction_policy="evict_last"), gl.load(
        rope[1] + offset, eviction_policy="evict_last"
    )


@gluon.jit
def load_near_angles(rope, first, T, HEADS: gl.constexpr, layout: gl.constexpr):
    """`load_angles` by `query_angles`, a thread's addresses constants apart: one register for all of a row."""
    ROWS: gl.constexpr = layout.shape[0]
    HALF: gl.constexpr = layout.shape[1]
    apart: gl.constexpr = columns_apart(layout)
    t = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gl.SliceLayout(2, apart))) // HEADS
    row = (gl.minimum(gl.maximum(t, 0), T - 1).to(gl.int64) * HALF)[:, None, None]
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, apart)))[None, None, :]
    # Constants, and the last to be added.
    block = 8 * gl.arange(0, HALF // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, apart)))[None, :, None]
    b_cos = gl.load(rope[0] + row + column + block, eviction_policy="evict_last").reshape([ROWS, HALF])
    b_sin = gl.load(rope[1] + row + column + block, eviction_policy="evict_last").reshape([ROWS, HALF])
    return gl.convert_layout(b_cos, layout, assert_trivial=True), gl.convert_layout(b_sin, layout, assert_trivial=True)


@gluon.jit
def rotate(b_x, b_cos, b_sin):
    """Rows [rows, D] by their angles [rows, D/2]."""
    ROWS: gl.constexpr = b_x.shape[0]
    HALF: gl.constexpr = b_x.shape[1] // 2
    angles: gl.constexpr = b_cos.type.layout
    b_lower, b_upper = gl.split(b_x.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))
    b_lower = gl.convert_layout(b_lower, angles, assert_trivial=True).to(gl.float32)
    b_upper = gl.convert_layout(b_upper, angles, assert_trivial=True).to(gl.float32)
    b_cos, b_sin = b_cos.to(gl.float32), b_sin.to(gl.float32)
    b_y = gl.join((b_lower * b_cos - b_upper * b_sin).to(b_x.dtype), (b_upper * b_cos + b_lower * b_sin).to(b_x.dtype))
    return gl.convert_layout(b_y.permute((0, 2, 1)).reshape([ROWS, 2 * HALF]), b_x.type.layout, assert_trivial=True)


@gluon.jit
def rotate_rows(rope, s_row, first, T, ROWS: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr):
    """The rows [ROWS, D] of the tokens from `first` on, HEADS each, in their place, by two warps."""
    PIECE: gl.constexpr = 8
    layout: gl.constexpr = key_angles(PIECE, D // 2)
    for r in gl.static_range(0, ROWS, PIECE):
        b_cos, b_sin = load_angles(rope, first + r // HEADS, T, HEADS, layout)
        s_piece = s_row.slice(r, PIECE)
        s_piece.store(rotate(s_piece.load(both_halves(layout)), b_cos, b_sin))


@gluon.jit
def load_head_angles(rope, first, T, layout: gl.constexpr):
    """cos and sin [tokens, 1, D/2] of as many tokens, from `first` on, as `head_angles` has; else as `load_angles`."""
    angles: gl.constexpr = gl.SliceLayout(1, layout)
    t = first + gl.arange(0, layout.shape[0], layout=gl.SliceLayout(1, angles))
    row = gl.minimum(gl.maximum(t, 0), T - 1).to(gl.int64) * layout.shape[2]
    offset = row[:, None] + gl.arange(0, layout.shape[2], layout=gl.SliceLayout(0, angles))[None, :]
    b_cos = gl.load(rope[0] + offset, eviction_policy="evict_last").to(gl.float32)
    b_sin = gl.load(rope[1] + offset, eviction_policy="evict_last").to(gl.float32)
    return b_cos[:, None, :], b_sin[:, None, :]


@gluon.jit
def turn_queries(
    rope, b_cos, b_sin, s_from, s_to, first, T, ROWS: gl.constexpr, HEADS: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The rows s_from [ROWS, D] of the tokens from `first` on, HEADS each, to s_to, by two warps. b_cos and b_sin: the
    first ones of `load_head_angles`, of the same layout."""
    TOKENS: gl.constexpr = layout.shape[0]
    HALF: gl.constexpr = layout.shape[2]
    PIECE: gl.constexpr = TOKENS * HEADS
    for r in gl.static_range(0, ROWS, PIECE):
        b_x = s_from.slice(r, PIECE).load(head_rows(layout)).reshape([TOKENS, HEADS, 2, HALF])
        b_lower, b_upper = gl.split(b_x.permute((0, 1, 3, 2)))
        b_lower = gl.convert_layout(b_lower, layout, assert_trivial=True).to(gl.float32)
        b_upper = gl.convert_layout(b_upper, layout, assert_trivial=True).to(gl.float32)
        b_y = gl.join(
            (b_lower * b_cos - b_upper * b_sin).to(b_x.dtype), (b_upper * b_cos + b_lower * b_sin).to(b_x.dtype)
        )
        if r + PIECE < ROWS:  # ahead of the store, which takes its time
            b_cos, b_sin = load_head_angles(rope, first + (r + PIECE) // HEADS, T, layout)
        s_to.slice(r, PIECE).store(b_y.permute((0, 1, 3, 2)).reshape([PIECE, 2 * HALF]))
