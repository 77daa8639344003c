"""A run from its options to its exit code: plan, measure case by case, keep every row, draw, tell."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nhabench.baselines import baselines
from nhabench.ceilings import measure_ceilings, open_device
from nhabench.contender import Contender
from nhabench.environment import GIT_SHA_VARIABLE, read_environment
from nhabench.errors import first_line
from nhabench.gpu import GpuWatch
from nhabench.implementations import implementations
from nhabench.lab import DeviceLost, Lab
from nhabench.measure import measure_case
from nhabench.packed import for_packed
from nhabench.plan import CPU_LIMIT, affordable, estimated_seconds
from nhabench.plots import draw_all
from nhabench.results import ResultFile, Row
from nhabench.rows import earlier_rows
from nhabench.tables import print_tables
from nhabench.workloads import Case

EXIT_OK, EXIT_WRONG, EXIT_INCOMPLETE, EXIT_DEVICE, EXIT_DISK = 0, 1, 3, 70, 74
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
CSV_NAME = "forward.csv"


@dataclass(frozen=True)
class Options:
    """What to run. `trim`: on a CPU, only the cases that end in a few minutes. `seconds`: of timing for each case.
    `resume`: only what the same run, interrupted, has not measured yet. `warm`: also with inputs in the caches."""

    cases: Sequence[Case]
    contenders: Sequence[Contender]
    device: torch.device
    seconds: float
    output: Path
    command: str
    trim: bool
    resume: bool = False
    warm: bool = False


@dataclass
class Outcome:
    """What a run left: its rows, the files, and what its end means to a shell."""

    csv: Path
    rows: list[Row] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)
    exit_code: int = EXIT_OK


def all_contenders(only: Sequence[str] = ()) -> list[Contender]:
    """Every contender that serves batches, or the named ones, which may be for packed sequences alone. Raises
    ValueError for a name that is none."""
    usual = [*implementations(), *baselines()]
    known = {contender.name: contender for contender in (*usual, *for_packed())}
    for name in only:
        if name not in known:
            raise ValueError(f"only: expected some of {', '.join(known)}, got {name!r}")
    chosen = [contender for name, contender in known.items() if name in only] if only else usual
    # naive is host-bound: last in each round, it delays nobody.
    return sorted(chosen, key=lambda contender: contender.name == "naive")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated. Only a main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def make_lab(device: torch.device, dtype: torch.dtype, command: str, seconds: float, warm: bool = False) -> Lab:
    """Open the device: timer, clocks, provenance, ceilings. `seconds`: of timing for each case. `warm`: see Lab."""
    timer = open_device(device)
    watch = GpuWatch(device)
    environment = read_environment(device, watch, command)
    return Lab(device, timer, watch, environment, measure_ceilings(device, dtype, timer), seconds, warm)


def run(options: Options, console: Console, progress: Console) -> Outcome:
    """Run the bench. Tables and paths go to `console`, the progress bar and troubles to `progress`.

    The exit code of the outcome: 0; 1 when an NHA implementation was wrong; 3 when another row ended as failed, out of
    memory or incorrect; 70 when the device was lost, 74 when a file could not be written, 130 after Ctrl-C, 143 after
    SIGTERM. What was measured until then is in the CSV in every case.
    """
    results = ResultFile(options.output / CSV_NAME)
    outcome = Outcome(results.path)
    with torch.no_grad(), terminable():
        try:
            _measure(options, results, outcome, progress)
        except KeyboardInterrupt as stop:
            _interrupted(outcome, stop, progress)
        except DeviceLost as error:
            outcome.exit_code = EXIT_DEVICE
            progress.print(f"{error}. The cases that were finished are kept.", soft_wrap=True)
        except OSError as error:
            outcome.exit_code = EXIT_DISK
            problem = error.strerror or error
            progress.print(f"Could not write {results.path.name}: {problem}. The file is as it was before this case.")
        try:
            _show(results, outcome, console, progress)
        except KeyboardInterrupt as stop:
            _interrupted(outcome, stop, progress)
    outcome.exit_code = outcome.exit_code or _verdict(outcome.rows)
    return outcome


def _interrupted(outcome: Outcome, stop: KeyboardInterrupt, progress: Console) -> None:
    outcome.exit_code = EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    word = "Terminated" if isinstance(stop, Terminated) else "Interrupted"
    progress.print(f"{word}: the cases that were finished are kept.")


def _verdict(rows: Sequence[Row]) -> int:
    """The exit code of a run that came to its end. What could not run here, or was skipped, is no failure."""
    if any(row.family == "nha" and row.status == "incorrect" for row in rows):
        return EXIT_WRONG
    if any(row.status in ("failed", "out of memory", "incorrect") for row in rows):
        return EXIT_INCOMPLETE
    return EXIT_OK


def _open(options: Options) -> Lab:
    try:
        dtype = options.cases[0].torch_dtype
        return make_lab(options.device, dtype, options.command, options.seconds, options.warm)
    except (RuntimeError, MemoryError) as error:
        raise DeviceLost(f"The device could not be opened: {first_line(error)}") from error


def _measure(options: Options, results: ResultFile, outcome: Outcome, progress: Console) -> None:
    lab = _open(options)
    if not lab.environment.git_sha:
        progress.print(
            f"git knows no commit of this code, and {GIT_SHA_VARIABLE} names none (a sha, or a sha and '+dirty'): "
            "the rows will not say which code was measured.",
            soft_wrap=True,
        )
    elif options.resume and lab.environment.git_dirty is not False:
        progress.print("The checkout differs from its commit: every case is measured again.", soft_wrap=True)
    cases = list(options.cases)
    trim = options.trim and options.device.type == "cpu"
    if trim:
        cases = affordable(cases, lab.ceilings, options.seconds)
        if len(cases) < len(options.cases):
            progress.print(
                f"{len(cases)} of {len(options.cases)} cases end in a few minutes on this CPU; "
                "--workload and --seq-len name others.",
                soft_wrap=True,
            )
    # The bar moves with the expected seconds, so that the time left means something.
    weights = [estimated_seconds(case, lab.ceilings, options.seconds) for case in cases]
    began = time.monotonic()
    with _bar(progress) as bar:
        task = bar.add_task("", total=sum(weights))
        for number, (case, weight) in enumerate(zip(cases, weights, strict=True), start=1):
            elapsed, planned = time.monotonic() - began, sum(weights[: number - 1])
            # Slower than estimated: others use the machine too.
            if trim and planned and elapsed + weight * max(1.0, elapsed / planned) > CPU_LIMIT:
                progress.print(
                    f"Out of time: {case} and what follows is left out; --workload names it.", soft_wrap=True
                )
                break

            def say(step: str, head: str = f"{number}/{len(cases)} {case}") -> None:
                bar.update(task, description=f"{head}: {step}")

            earlier = earlier_rows(lab, case, options.contenders, results.rows) if options.resume else None
            if earlier is not None:
                outcome.rows.extend(earlier)
                bar.update(task, advance=weight)
                continue
            try:
                rows = measure_case(lab, case, options.contenders, say)
            except DeviceLost as lost:
                rows = lost.rows
                outcome.rows.extend(rows)
                results.put(rows)
                raise
            outcome.rows.extend(rows)
            results.put(rows)
            bar.update(task, advance=weight)
            if not progress.is_terminal:  # no bar in a log: a line for each case
                progress.print(f"{number}/{len(cases)} {case}: {sum(row.timed for row in rows)} timed", highlight=False)


def _bar(console: Console) -> Progress:
    columns = (BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.description}"), console=console, transient=True)


def _show(results: ResultFile, outcome: Outcome, console: Console, progress: Console) -> None:
    """Tables of this run; plots of everything the file holds about its workloads."""
    print_tables(outcome.rows, console)
    names = {row.workload for row in outcome.rows}
    try:
        outcome.plots = draw_all([row for row in results.rows if row.workload in names], results.path.parent)
    except OSError as error:
        outcome.exit_code = outcome.exit_code or EXIT_DISK
        progress.print(f"Could not write the plots: {error.strerror or error}.")
    if results.path.exists():
        console.print(f"Results: {results.path}", soft_wrap=True)
    for plot in outcome.plots:
        console.print(f"Plot:    {plot}", soft_wrap=True)
