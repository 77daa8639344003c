"""The commands that end in a verdict: `regress`, `selftest` and `repeat`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from nha_kernels import BACKENDS
from nhabench.bench import EXIT_DEVICE, make_lab, terminable
from nhabench.cheats import Planted, plant
from nhabench.compare import EXIT_CODES, LIMITS, worst
from nhabench.environment import Environment, checkout, differs, read_environment
from nhabench.gpu import GpuWatch
from nhabench.implementations import implementations
from nhabench.options import (
    AsJson,
    Device,
    Dtype,
    Flags,
    JsonFile,
    SecondsPerCase,
    WorkloadsFile,
    at_least,
    changed,
    check_commit,
    check_writable,
    command_of,
    console,
    contenders_of,
    device_of,
    dtype_of,
    fitted,
    tell,
    words_of,
    workloads_of,
)
from nhabench.regress import FOLDER, Comparison, as_it_is, compare_versions, version
from nhabench.repeat import Agreement, run_processes
from nhabench.selftest import Trial, passed, run_trials
from nhabench.timers import TwoTimes, compare_timers
from nhabench.trust import percent, repeat_sentences
from nhabench.workloads import Case, cases

CHEAT_SECONDS = 0.2  # of timing beside each planted cheat
TIMER_SECONDS = 1.0  # of timing of each call by both timers
TIMED_TWICE = ("triton", "sdpa-flash", "sdpa-cudnn")


def _environment(device: torch.device, command: str) -> Environment:
    return read_environment(device, GpuWatch(device), command)


def regress(
    base: Annotated[
        str | None,
        typer.Argument(help="The commit to compare with. HEAD by default, HEAD~1 if kernels/ is as there."),
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="A workload of the table; repeatable. All by default, on a CPU the first.")
    ] = None,
    workloads_file: WorkloadsFile = None,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="A length T; repeatable. 2048 and 16384 by default, on a CPU 512.")
    ] = None,
    rope: Annotated[bool, typer.Option("--rope", help="With a rotary embedding.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="An NHA implementation; repeatable. All but naive by default.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seconds: Annotated[float, typer.Option(help="Time limit of each comparison.")] = 20.0,
    limit: Annotated[
        float | None, typer.Option(help="By how much a call may become slower. 0.01 (1 %) by default, on a CPU 0.1.")
    ] = None,
    output: JsonFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare this checkout's kernels with another commit's, on this machine: is any of them slower, or wrong?

    Both versions are checked, then timed in turns, call by call; what is judged is the ratio of their times. Exit code
    0: pass, or the same code; 1: regress, a call is slower by more than the limit, fails, or is not served any more;
    3: inconclusive, the interval of a ratio holds the limit, or the base could not be timed; 4: incorrect, an output is
    wrong; 70: the comparison itself failed; 74: the output could not be written.
    """
    at_least(0, seconds=seconds, limit=limit)
    at_least(1, seq_len=seq_len)
    for name in only or []:
        if name not in BACKENDS:
            raise typer.BadParameter(f"expected some of {', '.join(BACKENDS)}, got {name!r}", param_hint="--only")
    root = checkout()
    if root is None:
        raise typer.BadParameter("expected to be run from a checkout of the project, with git", param_hint="BASE")
    where = device_of(device)
    check_commit()
    check_writable(output)
    shapes = changed(fitted(workloads_of(workloads_file, workload or []), where), rope=rope)
    lengths = seq_len or [2048, 16384]
    if where.type == "cpu":
        shapes, lengths = shapes if workload else shapes[:1], seq_len or [512]
    serving = [one.name for one in implementations() if one.name != "naive" and not one.missing(where)]
    ref = base or ("HEAD" if differs("HEAD", FOLDER) else "HEAD~1")
    flags: Flags = {
        "workload": workload, "workloads-file": workloads_file, "seq-len": seq_len, "rope": rope, "only": only,
        "device": device, "dtype": dtype, "seconds": seconds, "limit": limit, "output": output,
    }  # fmt: skip
    environment = _environment(where, command_of("regress", flags, base))
    bound = LIMITS[where.type] if limit is None else limit
    results = _compared(
        ref, root, cases(shapes, lengths, dtype_of(dtype, where)), only or serving, where, seconds, bound, quiet=as_json
    )
    if results is None:
        raise typer.Exit(EXIT_DEVICE)
    same = not results
    verdict = "pass" if same else worst([one.verdict for one in results])
    comparisons = [{**dataclasses.asdict(one), "case": str(one.case)} for one in results]
    told = {
        "environment": dataclasses.asdict(environment),
        "base": ref,
        "limit": bound,
        "verdict": verdict,
        "comparisons": comparisons,
    }
    against = "the same code as" if same else "this checkout against"
    shown = console(quiet=as_json, markup=False)
    shown.print(f"{verdict}: {against} {ref}, on {environment.device}")
    raise typer.Exit(tell(told, as_json, output, EXIT_CODES[verdict]))


