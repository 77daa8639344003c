"""Suites: what pytest-benchmark is told is what was measured, once for each case, and nothing that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from nhabench import suite as module
from nhabench.bench import all_contenders
from nhabench.lab import DeviceLost
from nhabench.results import Row, load_rows
from nhabench.suite import Clock, Session, Suite
from nhabench.workloads import Case, Workload

SUITES = Path(__file__).parents[2] / "suites"


def test_the_clock_stands_still_but_for_what_passes() -> None:
    clock = Clock()
    begin = clock()
    assert clock() == begin
    clock.passes(2.5)
    assert clock() - begin == pytest.approx(2.5e-3)


def test_a_case_is_measured_once_for_all_its_contenders(
    tiny: Workload, row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Case] = []

    def measure(lab: Any, case: Case, contenders: Any, said: Any, samples: dict[str, tuple[float, ...]]) -> list[Row]:
        asked.append(case)
        samples.update(dict.fromkeys(contenders, (1.0, 2.0)))
        return [row(implementation=one, seq_len=case.seq_len) for one in contenders]

    monkeypatch.setattr(module, "measure_case", measure)
    kept: list[tuple[str, int]] = []
    opened: list[int] = []
    session = Session(lambda: opened.append(1) or object(), lambda suite, rows: kept.append((suite.name, len(rows))))  # type: ignore
    names: Any = ["a", "b"]
    one, other = (Case(tiny, 1, length, "float32") for length in (8, 16))
    for name, case in (("x", one), ("x", one), ("x", other), ("y", one)):
        found = session.measured(Suite(name, lambda device, dtype: [one], ("a", "b")), case, names)
        assert found["b"][0].seq_len == case.seq_len
        assert found["a"][1] == (1.0, 2.0)
    assert asked == [one, other, one]
    assert kept == [("x", 2), ("x", 2), ("y", 2)]
    assert opened == [1]


@pytest.mark.parametrize("file", sorted(SUITES.glob("bench_*.py")), ids=lambda file: file.stem)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_suite_has_cases_for_every_device(
    file: Path, device: str, row: Callable[..., Row], tmp_path: Path
) -> None:
    """And names only contenders that there are, and draws what it measures."""
    scope: dict[str, Any] = {}
    exec(compile(file.read_text(), file.name, "exec"), scope)
    suite = scope["SUITE"]
    assert file.stem == f"bench_{suite.name}"
    cases = list(suite.cases(torch.device(device), "float32"))
    assert len(cases) == len(set(cases)) > 1
    assert len(all_contenders(suite.contenders)) == len(suite.contenders)
    shapes = [(case, case.workload) for case in cases[:3]]
    rows = [
        row(
            workload=w.name, q_heads=w.q_heads, kv_heads=w.kv_heads, head_dim=w.head_dim, slots=w.slots,
            window=w.window, batch=case.batch, seq_len=case.seq_len, sequences=case.sequences,
            direction=case.direction,
        )
        for case, w in shapes
    ]  # fmt: skip
    drawn = suite.draw(rows, tmp_path)
    assert drawn
    assert all(path.parent == tmp_path for path in drawn)
    assert (suite.name == "training") == all(case.training for case in cases)


TINY = """
import torch
from nhabench import implementations
from nhabench.suite import Suite
from nhabench.workloads import Case, Workload

SHAPES = [Workload("w", 2, 1, 16, slots, 8) for slots in (8, 16)]
SUITE = Suite(
    "tiny", lambda device, dtype: [Case(one, 1, 40, dtype) for one in SHAPES],
    ("chunked", "naive", "gla"),
)


def test_tiny(device_time):
    device_time()
"""
WRONG = """
right = implementations.native_hybrid_attention

def wrong(q, *rest, backend, **others):
    o, state = right(q, *rest, backend=backend, **others)
    return (o * 1.01 if backend == "chunked" and q.dtype == torch.float32 else o), state

