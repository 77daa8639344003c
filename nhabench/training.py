"""A training step of an operation: its forward pass, and the gradients of its inputs for a gradient of its output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nhabench.contender import Contender
from nhabench.inputs import Inputs
from nhabench.outputs import Step

NHA, OTHERS = "qkvg", "qkv"  # the inputs whose gradients are asked of each; only NHA has the gates


def bound(contender: Contender, inputs: Inputs) -> Step:
    """The contender's call at inputs: it returns o [B,T,HQ,D], in training also the gradients of its inputs."""
    if not inputs.case.training:
        return contender.bind(inputs)
    if contender.train is not None:
        return contender.train(inputs)
    x, leaves = with_leaves(inputs, gradients_of(contender))
    return step(contender.bind(x), leaves, inputs)


def gradients_of(contender: Contender) -> str:
    """The names of the inputs whose gradients a contender is asked for."""
    return NHA if contender.family == "nha" else OTHERS


def leaf(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose gradient can be asked for, in the memory of another: it holds what is written there later."""
    return x.detach().requires_grad_()


def with_leaves(inputs: Inputs, names: str) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
    """The inputs with leaves in place of those named, and these."""
    leaves: dict[str, Any] = {name: leaf(getattr(inputs, name)) for name in names}
    return dataclasses.replace(inputs, **leaves), tuple(leaves.values())


def step(
    forward: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], inputs: Inputs
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The forward pass, and the gradients of the leaves where that of its output o is inputs.do: (o, *gradients)."""
    do = inputs.do
    assert do is not None

    def call() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():  # what is measured is so without
            o = forward()
        # 0 for what does not matter: gates do not, where no token leaves the window.
        return (o.detach(), *torch.autograd.grad(o, leaves, do, materialize_grads=True))

    return call


def gradients(forward: Callable[[Inputs], torch.Tensor], inputs: Inputs, names: str) -> tuple[torch.Tensor, ...]:
    """o [B,T,HQ,D] and the gradients of the inputs named, [B,T,HQ,D] of q, [B,T,H,D] of k and v, [B,T,H,M] of g."""
    x, leaves = with_leaves(inputs, names)
    return step(lambda: forward(x), leaves, inputs)()


def gradients_apart(
    forward: Callable[[Inputs], torch.Tensor], inputs: Inputs, names: str, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The same in a dtype, of every sequence by itself: what is not there cannot cross a boundary."""
    apart = [gradients(forward, one.to(dtype), names) for one in inputs.apart()]
    return tuple(torch.cat(some, 0 if inputs.cu_seqlens is None else 1) for some in zip(*apart, strict=True))
