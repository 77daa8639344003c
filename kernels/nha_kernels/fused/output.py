"""The output: a tile of tokens and query heads meets the slots and its window under one softmax.

A tile is BT tokens times HB query heads of one kv head, packed into the BR rows of every product, so that the heads
share keys, values, gates and decays. Let e = t - delay be the last token in a row's slots and S0 the slots stored
before `base`, the last multiple of C at or before the tile's first e. With q.k for the tokens between,

    q_t . K~ = decay(base..e) * (q_t . S0) + sum_{base <= j <= e} (q_t . k_j) * s_j * decay(j+1..e)      slot by slot

and the values likewise from the other side. How decay(j+1..e) is split into a factor for the row and one for the token:
bf16: both refer to the tile's first token, with one fixed exponent anchor (`ANCHOR`); a reference that depended on
later gates would break causality to the bit. fp16 and fp32 (EXACT): by a tree of references, halves of the tile, where
both factors are at most 1 and sums of gates are direct, so nothing overflows or cancels.

Wide heads: q . k is summed over blocks of BD columns, and the columns of the values are shared out among programs, BDV
each, that all compute the whole softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Inputs, Problem
from .pairs import tree_pairs, tree_rows, tree_tokens
from .primitives import (
    ANCHOR,
    FORGET,
    LOG2E,
    STRONGEST,
    Launch,
    Operands,
    at_least,
    dot,
    find_piece,
    load_tokens,
    rotate,
    sum_gates,
    write_strength,
)
from .states import StoredStates


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """How the output kernel is launched.

    rows: tokens x query heads of a tile, BR, at most 64; keys: of a block of the window, BN; slots: of a block, BM;
    columns: of q and k in one product, BD; values: columns of v a program, BDV; powers of two >= 16. anchored: decays
    by the one exponent anchor, else by the tree; fp16 does not span the anchor's exponents.
    """

    rows: int
    keys: int
    slots: int
    columns: int
    values: int
    warps: int
    stages: int
    anchored: bool

    def __post_init__(self) -> None:
        # Tiles of 128 rows are computed wrongly on Hopper where ptxas 12.8 compiles them.
        if self.rows not in (16, 32, 64):
            raise ValueError(f"rows: expected 16, 32 or 64; got {self.rows}")
        # Narrower blocks with 64 rows: of some products it takes an address from a register that it never wrote.
        for name in ("slots", "columns", "values"):
            if self.rows == 64 and getattr(self, name) < 64:
                raise ValueError(f"{name}: expected at least 64 with 64 rows; got {getattr(self, name)}")

    @classmethod
    def default(cls, problem: Problem) -> OutputConfig:
        """By head size, group and dtype; no search, no measurement."""
        slots = max(16, triton.next_power_of_2(problem.slots))
        widest = max(problem.head_dim, problem.value_dim)
        columns = triton.next_power_of_2(problem.head_dim)
        values = min(256, triton.next_power_of_2(problem.value_dim))
        # Twice the bytes and no tensor cores: small tiles, and few columns, all of which a thread holds for a product.
        if problem.dtype == torch.float32:
            return cls(
                rows=16, keys=16, slots=min(32, slots), columns=min(64, columns), values=values, warps=4, stages=1,
                anchored=False,
            )  # fmt: skip
        most = 64 if min(columns, values) >= 64 else 32
        rows = min(most, max(16, triton.next_power_of_2(16 * min(problem.group, 16))))
        columns = min(128 if widest > 256 else 256, columns)  # more of q, k and v would not fit shared memory together
        return cls(
            rows=rows, keys=32, slots=64 if rows == 64 else min(64, slots), columns=columns, values=values,
            warps=8 if widest > 128 and rows == 64 else 4, stages=2, anchored=problem.dtype == torch.bfloat16,
        )  # fmt: skip

    def tile(self, problem: Problem) -> tuple[int, int]:
        """Tokens of a tile (the anchor spans 16 at most) and query heads of a kv head that share it."""
        heads = min(problem.group, 16)
        return min(16, self.rows // heads), heads

    def stays_in_chunk(self, problem: Problem, chunk: int) -> bool:
        """Does every tile's run of slot tokens lie within one chunk of stored states?"""
        tokens, _ = self.tile(problem)
        return chunk % tokens == 0 and problem.delay % tokens == 0