implementations.native_hybrid_attention = wrong
"""


def run(folder: Path, text: str) -> tuple[subprocess.CompletedProcess[str], list[Any]]:
    """A suite of that text, and the benchmarks that pytest-benchmark tells of."""
    shutil.copy(SUITES / "conftest.py", folder)
    (folder / "bench_tiny.py").write_text(text)
    command = [
        sys.executable, "-m", "pytest", "bench_tiny.py", "--benchmark-disable", "--benchmark-enable", "--device", "cpu",
        "--seconds-per-case", "0.05", "-p", "no:cacheprovider", "-p", "no:xdist", "-rs", "--results", "results",
        "--benchmark-json", "told.json",
    ]  # fmt: skip
    path = os.pathsep.join(p for p in sys.path if p)
    # Not as a child of these tests, which pytest-xdist runs, beside which pytest-benchmark measures nothing.
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    known |= {"PYTHONPATH": path, "NHABENCH_GIT_SHA": "b" * 40, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=known, cwd=folder, capture_output=True, text=True, timeout=300)
    assert (folder / "told.json").exists(), done.stdout + done.stderr
    return done, json.loads((folder / "told.json").read_text())["benchmarks"]


def test_benchmarks_are_of_the_measured_times(tmp_path: Path) -> None:
    done, told = run(tmp_path, TINY)
    assert done.returncode == 0, done.stdout
    rows = {(row.slots, row.implementation): row for row in load_rows(tmp_path / "results" / "tiny.csv")}
    assert set(rows) == {(slots, name) for slots in (8, 16) for name in ("chunked", "naive", "gla")}
    assert len(told) == 4
    for one in told:
        row = rows[one["extra_info"]["slots"], one["extra_info"]["implementation"]]
        stats = one["stats"]
        assert stats["rounds"] == row.samples
        assert 1e3 * median(stats["data"]) == pytest.approx(row.median_ms)
        assert 1e3 * stats["min"] == pytest.approx(row.min_ms)
        assert one["group"] == f"tiny: w 1 x 40 float32, M={row.slots}, W=8"
        assert one["extra_info"]["git_sha"] == row.git_sha == "b" * 40
        assert one["extra_info"]["tolerance"] == row.tolerance
        assert row.command == (
            "pytest suites/bench_tiny.py --benchmark-enable --device=cpu --dtype=float32 --seconds-per-case=0.05"
        )
    assert "2 skipped" in done.stdout
    assert rows[8, "gla"].note in done.stdout  # why


def test_a_lost_device_keeps_its_rows_and_what_cannot_be_kept_is_not_measured_twice(
    tiny: Workload, row: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def lost(lab: Any, case: Case, contenders: Any, said: Any, samples: dict[str, tuple[float, ...]]) -> list[Row]:
        measured.append(1)
        raise DeviceLost("gone", [row()])

    kept: list[Row] = []
    session = Session(lambda: object(), lambda suite, rows: kept.extend(rows))  # type: ignore
    suite, case = Suite("x", lambda device, dtype: [], ("a",)), Case(tiny, 1, 8, "float32")
    names: Any = ["a"]
    monkeypatch.setattr(module, "measure_case", lost)
    with pytest.raises(DeviceLost):
        session.measured(suite, case, names)
    assert kept == [row()]

    def full_disk(suite: Suite, rows: list[Row]) -> None:
        raise OSError(28, "No space left on device")

    def fine(lab: Any, case: Case, contenders: Any, said: Any, samples: dict[str, tuple[float, ...]]) -> list[Row]:
        measured.append(2)
        samples["a"] = (1.0,)
        return [row(implementation="a")]

    monkeypatch.setattr(module, "measure_case", fine)
    session.keep = full_disk
    with pytest.raises(OSError, match="No space left"):
        session.measured(suite, case, names)
    assert session.measured(suite, case, names)["a"][1] == (1.0,)
    assert measured == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu9"], "--device"),
        (["--dtype", "int9"], "int9"),
        (["--seconds-per-case", "-3"], "--seconds-per-case: expected a number >= 0, got -3.0"),
        (["--results", "conftest.py"], "--results: expected a folder, got conftest.py"),
        (["-p", "xdist", "-n", "2"], "--numprocesses"),
    ],
)
def test_bad_options_are_told_before_anything_is_measured(arguments: list[str], words: str, tmp_path: Path) -> None:
    shutil.copy(SUITES / "conftest.py", tmp_path)
    (tmp_path / "bench_tiny.py").write_text(TINY)
    command = [sys.executable, "-m", "pytest", "bench_tiny.py", "-p", "no:cacheprovider", *arguments]
    known = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    known["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(command, env=known, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4, done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_packed_sequences_are_benchmarks_too(tmp_path: Path) -> None:
    done, told = run(tmp_path, TINY.replace("40, dtype)", "40, dtype, 4)"))
    assert done.returncode == 0, done.stdout
    assert {one["group"] for one in told} == {f"tiny: w 4 packed in 40 float32, M={slots}, W=8" for slots in (8, 16)}
    assert {row.sequences for row in load_rows(tmp_path / "results" / "tiny.csv")} == {4}
    drawn = {path.name for path in (tmp_path / "results" / "tiny").iterdir()}
    assert "forward-w-packed-40-latency.png" in drawn


def test_training_is_benchmarked_beside_the_forward_pass_and_not_mixed_with_it(tmp_path: Path) -> None:
    both = """[Case(SHAPES[0], 1, length, dtype, 0, direction)
        for direction in ("forward", "training") for length in (40, 60)]"""
    text = TINY.replace("[Case(one, 1, 40, dtype) for one in SHAPES]", both).replace('"naive"', '"sdpa-math"')
    done, told = run(tmp_path, text)
    assert done.returncode == 0, done.stdout
    assert {one["group"] for one in told} == {
        f"tiny: w 1 x {length} float32{direction}, M=8, W=8" for length in (40, 60) for direction in ("", " training")
    }
    rows = {(row.direction, row.seq_len, row.implementation): row for row in load_rows(tmp_path / "results/tiny.csv")}
    assert len(rows) == 2 * 2 * 3
    for one in told:
        extra = one["extra_info"]
        length = int(one["group"].split()[4])
        row = rows[extra["direction"], length, extra["implementation"]]
        assert 1e3 * median(one["stats"]["data"]) == pytest.approx(row.median_ms)
        assert row.floor_bytes * (1 if row.direction == "training" else 3) == (
            rows["training", length, row.implementation].floor_bytes
        )
    assert rows["training", 40, "chunked"].error != rows["forward", 40, "chunked"].error
    names = {path.name for path in (tmp_path / "results/tiny").iterdir()}
    assert names >= {f"{one}-w-{kind}.png" for one in ("forward", "training") for kind in ("latency", "speedup")}
    page = (tmp_path / "results/tiny.html").read_text()
    assert "tiny.csv: forward + backward, " in page
    assert "tiny.csv: forward, " in page
    assert "Forward + backward latency" in page


def test_what_is_wrong_fails_and_has_no_time(tmp_path: Path) -> None:
    done, told = run(tmp_path, TINY + WRONG)
    assert done.returncode == 1
    assert "incorrect: Relative error" in done.stdout
    assert "2 failed, 2 passed, 2 skipped in" in done.stdout  # and no errors
    assert {one["extra_info"]["implementation"] for one in told} == {"naive"}
