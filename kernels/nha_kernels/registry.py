"""The implementations that a call can be served by, and where each one can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import chunked, flash, naive
from .fused import limits
from .problem import Inputs, Problem, Result


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute the operator.

    why_not(problem): the sentence that says why it cannot serve a call, or None where it can.
    why_unavailable(device_type): the same for a whole device type on this machine.
    run(problem, inputs): serve the call.
    """

    name: str
    why_not: Callable[[Problem], str | None]
    why_unavailable: Callable[[str], str | None]
    run: Callable[[Problem, Inputs], Result]


def _run_fused(problem: Problem, inputs: Inputs) -> Result:
    from .fused.forward import run  # imports Triton, which a call that it does not serve need not wait for

    return run(problem, inputs)


def _anywhere(device_type: str) -> str | None:
    return None


IMPLEMENTATIONS: dict[str, Implementation] = {
    implementation.name: implementation
    for implementation in (
        Implementation("naive", naive.why_not, _anywhere, naive.run),
        Implementation("chunked", chunked.why_not, _anywhere, chunked.run),
        Implementation("flash", flash.why_not, flash.why_unavailable, flash.run),
        Implementation("triton", limits.why_not, limits.why_unavailable, _run_fused),
    )
}

BACKENDS: tuple[str, ...] = tuple(IMPLEMENTATIONS)


def available_backends(device: torch.device | str | None = None) -> tuple[str, ...]:
    """Names of the implementations that can run on `device` (default: CUDA where there is a GPU, else CPU)."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = torch.device(device).type
    return tuple(name for name, made in IMPLEMENTATIONS.items() if made.why_unavailable(device_type) is None)
