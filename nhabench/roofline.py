"""The roofline: what the device allows at an operation's arithmetic intensity, and what implementations reach of it.

Intensity is that of the floor (nhabench.floors), in FLOP/B: what the operation must compute over what it must move. So
it is a property of the operation and its sizes, and every implementation of it stands at the same place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nhabench.plots import (
    LABEL_POINTS,
    Lines,
    contest,
    headline,
    leaders_of,
    log_axis,
    name_of,
    new_figure,
    plain_axis,
    style_of,
)
from nhabench.results import HOST_TIME, Row
from nhabench.tables import FAMILIES, passes, significant


def intensity(row: Row) -> float | None:
    """FLOPs over bytes of the row's floor, in FLOP/B; None where it has none."""
    return row.floor_flops / row.floor_bytes if row.floor_flops and row.floor_bytes else None


def allowed(row: Row) -> float | None:
    """TFLOP/s that the device's measured ceilings allow at the row's intensity; None where one is missing."""
    at = intensity(row)
    if at is None or row.copy_tb_per_s is None or row.matmul_tflop_per_s is None:
        return None
    return min(at * row.copy_tb_per_s, row.matmul_tflop_per_s)


def on_roofline(rows: Sequence[Row]) -> list[Row]:
    """The timed rows that have a place in the plot: an intensity, ceilings and a rate."""
    return [row for row in rows if row.timed and allowed(row) and row.tflop_per_s]


def roofline(rows: Sequence[Row]) -> Figure | None:
    """TFLOP/s against FLOP/B on log axes, a point for each implementation and T, beneath the measured ceilings."""
    lines, absent = contest(on_roofline(rows), FAMILIES)
    if not lines:
        return None
    figure, (axis,) = new_figure(1, right=0.76)
    placed = [row for line in lines.values() for row in line]
    leaders = leaders_of(placed, ("nha", "full"))
    _draw_points(axis, lines, leaders)
    _draw_roof(axis, placed)
    axis.set_xlabel("arithmetic intensity of the floor, FLOP/B  (a point for each length; B·T as in the other plots)")
    axis.set_ylabel("achieved TFLOP/s: FLOPs of the floor / time")
    plain_axis(axis)
    headline(figure, finding(placed), f"Roofline of the {passes(placed[0])} pass", placed, absent)
    names = axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=LABEL_POINTS)
    bold = {name_of(lines[leader][0]) for leader in leaders}
    for name in names.get_texts():
        name.set_fontweight("bold" if name.get_text() in bold else "normal")
    return figure


def _draw_points(axis: Axes, lines: Lines, leaders: set[str]) -> None:
    for name, line in sorted(lines.items(), key=lambda item: FAMILIES.index(item[1][0].family)):
        style = style_of(line[0])
        points = [(intensity(row) or 0.0, row.tflop_per_s or 0.0) for row in line]
        axis.plot(
            *zip(*points, strict=True), color=style.color, marker=style.marker, linestyle=style.line,
            linewidth=1.8 if name in leaders else 0.8, markersize=5.5, zorder=4 if name in leaders else 3,
            label=name_of(line[0]),
        )  # fmt: skip
        hollow = [point for point, row in zip(points, line, strict=True) if HOST_TIME in row.timer]
        if hollow:
            axis.plot(
                *zip(*hollow, strict=True), color=style.color, marker=style.marker, linestyle="none", markersize=5.5,
                markerfacecolor="white", zorder=5,
            )  # fmt: skip


def _draw_roof(axis: Axes, rows: Sequence[Row]) -> None:
    """The ceilings of the last row, over all that is drawn, each with its name on its free side."""
    copy, matmul = rows[-1].copy_tb_per_s or 0.0, rows[-1].matmul_tflop_per_s or 0.0
    ridge = matmul / copy
    places = [intensity(row) or ridge for row in rows]
    left, right = min(*places, ridge) / 3, max(*places, ridge) * 3
    lowest = min(row.tflop_per_s or matmul for row in rows)
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(min(lowest, left * copy) / 1.5, matmul * 2.5)
    log_axis(axis)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.plot([left, ridge, right], [left * copy, matmul, matmul], color="black", linewidth=1.4, zorder=2)
    axis.plot([ridge, ridge], [axis.get_ylim()[0], matmul], color="#888888", linewidth=0.8, linestyle=":", zorder=1)
    axis.annotate(
        f"matmul: {significant(matmul, 3)} TFLOP/s", xy=(right, matmul), xytext=(-2, 4), textcoords="offset points",
        ha="right", fontsize=LABEL_POINTS,
    )  # fmt: skip
    axis.annotate(
        f"ridge: {significant(ridge, 3)} FLOP/B", xy=(ridge, axis.get_ylim()[0]), xytext=(4, 5),
        textcoords="offset points", fontsize=LABEL_POINTS, color="#333333",
    )  # fmt: skip
    axis.text(
        left * 1.08, left * 1.2 * copy, f"copy: {significant(copy, 3)} TB/s", fontsize=LABEL_POINTS, va="bottom",
        rotation=math.degrees(math.atan(copy)), rotation_mode="anchor", transform_rotates_text=True,
    )  # fmt: skip


def finding(rows: Sequence[Row]) -> str:
    """Which of the two ceilings bounds NHA, or what else there is, in words."""
    nha = [row for row in rows if row.family == "nha"] or list(rows)
    who = "NHA" if nha[0].family == "nha" else nha[0].label
    ridge = (rows[-1].matmul_tflop_per_s or 0.0) / (rows[-1].copy_tb_per_s or math.inf)
    places = [intensity(row) or 0.0 for row in nha]
    low, high = significant(min(places), 3), significant(max(places), 3)
    at = low if low == high else f"{low} to {high}"
    if max(places) < ridge:
        bound = "memory-bound"
    elif min(places) >= ridge:
        bound = "compute-bound"
    else:
        bound = "memory-bound at some T, compute-bound at others"
    return f"The floor of {who} is {bound}: {at} FLOP/B, ridge at {significant(ridge, 3)}"
