"""Fresh processes of the bench: how their rows are joined, what passes, how they are started and ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nhabench import verdicts
from nhabench.bench import Terminated, terminable
from nhabench.cli import app
from nhabench.compare import LIMITS
from nhabench.repeat import Agreement, Process, bench_once, repeated, run_processes
from nhabench.results import Row, to_csv

RowMaker = Callable[..., Row]
RUNNER = CliRunner()


def agreement(*processes: Sequence[Row], wanted: int = 0, limit: float = 0.01) -> Agreement:
    return Agreement([Process(0, 1.0, rows) for rows in processes], wanted or len(processes), limit)


def test_rows_are_joined_by_what_they_are_about(row: RowMaker) -> None:
    first = [row(median_ms=2.0), row(seq_len=1024, median_ms=4.0)]
    second = [row(seq_len=1024, median_ms=3.9), row(median_ms=2.04), row(seq_len=2048)]
    short, longer, lone = repeated([first, second])
    assert (short.case, short.label, short.medians_ms) == ("tiny 1 x 512 float32", "NHA chunked", (2.0, 2.04))
    assert short.spread == pytest.approx(0.02)
    assert longer.spread == pytest.approx(4.0 / 3.9 - 1)
    assert (lone.statuses, lone.medians_ms, lone.spread) == (("", "ok"), (None, 2.0), None)
    assert lone.trouble == "NHA chunked, tiny 1 x 2048 float32: no row, ok."


def runs(row: RowMaker, *spreads: float, base_ms: float = 1.0) -> Agreement:
    """Three processes, whose rows differ by these spreads."""
    factors = ((0.0, 1.0, 0.5)[(number + place) % 3] for number in range(3) for place in range(len(spreads)))
    return agreement(
        *(
            [row(seq_len=512 + place, median_ms=base_ms * (1 + next(factors) * spread))
             for place, spread in enumerate(spreads)]
            for _ in range(3)
        )
    )  # fmt: skip


def test_the_middle_and_the_worst_row_are_judged(row: RowMaker) -> None:
    good = runs(row, 0.002, 0.009, 0.019)
    assert (good.passed, good.exit_code, good.median) == (True, 0, pytest.approx(0.009))
    assert good.worst is not None
    assert good.worst.case == "tiny 1 x 514 float32"
    assert not runs(row, 0.002, 0.011, 0.019).passed
    late = runs(row, 0.002, 0.009, 0.021)
    assert (late.passed, late.exit_code) == (False, 1)


def test_a_short_row_counts_in_the_middle_alone(row: RowMaker) -> None:
    short = runs(row, 0.002, 0.003, 0.5, base_ms=0.02)
    assert (short.worst, short.passed) == (None, True)
    assert not runs(row, 0.02, base_ms=0.02).passed
    assert runs(row, 0.002, 0.003, 0.5, base_ms=0.051).worst is not None


@pytest.mark.parametrize(
    ("statuses", "trouble"),
    [
        (("unavailable", "unavailable"), ""),
        (("unsupported", "unsupported"), ""),
        (("unavailable", "ok"), "unavailable, ok. Why."),
        (("failed", "failed"), "failed, failed. Why."),
        (("incorrect", "ok"), "incorrect, ok. Why."),
        (("out of memory", "out of memory"), "out of memory, out of memory. Why."),
    ],
)
def test_what_was_not_timed_is_a_failure_unless_nobody_can(
    statuses: tuple[str, str], trouble: str, row: RowMaker
) -> None:
    processes = [
        [
            row(),
            row(implementation="triton", label="NHA triton", status=status, note="" if status == "ok" else "Why.",
                median_ms=2.0 if status == "ok" else None),
        ]
        for status in statuses
    ]  # fmt: skip
    found = agreement(*processes)
    assert found.troubles == ([f"NHA triton, tiny 1 x 512 float32: {trouble}"] if trouble else [])
    assert found.passed is not bool(trouble)


def test_nothing_timed_is_no_pass(row: RowMaker) -> None:
    rows = [row(status="unavailable", median_ms=None)]
    found = agreement(rows, rows)
    assert (found.passed, found.exit_code, found.median, found.troubles) == (False, 1, None, [])


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has a shell script run in place of python."""

    def runs(script: str) -> None:
        path = tmp_path / "child"
        path.write_text(f"#!/bin/sh\ncd '{tmp_path}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return runs


def test_each_process_is_a_bench_of_its_own(child: Callable[[str], None], tmp_path: Path, row: RowMaker) -> None:
    for number, ms in enumerate((2.0, 2.1)):
        told = {"rows": [{**vars(row(median_ms=ms)), "low_ms": None}]}
        (tmp_path / f"{number}").write_text(json.dumps(told))
    child('echo "$@" >> calls; echo "1/1 done" >&2; cat $(($(wc -l < calls) - 1))')
    lines: list[str] = []
    found = run_processes(["--only", "chunked"], 2, 0.1, lines.append)
    (one,) = found.rows
    assert (one.medians_ms, found.passed) == ((2.0, 2.1), True)
    assert lines == [f"process {n}/2: {said}" for n in (1, 2) for said in ("starting", "1/1 done")]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert all(call.startswith("-P -m nhabench bench --only chunked --json --output ") for call in calls)
    folders = [Path(call.split()[-1]) for call in calls]
    assert len(set(folders)) == 2
    assert not any(folder.parent.exists() for folder in folders)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo lost >&2; echo the device >&2; exit 70", "ended with exit code 70: lost / the device"),
        ("kill -9 $$", "ended with exit code -9: it said nothing"),
        ("echo Traceback >&2; exit 1", "ended with exit code 1: Traceback"),  # python's own, not the bench's
        ("echo nonsense", "ended with exit code 0: it said nothing"),
    ],
)
def test_a_process_that_dies_is_told_and_no_other_is_started(
    script: str, said: str, child: Callable[[str], None], tmp_path: Path
) -> None:
    child(f"echo . >> calls; {script}")
    found = run_processes([], 3, 0.1)
    assert found.troubles == [f"Process 1 of 3 {said}"]
    assert (found.passed, found.exit_code) == (False, 70)
    assert (tmp_path / "calls").read_text() == ".\n"
    assert found.summary()["processes"][0]["exit_code"] == found.processes[0].exit_code


