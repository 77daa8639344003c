"""The command line: `python -m nhabench bench | regress | selftest | repeat | doctor | plot | report | workloads`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from nhabench.bench import Options, all_contenders, run
from nhabench.environment import device_slug, read_environment
from nhabench.gpu import GpuWatch
from nhabench.options import (
    AsJson,
    Device,
    Dtype,
    Flags,
    SecondsPerCase,
    WorkloadsFile,
    at_least,
    changed,
    check_commit,
    command_of,
    console,
    contenders_of,
    device_of,
    dtype_of,
    fitted,
    workloads_of,
)
from nhabench.plots import draw_all
from nhabench.report import FILE_NAME as REPORT_NAME
from nhabench.report import build_report, summary, write_report
from nhabench.results import load_rows
from nhabench.verdicts import regress, repeat, selftest
from nhabench.workloads import SEQ_LENS, Workload, cases

app = typer.Typer(
    help="Race Native Hybrid Attention against full, window-only and linear attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def example(arguments: str) -> str:
    """The last line of a command's help: what may be typed."""
    return f"Example: python -m nhabench {arguments}"


@app.command(epilog=example("bench --workload llama-3-8b --seq-len 2048 --seq-len 16384 --only triton"))
def bench(
    workload: Annotated[
        list[str] | None, typer.Option(help="A workload of the table; repeatable. All by default.")
    ] = None,
    workloads_file: WorkloadsFile = None,
    seq_len: Annotated[
        list[int] | None, typer.Option(help="A sequence length T; repeatable. 512 to 131072 by default.")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Window W in tokens, in place of the workload's.")] = None,
    slots: Annotated[int | None, typer.Option(help="Slots M, in place of the workload's.")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="B*T to hold, in place of the workload's (1 on a CPU, so B=1).")
    ] = None,
    rope: Annotated[
        bool, typer.Option("--rope", help="With a rotary embedding, which NHA applies itself; to others it is given.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="An implementation or baseline to run; repeatable. All by default.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seconds_per_case: SecondsPerCase = 2.0,
    output: Annotated[Path | None, typer.Option(help="Folder for CSV and plots. results/<device> by default.")] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Also time calls that find their inputs in the caches (column warm_ms).")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this same command where it was interrupted, at this commit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every implementation against the reference, then time all of them and the baselines, interleaved.

    Writes forward.csv and plots. Rows of earlier runs stay unless this run measures the same again. Exit code 1: an NHA
    implementation was wrong; 3: something failed, ran out of memory or a baseline was wrong; 70: the device was lost;
    74: a file could not be written; 130 or 143: interrupted or terminated. What was measured is kept in every case.
    """
    at_least(1, slots=slots, tokens=tokens, seq_len=seq_len)
    at_least(0, window=window, seconds_per_case=seconds_per_case)
    where = device_of(device)
    check_commit()  # before hours are spent on rows that would name none
    contenders = contenders_of(only or [])
    shapes = fitted(workloads_of(workloads_file, workload or []), where)
    shapes = changed(shapes, window, slots, tokens, rope)
    flags: Flags = {
        "workload": workload, "workloads-file": workloads_file, "seq-len": seq_len, "window": window, "slots": slots,
        "tokens": tokens, "rope": rope, "warm": warm, "only": only, "device": device, "dtype": dtype, "output": output,
        "seconds-per-case": None if seconds_per_case == 2.0 else seconds_per_case,
    }  # fmt: skip
    options = Options(
        cases=cases(shapes, seq_len or SEQ_LENS, dtype_of(dtype, where)),
        contenders=contenders,
        device=where,
        seconds=seconds_per_case,
        output=output or Path("results") / device_slug(where),
        command=command_of("bench", flags),
        trim=not workload and not seq_len,
        resume=resume,
        warm=warm,
    )
    raise typer.Exit(_run(options, as_json))


def _plain(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(options: Options, as_json: bool) -> int:
    """Run, print, and return the exit code."""
    try:
        outcome = run(options, console(quiet=as_json), console(stderr=True))
    except (ValueError, OSError) as error:  # of a forward.csv that is there already
        raise typer.BadParameter(str(error), param_hint="--output") from error
    if as_json:
        rows = [{name: _plain(value) for name, value in dataclasses.asdict(row).items()} for row in outcome.rows]
        plots = [str(plot) for plot in outcome.plots]
        print(json.dumps({"csv": str(outcome.csv), "plots": plots, "exit_code": outcome.exit_code, "rows": rows}))
    return outcome.exit_code


app.command(epilog=example("regress main --workload llama-3-8b --seq-len 2048 --only triton"))(regress)
app.command(epilog=example("selftest --output results/nvidia-h100-80gb-hbm3/selftest.json"))(selftest)
app.command(epilog=example("repeat --output results/nvidia-h100-80gb-hbm3/repeat.json"))(repeat)


@app.command(epilog=example("doctor"))
def doctor(
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """What was found on this machine, what will therefore run in the benchmark, and what will not, and why."""
    check_commit()
    where = device_of(device)
    found = dataclasses.asdict(read_environment(where, GpuWatch(where), ""))
    for name in ("date", "command", "device_type"):
        del found[name]
    runs = [(one.name, one.label, one.missing(where)) for one in all_contenders()]
    if as_json:
        rows = [{"name": name, "label": label, "why_not": why_not} for name, label, why_not in runs]
        print(json.dumps({"found": found, "contenders": rows}))
        return
    table = Table("found", "", title="Machine and software")
    for name, value in found.items():
        table.add_row(name, Text("-" if value in ("", None) else str(value)))
    contenders = Table("contender", "runs", "why not", title=f"On {where}")
    for name, label, why_not in runs:
        contenders.add_row(f"{name} ({label})", "no" if why_not else "yes", Text(why_not or ""))
    console().print(table, contenders)


@app.command(epilog=example("plot results/nvidia-h100-80gb-hbm3/forward.csv"))
def plot(
    csv: Annotated[Path, typer.Argument(help="A CSV that bench wrote.", exists=True, dir_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Folder for the plots. That of the CSV by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the plots of a CSV again."""
    try:
        rows = load_rows(csv)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="CSV") from error
    paths = [str(path) for path in draw_all(rows, output or csv.parent)]
    if as_json:
        print(json.dumps({"plots": paths}))
    else:
        print("\n".join(paths))


@app.command(epilog=example("report results/nvidia-h100-80gb-hbm3"))
def report(
    results: Annotated[Path, typer.Argument(help="A folder of results, or one CSV.", exists=True)],
    output: Annotated[
        Path | None, typer.Option(help=f"The page. {REPORT_NAME} in the folder by default, of a CSV one beside it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell results as one HTML page: findings, provenance, plots and their data.

    Takes every CSV of the folder, and of the folders in it, that bench or a suite wrote, and how far they can be
    trusted from the folder's selftest.json and repeat.json, where they are. The page needs no network and no other
    file.
    """
    try:
        told = build_report(results)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="RESULTS") from error
    path = output or (results.with_suffix(".html") if results.is_file() else results / REPORT_NAME)
    try:
        size = write_report(told, path)
    except OSError as error:
        problem = f"expected a file that can be written, got {path.name}: {error.strerror or error}"
        raise typer.BadParameter(problem, param_hint="--output") from error
    if as_json:
        print(json.dumps({"report": str(path), "bytes": size, **summary(told)}))
    else:
        print(path)


@app.command(epilog=example("workloads --workloads-file my.toml"))
def workloads(workloads_file: WorkloadsFile = None, as_json: AsJson = False) -> None:
    """Print the table of workloads."""
    shapes = workloads_of(workloads_file, [])
    if as_json:
        print(json.dumps({"workloads": [dataclasses.asdict(shape) for shape in shapes]}))
        return
    table = Table()
    for field in dataclasses.fields(Workload):
        table.add_column(field.name, justify="left" if field.name == "name" else "right")
    for shape in shapes:
        table.add_row(*(str(value) for value in dataclasses.astuple(shape)))
    console().print(table)
