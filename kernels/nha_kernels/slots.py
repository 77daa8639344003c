"""The slots in parallel over time, in plain PyTorch: the primitives that `chunked` and `flash` share.

A call is cut into blocks of `ROWS` rows of one sequence, a block into chunks of `CHUNK` rows. The slots enter a chunk
by a scan over the chunks of all sequences together (a sequence's first chunk forgets everything before it); inside a
chunk every pair (row t, token j) has its own decay

    w[t, j, m] = s_j[m] * exp(g_{j+1}[m] + ... + g_t[m])      for j <= t

whose exponent is a direct sum of the gates between the two, never a difference of two cumulative sums. So nothing
overflows and nothing cancels, for any gates from 0 down to -inf, and fp32 is exact to fp32's own error.

Row t meets the slots that token t - delay was the last to enter: all slot tokens are taken `delay` positions back,
and the rest of the arithmetic knows no delay. Positions before 0 are the recent tokens of the initial state.

Work goes by segments (runs of blocks) of a bounded size. A segment gathers what it needs, so that a backward pass can
recompute it and add its gradients in place: time and memory stay O(T).

Shapes: n blocks in a segment, c = n * ROWS / CHUNK chunks, E = D + Dv.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_offsets
from .gates import write_strength
from .problem import Inputs, Problem, accumulate_dtype
from .rope import rotate

CHUNK = 16
ROWS = 64
RADIX = 16
# exp() of anything below this is 0, in float64 too. It stands for -inf, which a sum with 0 * -inf would turn into NaN.
FORGET = -1.0e4
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


class SlotTokens(NamedTuple):
    """What enters the slots at each row of a segment, chunked: g, s [c, CHUNK, H, M] and kv [c, CHUNK, H, E]."""

    g: Tensor
    s: Tensor
    kv: Tensor


class Memory(NamedTuple):
    """The slots as the rows of a segment see them.

    state [c, H, M, E]: before each chunk. decay [c, H, CHUNK, M]: from there to each row. weight
    [c, H, CHUNK, CHUNK, M]: of each token of the chunk for each row.
    """

    state: Tensor
    decay: Tensor
    weight: Tensor


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


def initial_slots(problem: Problem, inputs: Inputs) -> Tensor | None:
    """[N, H, M, E]: K~ and V~ side by side before the call; None where they are zero."""
    if inputs.state is None:
        return None
    return torch.cat((inputs.state.slot_k, inputs.state.slot_v), dim=-1)


def final_slots(problem: Problem, final: Tensor) -> tuple[Tensor, Tensor]:
    """K~ [N, H, M, D] and V~ [N, H, M, Dv] of the slots after the call, side by side in `final`: views."""
    return final[..., : problem.head_dim], final[..., problem.head_dim :]


def slot_index(problem: Problem, places: Places, segment: Segment) -> Tensor:
    """[n, ROWS] where the token lies that enters the slots at each row."""
    return places.index(segment, segment.rows() - problem.delay)


def slot_tokens(
    problem: Problem, places: Places, segment: Segment, k: Tensor, v: Tensor, g: Tensor, s: Tensor | None
) -> SlotTokens:
    """What enters the slots at each row, from what was gathered [n, ROWS, H, ...]; nothing where no token exists."""
    wide = accumulate_dtype(problem.dtype)
    position = segment.rows() - problem.delay
    exists = (position >= places.oldest(segment, problem.delay)) & (position < segment.length[:, None] - problem.delay)
    exists = exists[..., None, None]

    def chunked(x: Tensor) -> Tensor:
        # What does not exist enters with strength 0 after a gate of 0.
        return torch.where(exists, x, torch.zeros_like(x)).unflatten(1, (-1, CHUNK)).flatten(0, 1)

    g = g.to(wide)
    strength = write_strength(g) if s is None else s.to(wide)
    kv = torch.cat((k, v), dim=-1).to(wide)
    return SlotTokens(chunked(g.clamp(min=FORGET)), chunked(strength), chunked(kv))


def remember(tokens: SlotTokens, segment: Segment, begin: Tensor | None, carry: Tensor) -> tuple[Memory, Tensor]:
    """The slots as every row of a segment sees them, and the slots after each of its blocks [n, H, M, E].

    begin [begins, H, M, E]: the slots before the sequences that begin here (None: zero). carry [H, M, E]: the slots
    after the segment before.
    """
    g, s, kv = tokens
    # The gates between a token and the end of its chunk: shifted, not subtracted, so that nothing cancels.
    later = torch.cat((g[:, 1:], torch.zeros_like(g[:, :1])), dim=1).flip(1).cumsum(1).flip(1)
    added = (s * later.exp()).permute(0, 2, 3, 1) @ kv.transpose(1, 2)  # [c, H, M, E]
    total = g.sum(1)  # [c, H, M]

    # Before a chunk: the slots after the one before, or those that its sequence begins with.
    chunks = ROWS // CHUNK
    first = segment.begins * chunks
    entering = torch.cat((carry[None], added[:-1]))
    entering = entering.index_fill(0, first, 0) if begin is None else entering.index_copy(0, first, begin)
    forgetting = torch.cat((torch.zeros_like(total[:1]), total[:-1])).index_fill(0, first, FORGET)
    begins = torch.zeros(len(g), dtype=torch.bool, device=g.device).index_fill(0, first, True)
    state = scan(forgetting, entering, begins)
    last = slice(chunks - 1, None, chunks)
    after_block = total[last].exp()[..., None] * state[last] + added[last]

    place = torch.arange(CHUNK, device=g.device)
    row, token, gate = place[:, None, None], place[None, :, None], place[None, None, :]
    between = ((token < gate) & (gate <= row)).to(g.dtype)  # [CHUNK, CHUNK, CHUNK]
    per_head = g.transpose(1, 2)  # [c, H, CHUNK, M]
    exponent = (between.flatten(0, 1) @ per_head).unflatten(2, (CHUNK, CHUNK))
    past = (place[None, :] <= place[:, None])[..., None]  # token <= row
    pair = torch.where(past, exponent.exp(), torch.zeros_like(exponent))
    weight = pair * s.transpose(1, 2)[:, :, None]  # [c, H, row, token, M]
    return Memory(state, per_head.cumsum(2).exp(), weight), after_block


def scan(log_decay: Tensor, x: Tensor, begins: Tensor) -> Tensor:
    """y_i = exp(log_decay_i) * y_{i-1} + x_i over the first axis, and y_i = x_i where a sequence begins [c] bool.

    log_decay [c, H, M], x [c, H, M, E]. A tree of RADIX branches: groups are scanned side by side, then the groups'
    ends the same way. A begin is a mask and not only a decay of 0, so that a NaN stays in its own sequence.
    """
    count = len(x)
    groups = -(-count // RADIX)
    padding = groups * RADIX - count
    if padding:
        log_decay = torch.cat((log_decay, log_decay.new_zeros(padding, *log_decay.shape[1:])))
        x = torch.cat((x, x.new_zeros(padding, *x.shape[1:])))
        begins = torch.cat((begins, begins.new_zeros(padding)))
    log_decay = log_decay.unflatten(0, (groups, RADIX))
    x = x.unflatten(0, (groups, RADIX))
    begins = begins.unflatten(0, (groups, RADIX))[..., None, None, None]
    decay = log_decay.exp()[..., None]
    y = [x[:, 0]]
    for i in range(1, RADIX):
        y.append(torch.addcmul(x[:, i], decay[:, i], y[-1].masked_fill(begins[:, i], 0)))
    local = torch.stack(y, dim=1)  # [groups, RADIX, H, M, E]
    if groups > 1:
        total = log_decay.sum(1).clamp(min=FORGET)
        ends = scan(total[:-1], local[:-1, -1], begins[:-1].any(1).flatten())
        reach = log_decay[1:].cumsum(1).exp()[..., None]
        apart = begins[1:].cumsum(1) > 0  # from a begin in the group on, the groups before do not matter
        earlier = ends[:, None].expand_as(local[1:]).masked_fill(apart, 0)
        local = torch.cat((local[:1], torch.addcmul(local[1:], reach, earlier)))
    return local.flatten(0, 1)[:count]


def slot_logits(problem: Problem, memory: Memory, tokens: SlotTokens, q: Tensor) -> Tensor:
    """q_t . K~ without the scale, for q [n, ROWS, HQ, D]: [n, ROWS, H, NG, M]."""
    dim, group = problem.head_dim, problem.group
    rows = q.to(tokens.kv.dtype).unflatten(2, (-1, group)).unflatten(1, (-1, CHUNK)).flatten(0, 1).transpose(1, 2)
    flat = rows.flatten(2, 3)  # [c, H, CHUNK * NG, D]
    earlier = flat @ memory.state[..., :dim].transpose(-1, -2)
    pairs = flat @ tokens.kv[..., :dim].permute(0, 2, 3, 1)  # [c, H, CHUNK * NG, CHUNK]
    inside = pairs.unflatten(2, (CHUNK, group)) @ memory.weight
    logits = earlier.unflatten(2, (CHUNK, group)) * memory.decay[..., None, :] + inside
    return logits.transpose(1, 2).unflatten(0, (-1, ROWS // CHUNK)).flatten(1, 2)


def slot_values(problem: Problem, memory: Memory, tokens: SlotTokens, p: Tensor) -> Tensor:
    """p_t . V~ for weights p [n, ROWS, H, NG, M]: [n, ROWS, H, NG, Dv]."""
    dim, group = problem.head_dim, problem.group
    rows = p.unflatten(1, (-1, CHUNK)).flatten(0, 1).transpose(1, 2)  # [c, H, CHUNK, NG, M]
    earlier = (rows * memory.decay[..., None, :]).flatten(2, 3) @ memory.state[..., dim:]
    pairs = (rows @ memory.weight.transpose(-1, -2)).flatten(2, 3)  # [c, H, CHUNK * NG, CHUNK]
    inside = pairs @ tokens.kv[..., dim:].transpose(1, 2)
    values = (earlier + inside).unflatten(2, (CHUNK, group)).transpose(1, 2)
    return values.unflatten(0, (-1, ROWS // CHUNK)).flatten(1, 2)


def mask_slots(problem: Problem, places: Places, segment: Segment, logits: Tensor) -> Tensor:
    """Slot logits [n, ROWS, H, NG, M] with -inf where `mask_empty_slots` leaves a row's slots out."""
    if not problem.mask_empty_slots:
        return logits
    empty = segment.rows() - problem.delay < places.oldest(segment, problem.delay)
    return logits.masked_fill(empty[..., None, None, None], float("-inf"))


