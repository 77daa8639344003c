"""The slots in parallel over time, in plain PyTorch: the arithmetic that `chunked` and `flash` share.

The slots enter a chunk by a scan over the chunks of all sequences together (a sequence's first chunk forgets everything
before it); inside a chunk every pair (row t, token j) has its own decay

    w[t, j, m] = s_j[m] * exp(g_{j+1}[m] + ... + g_t[m])      for j <= t

whose exponent is a direct sum of the gates between the two, never a difference of two cumulative sums. So nothing
overflows and nothing cancels, for any gates from 0 down to -inf, and fp32 is exact to fp32's own error.

Row t meets the slots that token t - delay was the last to enter: all slot tokens are taken `delay` positions back,
and the rest of the arithmetic knows no delay.

Shapes: n blocks in a segment, c = n * ROWS / CHUNK chunks, E = D + Dv.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .gates import write_strength
from .layout import CHUNK, ROWS, Places, Segment
from .problem import Inputs, Problem, accumulate_dtype

RADIX = 16
# exp() of anything below this is 0, in float64 too. It stands for -inf, which a sum with 0 * -inf would turn into NaN.
FORGET = -1.0e4


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
