"""The forward on Hopper with the slots on the chip: each segment of a sequence walks its tokens once, and no state
between them goes through memory.

A program takes one segment and one kv head. Its warps divide the work; mbarriers in shared memory hand it on:

    load     k and v of 16 tokens at a time, into a ring of R blocks, gates into one of G, and q of a tile, by the copy
             engine
    rotate   with a rotary embedding, the keys of each block in their place; those of the 16 tokens that leave the
             window, which must be as they were, are loaded again, into a ring of LEAVING blocks
    state    holds K~ and V~ in fp32 registers. For every tile it publishes them in bf16, with the tile's decays, and
             then absorbs the 16 tokens that leave the window
    output   two partitions: a tile's logits against slots and window, one softmax, the values, o

A tile is 16 tokens times 4 query heads of a group (PARTS = 2 where there are more): 64 rows, as many as a wgmma takes.
Tile i meets the window's blocks i .. i + WB of the ring. W = 16 WB = delay, so block i is both: its row j lies in the
window of the tile's token t for j > t, and in its slots for j <= t. With S the slots before block i,

    q_t . K~ = 2^(c_t) (q_t . S) + sum_{j <= t} (q_t . k_j) s_j 2^(c_t - c_j)          c: log2 decay since block i began

slot by slot, and the values likewise from the other side. 2^(c_t + A) goes with the rows and 2^(-c_j - A) with tokens
and S: with the steps cut off at 2^-13 (`STRONGEST`) the anchor A keeps each of them within bf16's exponents. It is
lower than that of `primitives`, since S is kept in bf16 with it.

Sizes as in `primitives`, but R: blocks of the ring of keys and values. G: blocks of the ring of gates. L: blocks of
the ring of keys that leave the window. WB: blocks of the window before a tile. PARTS: of a group, HEADS query heads
each. BM: slots of a block, those beyond M masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from .hopper import (
    aligned,
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
from .primitives import EARLY, LOG2E, STRONGEST, Launch, wait_for_previous
from .rotary import load_angles, query_angles, rotate, rotate_rows
from .segment_ends import BM, ends_launches, load_slots, strength

ANCHOR = gl.constexpr(96.0)
TOKENS = gl.constexpr(16)  # of a tile, and of a block of the ring
HEADS = gl.constexpr(4)  # query heads of a tile
PROGRAMS = {64: 1, 128: 1, 256: 2}  # that share the columns of the values, by head size
# exp() of it is 0 in fp32. It stands for all that is lower: sums with -inf would turn into NaN, and large ones, which
# are subtracted here, lose what is small.
ERASED = gl.constexpr(-110.0)
# R and G by whether there is a rotary embedding, and bytes of a gate: what shared memory has room for with heads of
# 128. Of R, at least WB + 2, and G less one, or a wait could miss its turn.
RINGS = {(False, 2): (8, 8), (False, 4): (8, 5), (True, 2): (8, 4), (True, 4): (7, 4)}
# L with a rotary embedding. 2 at the least: an output partition may skip every other of these blocks, but not know of
# the last one by its slots, which were published when the block before was absorbed.
LEAVING = gl.constexpr(3)


@dataclass(frozen=True, slots=True)
class ResidentConfig:
    """How a kernel with the slots on the chip is launched.

    tiles: of 16 tokens, that a program walks: its segment, a multiple of 4. registers: of a thread of an output
    partition; the state's get what is left.
    """

    # By head size, and where there is a rotary embedding. Measured.
    REGISTERS: ClassVar[Mapping[tuple[int, bool], int]] = {
        (64, False): 184, (128, False): 152, (64, True): 176, (128, True): 152,
    }  # fmt: skip

    tiles: int
    registers: int = 152

    def __post_init__(self) -> None:
        if self.tiles < 4 or self.tiles % 4:
            raise ValueError(f"tiles: expected a positive multiple of 4, got {self.tiles}")

    @property
    def tokens(self) -> int:
        """Of a segment."""
        return self.tiles * TOKENS.value

    @classmethod
    def default(cls, problem: Problem, processors: int) -> Self:
        """Segments that leave no processor idle for long, at one program each; no measurement.

        In units of a tile's time: a program's tiles and its start, and where there are several segments, another walk
        over keys and values first.
        """
        tiles = -(-problem.tokens // TOKENS.value)
        programs = problem.batch * problem.kv_heads * PROGRAMS[problem.head_dim]

        def segment(waves: int) -> int:
            segments = max(1, processors * waves // programs)
            return 4 * -(-tiles // (4 * segments))  # ends are made of steps of 4 tiles

        def cost(length: int) -> float:
            segments = -(-tiles // length)
            ends = 0.3 * programs * tiles / processors + 10 if segments > 1 else 0
            return -(-programs * segments // processors) * (length + 6) + ends

        whole = segment(0)
        tiles = min((whole, *(segment(waves) for waves in range(1, 9))), key=cost)
        return cls(tiles, cls.REGISTERS[problem.head_dim, problem.positions == "rope"])


class Starts(NamedTuple):
    """What segments of `tiles` tiles begin with: before [B * segments, H, M, 2 D] fp32; None: one, that has nothing."""

    tiles: int
    before: Tensor | None


def first_reason(problem: Problem, *limits: tuple[bool, str]) -> str | None:
    """Of a kernel's own limits and those of all kernels with the slots on the chip, the first that a problem does not
    keep, as a sentence; or None."""
    machine = (problem.capability is not None and problem.capability[0] == 9, "runs on Hopper only")
    shared = (
        (problem.dtype == torch.bfloat16, "takes bfloat16 only"),
        (problem.slots <= 64, "takes up to 64 slots"),
        (problem.window == problem.delay, "takes W = delay"),
        (problem.positions != "given", "takes no q_window or k_window"),
        (not problem.explicit_strength, "takes no explicit write strength"),
        (problem.slots * problem.gate_dtype.itemsize % 16 == 0, "takes gates of a multiple of 16 bytes a token"),
        (not problem.packed, "takes no packed sequences"),
        (not problem.has_state, "takes no initial state"),
    )
    reasons = (reason for served, reason in (machine, *limits, *shared) if not served)
    return next((f"the kernel with the slots on the chip {reason}" for reason in reasons), None)


def why_not_resident(problem: Problem) -> str | None:
    """The sentence that says why a call is not for this kernel, or None."""
    return first_reason(
        problem,
        (problem.head_dim == problem.value_dim and problem.head_dim in (64, 128), "takes D = Dv = 64 or 128"),
        (problem.window in (16, 32, 48, 64), "takes W of 16, 32, 48 or 64"),
        (2 <= problem.group <= 8, "takes groups of 2 to 8 query heads"),
    )


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def absorb_weights(b_g, b_strength, acc: gl.constexpr):
    """How much of each token is left in the slots at the tile's end [TOKENS, BM], and the tile's factor for what the
    slots held [BM], for rows of `acc`."""
    b_log2 = gl.maximum(b_g, ERASED) * LOG2E
    b_total = gl.sum(b_log2, 0)
    b_later = b_total[None, :] - gl.associative_scan(b_log2, 0, add)
    return b_strength * gl.exp2(b_later), gl.exp2(gl.convert_layout(b_total, gl.SliceLayout(1, acc)))


@gluon.jit
def decays(b_g, acc: gl.constexpr):
    """From a tile's gates [TOKENS, BM]: the factors of tokens s_j 2^(-c_j - A) and of rows 2^(c_j + A), and how the
    slots (times 2^-A) take the tile in: the weights of its tokens, and what they keep [BM]."""
    b_g = b_g.to(gl.float32)
    b_strength = strength(b_g)
    b_cut = gl.associative_scan(gl.maximum(b_g, STRONGEST) * LOG2E, 0, add)  # c
    b_factor = (b_strength * gl.exp2(-b_cut - ANCHOR)).to(gl.bfloat16)
    b_weight, b_keep = absorb_weights(b_g, b_strength, acc)
    return b_factor, gl.exp2(b_cut + ANCHOR), (b_weight * 2.0**-ANCHOR).to(gl.bfloat16), b_keep


@gluon.jit
def load_partition(
    d_q, d_k, d_v, d_g, s_q, s_k, s_v, s_g, s_leaving, q_full, q_empty, kv_full, g_full, leaving_full, done, absorbed,
    n, h, t0, tiles,
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
        if i >= 0:
            for part in gl.static_range(PARTS):
                if PARTS == 1:
                    which = i % 2
                    turn = i // 2
                else:
                    which = part
                    turn = i
                mbarrier.wait(q_empty.index(which), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(which), TOKENS * HEADS * D * 2)
                load_async(d_q, [n, t0 + i * TOKENS, h, part * HEADS, 0], q_full.index(which), s_q.index(which))
            if ROPE:
                if i >= LEAVING:
                    mbarrier.wait(done.index((i - LEAVING) % R), ((i - LEAVING) // R) & 1)
                    mbarrier.wait(absorbed.index((i - LEAVING) % R), ((i - LEAVING) // R) & 1)
                left = i % LEAVING
                mbarrier.expect(leaving_full.index(left), TOKENS * D * 2)
                load_async(d_k, [n, t0 + (i - WB) * TOKENS, h, 0], leaving_full.index(left), s_leaving.index(left))
        # Gates are needed later than keys, when their tokens enter the slots.
        if i + 1 >= 0 and i + 1 < tiles:
            if i + 1 >= G:
                mbarrier.wait(absorbed.index((i + 1 - G) % R), ((i + 1 - G) // R) & 1)
            gate = (i + 1) % G
            mbarrier.expect(g_full.index(gate), TOKENS * BM * GATE_BYTES)
            load_async(d_g, [n, t0 + (i + 1 - WB) * TOKENS, h, 0], g_full.index(gate), s_g.index(gate))


@gluon.jit
def rotate_block(rope, s_k, kv_full, keys_full, x, t0, T, D: gl.constexpr, WB: gl.constexpr, R: gl.constexpr):
    """The keys of block x in their place, as soon as they are there."""
    mbarrier.wait(kv_full.index(x % R), (x // R) & 1)
    rotate_rows(rope, s_k.index(x % R).reshape([TOKENS, D]), t0 + (x - WB) * TOKENS, T, TOKENS, 1, D)
    fence_async_shared()
    barrier()
    mbarrier.arrive(keys_full.index(x % R), count=1)


@gluon.jit
def rotate_partition(
    rope, s_k, kv_full, keys_full, t0, tiles, T, D: gl.constexpr, WB: gl.constexpr, R: gl.constexpr
):  # fmt: skip
    """The keys of every block. Without an embedding there is nothing to do, and the two warps cost nothing: warps come
    by fours."""
    if rope is not None:
        for x in range(tiles + WB):
            rotate_block(rope, s_k, kv_full, keys_full, x, t0, T, D, WB, R)


@gluon.jit
def state_partition(
    d_states, p_before, s_leaving, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_decay, s_strength, s_weight, kv_full,
    g_full, leaving_full, slots_full, done, absorbed, h, tiles, segment, chunk, block, H,
    M: gl.constexpr, D: gl.constexpr, R: gl.constexpr, G: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """K~ and V~ [BM, D], both times 2^-A. p_before [segments, H, M, 2 D] fp32: at the segment's start; None: zero.

    For a backward pass, else None: s_strength is published too, and the slots before every other block b of the
    sequence, which are those of tile b - block, go to row chunk + b // 2 of d_states.
    """
    acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    gates: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [1, 4], [1, 0])  # [TOKENS, BM]
    mbarrier.wait(g_full.index(0), 0)
    b_g = s_g.index(0).reshape([TOKENS, BM]).load(gates)  # [TOKENS, BM]
    b_factor, b_decay, b_weight, b_keep = decays(b_g, acc)
    if p_before is not None:
        wait_for_previous()  # not before: until here nothing depends on it
    row = segment.to(gl.int64) * H + h
    b_k = load_slots(p_before, row, 0, M, D, D, acc) * 2.0**-ANCHOR
    b_v = load_slots(p_before, row, D, M, D, D, acc) * 2.0**-ANCHOR
    for i in range(tiles):
        if i >= 2:  # whoever used this stage last is done with it
            mbarrier.wait(done.index((i - 2) % R), ((i - 2) // R) & 1)
        if d_states is not None:
            store_wait(0)  # and so is the copy engine
            barrier()
        stage = i % 2
        s_factor.index(stage).store(b_factor)
        s_decay.index(stage).store(b_decay)
        if s_strength is not None:
            s_strength.index(stage).store(strength(b_g.to(gl.float32)))
        s_weight.store(b_weight)
        s_slot_k.index(stage).reshape([BM, D]).store(b_k.to(gl.bfloat16))
        s_slot_v.index(stage).reshape([BM, D]).store(b_v.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(slots_full.index(stage), count=1)
        if d_states is not None:
            if (block + i >= 0) & ((block + i) % 2 == 0):  # before the sequence there are none
                store_async(d_states, [chunk + (block + i) // 2, h, 0, 0], s_slot_k.index(stage))
                store_async(d_states, [chunk + (block + i) // 2, h, 0, D], s_slot_v.index(stage))

        b_k = b_k * b_keep[:, None]
        b_v = b_v * b_keep[:, None]
        place = i % R
        following = gl.minimum(i + 1, tiles - 1)
        mbarrier.wait(g_full.index(following % G), (following // G) & 1)
        mbarrier.wait(kv_full.index(place), (i // R) & 1)
        if L < R:
            mbarrier.wait(leaving_full.index(i % L), (i // L) & 1)
        s_left = s_weight.permute((1, 0))  # [BM, TOKENS]
        b_k = warpgroup_mma(s_left, s_leaving.index(i % L).reshape([TOKENS, D]), b_k, is_async=True)
        b_v = warpgroup_mma(s_left, s_v.index(place).reshape([TOKENS, D]), b_v, is_async=True)
        # Meanwhile, the next tile's decays.
        b_g = s_g.index(following % G).reshape([TOKENS, BM]).load(gates)  # [TOKENS, BM]
        b_factor, b_decay, b_weight, b_keep = decays(b_g, acc)
        b_k, b_v = warpgroup_mma_wait(0, deps=[b_k, b_v])
        barrier()  # all warps' products are over before s_weight is written anew
        mbarrier.arrive(absorbed.index(place), count=1)
    if d_states is not None:
        store_wait(0)


@gluon.jit
def row_decay(s_decay, rows: gl.constexpr):
    """A tile's decays [TOKENS, BM] from shared memory, repeated over its heads: [64, BM] in `rows`, wgmma's layout."""
    apart: gl.constexpr = gl.DistributedLinearLayout(  # the same layout, seen as [TOKENS, HEADS, BM]
        reg_bases=[[0, 0, 1], [2, 0, 0], [0, 0, 8], [0, 0, 16], [0, 0, 32]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [1, 0, 0]],
        warp_bases=[[4, 0, 0], [8, 0, 0]],
        block_bases=[],
        shape=[TOKENS, HEADS, BM],
    )
    b_decay = gl.expand_dims(s_decay.load(gl.SliceLayout(1, apart)), 1).broadcast_to([TOKENS, HEADS, BM])
    return gl.convert_layout(b_decay.reshape([TOKENS * HEADS, BM]), rows, assert_trivial=True)


@gluon.jit
def output_partition(
    d_o, p_lse, rope, s_q, s_k, s_v, s_leaving, s_slot_k, s_slot_v, s_factor, s_decay, s_o, q_full, q_empty, keys_full,
    leaving_full, slots_full, done, n, h, t0, tiles, T, HQ, scale, which: gl.constexpr,
    M: gl.constexpr, D: gl.constexpr, NG: gl.constexpr, WB: gl.constexpr, R: gl.constexpr, L: gl.constexpr,
    PARTS: gl.constexpr, MASK_EMPTY: gl.constexpr,
):  # fmt: skip
    """Every other tile, or where a group takes two parts, its own part of every tile."""
    ROWS: gl.constexpr = TOKENS * HEADS
    slots: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    keys: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=slots, k_width=2)
    of_slots: gl.constexpr = gl.SliceLayout(1, slots)
    of_keys: gl.constexpr = gl.SliceLayout(1, keys)
    bf16: gl.constexpr = gl.bfloat16
    inf: gl.constexpr = float("inf")

    tok = gl.arange(0, ROWS, layout=of_keys) // HEADS
    j = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, keys))
    m_upto = j[None, :] <= tok[:, None]  # [ROWS, TOKENS]
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, slots))
    to_log2 = scale * LOG2E
    b_zero = gl.zeros([ROWS, TOKENS], gl.float32, keys)
    part: gl.constexpr = 0 if PARTS == 1 else which
    early: gl.constexpr = which + WB - 1 if PARTS == 1 else WB  # blocks that are not waited for in a turn
    for x in gl.static_range(early):
        mbarrier.wait(keys_full.index(x), 0)
    if PARTS == 1:
        turns = (tiles + 1 - which) // 2
    else:
        turns = tiles

    for turn in range(turns):
        if PARTS == 1:
            i = turn * 2 + which
        else:
            i = turn
        stage = i % 2
        first = t0 + (i - WB) * TOKENS  # token of block i
        mbarrier.wait(q_full.index(which), turn & 1)
        b_q = s_q.index(which).reshape([ROWS, D]).load(left)
        if rope is not None:
            b_cos, b_sin = load_angles(rope, t0 + i * TOKENS, T, HEADS, query_angles(ROWS, D // 2))
            b_window = rotate(b_q, b_cos, b_sin)
            mbarrier.wait(leaving_full.index(i % L), (i // L) & 1)
        if PARTS == 1:
            mbarrier.wait(keys_full.index((i + WB - 1) % R), ((i + WB - 1) // R) & 1)
        mbarrier.wait(keys_full.index((i + WB) % R), ((i + WB) // R) & 1)
        mbarrier.wait(slots_full.index(stage), (i // 2) & 1)

        # A left operand in registers is named where its product is waited for: until then the compiler must not give
        # its registers away.
        s_own = s_leaving.index(i % L).reshape([TOKENS, D]).permute((1, 0))
        s_slots = s_slot_k.index(stage).permute((1, 0))
        b_slot = gl.zeros([ROWS, BM], gl.float32, slots)  # [ROWS, BM]
        b_logit = ()  # [ROWS, TOKENS] each
        if rope is None:  # q . k of block i, q . S, q . k of the other blocks
            b_own = warpgroup_mma(b_q, s_own, b_zero, use_acc=False, is_async=True)  # [ROWS, TOKENS]
            b_slot = warpgroup_mma(b_q, s_slots, b_slot, use_acc=False, is_async=True)
            for x in gl.static_range(1, WB + 1):
                s_key = s_k.index((i + x) % R).reshape([TOKENS, D]).permute((1, 0))
                b_logit = b_logit + (warpgroup_mma(b_q, s_key, b_zero, use_acc=False, is_async=True),)
            waited = warpgroup_mma_wait(WB, deps=(b_own, b_slot) + b_logit)
            b_own = waited[0]
            b_pair = gl.convert_layout(gl.where(m_upto, b_own, 0.0).to(bf16), left)  # [ROWS, TOKENS]
            b_slot = warpgroup_mma(b_pair, s_factor.index(stage), waited[1], is_async=True)
            waited = warpgroup_mma_wait(1, deps=waited[2:] + (b_slot, b_q))
            b_logit = (b_own,) + waited[:WB]
            b_slot, b_q = waited[WB:]
        else:  # for the window block i is another one; the slots come last, since registers hold q only once
            for x in gl.static_range(WB + 1):
                s_key = s_k.index((i + x) % R).reshape([TOKENS, D]).permute((1, 0))
                b_logit = b_logit + (warpgroup_mma(b_window, s_key, b_zero, use_acc=False, is_async=True),)
            b_own = warpgroup_mma(b_q, s_own, b_zero, use_acc=False, is_async=True)
            waited = warpgroup_mma_wait(1, deps=b_logit + (b_own, b_q, b_window))
            b_logit = waited[: WB + 1]
            b_own, b_q = waited[WB + 1 : WB + 3]
            b_slot = warpgroup_mma(b_q, s_slots, b_slot, use_acc=False, is_async=True)
            b_own, b_slot = warpgroup_mma_wait(1, deps=(b_own, b_slot))
            b_pair = gl.convert_layout(gl.where(m_upto, b_own, 0.0).to(bf16), left)
            b_slot = warpgroup_mma(b_pair, s_factor.index(stage), b_slot, is_async=True)
        b_logit = (gl.where(m_upto, -inf, b_logit[0]),) + b_logit[1:WB] + (gl.where(m_upto, b_logit[WB], -inf),)

        # One softmax. A block before the sequence holds zeros. The sum leaves it out; the maximum may take it in, as
        # long as the slots, which are empty then, take part with a logit of 0 themselves.
        if MASK_EMPTY:
            b_there = ()
            for x in gl.static_range(WB):
                b_there = b_there + (gl.where(first + x * TOKENS >= 0, b_logit[x], -inf),)
            b_logit = b_there + (b_logit[WB],)
        b_most = gl.maximum(b_logit[0], b_logit[1])
        for x in gl.static_range(2, WB + 1):
            b_most = gl.maximum(b_most, b_logit[x])
        b_max = gl.convert_layout(gl.max(b_most, 1), of_slots)  # [ROWS]
        b_decay = row_decay(s_decay.index(stage), slots)  # [ROWS, BM]
        b_slot = warpgroup_mma_wait(0, deps=(b_slot, b_pair, b_q))[0] * b_decay
        # Not before a product has taken q in: a barrier does not wait for loads from shared memory that are under way,
        # and the next q would overtake them.
        barrier()
        mbarrier.arrive(q_empty.index(which), count=1)
        if M < BM:
            b_slot = gl.where((m < M)[None, :], b_slot, -inf)
        if MASK_EMPTY:
            b_slot = gl.where(first < 0, -inf, b_slot)
        b_max = gl.maximum(gl.max(b_slot, 1), b_max) * to_log2
        b_slot = gl.exp2(b_slot * to_log2 - b_max[:, None])
        b_sum = gl.sum(b_slot, 1)  # [ROWS]
        b_slot = gl.convert_layout((b_slot * b_decay).to(bf16), left)
        # What the slots weigh of block i's tokens, [ROWS, TOKENS].
        b_new = warpgroup_mma(b_slot, s_factor.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
        b_top = gl.convert_layout(b_max, of_keys)
        b_own = gl.exp2(b_logit[0] * to_log2 - gl.where(first >= 0, b_top, inf)[:, None])
        b_most = b_own
        b_p = ()
        for x in gl.static_range(1, WB + 1):
            b_x = gl.exp2(b_logit[x] * to_log2 - gl.where(first + x * TOKENS >= 0, b_top, inf)[:, None])
            b_most = b_most + b_x
            b_p = b_p + (gl.convert_layout(b_x.to(bf16), left),)
        b_sum += gl.convert_layout(gl.sum(b_most, 1), of_slots)

        # The values. What the slots weigh of block i's tokens goes with what the window does.
        b_o = gl.zeros([ROWS, D], gl.float32, values)  # [ROWS, D]
        b_o = warpgroup_mma(b_slot, s_slot_v.index(stage), b_o, use_acc=False, is_async=True)
        for x in gl.static_range(1, WB + 1):
            b_o = warpgroup_mma(b_p[x - 1], s_v.index((i + x) % R).reshape([TOKENS, D]), b_o, is_async=True)
        waited = warpgroup_mma_wait(WB + 1, deps=(b_new, b_o))
        b_own = gl.convert_layout(gl.where(m_upto, waited[0], b_own).to(bf16), left)
        b_o = warpgroup_mma(b_own, s_v.index(i % R).reshape([TOKENS, D]), waited[1], is_async=True)
        store_wait(0)  # of the last tile: its place is written anew below
        b_o = warpgroup_mma_wait(0, deps=(b_o, b_slot, b_own) + b_p)[0]
        barrier()
        mbarrier.arrive(done.index(i % R), count=1)
        b_o = b_o * gl.convert_layout(1.0 / b_sum, gl.SliceLayout(1, values))[:, None]
        s_o.index(which).reshape([ROWS, D]).store(b_o.to(bf16))
        fence_async_shared()
        barrier()
        store_async(d_o, [n, t0 + i * TOKENS, h, part * HEADS, 0], s_o.index(which))
        if p_lse is not None:
            r = gl.arange(0, ROWS, layout=of_slots)
            t = t0 + i * TOKENS + r // HEADS
            head = part * HEADS + r % HEADS
            p_row = p_lse + (n.to(gl.int64) * T + t) * HQ + h * NG + head
            gl.store(p_row, (b_max + gl.log2(b_sum)) / LOG2E, mask=(t < T) & (head < NG))
    store_wait(0)


@gluon.jit(do_not_specialize=["T", "tiles", "segments"])
def resident_kernel(
    d_q, d_k, d_v, d_g, d_o, p_before, p_lse, rope, T, tiles, segments, scale,
    HQ: gl.constexpr, H: gl.constexpr, D: gl.constexpr, M: gl.constexpr, WB: gl.constexpr, R: gl.constexpr,
    G: gl.constexpr, MASK_EMPTY: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """One segment of `tiles` tiles and one kv head. d_q, d_o: [N, T, H, NG, D]; d_k, d_v: [N, T, H, D];
    d_g: [N, T, H, M]; p_before [N * segments, H, M, 2 D] fp32 or None; p_lse [N, T, HQ] fp32 or None; rope: (cos, sin)
    [P, D/2] or None."""
    NG: gl.constexpr = HQ // H
    PARTS: gl.constexpr = (NG + HEADS - 1) // HEADS
    h = gl.program_id(0) % H
    segment = gl.program_id(0) // H
    n = segment // segments
    t0 = segment % segments * tiles * TOKENS
    tiles = gl.minimum(tiles, (T - t0 + TOKENS - 1) // TOKENS)

    bf16: gl.constexpr = gl.bfloat16
    s_q = gl.allocate_shared_memory(bf16, [2, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_o = gl.allocate_shared_memory(bf16, [2, 1, TOKENS, 1, HEADS, D], tile_layout(5))
    s_k = gl.allocate_shared_memory(bf16, [R, 1, TOKENS, 1, D], tile_layout(4))
    s_v = gl.allocate_shared_memory(bf16, [R, 1, TOKENS, 1, D], tile_layout(4))
    GATE_BITS: gl.constexpr = d_g.dtype.primitive_bitwidth
    s_g = gl.allocate_shared_memory(d_g.dtype, [G, 1, TOKENS, 1, BM], tile_layout(4, GATE_BITS))
    # Two stages, so that the state is a tile ahead.
    s_slot_k = gl.allocate_shared_memory(bf16, [2, BM, D], tile_layout(2))
    s_slot_v = gl.allocate_shared_memory(bf16, [2, BM, D], tile_layout(2))
    s_factor = gl.allocate_shared_memory(bf16, [2, TOKENS, BM], tile_layout(2))
    s_decay = gl.allocate_shared_memory(gl.float32, [2, TOKENS, BM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    s_weight = gl.allocate_shared_memory(bf16, [TOKENS, BM], tile_layout(2))
    q_full = barriers(2, 1)
    q_empty = barriers(2, 1)
    slots_full = barriers(2, 1)
    kv_full = barriers(R, 1)
    g_full = barriers(G, 1)
    done = barriers(R, PARTS)
    absorbed = barriers(R, 1)
    ROPE: gl.constexpr = rope is not None
    # Without an embedding, the keys that leave the window are those in it.
    L: gl.constexpr = LEAVING if ROPE else R
    s_leaving = s_k
    leaving_full = kv_full
    keys_full = kv_full
    if ROPE:
        s_leaving = gl.allocate_shared_memory(bf16, [L, 1, TOKENS, 1, D], tile_layout(4))
        leaving_full = barriers(L, 1)
        keys_full = barriers(R, 1)
    HELPER: gl.constexpr = 40 if ROPE else 24  # registers of a thread that loads or rotates
    fence_async_shared()
    barrier()
    # Written out, since in a variable the sizes would no longer be constants.
    gl.warp_specialize(
        [
            (state_partition, (
                None, p_before, s_leaving, s_v, s_g, s_slot_k, s_slot_v, s_factor, s_decay, None, s_weight, kv_full,
                g_full, leaving_full, slots_full, done, absorbed, h, tiles, segment, None, None, H, M, D, R, G, L,
            )),
            (output_partition, (
                d_o, p_lse, rope, s_q, s_k, s_v, s_leaving, s_slot_k, s_slot_v, s_factor, s_decay, s_o, q_full,
                q_empty, keys_full, leaving_full, slots_full, done, n, h, t0, tiles, T, HQ, scale, 0, M, D, NG, WB, R,
                L, PARTS, MASK_EMPTY,
            )),
            (output_partition, (
                d_o, p_lse, rope, s_q, s_k, s_v, s_leaving, s_slot_k, s_slot_v, s_factor, s_decay, s_o, q_full,
                q_empty, keys_full, leaving_full, slots_full, done, n, h, t0, tiles, T, HQ, scale, 1, M, D, NG, WB, R,
                L, PARTS, MASK_EMPTY,
            )),
            (load_partition, (
                d_q, d_k, d_v, d_g, s_q, s_k, s_v, s_g, s_leaving, q_full, q_empty, kv_full, g_full, leaving_full,
                done, absorbed, n, h, t0, tiles, D, WB, R, G, PARTS, ROPE,
            )),
            (rotate_partition, (rope, s_k, kv_full, keys_full, t0, tiles, T, D, WB, R)),
        ],
        [4, 4, 1, 2],
        [REGISTERS, REGISTERS, HELPER, HELPER],
    )  # fmt: skip


def describe_rows(problem: Problem, x: Tensor) -> Any:
    """x [B, T, HQ, *] as the copy engine takes it, tile by tile."""
    x = aligned(x, problem.batch, problem.tokens, problem.kv_heads, problem.group, x.shape[-1])
    return descriptor(x, [1, TOKENS.value, 1, HEADS.value, max(BM.value, x.shape[-1])])


def describe_tokens(x: Tensor, tokens: int = TOKENS.value) -> Any:
    """x [B, T, H, *], aligned, in blocks of so many tokens of a kv head."""
    return descriptor(x, [1, tokens, 1, max(BM.value, x.shape[-1])])


def resident_launch(
    problem: Problem, config: ResidentConfig, inputs: Inputs, o: Tensor, shared: dict[str, Any]
) -> Launch:  # fmt: skip
    """The launch that fills o; `shared`: the arguments that all of them take alike."""
    ring, gates = RINGS[inputs.rope is not None, problem.gate_dtype.itemsize]
    arguments = dict(
        shared, d_q=describe_rows(problem, inputs.q), d_k=describe_tokens(inputs.k), d_v=describe_tokens(inputs.v),
        d_g=describe_tokens(inputs.g), d_o=describe_rows(problem, o), rope=inputs.rope, tiles=config.tiles,
        HQ=problem.q_heads, WB=problem.window // TOKENS.value, R=ring, G=gates,
    )  # fmt: skip
    programs = problem.batch * shared["segments"] * problem.kv_heads
    return Launch(resident_kernel, (programs,), arguments, {"num_warps": 4})


def resident_launches(
    problem: Problem, inputs: Inputs, config: ResidentConfig, last: Callable[..., Launch] = resident_launch
) -> tuple[list[Launch], Tensor, Tensor | None, Tensor | None, Starts]:
    """The launches in order, and what they fill: o [B, T, HQ, D], if asked for lse [B, T, HQ] and the final slots
    [B, H, M, 2 D], both fp32, and the segments' starts. `last`: which kernel makes o, `resident_launch` or
    `single_launch`."""
    batch, tokens, heads, dim = problem.batch, problem.tokens, problem.kv_heads, problem.head_dim
    device = inputs.q.device
    q, k, v, g = (aligned(x) for x in (inputs.q, inputs.k, inputs.v, inputs.g))
    rope = None if inputs.rope is None else (inputs.rope[0].contiguous(), inputs.rope[1].contiguous())
    inputs = replace(inputs, q=q, k=k, v=v, g=g, rope=rope)

    final = None
    if problem.output_final_state:
        final = torch.zeros(batch, heads, problem.slots, 2 * dim, dtype=torch.float32, device=device)
    launches, before = ends_launches(problem, k, v, g, config.tokens, final)
    o = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = None
    if problem.return_lse:
        lse = torch.empty(batch, tokens, problem.q_heads, dtype=torch.float32, device=device)
    shared = dict(
        p_before=before, p_lse=lse, T=tokens, segments=-(-tokens // config.tokens), scale=float(inputs.scale), H=heads,
        D=dim, M=problem.slots, MASK_EMPTY=problem.mask_empty_slots, REGISTERS=config.registers,
    )  # fmt: skip
    launch = last(problem, config, inputs, o, shared)
    if launches:
        launch = replace(launch, options={**launch.options, **EARLY})
    return [*launches, launch], o, lse, final, Starts(config.tiles, before)
