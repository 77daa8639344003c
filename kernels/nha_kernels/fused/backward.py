"""The gradients of the fused forward: what the passes over rows, slots and window keys find, put together.

Kept from the forward pass: its inputs and the log-sum-exp, and for the kernels for Hopper the slots before each of its
segments; the slots every 16 tokens are computed anew.
Deterministic: nothing is added up in an order that could change. With a rotary embedding the window's queries and keys
are rotated once more, and their gradients back, by plain PyTorch, where the kernels do not do so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..arguments import TENSORS, Arguments
from ..layout import token_positions
from ..problem import Inputs, Problem, Result
from ..rope import rotate
from ..slots import final_slots, initial_slots
from ..walk import refuse_second_order
from .backward_resident import resident_passes
from .backward_rows import BLOCK, RowsConfig, rows_launch
from .backward_rows_resident import ResidentRowsConfig, why_not_resident
from .backward_slots import SlotsConfig, slots_launches
from .backward_window import WindowConfig, window_launch
from .primitives import Launch, Operands, processors_of
from .resident import Starts
from .states import StatesConfig, state_launches


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """How a backward pass is launched."""

    states: StatesConfig
    rows: RowsConfig
    slots: SlotsConfig
    window: WindowConfig

    @classmethod
    def default(cls, problem: Problem) -> BackwardConfig:
        """By head size, group and dtype; no search, no measurement."""
        states = StatesConfig.default(problem, chunk=BLOCK)
        slots = max(16, triton.next_power_of_2(problem.slots))
        widest = triton.next_power_of_2(max(problem.head_dim, problem.value_dim))
        if problem.dtype == torch.float32:  # twice the bytes and no tensor cores: small tiles
            return cls(
                states,
                RowsConfig(
                    heads=1, keys=16, slots=min(32 if widest > 128 else 64, slots), warps=4, stages=1, anchored=False
                ),
                SlotsConfig(
                    heads=1, slots=min(32, slots), columns=max(16, min(64, widest)), warps=4, stages=1, anchored=False
                ),
                WindowConfig(keys=16, heads=1, slots=min(64, slots), warps=4, stages=1),
            )
        anchored = problem.dtype == torch.bfloat16
        heads = triton.next_power_of_2(problem.group)
        warps = 8 if widest > 128 else 4
        slots = min(64, slots)
        return cls(
            states,
            RowsConfig(
                heads=min(2, heads), keys=32 if widest > 128 else 64, slots=slots, warps=warps, stages=1,
                anchored=anchored,
            ),
            SlotsConfig(
                heads=min(4, heads), slots=slots, columns=max(16, min(128, widest)), warps=4, stages=1,
                anchored=anchored,
            ),
            WindowConfig(keys=32, heads=min(2 if widest > 128 else 4, heads), slots=slots, warps=warps, stages=2),
        )  # fmt: skip


@lru_cache  # most calls are like one of the last
def choose(problem: Problem, processors: int) -> BackwardConfig | ResidentRowsConfig:
    """The kernels that find a call's gradients on a GPU with so many multiprocessors, and how they are launched."""
    if why_not_resident(problem) is None:
        return ResidentRowsConfig.default(problem, processors)
    return BackwardConfig.default(problem)


def _config(problem: Problem, inputs: Inputs) -> BackwardConfig | ResidentRowsConfig:
    """`choose`, but for gradients of a rotary embedding's tables, which not all kernels leave a way to."""
    if inputs.rope is not None and any(table.requires_grad for table in inputs.rope):
        return BackwardConfig.default(problem)
    return choose(problem, processors_of(inputs.q.device))


