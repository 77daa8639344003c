"""How pytest-benchmark runs a suite. A file of this folder says what is measured: its `SUITE`, and a test that takes
`device_time`, which is called for every case and contender of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nhabench.bench import all_contenders, make_lab
from nhabench.contender import Contender
from nhabench.measure import Lab
from nhabench.results import ResultFile, Row
from nhabench.suite import Clock, Session, Suite
from nhabench.workloads import Case, Workload

CLOCK = Clock()
# Beside a benchmark's times in pytest-benchmark's JSON: what they are worth, and where they come from.
SHOWN = (
    "implementation", "slots", "window", "timer", "cache", "stop", "note", "low_ms", "high_ms", "floor_ms",
    "floor_fraction", "error", "tolerance", "device", "git_sha", "git_dirty", "torch", "triton", "driver",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nhabench", "what is measured")
    group.addoption("--device", help="cpu, cuda or cuda:N. A GPU where there is one, by default.")
    group.addoption("--dtype", help="bfloat16 on a GPU, float32 on a CPU, by default.")
    group.addoption("--seconds-per-case", type=float, default=2.0, help="Time limit of timing at each B x T.")
    group.addoption("--results", type=Path, help="Folder that gets <suite>.csv, and its plots in <suite>/.")


def _device(config: pytest.Config) -> torch.device:
    return torch.device(config.getoption("device") or ("cuda:0" if torch.cuda.is_available() else "cpu"))


def _dtype(config: pytest.Config) -> str:
    return str(config.getoption("dtype") or ("float32" if _device(config).type == "cpu" else "bfloat16"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device_time" not in metafunc.fixturenames:
        return
    suite: Suite = metafunc.module.SUITE
    cases = list(suite.cases(_device(metafunc.config), _dtype(metafunc.config)))
    metafunc.parametrize("case", cases, ids=str, scope="module")
    metafunc.parametrize("contender", all_contenders(suite.contenders), ids=lambda one: one.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    config = request.config
    results: Path | None = config.getoption("results")
    files: dict[str, tuple[Suite, ResultFile]] = {}

    def open_lab() -> Lab:
        command = shlex.join(["pytest", *config.invocation_params.args])
        seconds = 0.0 if config.getoption("benchmark_disable") else config.getoption("seconds_per_case")
        dtype = Case(Workload("any", 1, 1, 1), 1, 1, _dtype(config)).torch_dtype
        return make_lab(_device(config), dtype, command, seconds)

    def keep(suite: Suite, rows: list[Row]) -> None:
        if results is not None:
            _, file = files.setdefault(suite.name, (suite, ResultFile(results / f"{suite.name}.csv")))
            file.put(rows)

    yield Session(open_lab, keep)
    for suite, file in files.values():  # into a folder of their own: two suites may draw the same workload
        suite.draw(file.rows, file.path.with_suffix(""))


@pytest.fixture
def device_time(
    benchmark: Any, session: Session, case: Case, contender: Contender, request: pytest.FixtureRequest
) -> Callable[[], None]:
    """Benchmark the contender at the case. What is wrong or broken fails, what cannot run here is skipped."""
    suite: Suite = request.module.SUITE

    def run() -> None:
        row, samples = session.measured(suite, case, all_contenders(suite.contenders))[contender.name]
        if row.status in ("incorrect", "failed", "out of memory"):
            pytest.fail(f"{row.status}: {row.note}")
        if row.status != "ok":
            pytest.skip(row.note)
        benchmark.group = f"{suite.name}: {case}, M={row.slots}, W={row.window}"
        benchmark.extra_info.update({name: getattr(row, name) for name in SHOWN})
        left = iter(samples)
        benchmark.pedantic(lambda: CLOCK.passes(next(left)), rounds=len(samples))

    return run
