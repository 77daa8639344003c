"""What the commands share: options, what they may be, and how an outcome is printed and written down."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from nhabench.bench import EXIT_DISK, all_contenders
from nhabench.contender import Contender
from nhabench.environment import named_commit
from nhabench.results import replace_file
from nhabench.workloads import DTYPES, Workload, load_workloads, select

WIDE = 200  # columns of output that is not a terminal's

WorkloadsFile = Annotated[
    Path | None, typer.Option("--workloads-file", help="TOML file that adds workloads or replaces some of the table.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. A GPU where there is one, by default.")]
Dtype = Annotated[
    str | None, typer.Option(help=f"{', '.join(DTYPES)}. bfloat16 on a GPU, float32 on a CPU, by default.")
]
SecondsPerCase = Annotated[
    float,
    typer.Option(
        help="Time limit of timing at each B x T; as much again for the second timer of a GPU, and for warm calls."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else on stdout.")]
JsonFile = Annotated[
    Path | None, typer.Option("--output", help="File to write, whole or not at all, with what --json prints.")
]

Flags = Mapping[str, Any]  # of a command line: by name, a value, True, a list of values, or None where it is not given


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


def at_least(least: float, **flags: float | list[int] | None) -> None:
    """Raises typer.BadParameter for a flag whose value, or one of whose values, is less."""
    for name, given in flags.items():
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                hint = "--" + name.replace("_", "-")
                raise typer.BadParameter(f"expected a number >= {least}, got {value}", param_hint=hint)


def check_commit() -> None:
    """Raises typer.BadParameter where the environment names a commit that is none."""
    try:
        named_commit()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def contenders_of(only: Sequence[str]) -> list[Contender]:
    """The named contenders, or all. Raises typer.BadParameter."""
    try:
        return all_contenders(only)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--only") from error


def workloads_of(file: Path | None, names: Sequence[str]) -> list[Workload]:
    """The named workloads of the table and of a file, or all. Raises typer.BadParameter."""
    try:
        return select(load_workloads(file), names)
    except ValueError as error:
        hint = "--workload" if str(error).startswith("workload:") else "--workloads-file"
        raise typer.BadParameter(str(error), param_hint=hint) from error


def fitted(shapes: Iterable[Workload], device: torch.device) -> list[Workload]:
    """The shapes with B = 1 on a CPU, where no length would end soon otherwise."""
    return [dataclasses.replace(shape, tokens=1) if device.type == "cpu" else shape for shape in shapes]


def changed(
    shapes: Iterable[Workload],
    window: int | None = None,
    slots: int | None = None,
    tokens: int | None = None,
    rope: bool = False,
) -> list[Workload]:
    """The shapes with other sizes, or with a rotary embedding. Raises typer.BadParameter."""
    try:
        return [shape.changed(window, slots, tokens, rope) for shape in shapes]
    except ValueError as error:  # the sizes were looked at before
        raise typer.BadParameter(str(error), param_hint="--rope") from error


def words_of(flags: Flags) -> list[str]:
    """Flags as the words of a command line."""
    words = []
    for flag, value in flags.items():
        for item in value if isinstance(value, list) else [value]:
            if item is True:
                words.append(f"--{flag}")
            elif item is not None and item is not False:
                words += [f"--{flag}", str(item)]
    return words


def command_of(name: str, flags: Flags, *arguments: str | None) -> str:
    """The command that repeats a run, without paths of this machine."""
    told = {
        flag: Path(value).name if isinstance(value, Path) and value.is_absolute() else value
        for flag, value in flags.items()
    }
    return shlex.join(["python", "-m", "nhabench", name, *(word for word in arguments if word), *words_of(told)])


def console(**settings: Any) -> Console:
    """As wide as the terminal; in a file or a pipe, unless COLUMNS says, as wide as a table with every length."""
    made = Console(**settings)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = WIDE
    return made


def check_writable(path: Path | None) -> None:
    """Raises typer.BadParameter where a file could not be written: before hours of measuring, not after. Makes its
    folder; a file that is there stays as it is."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent):  # of a name of its own: another run may be writing
            pass
    except OSError as error:
        raise typer.BadParameter(
            f"expected a file that can be written, got {path.name}: {error.strerror or error}", param_hint="--output"
        ) from error


def tell(told: Mapping[str, Any], as_json: bool, output: Path | None, exit_code: int) -> int:
    """Print an outcome as JSON and write it to a file, where that was asked. Returns the exit code: the given one, or
    74 where the file could not be written after all."""
    if output is not None:  # first: who reads the rest may be gone
        try:
            replace_file(output, json.dumps(told, allow_nan=False, indent=2) + "\n")
        except OSError as error:
            console(stderr=True).print(f"Could not write {output.name}: {error.strerror or error}.", soft_wrap=True)
            exit_code = EXIT_DISK
    if as_json:
        print(json.dumps(told, allow_nan=False))
    return exit_code
