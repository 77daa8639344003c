"""What a call returns: o, in training a tuple of o and gradients. Who looks at one looks at each of its tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

Output = torch.Tensor | tuple[torch.Tensor, ...]
Step = Callable[[], Output]  # what is timed


def tensors_of(o: Output) -> tuple[torch.Tensor, ...]:
    """The tensors of an output."""
    return o if isinstance(o, tuple) else (o,)


def fill(o: Output, value: float) -> None:
    """The value everywhere in an output."""
    for x in tensors_of(o):
        x.fill_(value)


def finite(o: Output) -> bool:
    """Whether an output holds neither NaN nor infinity."""
    return all(bool(x.isfinite().all()) for x in tensors_of(o))
