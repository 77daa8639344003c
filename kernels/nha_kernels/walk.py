"""A walk over the segments of a call, forward and back, with the slots handed from each to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import ROWS, Segment
from .problem import Problem, accumulate_dtype

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