def _compared(
    base: str, root: Path, chosen: list[Case], names: list[str], device: torch.device, seconds: float, limit: float,
    quiet: bool,
) -> list[Comparison] | None:  # fmt: skip
    """Compare with a commit and print a line for each comparison. None of them where the code is the same; None where
    the comparison itself failed. Raises typer.BadParameter for a commit that is none."""
    shown, progress = console(quiet=quiet, markup=False), console(stderr=True, markup=False)
    with ExitStack() as stack:
        stack.enter_context(terminable())  # SIGTERM too ends the processes, and takes the folders away
        try:
            folder = stack.enter_context(version(base, root))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="BASE") from error
        if not differs(base, FOLDER):
            return []
        status = stack.enter_context(progress.status(""))
        try:
            sides = (folder, stack.enter_context(as_it_is(root)))
            results = compare_versions(
                *sides, chosen, names, device, seconds, limit, lambda step: status.update(Text(step))
            )
        except (OSError, RuntimeError, ValueError) as error:
            progress.print(f"The comparison failed: {type(error).__name__}: {error}", soft_wrap=True)
            return None
    for one in results:
        shown.print(_sentence(one), soft_wrap=True, highlight=False)
    return results


def _sentence(one: Comparison) -> str:
    """A comparison in a line."""
    words = f"{one.verdict:>12}  {one.case}  {one.implementation}"
    if one.ratio is not None:
        ratio = one.ratio
        words += f"  {ratio.median:.4f} of the base's time ({ratio.low:.4f} to {ratio.high:.4f})"
    return f"{words}  {one.note}".rstrip()


def selftest(
    comparisons: Annotated[
        int | None,
        typer.Option(
            help="How many between equals, and at twice the limit; at one and five times the limit a quarter of it. "
            "200 by default, on a CPU 10."
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit of each comparison. 1 by default, on a CPU 3.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="What counts as slower. 0.01 (1 %) by default, on a CPU 0.1.")
    ] = None,
    device: Device = None,
    output: JsonFile = None,
    as_json: AsJson = False,
) -> None:
    """Does the harness tell a slowdown from noise on this machine?

    A call is compared with itself, and with itself slowed down, in one process. Exit code 0: at most 1 % of the
    comparisons between equals said 'regress', at least 95 % of those with a call slower by twice the limit or more did,
    what was measured is what it was slowed down by, every planted cheat was caught or of no use, and the two timers of
    a GPU agree within 1 % at calls of 50 us and more; 1: not so; 74: the output could not be written. As selftest.json
    in a folder of results, the output is shown by report.
    """
    at_least(1, comparisons=comparisons)
    at_least(0, seconds=seconds)
    at_least(1e-6, limit=limit)
    where = device_of(device)
    check_commit()
    check_writable(output)
    bound = LIMITS[where.type] if limit is None else limit
    name, length, count, time = ("triton", 2048, 200, 1.0) if where.type == "cuda" else ("chunked", 64, 10, 3.0)
    (contender,) = contenders_of([name])
    (shape,) = fitted(workloads_of(None, ["nha-340m"]), where)
    case = shape.case(length, dtype_of(None, where))
    flags: Flags = {
        "comparisons": comparisons, "seconds": seconds, "limit": limit, "device": device, "output": output,
    }  # fmt: skip
    environment = _environment(where, command_of("selftest", flags))
    with torch.no_grad(), console(stderr=True).status("") as status:
        trials = run_trials(
            contender, case, where, bound, comparisons or count, time if seconds is None else seconds, status.update
        )
        status.update("planting cheats")
        planted = plant(make_lab(where, case.torch_dtype, "", CHEAT_SECONDS), case, name)
        status.update("comparing timers")
        timers = compare_timers(contenders_of(TIMED_TWICE), case, where, TIMER_SECONDS)
    good = passed(trials, bound) and all(one.caught for one in planted) and all(one.agree for one in timers)
    if not as_json:
        _show_selftest(f"{contender.label}, {case}", trials, planted, timers, good)
    told = {
        "environment": dataclasses.asdict(environment),
        "case": str(case),
        "limit": bound,
        "passed": good,
        "trials": [dataclasses.asdict(one) for one in trials],
        "cheats": [dataclasses.asdict(one) for one in planted],
        "timers": [dataclasses.asdict(one) for one in timers],
    }
    raise typer.Exit(tell(told, as_json, output, 0 if good else 1))


