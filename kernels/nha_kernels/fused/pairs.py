"""How the slots decay between two tokens of a block of 16, split into a factor for the row and one for the token.

A row that has taken in token e meets an earlier token j of its block through decay(j+1..e), slot by slot. Two ways to
write that as a product of factors, which a matrix product can sum over:

one anchor (bf16): both refer to the block's first token, around one fixed exponent (`ANCHOR`); a reference that
depended on later gates would break causality to the bit. Gates are cut off at `STRONGEST`.
a tree (EXACT; fp16 does not span the anchor's exponents): halves of the block, halves of these and so on. On each level
the middle of a pair's part is its reference; both factors are at most 1 and sums of gates are direct, so nothing
overflows or cancels.

tok [BR]: the rows' token in the block; u [16]: the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import ANCHOR, FORGET, STRONGEST, at_least, sum_gates


@triton.jit
def tree_pairs(level: tl.constexpr, tok, u):
    """Which pairs (row, token) meet at one level of the tree, halves of 2^level tokens, across a middle: [BR, J].

    tok: the rows' token in the tile [BR]; u: the slot tokens', relative to the tile's first [J].
    """
    half: tl.constexpr = 2**level
    place = tl.where(u >= 0, u, 0)
    m_first = (u >= 0) & (place // half % 2 == 0)
    m_second = tok // half % 2 == 1
    return m_second[:, None] & m_first[None, :] & ((tok // (2 * half))[:, None] == (place // (2 * half))[None, :])


@triton.jit
def tree_rows(level: tl.constexpr, tok, u):
    """Which gates lie between that middle and the row, [BR, J]."""
    half: tl.constexpr = 2**level
    middle = tok // (2 * half) * (2 * half) + half
    return (u[None, :] >= middle[:, None]) & (u[None, :] <= tok[:, None])


@triton.jit
def tree_tokens(level: tl.constexpr, u):
    """Which gates lie between a token and that middle, [J, J]."""
    half: tl.constexpr = 2**level
    middle = tl.where(u >= 0, u, 0) // (2 * half) * (2 * half) + half
    return (u[None, :] > u[:, None]) & (u[None, :] < middle[:, None])


@triton.jit
def cut(b_g, EXACT: tl.constexpr):
    """Gates as the factors take them."""
    if EXACT:
        return at_least(b_g, FORGET)
    else:
        return at_least(b_g, STRONGEST)


@triton.jit
def split_scale(scale, EXACT: tl.constexpr):
    """The factors of q . k before it is rounded for a product with strengths, and after that.

    Where the slots are seen from, rows or tokens, it is rounded alike, so that what cancels there does.
    """
    if EXACT:  # a bare q . k may overflow fp16
        return scale, 1.0
    else:
        return 1.0, scale


@triton.jit
def pair_masks(level: tl.constexpr, tok, u, EXACT: tl.constexpr):
    """Which pairs (row, earlier token) a level counts, [BR, 16]; a row and its own token are on none."""
    if EXACT:
        return tree_pairs(level, tok, u)
    else:
        return u[None, :] < tok[:, None]


@triton.jit
def row_factors(level: tl.constexpr, b_g, tok, u, dtype, EXACT: tl.constexpr):
    """The rows' part of a level's decays, [BR, BM]; b_g [16, BM] as `cut` gives them."""
    if EXACT:
        return tl.exp2(sum_gates(tree_rows(level, tok, u), b_g, dtype))
    else:
        return tl.exp2(sum_gates(u[None, :] <= tok[:, None], b_g, dtype) + ANCHOR)


@triton.jit
def token_factors(level: tl.constexpr, b_g, u, dtype, EXACT: tl.constexpr):
    """The tokens' part, [16, BM]; b_g [16, BM]."""
    if EXACT:
        return tl.exp2(sum_gates(tree_tokens(level, u), b_g, dtype))
    else:
        return tl.exp2(-sum_gates(u[None, :] <= u[:, None], b_g, dtype) - ANCHOR)
