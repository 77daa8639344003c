"""A call as one flat list of tensors and numbers, as autograd and torch.library want it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .problem import Inputs, Problem
from .state import NHAState


class Arguments(NamedTuple):
    """The tensors of a call and of its state, then its numbers; window, delay as in `Problem`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    s: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    q_window: Tensor | None
    k_window: Tensor | None
    cu_seqlens: Tensor | None
    state_slot_k: Tensor | None
    state_slot_v: Tensor | None
    state_k: Tensor | None
    state_v: Tensor | None
    state_g: Tensor | None
    state_s: Tensor | None
    state_k_window: Tensor | None
    state_seen: Tensor | None
    window: int
    delay: int
    scale: float
    mask_empty_slots: bool
    output_final_state: bool
    return_lse: bool
    needs_grad: bool
    backend: str

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs, backend: str) -> Arguments:
        """Take a call apart."""
        cos, sin = (None, None) if inputs.rope is None else inputs.rope
        state = {f"state_{name}": getattr(inputs.state, name, None) for name in STATE}
        return cls(
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.s, cos, sin, inputs.q_window, inputs.k_window,
            inputs.cu_seqlens, **state, window=problem.window, delay=problem.delay, scale=inputs.scale,
            mask_empty_slots=problem.mask_empty_slots, output_final_state=problem.output_final_state,
            return_lse=problem.return_lse, needs_grad=problem.needs_grad, backend=backend,
        )  # fmt: skip

    def inputs(self) -> Inputs:
        """Put the call's tensors together again."""
        state = None
        if self.state_seen is not None:
            tensors: dict[str, Any] = {name: getattr(self, f"state_{name}") for name in STATE}
            state = NHAState(**tensors, window_size=self.window, slot_delay=self.delay)
        rope = None if self.cos is None or self.sin is None else (self.cos, self.sin)
        return Inputs(
            self.q, self.k, self.v, self.g, self.s, rope, self.q_window, self.k_window, self.scale, self.cu_seqlens,
            state,
        )  # fmt: skip

    def unpack(self) -> tuple[Problem, Inputs]:
        """Put the call together again."""
        inputs = self.inputs()
        problem = Problem.of(
            inputs, self.window, self.delay, mask_empty_slots=self.mask_empty_slots, return_lse=self.return_lse,
            output_final_state=self.output_final_state, needs_grad=self.needs_grad,
        )  # fmt: skip
        return problem, inputs


STATE = tuple(name.removeprefix("state_") for name in Arguments._fields if name.startswith("state_"))
TENSORS = Arguments._fields.index("window")  # how many arguments are tensors
