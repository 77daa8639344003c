"""The slots at the start of each segment, for a kernel that then walks the segments side by side (`resident`,
`resident_large`, `resident_single`).

Every segment's own contribution, from zero (`ends_kernel`), and a scan over them (`scan_kernel` of `states`): keys and
values are read once, and a state is written for each segment only. In Gluon, for Hopper.
Sizes as in `primitives`; BM: slots of a block, those beyond M masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from . import primitives
from .hopper import (
    barrier,
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
from .primitives import LOG2E, Launch, Layout, start_next
from .states import scan_launch

# exp() of it is 0 in fp32. It stands for all that is lower: sums with -inf would turn into NaN, and large ones, which
# are subtracted here, lose what is small.
ERASED = gl.constexpr(-110.0)
BM = gl.constexpr(64)
STEP = gl.constexpr(64)  # tokens that the slots take in at once
STAGES = gl.constexpr(3)  # steps whose keys and values are under way
NO_PIECES = Layout(None, None, None, None)

# The same arithmetic in Gluon's language.
write_strength = gluon.jit(primitives.write_strength.fn)


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def load_gates(p_g, n, h, t, end, T, H, M: gl.constexpr, layout: gl.constexpr):
    """g of STEP tokens from t on, [STEP, BM]; 0, which changes nothing, before the first token and from `end` on."""
    j = t + gl.arange(0, STEP, layout=gl.SliceLayout(1, layout))
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, layout))
    row = (n.to(gl.int64) * T + j) * H + h
    m_gate = ((j >= 0) & (j < end))[:, None] & (m < M)[None, :]
    return gl.load(p_g + row[:, None] * M + m[None, :], mask=m_gate, other=0.0)


@gluon.jit
def absorb_weights(b_g, b_strength, acc: gl.constexpr):
    """How much of each token is left in the slots at the block's end [tokens, BM], the block's decay [BM] in log2, and
    its factor for what the slots held, for rows of `acc`."""
    b_log2 = gl.maximum(b_g, ERASED) * LOG2E
    b_total = gl.sum(b_log2, 0)
    b_later = b_total[None, :] - gl.associative_scan(b_log2, 0, add)
    b_keep = gl.exp2(gl.convert_layout(b_total, gl.SliceLayout(1, acc)))
    return b_strength * gl.exp2(b_later), b_total, b_keep


@gluon.jit(do_not_specialize=["T", "end", "blocks", "segments", "programs", "start"])
def ends_kernel(
    d_k, d_v, p_g, p_ends, p_totals, T, end, start, blocks, segments, programs,
    H: gl.constexpr, D: gl.constexpr, COLUMNS: gl.constexpr, M: gl.constexpr,
):  # fmt: skip
    """What the `blocks` * STEP tokens of one segment leave in COLUMNS columns of K~ and V~ of one kv head, from zero.

    Segment s of a sequence begins at token start + s * blocks * STEP; tokens before 0 and from `end` on do not enter.
    d_k, d_v: [N, end, H, D]; p_ends [N * segments, H, M, 2 D] and p_totals [N * segments, H, M] fp32, as `scan_kernel`
    takes them, of the first `programs` segments of each sequence.
    """
    # Two warpgroups: they share the gates' arithmetic, which takes longer than the products.
    acc: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, COLUMNS // 2, 16]
    )
    gates: gl.constexpr = gl.BlockedLayout([STEP // 4, 1], [4, 8], [1, 8], [1, 0])  # [STEP, BM]
    # At once: no program of the next kernel takes room from this one's, which have all started by then.
    start_next()
    column = gl.program_id(0) % (D // COLUMNS) * COLUMNS
    program = gl.program_id(0) // (D // COLUMNS)
    h = program % H
    n = program // H // programs
    index = program // H % programs
    t0 = start + index * blocks * STEP

    s_k = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, STEP, 1, COLUMNS], tile_layout(4))
    s_v = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, STEP, 1, COLUMNS], tile_layout(4))
    s_weight = gl.allocate_shared_memory(gl.bfloat16, [STEP, BM], tile_layout(2))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(STAGES):
        mbarrier.init(full.index(x), count=1)
    fence_async_shared()
    barrier()
    for x in gl.static_range(STAGES):
        mbarrier.expect(full.index(x), 2 * STEP * COLUMNS * 2, pred=x < blocks)
        load_async(d_k, [n, t0 + x * STEP, h, column], full.index(x), s_k.index(x), pred=x < blocks)
        load_async(d_v, [n, t0 + x * STEP, h, column], full.index(x), s_v.index(x), pred=x < blocks)

    b_k = gl.zeros([BM, COLUMNS], gl.float32, acc)
    b_v = gl.zeros([BM, COLUMNS], gl.float32, acc)
    b_sum = gl.zeros([BM], gl.float32, gl.SliceLayout(0, gates))
    b_next = load_gates(p_g, n, h, t0, end, T, H, M, gates)  # [STEP, BM]
    for x in range(blocks):
        b_g = b_next.to(gl.float32)
        b_next = load_gates(p_g, n, h, t0 + (x + 1) * STEP, end, T, H, M, gates)
        b_weight, b_total, b_keep = absorb_weights(b_g, write_strength(b_g, None), acc)
        b_sum += b_total
        s_weight.store(b_weight.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        b_k = b_k * b_keep[:, None]
        b_v = b_v * b_keep[:, None]
        place = x % STAGES
        mbarrier.wait(full.index(place), (x // STAGES) & 1)
        s_left = s_weight.permute((1, 0))  # [BM, STEP]
        b_k = warpgroup_mma(s_left, s_k.index(place).reshape([STEP, COLUMNS]), b_k, is_async=True)
        b_v = warpgroup_mma(s_left, s_v.index(place).reshape([STEP, COLUMNS]), b_v, is_async=True)
        b_k, b_v = warpgroup_mma_wait(0, deps=[b_k, b_v])
        barrier()  # all warps are done with this place
        ahead = x + STAGES < blocks
        mbarrier.expect(full.index(place), 2 * STEP * COLUMNS * 2, pred=ahead)
        load_async(d_k, [n, t0 + (x + STAGES) * STEP, h, column], full.index(place), s_k.index(place), pred=ahead)
        load_async(d_v, [n, t0 + (x + STAGES) * STEP, h, column], full.index(place), s_v.index(place), pred=ahead)

    m = gl.arange(0, BM, layout=gl.SliceLayout(1, acc))
    d = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, acc))
    row = ((n * segments + index).to(gl.int64) * H + h) * M
    p_row = p_ends + (row + m)[:, None] * (2 * D) + column + d[None, :]
    m_row = (m < M)[:, None] & (d < COLUMNS)[None, :]
    gl.store(p_row, b_k, mask=m_row)
    gl.store(p_row + D, b_v, mask=m_row)
    slot = gl.arange(0, BM, layout=gl.SliceLayout(0, gates))
    gl.store(p_totals + row + slot, b_sum, mask=(slot < M) & (column == 0))


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
    box = [1, STEP.value, 1, columns]
    arguments = dict(
        d_k=descriptor(k[:, :entered], box), d_v=descriptor(v[:, :entered], box), p_g=g, p_ends=before,
        p_totals=totals, T=tokens, end=entered, start=-problem.delay, blocks=length // STEP.value, segments=segments,
        programs=programs, H=heads, D=dim, COLUMNS=columns, M=slots,
    )  # fmt: skip
    return [
        Launch(ends_kernel, (batch * programs * heads * (dim // columns),), arguments, {"num_warps": 8}),
        scan_launch(problem, NO_PIECES, before, totals, None, final, segments, early=True),
    ], before
