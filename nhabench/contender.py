"""What takes part in the race: one small record for each implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from nhabench.floors import FloorFunction
from nhabench.inputs import Inputs
from nhabench.outputs import Step
from nhabench.workloads import Case

Family = Literal["nha", "full", "window", "linear"]
Call = Callable[[], torch.Tensor]


def _always(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Contender:
    """One implementation of one kind of attention.

    name      its key in results and on the command line
    label     its name for readers
    family    what it computes
    floor     the least its operation must do at a case
    bind      inputs -> a call without arguments that returns o [B,T,HQ,D]. Only the call is timed, so bind does what a
              model would not do at each forward pass: random gates, heads repeated for a kernel that wants it.
              In training q, k, v (and g of NHA) want gradients, and all that is made of them is made in the call, views
              too: of one that outlives a refill, autograd finds the gradient in another, longer way.
    missing   a sentence saying why it cannot run on this device or installation at all, or None
    cannot    a sentence saying why it cannot serve this case on this device, or None
    quadratic its time grows with T*T for a sequence, not with T
    exact     what it should return, straight from the definition and in the dtype of the inputs (small T only). Of
              packed sequences it is asked for each by itself
    remark    what a reader should know about how it was run
    train     inputs -> the call of a training step, where that is not to be made of bind: of operands that are made of
              the inputs beforehand, say
    """

    name: str
    label: str
    family: Family
    floor: FloorFunction
    bind: Callable[[Inputs], Call]
    missing: Callable[[torch.device], str | None] = _always
    cannot: Callable[[Case, torch.device], str | None] = _always
    quadratic: bool = False
    exact: Callable[[Inputs], torch.Tensor] | None = None
    remark: str = ""
    train: Callable[[Inputs], Step] | None = None


class Unsupported(Exception):
    """Raised by a contender's call that turns out not to serve a case; str() is the sentence that says why."""
