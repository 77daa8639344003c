"""The command line: `python -m nhabench bench | plot | workloads`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from nhabench.bench import Options, all_contenders, run
from nhabench.environment import device_slug, named_commit
from nhabench.plots import draw_all
from nhabench.results import load_rows
from nhabench.workloads import DTYPES, SEQ_LENS, Workload, cases, load_workloads, select

WIDE = 200  # columns of output that is not a terminal's

app = typer.Typer(
    help="Race Native Hybrid Attention against full, window-only and linear attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WorkloadsFile = Annotated[
    Path | None, typer.Option("--workloads-file", help="TOML file that adds workloads or replaces some of the table.")
]


def _device(name: str | None) -> torch.device:
    """The asked device, or a GPU where there is one. A GPU has its number. Raises typer.BadParameter."""
    count = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if count else "cpu"))
    except RuntimeError as error:
        raise typer.BadParameter(f"expected 'cpu', 'cuda' or 'cuda:N', got {name!r}", param_hint="--device") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        found = f"cpu and {count} CUDA device{'' if count == 1 else 's'}"
        raise typer.BadParameter(f"expected one of this machine's ({found}), got {name!r}", param_hint="--device")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _dtype(name: str | None, device: torch.device) -> str:
    """The asked dtype, or what models use on such a device. Raises typer.BadParameter."""
    chosen = name or ("float32" if device.type == "cpu" else "bfloat16")
    if chosen not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {name!r}", param_hint="--dtype")
    return chosen


def _at_least(least: int, **flags: int | float | None) -> None:
    """Raises typer.BadParameter for a flag whose value is less."""
    for name, value in flags.items():
        if value is not None and value < least:
            hint = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"expected a number >= {least}, got {value}", param_hint=hint)


def _workloads(file: Path | None, names: list[str]) -> list[Workload]:
    try:
        return select(load_workloads(file), names)
    except ValueError as error:
        hint = "--workload" if str(error).startswith("workload:") else "--workloads-file"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def _command(flags: dict[str, Any]) -> str:
    """The command that repeats the run, without paths of this machine."""
    words = ["python", "-m", "nhabench", "bench"]
    for flag, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                text = Path(item).name if isinstance(item, Path) and item.is_absolute() else str(item)
                words += [f"--{flag}", text]
    return shlex.join(words)


def _plain(value: object) -> object:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@app.command()
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
    only: Annotated[
        list[str] | None, typer.Option(help="An implementation or baseline to run; repeatable. All by default.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. A GPU where there is one, by default.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}. bfloat16 on a GPU, float32 on a CPU, by default.")
    ] = None,
    seconds_per_case: Annotated[float, typer.Option(help="Time limit of timing at each B x T.")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="Folder for CSV and plots. results/<device> by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON in place of tables.")] = False,
) -> None:
    """Check every implementation against the reference, then time all of them and the baselines, interleaved.

    Writes forward.csv and plots. Rows of earlier runs stay unless this run measures the same again. Exit code 1: an NHA
    implementation was wrong; 3: something failed, ran out of memory or a baseline was wrong; 70: the device was lost;
    74: a file could not be written; 130 or 143: interrupted or terminated. What was measured is kept in every case.
    """
    _at_least(1, slots=slots, tokens=tokens)
    _at_least(0, window=window, seconds_per_case=seconds_per_case)
    for length in seq_len or []:
        _at_least(1, seq_len=length)
    where = _device(device)
    try:
        named_commit()  # before hours are spent on rows that would name no commit
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        contenders = all_contenders(only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    shapes = _workloads(workloads_file, workload or [])
    if where.type == "cpu":  # B = 1, or no length would end soon
        shapes = [dataclasses.replace(shape, tokens=1) for shape in shapes]
    shapes = [shape.changed(window, slots, tokens) for shape in shapes]
    flags = {
        "workload": workload, "workloads-file": workloads_file, "seq-len": seq_len, "window": window, "slots": slots,
        "tokens": tokens, "only": only, "device": device, "dtype": dtype, "output": output,
        "seconds-per-case": None if seconds_per_case == 2.0 else seconds_per_case,
    }  # fmt: skip
    options = Options(
        cases=cases(shapes, seq_len or SEQ_LENS, _dtype(dtype, where)),
        contenders=contenders,
        device=where,
        seconds=seconds_per_case,
        output=output or Path("results") / device_slug(where),
        command=_command(flags),
        trim=not workload and not seq_len,
    )
    raise typer.Exit(_run(options, as_json))


def _console(**settings: Any) -> Console:
    """As wide as the terminal; in a file or a pipe, unless COLUMNS says, as wide as a table with every length."""
    console = Console(**settings)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    return console


def _run(options: Options, as_json: bool) -> int:
    """Run, print, and return the exit code."""
    try:
        outcome = run(options, _console(quiet=as_json), _console(stderr=True))
    except (ValueError, OSError) as error:  # of a forward.csv that is there already
        raise typer.BadParameter(str(error), param_hint="--output") from error
    if as_json:
        rows = [{name: _plain(value) for name, value in dataclasses.asdict(row).items()} for row in outcome.rows]
        plots = [str(plot) for plot in outcome.plots]
        print(json.dumps({"csv": str(outcome.csv), "plots": plots, "exit_code": outcome.exit_code, "rows": rows}))
    return outcome.exit_code


@app.command()
def plot(
    csv: Annotated[Path, typer.Argument(help="A CSV that bench wrote.", exists=True, dir_okay=False)],
    output: Annotated[Path | None, typer.Option(help="Folder for the plots. That of the CSV by default.")] = None,
) -> None:
    """Draw the plots of a CSV again."""
    try:
        rows = load_rows(csv)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="CSV") from error
    for path in draw_all(rows, output or csv.parent):
        print(path)


@app.command()
def workloads(workloads_file: WorkloadsFile = None) -> None:
    """Print the table of workloads."""
    table = Table()
    for field in dataclasses.fields(Workload):
        table.add_column(field.name, justify="left" if field.name == "name" else "right")
    for shape in _workloads(workloads_file, []):
        table.add_row(*(str(value) for value in dataclasses.astuple(shape)))
    Console().print(table)