def test_a_row_that_was_wrong_is_no_dead_process(child: Callable[[str], None], tmp_path: Path, row: RowMaker) -> None:
    wrong = row(status="incorrect", note="Wrong by 3.", median_ms=None)
    (tmp_path / "rows").write_text(json.dumps({"rows": [vars(wrong)]}))
    child("cat rows; exit 1")
    found = run_processes([], 2, 0.1)
    assert (found.exit_code, found.troubles) == (
        1, ["NHA chunked, tiny 1 x 512 float32: incorrect, incorrect. Wrong by 3."]
    )  # fmt: skip


def test_a_signal_ends_the_process_that_runs(child: Callable[[str], None], tmp_path: Path) -> None:
    child('echo $$ > pid; echo "1/9 begun" >&2; exec sleep 60')

    def said(line: str) -> None:
        signal.raise_signal(signal.SIGTERM)

    began = time.monotonic()
    with pytest.raises(Terminated), terminable():
        bench_once([], tmp_path, said)
    assert time.monotonic() - began < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_real_processes_of_a_tiny_bench(tmp_path: Path) -> None:
    (tmp_path / "shapes.toml").write_text("[small]\nq_heads=2\nkv_heads=1\nhead_dim=16\nslots=8\nwindow=8\n")
    out = tmp_path / "results" / "repeat.json"
    done = RUNNER.invoke(
        app,
        ["repeat", "--processes", "2", "--workloads-file", str(tmp_path / "shapes.toml"), "--workload", "small",
         "--seq-len", "32", "--only", "chunked", "--only", "sdpa-cudnn", "--device", "cpu",
         "--seconds-per-case", "0.05", "--output", str(out), "--json"],
    )  # fmt: skip
    assert done.exit_code in (0, 1), done.output  # two processes on a busy machine may differ by any amount
    told = json.loads(done.stdout)
    assert told == json.loads(out.read_text())
    assert done.exit_code == (0 if told["passed"] else 1)
    assert [one["exit_code"] for one in told["processes"]] == [0, 0]
    assert (told["cases"], told["troubles"]) == (["small 1 x 32 float32"], [])
    timed, unavailable = told["rows"]
    assert (timed["implementation"], timed["statuses"]) == ("chunked", ["ok", "ok"])
    assert timed["spread"] == max(timed["medians_ms"]) / min(timed["medians_ms"]) - 1 == told["median"]
    assert (unavailable["statuses"], unavailable["spread"]) == (["unavailable"] * 2, None)
    assert told["environment"]["command"] == (
        "python -m nhabench repeat --processes 2 --workload small --workloads-file shapes.toml --seq-len 32 "
        "--only chunked --only sdpa-cudnn --device cpu --dtype float32 --seconds-per-case 0.05 --output repeat.json"
    )
    assert "process 2/2: 1/1 small 1 x 32 float32: 1 timed" in done.stderr


