"""Has NHA become slower, or wrong? Two versions of nha_kernels on one machine, timed in turns, case by case.

Each version runs in processes of its own, under the benchmark of this checkout. Never do two work at once: a base and
a new one take turns, call by call, and the ratio of their times is judged (`nhabench.compare`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import selectors
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nhabench
from nhabench.compare import ROUNDS, Ratio, Verdict, ratio_of, take_turns
from nhabench.guard import SAME
from nhabench.workloads import Case

FOLDER = "kernels"  # of the repository: what holds the package
# Threads of a side that has finished its turn sleep: by default they spin for a while, on the other side's cores.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
ANSWER_S = {"prepare": 900.0, "time": 120.0}  # longer than any compiler, and any call, takes


class SideError(RuntimeError):
    """A side's process could not be started, ended, or did not answer; str() holds the end of what it said."""


@dataclass(frozen=True)
class Comparison:
    """One implementation at one case, in both versions. No ratio where one of them was not timed; `note` says why."""

    case: Case
    implementation: str
    verdict: Verdict
    ratio: Ratio | None = None
    note: str = ""


@dataclass(frozen=True)
class Prepared:
    """What a side says of a case: 'ok' or another status of `nhabench.side`, the reason, and its output in short."""

    status: str
    note: str = ""
    o: Sequence[float] = ()


