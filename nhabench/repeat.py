"""Do fresh processes agree? The same bench in one process after the other, and how far its medians differ.

The interval of a median says how well one process knows it. Where memory lies, and what a process finds the device at,
is drawn anew by each process, and only several of them tell what that makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import nha_kernels
import nhabench
from nhabench.bench import EXIT_DEVICE, EXIT_INCOMPLETE, EXIT_OK, EXIT_WRONG
from nhabench.results import Row
from nhabench.timing import LONG_MS

# In units of the limit: what nhabench.compare.LIMITS says that two processes of the same code may differ by on such a
# device. The row in the middle may differ by that, the worst one by twice as much.
WORST = 2
# Not a failure of the bench, and no time that could differ, as long as every process says so.
NOT_RUN = ("unsupported", "unavailable", "skipped")
LAST_WORDS = 3  # lines


@dataclass(frozen=True)
class Process:
    """One bench: how it ended, after how many seconds, its rows, and the last that it said."""

    exit_code: int
    seconds: float
    rows: Sequence[Row]
    last: str = ""

    @property
    def died(self) -> bool:
        """Whether it did not come to its end. A bench that did says 0, or 1 or 3 of its rows, and has some."""
        return self.exit_code not in (EXIT_OK, EXIT_WRONG, EXIT_INCOMPLETE) or not self.rows


@dataclass(frozen=True)
class Repeated:
    """One implementation at one case: its status and median in each process, '' and None where it has no row or time.

    spread: the largest median over the smallest, less 1; None unless every process has timed it.
    """

    case: str
    implementation: str
    label: str
    statuses: tuple[str, ...]
    medians_ms: tuple[float | None, ...]
    spread: float | None
    note: str

    @property
    def long(self) -> bool:
        """Whether its spread counts as a worst one."""
        times = [ms for ms in self.medians_ms if ms is not None]
        return self.spread is not None and median(times) >= LONG_MS

    @property
    def trouble(self) -> str:
        """What is wrong with it but its spread, in a sentence; empty where nothing is."""
        alike = len(set(self.statuses)) == 1
        if self.spread is not None or (alike and self.statuses[0] in NOT_RUN):
            return ""
        said = ", ".join(status or "no row" for status in self.statuses)
        return f"{self.label}, {self.case}: {said}. {self.note}".rstrip()


@dataclass(frozen=True)
class Agreement:
    """What `wanted` processes say together, at a limit for the spread of the row in the middle."""

    processes: Sequence[Process]
    wanted: int
    limit: float

    @cached_property
    def rows(self) -> list[Repeated]:
        """Every implementation at every case."""
        return repeated([process.rows for process in self.processes])

    @property
    def median(self) -> float | None:
        """The spread of the row in the middle; None where no row has one."""
        spreads = [row.spread for row in self.rows if row.spread is not None]
        return median(spreads) if spreads else None

    @property
    def worst(self) -> Repeated | None:
        """Of the rows of LONG_MS and more the one with the largest spread."""
        return max((row for row in self.rows if row.long), key=lambda row: row.spread or 0.0, default=None)

    @property
    def died(self) -> bool:
        """Whether processes are missing, since one of them died."""
        return len(self.processes) < self.wanted or any(process.died for process in self.processes)

    @property
    def troubles(self) -> list[str]:
        """What is wrong but the spreads: processes that died, rows that failed or that not every process timed."""
        dead = [
            f"Process {number} of {self.wanted} ended with exit code {one.exit_code}: {one.last or 'it said nothing'}"
            for number, one in enumerate(self.processes, start=1)
            if one.died
        ]
        return dead + [row.trouble for row in self.rows if row.trouble]

    @property
    def passed(self) -> bool:
        """Whether every process ran, every row that could be was timed by all of them, and no limit was exceeded."""
        if self.died or self.troubles or self.median is None:
            return False
        worst = self.worst.spread if self.worst else None
        return self.median <= self.limit and (worst or 0.0) <= WORST * self.limit

    @property
    def exit_code(self) -> int:
        """0: passed; 1: not so; 70: a process died."""
        return EXIT_DEVICE if self.died else int(not self.passed)

    def summary(self) -> dict[str, Any]:
        """All of it, ready for JSON. Times in ms, of a process in seconds; spreads and limits are fractions."""
        worst = self.worst
        return {
            "passed": self.passed,
            "limits": {"median": self.limit, "worst": WORST * self.limit, "worst_from_ms": LONG_MS},
            "median": self.median,
            "worst": worst and {"case": worst.case, "label": worst.label, "spread": worst.spread},
            "troubles": self.troubles,
            "wanted": self.wanted,
            "processes": [{"exit_code": one.exit_code, "seconds": round(one.seconds, 1)} for one in self.processes],
            "cases": list(dict.fromkeys(row.case for row in self.rows)),
            "rows": [vars(row) for row in self.rows],
        }


def repeated(processes: Sequence[Sequence[Row]]) -> list[Repeated]:
    """The rows of several processes, joined by what they are about, in the order in which that first came."""
    tables = [{row.key: row for row in rows} for rows in processes]
    joined = []
    for key in dict.fromkeys(key for table in tables for key in table):
        found = [table.get(key) for table in tables]
        known = [row for row in found if row is not None]
        medians = tuple(row.median_ms if row is not None and row.timed else None for row in found)
        times = [ms for ms in medians if ms is not None]
        first = known[0]
        joined.append(
            Repeated(
                case=f"{first.workload} {first.batch} x {first.seq_len} {first.dtype}",
                implementation=first.implementation,
                label=first.label,
                statuses=tuple("" if row is None else row.status for row in found),
                medians_ms=medians,
                spread=max(times) / min(times) - 1 if len(times) == len(found) else None,
                note=next((row.note for row in known if not row.timed), ""),
            )
        )
    return joined


def run_processes(
    arguments: Sequence[str], wanted: int, limit: float, said: Callable[[str], object] = lambda line: None
) -> Agreement:
    """Start so many processes of the bench, one after the other, each with these arguments and a folder of its own.

    said: is told each line of progress. What is left to start is not started once one has died. Whatever is raised
    meanwhile, by a signal say, ends the process that runs.
    """
    processes: list[Process] = []
    while len(processes) < wanted and not any(one.died for one in processes):
        head = f"process {len(processes) + 1}/{wanted}"

        def tell(line: str, head: str = head) -> None:
            said(f"{head}: {line}")

        tell("starting")
        with tempfile.TemporaryDirectory() as folder:
            processes.append(bench_once(arguments, Path(folder), tell))
    return Agreement(processes, wanted, limit)


def bench_once(arguments: Sequence[str], folder: Path, said: Callable[[str], object]) -> Process:
    """Run the bench in a fresh process that writes into a folder; `said` is told each line of its progress."""
    # This process's own packages, whatever lies where we happen to be (-P).
    packages = [str(Path(package.__file__ or "").resolve().parent.parent) for package in (nhabench, nha_kernels)]
    paths = [*packages, os.environ.get("PYTHONPATH", "")]
    last: deque[str] = deque(maxlen=LAST_WORDS)
    began = time.monotonic()
    with (folder / "rows.json").open("w+", encoding="utf-8") as answer:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nhabench", "bench", *arguments, "--json", "--output", str(folder / "bench")],
            stdin=subprocess.DEVNULL, stdout=answer, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            errors="replace", env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )  # fmt: skip
        assert process.stderr is not None
        try:
            for line in filter(None, map(str.strip, process.stderr)):
                last.append(line)
                said(line)
            exit_code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stderr.close()
        answer.seek(0)
        return Process(exit_code, time.monotonic() - began, _rows(answer.read()), " / ".join(last))


def _rows(answer: str) -> list[Row]:
    """The rows that a bench printed; none where it did not come to that."""
    try:
        return [Row(**row) for row in json.loads(answer)["rows"]]
    except (ValueError, KeyError, TypeError):
        return []