@triton.jit
def softmax_step(b_logit, b_max, b_sum):
    """Take a block of logits (log2) into a running softmax: its weights, the factor for what came before, the state."""
    b_new = tl.maximum(b_max, tl.max(b_logit, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # rows that have seen nothing yet
    b_p = tl.exp2(b_logit - b_safe[:, None])
    b_factor = tl.exp2(b_max - b_safe)
    return b_p, b_factor, b_new, b_sum * b_factor + tl.sum(b_p, 1)


@triton.jit
def anchored_logits(b_dots, b_earlier, b_g, b_strength, tok, u):
    """q . K~ of a block of slots by the one anchor.

    b_dots [BR, J] = scale * q . k, masked to j <= e; b_earlier [BR, BM] = scale * q . S0; b_g, b_strength [J, BM].
    Gives the logits [BR, BM], and for the values the factors of rows [BR, BM], tokens [J, BM] and stored slots [BM]. A
    gate of -inf keeps 2^-13 of the slots, which is below bf16's rounding.
    """
    b_g = at_least(b_g, STRONGEST)
    # Before the tile: the gates after a token up to the tile. In the tile: those up to the token, negative.
    m_before = (u[None, :] > u[:, None]) & (u[None, :] < 0)
    m_since = (u[None, :] >= 0) & (u[None, :] <= u[:, None])
    b_sums = sum_gates(m_before.to(tl.float32) - m_since.to(tl.float32), b_g, b_dots.dtype)
    b_token = b_strength * tl.exp2(b_sums - ANCHOR)
    b_row = tl.exp2(sum_gates((u[None, :] >= 0) & (u[None, :] <= tok[:, None]), b_g, b_dots.dtype) + ANCHOR)
    b_stored = tl.exp2(tl.sum(tl.where((u < 0)[:, None], b_g.to(tl.float32), 0.0), 0) * LOG2E - ANCHOR)
    b_logit = (b_earlier * b_stored[None, :] + dot(b_dots, b_token.to(b_dots.dtype))) * b_row
    return b_logit, b_row, b_token, b_stored


@triton.jit
def anchored_weights(b_p, b_row, b_token, b_stored, tok, u, dtype):
    """What slot weights b_p [BR, BM] come to: on the stored slots [BR, BM], and on the tokens since [BR, J]."""
    b_scaled = b_p * b_row
    # Entries of later tokens may be inf; they are masked with the rest.
    b_w = dot(b_scaled.to(dtype), tl.trans(b_token.to(dtype)))
    return b_scaled * b_stored[None, :], tl.where(u[None, :] <= tok[:, None], b_w, 0.0)


@triton.jit
def exact_logits(b_dots, b_earlier, b_g, b_strength, tok, u, LEVELS: tl.constexpr):
    """q . K~ of a block of slots by the tree, [BR, BM]; arguments as for `anchored_logits`."""
    dtype = b_dots.dtype
    b_logit = b_earlier * tl.exp2(sum_gates(u[None, :] <= tok[:, None], b_g, dtype))
    b_token, b_row = factors_before(b_g, b_strength, tok, u, dtype)
    b_logit += dot(tl.where((u < 0)[None, :], b_dots, 0.0).to(dtype), b_token.to(dtype)) * b_row
    m_self = u[None, :] == tok[:, None]
    b_logit += dot(tl.where(m_self, b_dots, 0.0).to(dtype), b_strength.to(dtype))
    for level in tl.static_range(LEVELS):
        m_pair, b_token, b_row = factors_at(level, b_g, b_strength, tok, u, dtype)
        b_logit += dot(tl.where(m_pair, b_dots, 0.0).to(dtype), b_token.to(dtype)) * b_row
    return b_logit


@triton.jit
def exact_weights(b_p, b_g, b_strength, tok, u, LEVELS: tl.constexpr, dtype):
    """What slot weights come to, by the tree; arguments and results as for `anchored_weights`."""
    b_token, b_row = factors_before(b_g, b_strength, tok, u, dtype)
    b_w = dot((b_p * b_row).to(dtype), tl.trans(b_token.to(dtype)))
    b_w = tl.where((u < 0)[None, :], b_w, 0.0)
    b_w += tl.where(u[None, :] == tok[:, None], dot(b_p.to(dtype), tl.trans(b_strength.to(dtype))), 0.0)
    for level in tl.static_range(LEVELS):
        m_pair, b_token, b_row = factors_at(level, b_g, b_strength, tok, u, dtype)
        b_w += tl.where(m_pair, dot((b_p * b_row).to(dtype), tl.trans(b_token.to(dtype))), 0.0)
    return b_p * tl.exp2(sum_gates(u[None, :] <= tok[:, None], b_g, dtype)), b_w


@triton.jit
def factors_before(b_g, b_strength, tok, u, dtype):
    """Of tokens before the tile [J, BM] and of rows [BR, BM], both referred to the tile's first token."""
    b_token = b_strength * tl.exp2(sum_gates((u[None, :] > u[:, None]) & (u[None, :] < 0), b_g, dtype))
    b_row = tl.exp2(sum_gates((u[None, :] >= 0) & (u[None, :] <= tok[:, None]), b_g, dtype))
    return b_token, b_row


@triton.jit
def factors_at(level: tl.constexpr, b_g, b_strength, tok, u, dtype):
    """At one level of the tree: which pairs (row, token) [BR, J], and the factors of tokens and rows."""
    b_token = b_strength * tl.exp2(sum_gates(tree_tokens(level, u), b_g, dtype))
    return tree_pairs(level, tok, u), b_token, tl.exp2(sum_gates(tree_rows(level, tok, u), b_g, dtype))


@triton.jit
def load_queries(p_q, row, m_row, D, column, m_column):
    """Rows of q, [BR, columns]."""
    return tl.load(p_q + row[:, None] * D + column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def rotated_queries(p_q, rope, row, m_row, seen, position, P, half, HALF: tl.constexpr):
    """Columns `half` of both halves of rows of q, [BR, columns] each, rotated to their positions."""
    m_half = half < HALF
    p_lower = p_q + row[:, None] * (2 * HALF) + half[None, :]
    mask = m_row[:, None] & m_half[None, :]
    b_lower = tl.load(p_lower, mask=mask, other=0.0)
    b_upper = tl.load(p_lower + HALF, mask=mask, other=0.0)
    return rotate(b_lower, b_upper, rope[0], rope[1], seen + position, m_row, P, half, m_half, HALF)


@triton.jit
def rotated_keys(p_call, p_recent, rope, start, n, seen, position, m_exists, h, H, R, P, half, HALF: tl.constexpr):
    """The same of keys, [keys, columns] each."""
    m_half = half < HALF
    D: tl.constexpr = 2 * HALF
    b_lower = load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, D, half, m_half)
    b_upper = load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, D, half + HALF, m_half)
    return rotate(b_lower, b_upper, rope[0], rope[1], seen + position, m_exists, P, half, m_half, HALF)


@triton.jit
def add_dot(b_sum, b_a, b_b):
    """b_sum and the product of a further block of columns."""
    if b_a.dtype == tl.float32:
        # A sum over blocks of sums over BD columns, whose error grows with BD + D / BD, not with D. Hence the minus:
        # Triton would make b_sum plus a product one long sum.
        return b_sum - dot(-b_a, b_b)
    else:
        return b_sum + dot(b_a, b_b)


@triton.jit
def token_dots(
    b_q, p_q, row, m_row, p_call, p_recent, start, n, seen, position, m_exists, h, H, R, D: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """q . k of rows and tokens, [BR, keys].

    b_q [BR, BD]: the first columns of q. Those beyond are read again for each block of keys: all of a wide head at once
    would fill the registers.
    """
    d = tl.arange(0, BD)
    b_k = load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, D, d, d < D)  # [keys, BD]
    b_dots = dot(b_q, tl.trans(b_k))
    for begin in range(BD, D, BD):
        column = begin + d
        b_further = load_tokens(p_call, p_recent, start, n, seen, position, m_exists, h, H, R, D, column, column < D)
        b_dots = add_dot(b_dots, load_queries(p_q, row, m_row, D, column, column < D), tl.trans(b_further))
    return b_dots


@triton.jit
def slot_dots(b_q, p_q, row, m_row, p_slot, m_slot, D: tl.constexpr, BD: tl.constexpr):
    """The same of rows and stored slots, [BR, BM]; p_slot [BM]."""
    d = tl.arange(0, BD)
    b_k = tl.load(p_slot[:, None] + d[None, :], mask=m_slot[:, None] & (d < D)[None, :], other=0.0)  # [BM, BD]
    b_dots = dot(b_q, tl.trans(b_k))
    for begin in range(BD, D, BD):
        column = begin + d
        mask = m_slot[:, None] & (column < D)[None, :]
        b_further = tl.load(p_slot[:, None] + column[None, :], mask=mask, other=0.0)
        b_dots = add_dot(b_dots, load_queries(p_q, row, m_row, D, column, column < D), tl.trans(b_further))
    return b_dots


@triton.jit
def rotated_dots(
    b_lower, b_upper, p_q, row, m_row, t, p_call, p_recent, rope, start, n, seen, position, m_exists, h, H, R, P,
    HALF: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The same of rows and tokens, both rotated; b_lower, b_upper [BR, BH]: the first columns of either half of q."""
    half = tl.arange(0, BH)
    b_kl, b_ku = rotated_keys(p_call, p_recent, rope, start, n, seen, position, m_exists, h, H, R, P, half, HALF)
    b_dots = add_dot(dot(b_lower, tl.trans(b_kl)), b_upper, tl.trans(b_ku))
    for begin in range(BH, HALF, BH):
        column = begin + half
        b_ql, b_qu = rotated_queries(p_q, rope, row, m_row, seen, t, P, column, HALF)
        b_fl, b_fu = rotated_keys(p_call, p_recent, rope, start, n, seen, position, m_exists, h, H, R, P, column, HALF)
        b_dots = add_dot(add_dot(b_dots, b_ql, tl.trans(b_fl)), b_qu, tl.trans(b_fu))
    return b_dots


@triton.jit(do_not_specialize=["T", "R", "P", "W", "delay", "C", "CHUNKS", "tiles", "segments", "N"])
def output_kernel(
    p_q, p_q_window, tokens, recent, layout, p_first_segment, p_states, rope, p_o, p_lse,
    T, R, P, W, delay, C, CHUNKS, tiles, segments, N, scale,
    HQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, M: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, HB: tl.constexpr, J: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BH: tl.constexpr, LEVELS: tl.constexpr,
    MASK_EMPTY: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of BT tokens and HB query heads of a kv head, as BR rows, and BDV columns of the values.

    p_q, p_q_window [*, HQ, D]; rope: (cos, sin) [P, D/2] or None; p_states [chunks, H, M, E], with CHUNKS chunks a
    segment; p_o [*, HQ, DV]; p_lse [*, HQ] fp32 or None. J: slot tokens since the stored state; BN: keys of a window
    block; BM: slots of a block; BD: columns of q and k in one product, BH of either half where they are rotated.
    """
    E: tl.constexpr = D + DV
    NG: tl.constexpr = HQ // H
    PARTS: tl.constexpr = (NG + HB - 1) // HB
    VALUE_BLOCKS: tl.constexpr = (DV + BDV - 1) // BDV
    dtype = p_q.dtype.element_ty
    program = tl.program_id(0) // VALUE_BLOCKS
    value_block = tl.program_id(0) % VALUE_BLOCKS
    tile = program // (H * PARTS)
    h = program % (H * PARTS) // PARTS
    part = program % PARTS
    if layout.cu_seqlens is not None:
        if tl.load(layout.sequence + tile) >= N:
            return
    n, index, start, length, seen = find_piece(layout, tile, tiles, T)

    r = tl.arange(0, BR)
    tok = r // HB
    head = part * HB + r % HB
    t = index * BT + tok
    m_row = (tok < BT) & (t < length) & (head < NG)
    row = (start + t) * HQ + h * NG + head
    d = tl.arange(0, BD)
    dv = value_block * BDV + tl.arange(0, BDV)
    m_d = d < D
    m_dv = dv < DV
    b_q = load_queries(p_q, row, m_row, D, d, m_d)  # [BR, BD]

    # The stored state at or before the tile's first slot token, and the tokens from there on.
    if recent.k is None:
        past = 0
        waiting = 0
        visible = 0
    else:
        past = (delay + C - 1) // C * C
        waiting = tl.minimum(seen, delay)
        visible = tl.minimum(seen, R)
    stream = index * BT - delay + past
    chunk = tl.where(stream >= 0, stream // C, -((C - 1 - stream) // C))  # floor
    u = tl.arange(0, J) - (stream - chunk * C)  # [J] slot tokens, relative to the tile's first
    position = index * BT - delay + u
    m_token = (position >= -waiting) & (position < length) & (u < BT)  # later gates would overflow the anchor
    b_dots = token_dots(
        b_q, p_q, row, m_row, tokens.k, recent.k, start, n, seen, position, m_token, h, H, R, D, BD
    )  # [BR, J]
    # Scaled before it is rounded: a bare q . k may overflow fp16.
    b_dots = tl.where(u[None, :] <= tok[:, None], b_dots * scale, 0.0).to(dtype)
    if layout.cu_seqlens is None:
        first = n * segments
    else:
        first = tl.load(p_first_segment + n)
    state = (first.to(tl.int64) * CHUNKS + chunk) * H + h

    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    b_o = tl.zeros([BR, BDV], tl.float32)
    b_w = tl.zeros([BR, J], tl.float32)  # the softmax's weight on each slot token, by way of all slots
    for begin in range(0, M, BM):
        m = begin + tl.arange(0, BM)
        m_slot = m < M
        b_g = load_tokens(tokens.g, recent.g, start, n, seen, position, m_token, h, H, R, M, m, m_slot)  # [J, BM]
        if tokens.s is None:
            b_s = None
        else:
            b_s = load_tokens(tokens.s, recent.s, start, n, seen, position, m_token, h, H, R, M, m, m_slot)
        b_strength = write_strength(b_g, b_s)  # [J, BM]
        p_slot = p_states + (state * M + m) * E
        m_state = m_slot & (chunk >= 0)
        b_earlier = slot_dots(b_q, p_q, row, m_row, p_slot, m_state, D, BD) * scale  # [BR, BM]
        if EXACT:
            b_g = at_least(b_g, FORGET)
            b_logit = exact_logits(b_dots, b_earlier, b_g, b_strength, tok, u, LEVELS)  # [BR, BM]
        else:
            b_logit, b_decay, b_token, b_before = anchored_logits(b_dots, b_earlier, b_g, b_strength, tok, u)
        b_logit = tl.where(m_slot[None, :], b_logit * LOG2E, float("-inf"))
        if MASK_EMPTY:
            m_empty = t - delay < -waiting
            b_logit = tl.where(m_empty[:, None], float("-inf"), b_logit)
        b_p, b_rescale, b_max, b_sum = softmax_step(b_logit, b_max, b_sum)
        if EXACT:
            b_stored, b_new = exact_weights(b_p, b_g, b_strength, tok, u, LEVELS, dtype)  # [BR, BM], [BR, J]
        else:
            b_stored, b_new = anchored_weights(b_p, b_decay, b_token, b_before, tok, u, dtype)
        b_v0 = tl.load(p_slot[:, None] + D + dv[None, :], mask=m_state[:, None] & m_dv[None, :], other=0.0)  # [BM, BDV]
        b_o = b_o * b_rescale[:, None] + dot(b_stored.to(dtype), b_v0)
        b_w = b_w * b_rescale[:, None] + b_new
    b_v = load_tokens(tokens.v, recent.v, start, n, seen, position, m_token, h, H, R, DV, dv, m_dv)  # [J, BDV]
    b_o += dot(b_w.to(dtype), b_v)

    # The window, in blocks of BN keys that end with the tile.
    end = index * BT + BT
    blocks = (end - tl.maximum(end - BT - W + 1, -visible) + BN - 1) // BN
    if W == 0:
        blocks = 0
    if rope is not None:
        HALF: tl.constexpr = D // 2
        b_lower, b_upper = rotated_queries(p_q, rope, row, m_row, seen, t, P, tl.arange(0, BH), HALF)
    else:
        b_qw = load_queries(p_q_window, row, m_row, D, d, m_d)
    for begin in range(end - blocks * BN, end, BN):
        key = begin + tl.arange(0, BN)
        m_key = (key >= -visible) & (key < length)
        p_recent = recent.k_window
        if rope is not None:
            b_logit = rotated_dots(
                b_lower, b_upper, p_q, row, m_row, t, tokens.k_window, p_recent, rope, start, n, seen, key, m_key, h, H,
                R, P, HALF, BH,
            )  # fmt: skip
        else:
            b_logit = token_dots(
                b_qw, p_q_window, row, m_row, tokens.k_window, p_recent, start, n, seen, key, m_key, h, H, R, D, BD
            )  # [BR, BN]
        m_visible = (key[None, :] <= t[:, None]) & (key[None, :] > t[:, None] - W) & m_key[None, :]
        b_logit = tl.where(m_visible, b_logit * (scale * LOG2E), float("-inf"))
        b_p, b_rescale, b_max, b_sum = softmax_step(b_logit, b_max, b_sum)
        b_value = load_tokens(tokens.v, recent.v, start, n, seen, key, m_key, h, H, R, DV, dv, m_dv)  # [BN, BDV]
        b_o = b_o * b_rescale[:, None] + dot(b_p.to(dtype), b_value)

    # A row with nothing to attend to: o = 0, lse = -inf.
    b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
    tl.store(p_o + row[:, None] * DV + dv[None, :], b_o.to(dtype), mask=m_row[:, None] & m_dv[None, :])
    if p_lse is not None:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_sum)) / LOG2E)
        tl.store(p_lse + row, b_lse, mask=m_row & (value_block == 0))


