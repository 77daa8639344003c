"""The backward pass seen from the rows: gradients of the queries, and of every logit with a slot.

A tile is a block of 16 slot tokens and the rows that met it last, e = t - delay in the block, for HB query heads of one
kv head. With the log-sum-exp of the forward pass a weight is p = exp(logit - lse), and the gradient of its logit
p * (do . value - delta) with delta = sum(p * (do . value)), for slots and window alike.

What the slots' own gradients need is written down: p and its logit's gradient for every row and slot, and `terms`: by
how much a row's outcome would change with the decays behind it, gradient times value of all that is decayed. What a
row takes from its own token is not decayed, and left out: where gates are strong all else is far smaller, and would
drown in its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Inputs, Problem
from .output import load_queries
from .pairs import cut, pair_masks, row_factors, split_scale, token_factors
from .primitives import (
    LOG2E,
    Launch,
    Operands,
    dot,
    find_piece,
    load_tokens,
    sum_gates,
    write_strength,
)
from .states import StoredStates

BLOCK = 16  # tokens that one anchor spans


@dataclass(frozen=True, slots=True)
class RowsConfig:
    """How the rows' kernel is launched. heads: query heads of a tile, HB; keys: of a block of the window, BN; slots: of
    a block, BM; powers of two, the latter two >= 16. anchored: decays by the one exponent anchor, else by the tree."""

    heads: int
    keys: int
    slots: int
    warps: int
    stages: int
    anchored: bool

    def __post_init__(self) -> None:
        # Tiles of 64 rows read shared memory out of bounds on Hopper where ptxas 12.8 compiles them.
        if self.heads not in (1, 2):
            raise ValueError(f"heads: expected 1 or 2; got {self.heads}")


@dataclass(frozen=True, slots=True)
class RowGradients:
    """What the rows' kernel writes.

    q, q_window [B, T, HQ, D], the latter None where q serves the window too. weights, logits [B, T, HQ, M]: p and
    scale * its logit's gradient, anchored ones times `row_factors`. delta, lse [B, T, HQ] fp32, the latter in log2, as
    the weights here add up to it. terms [parts, B * T, H, M] fp32, one for each share of a kv head's query heads.
    """

    q: Tensor
    q_window: Tensor | None
    weights: Any
    logits: Any
    delta: Tensor
    lse: Tensor
    terms: Any


@triton.jit
def meet_slots(
    begin, b_q, b_do, b_dots, b_values, b_lse, m_meets, tokens, recent, p_slot, m_state, start, n, seen, position,
    m_token, tok, u, scale, h, H, R, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, LEVELS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Rows and the slots from `begin` on, BM of them.

    Gives the weights p, the logits and do . V~, both apart from what comes of a row's own token, and that part of the
    latter, [BR, BM] each; gates as `cut` gives them and strengths [16, BM], and the stored K~ [BM, BD].
    """
    dtype = b_q.dtype
    before, after = split_scale(scale, EXACT)
    m = begin + tl.arange(0, BM)
    m_slot = m < M
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    b_g = load_tokens(tokens.g, recent.g, start, n, seen, position, m_token, h, H, R, M, m, m_slot)  # [16, BM]
    if tokens.s is None:
        b_s = None
    else:
        b_s = load_tokens(tokens.s, recent.s, start, n, seen, position, m_token, h, H, R, M, m, m_slot)
    b_strength = write_strength(b_g, b_s)
    b_g = cut(b_g, EXACT)
    b_decay = tl.exp2(sum_gates(u[None, :] <= tok[:, None], b_g, dtype))  # [BR, BM]
    p_slot += m[:, None] * (D + DV)
    m_exists = (m_slot & m_state)[:, None]
    b_k0 = tl.load(p_slot + d[None, :], mask=m_exists & (d < D)[None, :], other=0.0)  # [BM, BD]
    b_v0 = tl.load(p_slot + D + dv[None, :], mask=m_exists & (dv < DV)[None, :], other=0.0)  # [BM, BDV]
    b_logit = dot(b_q, tl.trans(b_k0)) * scale * b_decay
    b_value = dot(b_do, tl.trans(b_v0)) * b_decay
    for level in tl.static_range(LEVELS):
        m_pair = pair_masks(level, tok, u, EXACT)
        b_row = row_factors(level, b_g, tok, u, dtype, EXACT)
        b_token = (token_factors(level, b_g, u, dtype, EXACT) * b_strength).to(dtype)
        b_logit += dot(tl.where(m_pair, b_dots * before, 0.0).to(dtype), b_token) * (b_row * after)
        b_value += dot(tl.where(m_pair, b_values, 0.0).to(dtype), b_token) * b_row
    m_self = u[None, :] == tok[:, None]
    b_own = dot(tl.where(m_self, b_dots * before, 0.0).to(dtype), b_strength.to(dtype)) * after
    b_own_value = dot(tl.where(m_self, b_values, 0.0).to(dtype), b_strength.to(dtype))
    m_seen = m_slot[None, :] & m_meets[:, None]
    b_p = tl.where(m_seen, tl.exp2((b_logit + b_own) * LOG2E - b_lse[:, None]), 0.0)
    return b_p, b_logit, b_value, b_own_value, b_g, b_strength, b_k0


