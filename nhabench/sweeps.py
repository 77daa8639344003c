"""What one size costs, at one length: the window from linear to full attention, or the number of slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from nhabench.crossover import fastest_by, time_of
from nhabench.findings import high_of, low_of, names_of
from nhabench.plots import (
    draw_times,
    ends_of,
    headline,
    in_k,
    label_ends,
    leaders_of,
    lines_of,
    new_figure,
    plain_axis,
    save,
    subject_of,
)
from nhabench.results import Row
from nhabench.tables import FAMILIES, significant

Size = Literal["window", "slots"]
LETTERS: dict[Size, str] = {"window": "W", "slots": "M"}
NAMES: dict[Size, str] = {"window": "window W, in tokens", "slots": "slots M"}


def reader_of(size: Size) -> Callable[[Row], int]:
    """What gives W or M of a row."""
    return attrgetter(size)


def sweeps(rows: Sequence[Row], size: Size) -> list[list[Row]]:
    """The timed rows that differ in this size and in who ran alone, together; one or two values are no sweep."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.timed:
            other = row.slots if size == "window" else row.window
            heads = (row.q_heads, row.kv_heads, row.head_dim, other)
            key = (row.device, row.direction, row.dtype, row.rope, row.batch, row.seq_len, row.sequences, *heads)
            groups.setdefault(key, []).append(row)
    return [group for group in groups.values() if len(set(map(reader_of(size), group))) > 2]


def shared_sizes(row: Row, size: Size) -> str:
    """The sizes that the rows of a sweep have in common, in words; without batch and length."""
    rest = f"M={row.slots}" if size == "window" else f"W={row.window}"
    return f"{row.q_heads}/{row.kv_heads} heads, D={row.head_dim}, {rest}{', rope' if row.rope else ''}"


def draw_sweeps(size: Size, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every sweep of the rows into the folder, as <size>-<heads>-D<D>-T<T>.png; returns the paths. Raises OSError.

    A second sweep of the same name, of another dtype, say, has a number in its name.
    """
    written: list[Path] = []
    for group in sweeps(rows, size):
        row = group[0]
        stem = f"{size}-{row.q_heads}x{row.kv_heads}-D{row.head_dim}-T{row.seq_len}"
        number = sum(path.stem == stem or path.stem.startswith(f"{stem}-") for path in written)
        written.append(save(sweep(group, size), folder / f"{stem}{f'-{number + 1}' if number else ''}.png"))
    return written


def sweep(rows: Sequence[Row], size: Size) -> Figure:
    """Milliseconds against one size, whose values stand side by side; the median's interval shaded."""
    read, first = reader_of(size), rows[0]
    values = sorted(set(map(read, rows)))

    def place(row: Row) -> float:
        return float(values.index(read(row)))

    figure, (axis,) = new_figure(1, right=0.76)
    lines, leaders = lines_of(rows, FAMILIES, read), leaders_of(rows, ("nha", "full"), read)
    draw_times(axis, lines, leaders, place)
    whole = size == "window" and values[-1] >= first.seq_len
    names = [in_k(value) for value in values]
    axis.set_xticks(range(len(values)), [*names[:-1], f"{names[-1]} = T"] if whole else names)
    axis.set_xlim(-0.3, len(values) - 0.8)
    axis.set_xlabel(NAMES[size])
    plain_axis(axis)
    sizes = f"{shared_sizes(first, size)}, {first.dtype}; B x T = {first.batch} x {first.seq_len}"
    headline(figure, finding(rows, size), subject_of(rows, "latency"), rows, (), sizes)
    label_ends(axis, ends_of(lines, time_of, leaders, place))
    return figure


def finding(rows: Sequence[Row], size: Size) -> str:
    """At which values NHA is faster than full attention, or how much its time grows; each of them the fastest of its
    family at each value."""
    letter = LETTERS[size]
    nha, full = (fastest_by(reader_of(size), rows, family) for family in ("nha", "full"))
    both = [value for value in nha if value in full]
    if not nha:
        return f"Time by {letter}"
    if not both or size == "slots":
        least, most = min(nha), max(nha)
        growth = significant(time_of(nha[most]) / time_of(nha[least]), 2)
        who = _who([nha[least], nha[most]])
        return f"{who} takes {growth} times as long at {letter}={most} as at {letter}={least}"
    # Where the intervals are apart: what is level is not faster.
    faster = [value for value in both if high_of(nha[value]) < low_of(full[value])]
    us = _who([nha[value] for value in faster or both])
    them = names_of(full[value] for value in both)
    if not faster:
        return f"{us} is not faster than full attention ({them}) at any {letter} measured"
    where = f"at {letter}={', '.join(map(str, faster))} only"
    if faster == both:
        where = f"at every {letter} measured"
    elif faster == both[: len(faster)]:
        where = f"up to {letter}={faster[-1]}"
    return f"{us} is faster than full attention ({them}) {where}"


def _who(rows: Sequence[Row]) -> str:
    names = names_of(rows)
    return names if len({row.label for row in rows}) == 1 else f"The fastest NHA ({names})"
