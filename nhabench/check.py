"""Right before fast: nothing is timed whose output was not compared with a reference in this process."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nhabench.contender import Contender
from nhabench.gpu import extra_peak_bytes
from nhabench.inputs import Inputs
from nhabench.outputs import Output, Step
from nhabench.reference import Distance, allowed, distances, each_apart
from nhabench.training import OTHERS, bound, gradients_apart
from nhabench.workloads import Workload

RESULTS = ("o", "dq", "dk", "dv", "dg")  # of a training step


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check: how far the output was from `reference`, and how far it may be.

    of: which of several results is meant, the worst in units of what it may be; "" for an output.
    """

    distance: Distance
    tolerance: Distance
    reference: str
    of: str = ""

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
            return f"{self.of or 'The output'} holds NaN, {self.reference} does not."
        what = f" of {self.of}:" if self.of else ""
        return (
            f"Relative error{what} {self.distance.total:.2e} (worst block {self.distance.worst:.2e}) against "
            f"{self.reference}, allowed {self.tolerance.total:.2e} ({self.tolerance.worst:.2e})."
        )


def poison(inputs: Inputs) -> None:
    """Leave NaN in the memory that the next outputs will be given: an element that is never written then shows."""
    copies = [torch.full_like(like, torch.nan) for like in inputs.results for _ in range(3)]
    del copies


def first_output(call: Step, inputs: Inputs) -> tuple[Output, int | None]:
    """(output, extra peak bytes) of a call, at inputs, into poisoned memory.

    Warnings of a first call (compilers, torch) are not for the reader.
    """
    poison(inputs)
    outputs: list[Output] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = extra_peak_bytes(lambda: outputs.append(call()), inputs.q.device)
    return outputs[0], extra


def check_against(o: Output, truth: Output, name: str, tolerance: Sequence[Distance]) -> Verdict:
    """Compare an output, o [B,T,HQ,D] and in training gradients, with a float64 reference: each tensor by its own
    tolerance."""
    names = RESULTS[: len(o)] if isinstance(o, tuple) else ("",)
    each = zip(distances(o, truth), tolerance, names, strict=True)
    verdicts = [Verdict(measured, allowed, name, of) for measured, allowed, of in each]
    return max(verdicts, key=lambda verdict: verdict.distance.over(verdict.tolerance))


def check_baseline(contender: Contender, inputs: Inputs) -> Verdict | None:
    """A baseline at a small size against its definition in float64; None where it has none here.

    The tolerance is derived as for NHA, from the definition in the dtype of the inputs.
    """
    if contender.exact is None:
        return None
    exact = contender.exact

    def defined(dtype: torch.dtype) -> Output:
        if inputs.case.training:
            return gradients_apart(exact, inputs, OTHERS, dtype)
        return each_apart(inputs.to(dtype), lambda one: [exact(one)])

    truth = defined(torch.float64)
    measured = distances(defined(inputs.q.dtype), truth)
    tolerance = [allowed(one, _sums(inputs)) for one in measured]
    o, _ = first_output(bound(contender, inputs), inputs)
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
