"""The least an operation must do, by its definition alone: bytes through device memory, floating point operations; and
the bytes that it must keep of the past for the next token.

Sizes: B batch, T length, HQ query heads, H kv heads, D head size, M slots, W window, e bytes of an element. Every
input is read once and every output written once; keys, values and gates exist once for each kv head, whatever an
implementation may repeat. A multiply-add counts as two operations; exponentials are not counted. What is kept of the
past is kept for each sequence, of the batch or packed: tokens in e bytes a number, a recurrent state in fp32.

In training the backward pass reads the inputs, o and the gradient that arrives at it, and writes a gradient for each
input: three times the bytes of the forward pass, all in all. Every product is followed by two, for the gradients of its
two operands, and softmax attention computes its logits once more: 5 against 2. A decay of a number in a state is
followed by 4 operations, a multiply-add for the gradient of the decay and another for that of the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from nhabench.workloads import Case


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: copy in TB/s (bytes read plus bytes written) and a large matrix product in TFLOP/s."""

    copy_tb_per_s: float
    matmul_tflop_per_s: float


@dataclass(frozen=True)
class Floor:
    """The bytes and FLOPs that an operation on a case cannot go below, and the bytes of its state after it."""

    bytes: int
    flops: int
    state_bytes: int

    def milliseconds(self, ceilings: Ceilings) -> float:
        """The time below which the device's ceilings do not let the operation go: the larger of its two terms."""
        return max(self.bytes / ceilings.copy_tb_per_s, self.flops / ceilings.matmul_tflop_per_s) * 1e-9


def _attended(length: int, window: int) -> int:
    """Pairs (query, key) of one sequence under a causal window: the sum over t of min(t + 1, window)."""
    full = min(window, length)
    return full * (full + 1) // 2 + (length - full) * window


def _floor(case: Case, gates: int, flops: int, state_bytes: int) -> Floor:
    """`gates`: elements of gates for each token and kv head, beside q, k, v and o."""
    w = case.workload
    elements = 2 * w.q_heads * w.head_dim + w.kv_heads * (2 * w.head_dim + gates)
    once, offsets = case.tokens * elements * case.torch_dtype.itemsize, case.offset_bytes
    return Floor(3 * once + 2 * offsets if case.training else once + offsets, flops, state_bytes)


def _kept_tokens(case: Case, tokens: int, gates: int = 0) -> int:
    # Keys and values, and gates of those that are still to enter a recurrent state.
    w = case.workload
    kept = sum(min(tokens, length) for length in case.lengths)
    return w.kv_heads * kept * (2 * w.head_dim + gates) * case.torch_dtype.itemsize


def _recurrent(case: Case, rows: int) -> int:
    """A state of `rows` rows of D numbers for each kv head."""
    return len(case.lengths) * case.workload.kv_heads * rows * case.workload.head_dim * 4


def _attention(case: Case, pairs: int) -> int:
    """Of `pairs` (query, key or slot) of each query head: the logits and the weighted sum of values, and in training
    the five products of their gradients, 2 D operations each."""
    w = case.workload
    return w.q_heads * pairs * 2 * w.head_dim * (7 if case.training else 2)


def _updates(case: Case, numbers: int, products: int, decays: int) -> int:
    """Of `numbers` in a kv head's state: products and decays that enter each of them with a token."""
    products, decays = (3 * products, 5 * decays) if case.training else (products, decays)
    return case.tokens * case.workload.kv_heads * numbers * (2 * products + decays)


def _softmax_flops(case: Case, window: int) -> int:
    return _attention(case, sum(_attended(length, window) for length in case.lengths))


def _slot_flops(case: Case) -> int:
    # Keys and values of M slots are a state of 2 M D numbers.
    w = case.workload
    return _attention(case, case.tokens * w.slots) + _updates(case, 2 * w.slots * w.head_dim, products=1, decays=1)


def _state_flops(case: Case, updates: int = 1, decays: int = 0) -> int:
    # A D x D state for each kv head, updated with rank-one products, and read by each query head.
    w = case.workload
    reads = case.tokens * w.q_heads * 2 * w.head_dim**2 * (3 if case.training else 1)
    return reads + _updates(case, w.head_dim**2, updates, decays)


def nha_floor(case: Case) -> Floor:
    """Native hybrid attention: slots and window."""
    w = case.workload
    # A rotation takes four multiplications and two additions for each pair of numbers.
    rotation = 3 * case.tokens * (w.q_heads + w.kv_heads) * w.head_dim if w.rope else 0
    state = _recurrent(case, 2 * w.slots) + _kept_tokens(case, w.window, w.slots)
    least = _floor(case, w.slots, _slot_flops(case) + _softmax_flops(case, w.window) + rotation, state)
    return dataclasses.replace(least, bytes=least.bytes + case.table_bytes)


def full_floor(case: Case) -> Floor:
    """Causal softmax attention."""
    return _floor(case, 0, _softmax_flops(case, case.seq_len), _kept_tokens(case, case.seq_len))


def window_floor(case: Case) -> Floor:
    """Causal softmax attention over the last W tokens."""
    window = case.workload.window
    return _floor(case, 0, _softmax_flops(case, window), _kept_tokens(case, max(0, window - 1)))


def linear_floor(case: Case) -> Floor:
    """Linear attention without gates."""
    return _floor(case, 0, _state_flops(case), _recurrent(case, case.workload.head_dim))


def gla_floor(case: Case) -> Floor:
    """Gated linear attention: a gate for each element of a key, and a decay of each element of the state."""
    w = case.workload
    flops = _state_flops(case, decays=1)
    return _floor(case, w.head_dim, flops, _recurrent(case, w.head_dim))


def simple_gla_floor(case: Case) -> Floor:
    """Gated linear attention with one gate for each head."""
    w = case.workload
    flops = _state_flops(case, decays=1)
    return _floor(case, 1, flops, _recurrent(case, w.head_dim))


def gsa_floor(case: Case) -> Floor:
    """Gated slot attention: NHA without a window; the write strengths are a second input beside the gates."""
    return _floor(case, 2 * case.workload.slots, _slot_flops(case), _recurrent(case, 2 * case.workload.slots))


def delta_rule_floor(case: Case) -> Floor:
    """The gated delta rule: gate and step size for each head; the state is read before each update, and decays."""
    w = case.workload
    flops = _state_flops(case, updates=2, decays=1)
    return _floor(case, 2, flops, _recurrent(case, w.head_dim))


FloorFunction = Callable[[Case], Floor]
