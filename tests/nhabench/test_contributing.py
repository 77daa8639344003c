"""The examples of CONTRIBUTING.md work as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nhabench import baselines, reference
from nhabench.bench import all_contenders
from nhabench.environment import read_environment
from nhabench.floors import Ceilings, Floor
from nhabench.gpu import GpuWatch
from nhabench.lab import Lab
from nhabench.measure import measure_case
from nhabench.timing import WallClock
from nhabench.workloads import Case, Workload, parse_workloads

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


def example(heading: str, language: str) -> str:
    """The code below a heading."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return str(code)


def lines(code: str) -> int:
    """Those that hold anything."""
    return sum(bool(line.strip()) for line in code.splitlines())


def test_a_baseline_takes_under_20_lines(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 32)
    code = example("Adding a baseline", "python")
    assert lines(code) < 20
    module: dict[str, Any] = dict(vars(baselines), Floor=Floor)  # where it belongs, with what that file imports
    exec(compile(code, "CONTRIBUTING.md", "exec"), module)
    watch = GpuWatch(CPU)
    lab = Lab(CPU, WallClock(), watch, read_environment(CPU, watch, ""), Ceilings(1, 1), seconds=0.02)
    contender = module["_mean_contender"]()
    (row,) = measure_case(lab, Case(tiny, 2, 50, "float32"), [contender], lambda step: None)
    assert (row.status, row.reference) == ("ok", "its definition in float64 at T=32")
    assert row.error is not None
    assert row.tolerance is not None
    assert row.error < row.tolerance
    assert row.floor_bytes == 2 * 50 * (2 + 4) * 16 * 4


def test_a_workload_takes_under_10_lines() -> None:
    text = example("Adding a workload", "toml")
    assert lines(text) < 10
    (workload,) = parse_workloads(text, "CONTRIBUTING.md").values()
    assert (workload.name, workload.window, workload.tokens) == ("tiny-example", 16, 16384)


def test_a_suite_is_as_short() -> None:
    code = example("Adding a suite", "python")
    assert lines(code) < 15
    module: dict[str, Any] = {}
    exec(compile(code, "CONTRIBUTING.md", "exec"), module)
    suite = module["SUITE"]
    assert [case.batch for case in suite.cases(CPU, "float32")] == [1, 4, 16]
    assert len(all_contenders(suite.contenders)) == 3