class Side:
    """The process of one version: `folder` holds its nha_kernels. late: how many of a case's `taken` calls were."""

    def __init__(self, folder: Path, device: torch.device, log: Path) -> None:
        # First the version under test, then the harness, which is the same for both. -P: nothing from where we happen
        # to be.
        paths = [str(folder), str(Path(nhabench.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        self.late = self.taken = 0
        self._log = log
        with log.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nhabench.side", str(folder), str(device)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8",
                env={**os.environ, **PASSIVE, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )  # fmt: skip
        try:
            self._hear(ANSWER_S["prepare"])
        except BaseException:
            self.close()
            raise

    def prepare(self, case: Case, implementation: str) -> Prepared:
        """Make inputs, check the output, warm up."""
        self.late = self.taken = 0
        question = {"case": dataclasses.asdict(case), "implementation": implementation}
        return Prepared(**self._ask(question, ANSWER_S["prepare"]))

    def time(self) -> float:
        """Milliseconds of one call."""
        said = self._ask("time", ANSWER_S["time"])
        self.late, self.taken = self.late + said["late"], self.taken + 1
        return float(said["ms"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: Any, seconds: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._hear(seconds)

    def _hear(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self._process.kill()
                raise SideError(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> SideError:
        self._process.communicate()
        last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        return SideError(f"exit code {self._process.returncode}: {' / '.join(last) or 'it said nothing'}")


@contextmanager
def version(ref: str, repository: Path) -> Iterator[Path]:
    """A folder with the nha_kernels of a commit, for as long as the block lasts.

    Raises ValueError where git knows no such commit, or the commit has no such package.
    """
    done = subprocess.run(
        ["git", "-C", str(repository), "archive", "--format=tar", ref, FOLDER], capture_output=True, check=False
    )
    if done.returncode:
        raise ValueError(f"base: expected a commit of this repository that has {FOLDER}/, got {ref!r}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder) / FOLDER


@contextmanager
def as_it_is(repository: Path) -> Iterator[Path]:
    """A folder with the nha_kernels of the work tree as it is now: edits during a comparison do not enter it."""
    with tempfile.TemporaryDirectory() as folder:
        ignored = shutil.ignore_patterns("__pycache__")
        yield Path(shutil.copytree(repository / FOLDER, Path(folder) / FOLDER, ignore=ignored))


Key = tuple[Case, str]  # what is compared: an implementation at a case


class Match:
    """The rounds of a comparison: what was found so far, and what needs no further round."""

    def __init__(self, keys: Sequence[Key], seconds: float) -> None:
        self.seconds = seconds / ROUNDS
        self.ratios: dict[Key, list[float]] = {key: [] for key in keys}
        self.late: set[Key] = set()
        self.ended: dict[Key, Comparison] = {}

    def play(self, key: Key, base: Side, new: Side) -> None:
        """One round of one comparison. A process that ends or hangs ends this comparison, and is worth no other."""
        try:
            before = base.prepare(*key)
        except SideError as error:
            self.ended[key] = Comparison(*key, "inconclusive", note=f"The base: {error}")
            raise
        try:
            trouble = _trouble(key, before, new.prepare(*key))
            if trouble is not None:
                self.ended[key] = trouble
                return
            self.ratios[key].append(take_turns(base.time, new.time, self.seconds).median)
            if 2 * max(base.late, new.late) > base.taken:
                self.late.add(key)
        except SideError as error:
            verdict: Verdict = "regress" if before.status == "ok" else "inconclusive"
            self.ended[key] = Comparison(*key, verdict, note=f"While the new version was at work: {error}")
            raise

    def result(self, key: Key, limit: float) -> Comparison:
        """The comparison after all rounds."""
        if key in self.ended:
            return self.ended[key]
        ratio = ratio_of(self.ratios[key])
        note = "Host time may be part of it: the device waited for the host." if key in self.late else ""
        return Comparison(*key, ratio.verdict(limit), ratio, note)


def _trouble(key: Key, before: Prepared, after: Prepared) -> Comparison | None:
    """What to say where the versions cannot be timed against one another."""
    if after.status == "incorrect":
        return Comparison(*key, "incorrect", note=after.note)
    if before.status == after.status == "unsupported":
        return Comparison(*key, "pass", note=f"Neither version serves it. {after.note}")
    if after.status != "ok":
        verdict: Verdict = "regress" if before.status == "ok" and after.status != "out of memory" else "inconclusive"
        return Comparison(*key, verdict, note=f"The new version: {after.note}")
    if before.status in ("unsupported", "incorrect"):
        return Comparison(*key, "pass", note=f"The base did not serve it, or was wrong: {before.note}")
    if before.status != "ok":
        return Comparison(*key, "inconclusive", note=f"The base: {before.note}")
    if not math.dist(before.o, after.o) <= SAME * math.hypot(*before.o):
        return Comparison(
            *key, "incorrect", note="The versions return different outputs, each right by its own reference."
        )
    return None


def compare_versions(
    base: Path, new: Path, cases: Sequence[Case], implementations: Sequence[str], device: torch.device,
    seconds: float, limit: float, said: Callable[[str], object] = lambda step: None,
    start: Callable[[Path, torch.device, Path], Side] = Side,
) -> list[Comparison]:  # fmt: skip
    """Compare the versions in two folders; `seconds` at most for each implementation at each case, over all rounds.

    Every round has new processes, and gives one ratio: two processes of the same code differ, by where their memory
    lies, and no number of calls in one of them tells by how much. The verdict is on the ratios of all rounds.
    Raises SideError where a process cannot be started, ValueError for no cases or implementations.
    """
    if not cases or not implementations:
        counts = f"{len(cases)} and {len(implementations)}"
        raise ValueError(f"cases, implementations: expected at least one of each, got {counts}")
    match = Match([(case, one) for case in cases for one in implementations], seconds)
    with tempfile.TemporaryDirectory() as logs:

        def started(name: str) -> Side:
            return start(base if name == "base" else new, device, Path(logs) / name)

        for number in range(1, ROUNDS + 1):
            # Who is first finds other memory than who is second: each is so as often as the other.
            order = ("base", "new") if number % 2 else ("new", "base")
            left = [key for key in match.ratios if key not in match.ended]
            while left:  # a process that ends or hangs is worth no other comparison: they go on with new ones
                with closing(started(order[0])) as one, closing(started(order[1])) as two, suppress(SideError):
                    sides = dict(zip(order, (one, two), strict=True))
                    while left:
                        key = left.pop(0)
                        said(f"round {number}/{ROUNDS}: {key[0]} {key[1]}")
                        match.play(key, sides["base"], sides["new"])
    return [match.result(key, limit) for key in match.ratios]
