"""The backward pass seen from the slots: gradients of what enters them, k, v, gates and strengths.

Let A_e be the gradient of the slots after token e. It comes from the rows that meet them and from the slots after the
next token, A_e = sum over rows (p do^T, or scale da q^T) + decay(e+1) A_{e+1}: the recurrence of the slots, backwards.
So it is done as theirs is: each segment's own contribution, a scan over the segments from the last to the first, and
the segments once more, block of 16 tokens after block, now from the A behind each. Inside a block rows and tokens meet
in pairs, as in the forward pass.

The gradient of a gate is a sum over all that is decayed by it: pairs (earlier token, later row) around it, of which
either may be in the block or beyond it. Both beyond: the slots before the block times A behind it. Token inside, row
beyond: a running sum over earlier tokens. Row inside: a running sum from the last row on, of `terms` less what tokens
give to later rows. In it pairs behind the gate cancel, but every pair that is in it is decayed: where all gates are
strong, so that their gradients are small, these stay as exact as others; that of a strong gate among mild ones is as
exact as its neighbours', not as its own size.

In fp16 the A of a slot that lives long may overflow, where gradients that arrive are in the thousands.

K~ and V~ are two runs of one kernel (a grid axis, as are blocks of columns and of slots); what both add to, a gate's
gradient, is summed behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients
from .pairs import cut, pair_masks, row_factors, split_scale, token_factors
from .primitives import (
    ANCHOR,
    FORGET,
    LOG2E,
    Launch,
    Operands,
    at_least,
    dot,
    find_piece,
    load_tokens,
    load_tokens_transposed,
    store_tokens,
    sum_gates,
    sum_gates_transposed,
    write_strength,
)
from .states import StatesConfig, StoredStates, scan_launch


@dataclass(frozen=True, slots=True)
class SlotsConfig:
    """How the slots' kernel is launched. heads: query heads of one product, HB; slots, columns: of a program, BM and
    BD; powers of two, the latter two >= 16. anchored: decays by the one exponent anchor, else by the tree."""

    heads: int
    slots: int
    columns: int
    warps: int
    stages: int
    anchored: bool


class Shares(NamedTuple):
    """Gradients by way of the slots, fp32, in shares still to be summed; what never enters the slots is left unwritten.

    kv [blocks of slots, tokens, H, E], g and s [blocks of columns, tokens, H, M]; s None where the call gives none.
    """

    kv: Any
    g: Any
    s: Any


@dataclass(frozen=True, slots=True)
class SlotGradients:
    """What the slots' kernel writes: of the B * T tokens of the call, of the N * R places of the state's ring (None
    without one), and of the slots before the call [N, H, M, E]."""

    call: Shares
    recent: Shares
    initial: Tensor | None


@triton.jit
def running_sum(m_rows, b_x, dtype):
    """Sums over masks, as a product: m_rows [X, J] with b_x [J, Y] fp32 -> [X, Y]; in a bf16 call of two terms."""
    if dtype == tl.bfloat16:
        b_mask = m_rows.to(dtype)
        b_high = b_x.to(dtype)
        b_low = (b_x - b_high.to(tl.float32)).to(dtype)
        return dot(b_mask, b_high) + dot(b_mask, b_low)
    else:
        return dot(m_rows.to(tl.float32), b_x)


@triton.jit
def rounding_of(b_g):
    """exp(g) over exp2(g * log2(e)), whose exponent is rounded: at -60 that is 4e-6 of it in fp32, and all of a gate's
    gradient has exp(g) for a factor."""
    HIGH: tl.constexpr = 1.4423828125  # log2(e) to 12 bits, and the rest of it
    LOW: tl.constexpr = 0.00031222838896
    b_high = (b_g.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    b_low = b_g - b_high
    b_lost = (b_high * HIGH - b_g * LOG2E) + b_high * LOW + b_low * HIGH + b_low * LOW
    return 1.0 + b_lost / LOG2E


@triton.jit(do_not_specialize=["T", "R", "delay", "segments", "N", "all_tokens", "ring_tokens"])
def slots_kernel(
    p_q, p_do, p_da, p_p, tokens, recent, layout, p_states, p_ends, p_terms, grads, recent_grads,
    T, R, delay, segments, N, all_tokens, ring_tokens, scale,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    L: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, TERMS: tl.constexpr, LEVELS: tl.constexpr,
    WRITE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One segment of L tokens, one kv head, BD columns of K~ or V~, BM slots, from the last block to the first.

    p_ends [segments, H, M, E] fp32: written with the segment's own contribution to the gradient of the slots before it;
    with WRITE, read: the gradient of the slots after it. p_states [segments * L / 16, H, M, E]: the slots before each
    block. p_terms, TERMS of them, p_da, p_p: as in `RowGradients`.
    """
    E: tl.constexpr = D + DV
    BT: tl.constexpr = 16
    BR: tl.constexpr = BT * HB
    NG: tl.constexpr = HQ // H
    PARTS: tl.constexpr = (NG + HB - 1) // HB
    K_BLOCKS: tl.constexpr = (D + BD - 1) // BD
    BLOCKS: tl.constexpr = K_BLOCKS + (DV + BD - 1) // BD
    segment = tl.program_id(0)
    h = tl.program_id(1) // BLOCKS
    block = tl.program_id(1) % BLOCKS
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    if layout.cu_seqlens is not None:
        if tl.load(layout.sequence + segment) >= N:
            return
    n, index, start, length, seen = find_piece(layout, segment, segments, T)

    is_k = block < K_BLOCKS
    if D == DV:
        size = D
    else:
        size = tl.where(is_k, D, DV)
    column = tl.where(is_k, block, block - K_BLOCKS) * BD + tl.arange(0, BD)
    m_column = column < size
    p_x = tokens.k if is_k else tokens.v
    p_y = p_q if is_k else p_do
    p_weight = p_da if is_k else p_p
    dtype = p_q.dtype.element_ty
    if recent.k is None:
        p_recent = None
        past = 0
        oldest = 0
    else:
        p_recent = recent.k if is_k else recent.v
        past = (delay + BT - 1) // BT * BT
        oldest = -tl.minimum(seen, delay)
    m_slot = m < M
    before, _ = split_scale(tl.where(is_k, scale, 1.0), EXACT)
    if WRITE:
        # This program's share of the sums.
        kv_share = tl.program_id(2).to(tl.int64) * all_tokens * (H * E)
        g_share = block.to(tl.int64) * all_tokens * (H * M)
        p_dkv = grads.kv + kv_share
        p_dg = grads.g + g_share
        p_recent_dkv = recent_grads.kv
        p_recent_dg = recent_grads.g
        p_recent_ds = recent_grads.s
        if recent.k is not None:
            kv_ring_share = tl.program_id(2).to(tl.int64) * ring_tokens * (H * E)
            g_ring_share = block.to(tl.int64) * ring_tokens * (H * M)
            p_recent_dkv += kv_ring_share
            p_recent_dg += g_ring_share
        if tokens.s is not None:
            p_ds = grads.s + g_share
            if recent.k is not None:
                p_recent_ds += g_ring_share

    p_end = p_ends + ((segment.to(tl.int64) * H + h) * M + m)[:, None] * E
    e = column + tl.where(is_k, 0, D)
    m_end = m_slot[:, None] & m_column[None, :]
    if WRITE:
        b_a = tl.load(p_end + e[None, :], mask=m_end, other=0.0)  # [BM, BD]
    else:
        b_a = tl.zeros([BM, BD], tl.float32)
    u = tl.arange(0, BT)
    r = tl.arange(0, BR)
    tok = r // HB

    for step in range(0, L, BT):
        begin = index * L - past + L - BT - step
        position = begin + u
        m_exists = (position >= oldest) & (position < length - delay)
        b_gt = load_tokens_transposed(
            tokens.g, recent.g, start, n, seen, position, m_exists, h, H, R, M, m, m_slot
        )  # [BM, 16]
        b_total = tl.exp2(tl.sum(at_least(b_gt, FORGET).to(tl.float32), 1) * LOG2E)  # [BM]
        if EXACT:  # from a row's last token back to the block's begin
            b_decay = tl.exp2(sum_gates_transposed(at_least(b_gt, FORGET), u[:, None] <= tok[None, :], dtype))
        if WRITE:
            b_g = load_tokens(tokens.g, recent.g, start, n, seen, position, m_exists, h, H, R, M, m, m_slot)  # [16, BM]
            if tokens.s is None:
                b_s = None
            else:
                b_s = load_tokens(tokens.s, recent.s, start, n, seen, position, m_exists, h, H, R, M, m, m_slot)
            b_strength = write_strength(b_g, b_s)  # [16, BM]
            b_cut = cut(b_g, EXACT)
            b_x = load_tokens(
                p_x, p_recent, start, n, seen, position, m_exists, h, H, R, size, column, m_column
            )  # [16, BD]
            # Rows behind the block, by way of A.
            b_later = tl.exp2(sum_gates(u[None, :] > u[:, None], at_least(b_g, FORGET), dtype))  # [16, BM]
            b_dx = dot((b_strength * b_later).to(dtype), b_a.to(dtype))  # [16, BD]
            b_behind = dot(b_x, tl.trans(b_a.to(dtype))) * b_later  # [16, BM]: x . A, decayed
            chunk = segment.to(tl.int64) * (L // BT) + (L - BT - step) // BT
            p_state = p_states + ((chunk * H + h) * M + m)[:, None] * E + e[None, :]
            b_state = tl.load(p_state, mask=m_end, other=0.0).to(tl.float32)
            b_beyond = tl.sum(b_state * b_a, 1) * b_total  # [BM]
            b_inside = tl.zeros([BT, BM], tl.float32)  # x . A of the rows in the block, but for the tokens' own
            b_own = tl.zeros([BT, BM], tl.float32)  # and of those
            b_given = tl.zeros([BT, BM], tl.float32)  # what the former come to for the rows, of the strengths they met
        b_a = b_a * b_total[:, None]
        for part in range(PARTS):
            head = part * HB + r % HB
            t = begin + delay + tok
            m_row = (t >= 0) & (t < length) & (head < NG)
            row = (start + t) * HQ + h * NG + head
            b_y = tl.load(
                p_y + row[:, None] * size + column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0
            )  # [BR, BD]
            b_weight_t = tl.load(
                p_weight + row[None, :] * M + m[:, None], mask=m_row[None, :] & m_slot[:, None], other=0.0
            )  # [BM, BR]
            if EXACT:
                b_a += dot((b_weight_t * b_decay).to(dtype), b_y)
            else:  # anchored weights are decayed to 2^104 times the block's begin
                b_a += dot((b_weight_t * tl.exp2(-ANCHOR)).to(dtype), b_y)
            if WRITE:
                b_weight = tl.load(
                    p_weight + row[:, None] * M + m[None, :], mask=m_row[:, None] & m_slot[None, :], other=0.0
                )  # [BR, BM]
                b_dots = dot(b_x, tl.trans(b_y))  # [16, BR]
                b_dots *= before
                m_self = u[:, None] == tok[None, :]
                b_met = dot(tl.where(m_self, b_dots, 0.0).to(dtype), b_weight)  # [16, BM]
                if EXACT:
                    b_own += b_met
                    b_w = tl.where(m_self, dot(b_strength.to(dtype), tl.trans(b_weight)), 0.0)  # [16, BR]
                    for level in tl.static_range(LEVELS):
                        m_pair = tl.trans(pair_masks(level, tok, u, EXACT))
                        b_token = token_factors(level, b_cut, u, dtype, EXACT)  # [16, BM]
                        b_written = (b_token * b_strength).to(dtype)
                        b_scaled = (b_weight * row_factors(level, b_cut, tok, u, dtype, EXACT)).to(dtype)  # [BR, BM]
                        b_w += tl.where(m_pair, dot(b_written, tl.trans(b_scaled)), 0.0)
                        b_met = dot(tl.where(m_pair, b_dots, 0.0).to(dtype), b_scaled)
                        b_inside += b_met * b_token
                        b_given += b_met * b_written.to(tl.float32)
                else:
                    b_token = token_factors(0, b_cut, u, dtype, EXACT)
                    b_own += b_met * b_token
                    b_written = (b_token * b_strength).to(dtype)
                    b_w = tl.where(u[:, None] <= tok[None, :], dot(b_written, tl.trans(b_weight)), 0.0)
                    b_met = dot(tl.where(u[:, None] < tok[None, :], b_dots, 0.0).to(dtype), b_weight)
                    b_inside += b_met * b_token
                    b_given += b_met * b_written.to(tl.float32)
                b_dx += dot(b_w.to(dtype), b_y)
        if WRITE:
            t_term = begin + delay + u
            m_term = (t_term >= 0) & (t_term < length) & (block == 0)
            b_terms = tl.zeros([BT, BM], tl.float32)
            for share in range(TERMS):
                p_term = p_terms + ((share * all_tokens + start + t_term) * H + h)[:, None] * M + m[None, :]
                b_terms += tl.load(p_term, mask=m_term[:, None] & m_slot[None, :], other=0.0)
            b_rows = running_sum(u[None, :] >= u[:, None], b_terms - b_given / before, dtype)
            b_tokens = running_sum(u[None, :] < u[:, None], b_strength * b_behind, dtype)
            b_excess = tl.exp2((b_g.to(tl.float32) - b_cut.to(tl.float32)) * LOG2E)  # what the cut left out
            b_dg = b_rows * b_excess + b_tokens + b_beyond[None, :]
            b_ds = b_behind + (b_inside + b_own) / before
            if tokens.s is None:
                b_dg -= b_ds * tl.exp2(b_g.to(tl.float32) * LOG2E)
            if EXACT:
                b_dg *= rounding_of(b_cut.to(tl.float32))
            store_tokens(p_dkv, p_recent_dkv, b_dx, start, n, seen, position, m_exists, h, H, R, E, e, m_column)
            store_tokens(p_dg, p_recent_dg, b_dg, start, n, seen, position, m_exists, h, H, R, M, m, m_slot)
            if tokens.s is not None:
                store_tokens(p_ds, p_recent_ds, b_ds, start, n, seen, position, m_exists, h, H, R, M, m, m_slot)
    if not WRITE:
        tl.store(p_end + e[None, :], b_a, mask=m_end)


def slots_launches(
    problem: Problem, inputs: Inputs, operands: Operands, stored: StoredStates, states: StatesConfig,
    rows: RowGradients, grad_o: Tensor, grad_final: Tensor | None, config: SlotsConfig,
) -> tuple[list[Launch], SlotGradients]:  # fmt: skip
    """The launches of the slots' pass, in order, and what they fill; grad_final [N, H, M, E]: of the slots after the
    call (None: zero)."""
    heads, slots, width = problem.kv_heads, problem.slots, problem.head_dim + problem.value_dim
    blocks = -(-problem.head_dim // config.columns) + -(-problem.value_dim // config.columns)
    slot_blocks = -(-slots // config.slots)
    tokens, ring = problem.batch * problem.tokens, problem.sequences * operands.recent_places
    pieces = len(stored.totals)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=grad_o.device)

    def shares(places: int) -> Shares:
        s = None if inputs.s is None else empty(blocks, places, heads, slots)
        return Shares(empty(slot_blocks, places, heads, width), empty(blocks, places, heads, slots), s)

    grads = SlotGradients(
        call=shares(tokens), recent=shares(ring) if operands.recent_places else Shares(None, None, None),
        initial=empty(problem.sequences, heads, slots, width) if problem.has_state else None,
    )  # fmt: skip
    ends = empty(pieces, heads, slots, width)
    segment = dict(
        p_q=inputs.q.contiguous(), p_do=grad_o, p_da=rows.logits, p_p=rows.weights, tokens=operands.tokens,
        recent=operands.recent, layout=stored.layout, p_states=stored.states, p_ends=ends, p_terms=rows.terms,
        grads=grads.call, recent_grads=grads.recent, T=problem.tokens, R=operands.recent_places, delay=operands.delay,
        segments=stored.segments, N=problem.sequences, all_tokens=tokens, ring_tokens=ring, scale=float(inputs.scale),
        HQ=problem.q_heads, H=heads, D=problem.head_dim, DV=problem.value_dim, M=slots, L=states.segment,
        HB=config.heads, BM=config.slots, BD=config.columns, TERMS=len(rows.terms), LEVELS=1 if config.anchored else 4,
        EXACT=not config.anchored,
    )  # fmt: skip
    grid = (pieces, heads * blocks, slot_blocks)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return [
        Launch(slots_kernel, grid, {**segment, "WRITE": False}, options),
        scan_launch(
            problem, stored.layout, ends, stored.totals, grad_final, grads.initial, stored.segments, backward=True
        ),
        Launch(slots_kernel, grid, {**segment, "WRITE": True}, options),
    ], grads