@triton.jit
def leave_slots(
    begin, b_p, b_logit, b_value, b_own_value, b_g, b_strength, b_k0, b_delta, b_dq, b_w, p_p, p_da, p_terms, row,
    m_row, term, m_term, tok, u, scale, M: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Write down what a block of slots, as `meet_slots` gives it, means for rows and slots; the further sums b_dq, of
    the gradient of q [BR, BD], and b_w, of that of q . k for each slot token [BR, 16]."""
    dtype = b_k0.dtype
    BT: tl.constexpr = 16
    m = begin + tl.arange(0, BM)
    m_slot = m < M
    b_da = b_p * (b_value + b_own_value - b_delta[:, None])  # [BR, BM]
    b_terms = tl.sum(tl.reshape(b_da * b_logit + b_p * b_value, [BT, HB, BM]), 1)  # [16, BM]
    tl.store(p_terms + term[:, None] * M + m[None, :], b_terms, mask=m_term[:, None] & m_slot[None, :])
    b_da = b_da * scale
    offset = row[:, None] * M + m[None, :]
    mask = m_row[:, None] & m_slot[None, :]
    b_decay = tl.exp2(sum_gates(u[None, :] <= tok[:, None], b_g, dtype))
    b_dq += dot((b_da * b_decay).to(dtype), b_k0)
    if EXACT:
        tl.store(p_p + offset, b_p.to(dtype), mask=mask)
        tl.store(p_da + offset, b_da.to(dtype), mask=mask)
        for level in tl.static_range(LEVELS):
            m_pair = pair_masks(level, tok, u, EXACT)
            b_scaled = (b_da * row_factors(level, b_g, tok, u, dtype, EXACT)).to(dtype)
            b_token = (token_factors(level, b_g, u, dtype, EXACT) * b_strength).to(dtype)
            b_w += tl.where(m_pair, dot(b_scaled, tl.trans(b_token)), 0.0)
        b_w += tl.where(u[None, :] == tok[:, None], dot(b_da.to(dtype), tl.trans(b_strength.to(dtype))), 0.0)
    else:
        b_row = row_factors(0, b_g, tok, u, dtype, EXACT)
        b_scaled = (b_da * b_row).to(dtype)
        tl.store(p_p + offset, (b_p * b_row).to(dtype), mask=mask)
        tl.store(p_da + offset, b_scaled, mask=mask)
        b_token = (token_factors(0, b_g, u, dtype, EXACT) * b_strength).to(dtype)
        b_w += tl.where(u[None, :] <= tok[:, None], dot(b_scaled, tl.trans(b_token)), 0.0)
    return b_dq, b_w


@triton.jit
def meet_keys(
    begin, b_q, b_do, b_lse, t, tokens, recent, start, n, seen, visible, length, W, scale, h, H, R, D: tl.constexpr,
    DV: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """Rows and the keys of their window from `begin` on: weights and do . v [BR, BN], and the keys [BN, BD]."""
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    key = begin + tl.arange(0, BN)
    m_key = (key >= -visible) & (key < length)
    b_k = load_tokens(tokens.k_window, recent.k_window, start, n, seen, key, m_key, h, H, R, D, d, d < D)
    b_v = load_tokens(tokens.v, recent.v, start, n, seen, key, m_key, h, H, R, DV, dv, dv < DV)
    m_visible = (key[None, :] <= t[:, None]) & (key[None, :] > t[:, None] - W) & m_key[None, :]
    b_logit = dot(b_q, tl.trans(b_k)) * (scale * LOG2E) - b_lse[:, None]
    b_p = tl.where(m_visible, tl.exp2(b_logit), 0.0)
    return b_p, dot(b_do, tl.trans(b_v)), b_k


@triton.jit(do_not_specialize=["T", "R", "W", "delay", "pad", "CHUNKS", "tiles", "segments", "N", "all_tokens"])
def rows_kernel(
    p_q, p_q_window, tokens, recent, layout, p_first_segment, p_states, p_do, p_lse, p_dlse,
    p_dq, p_dq_window, p_p, p_da, p_delta, p_sums, p_terms,
    T, R, W, delay, pad, CHUNKS, tiles, segments, N, all_tokens, scale,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    HB: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    LEVELS: tl.constexpr, MASK_EMPTY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile. pad: rows that the first tile of a sequence has before the sequence, so that blocks of slot tokens
    begin at multiples of 16. States are stored every 16 tokens; pointers as in `RowGradients`."""
    E: tl.constexpr = D + DV
    BT: tl.constexpr = 16
    BR: tl.constexpr = BT * HB
    NG: tl.constexpr = HQ // H
    PARTS: tl.constexpr = (NG + HB - 1) // HB
    dtype = p_q.dtype.element_ty
    tile = tl.program_id(0) // (H * PARTS)
    h = tl.program_id(0) % (H * PARTS) // PARTS
    part = tl.program_id(0) % PARTS
    if layout.cu_seqlens is not None:
        if tl.load(layout.sequence + tile) >= N:
            return
    n, index, start, length, seen = find_piece(layout, tile, tiles, T)

    r = tl.arange(0, BR)
    tok = r // HB
    head = part * HB + r % HB
    t = index * BT - pad + tok
    m_row = (t >= 0) & (t < length) & (head < NG)
    row = (start + t) * HQ + h * NG + head
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    m_d = d < D
    m_dv = dv < DV
    b_q = load_queries(p_q, row, m_row, D, d, m_d)  # [BR, BD]
    b_do = load_queries(p_do, row, m_row, DV, dv, m_dv)  # [BR, BDV]
    b_lse = tl.load(p_lse + row, mask=m_row, other=float("inf")) * LOG2E
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)  # a row with nothing to attend to

    if recent.k is None:
        past = 0
        waiting = 0
        visible = 0
    else:
        past = (delay + BT - 1) // BT * BT
        waiting = tl.minimum(seen, delay)
        visible = tl.minimum(seen, R)
    u = tl.arange(0, BT)
    position = index * BT - pad - delay + u
    m_token = (position >= -waiting) & (position < length)
    b_k = load_tokens(tokens.k, recent.k, start, n, seen, position, m_token, h, H, R, D, d, m_d)  # [16, BD]
    b_v = load_tokens(tokens.v, recent.v, start, n, seen, position, m_token, h, H, R, DV, dv, m_dv)  # [16, BDV]
    b_dots = dot(b_q, tl.trans(b_k))  # [BR, 16]
    b_values = dot(b_do, tl.trans(b_v))
    chunk = index + (past - pad - delay) // BT  # exact: a multiple of 16
    if layout.cu_seqlens is None:
        first = n * segments
    else:
        first = tl.load(p_first_segment + n)
    p_slot = p_states + ((first.to(tl.int64) * CHUNKS + chunk) * H + h) * M * E
    m_meets = m_row
    if MASK_EMPTY:
        m_meets = m_meets & (t - delay >= -waiting)
    end = index * BT - pad + BT
    blocks = (end - tl.maximum(end - BT - W + 1, -visible) + BN - 1) // BN
    if W == 0:
        blocks = 0
    window = end - blocks * BN
    b_qw = b_q if p_dq_window is None else load_queries(p_q_window, row, m_row, D, d, m_d)

    # The sum of all weights and delta = sum(do * o), but of the very weights and values below, which are rounded
    # otherwise than those of the forward pass: what they have in common cancels.
    b_delta = tl.zeros([BR], tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    for begin in range(window, end, BN):
        b_pw, b_value_w, b_key = meet_keys(
            begin, b_qw, b_do, b_lse, t, tokens, recent, start, n, seen, visible, length, W, scale, h, H, R, D, DV,
            BN, BD, BDV,
        )  # fmt: skip
        b_delta += tl.sum(b_pw * b_value_w, 1)
        b_sum += tl.sum(b_pw, 1)
    if M <= BM:
        begin = 0
        b_p, b_logit, b_value, b_own_value, b_g, b_strength, b_k0 = meet_slots(
            begin, b_q, b_do, b_dots, b_values, b_lse, m_meets, tokens, recent, p_slot, chunk >= 0, start, n, seen,
            position, m_token, tok, u, scale, h, H, R, D, DV, M, BM, BD, BDV, LEVELS, EXACT,
        )  # fmt: skip
        b_delta += tl.sum(b_p * (b_value + b_own_value), 1)
        b_sum += tl.sum(b_p, 1)
    else:
        for begin in range(0, M, BM):
            b_ps, b_logit_s, b_value_s, b_own_s, b_gs, b_strength_s, b_ks = meet_slots(
                begin, b_q, b_do, b_dots, b_values, b_lse, m_meets, tokens, recent, p_slot, chunk >= 0, start, n, seen,
                position, m_token, tok, u, scale, h, H, R, D, DV, M, BM, BD, BDV, LEVELS, EXACT,
            )  # fmt: skip
            b_delta += tl.sum(b_ps * (b_value_s + b_own_s), 1)
            b_sum += tl.sum(b_ps, 1)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_lse += tl.log2(b_sum)
    b_delta /= b_sum
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + row, mask=m_row, other=0.0)
    tl.store(p_delta + row, b_delta, mask=m_row)
    tl.store(p_sums + row, b_lse, mask=m_row)

    b_dq = tl.zeros([BR, BD], tl.float32)
    b_w = tl.zeros([BR, BT], tl.float32)
    t_term = index * BT - pad + u
    m_term = (t_term >= 0) & (t_term < length)
    term = (part.to(tl.int64) * all_tokens + start + t_term) * H + h
    if M <= BM:  # all of a single block is still there
        b_dq, b_w = leave_slots(
            begin, b_p / b_sum[:, None], b_logit, b_value, b_own_value, b_g, b_strength, b_k0, b_delta, b_dq, b_w, p_p,
            p_da, p_terms, row, m_row, term, m_term, tok, u, scale, M, HB, BM, LEVELS, EXACT,
        )  # fmt: skip
    else:
        for begin in range(0, M, BM):
            b_ps, b_logit_s, b_value_s, b_own_s, b_gs, b_strength_s, b_ks = meet_slots(
                begin, b_q, b_do, b_dots, b_values, b_lse, m_meets, tokens, recent, p_slot, chunk >= 0, start, n, seen,
                position, m_token, tok, u, scale, h, H, R, D, DV, M, BM, BD, BDV, LEVELS, EXACT,
            )  # fmt: skip
            b_dq, b_w = leave_slots(
                begin, b_ps, b_logit_s, b_value_s, b_own_s, b_gs, b_strength_s, b_ks, b_delta, b_dq, b_w, p_p, p_da,
                p_terms, row, m_row, term, m_term, tok, u, scale, M, HB, BM, LEVELS, EXACT,
            )  # fmt: skip
    b_dq += dot(b_w.to(dtype), b_k)

    p_dq_row = row[:, None] * D + d[None, :]
    m_dq = m_row[:, None] & m_d[None, :]
    if p_dq_window is not None:
        tl.store(p_dq + p_dq_row, b_dq.to(dtype), mask=m_dq)
        p_dq = p_dq_window
        b_dq = tl.zeros([BR, BD], tl.float32)
    for begin in range(window, end, BN):
        b_pw, b_value_w, b_key = meet_keys(
            begin, b_qw, b_do, b_lse, t, tokens, recent, start, n, seen, visible, length, W, scale, h, H, R, D, DV,
            BN, BD, BDV,
        )  # fmt: skip
        b_dq += dot((b_pw * (b_value_w - b_delta[:, None]) * scale).to(dtype), b_key)
    tl.store(p_dq + p_dq_row, b_dq.to(dtype), mask=m_dq)


