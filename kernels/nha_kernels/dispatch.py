"""Which implementation serves a call: the first, from the most fused to the plainest, that can."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .problem import Inputs, Problem, Result, UnsupportedCall
from .registry import IMPLEMENTATIONS, Implementation

# The more is fused, the fewer bytes move: measured on an H100, so it is for windows of 32 up to 4096 in the forward
# pass. naive is last: chunked serves whatever it serves, and faster.
ORDER = ("triton", "flash", "chunked", "naive")
CPU_ORDER = ("chunked", "naive", "triton", "flash")  # there Triton is its interpreter, a debugger


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `backend="auto"` does with a call: the implementation chosen, and why each other one was passed over."""

    problem: Problem
    chosen: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.chosen}: chosen"]
        lines += [f"{name}: {reason}" for name, reason in self.passed_over.items()]
        return "\n".join(lines)


def explain_problem(problem: Problem) -> Explanation:
    """Choose for a problem and say why."""
    chosen = ""
    passed_over: dict[str, str] = {}
    for name in order(problem):
        implementation = IMPLEMENTATIONS[name]
        reason = why_not(implementation, problem)
        if reason is None and chosen:
            reason = f"could serve this call too; {chosen} comes first"
        if reason is None:
            chosen = name
        else:
            passed_over[name] = reason
    return Explanation(problem, chosen, passed_over)


def order(problem: Problem) -> tuple[str, ...]:
    """The implementations for a problem, from the one to prefer to the last resort."""
    return CPU_ORDER if problem.device == "cpu" else ORDER


def why_not(implementation: Implementation, problem: Problem) -> str | None:
    """The sentence that says why an implementation cannot serve a problem on this machine, or None."""
    return implementation.why_unavailable(problem.device) or implementation.why_not(problem)


def choose(problem: Problem, backend: str) -> Implementation:
    """The implementation for a call; a backend that is named but cannot serve it raises UnsupportedCall."""
    if backend != "auto":
        reason = why_not(IMPLEMENTATIONS[backend], problem)
        if reason is not None:
            raise UnsupportedCall(f"backend={backend!r} cannot serve this call: {reason}")
        return IMPLEMENTATIONS[backend]
    for name in order(problem):
        if why_not(IMPLEMENTATIONS[name], problem) is None:
            return IMPLEMENTATIONS[name]
    raise AssertionError("naive serves every valid call")


def run(problem: Problem, inputs: Inputs, backend: str) -> Result:
    """Serve a checked call with the implementation chosen for it."""
    implementation = choose(problem, backend)
    # The dtypes are the caller's choice: autocast must not turn the fp32 inside into 16 bits.
    with torch.autocast(problem.device, enabled=False):
        return implementation.run(problem, inputs)
