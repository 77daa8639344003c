"""naive: the definition read aloud, token by token. The judge of every other implementation.

Any device, any floating dtype, differentiable by autograd, O(T (M + W)) time in a Python loop. In a 16-bit dtype it is
the same mathematics in the same precision that a kernel has: slots and softmax in fp32, products in the input dtype.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .gates import write_strength
from .problem import Inputs, Problem, Result, accumulate_dtype
from .rope import rotate
from .state import RECENT, NHAState


def why_not(problem: Problem) -> str | None:
    """naive serves every valid call."""
    return None


def run(problem: Problem, inputs: Inputs) -> Result:
    """Serve a call: the sequences of a plain batch side by side, packed or continued ones one after the other.

    Reads cu_seqlens and the state's token counts on the host.
    """
    named = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "s", "q_window", "k_window")}
    tensors = {name: x for name, x in named.items() if x is not None}
    if inputs.cu_seqlens is None and inputs.state is None:
        results = [_sequences(problem, inputs, tensors, None)]
    elif inputs.cu_seqlens is None:
        parts = ({name: x[n : n + 1] for name, x in tensors.items()} for n in range(problem.sequences))
        results = [_sequences(problem, inputs, part, n) for n, part in enumerate(parts)]
    else:
        parts = ({name: x[:, a:b] for name, x in tensors.items()} for a, b in pairwise(inputs.cu_seqlens.tolist()))
        results = [_sequences(problem, inputs, part, n) for n, part in enumerate(parts)]
    o, lse = (torch.cat([result[i].flatten(0, 1) for result in results]) for i in (0, 1))
    slot_k, slot_v = (torch.cat([result[i] for result in results]) for i in (2, 3))
    shape = (problem.batch, problem.tokens, problem.q_heads)
    return Result(o.view(*shape, problem.value_dim), lse.view(shape), slot_k, slot_v)


def _sequences(
    problem: Problem, inputs: Inputs, own: dict[str, Tensor], n: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S sequences of one length with nothing before them, or (S = 1) sequence n of the state; `own` [S, T, ...]."""
    state = inputs.state
    past: dict[str, Tensor] = {}
    seen = 0
    if state is not None:
        seen = int(state.seen[n])
        past = _past(state, n or 0, seen)
        slot_k, slot_v = state.slot_k[n, None], state.slot_v[n, None]
    else:
        shape = (len(own["q"]), problem.kv_heads, problem.slots)
        wide = accumulate_dtype(problem.dtype)
        slot_k = inputs.q.new_zeros(*shape, problem.head_dim, dtype=wide)
        slot_v = inputs.q.new_zeros(*shape, problem.value_dim, dtype=wide)

    tokens = {name: torch.cat((past[name], own[name]), dim=1) if past else own[name] for name in ("k", "v", "g")}
    for name in ("s", "k_window"):
        if name in own:
            tokens[name] = torch.cat((past[name], own[name]), dim=1) if past else own[name]
    tokens.setdefault("k_window", tokens["k"])
    q, q_window = own["q"], own.get("q_window", own["q"])
    if inputs.rope is not None:
        position = torch.arange(tokens["k"].shape[1], device=q.device) + seen - tokens["k"].shape[1] + q.shape[1]
        q_window = rotate(q, *inputs.rope, position[len(position) - q.shape[1] :])
        tokens["k_window"] = rotate(tokens["k"], *inputs.rope, position)
    return _steps(problem, inputs.scale, q, q_window, tokens, slot_k, slot_v, seen)


def _past(state: NHAState, n: int, seen: int) -> dict[str, Tensor]:
    """The recent tokens of sequence n, oldest first, [1, past, ...]; empty without room for any."""
    if state.capacity == 0:
        return {}
    places = [p % state.capacity for p in range(max(0, seen - state.capacity), seen)]
    rings = {name: getattr(state, name) for name in RECENT}
    return {name: ring[n, places][None] for name, ring in rings.items() if ring is not None}


def _steps(
    problem: Problem,
    scale: float,
    q: Tensor,
    q_window: Tensor,
    tokens: dict[str, Tensor],
    slot_k: Tensor,
    slot_v: Tensor,
    seen: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token by token: q [S, T, HQ, D], tokens [S, past + T, H, ...], slots [S, H, M, ...] -> o, lse and the slots."""
    length, dtype, wide = q.shape[1], problem.dtype, accumulate_dtype(problem.dtype)
    past = tokens["k"].shape[1] - length
    heads = (problem.kv_heads, problem.group)
    outputs, lses = [], []
    for t in range(length):
        absorbed = past + t - problem.delay  # the token that enters the slots at this step
        if absorbed >= 0:
            gate = tokens["g"][:, absorbed].to(wide).unsqueeze(-1)  # [S, H, M, 1]
            alpha = torch.exp(gate)
            strength = tokens["s"][:, absorbed].to(wide).unsqueeze(-1) if "s" in tokens else write_strength(gate)
            slot_k = alpha * slot_k + strength * tokens["k"][:, absorbed].to(wide).unsqueeze(-2)
            slot_v = alpha * slot_v + strength * tokens["v"][:, absorbed].to(wide).unsqueeze(-2)
        window = slice(max(0, past + t + 1 - problem.window), past + t + 1)
        keys, values = tokens["k_window"][:, window], tokens["v"][:, window]  # [S, w, H, ...]
        logits = torch.einsum("nhgd,njhd->nhgj", q_window[:, t].unflatten(1, heads), keys)
        attended = values.transpose(1, 2)  # [S, H, w, Dv]
        if not (problem.mask_empty_slots and seen + t + 1 <= problem.delay):
            slot_logits = torch.einsum("nhgd,nhmd->nhgm", q[:, t].unflatten(1, heads), slot_k.to(dtype))
            logits = torch.cat((slot_logits, logits), dim=-1)
            attended = torch.cat((slot_v.to(dtype), attended), dim=2)
        logits = logits.to(wide) * scale
        # An empty softmax (no window, no slots yet) is an output of zero and a log-sum-exp of -inf.
        weights = torch.softmax(logits, dim=-1).to(dtype)
        outputs.append(torch.einsum("nhgj,nhjv->nhgv", weights, attended).flatten(1, 2))
        lses.append(torch.logsumexp(logits, dim=-1).flatten(1, 2))
    if not outputs:
        rows = (len(q), 0, problem.q_heads)
        return q.new_zeros(*rows, problem.value_dim), q.new_zeros(rows, dtype=wide), slot_k, slot_v
    return torch.stack(outputs, dim=1), torch.stack(lses, dim=1), slot_k, slot_v
