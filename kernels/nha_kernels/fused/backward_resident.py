"""The gradients on Hopper, by kernels that keep the slots, and their gradients, on the chip."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..problem import Inputs, Problem
from .backward_rows_resident import ResidentRowsConfig, resident_rows_launches
from .backward_slots_resident import resident_slots_launches
from .backward_window_resident import resident_window_launch
from .hopper import aligned
from .primitives import Launch
from .resident import Starts


def resident_passes(
    problem: Problem, inputs: Inputs, lse: Tensor, grad_o: Tensor, grad_lse: Tensor | None, grad_final: Tensor | None,
    config: ResidentRowsConfig, found: dict[str, Tensor | None], starts: Starts | None,
) -> Iterator[Launch]:  # fmt: skip
    """As `backward.passes`."""
    q, k, v, g, grad_o = (aligned(x) for x in (inputs.q, inputs.k, inputs.v, inputs.g, grad_o))
    rope = None if inputs.rope is None else (inputs.rope[0].contiguous(), inputs.rope[1].contiguous())
    inputs = replace(inputs, q=q, k=k, v=v, g=g, rope=rope)
    launches, stored, rows, queries = resident_rows_launches(problem, inputs, lse, grad_o, grad_lse, config, starts)
    while launches:
        yield launches.pop(0)
    k, v, g = (torch.empty_like(x) for x in (k, v, g))
    g[:, max(0, problem.tokens - problem.delay) :] = 0  # they never reach the slots
    launches, behind = resident_slots_launches(problem, inputs, stored, rows, grad_o, grad_final, k, v, g)
    while launches:
        yield launches.pop(0)
    rows = replace(rows, weights=None, logits=None, terms=None)
    yield resident_window_launch(problem, replace(inputs, q=queries), rows, stored, behind, grad_o, k, v, g)
    found |= dict(q=rows.q, k=k, v=v, g=g)
