"""naive: the definition read aloud, token by token. The judge of every other implementation.

Any device, any floating dtype, differentiable by autograd, O(T (M + W)) time in a Python loop. In a 16-bit dtype it is
the same mathematics in the same precision that a kernel has: slots and softmax in fp32, products in the input dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Inputs, Problem, Result, accumulate_dtype
from .rope import rotate


def why_not(problem: Problem) -> str | None:
    """naive serves every valid call."""
    return None


def run(problem: Problem, inputs: Inputs) -> Result:
    """Serve a call one sequence at a time; reads cu_seqlens and the state's token counts on the host."""
    q, k, v, g = (x.flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v, inputs.g))
    s = None if inputs.s is None else inputs.s.flatten(0, 1)
    q_window = None if inputs.q_window is None else inputs.q_window.flatten(0, 1)
    k_window = None if inputs.k_window is None else inputs.k_window.flatten(0, 1)
    if inputs.cu_seqlens is None:
        bounds = [n * problem.tokens for n in range(problem.sequences + 1)]
    else:
        bounds = inputs.cu_seqlens.tolist()

    results = []
    for n in range(problem.sequences):
        rows = slice(bounds[n], bounds[n + 1])
        past = _past(problem, inputs, n)
        tokens = {"k": k[rows], "v": v[rows], "g": g[rows]}
        tokens["s"] = 1 - torch.exp(g[rows]) if s is None else s[rows]
        tokens["k_window"] = k[rows] if k_window is None else k_window[rows]
        tokens = {name: torch.cat((past[name], x)) if name in past else x for name, x in tokens.items()}
        queries_window = q[rows] if q_window is None else q_window[rows]
        seen = 0 if inputs.state is None else int(inputs.state.seen[n])
        if inputs.rope is not None:
            length = rows.stop - rows.start
            position = seen - (len(tokens["k"]) - length) + torch.arange(len(tokens["k"]), device=q.device)
            queries_window = rotate(q[rows], *inputs.rope, position[len(position) - length :])
            tokens["k_window"] = rotate(tokens["k"], *inputs.rope, position)
        slots = _initial_slots(problem, inputs, n)
        results.append(_sequence(problem, inputs.scale, q[rows], queries_window, tokens, slots, seen))

    o, lse, slot_k, slot_v = zip(*results, strict=True)
    shape = (problem.batch, problem.tokens, problem.q_heads)
    return Result(torch.cat(o).view(*shape, -1), torch.cat(lse).view(shape), torch.stack(slot_k), torch.stack(slot_v))


def _past(problem: Problem, inputs: Inputs, n: int) -> dict[str, Tensor]:
    """The recent tokens of sequence n from its state, oldest first."""
    state = inputs.state
    if state is None or state.capacity == 0:
        return {}
    seen = int(state.seen[n])
    places = [p % state.capacity for p in range(max(0, seen - state.capacity), seen)]
    past = {"k": state.k[n, places], "v": state.v[n, places], "g": state.g[n, places]}
    past["s"] = 1 - torch.exp(past["g"]) if state.s is None else state.s[n, places]
    past["k_window"] = past["k"] if state.k_window is None else state.k_window[n, places]
    return past


def _initial_slots(problem: Problem, inputs: Inputs, n: int) -> tuple[Tensor, Tensor]:
    if inputs.state is not None:
        return inputs.state.slot_k[n], inputs.state.slot_v[n]
    shape = (problem.kv_heads, problem.slots)
    wide = accumulate_dtype(problem.dtype)
    return inputs.q.new_zeros(*shape, problem.head_dim, dtype=wide), inputs.q.new_zeros(
        *shape, problem.value_dim, dtype=wide
    )


def _sequence(
    problem: Problem,
    scale: float,
    q: Tensor,
    q_window: Tensor,
    tokens: dict[str, Tensor],
    slots: tuple[Tensor, Tensor],
    seen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence: q [T, HQ, D], tokens [past + T, H, ...]; gives o [T, HQ, Dv], lse [T, HQ] and the slots."""
    length, dtype, wide = len(q), problem.dtype, accumulate_dtype(problem.dtype)
    past = len(tokens["k"]) - length
    grouped = (problem.kv_heads, problem.group, -1)
    slot_k, slot_v = slots
    outputs, lses = [], []
    for t in range(length):
        absorbed = past + t - problem.delay  # the token that enters the slots at this step
        if absorbed >= 0:
            alpha = torch.exp(tokens["g"][absorbed].to(wide)).unsqueeze(-1)  # [H, M, 1]
            strength = tokens["s"][absorbed].to(wide).unsqueeze(-1)
            slot_k = alpha * slot_k + strength * tokens["k"][absorbed].to(wide).unsqueeze(-2)
            slot_v = alpha * slot_v + strength * tokens["v"][absorbed].to(wide).unsqueeze(-2)
        window = slice(max(0, past + t + 1 - problem.window), past + t + 1)
        keys, values = tokens["k_window"][window], tokens["v"][window]  # [w, H, ...]
        window_logits = torch.einsum("hgd,jhd->hgj", q_window[t].view(grouped), keys)
        if problem.mask_empty_slots and seen + t + 1 <= problem.delay:
            logits, attended = window_logits, values.transpose(0, 1)
        else:
            slot_logits = torch.einsum("hgd,hmd->hgm", q[t].view(grouped), slot_k.to(dtype))
            logits = torch.cat((slot_logits, window_logits), dim=-1)
            attended = torch.cat((slot_v.to(dtype), values.transpose(0, 1)), dim=1)  # [H, M + w, Dv]
        logits = logits.to(wide) * scale
        # An empty softmax (no window, no slots yet) is an output of zero and a log-sum-exp of -inf.
        weights = torch.softmax(logits, dim=-1).to(dtype)
        outputs.append(torch.einsum("hgj,hjv->hgv", weights, attended).flatten(0, 1))
        lses.append(torch.logsumexp(logits, dim=-1).flatten())
    if not outputs:
        return q.new_zeros(0, problem.q_heads, problem.value_dim), q.new_zeros(0, problem.q_heads, dtype=wide), *slots
    return torch.stack(outputs), torch.stack(lses), slot_k, slot_v