def empty_rows(problem: Problem, parts: int, device: torch.device, apart: bool) -> RowGradients:
    """Room for the rows' gradients, `terms` in so many parts; apart: that of the window's q by itself."""
    rows = (problem.batch, problem.tokens, problem.q_heads)

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    return RowGradients(
        q=empty(*rows, problem.head_dim),
        q_window=empty(*rows, problem.head_dim) if apart else None,
        weights=empty(*rows, problem.slots), logits=empty(*rows, problem.slots),
        delta=empty(*rows, dtype=torch.float32), lse=empty(*rows, dtype=torch.float32),
        terms=empty(parts, problem.batch * problem.tokens, problem.kv_heads, problem.slots, dtype=torch.float32),
    )  # fmt: skip


def rows_launch(
    problem: Problem, inputs: Inputs, operands: Operands, stored: StoredStates, lse: Tensor, grad_o: Tensor,
    grad_lse: Tensor | None, config: RowsConfig,
) -> tuple[Launch, RowGradients]:  # fmt: skip
    """The launch of the rows' kernel, and what it fills."""
    pad = -operands.delay % BLOCK
    tiles, layout = operands.pieces(problem, pad, BLOCK)
    parts = -(-problem.group // config.heads)
    q = inputs.q.contiguous()
    q_window = q if inputs.q_window is None else inputs.q_window.contiguous()
    grads = empty_rows(problem, parts, q.device, apart=problem.positions != "none")
    arguments = dict(
        p_q=q, p_q_window=q_window, tokens=operands.tokens, recent=operands.recent, layout=layout,
        p_first_segment=stored.layout.first, p_states=stored.states, p_do=grad_o, p_lse=lse, p_dlse=grad_lse,
        p_dq=grads.q, p_dq_window=grads.q_window, p_p=grads.weights, p_da=grads.logits, p_delta=grads.delta,
        p_sums=grads.lse, p_terms=grads.terms, T=problem.tokens, R=operands.recent_places, W=operands.window,
        delay=operands.delay, pad=pad, CHUNKS=stored.chunks_a_segment, tiles=tiles, segments=stored.segments,
        N=problem.sequences, all_tokens=problem.batch * problem.tokens, scale=float(inputs.scale), HQ=problem.q_heads,
        H=problem.kv_heads, D=problem.head_dim, DV=problem.value_dim, M=problem.slots, HB=config.heads, BN=config.keys,
        BM=config.slots, BD=triton.next_power_of_2(problem.head_dim), BDV=triton.next_power_of_2(problem.value_dim),
        LEVELS=1 if config.anchored else 4, MASK_EMPTY=problem.mask_empty_slots, EXACT=not config.anchored,
    )  # fmt: skip
    count = tiles if problem.packed else tiles * problem.sequences
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Launch(rows_kernel, (count * problem.kv_heads * parts,), arguments, options), grads
