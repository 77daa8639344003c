"""The slots at the start of each segment, for a kernel that then walks the segments side by side (`resident`,
`resident_single`).

Every segment's own contribution, from zero (`ends_kernel`), and a scan over them (`scan_kernel` of `states`): keys and
values are read once, and a state is written for each segment only. In Gluon, for Hopper.
Sizes as in `primitives`; BM: slots of a block, those beyond M masked.
"""

from __future__ import annotations

import torch
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
    tile_layout,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .primitives import FORGET, LOG2E, Launch, Layout, start_next
from .states import scan_launch

BM = gl.constexpr(64)
STEP = gl.constexpr(64)  # tokens that the slots take in at once
STAGES = {64: 3, 128: 2}  # steps whose keys, values and gates are under way, by columns; more do not help
NO_PIECES = Layout(None, None, None, None)


@gluon.jit
def strength(b_g):
    """1 - exp(g). Where that would cancel, four terms of its series: right to about 1e-5, far beyond the bf16 to come
    (unlike `write_strength` of `primitives`, which is for fp32 too, and dearer).

    What the compiler may fuse is fused, lest it do so in one place and not in another.
    """
    b_series = gl.fma(b_g, 1 / 24, 1 / 6)
    b_series = gl.fma(b_g, gl.fma(b_g, b_series, 0.5), 1.0)
    return gl.where(b_g > -0.02, -b_g * b_series, 1.0 - gl.exp2(b_g * LOG2E))