def passes(
    problem: Problem, inputs: Inputs, lse: Tensor, grad_o: Tensor, grad_lse: Tensor | None, grad_final: Tensor | None,
    config: BackwardConfig | ResidentRowsConfig, found: dict[str, Tensor | None], starts: Starts | None = None,
) -> Iterator[Launch]:  # fmt: skip
    """The launches, in order. Each is to be done before the next is asked for: what is no longer needed is let go then,
    and the next is given its memory.

    With a `BackwardConfig` the window's queries and keys must be there: no rope. found: gets what the launches fill,
    gradients by the names of `Arguments`. starts: of the forward pass, if it had any.
    """
    if isinstance(config, ResidentRowsConfig):
        yield from resident_passes(problem, inputs, lse, grad_o, grad_lse, grad_final, config, found, starts)
        return
    operands = Operands.of(problem, inputs)
    alone = replace(problem, output_final_state=False)
    launches, stored = state_launches(alone, operands, initial_slots(problem, inputs), config.states)
    while launches:
        yield launches.pop(0)
    launch, rows = rows_launch(problem, inputs, operands, stored, lse, grad_o, grad_lse, config.rows)
    yield launch
    launches, slots = slots_launches(
        problem, inputs, operands, stored, config.states, rows, grad_o, grad_final, config.slots
    )
    del launch, stored
    rows = replace(rows, weights=None, logits=None, terms=None)
    while launches:
        yield launches.pop(0)
    launch, tokens, recent = window_launch(problem, inputs, operands, rows, slots, grad_o, config.window)
    yield launch
    found |= dict(
        q=rows.q, k=tokens.k, v=tokens.v, g=tokens.g, s=tokens.s, q_window=rows.q_window, k_window=tokens.k_window
    )
    if inputs.state is not None:
        assert slots.initial is not None
        found["state_slot_k"], found["state_slot_v"] = final_slots(problem, slots.initial)
        if inputs.state.capacity > 0:
            found |= {f"state_{name}": x for name, x in recent._asdict().items()}


def gradients(
    problem: Problem, inputs: Inputs, lse: Tensor, grad_o: Tensor, grad_lse: Tensor | None, grad_final: Tensor | None,
    starts: Starts | None,
) -> dict[str, Tensor | None]:  # fmt: skip
    """The gradients of a call that had the log-sum-exp lse, by the names of `Arguments`; grad_final [N, H, M, E]: of
    the slots after it; starts: as `passes` takes them."""
    config = _config(problem, inputs)
    asked, rotation = inputs, None
    if isinstance(config, BackwardConfig):
        rotation = _Rotation.of(problem, inputs)
    if rotation is not None:
        problem, inputs = replace(problem, positions="given"), rotation.rotated(inputs)
    q_window = None if inputs.q_window is None else inputs.q_window.contiguous()
    inputs = replace(inputs, q=inputs.q.contiguous(), q_window=q_window)
    found: dict[str, Tensor | None] = {}
    with torch.cuda.device(lse.device) if problem.device == "cuda" else nullcontext():
        for launch in passes(problem, inputs, lse, grad_o, grad_lse, grad_final, config, found, starts):
            launch()
            del launch  # it would hold what its pass lets go
    # Where the window's queries or keys were not given, they came from q and k.
    for name, window, given in (
        ("q", "q_window", asked.q_window), ("k", "k_window", asked.k_window),
        ("state_k", "state_k_window", getattr(asked.state, "k_window", None)),
    ):  # fmt: skip
        own, other = found.get(name), found.get(window)
        if given is None and own is not None and other is not None:
            found[name] = own + (other if rotation is None else rotation.turned_back(other, name, asked, found))
            del found[window]
    return found


