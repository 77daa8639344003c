"""A suite: what is measured, in a reader's words. pytest-benchmark runs those in suites/, with the device's times.

Every case is measured once, all contenders interleaved and checked as in a bench. Then each of them is a benchmark of
its own, whose rounds are the samples of that race: pytest-benchmark's tables, storage and comparisons are of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nhabench.contender import Contender
from nhabench.lab import DeviceLost, Lab
from nhabench.measure import measure_case
from nhabench.plots import draw_all
from nhabench.results import Row
from nhabench.workloads import Case, Workload, load_workloads


def model(device: torch.device) -> Workload:
    """The attention shape that sweeps are made at: of a large model, on a CPU one sequence of a small one."""
    if device.type == "cpu":
        return load_workloads()["nha-340m"].changed(tokens=1)
    return load_workloads()["llama-3-8b"]


@dataclass(frozen=True)
class Suite:
    """What a file of suites/ measures.

    name: of its files in results/. cases: those that a device can afford, in a dtype. contenders: by name;
    those that cannot run are skipped with their reason. draw: from rows, plots into a folder.
    """

    name: str
    cases: Callable[[torch.device, str], Iterable[Case]]
    contenders: tuple[str, ...]
    draw: Callable[[Sequence[Row], Path], list[Path]] = draw_all


class Clock:
    """A timer in seconds that stands still, but while a measured time passes."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        """The time."""
        return self._seconds

    def passes(self, milliseconds: float) -> None:
        """Let a measured time pass."""
        self._seconds += milliseconds / 1e3


@dataclass
class Session:
    """What the benchmarks of a run share.

    open: the device, when the first case is measured. keep: is given the rows of each case, with its suite, as soon as
    there are any.
    """

    open: Callable[[], Lab]
    keep: Callable[[Suite, list[Row]], object] = lambda suite, rows: None
    _lab: Lab | None = None
    _measured: dict[tuple[str, Case], dict[str, tuple[Row, tuple[float, ...]]]] = field(default_factory=dict)

    def measured(
        self, suite: Suite, case: Case, contenders: Iterable[Contender]
    ) -> dict[str, tuple[Row, tuple[float, ...]]]:
        """Each contender's row at a case and its samples in ms; measured when the first of them is asked for."""
        if (suite.name, case) not in self._measured:
            self._lab = self._lab or self.open()
            samples: dict[str, tuple[float, ...]] = {}
            try:
                with torch.no_grad():
                    rows = measure_case(self._lab, case, list(contenders), lambda step: None, samples)
            except DeviceLost as lost:
                self.keep(suite, lost.rows)
                raise
            self._measured[suite.name, case] = {row.implementation: (row, samples[row.implementation]) for row in rows}
            self.keep(suite, rows)
        return self._measured[suite.name, case]
