"""Right before fast: nothing is timed whose output was not compared with a reference in this process."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass

import torch

from nhabench.contender import Call, Contender
from nhabench.gpu import extra_peak_bytes
from nhabench.inputs import Inputs
from nhabench.reference import Distance, allowed, distance, each_apart
from nhabench.workloads import Workload


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: how far the output was from `reference`, and how far it may be."""

    distance: Distance
    tolerance: Distance
    reference: str

    @property
    def correct(self) -> bool:
        """Whether the output is within the tolerance; NaN never is."""
        return self.distance.within(self.tolerance)

    @property
    def sentence(self) -> str:
        """What is wrong, in words; empty when nothing is."""
        if self.correct:
            return ""
        if self.distance.worst != self.distance.worst:
            return f"The output holds NaN, {self.reference} does not."
        return (
            f"Relative error {self.distance.total:.2e} (worst block {self.distance.worst:.2e}) against "
            f"{self.reference}, allowed {self.tolerance.total:.2e} ({self.tolerance.worst:.2e})."
        )


def poison(like: torch.Tensor) -> None:
    """Leave NaN in the memory that the next outputs will be given: an element that is never written then shows."""
    copies = [torch.full_like(like, torch.nan) for _ in range(3)]
    del copies


def first_output(call: Call, like: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """(output, extra peak bytes) of a call into memory poisoned in the shape of `like`.

    Warnings of a first call (compilers, torch) are not for the reader.
    """
    poison(like)
    outputs: list[torch.Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = extra_peak_bytes(lambda: outputs.append(call()), like.device)
    return outputs[0], extra


def check_against(o: torch.Tensor, truth: torch.Tensor, name: str, tolerance: Distance) -> Verdict:
    """Compare an output [B,T,HQ,D] with a float64 reference."""
    return Verdict(distance(o, truth), tolerance, name)


def check_baseline(contender: Contender, inputs: Inputs) -> Verdict | None:
    """A baseline at a small size against its definition in float64; None where it has none here.

    The tolerance is derived as for NHA, from the definition in the dtype of the inputs.
    """
    if contender.exact is None:
        return None
    exact = contender.exact
    truth, same_dtype = (each_apart(some, lambda one: [exact(one)]) for some in (inputs.to(torch.float64), inputs))
    tolerance = allowed(distance(same_dtype, truth), _sums(inputs))
    o, _ = first_output(contender.bind(inputs), inputs.q)
    packed = f" ({inputs.case.sequences} packed sequences)" if inputs.case.sequences else ""
    return check_against(o, truth, f"its definition in float64 at T={inputs.case.seq_len}{packed}", tolerance)


def _sums(inputs: Inputs) -> Workload:
    # A baseline's longest sum runs over all T tokens: give its slack a window of that length.
    return inputs.case.workload.changed(window=inputs.case.seq_len)


def release(device: torch.device) -> None:
    """Give unused memory back, as after an out-of-memory error or a large case."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