@pytest.mark.parametrize(("spread", "dead", "code"), [(0.0, False, 0), (0.5, False, 1), (0.0, True, 70)])
def test_the_shell_is_told(
    spread: float, dead: bool, code: int, row: RowMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def ran(arguments: Sequence[str], wanted: int, limit: float, said: object) -> Agreement:
        asked.append((wanted, limit))
        last = Process(-11 if dead else 0, 1.0, [] if dead else [row(median_ms=2.0 * (1 + spread))])
        return Agreement([Process(0, 1.0, [row()]), last], wanted, limit)

    monkeypatch.setattr(verdicts, "run_processes", ran)
    out = tmp_path / "repeat.json"
    done = RUNNER.invoke(app, ["repeat", "--device", "cpu", "--processes", "2", "--output", str(out)])
    assert done.exit_code == code, done.output
    assert asked == [(2, LIMITS["cpu"])]
    told = json.loads(out.read_text())
    assert told["passed"] is (code == 0)
    assert done.stdout.splitlines()[-1] == ("passed" if code == 0 else "failed")
    if dead:
        assert "Process 2 of 2 ended with exit code -11" in done.stdout
    else:
        assert f"differ by {100 * spread:.3g} % in the median of 1 rows (limit: 10 %)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--processes", "1"], ["--processes", ">= 2", "got 1"]),
        (["--seq-len", "0"], ["--seq-len", ">= 1", "got 0"]),
        (["--seconds-per-case", "-1"], ["--seconds-per-case", ">= 0", "got -1"]),
        (["--workload", "gpt"], ["--workload", "'gpt'"]),
        (["--only", "fast"], ["--only", "'fast'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
    ],
)
def test_bad_arguments_are_told_before_anything_starts(
    arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(verdicts, "run_processes")
    done = RUNNER.invoke(app, ["repeat", "--device", "cpu", *arguments], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", ["repeat", "selftest", "regress"])
def test_an_output_that_cannot_be_written_is_told_first(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: RowMaker
) -> None:
    monkeypatch.setattr(verdicts, "checkout", lambda: tmp_path)
    (tmp_path / "file").write_text(to_csv([row()]))
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        done = RUNNER.invoke(app, [command, "--device", "cpu", "--output", str(path)], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        assert "--output" in done.stderr
        assert "expected a file that can be written, got " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_fails_after_all_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: RowMaker) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdicts, "run_processes", lambda *_: agreement([row()], [row()]))
    monkeypatch.setattr("nhabench.results.os.fsync", full)
    out = tmp_path / "repeat.json"
    done = RUNNER.invoke(app, ["repeat", "--device", "cpu", "--output", str(out), "--json"])
    assert done.exit_code == 74
    assert json.loads(done.stdout)["passed"]
    assert "Could not write repeat.json: No space left on device." in done.stderr
    assert not out.exists()
