"""NHAState: everything that the next segment of a sequence needs from the segments before it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .problem import Inputs, Problem, Result, accumulate_dtype, history_length

# The buffers that hold recent tokens, in ring order.
RECENT = ("k", "v", "g", "s", "k_window")


@dataclass(frozen=True, slots=True)
class NHAState:
    """Slots, recent tokens and a token count for each of N sequences.

    slot_k [N, H, M, D], slot_v [N, H, M, Dv]: the slots after everything but the last `slot_delay` tokens, fp32
        (float64 for float64 inputs).
    k [N, R, H, D], v [N, R, H, Dv], g [N, R, H, M], and s, k_window where the calls give them: the recent tokens, as a
        ring. The token at position p of its sequence lies at p % R. R is max(slot_delay, window_size - 1), or less as
        long as no sequence can have seen that many tokens.
    seen [N] int64: how many tokens each sequence has seen. It stays on the device: nothing here waits for a GPU.
    window_size, slot_delay: of the calls that the state belongs to.
    """

    slot_k: Tensor
    slot_v: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    s: Tensor | None
    k_window: Tensor | None
    seen: Tensor
    window_size: int
    slot_delay: int

    @classmethod
    def zeros(
        cls,
        sequences: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        window_size: int,
        *,
        value_dim: int | None = None,
        slot_delay: int | None = None,
        dtype: torch.dtype = torch.float32,
        gate_dtype: torch.dtype | None = None,
        with_s: bool = False,
        with_k_window: bool = False,
        device: torch.device | str | None = None,
    ) -> NHAState:
        """The state of sequences that have seen nothing, with room for every recent token.

        `dtype` is the dtype of k and v, `gate_dtype` that of g (default: the same); `with_s` and `with_k_window` make
        room for what calls with an explicit `s` or `k_window` have to remember.
        """
        value_dim = head_dim if value_dim is None else value_dim
        slot_delay = window_size if slot_delay is None else slot_delay
        ring = (sequences, history_length(window_size, slot_delay), kv_heads)
        slot = (sequences, kv_heads, slots)
        wide = accumulate_dtype(dtype)
        gate_dtype = dtype if gate_dtype is None else gate_dtype

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            slot_k=zeros(*slot, head_dim, dtype=wide),
            slot_v=zeros(*slot, value_dim, dtype=wide),
            k=zeros(*ring, head_dim, dtype=dtype),
            v=zeros(*ring, value_dim, dtype=dtype),
            g=zeros(*ring, slots, dtype=gate_dtype),
            s=zeros(*ring, slots, dtype=gate_dtype) if with_s else None,
            k_window=zeros(*ring, head_dim, dtype=dtype) if with_k_window else None,
            seen=zeros(sequences, dtype=torch.int64),
            window_size=window_size,
            slot_delay=slot_delay,
        )

    @property
    def capacity(self) -> int:
        """Recent tokens that the ring has room for, R."""
        return self.k.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its name, without the absent ones."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in pairs if isinstance(value, Tensor)}

    def detach(self) -> NHAState:
        """The same numbers, cut from the autograd graph."""
        return self._with({name: x.detach() for name, x in self.tensors().items()})

    def clone(self) -> NHAState:
        """A copy that shares no memory."""
        return self._with({name: x.clone() for name, x in self.tensors().items()})

    def with_full_capacity(self) -> NHAState:
        """The state with room for every recent token, as `nha_decode_step` needs it: a copy, or itself if it has it."""
        missing = history_length(self.window_size, self.slot_delay) - self.capacity
        if missing <= 0:
            return self
        # A ring that is not full-sized has never wrapped: position p lies at p, and room is added behind.
        grown = {}
        for name, x in self.tensors().items():
            room = x.new_zeros(len(x), missing, *x.shape[2:]) if name in RECENT else None
            grown[name] = x.clone() if room is None else torch.cat((x, room), dim=1)
        return self._with(grown)

    def _with(self, tensors: dict[str, Any]) -> NHAState:
        return replace(self, **tensors)

    def recent_positions(self) -> Tensor:
        """[N, R] int64: the position in its sequence of what each ring place holds; negative where it is empty."""
        place = torch.arange(self.capacity, device=self.seen.device)
        last = self.seen[:, None] - 1
        return last - (last - place) % max(self.capacity, 1)


def advance(problem: Problem, inputs: Inputs, result: Result) -> NHAState:
    """The state after a call: its slots from `result`, its ring filled from the call's tokens and the ring before.

    Differentiable, and without a wait for the device: lengths and positions stay tensors.
    """
    assert result.slot_k is not None and result.slot_v is not None
    before = inputs.state
    device = inputs.q.device
    if inputs.cu_seqlens is None:
        offset = torch.arange(problem.sequences, device=device) * problem.tokens
        length = torch.full_like(offset, problem.tokens)
    else:
        bounds = inputs.cu_seqlens.to(torch.int64)
        offset, length = bounds[:-1], bounds.diff()
    seen = torch.zeros_like(offset) if before is None else before.seen
    capacity_before = 0 if before is None else before.capacity
    capacity = min(problem.history, capacity_before + problem.tokens)

    place = torch.arange(capacity, device=device)
    last = (seen + length - 1)[:, None]
    position = last - (last - place) % max(capacity, 1)  # [N, R] which token lies at each place; negative: none
    local = position - seen[:, None]
    from_call = local >= 0
    from_ring = (local < 0) & (position >= 0)
    call_index = (offset[:, None] + local.clamp(min=0)).clamp(max=problem.batch * problem.tokens - 1)

    def fill(x: Tensor | None, ring: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        recent = x.flatten(0, 1)[call_index]
        kept = torch.zeros_like(recent)
        if ring is not None and capacity_before > 0:
            row = torch.arange(problem.sequences, device=device)[:, None]
            kept = ring[row, position % capacity_before]
        shape = (*from_call.shape, 1, 1)
        kept = torch.where(from_ring.view(shape), kept, torch.zeros_like(kept))
        return torch.where(from_call.view(shape), recent, kept)

    rings = {name: fill(getattr(inputs, name), getattr(before, name, None)) for name in RECENT}
    k, v, g = rings["k"], rings["v"], rings["g"]
    assert k is not None and v is not None and g is not None
    return NHAState(
        slot_k=result.slot_k.contiguous(),
        slot_v=result.slot_v.contiguous(),
        k=k,
        v=v,
        g=g,
        s=rings["s"],
        k_window=rings["k_window"],
        seen=seen + length,
        window_size=problem.window,
        slot_delay=problem.delay,
    )