@gluon.jit
def load_step(d_k, d_v, d_g, s_k, s_v, s_g, full, place, n, h, t, column, pred):
    """Keys, values and gates of STEP tokens from t on, into a place of the ring."""
    COLUMNS: gl.constexpr = s_k.shape[4]
    BYTES: gl.constexpr = 2 * STEP * COLUMNS * 2 + STEP * BM * (d_g.dtype.primitive_bitwidth // 8)
    mbarrier.expect(full.index(place), BYTES, pred=pred)
    load_async(d_g, [n, t, h, 0], full.index(place), s_g.index(place), pred=pred)
    load_async(d_k, [n, t, h, column], full.index(place), s_k.index(place), pred=pred)
    load_async(d_v, [n, t, h, column], full.index(place), s_v.index(place), pred=pred)


@gluon.jit(do_not_specialize=["start", "blocks", "segments", "programs"])
def ends_kernel(
    d_k, d_v, d_g, p_ends, p_totals, start, blocks, segments, programs,
    H: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, M: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """What the `blocks` * STEP tokens of one segment leave in COLUMNS columns of K~ and V~ of one kv head, from zero.

    Segment s of a sequence begins at token start + s * blocks * STEP. d_k, d_v [N, end, H, D], d_g [N, end, H, M]:
    tokens before 0 and from `end` on read as 0, which leaves nothing. p_ends [N * segments, H, M, 2 D] and p_totals
    [N * segments, H, M] fp32, as `scan_kernel` takes them, of the first `programs` segments of each sequence. R: steps
    under way.

    From the last token to the first: so what is left of a token at the segment's end is known as it comes, and neither
    K~ nor V~ ever decays. Slots are the rows of all products, which hand each other the gates in registers.
    """
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    gates: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    totals: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=gates, k_width=2)
    bf16: gl.constexpr = gl.bfloat16
    # At once: no program of the next kernel takes room from this one's, which have all started by then.
    start_next()
    column = gl.program_id(0) % (D // COLUMNS) * COLUMNS
    program = gl.program_id(0) // (D // COLUMNS)
    h = program % H
    n = program // H // programs
    index = program // H % programs
    t_last = start + (index + 1) * blocks * STEP - STEP  # of the last step

    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_k = gl.allocate_shared_memory(bf16, [R, 1, STEP, 1, COLUMNS], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [R, 1, STEP, 1, COLUMNS], tile_layout(4))
    s_g = gl.allocate_shared_memory(d_g.dtype, [R, 1, STEP, 1, BM], tile_layout(4, GATE_BITS))
    s_later = gl.allocate_shared_memory(bf16, [STEP, STEP], tile_layout(2))  # [j, token]: is token j later?
    s_ones = gl.allocate_shared_memory(bf16, [8, STEP], tile_layout(2))
    triangle: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    j = gl.arange(0, STEP, layout=gl.SliceLayout(1, triangle))[:, None]
    s_later.store((j > gl.arange(0, STEP, layout=gl.SliceLayout(0, triangle))[None, :]).to(bf16))
    s_ones.store(gl.full([8, STEP], 1.0, bf16, triangle))
    full = barriers(R, 1)
    fence_async_shared()
    barrier()
    for x in gl.static_range(R):
        load_step(d_k, d_v, d_g, s_k, s_v, s_g, full, x, n, h, t_last - x * STEP, column, x < blocks)

    b_k = gl.zeros([BM, COLUMNS], gl.float32, acc)
    b_v = gl.zeros([BM, COLUMNS], gl.float32, acc)
    b_none = gl.zeros([BM, STEP], gl.float32, gates)
    b_total = gl.zeros([BM, 8], gl.float32, totals)  # gates of the steps so far, the same in all columns
    s_one = s_ones.permute((1, 0))
    for x in range(blocks):
        place = x % R
        mbarrier.wait(full.index(place), (x // R) & 1)
        b_g = s_g.index(place).reshape([STEP, BM]).permute((1, 0)).load(left).to(gl.float32)  # [BM, STEP]
        b_g = gl.maximum(b_g, FORGET)  # a sum with 0 * -inf would be NaN
        b_since = gl.max(b_total, 1) * LOG2E  # [BM]
        b_high = b_g.to(bf16)  # [BM, STEP], as are b_later, b_low and b_left
        b_later = warpgroup_mma(b_high, s_later, b_none, use_acc=False, is_async=True)
        b_total = warpgroup_mma(b_high, s_one, b_total, is_async=True)
        b_later, b_total, b_high = warpgroup_mma_wait(0, deps=(b_later, b_total, b_high))
        if GATE_BITS == 32:
            b_low = (b_g - b_high.to(gl.float32)).to(bf16)  # and the rest of them
            b_later = warpgroup_mma(b_low, s_later, b_later, is_async=True)
            b_total = warpgroup_mma(b_low, s_one, b_total, is_async=True)
            b_later, b_total, b_low = warpgroup_mma_wait(0, deps=(b_later, b_total, b_low))
        b_since = gl.convert_layout(b_since, gl.SliceLayout(1, gates))[:, None]
        b_left = gl.exp2(gl.fma(b_later, LOG2E, b_since)) * strength(gl.convert_layout(b_g, gates))
        b_left = gl.convert_layout(b_left.to(bf16), left)
        b_k = warpgroup_mma(b_left, s_k.index(place).reshape([STEP, COLUMNS]), b_k, is_async=True)
        b_v = warpgroup_mma(b_left, s_v.index(place).reshape([STEP, COLUMNS]), b_v, is_async=True)
        b_k, b_v, b_left = warpgroup_mma_wait(0, deps=(b_k, b_v, b_left))
        barrier()  # all warps are done with this place
        t = t_last - (x + R) * STEP
        load_step(d_k, d_v, d_g, s_k, s_v, s_g, full, place, n, h, t, column, x + R < blocks)

    m = gl.arange(0, BM, layout=gl.SliceLayout(1, acc))
    d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc))
    row = ((n * segments + index).to(gl.int64) * H + h) * M
    p_row = p_ends + (row + m)[:, None] * (2 * D) + column + d[None, :]
    m_row = (m < M)[:, None] & (d < COLUMNS)[None, :]
    gl.store(p_row, b_k, mask=m_row)
    gl.store(p_row + D, b_v, mask=m_row)
    slot = gl.arange(0, BM, layout=gl.SliceLayout(1, totals))
    gl.store(p_totals + row + slot, gl.max(b_total, 1) * LOG2E, mask=(slot < M) & (column == 0))


@gluon.jit
def load_slots(p_before, row, column, M: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr, layout: gl.constexpr):
    """[BM, SIZE] of p_before [*, M, 2 D] fp32 from a column on: K~ or V~ at the segment's start. None: zero."""
    if p_before is None:
        return gl.zeros([BM, SIZE], gl.float32, layout)
    else:
        m = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
        d = gl.arange(0, SIZE, layout=gl.SliceLayout(0, layout))
        p_row = p_before + (row * M + m)[:, None] * (2 * D) + column + d[None, :]
        return gl.load(p_row, mask=(m < M)[:, None] & (d < SIZE)[None, :], other=0.0)


def ends_launches(
    problem: Problem, k: Tensor, v: Tensor, g: Tensor, length: int, final: Tensor | None
) -> tuple[list[Launch], Tensor | None]:
    """The launches in order, and what they fill: the slots before each segment of `length` tokens, a multiple of STEP,
    [B * segments, H, M, 2 D] fp32; None where there is one segment, which begins with none. The launch that follows
    them may be EARLY.

    The segments are those of the rows: a token enters the slots `delay` tokens after its own. final [B, H, M, 2 D]
    fp32, zeros, or None: filled with the slots after the last token that enters.
    """
    batch, tokens, heads, slots, dim = problem.batch, problem.tokens, problem.kv_heads, problem.slots, problem.head_dim
    segments = -(-tokens // length)
    entered = max(0, tokens - problem.delay)
    if segments == 1 and (final is None or entered == 0):
        return [], None
    before = torch.empty(batch * segments, heads, slots, 2 * dim, dtype=torch.float32, device=k.device)
    totals = torch.empty(batch * segments, heads, slots, dtype=torch.float32, device=k.device)
    programs = segments if final is not None else segments - 1  # what follows the last segment is not needed
    columns = min(dim, 128)  # a program's: with large heads there are few segments, and so few programs
    box, gate_box = [1, STEP.value, 1, columns], [1, STEP.value, 1, BM.value]
    arguments = dict(
        d_k=descriptor(k[:, :entered], box), d_v=descriptor(v[:, :entered], box),
        d_g=descriptor(g[:, :entered], gate_box), p_ends=before, p_totals=totals, start=-problem.delay,
        blocks=length // STEP.value, segments=segments, programs=programs, H=heads, D=dim, COLUMNS=columns, M=slots,
        R=STAGES[columns],
    )  # fmt: skip
    return [
        Launch(ends_kernel, (batch * programs * heads * (dim // columns),), arguments, {"num_warps": 4}),
        scan_launch(problem, NO_PIECES, before, totals, None, final, segments, early=True),
    ], before