# What a segment computes, from what it gathered: (segment, local, begin, carry) -> outputs of its rows, and the slots
# after each of its blocks.
Compute = Callable[[Segment, list[Tensor], Tensor | None, Tensor], tuple[tuple[Tensor, ...], Tensor]]
Indices = Callable[[Segment], Sequence[Tensor]]


class Walk(NamedTuple):
    """What a walk over the segments gives: each output over all rows, the slots after each sequence, the carries."""

    outputs: list[Tensor]
    final: Tensor
    carries: list[Tensor]


def walk(
    problem: Problem, segments: Sequence[Segment], indices: Indices, compute: Compute, initial: Tensor | None,
    tensors: Sequence[Tensor],
) -> Walk:  # fmt: skip
    """Compute segment after segment: each gathers x[index] from every tensor and takes over the slots before it."""
    shape = (problem.kv_heads, problem.slots, problem.head_dim + problem.value_dim)
    carry = tensors[0].new_zeros(shape, dtype=accumulate_dtype(problem.dtype))
    final = carry.new_zeros(problem.sequences, *shape) if initial is None else initial.clone()
    rows: list[tuple[Tensor, ...]] = []
    carries = []
    for segment in segments:
        carries.append(carry)
        local = [x[index] for x, index in zip(tensors, indices(segment), strict=True)]
        begin = None if initial is None else initial[segment.sequence[segment.begins]]
        outputs, after_block = compute(segment, local, begin, carry)
        carry = after_block[-1].clone()  # a view would keep the whole segment's slots alive
        final[segment.sequence[segment.ends]] = after_block[segment.ends]
        rows.append(outputs)
    return Walk([torch.cat(parts) for parts in zip(*rows, strict=True)], final, carries)


