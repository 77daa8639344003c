"""The backward pass seen from the window's keys, and its end: gradients of all that belongs to tokens.

A program owns BN tokens, meets every row that sees one of them in its window, and adds what the slots' pass found for
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows import RowGradients
from .backward_slots import SlotGradients
from .output import load_queries
from .primitives import LOG2E, Launch, Operands, Tokens, dot, find_piece, load_tokens, store_tokens


@dataclass(frozen=True, slots=True)
class WindowConfig:
    """How the window's kernel is launched. keys: of a program, BN; heads: query heads of one product, HB; slots: of a
    block, BM."""

    keys: int
    heads: int
    slots: int
    warps: int
    stages: int


@triton.jit
def add_shares(
    p_call, p_recent, shares, tokens, ring_tokens, start, n, seen, position, m_exists, h, H, R, size, column, m_column
):  # fmt: skip
    """The sum of `shares` of what each block of slots or of columns gave, [rows, columns]."""
    b_sum = load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, size, column, m_column)
    for _ in range(1, shares):
        p_call += tokens.to(tl.int64) * H * size
        if p_recent is not None:
            p_recent += ring_tokens.to(tl.int64) * H * size
        b_sum += load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, size, column, m_column)
    return b_sum


@triton.jit(
    do_not_specialize=["T", "R", "W", "delay", "pieces", "N", "kv_shares", "g_shares", "all_tokens", "ring_tokens"]
)
def window_kernel(
    p_q, p_do, p_lse, p_delta, tokens, recent, layout, slots, recent_slots, grads, recent_grads,
    T, R, W, delay, pieces, N, kv_shares, g_shares, all_tokens, ring_tokens, scale,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    HB: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
):  # fmt: skip
    """BN tokens of one kv head, recent ones included. slots, recent_slots: `Shares`; grads, recent_grads: where the
    gradients go (k_window None: to k's)."""
    E: tl.constexpr = D + DV
    BT: tl.constexpr = 16
    BR: tl.constexpr = BT * HB
    NG: tl.constexpr = HQ // H
    PARTS: tl.constexpr = (NG + HB - 1) // HB
    dtype = p_q.dtype.element_ty
    piece = tl.program_id(0)
    h = tl.program_id(1)
    if layout.cu_seqlens is not None:
        if tl.load(layout.sequence + piece) >= N:
            return
    n, index, start, length, seen = find_piece(layout, piece, pieces, T)

    if recent.k is None:
        waiting = 0
        visible = 0
    else:
        waiting = tl.minimum(seen, delay)
        visible = tl.minimum(seen, R)
    first = index * BN - R
    key = first + tl.arange(0, BN)
    m_key = (key >= -visible) & (key < length)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    m_d = d < D
    m_dv = dv < DV
    b_k = load_tokens(tokens.k_window, recent.k_window, start, n, seen, key, m_key, h, H, R, D, d, m_d)  # [BN, BD]
    b_v = load_tokens(tokens.v, recent.v, start, n, seen, key, m_key, h, H, R, DV, dv, m_dv)  # [BN, BDV]
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BDV], tl.float32)
    r = tl.arange(0, BR)
    begin = tl.maximum(first, 0)
    end = tl.minimum(first + BN - 1 + W, length) if W > 0 else begin
    for i in range((end - begin + BT - 1) // BT * PARTS):
        t = begin + i // PARTS * BT + r // HB
        head = i % PARTS * HB + r % HB
        m_row = (t < length) & (head < NG)
        row = (start + t) * HQ + h * NG + head
        b_q = load_queries(p_q, row, m_row, D, d, m_d)  # [BR, BD]
        b_do = load_queries(p_do, row, m_row, DV, dv, m_dv)  # [BR, BDV]
        b_lse = tl.load(p_lse + row, mask=m_row, other=float("inf"))
        b_delta = tl.load(p_delta + row, mask=m_row, other=0.0)
        m_visible = (key[:, None] <= t[None, :]) & (key[:, None] > t[None, :] - W) & m_key[:, None]
        b_logit = dot(b_k, tl.trans(b_q)) * (scale * LOG2E) - b_lse[None, :]  # [BN, BR]
        b_p = tl.where(m_visible, tl.exp2(b_logit), 0.0)
        b_dv += dot(b_p.to(dtype), b_do)
        b_da = b_p * (dot(b_v, tl.trans(b_do)) - b_delta[None, :]) * scale
        b_dk += dot(b_da.to(dtype), b_q)

    m_slots = (key >= -waiting) & (key < length - delay)
    b_slot_k = add_shares(
        slots.kv, recent_slots.kv, kv_shares, all_tokens, ring_tokens, start, n, seen, key, m_slots, h, H, R, E, d, m_d
    )
    b_dv += add_shares(
        slots.kv, recent_slots.kv, kv_shares, all_tokens, ring_tokens, start, n, seen, key, m_slots, h, H, R, E,
        D + dv, m_dv,
    )  # fmt: skip
    if grads.k_window is None:
        b_dk += b_slot_k
        store_tokens(grads.k, recent_grads.k, b_dk, start, n, seen, key, m_key, h, H, R, D, d, m_d)
    else:
        store_tokens(grads.k, recent_grads.k, b_slot_k, start, n, seen, key, m_key, h, H, R, D, d, m_d)
        store_tokens(grads.k_window, recent_grads.k_window, b_dk, start, n, seen, key, m_key, h, H, R, D, d, m_d)
    store_tokens(grads.v, recent_grads.v, b_dv, start, n, seen, key, m_key, h, H, R, DV, dv, m_dv)
    for m_begin in range(0, M, BM):
        m = m_begin + tl.arange(0, BM)
        m_slot = m < M
        b_dg = add_shares(
            slots.g, recent_slots.g, g_shares, all_tokens, ring_tokens, start, n, seen, key, m_slots, h, H, R, M, m,
            m_slot,
        )  # fmt: skip
        store_tokens(grads.g, recent_grads.g, b_dg, start, n, seen, key, m_key, h, H, R, M, m, m_slot)
        if grads.s is not None:
            b_ds = add_shares(
                slots.s, recent_slots.s, g_shares, all_tokens, ring_tokens, start, n, seen, key, m_slots, h, H, R, M,
                m, m_slot,
            )  # fmt: skip
            store_tokens(grads.s, recent_grads.s, b_ds, start, n, seen, key, m_key, h, H, R, M, m, m_slot)


def window_launch(
    problem: Problem, inputs: Inputs, operands: Operands, rows: RowGradients, slots: SlotGradients, grad_o: Tensor,
    config: WindowConfig,
) -> tuple[Launch, Tokens, Tokens]:  # fmt: skip
    """The launch of the window's kernel, and what it fills: gradients of the call's tokens and of the ring's."""
    pieces, layout = operands.pieces(problem, operands.recent_places, config.keys)
    apart = problem.positions != "none"

    def like(tokens: Tokens) -> Tokens:
        # Places of a ring that hold nothing are never written.
        make = torch.empty_like if tokens is operands.tokens else torch.zeros_like
        if tokens.k is None:
            return Tokens(None, None, None, None, None)
        s = None if tokens.s is None else make(tokens.s)
        return Tokens(make(tokens.k), make(tokens.v), make(tokens.g), s, make(tokens.k) if apart else None)

    grads, recent_grads = like(operands.tokens), like(operands.recent)
    q = inputs.q if inputs.q_window is None else inputs.q_window
    arguments = dict(
        p_q=q.contiguous(), p_do=grad_o, p_lse=rows.lse, p_delta=rows.delta, tokens=operands.tokens,
        recent=operands.recent, layout=layout, slots=slots.call, recent_slots=slots.recent, grads=grads,
        recent_grads=recent_grads, T=problem.tokens, R=operands.recent_places, W=operands.window, delay=operands.delay,
        pieces=pieces, N=problem.sequences, kv_shares=len(slots.call.kv), g_shares=len(slots.call.g),
        all_tokens=problem.batch * problem.tokens, ring_tokens=problem.sequences * operands.recent_places,
        scale=float(inputs.scale), HQ=problem.q_heads, H=problem.kv_heads, D=problem.head_dim, DV=problem.value_dim,
        M=problem.slots, HB=config.heads, BN=config.keys, BM=config.slots, BD=triton.next_power_of_2(problem.head_dim),
        BDV=triton.next_power_of_2(problem.value_dim),
    )  # fmt: skip
    count = pieces if problem.packed else pieces * problem.sequences
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Launch(window_kernel, (count, problem.kv_heads), arguments, options), grads, recent_grads
