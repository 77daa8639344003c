"""Has NHA become slower, or wrong? Two versions of nha_kernels on one machine, timed in turns, case by case.

Each version runs in processes of its own, under the benchmark of this checkout. Never do two work at once: a base and
a new one take turns, call by call, and the ratio of their times is judged (`nhabench.compare`).
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nhabench
from nhabench.compare import ROUNDS, Ratio, Verdict, ratio_of, take_turns
from nhabench.timing import LEAST_SAMPLES
from nhabench.workloads import Case

FOLDER = "kernels"  # of the repository: what holds the package
# Threads of a side that has finished its turn sleep: by default they spin for a while, on the other side's cores.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


class SideError(RuntimeError):
    """A side's process could not be started, or ended; str() holds the end of what it said."""


@dataclass(frozen=True)
class Comparison:
    """One implementation at one case, in both versions. No ratio where one of them was not timed; `note` says why."""

    case: Case
    implementation: str
    verdict: Verdict
    ratio: Ratio | None = None
    note: str = ""


class Side:
    """The process of one version: `folder` holds its nha_kernels."""

    def __init__(self, folder: Path, device: torch.device, log: Path) -> None:
        # First the version under test, then the harness, which is the same for both.
        paths = [str(folder), str(Path(nhabench.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        self._log = log
        with log.open("w", encoding="utf-8") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "nhabench.side", str(folder), str(device)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8",
                env={**os.environ, **PASSIVE, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            )  # fmt: skip
        self._hear()

    def prepare(self, case: Case, implementation: str) -> tuple[str, str]:
        """(status, note) of a case: 'ok', 'unsupported', 'incorrect' or 'failed', and the reason."""
        said = self._ask({"case": dataclasses.asdict(case), "implementation": implementation})
        return said["status"], said["note"]

    def time(self) -> float:
        """Milliseconds of one call."""
        return float(self._ask("time")["ms"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
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


def compare_versions(
    base: Path, new: Path, cases: Sequence[Case], implementations: Sequence[str], device: torch.device,
    seconds: float, limit: float, rounds: int = ROUNDS, said: Callable[[str], object] = lambda step: None,
    start: Callable[[Path, torch.device, Path], Side] = Side,
) -> list[Comparison]:  # fmt: skip
    """Compare the versions in two folders; `seconds` at most for each implementation at each case, over all rounds.

    Every round has new processes, and gives one ratio: two processes of the same code differ, by where their memory
    lies, and no number of calls in one of them tells by how much. The verdict is on the ratios of all rounds.
    Raises SideError where a process ends that should not, ValueError for no cases or implementations, or few rounds.
    """
    if not cases or not implementations:
        counts = f"{len(cases)} and {len(implementations)}"
        raise ValueError(f"cases, implementations: expected at least one of each, got {counts}")
    if rounds < LEAST_SAMPLES:
        raise ValueError(f"rounds: expected at least {LEAST_SAMPLES}, got {rounds}")
    ratios: dict[tuple[Case, str], list[float]] = {(case, one): [] for case in cases for one in implementations}
    ended: dict[tuple[Case, str], Comparison] = {}
    with tempfile.TemporaryDirectory() as logs:
        for number in range(1, rounds + 1):
            going_on = [key for key in ratios if key not in ended]
            if not going_on:
                break
            with (
                closing(start(base, device, Path(logs) / "base")) as before,
                closing(start(new, device, Path(logs) / "new")) as after,
            ):
                for key in going_on:
                    said(f"round {number}/{rounds}: {key[0]} {key[1]}")
                    trouble = _prepare(before, after, *key)
                    if trouble is None:
                        ratios[key].append(take_turns(before.time, after.time, seconds / rounds).median)
                    else:
                        ended[key] = trouble
    return [ended.get(key) or _judged(*key, ratio_of(found), limit) for key, found in ratios.items()]


def _judged(case: Case, implementation: str, ratio: Ratio, limit: float) -> Comparison:
    return Comparison(case, implementation, ratio.verdict(limit), ratio)


def _prepare(base: Side, new: Side, case: Case, implementation: str) -> Comparison | None:
    """Make both sides ready to be timed; where that fails, the comparison ends with this."""
    before, why_not_before = base.prepare(case, implementation)
    after, why_not_after = new.prepare(case, implementation)
    if after == "incorrect":
        return Comparison(case, implementation, "incorrect", note=why_not_after)
    if before == after == "unsupported":
        return Comparison(case, implementation, "pass", note=f"Neither version serves it. {why_not_after}")
    if after != "ok":
        verdict: Verdict = "regress" if before == "ok" else "inconclusive"
        return Comparison(case, implementation, verdict, note=f"The new version: {why_not_after}")
    if before != "ok":
        return Comparison(case, implementation, "inconclusive", note=f"The base: {why_not_before}")
    return None
