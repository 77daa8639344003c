"""What one size costs, at one length: the window from linear to full attention, or the number of slots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from nhabench.crossover import time_of
from nhabench.plots import (
    Lines,
    draw_band,
    draw_line,
    ends_of,
    headline,
    label_ends,
    log_axis,
    new_figure,
    save,
)
from nhabench.results import Row
from nhabench.tables import FAMILIES, significant

Size = Literal["window", "slots"]
LETTERS: dict[Size, str] = {"window": "W", "slots": "M"}
NAMES: dict[Size, str] = {"window": "window W, in tokens", "slots": "slots M"}


def size_of(row: Row, size: Size) -> int:
    """W or M of a row."""
    return row.window if size == "window" else row.slots


def sweeps(rows: Sequence[Row], size: Size) -> list[list[Row]]:
    """The timed rows that differ in this size and in who ran alone, together; those of a single value are no sweep."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.timed:
            other = row.slots if size == "window" else row.window
            heads = (row.q_heads, row.kv_heads, row.head_dim, other)
            key = (row.device, row.direction, row.dtype, row.rope, row.batch, row.seq_len, *heads)
            groups.setdefault(key, []).append(row)
    return [group for group in groups.values() if len({size_of(row, size) for row in group}) > 1]


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
    values = sorted({size_of(row, size) for row in rows})
    lines = _lines(rows, size)
    first = rows[0]

    def place(row: Row) -> float:
        return float(values.index(size_of(row, size)))

    figure, (axis,) = new_figure(1, right=0.76)
    leaders = {fastest.implementation for fastest in _fastest(rows, size, ("nha",)).values()}
    leaders |= {fastest.implementation for fastest in _fastest(rows, size, ("full",)).values()}
    for name, line in lines.items():
        draw_band(axis, line, place)
        draw_line(axis, line, time_of, name in leaders, place)
    log_axis(axis)
    whole = size == "window" and values[-1] >= first.seq_len
    names = [f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else f"{value}" for value in values]
    axis.set_xticks(range(len(values)), [*names[:-1], f"{names[-1]} = T"] if whole else names)
    axis.set_xlim(-0.3, len(values) - 0.8)
    axis.set_xlabel(NAMES[size])
    axis.set_ylabel("median time of a forward call, ms; 95 % interval shaded")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    rest = f"M={first.slots}" if size == "window" else f"W={first.window}"
    rope = ", rope" if first.rope else ""
    shared = f"{first.q_heads}/{first.kv_heads} heads, D={first.head_dim}, {rest}{rope}, {first.dtype}"
    sizes = f"{shared}; B x T = {first.batch} x {first.seq_len}"
    headline(figure, finding(rows, size), "Forward latency", rows, (), sizes)
    label_ends(axis, ends_of(lines, time_of, leaders, place))
    return figure


def _lines(rows: Sequence[Row], size: Size) -> Lines:
    """The rows of each implementation, by the size; of two at one value the last of the file."""
    found: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: FAMILIES.index(row.family)):
        found.setdefault(row.implementation, {})[size_of(row, size)] = row
    return {name: [points[value] for value in sorted(points)] for name, points in found.items()}


def _fastest(rows: Sequence[Row], size: Size, families: Sequence[str]) -> dict[int, Row]:
    best: dict[int, Row] = {}
    for row in rows:
        value = size_of(row, size)
        if row.family in families and (value not in best or time_of(row) < time_of(best[value])):
            best[value] = row
    return dict(sorted(best.items()))


def finding(rows: Sequence[Row], size: Size) -> str:
    """At which values NHA is faster than full attention, or how much its time grows; each of them the fastest of its
    family at each value."""
    letter = LETTERS[size]
    nha, full = _fastest(rows, size, ("nha",)), _fastest(rows, size, ("full",))
    both = [value for value in nha if value in full]
    if not nha:
        return f"Time by {letter}"
    if not both or size == "slots":
        least, most = min(nha), max(nha)
        growth = significant(time_of(nha[most]) / time_of(nha[least]), 2)
        who = _who([nha[least], nha[most]], "The fastest NHA")
        return f"{who} takes {growth} times as long at {letter}={most} as at {letter}={least}"
    faster = [value for value in both if time_of(nha[value]) < time_of(full[value])]
    us = _who([nha[value] for value in faster or both], "The fastest NHA")
    them = " or ".join(dict.fromkeys(full[value].label.removeprefix("full: ") for value in both))
    if not faster:
        return f"{us} is slower than full attention ({them}) at every {letter} measured"
    where = f"at {letter}={', '.join(map(str, faster))} only"
    if faster == both:
        where = f"at every {letter} measured"
    elif faster == both[: len(faster)]:
        where = f"up to {letter}={faster[-1]}"
    return f"{us} is faster than full attention ({them}) {where}"


def _who(rows: Sequence[Row], several: str) -> str:
    labels = list(dict.fromkeys(row.label for row in rows))
    return labels[0] if len(labels) == 1 else f"{several} ({' or '.join(labels)})"
