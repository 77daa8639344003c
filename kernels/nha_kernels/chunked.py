"""chunked: every valid call in plain PyTorch, on any device, in O(T) time and memory for a given window.

The slots come from `slots.py`; a block of rows meets its window as one matrix product, and one softmax weighs both.
The backward pass recomputes segment by segment. Differentiable once, in everything: log-sum-exp and state included. On
a GPU the order of the sums in it, and so the last bits, may differ from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import ROWS, Places, Plan, Segment, Source, plan, window_queries
from .problem import Inputs, Problem, Result, accumulate_dtype
from .slots import final_slots, initial_slots, mask_slots, remember, slot_index, slot_logits, slot_tokens, slot_values
from .walk import refuse_second_order, walk, walk_back


def why_not(problem: Problem) -> str | None:
    """chunked serves every valid call."""
    return None


def run(problem: Problem, inputs: Inputs) -> Result:
    """Serve a call; waits for the device only to read cu_seqlens, where there are any."""
    source, places = Source.of(problem, inputs), Places.of(problem, inputs)
    reach = min(problem.window, problem.tokens + places.recent)
    keys = reach + ROWS - 1 if reach > 0 else 0
    elements = keys * (problem.q_heads + problem.kv_heads * (problem.head_dim + problem.value_dim) // ROWS)
    work = _Work(problem, inputs.scale, places, plan(problem, inputs, elements), keys)
    window = (window_queries(problem, inputs), source.k_window, source.v)
    o, lse, final = _Chunked.apply(
        work, initial_slots(problem, inputs), inputs.q.flatten(0, 1), *window, *source.slots()
    )
    shape = (problem.batch, problem.tokens, problem.q_heads)
    slots = final_slots(problem, final) if problem.output_final_state else (None, None)
    return Result(o.view(*shape, problem.value_dim), lse.view(shape), *slots)


class _Work:
    """What the segments of one call share: `indices` and `compute` for a walk over them."""

    def __init__(self, problem: Problem, scale: float, places: Places, plan: Plan, keys: int) -> None:
        self.problem, self.scale, self.places, self.plan, self.keys = problem, scale, places, plan, keys

    def key_positions(self, segment: Segment) -> Tensor:
        """[n, keys]: the keys of a block are the window - 1 tokens before its first row, and its rows."""
        return segment.start[:, None] + ROWS - self.keys + torch.arange(self.keys, device=segment.start.device)

    def indices(self, segment: Segment) -> list[Tensor]:
        row, key = segment.row_index(), self.places.index(segment, self.key_positions(segment))
        slot = slot_index(self.problem, self.places, segment)
        return [row, row, key, key, *[slot] * (4 if self.problem.explicit_strength else 3)]

    def compute(
        self, segment: Segment, local: list[Tensor], begin: Tensor | None, carry: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """o [n * ROWS, HQ, Dv] and lse [n * ROWS, HQ], and the slots after each block."""
        problem = self.problem
        q, q_window, k_window, v_window, k, v, g = local[:7]
        tokens = slot_tokens(problem, self.places, segment, k, v, g, local[7] if len(local) > 7 else None)
        memory, after_block = remember(tokens, segment, begin, carry)
        to_slots = mask_slots(problem, self.places, segment, slot_logits(problem, memory, tokens, q))
        to_window, values = self.window(segment, q_window, k_window, v_window)
        logits = torch.cat((to_slots, to_window), dim=-1) * self.scale  # [n, ROWS, H, NG, M + keys]
        # A row with nothing to attend to has lse = -inf; 0 in its place leaves its weights at exp(-inf) = 0.
        top = logits.detach().amax(-1, keepdim=True)
        top = torch.where(top.isneginf(), torch.zeros_like(top), top)
        weights = torch.exp(logits - top)
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        total = torch.where(empty, torch.ones_like(total), total)
        lse = torch.where(empty, torch.full_like(total, float("-inf")), top + total.log()).flatten(2)
        weights = weights / total
        p_slots, p_window = weights.split((problem.slots, self.keys), dim=-1)
        o = slot_values(problem, memory, tokens, p_slots)
        o = o + (p_window.transpose(1, 2).flatten(2, 3) @ values).unflatten(2, (ROWS, -1)).transpose(1, 2)
        return (o.flatten(2, 3).flatten(0, 1), lse.flatten(0, 1)), after_block

    def window(self, segment: Segment, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the window [n, ROWS, H, NG, keys], -inf outside of it, and its values [n, H, keys, Dv].

        q [n, ROWS, HQ, D], k and v [n, keys, H, ...].
        """
        problem = self.problem
        wide = accumulate_dtype(problem.dtype)
        position = self.key_positions(segment)
        exists = (position >= self.places.oldest(segment, problem.history)) & (position < segment.length[:, None])
        k = k.to(wide).transpose(1, 2)  # [n, H, keys, D]
        v = v.to(wide).transpose(1, 2)
        v = torch.where(exists[:, None, :, None], v, torch.zeros_like(v))
        rows = q.to(wide).unflatten(2, (problem.kv_heads, problem.group)).transpose(1, 2)  # [n, H, ROWS, NG, D]
        logits = (rows.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, (ROWS, problem.group)).transpose(1, 2)
        distance = segment.rows()[:, :, None] - position[:, None, :]  # [n, ROWS, keys]
        visible = (distance >= 0) & (distance < problem.window) & exists[:, None, :]
        return logits.masked_fill(~visible[:, :, None, None, :], float("-inf")), v


class _Chunked(torch.autograd.Function):
    """(work, initial, *tensors) -> o [B * T, HQ, Dv], lse [B * T, HQ], final slots [N, H, M, E]."""

    @staticmethod
    def forward(ctx: Any, work: _Work, initial: Tensor | None, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (o, lse), final, carries = walk(work.problem, work.plan.segments, work.indices, work.compute, initial, tensors)
        ctx.work, ctx.carries = work, carries
        ctx.save_for_backward(initial, *tensors)
        rows = work.plan.row_of_token
        return o[rows].to(work.problem.dtype), lse[rows], final

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor, grad_final: Tensor) -> tuple[Any, ...]:
        refuse_second_order("chunked")
        work: _Work = ctx.work
        initial, *tensors = ctx.saved_tensors
        grad_initial, grads = walk_back(
            work.problem, work.plan.segments, work.indices, work.compute, initial, tensors, ctx.carries,
            [work.plan.over_rows(grad_o), work.plan.over_rows(grad_lse)], grad_final, ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, grad_initial, *grads
