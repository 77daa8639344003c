"""One token for each sequence, in plain PyTorch: the same operations whatever the state holds, updated in place."""

from __future__ import annotations

import torch
from torch import Tensor

from .gates import write_strength
from .problem import Inputs, Problem, accumulate_dtype
from .rope import rotate


def decode_step(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """o [N, 1, HQ, Dv] and lse [N, 1, HQ]; the state in `inputs` moves on by one token."""
    state = inputs.state
    if state is None:
        raise TypeError("state: expected an NHAState; got NoneType")
    if problem.tokens != 1:
        raise ValueError(f"q: expected T = 1 in a decode step; got T = {problem.tokens}")
    if state.capacity < problem.history:
        raise ValueError(
            f"state: expected room for {problem.history} recent tokens (state.with_full_capacity() makes it); "
            f"got {state.capacity}"
        )
    if problem.needs_grad:
        raise ValueError("q: expected no gradient to be needed in a decode step, which works in place; got one")
    wide = accumulate_dtype(problem.dtype)
    row = torch.arange(problem.sequences, device=inputs.q.device)
    new = {"k": inputs.k, "v": inputs.v, "g": inputs.g, "s": inputs.s, "k_window": inputs.k_window}
    token = {name: x[:, 0] for name, x in new.items() if x is not None}  # [N, H, ...]

    # The token that enters the slots now: this one, or the one that came `delay` tokens ago, if there was one.
    if problem.delay == 0:
        entering, exists = token, torch.ones_like(state.seen, dtype=torch.bool)
    else:
        place = (state.seen - problem.delay) % state.capacity
        entering = {name: getattr(state, name)[row, place] for name in token}
        exists = state.seen >= problem.delay
    exists = exists[:, None, None]
    g = torch.where(exists, entering["g"].to(wide), torch.zeros((), dtype=wide, device=row.device))
    s = write_strength(g) if inputs.s is None else torch.where(exists, entering["s"].to(wide), torch.zeros_like(g))
    for slot, x in ((state.slot_k, entering["k"]), (state.slot_v, entering["v"])):
        written = torch.where(exists[..., None], s[..., None] * x.to(wide)[:, :, None], torch.zeros_like(slot))
        slot.mul_(g.exp()[..., None]).add_(written)

    o, lse = _attend(problem, inputs, exists)
    if state.capacity > 0:
        place = state.seen % state.capacity
        for name, x in token.items():
            getattr(state, name)[row, place] = x
    state.seen.add_(1)
    return o, lse


def _attend(problem: Problem, inputs: Inputs, slots_in_use: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the slots, the recent tokens in the window and the token itself (not yet in the ring)."""
    state = inputs.state
    assert state is not None
    wide = accumulate_dtype(problem.dtype)
    heads = (problem.sequences, problem.kv_heads, problem.group, problem.head_dim)
    q = inputs.q.to(wide).view(heads)
    q_window = (inputs.q if inputs.q_window is None else inputs.q_window)[:, 0]
    k_window = (inputs.k if inputs.k_window is None else inputs.k_window)[:, 0]
    recent_k = state.k if state.k_window is None else state.k_window
    position = state.recent_positions()  # [N, R]
    if inputs.rope is not None:
        q_window = rotate(q_window, *inputs.rope, state.seen)
        k_window = rotate(k_window, *inputs.rope, state.seen)
        recent_k = rotate(recent_k, *inputs.rope, position.clamp(min=0))
    q_window = q_window.to(wide).reshape(heads)

    logits = [torch.einsum("nhgd,nhmd->nhgm", q, state.slot_k)]
    if problem.mask_empty_slots:
        logits[0] = logits[0].masked_fill(~slots_in_use[..., None], float("-inf"))
    values = [state.slot_v]
    if problem.window > 1:
        visible = (position >= 0) & (position > (state.seen - problem.window)[:, None])
        recent = torch.einsum("nhgd,njhd->nhgj", q_window, recent_k.to(wide))
        logits.append(recent.masked_fill(~visible[:, None, None], float("-inf")))
        # What an empty place holds must not matter, and 0 * NaN would.
        seen_v = torch.where(visible[..., None, None], state.v, torch.zeros_like(state.v))
        values.append(seen_v.to(wide).transpose(1, 2))
    if problem.window > 0:
        logits.append(torch.einsum("nhgd,nhd->nhg", q_window, k_window.to(wide))[..., None])
        values.append(inputs.v[:, 0].to(wide)[:, :, None])
    scores = torch.cat(logits, dim=-1) * inputs.scale
    lse = scores.logsumexp(-1, keepdim=True)
    # Nothing to attend to (lse = -inf) is an output of 0.
    weights = scores.softmax(-1).masked_fill(lse.isneginf(), 0)
    o = torch.einsum("nhgj,nhjv->nhgv", weights, torch.cat(values, dim=2))
    shape = (problem.sequences, 1, problem.q_heads)
    return o.reshape(*shape, problem.value_dim).to(problem.dtype), lse.reshape(shape)
