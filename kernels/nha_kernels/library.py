"""The operator as torch.library has it: `nha_kernels::forward`, and `nha_kernels::backward` for its gradients.

`torch.compile` makes a call one node of its graph, for any number of tokens, and does not look inside: which
implementation serves it is chosen when the node runs. Only compiled calls come here. The backward node has nothing but
the inputs, and computes the forward pass anew, where an eager call keeps what its implementation needs; and through
PyTorch's dispatcher a call takes its host 30 microseconds longer (measured on a CPU), as long as all the checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import dispatch
from .arguments import TENSORS, Arguments
from .problem import Inputs, Problem, Result, accumulate_dtype

SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool", str: "str"}
SCHEMA = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Arguments).items())


def run(problem: Problem, inputs: Inputs, backend: str) -> Result:
    """Serve a checked call as one node of a graph."""
    o, lse, slot_k, slot_v = torch.ops.nha_kernels.forward(*Arguments.of(problem, inputs, backend))
    slots = (slot_k, slot_v) if problem.output_final_state else (None, None)
    return Result(o, lse if problem.return_lse else None, *slots)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """o, lse, slot_k, slot_v as in `Result`; empty where not asked for."""
    given = Arguments(*arguments)
    result = dispatch.run(*given.unpack(), given.backend)
    empty = given.q.new_empty(0, dtype=accumulate_dtype(given.q.dtype))
    lse = result.lse if given.return_lse else None
    slots = (result.slot_k, result.slot_v) if given.output_final_state else (None, None)
    return tuple(_apart([empty if x is None else x for x in (result.o, lse, *slots)], given[:TENSORS]))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    given = Arguments(*arguments)
    problem, _ = given.unpack()
    rows = (problem.batch, problem.tokens, problem.q_heads)
    slots = (problem.sequences, problem.kv_heads, problem.slots)
    state, wide = given.output_final_state, accumulate_dtype(problem.dtype)
    return (
        given.q.new_empty(*rows, problem.value_dim),
        given.q.new_empty(rows if given.return_lse else 0, dtype=wide),
        given.q.new_empty((*slots, problem.head_dim) if state else 0, dtype=wide),
        given.q.new_empty((*slots, problem.value_dim) if state else 0, dtype=wide),
    )


def _backward(*arguments: Any) -> list[Tensor]:
    """The gradients of the tensors that need one, in their order, from those of the four results."""
    grads, given, needed = arguments[:4], arguments[4:-1], arguments[-1]
    tensors: list[Any] = [
        x if x is None else x.detach().requires_grad_(need) for x, need in zip(given[:TENSORS], needed, strict=True)
    ]
    call = Arguments(*tensors, *given[TENSORS:])
    problem, inputs = call.unpack()
    with torch.enable_grad():
        result = dispatch.run(problem, inputs, call.backend)
    asked = (True, call.return_lse, call.output_final_state, call.output_final_state)
    outputs = {i: x for i, x in enumerate(result) if asked[i] and x is not None and x.requires_grad}
    wanted = [x for x in tensors if x is not None and x.requires_grad]
    with torch.autocast(problem.device, enabled=False):
        got = torch.autograd.grad(list(outputs.values()), wanted, [grads[i] for i in outputs], materialize_grads=True)
    return _apart(got, arguments)


def _fake_backward(*arguments: Any) -> list[Tensor]:
    tensors, needed = arguments[4 : 4 + TENSORS], arguments[-1]
    return [x.new_empty(x.shape) for x, need in zip(tensors, needed, strict=True) if need]


def _apart(results: Iterable[Tensor], arguments: Iterable[Any]) -> list[Tensor]:
    """The results, contiguous, and none in the memory of an argument or of another: what an operator must return."""
    taken = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
    own = []
    for x in results:
        x = x.contiguous()
        if x.untyped_storage().data_ptr() in taken:
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        own.append(x)
    return own


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS])
    ctx.numbers = inputs[TENSORS:]


def _differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a compiled call is differentiable once: create_graph=True needs backend='naive', uncompiled"
        )
    needed = list(ctx.needs_input_grad[:TENSORS])
    got = iter(torch.ops.nha_kernels.backward(*grads, *ctx.saved_tensors, *ctx.numbers, needed))
    return (*(next(got) if need else None for need in needed), *(None for _ in ctx.numbers))


GRADS = "Tensor grad_o, Tensor grad_lse, Tensor grad_slot_k, Tensor grad_slot_v"
torch.library.define("nha_kernels::forward", f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("nha_kernels::backward", f"({GRADS}, {SCHEMA}, bool[] needed) -> Tensor[]")
torch.library.impl("nha_kernels::forward", "default", _forward)
# Without a formula for autograd of its own, it leaves autograd on inside, where the implementation's is at work.
torch.library.impl("nha_kernels::backward", "default", _backward)
torch.library.register_fake("nha_kernels::forward", _fake_forward)
torch.library.register_fake("nha_kernels::backward", _fake_backward)
torch.library.register_autograd("nha_kernels::forward", _differentiate, setup_context=_save)
