"""A run that was interrupted goes on where it stopped, and measures again whatever may have changed since."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from nhabench import bench as module
from nhabench import check, environment, reference
from nhabench.bench import Options, Outcome, run
from nhabench.contender import Contender
from nhabench.floors import Ceilings
from nhabench.implementations import attend
from nhabench.inputs import Inputs
from nhabench.results import ResultFile, load_rows
from nhabench.workloads import Workload, cases

LENGTHS = (16, 32, 48)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 32)
    monkeypatch.setattr(check, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(module, "draw_all", lambda rows, folder: [])
    monkeypatch.setattr(module, "measure_ceilings", lambda device, dtype, timer: Ceilings(0.02, 0.2))
    monkeypatch.setattr(environment, "git_state", lambda: ("a" * 40, False))


class Bench:
    """Runs one contender over three lengths; `measured` holds those it was asked for, `stop` interrupts it at one."""

    def __init__(self, workload: Workload, folder: Path, make: Any) -> None:
        self.workload, self.file = workload, folder / "forward.csv"
        self.measured: list[int] = []
        self.stop: int | None = None
        self.said = io.StringIO()
        self.contender: Contender = make.nha("mine", self._attend)

    def _attend(self, inputs: Inputs) -> torch.Tensor:
        length = inputs.case.seq_len
        if length == self.stop:
            raise KeyboardInterrupt
        if length not in self.measured:
            self.measured.append(length)
        return attend(inputs, "chunked")

    def __call__(self, **changes: Any) -> Outcome:
        self.measured = []
        options: dict[str, Any] = dict(
            cases=cases([self.workload], LENGTHS, "float32"), contenders=[self.contender], device=torch.device("cpu"),
            seconds=0.02, output=self.file.parent, command="python -m nhabench bench", trim=False, resume=True,
        )  # fmt: skip
        return run(Options(**{**options, **changes}), Console(file=io.StringIO()), Console(file=self.said))


@pytest.fixture
def bench(tiny: Workload, tmp_path: Path, contenders: Any) -> Bench:
    return Bench(tiny, tmp_path, contenders)


@pytest.fixture
def interrupted(bench: Bench) -> Bench:
    """A run that was stopped at its second case."""
    bench.stop = 32
    assert bench(resume=False).exit_code == 130
    assert [row.seq_len for row in load_rows(bench.file)] == [16]
    bench.stop = None
    return bench


def test_it_goes_on_with_what_is_missing(interrupted: Bench) -> None:
    (before,) = load_rows(interrupted.file)
    outcome = interrupted()
    assert interrupted.measured == [32, 48]
    assert outcome.exit_code == 0
    assert [row.seq_len for row in outcome.rows] == list(LENGTHS)
    assert load_rows(interrupted.file) == outcome.rows
    assert outcome.rows[0] == before
    assert interrupted().rows == outcome.rows
    assert interrupted.measured == []


def test_without_being_asked_it_measures_everything(interrupted: Bench) -> None:
    interrupted(resume=False)
    assert interrupted.measured == list(LENGTHS)


def test_another_contender_makes_a_case_unfinished(interrupted: Bench, contenders: Any) -> None:
    interrupted(contenders=[interrupted.contender, contenders.nha("other")])
    assert interrupted.measured == list(LENGTHS)  # beside the other: times of one case are of one race


@pytest.mark.parametrize("state", [("b" * 40, False), ("a" * 40, True), ("", None)])
def test_other_code_is_measured_again(
    state: tuple[str, bool | None], interrupted: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "git_state", lambda: state)
    interrupted()
    assert interrupted.measured == list(LENGTHS)
    assert ("differs from its commit" in interrupted.said.getvalue()) == (state[1] is True)


def test_another_command_is_another_run(interrupted: Bench) -> None:
    interrupted(command="python -m nhabench bench --seconds-per-case 9")
    assert interrupted.measured == list(LENGTHS)


def test_what_failed_is_measured_again_and_what_was_wrong_is_not(
    interrupted: Bench, row: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, note, measured in (
        ("failed", "", list(LENGTHS)), ("unavailable", "", list(LENGTHS)), ("out of memory", "", list(LENGTHS)),
        ("skipped", "The case needs 9 GiB; 1 GiB are free.", list(LENGTHS)), ("incorrect", "", [32, 48]),
        ("unsupported", "", [32, 48]),
    ):  # fmt: skip
        (first, *_) = load_rows(interrupted.file)
        interrupted.file.unlink()
        changed = {**vars(first), "status": status, "note": note, "median_ms": None}
        ResultFile(interrupted.file).put([type(first)(**changed)])
        outcome = interrupted()
        assert interrupted.measured == measured
        assert outcome.exit_code == (1 if status == "incorrect" else 0)


def test_what_is_not_installed_is_no_reason_to_measure_the_others_again(
    interrupted: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = False
    absent = contenders.nha("absent", missing=lambda device: None if installed else "It is not installed.")
    both = [interrupted.contender, absent]
    assert interrupted(contenders=both).exit_code == 0
    assert {row.status for row in load_rows(interrupted.file) if row.implementation == "absent"} == {"unavailable"}
    interrupted(contenders=both)
    assert interrupted.measured == []
    installed = True
    interrupted(contenders=both)
    assert interrupted.measured == list(LENGTHS)
    assert {row.status for row in load_rows(interrupted.file)} == {"ok"}


def test_the_lengths_before_predict_the_next(interrupted: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = load_rows(interrupted.file)
    ResultFile(interrupted.file).put([type(first)(**{**vars(first), "median_ms": 60_000.0})])
    outcome = interrupted()
    assert interrupted.measured == []
    assert [row.status for row in outcome.rows] == ["ok", "skipped", "skipped"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")
def test_kill_9_keeps_every_finished_case(tmp_path: Path) -> None:
    """At whatever moment: the file is whole, and the same command goes on with it."""
    command = [
        sys.executable, "-m", "nhabench", "bench", "--workload", "nha-340m", "--device", "cpu", "--only", "chunked",
        "--seconds-per-case", "0.05", "--output", str(tmp_path), "--resume",
        *(argument for length in range(8, 128, 8) for argument in ("--seq-len", str(length))),
    ]  # fmt: skip
    path = os.pathsep.join(p for p in sys.path if p)
    known = {**os.environ, "NHABENCH_GIT_SHA": "a" * 40, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    file = tmp_path / "forward.csv"
    counts = []
    for least in (1, 4):
        with subprocess.Popen(command, env=known, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 90
            while not (file.exists() and len(load_rows(file)) >= least):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.kill()
        counts.append(len(load_rows(file)))
    first = load_rows(file)[0]
    subprocess.run(command, env=known, check=True, capture_output=True, timeout=120)
    rows = load_rows(file)
    assert len(rows) == 15
    assert all(row.status == "ok" for row in rows)
    assert rows[0] == first  # of the first process
    assert len({row.date for row in rows}) > 1
    assert counts[0] <= counts[1] <= 15