@dataclass(frozen=True, slots=True)
class _Rotation:
    """A rotary embedding as it meets a call's tokens and its state's: their positions, the latter None without any."""

    cos: Tensor
    sin: Tensor
    position: Tensor
    recent: Tensor | None

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs) -> _Rotation | None:
        if inputs.rope is None:
            return None
        # Places of a ring that hold nothing count as 0.
        recent = None if inputs.state is None else inputs.state.recent_positions().clamp(min=0)
        return cls(*inputs.rope, token_positions(problem, inputs), recent)

    def rotated(self, inputs: Inputs) -> Inputs:
        """The call with its window's queries and keys ready-made."""
        q, k = (rotate(x, self.cos, self.sin, self.position) for x in (inputs.q, inputs.k))
        state = inputs.state
        if state is not None and self.recent is not None:
            state = replace(state, k_window=rotate(state.k, self.cos, self.sin, self.recent))
        return replace(inputs, rope=None, q_window=q, k_window=k, state=state)

    def turned_back(self, grad: Tensor, name: str, asked: Inputs, found: dict[str, Tensor | None]) -> Tensor:
        """The gradient of what was rotated, for what it was rotated from: q, k or state_k; adds those of the tables to
        what was found, where they want one."""
        position = self.recent if name == "state_k" else self.position
        assert position is not None
        if self.cos.requires_grad or self.sin.requires_grad:
            x = asked.state.k if name == "state_k" and asked.state is not None else getattr(asked, name)
            cos, sin = (table.detach().requires_grad_() for table in (self.cos, self.sin))
            with torch.enable_grad():
                rotated = rotate(x.detach(), cos, sin, position)
            for table, own in zip(("cos", "sin"), torch.autograd.grad(rotated, (cos, sin), grad), strict=True):
                before = found.get(table)
                found[table] = own if before is None else before + own
        return rotate(grad, self.cos, -self.sin, position)


class _Fused(torch.autograd.Function):
    """A call's `Arguments` -> o, lse, slot_k, slot_v as in `Result`."""

    @staticmethod
    def forward(
        ctx: Any, problem: Problem, serve: Callable[[Problem, Inputs], tuple[Result, Starts | None]], *arguments: Any
    ) -> Result:
        call = Arguments(*arguments)
        inputs = call.inputs()
        result, starts = serve(replace(problem, return_lse=True), inputs)
        if not isinstance(_config(problem, inputs), ResidentRowsConfig):
            starts = None  # of no use
        # A state may move on before the backward pass asks.
        saved = (
            x.clone() if isinstance(x, Tensor) and name.startswith("state_") else x
            for name, x in zip(Arguments._fields[:TENSORS], call[:TENSORS], strict=True)
        )
        ctx.save_for_backward(*saved, result.lse, None if starts is None else starts.before)
        ctx.tiles = None if starts is None else starts.tiles
        ctx.problem = problem
        ctx.numbers = call[TENSORS:]
        ctx.set_materialize_grads(False)
        return result if problem.return_lse else result._replace(lse=None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order("triton")
        *tensors, lse, before = ctx.saved_tensors
        starts = None if ctx.tiles is None else Starts(ctx.tiles, before)
        problem, inputs = ctx.problem, Arguments(*tensors, *ctx.numbers).inputs()
        grad_o, grad_lse, grad_k, grad_v = grads
        if grad_o is None:
            grad_o = inputs.q.new_zeros(*inputs.q.shape[:3], problem.value_dim)
        grad_o = grad_o.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        grad_final = None
        if grad_k is not None or grad_v is not None:
            shape = (problem.sequences, problem.kv_heads, problem.slots)
            grad_k = lse.new_zeros(*shape, problem.head_dim) if grad_k is None else grad_k
            grad_v = lse.new_zeros(*shape, problem.value_dim) if grad_v is None else grad_v
            grad_final = torch.cat((grad_k, grad_v), dim=-1)
        with torch.autocast(problem.device, enabled=False):
            found = gradients(problem, inputs, lse, grad_o, grad_lse, grad_final, starts)
        return (None, None, *(found.get(name) for name in Arguments._fields))


def run_differentiably(
    problem: Problem, inputs: Inputs, serve: Callable[[Problem, Inputs], tuple[Result, Starts | None]]
) -> Result:
    """Serve a call by `serve`, which has no gradients of its own, with those found here."""
    return Result(*_Fused.apply(problem, serve, *Arguments.of(problem, inputs, "triton")))
