"""How pytest-benchmark runs a suite. A file of this folder says what is measured: its `SUITE`, and a test that takes
`device_time`, which is called for every case and contender of it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

from nhabench.bench import all_contenders, make_lab
from nhabench.contender import Contender
from nhabench.lab import DeviceLost, Lab
from nhabench.options import device_of, dtype_of
from nhabench.report import build_report, write_report
from nhabench.results import ResultFile, Row
from nhabench.suite import Clock, Session, Suite
from nhabench.workloads import Case, torch_dtype

CLOCK = Clock()
# Beside a benchmark's times in pytest-benchmark's JSON: what they are worth, and where they come from.
SHOWN = (
    "implementation", "direction", "slots", "window", "sequences", "timer", "cache", "stop", "note", "low_ms",
    "high_ms", "graph_ratio", "floor_ms", "floor_fraction", "peak_bytes", "error", "tolerance", "device", "git_sha",
    "git_dirty", "torch", "triton", "driver",
)  # fmt: skip
RESULTS = pytest.StashKey[dict[str, tuple[Suite, ResultFile]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nhabench", "what is measured")
    group.addoption("--device", help="cpu, cuda or cuda:N. A GPU where there is one, by default.")
    group.addoption("--dtype", help="bfloat16 on a GPU, float32 on a CPU, by default.")
    group.addoption("--seconds-per-case", type=float, default=2.0, help="As of nhabench bench.")
    group.addoption("--results", type=Path, help="Folder that gets <suite>.csv, and its plots in <suite>/.")


def pytest_configure(config: pytest.Config) -> None:
    """Look at the options before anything is measured."""
    results: Path | None = config.getoption("results")
    seconds = config.getoption("seconds_per_case")
    try:
        dtype_of(config.getoption("dtype"), device_of(config.getoption("device")))
    except typer.BadParameter as error:
        raise pytest.UsageError(f"{error.param_hint}: {error.message}") from error
    if not 0 <= seconds < math.inf:
        raise pytest.UsageError(f"--seconds-per-case: expected a number >= 0, got {seconds}")
    if results is not None and results.exists() and not results.is_dir():
        raise pytest.UsageError(f"--results: expected a folder, got {results.name}")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--numprocesses: expected none: two workers would measure each other")
    config.stash[RESULTS] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device_time" not in metafunc.fixturenames:
        return
    suite: Suite = metafunc.module.SUITE
    device = device_of(metafunc.config.getoption("device"))
    cases = list(suite.cases(device, dtype_of(metafunc.config.getoption("dtype"), device)))
    metafunc.parametrize("case", cases, ids=str, scope="module")
    metafunc.parametrize("contender", all_contenders(suite.contenders), ids=lambda one: one.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device_time" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))
            # What another package warns of is no failure of it here, as it is none in a bench.
            item.add_marker(pytest.mark.filterwarnings("default"))
            # Of those that fail or are skipped.
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all"))


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    config = request.config
    results: Path | None = config.getoption("results")
    device = device_of(config.getoption("device"))
    dtype = dtype_of(config.getoption("dtype"), device)
    disabled = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
    seconds = 0.0 if disabled else config.getoption("seconds_per_case")

    def open_lab() -> Lab:
        # What repeats it, without paths of this machine.
        files = [Path(name.partition("::")[0]).name for name in config.args]
        command = ["pytest", *(f"suites/{name}" if name != "suites" else name for name in files)]
        command += ["--benchmark-enable", f"--device={device}", f"--dtype={dtype}", f"--seconds-per-case={seconds:g}"]
        return make_lab(device, torch_dtype(dtype), shlex.join(command), seconds)

    def keep(suite: Suite, rows: list[Row]) -> None:
        if results is not None:
            files = config.stash[RESULTS]
            _, file = files.setdefault(suite.name, (suite, ResultFile(results / f"{suite.name}.csv")))
            file.put(rows)

    return Session(open_lab, keep)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Draw what was kept, and tell it as a page; each suite by itself, since two may draw the same workload."""
    for suite, file in config.stash[RESULTS].values():
        folder, page = file.path.with_suffix(""), file.path.with_suffix(".html")
        told = [f"Results: {file.path}"]
        steps: dict[Path, Callable[[], object]] = {
            folder: partial(suite.draw, file.rows, folder),
            page: partial(_write_page, file.path, page),
        }
        for path, write in steps.items():
            try:
                write()
                told.append(str(path))
            except (OSError, ValueError) as error:
                told.append(f"could not write {path.name}: {error}")
        terminalreporter.write_line(", ".join(told))


def _write_page(csv: Path, page: Path) -> None:
    write_report(build_report(csv), page)


@pytest.fixture
def device_time(
    benchmark: Any, session: Session, case: Case, contender: Contender, request: pytest.FixtureRequest
) -> Callable[[], None]:
    """Benchmark the contender at the case. What is wrong or broken fails, what cannot run here is skipped."""
    suite: Suite = request.module.SUITE

    def run() -> None:
        try:
            row, samples = session.measured(suite, case, all_contenders(suite.contenders))[contender.name]
        except DeviceLost as error:
            pytest.exit(str(error), returncode=70)
        if row.status != "ok":
            if row.status in ("incorrect", "failed", "out of memory"):
                pytest.fail(f"{row.status}: {row.note}")
            pytest.skip(row.note)
        benchmark.group = f"{suite.name}: {case}, M={row.slots}, W={row.window}"
        benchmark.extra_info.update({name: getattr(row, name) for name in SHOWN})
        left = iter(samples)
        benchmark.pedantic(lambda: CLOCK.passes(next(left)), rounds=len(samples))

    return run