def walk_back(
    problem: Problem, segments: Sequence[Segment], indices: Indices, compute: Compute, initial: Tensor | None,
    tensors: Sequence[Tensor], carries: Sequence[Tensor], grad_outputs: Sequence[Tensor], grad_final: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradients of `walk` for `initial` and `tensors`: each segment is recomputed, from the last to the first.

    grad_outputs: over all rows, as the outputs; grad_final [N, H, M, E]. needed: which tensors need a gradient.
    """
    grad_initial = None if initial is None else grad_final.clone()
    grads = {
        i: torch.zeros_like(x, dtype=accumulate_dtype(x.dtype))
        for i, (x, need) in enumerate(zip(tensors, needed, strict=True))
        if need
    }
    grad_carry = torch.zeros_like(carries[0])
    stop = sum(len(segment.start) for segment in segments) * ROWS
    for segment, carry in zip(reversed(segments), reversed(carries), strict=True):
        rows = slice(stop - len(segment.start) * ROWS, stop)
        stop = rows.start
        index = indices(segment)
        begin_sequence = segment.sequence[segment.begins]
        local = [x.detach()[i].requires_grad_(need) for x, i, need in zip(tensors, index, needed, strict=True)]
        begin = None if initial is None else initial.detach()[begin_sequence].requires_grad_()
        carry = carry.detach().requires_grad_()
        # The forward ran without autocast; so must what repeats it, and its gradients.
        with torch.autocast(carry.device.type, enabled=False):
            with torch.enable_grad():
                outputs, after_block = compute(segment, local, begin, carry)
            grad_after = torch.zeros_like(after_block)
            grad_after[segment.ends] = grad_final[segment.sequence[segment.ends]]
            grad_after[-1] += grad_carry
            wanted = [carry, *([] if begin is None else [begin]), *(local[i] for i in grads)]
            grad_carry, *got = torch.autograd.grad(
                [*outputs, after_block], wanted, [*(x[rows] for x in grad_outputs), grad_after], materialize_grads=True
            )
        if grad_initial is not None:
            grad_initial[begin_sequence] = got.pop(0)
        for i, part in zip(grads, got, strict=True):
            grads[i].index_add_(0, index[i].flatten(), part.flatten(0, 1).to(grads[i].dtype))
    return grad_initial, [grads[i].to(x.dtype) if i in grads else None for i, x in enumerate(tensors)]


def refuse_second_order(name: str) -> None:
    """Called in a backward pass: autograd would silently take its result for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once: create_graph=True needs backend='naive'")
