"""What the steps of a case share: the lab, an entry for each contender, and what becomes of what they raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nhabench import guard
from nhabench.check import Verdict, check_baseline, release
from nhabench.contender import Contender, Unsupported
from nhabench.environment import Environment
from nhabench.errors import first_line, is_out_of_memory, without_frames
from nhabench.floors import Ceilings
from nhabench.gpu import GpuWatch
from nhabench.outputs import Step
from nhabench.reference import Judge, small_inputs
from nhabench.results import Row
from nhabench.timing import Timer
from nhabench.workloads import Case

SMALL_SEQUENCES = 2  # of the small check of a baseline at packed sequences: the longer one is longer than most windows


class DeviceLost(Exception):
    """Nothing more can be measured in this process; str() says why. `rows`: those of the case so far."""

    def __init__(self, reason: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(reason)
        self.rows = list(rows)


@dataclass
class Lab:
    """What all cases of a run share: the device, its timer and ceilings, and what was learnt at earlier cases.

    warm: whether calls are also timed with their inputs in the caches.
    """

    device: torch.device
    timer: Timer
    watch: GpuWatch
    environment: Environment
    ceilings: Ceilings
    seconds: float
    warm: bool = False
    judges: dict[tuple[object, ...], Judge] = field(default_factory=dict)
    baseline_verdicts: dict[tuple[object, ...], Verdict | None] = field(default_factory=dict)
    last: dict[tuple[object, ...], tuple[Case, float]] = field(default_factory=dict)

    def judge(self, case: Case) -> Judge:
        """The judge of a case's workload, dtype and direction."""
        if case.kind not in self.judges:
            self.judges[case.kind] = Judge(case.workload, case.dtype, self.device, case.direction)
        return self.judges[case.kind]

    def baseline_verdict(self, contender: Contender, case: Case) -> Verdict | None:
        """A baseline's check at a small size of the case's workload, with packed sequences if the case has them; made
        once."""
        packed = SMALL_SEQUENCES if case.sequences else 0
        key = (contender.name, *case.kind, packed)
        if key not in self.baseline_verdicts:
            inputs = small_inputs(case.workload, case.dtype, self.device, packed, case.direction)
            self.baseline_verdicts[key] = check_baseline(contender, inputs)
        return self.baseline_verdicts[key]

    def predicted_s(self, contender: Contender, case: Case) -> float | None:
        """Seconds that one call should take, from the last size of the workload; None where there was none."""
        known = self.last.get((contender.name, *case.kind))
        if known is None:
            return None
        before, seconds = known
        power = 2 if contender.quadratic else 1
        now, then = (sum(length**power for length in one.lengths) for one in (case, before))
        return seconds * now / then


@dataclass
class Entry:
    """A contender on its way to its row. `changes`: the columns known so far."""

    contender: Contender
    status: str = ""
    note: str = ""
    calls: list[Step] = field(default_factory=list)
    marks: guard.Marks | None = None  # of the output that was checked
    changes: dict[str, Any] = field(default_factory=dict)
    all_ms: tuple[float, ...] = ()  # the samples
    remarks: list[str] = field(default_factory=list)  # for the note of a row that is ok

    @property
    def waiting(self) -> bool:
        """Whether it is still in the race."""
        return not self.status

    def end(self, status: str, note: str) -> None:
        """Take it out, with the reason. Its calls go too: they hold its inputs."""
        self.status, self.note, self.calls = status, note, []


def attempt(lab: Lab, entry: Entry, step: Callable[[], object], sets: guard.Sets | None = None) -> None:
    """Run a step of one contender; whatever it raises becomes its row, and the others go on.

    sets: those that it works on. They are afterwards as they were before, and who wrote into them is ended.
    """
    failure: Exception | None = None
    try:
        step()
    except Exception as error:
        failure = without_frames(error)
    # Not inside the handler: until its end the failed step keeps its tensors, and no memory could be released.
    if failure is not None:
        fail(lab, entry, failure)
    if sets is not None and sets.restore() and entry.waiting:
        entry.end("incorrect", guard.WROTE)


def fail_all(lab: Lab, entries: Sequence[Entry], error: Exception, where: str = "") -> None:
    """End all that are waiting with what was raised. See fail."""
    for entry in entries:
        if entry.waiting:
            fail(lab, entry, error, where)


def fail(lab: Lab, entry: Entry, error: Exception, where: str = "") -> None:
    """End a contender with what it raised. Raises DeviceLost when the error took the device with it."""
    if isinstance(error, Unsupported):
        entry.end("unsupported", str(error))
        return
    text = " ".join(str(error).split()) or type(error).__name__
    status = "out of memory" if is_out_of_memory(error) else "failed"
    entry.end(status, f"{where}{type(error).__name__}: {text[:300]}")
    recover(lab.device)


def recover(device: torch.device) -> None:
    """Release memory after an error. Raises DeviceLost: after an illegal access, for one, every further call fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        release(device)
    except RuntimeError as lost:
        raise DeviceLost(f"The device stopped answering: {first_line(lost)}") from lost
