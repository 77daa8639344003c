"""flash: a flash-attention kernel for the window, the slots of `slots.py`, merged by their log-sum-exps. CUDA only.

One autograd.Function. With lse the log-sum-exp over slots and window together and delta = sum(do * o) over the merged
output, every weight is p = exp(logit - lse) and every logit's gradient p * (do . value - delta). So the backward of
each half gets the merged output and the merged lse in place of its own, and no gradient has to pass through a
log-sum-exp (flash-attention kernels would drop it). The order of the sums in it, and so the last bits, may differ from
run to run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import flash_window
from .flash_window import Packing, window_kernel
from .layout import Places, Plan, Segment, Source, plan, window_queries
from .problem import Inputs, Problem, Result, accumulate_dtype
from .slots import final_slots, initial_slots, mask_slots, remember, slot_index, slot_logits, slot_tokens, slot_values
from .walk import refuse_second_order, walk, walk_back

DTYPES = (torch.float16, torch.bfloat16)


def why_unavailable(device_type: str) -> str | None:
    """Why `flash` cannot run on a device type of this machine at all, or None."""
    if device_type != "cuda":
        return f"flash runs flash-attention kernels, which are for CUDA only; the tensors are on {device_type}"
    return flash_window.why_unavailable()


def why_not(problem: Problem) -> str | None:
    """Why `flash` cannot serve a call: the limits of flash-attention kernels."""
    if problem.dtype not in DTYPES:
        return f"flash-attention kernels take float16 or bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.capability is not None and problem.capability < (8, 0):
        return f"flash-attention kernels need compute capability 8.0, this GPU has {problem.capability}"
    if problem.head_dim != problem.value_dim:
        return f"flash-attention kernels need D = Dv, not {problem.head_dim} and {problem.value_dim}"
    if problem.head_dim > 256 or problem.head_dim % 8:
        return f"flash-attention kernels take multiples of 8 up to 256 as head size, not {problem.head_dim}"
    if problem.window == 0:
        return "window_size = 0 leaves nothing for a flash-attention kernel to do"
    if problem.sequences > 65535:
        return f"flash-attention kernels take up to 65535 sequences, not {problem.sequences}"
    if problem.return_lse and problem.needs_grad:
        return "flash-attention kernels have no gradient for the log-sum-exp"
    return None


def run(problem: Problem, inputs: Inputs) -> Result:
    """Serve a call; waits for the device only to read cu_seqlens, where there are any."""
    source, places = Source.of(problem, inputs), Places.of(problem, inputs)
    cut = plan(problem, inputs, 0)
    keys, values, packing = _pack_window(problem, inputs, source, places, cut.longest)
    work = _Work(problem, inputs.scale, places, cut, packing)
    o, lse, final = _Flash.apply(
        work, initial_slots(problem, inputs), window_queries(problem, inputs), keys, values,
        inputs.q.flatten(0, 1), *source.slots(),
    )  # fmt: skip
    shape = (problem.batch, problem.tokens, problem.q_heads)
    slots = final_slots(problem, final) if problem.output_final_state else (None, None)
    return Result(o.view(*shape, problem.value_dim), lse.view(shape), *slots)


def _pack_window(
    problem: Problem, inputs: Inputs, source: Source, places: Places, longest: int
) -> tuple[Tensor, Tensor, Packing]:
    """The window's keys and values, each sequence's recent tokens before those of the call, without gaps."""
    cu_q = inputs.cu_seqlens
    if cu_q is None:
        cu_q = torch.arange(problem.sequences + 1, device=inputs.q.device, dtype=torch.int32) * problem.tokens
    if places.seen is None or problem.window == 1:
        packing = Packing(cu_q, cu_q, longest, longest, problem.window, inputs.scale)
        return source.k_window[: places.tokens], source.v[: places.tokens], packing

    # How many recent tokens there are is known on the device only: pack to an upper bound, leave the end unused.
    length = cu_q.diff().to(torch.int64)
    recent = places.seen.clamp(max=min(places.recent, problem.window - 1))
    cu_k = torch.cat((recent.new_zeros(1), (recent + length).cumsum(0)))
    place = torch.arange(places.tokens + problem.sequences * places.recent, device=cu_q.device)
    sequence = (torch.searchsorted(cu_k, place, right=True) - 1).clamp(max=problem.sequences - 1)
    position = place - cu_k[sequence] - recent[sequence]
    in_call = (cu_q.to(torch.int64)[sequence] + position).clamp(max=places.tokens - 1)
    in_ring = places.tokens + sequence * places.recent + (places.seen[sequence] + position) % places.recent
    index = torch.where(position < 0, in_ring, in_call)
    packing = Packing(cu_q, cu_k.to(torch.int32), longest, longest + places.recent, problem.window, inputs.scale)
    return source.k_window[index], source.v[index], packing


class _Work:
    """What the segments of one call share. The slots of a segment, given its rows' log-sum-exp or on their own."""

    def __init__(self, problem: Problem, scale: float, places: Places, plan: Plan, packing: Packing) -> None:
        self.problem, self.scale, self.places, self.plan, self.packing = problem, scale, places, plan, packing

    def indices(self, segment: Segment) -> list[Tensor]:
        """For the tensors (over all rows: lse of the merged softmax or of the window alone), q, k, v, g and s."""
        row = segment.row_index()
        slot = slot_index(self.problem, self.places, segment)
        return [row, row, *[slot] * (4 if self.problem.explicit_strength else 3)]

    def _logits(
        self, segment: Segment, local: list[Tensor], begin: Tensor | None, carry: Tensor
    ) -> tuple[Any, Any, Tensor, Tensor]:
        _, q, k, v, g = local[:5]
        tokens = slot_tokens(self.problem, self.places, segment, k, v, g, local[5] if len(local) > 5 else None)
        memory, after_block = remember(tokens, segment, begin, carry)
        logits = slot_logits(self.problem, memory, tokens, q) * self.scale
        return memory, tokens, mask_slots(self.problem, self.places, segment, logits), after_block

    def merge(
        self, segment: Segment, local: list[Tensor], begin: Tensor | None, carry: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Forward. local[0]: the window's lse [n, ROWS, HQ]. Gives the slots' part of o [n * ROWS, HQ, Dv] and the
        merged lse [n * ROWS, HQ]."""
        memory, tokens, logits, after_block = self._logits(segment, local, begin, carry)
        window_lse = local[0].unflatten(2, (-1, self.problem.group)).unsqueeze(-1)  # [n, ROWS, H, NG, 1]
        lse = torch.logaddexp(logits.logsumexp(-1, keepdim=True), window_lse)
        o = slot_values(self.problem, memory, tokens, torch.exp(logits - lse))
        return (o.flatten(2, 3).flatten(0, 1), lse.flatten(2).flatten(0, 1)), after_block

    def weigh(
        self, segment: Segment, local: list[Tensor], begin: Tensor | None, carry: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Backward. local[0]: the merged lse, a constant. Gives the slots' part of o and their share of the softmax
        [n * ROWS, HQ]: with gradients do and -delta, the two together have the gradient p * (do . value - delta)."""
        memory, tokens, logits, after_block = self._logits(segment, local, begin, carry)
        lse = local[0].detach().unflatten(2, (-1, self.problem.group)).unsqueeze(-1)
        p = torch.exp(logits - lse)
        o = slot_values(self.problem, memory, tokens, p)
        return (o.flatten(2, 3).flatten(0, 1), p.sum(-1).flatten(2).flatten(0, 1)), after_block


class _Flash(torch.autograd.Function):
    """(work, initial, q_window, keys, values, q, k, v, g, s) -> o [B * T, HQ, Dv], lse [B * T, HQ], final slots."""

    @staticmethod
    def forward(
        ctx: Any, work: _Work, initial: Tensor | None, q_window: Tensor, keys: Tensor, values: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem, rows = work.problem, work.plan.row_of_token
        q_window, keys, values = q_window.contiguous(), keys.contiguous(), values.contiguous()
        kernel = window_kernel(problem.capability or (0, 0))
        window_o, window_lse, saved = kernel.forward(q_window, keys, values, work.packing)
        window_lse = window_lse.transpose(0, 1).contiguous()  # [B * T, HQ]
        (slots_o, lse), final, carries = walk(
            problem, work.plan.segments, work.indices, work.merge, initial, (window_lse, *tensors)
        )
        lse = lse[rows]
        share = torch.exp(window_lse - lse)[..., None]
        o = (slots_o[rows] + share * window_o).to(problem.dtype)
        ctx.work, ctx.kernel, ctx.carries, ctx.saved = work, kernel, carries, saved
        ctx.save_for_backward(initial, q_window, keys, values, o, lse, *tensors)
        ctx.mark_non_differentiable(lse)
        return o, lse, final

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor, grad_final: Tensor) -> tuple[Any, ...]:
        refuse_second_order("flash")
        work: _Work = ctx.work
        initial, q_window, keys, values, o, lse, *tensors = ctx.saved_tensors
        grad_o = grad_o.contiguous()
        grad_q_window, grad_keys, grad_values = ctx.kernel.backward(
            grad_o, q_window, keys, values, o, lse.transpose(0, 1).contiguous(), work.packing, ctx.saved
        )
        if work.packing.cu_k is not work.packing.cu_q:
            # The packing may end before its buffer does, and the kernel leaves the gradients of what follows unwritten.
            unused = torch.arange(len(keys), device=keys.device) >= work.packing.cu_k[-1]
            grad_keys, grad_values = (x.masked_fill(unused[:, None, None], 0) for x in (grad_keys, grad_values))
        wide = accumulate_dtype(o.dtype)
        delta = (grad_o.to(wide) * o.to(wide)).sum(-1)  # [B * T, HQ]
        grad_initial, grads = walk_back(
            work.problem, work.plan.segments, work.indices, work.weigh, initial, (lse, *tensors), ctx.carries,
            [work.plan.over_rows(grad_o), work.plan.over_rows(-delta)], grad_final, (False, *ctx.needs_input_grad[5:]),
        )  # fmt: skip
        return None, grad_initial, grad_q_window, grad_keys, grad_values, *grads[1:]