def output_launch(
    problem: Problem, inputs: Inputs, operands: Operands, stored: StoredStates, config: OutputConfig
) -> tuple[Launch, Tensor, Tensor | None]:
    """The launch of the output kernel, and what it fills: o [B, T, HQ, DV] and lse [B, T, HQ] fp32 if asked for."""
    tile_tokens, tile_heads = config.tile(problem)
    tiles, layout = operands.pieces(problem, 0, tile_tokens)
    q = inputs.q.contiguous()
    rows = (problem.batch, problem.tokens, problem.q_heads)
    o = torch.empty(*rows, problem.value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(*rows, dtype=torch.float32, device=q.device) if problem.return_lse else None
    since_stored = stored.chunk if config.stays_in_chunk(problem, stored.chunk) else stored.chunk + tile_tokens - 1
    arguments = dict(
        p_q=q, p_q_window=q if inputs.q_window is None else inputs.q_window.contiguous(), tokens=operands.tokens,
        recent=operands.recent, layout=layout, p_first_segment=stored.layout.first, p_states=stored.states,
        rope=None if inputs.rope is None else tuple(x.contiguous() for x in inputs.rope), p_o=o, p_lse=lse,
        T=problem.tokens, R=operands.recent_places, P=0 if inputs.rope is None else len(inputs.rope[0]),
        W=operands.window, delay=operands.delay, tiles=tiles, segments=stored.segments, N=problem.sequences,
        scale=float(inputs.scale), HQ=problem.q_heads, H=problem.kv_heads, D=problem.head_dim, DV=problem.value_dim,
        M=problem.slots, C=stored.chunk, CHUNKS=stored.chunks_a_segment, BR=config.rows, BT=tile_tokens, HB=tile_heads,
        J=max(16, triton.next_power_of_2(since_stored)), BN=config.keys, BM=config.slots,
        BD=config.columns, BDV=config.values, BH=max(16, config.columns // 2),
        LEVELS=(tile_tokens - 1).bit_length(), MASK_EMPTY=problem.mask_empty_slots, EXACT=not config.anchored,
    )  # fmt: skip
    count = tiles if problem.packed else tiles * problem.sequences
    value_blocks = -(-problem.value_dim // config.values)
    grid = (count * problem.kv_heads * -(-problem.group // tile_heads) * value_blocks,)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Launch(output_kernel, grid, arguments, options), o, lse
