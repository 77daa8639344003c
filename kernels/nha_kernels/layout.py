"""A call cut into segments of blocks of rows, and where the tokens lie that a segment gathers. Plain PyTorch.

A call is cut into blocks of `ROWS` rows of one sequence, a block into chunks of `CHUNK` rows; work goes by segments,
runs of blocks of a bounded size. A segment gathers what it needs, so that a backward pass can recompute it and add its
gradients in place: time and memory stay O(T). Positions before 0 are the recent tokens of the initial state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_offsets
from .problem import Inputs, Problem, accumulate_dtype
from .rope import rotate

CHUNK = 16
ROWS = 64
# Elements that the intermediates of one segment may take: on a CPU what its caches like (measured: 2**22 and 2**23 are
# fastest), on a GPU few and large operations.
SEGMENT_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of n blocks. Positions count from a sequence's first token in this call; all tensors are int64.

    sequence, start, length, offset [n]: each block's sequence, the position of its first row, the length of the
    sequence and the index of the sequence's first token among all tokens. begins, ends: the blocks that are the first
    and the last of their sequences, counted from the segment's first block.
    """

    sequence: Tensor
    start: Tensor
    length: Tensor
    offset: Tensor
    begins: Tensor
    ends: Tensor

    def rows(self) -> Tensor:
        """[n, ROWS] the positions of the blocks' rows; the last block of a sequence runs over its end."""
        return self.start[:, None] + torch.arange(ROWS, device=self.start.device)

    def row_index(self) -> Tensor:
        """[n, ROWS] the rows' tokens among all tokens; for rows over the end, some token of the sequence."""
        return self.offset[:, None] + torch.minimum(self.rows(), self.length[:, None] - 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """A call cut into segments.

    row_of_token [B * T]: where each token is among all the segments' rows. longest: tokens of the longest sequence.
    """

    segments: tuple[Segment, ...]
    row_of_token: Tensor
    longest: int

    def over_rows(self, x: Tensor) -> Tensor:
        """x [B * T, ...] spread over all rows of all segments, zero in those over a sequence's end."""
        rows = sum(len(segment.start) for segment in self.segments) * ROWS
        spread = x.new_zeros(rows, *x.shape[1:], dtype=accumulate_dtype(x.dtype))
        spread[self.row_of_token] = x.to(spread.dtype)
        return spread


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of sequences lie on one flat axis: those of the call, and behind them the state's rings.

    tokens: of the call, B * T. recent: places of a ring. seen [N]: tokens before the call, None without a ring; a copy,
    since a state may move on before the backward pass asks.
    """

    tokens: int
    recent: int
    seen: Tensor | None

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Places:
        """The places of a call's tokens."""
        state = inputs.state
        if state is None or state.capacity == 0:
            return cls(problem.batch * problem.tokens, 0, None)
        return cls(problem.batch * problem.tokens, state.capacity, state.seen.clone())

    def index(self, segment: Segment, position: Tensor) -> Tensor:
        """Where the tokens at `position` [n, p] of the blocks' sequences lie; within bounds for those that are not."""
        inside = torch.minimum(position.clamp(min=0), segment.length[:, None] - 1)
        index = segment.offset[:, None] + inside
        if self.seen is None:
            return index
        place = (self.seen[segment.sequence, None] + position) % self.recent
        return torch.where(position < 0, self.tokens + segment.sequence[:, None] * self.recent + place, index)

    def oldest(self, segment: Segment, reach: int) -> Tensor:
        """[n, 1] the first position that exists, at most `reach` tokens before the call."""
        if self.seen is None:
            return torch.zeros_like(segment.start)[:, None]
        return -self.seen[segment.sequence, None].clamp(max=min(reach, self.recent))


class Source(NamedTuple):
    """The tokens that `Places` speaks of: [B * T + N * recent, H, ...] each; s None where the call gives none."""

    k: Tensor
    v: Tensor
    g: Tensor
    s: Tensor | None
    k_window: Tensor

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> Source:
        """The call's tokens and the state's, with the window's keys rotated where the call says so."""
        state = inputs.state if inputs.state is not None and inputs.state.capacity > 0 else None

        def flat(x: Tensor, name: str) -> Tensor:
            own = x.flatten(0, 1)
            return own if state is None else torch.cat((own, getattr(state, name).flatten(0, 1)))

        k = flat(inputs.k, "k")
        k_window = k
        if inputs.k_window is not None:
            k_window = flat(inputs.k_window, "k_window")
        elif inputs.rope is not None:
            position = token_positions(problem, inputs).flatten()
            if state is not None:  # places of a ring that hold nothing count as 0
                position = torch.cat((position, state.recent_positions().clamp(min=0).flatten()))
            k_window = rotate(k, *inputs.rope, position)
        s = None if inputs.s is None else flat(inputs.s, "s")
        return cls(k, flat(inputs.v, "v"), flat(inputs.g, "g"), s, k_window)

    def slots(self) -> list[Tensor]:
        """What enters the slots: k, v, g and, where the call gives it, s."""
        return [self.k, self.v, self.g, *([] if self.s is None else [self.s])]


def token_positions(problem: Problem, inputs: Inputs) -> Tensor:
    """[B, T] int64: the absolute position of every token in its own sequence."""
    device = inputs.q.device
    position = torch.arange(problem.tokens, device=device).expand(problem.batch, -1)
    seen = None if inputs.state is None else inputs.state.seen
    if inputs.cu_seqlens is None:
        return position if seen is None else position + seen[:, None]
    bounds = inputs.cu_seqlens.to(torch.int64)
    sequence = torch.searchsorted(bounds, position[0], right=True) - 1
    local = position - bounds[sequence]
    return local if seen is None else local + seen[sequence]


def window_queries(problem: Problem, inputs: Inputs) -> Tensor:
    """[B * T, HQ, D]: what meets the window's keys: q, q rotated, or q_window."""
    if inputs.q_window is not None:
        return inputs.q_window.flatten(0, 1)
    q = inputs.q.flatten(0, 1)
    if inputs.rope is not None:
        return rotate(q, *inputs.rope, token_positions(problem, inputs).flatten())
    return q


def plan(problem: Problem, inputs: Inputs, window_elements: int) -> Plan:
    """Cut a call into segments whose intermediates stay within SEGMENT_ELEMENTS.

    window_elements: what a row takes beside the slots' part. Reads cu_seqlens on the host; without it the plan is made
    on the device, and nothing waits.
    """
    pairs = problem.kv_heads * problem.slots * CHUNK
    states = problem.kv_heads * problem.slots * (problem.head_dim + problem.value_dim) // CHUNK
    logits = problem.q_heads * problem.slots
    budget = SEGMENT_ELEMENTS.get(problem.device, SEGMENT_ELEMENTS["cuda"])
    size = max(1, budget // (ROWS * (pairs + 2 * states + logits + window_elements)))
    if inputs.cu_seqlens is None:
        return _plan_batch(problem, inputs.q.device, size)
    return _plan_packed(inputs.cu_seqlens, problem.tokens, size)


def _plan_batch(problem: Problem, device: torch.device, size: int) -> Plan:
    """B sequences of T tokens each, `size` blocks a segment."""
    tokens = problem.tokens
    count = -(-tokens // ROWS)  # blocks of a sequence
    segments = []
    for low in range(0, problem.sequences * count, size):
        high = min(low + size, problem.sequences * count)
        block = torch.arange(low, high, device=device)
        sequence = block // count
        begins, ends = (block[(at - low) % count :: count] - low for at in (0, count - 1))
        start, length = block % count * ROWS, torch.full_like(block, tokens)
        segments.append(Segment(sequence, start, length, sequence * tokens, begins, ends))
    token = torch.arange(problem.sequences * tokens, device=device)
    return Plan(tuple(segments), token // tokens * (count * ROWS) + token % tokens, tokens)


def _plan_packed(cu_seqlens: Tensor, tokens: int, size: int) -> Plan:
    """Sequences one after the other, `size` blocks a segment; waits for the device once, for their lengths."""
    bounds = cu_seqlens.to("cpu", torch.int64)
    check_offsets(bounds.tolist(), tokens)
    length = bounds.diff()
    count = (length + ROWS - 1) // ROWS
    end = count.cumsum(0)
    sequence = torch.repeat_interleave(torch.arange(len(length)), count)
    index = torch.arange(len(sequence))
    start = (index - (end - count)[sequence]) * ROWS
    offset = length.cumsum(0) - length

    device = cu_seqlens.device
    blocks = torch.stack((sequence, start, length[sequence], offset[sequence])).to(device)
    is_begin, is_end = start == 0, index == (end - 1)[sequence]
    segments = []
    for low in range(0, len(sequence), size):
        part = slice(low, low + size)
        begins, ends = (x[part].nonzero().flatten().to(device) for x in (is_begin, is_end))
        own, starts, lengths, offsets = blocks[:, part].unbind()
        segments.append(Segment(own, starts, lengths, offsets, begins, ends))
    of_token = torch.repeat_interleave(torch.arange(len(length)), length)
    row = ((end - count) * ROWS - offset)[of_token] + torch.arange(len(of_token))
    return Plan(tuple(segments), row.to(device), int(length.max()))
