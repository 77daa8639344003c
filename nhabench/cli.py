"""The command line: `python -m nhabench bench | regress | selftest | doctor | plot | report | workloads`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nha_kernels import BACKENDS
from nhabench.bench import EXIT_DEVICE, Options, all_contenders, make_lab, run, terminable
from nhabench.cheats import plant
from nhabench.compare import EXIT_CODES, LIMITS, worst
from nhabench.environment import checkout, device_name, device_slug, differs, named_commit, read_environment
from nhabench.gpu import GpuWatch
from nhabench.implementations import implementations
from nhabench.plots import draw_all
from nhabench.regress import FOLDER, Comparison, as_it_is, compare_versions, version
from nhabench.report import FILE_NAME as REPORT_NAME
from nhabench.report import build_report, summary, write_report
from nhabench.results import load_rows
from nhabench.selftest import passed, run_trials
from nhabench.workloads import DTYPES, SEQ_LENS, Case, Workload, cases, load_workloads, select

CHEAT_SECONDS = 0.2  # of timing beside each planted cheat
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

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. A GPU where there is one, by default.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(DTYPES)}. bfloat16 on a GPU, float32 on a CPU, by default.")
]


def device_of(name: str | None) -> torch.device:
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


def dtype_of(name: str | None, device: torch.device) -> str:
    """The asked dtype, or what models use on such a device. Raises typer.BadParameter."""
    chosen = name or ("float32" if device.type == "cpu" else "bfloat16")
    if chosen not in DTYPES:
        raise typer.BadParameter(f"expected one of {', '.join(DTYPES)}, got {name!r}", param_hint="--dtype")
    return chosen


def _at_least(least: float, **flags: float | list[int] | None) -> None:
    """Raises typer.BadParameter for a flag whose value, or one of whose values, is less."""
    for name, given in flags.items():
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                hint = "--" + name.replace("_", "-")
                raise typer.BadParameter(f"expected a number >= {least}, got {value}", param_hint=hint)


def _check_commit() -> None:
    """Raises typer.BadParameter where the environment names a commit that is none."""
    try:
        named_commit()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _fitted(shapes: Iterable[Workload], device: torch.device) -> list[Workload]:
    """The shapes with B = 1 on a CPU, where no length would end soon otherwise."""
    return [dataclasses.replace(shape, tokens=1) if device.type == "cpu" else shape for shape in shapes]


def _workloads(file: Path | None, names: list[str]) -> list[Workload]:
    try:
        return select(load_workloads(file), names)
    except ValueError as error:
        hint = "--workload" if str(error).startswith("workload:") else "--workloads-file"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def _changed(
    shapes: Iterable[Workload],
    window: int | None = None,
    slots: int | None = None,
    tokens: int | None = None,
    rope: bool = False,
) -> list[Workload]:
    try:
        return [shape.changed(window, slots, tokens, rope) for shape in shapes]
    except ValueError as error:  # the sizes were looked at before
        raise typer.BadParameter(str(error), param_hint="--rope") from error


def _command(flags: dict[str, Any]) -> str:
    """The command that repeats the run, without paths of this machine."""
    words = ["python", "-m", "nhabench", "bench"]
    for flag, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                words.append(f"--{flag}")
            elif item is not None:
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
    rope: Annotated[
        bool, typer.Option("--rope", help="With a rotary embedding, which NHA applies itself; to others it is given.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="An implementation or baseline to run; repeatable. All by default.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seconds_per_case: Annotated[float, typer.Option(help="Time limit of timing at each B x T.")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="Folder for CSV and plots. results/<device> by default.")] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Also time calls that find their inputs in the caches (column warm_ms).")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this same command where it was interrupted, at this commit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON in place of tables.")] = False,
) -> None:
    """Check every implementation against the reference, then time all of them and the baselines, interleaved.

    Writes forward.csv and plots. Rows of earlier runs stay unless this run measures the same again. Exit code 1: an NHA
    implementation was wrong; 3: something failed, ran out of memory or a baseline was wrong; 70: the device was lost;
    74: a file could not be written; 130 or 143: interrupted or terminated. What was measured is kept in every case.
    """
    _at_least(1, slots=slots, tokens=tokens, seq_len=seq_len)
    _at_least(0, window=window, seconds_per_case=seconds_per_case)
    where = device_of(device)
    _check_commit()  # before hours are spent on rows that would name none
    try:
        contenders = all_contenders(only or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error
    shapes = _fitted(_workloads(workloads_file, workload or []), where)
    shapes = _changed(shapes, window, slots, tokens, rope)
    flags = {
        "workload": workload, "workloads-file": workloads_file, "seq-len": seq_len, "window": window, "slots": slots,
        "tokens": tokens, "rope": rope or None, "warm": warm or None, "only": only,
        "device": device, "dtype": dtype, "output": output,
        "seconds-per-case": None if seconds_per_case == 2.0 else seconds_per_case,
    }  # fmt: skip
    options = Options(
        cases=cases(shapes, seq_len or SEQ_LENS, dtype_of(dtype, where)),
        contenders=contenders,
        device=where,
        seconds=seconds_per_case,
        output=output or Path("results") / device_slug(where),
        command=_command(flags),
        trim=not workload and not seq_len,
        resume=resume,
        warm=warm,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of lines.")] = False,
) -> None:
    """Compare this checkout's kernels with another commit's, on this machine: is any of them slower, or wrong?

    Both versions are checked, then timed in turns, call by call; what is judged is the ratio of their times. Exit code
    0: pass, or the same code; 1: regress, a call is slower by more than the limit, fails, or is not served any more;
    3: inconclusive, the interval of a ratio holds the limit, or the base could not be timed; 4: incorrect, an output is
    wrong; 70: the comparison itself failed.
    """
    _at_least(0, seconds=seconds, limit=limit)
    _at_least(1, seq_len=seq_len)
    for name in only or []:
        if name not in BACKENDS:
            raise typer.BadParameter(f"expected some of {', '.join(BACKENDS)}, got {name!r}", param_hint="--only")
    root = checkout()
    if root is None:
        raise typer.BadParameter("expected to be run from a checkout of the project, with git", param_hint="BASE")
    where = device_of(device)
    shapes = _changed(_fitted(_workloads(workloads_file, workload or []), where), rope=rope)
    lengths = seq_len or [2048, 16384]
    if where.type == "cpu":
        shapes, lengths = shapes if workload else shapes[:1], seq_len or [512]
    serving = [one.name for one in implementations() if one.name != "naive" and not one.missing(where)]
    ref = base or ("HEAD" if differs("HEAD", FOLDER) else "HEAD~1")
    raise typer.Exit(
        _regress(
            ref, root, cases(shapes, lengths, dtype_of(dtype, where)), only or serving, where, seconds,
            LIMITS[where.type] if limit is None else limit, as_json,
        )
    )  # fmt: skip


def _regress(
    base: str, root: Path, chosen: list[Case], names: list[str], device: torch.device, seconds: float, limit: float,
    as_json: bool,
) -> int:  # fmt: skip
    """Compare, print, and return the exit code."""
    console, progress = _console(quiet=as_json, markup=False), _console(stderr=True, markup=False)
    results: list[Comparison] = []
    with ExitStack() as stack:
        stack.enter_context(terminable())  # SIGTERM too ends the processes, and takes the folders away
        try:
            folder = stack.enter_context(version(base, root))
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="BASE") from error
        same = not differs(base, FOLDER)
        if not same:
            status = stack.enter_context(progress.status(""))
            try:
                sides = (folder, stack.enter_context(as_it_is(root)))
                results = compare_versions(
                    *sides, chosen, names, device, seconds, limit, lambda step: status.update(Text(step))
                )
            except (OSError, RuntimeError, ValueError) as error:
                progress.print(f"The comparison failed: {type(error).__name__}: {error}", soft_wrap=True)
                return EXIT_DEVICE
    for one in results:
        console.print(_sentence(one), soft_wrap=True, highlight=False)
    verdict = "pass" if same else worst([one.verdict for one in results])
    told = "the same code as" if same else "this checkout against"
    console.print(f"{verdict}: {told} {base}, on {device_name(device)}")
    if as_json:
        rows = [{**dataclasses.asdict(one), "case": str(one.case)} for one in results]
        print(json.dumps({"base": base, "device": device_name(device), "verdict": verdict, "comparisons": rows}))
    return EXIT_CODES[verdict]


def _sentence(one: Comparison) -> str:
    """A comparison in a line."""
    words = f"{one.verdict:>12}  {one.case}  {one.implementation}"
    if one.ratio is not None:
        ratio = one.ratio
        words += f"  {ratio.median:.4f} of the base's time ({ratio.low:.4f} to {ratio.high:.4f})"
    return f"{words}  {one.note}".rstrip()


@app.command()
def selftest(
    comparisons: Annotated[
        int | None, typer.Option(help="How many at each slowdown. 200 by default, on a CPU 10.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit of each comparison. 1 by default, on a CPU 3.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="What counts as slower. 0.01 (1 %) by default, on a CPU 0.1.")
    ] = None,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Does the harness tell a slowdown from noise on this machine?

    A call is compared with itself, and with itself slowed down, in one process. Exit code 0: at most 1 % of the
    comparisons between equals said 'regress', at least 95 % of those with a call slower by twice the limit or more did,
    what was measured is what it was slowed down by, and every planted cheat was caught or of no use; 1: not so.
    """
    _at_least(1, comparisons=comparisons)
    _at_least(0, seconds=seconds)
    _at_least(1e-6, limit=limit)
    where = device_of(device)
    bound = LIMITS[where.type] if limit is None else limit
    name, length, count, time = ("triton", 2048, 200, 1.0) if where.type == "cuda" else ("chunked", 64, 10, 3.0)
    (contender,) = all_contenders([name])
    (shape,) = _fitted(_workloads(None, ["nha-340m"]), where)
    case = shape.case(length, dtype_of(None, where))
    with torch.no_grad(), _console(stderr=True).status("") as status:
        trials = run_trials(
            contender, case, where, bound, comparisons or count, time if seconds is None else seconds, status.update
        )
        status.update("planting cheats")
        planted = plant(make_lab(where, case.torch_dtype, "", CHEAT_SECONDS), case, name)
    good = passed(trials, bound) and all(one.caught for one in planted)
    if as_json:
        told = {"device": device_name(where), "case": str(case), "limit": bound, "passed": good}
        trial_rows, cheat_rows = map(dataclasses.asdict, trials), map(dataclasses.asdict, planted)
        print(json.dumps({**told, "trials": list(trial_rows), "cheats": list(cheat_rows)}))
    else:
        table = Table(
            "slower by", "measured", "comparisons", "regress", "inconclusive", title=f"{contender.label}, {case}"
        )
        for one in trials:
            counts = (one.comparisons, one.regress, one.inconclusive)
            table.add_row(f"{one.slowdown:.1%}", f"{one.measured:.2%}", *map(str, counts))
        cheats = Table("planted cheat", "caught", "what was said", title="Cheats")
        for planting in planted:
            cheats.add_row(planting.name, "yes" if planting.caught else "NO", Text(planting.told))
        _console().print(table, cheats, "passed" if good else "failed")
    raise typer.Exit(0 if good else 1)


@app.command()
def doctor(
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")] = False,
) -> None:
    """What was found on this machine, what will therefore run in the benchmark, and what will not, and why."""
    _check_commit()
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
    _console().print(table, contenders)


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
def report(
    folder: Annotated[Path, typer.Argument(help="A folder of results.", exists=True, file_okay=False)],
    output: Annotated[Path | None, typer.Option(help=f"The page. {REPORT_NAME} in the folder by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path and a summary as JSON.")] = False,
) -> None:
    """Tell a folder of results as one HTML page: findings, provenance, plots and their data.

    Takes every CSV of the folder, and of the folders in it, that bench wrote. The page needs no network and no other
    file.
    """
    try:
        told = build_report(folder)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="FOLDER") from error
    path = output or folder / REPORT_NAME
    try:
        size = write_report(told, path)
    except OSError as error:
        problem = f"expected a file that can be written, got {path.name}: {error.strerror or error}"
        raise typer.BadParameter(problem, param_hint="--output") from error
    if as_json:
        print(json.dumps({"report": str(path), "bytes": size, **summary(told)}))
    else:
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
