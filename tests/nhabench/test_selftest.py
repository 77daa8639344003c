"""The harness is asked about slowdowns that it was given: what passes, what fails, and that they are real."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nhabench import cli, racing, reference, selftest, verdicts
from nhabench.cheats import CHEATS, Planted, plant
from nhabench.compare import Ratio
from nhabench.environment import read_environment
from nhabench.floors import Ceilings
from nhabench.gpu import GpuWatch
from nhabench.lab import Lab
from nhabench.selftest import SHARES, Trial, passed, pause_of, run_trials
from nhabench.timers import TwoTimes
from nhabench.timing import Sample, Stopwatch, WallClock
from nhabench.workloads import Workload

CPU = torch.device("cpu")


def trials(alarms: int, caught: int, among: int = 100) -> list[Trial]:
    """At a limit of 1 %: between equals, at the limit itself, and at twice the limit."""
    return [
        Trial(0.0, 0.0, among, alarms, 0),
        Trial(0.01, 0.01, among, among // 2, among // 2),
        Trial(0.02, 0.02, among, caught, 0),
    ]


def test_few_alarms_and_few_misses_pass() -> None:
    assert passed(trials(alarms=1, caught=95), 0.01)
    assert not passed(trials(alarms=2, caught=100), 0.01)
    assert not passed(trials(alarms=0, caught=94), 0.01)
    assert not passed(trials(alarms=1, caught=10, among=10), 0.01)
    assert not passed([*trials(alarms=0, caught=100), Trial(0.05, 0.09, 100, 100, 0)], 0.01)  # not what was asked
    for caught in (24, 25):  # of its own number of comparisons, not of the others'
        assert passed([*trials(alarms=0, caught=100), Trial(0.05, 0.05, 25, caught, 0)], 0.01)
    assert not passed([*trials(alarms=0, caught=100), Trial(0.05, 0.05, 25, 23, 0)], 0.01)


def test_a_pause_keeps_its_time() -> None:
    begin = time.perf_counter()
    pause_of(20.0, CPU)()
    assert time.perf_counter() - begin >= 0.020


class Machine:
    """A timer, and the time that calls and pauses take on it."""

    name = "fake"

    def __init__(self) -> None:
        self.now_ms = 0.0

    def spend(self, milliseconds: float) -> None:
        self.now_ms += milliseconds

    def stopwatch(self) -> Stopwatch:
        def time(call: Callable[[], object]) -> Sample:
            before = self.now_ms
            call()
            return Sample(self.now_ms - before)

        return time


def test_the_second_side_is_slower_by_what_is_said(
    tiny: Workload, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()

    def steady(inputs: Any) -> torch.Tensor:
        machine.spend(2.0)
        return inputs.q.clone()

    monkeypatch.setattr(selftest, "open_device", lambda device: machine)
    monkeypatch.setattr(selftest, "pause_of", lambda ms, device: lambda: machine.spend(ms))
    steps: list[str] = []
    found = run_trials(contenders.nha("a", steady), tiny.case(16, "float32"), CPU, 0.1, 5, 0.0, steps.append)
    assert [trial.slowdown for trial in found] == [0.1 * multiple for multiple in SHARES]
    for trial in found:
        assert trial.measured == pytest.approx(trial.slowdown)
    assert [trial.regress for trial in found][0::2] == [0, 5]
    assert passed(found, 0.1)
    assert [trial.comparisons for trial in found] == [5, 2, 5, 2]  # a quarter, rounded up
    assert len(steps) == 14
    assert steps[-1] == "slower by 50.0%: 2/2"


def test_every_cheat_is_caught_or_of_no_use(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 32)
    clock = time.perf_counter
    watch = GpuWatch(CPU)
    lab = Lab(CPU, WallClock(), watch, read_environment(CPU, watch, ""), Ceilings(1, 1), seconds=0.02)
    with torch.no_grad():
        planted = plant(lab, tiny.case(100, "float32"), "chunked")
    assert len(planted) == len(CHEATS) + 1
    assert [one.name for one in planted if not one.caught] == []
    assert time.perf_counter is clock
    # Without the guard they pass for honest.
    monkeypatch.setattr(racing, "look_again", lambda entry, inputs: None)
    with torch.no_grad():
        missed = {one.name for one in plant(lab, tiny.case(100, "float32"), "chunked") if not one.caught}
    assert {"it remembers its output", "it idles once it is warm"} <= missed


SLOWER = (0.0, 0.0, 0.0, 0.1, 0.2, 0.2, 0.2, 0.5)  # what three comparisons, and one where a quarter does, find


@pytest.mark.parametrize(
    ("works", "caught", "agree"),
    [(True, True, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_the_shell_is_told(
    works: bool, caught: bool, agree: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios = iter(range(10**6))

    def turns(base: object, new: object, seconds: float) -> Ratio:
        slower = SLOWER[next(ratios)] if works else 0.0
        return Ratio(1 + slower, 0.99 + slower, 1.01 + slower, 9)

    monkeypatch.setattr(selftest, "take_turns", turns)
    monkeypatch.setattr(verdicts, "make_lab", lambda *_: None)
    monkeypatch.setattr(verdicts, "plant", lambda *_: [Planted("it lies", caught, "what it was told")])
    monkeypatch.setattr(verdicts, "compare_timers", lambda *_: [TwoTimes("a copy", 1.0, 1.1, 1.09, 1.11, agree)])
    good = works and caught and agree
    out = tmp_path / "selftest.json"
    arguments = ["selftest", "--device", "cpu", "--comparisons", "3"]
    done = CliRunner().invoke(cli.app, [*arguments, "--json", "--output", str(out)])
    told = json.loads(done.stdout)
    assert told == json.loads(out.read_text())
    command = "python -m nhabench selftest --comparisons 3 --device cpu --output selftest.json"
    assert (told["environment"]["command"], told["environment"]["torch"]) == (command, torch.__version__)
    assert (done.exit_code, told["passed"], told["limit"]) == (0 if good else 1, good, 0.1)
    assert [trial["regress"] for trial in told["trials"]] == ([0, 0, 3, 1] if works else [0, 0, 0, 0])
    assert told["cheats"] == [{"name": "it lies", "caught": caught, "told": "what it was told"}]
    both = {"call": "a copy", "events_ms": 1.0, "ratio": 1.1, "low": 1.09, "high": 1.11, "agree": agree, "note": ""}
    assert told["timers"] == [both]
    ratios = iter(range(10**6))
    done = CliRunner().invoke(cli.app, arguments)
    words = ("passed" if good else "failed", "20.0%", "it lies", "what it was told", "a copy", "1.1000")
    for word in (*words, "yes" if caught else "NO", "yes" if agree else "NO"):
        assert word in done.stdout