def _show_selftest(
    title: str, trials: Sequence[Trial], planted: Sequence[Planted], timers: Sequence[TwoTimes], good: bool
) -> None:
    table = Table("slower by", "measured", "comparisons", "regress", "inconclusive", title=title)
    for one in trials:
        counts = (one.comparisons, one.regress, one.inconclusive)
        table.add_row(f"{one.slowdown:.1%}", f"{one.measured:.2%}", *map(str, counts))
    cheats = Table("planted cheat", "caught", "what was said", title="Cheats")
    for planting in planted:
        cheats.add_row(planting.name, "yes" if planting.caught else "NO", Text(planting.told))
    twice = Table("call", "events, ms", "CUDA graph / call", "low", "high", "agree", title="Two timers")
    for both in timers:
        times = ("-" if ms is None else f"{ms:.4f}" for ms in (both.events_ms, both.ratio, both.low, both.high))
        twice.add_row(both.call, *times, "yes" if both.agree else f"NO {both.note}".strip())
    console().print(table, cheats, *([twice] if timers else []), "passed" if good else "failed")


def repeat(
    processes: Annotated[int, typer.Option(help="How many, one after the other.")] = 3,
    workload: Annotated[
        list[str] | None, typer.Option(help="A workload of the table; repeatable. All by default, on a CPU the first.")
    ] = None,
    workloads_file: WorkloadsFile = None,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="A length T; repeatable. 2048 and 16384 by default, on a CPU 512.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="An implementation or baseline; repeatable. triton and sdpa-cudnn by default, on a CPU chunked and "
            "sdpa-flash."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seconds_per_case: SecondsPerCase = 2.0,
    output: JsonFile = None,
    as_json: AsJson = False,
) -> None:
    """Do fresh processes agree? The same bench in several of them, and how far their medians differ.

    A row's spread is its largest median over its smallest, less 1. Exit code 0: it is at most 1 % (on a CPU 10 %) in
    the row in the middle, at most twice that in every row of 50 us or more, and every row that can run here was timed
    by every process; 1: not so; 70: a process died; 74: the output could not be written. As repeat.json in a folder of
    results, the output is shown by report.
    """
    at_least(2, processes=processes)
    at_least(1, seq_len=seq_len)
    at_least(0, seconds_per_case=seconds_per_case)
    where = device_of(device)
    check_commit()
    check_writable(output)
    gpu = where.type == "cuda"
    shapes = workloads_of(workloads_file, workload or [])
    contenders_of(only or [])
    chosen: Flags = {
        "workload": [shape.name for shape in (shapes if gpu or workload else shapes[:1])],
        "workloads-file": workloads_file,
        "seq-len": seq_len or ([2048, 16384] if gpu else [512]),
        "only": only or (["triton", "sdpa-cudnn"] if gpu else ["chunked", "sdpa-flash"]),
        "device": str(where),
        "dtype": dtype_of(dtype, where),
        "seconds-per-case": seconds_per_case,
    }
    environment = _environment(where, command_of("repeat", {"processes": processes, **chosen, "output": output}))
    progress = console(stderr=True, markup=False)
    # A bar's place is a terminal; a log has a line for each case.
    with terminable(), progress.status("") as status:
        said = (lambda line: status.update(Text(line))) if progress.is_terminal else progress.print
        found = run_processes(words_of(chosen), processes, LIMITS[where.type], said)
    told = {"environment": dataclasses.asdict(environment), **found.summary()}
    if not as_json:
        _show_repeat(found, told)
    raise typer.Exit(tell(told, as_json, output, found.exit_code))


def _show_repeat(found: Agreement, told: dict[str, Any]) -> None:
    table = Table("case", "implementation", *(f"{n + 1}, ms" for n in range(found.wanted)), "spread")
    for row in found.rows:
        times = ["-" if ms is None else f"{ms:.4g}" for ms in row.medians_ms]
        table.add_row(
            row.case, Text(row.label), *times, *[""] * (found.wanted - len(times)),
            "-" if row.spread is None else percent(row.spread),
        )  # fmt: skip
    shown = console(markup=False, highlight=False)
    shown.print(table)
    for sentence in repeat_sentences(told):
        shown.print(sentence, soft_wrap=True)
    shown.print("passed" if found.passed else "failed")
