"""The run as tables for a terminal: one for each workload, a contender in each row, a length in each column."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from nhabench.crossover import length_name, length_of
from nhabench.results import HOST_TIME, Row

PASS = {"forward": "forward", "training": "forward + backward"}  # what is timed, by direction
FAMILIES = ("nha", "full", "window", "linear")  # the order of tables
_SHORT = {"incorrect": "WRONG", "out of memory": "OOM", "failed": "failed"}


def passes(row: Row) -> str:
    """What a row's time is of, in words."""
    return PASS.get(row.direction, row.direction)


def grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """Rows by (workload, dtype, device, direction), in the order of their first rows.

    A workload with a rotary embedding is another one than that without, whatever its name; and so is one whose
    sequences are packed, for each number of tokens.
    """
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        name = f"{row.workload}-rope" if row.rope and not row.workload.endswith("-rope") else row.workload
        name += f"-packed-{row.seq_len}" if row.sequences else ""
        groups.setdefault((name, row.dtype, row.device, row.direction), []).append(row)
    return groups


def shape(row: Row) -> str:
    """The workload's sizes in words."""
    rope = ", rope" if row.rope else ""
    return f"{row.q_heads}/{row.kv_heads} heads, D={row.head_dim}, M={row.slots}, W={row.window}{rope}"


def milliseconds(value: float) -> str:
    """Three digits or more, no exponent."""
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def significant(value: float, digits: int) -> str:
    """Rounded to this many digits, trailing zeros included, no exponent: 0.1390, 246.3, 131072 as 131100."""
    if not math.isfinite(value):
        return str(value)
    rounded = f"{value:.{digits - 1}e}"  # 9.99 has become 1.0e+01
    places = digits - 1 - int(rounded.partition("e")[2])
    return f"{float(rounded):.{max(0, places)}f}"


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """Print a table for each workload of the rows, and beneath them what did not run and why."""
    for group in grouped(rows).values():
        first = group[0]
        title = f"\n{first.workload} ({shape(first)}, {first.dtype}) on {first.device}: {passes(first)}, ms"
        console.print(title, style="bold", highlight=False, markup=False)
        console.print(_table(group))
    for _, reason in reasons(rows):
        console.print(reason, highlight=False, markup=False, soft_wrap=True)


def _table(rows: Sequence[Row]) -> Table:
    caption = "* fastest of its family at this length"
    if any(row.timed and HOST_TIME in row.timer for row in rows):
        caption += "; h includes host time"
    table = Table(caption=caption, caption_justify="left")
    table.add_column("sequences x mean T" if rows[0].sequences else "B x T", no_wrap=True)
    columns = sorted({_column(row) for row in rows})
    for length, count in columns:
        table.add_column(f"{count} x {length}", justify="right")
    cells = {(row.implementation, *_column(row)): row for row in rows}
    shown = {row.implementation: row for row in rows if row.timed or row.status in _SHORT}
    for name, row in sorted(shown.items(), key=lambda item: FAMILIES.index(item[1].family)):
        table.add_row(row.label, *(_cell(cells.get((name, *column)), rows) for column in columns))
    return table


def _column(row: Row) -> tuple[int, int]:
    """A sequence's length, or the mean one's, and how many there are."""
    return length_of(row), row.sequences or row.batch


def _cell(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return ""
    if not row.timed:
        return _SHORT.get(row.status, "-")
    text = milliseconds(row.median_ms or 0.0) + ("h" if HOST_TIME in row.timer else "")
    return f"[bold]*{text}[/bold]" if row is fastest(rows, row) else text


def fastest(rows: Sequence[Row], like: Row) -> Row:
    """The fastest timed row of the family, length and batch of `like`, or as many packed sequences."""
    peers = [row for row in rows if row.timed and (row.family, *_column(row)) == (like.family, *_column(like))]
    return min(peers, key=lambda row: row.median_ms or 0.0)


def reasons(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What did not run, each reason once, as (status, sentence): for whom, and where it was not so everywhere. Reasons
    that differ in their numbers only are one, told with the numbers of its first case."""
    everywhere = {place_of(row) for row in rows}
    found: dict[tuple[str, str], dict[str, set[Place]]] = {}
    notes: dict[tuple[str, str], dict[str, Row]] = {}  # of each reason, the different notes
    for row in rows:
        if not row.timed:
            reason = (row.status, re.sub(r"\d+(\.\d+)?", "#", row.note))
            found.setdefault(reason, {}).setdefault(row.label, set()).add(place_of(row))
            notes.setdefault(reason, {}).setdefault(row.note, row)
    told = []
    for reason, labels in found.items():
        who = [label + ("" if places == everywhere else f" ({where(places)})") for label, places in labels.items()]
        (note, row), *others = notes[reason].items()
        first = f" ({length_name(row)}={length_of(row)}, {row.workload})" if others else ""
        told.append((reason[0], f"{', '.join(who)}: {reason[0]}. {note}{first}"))
    return told


Place = tuple[str, str, int]


def place_of(row: Row) -> Place:
    """The workload of a row, and a name and a number for the length of its sequences."""
    return row.workload, length_name(row), length_of(row)


def where(places: set[Place]) -> str:
    """'T=1024, 2048, llama-3-8b', or how many workloads; those of other lengths behind a semicolon."""
    lengths: dict[str, dict[str, set[int]]] = {}
    for workload, name, length in sorted(places):
        lengths.setdefault(workload, {}).setdefault(name, set()).add(length)
    alike: dict[str, list[str]] = {}
    for workload, some in lengths.items():
        told = "; ".join(f"{name}={', '.join(map(str, sorted(own)))}" for name, own in sorted(some.items()))
        alike.setdefault(told, []).append(workload)
    return "; ".join(f"{told}, {_named(workloads)}" for told, workloads in alike.items())


def _named(workloads: Sequence[str]) -> str:
    return workloads[0] if len(workloads) == 1 else f"{len(workloads)} workloads"
