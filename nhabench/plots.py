"""Plots of a CSV, readable in print and without colour vision: latency, speed-up, and how near the floor NHA is."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import patheffects, rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from nhabench.crossover import (
    Crossover,
    fastest_by,
    fastest_by_length,
    find_crossover,
    length_name,
    length_of,
    time_of,
)
from nhabench.results import HOST_TIME, Row
from nhabench.tables import FAMILIES, grouped, passes, shape, significant

DPI = 150
LABEL_POINTS = 8.5
LINE = 12.3  # characters of a line below the headline, in an inch
LABEL_GAP = 1.25  # in heights of a label

# Okabe and Ito's palette: a colour for each family, so that the eye finds NHA against full against linear first; within
# a family marker and label tell the lines apart. NHA has a colour for each of its implementations. Thick lines and bold
# names are for the two that the finding is about: the fastest NHA and the fastest full attention.
_BLACK, _ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a line is drawn."""

    color: str
    marker: str
    line: str


_STYLES = {
    "triton": Style(_VERMILLION, "o", "-"),
    "flash": Style(_ORANGE, "s", "-"),
    "chunked": Style(_PURPLE, "^", "-"),
    "naive": Style(_BLACK, "x", "-"),
    "triton-padded": Style(_VERMILLION, "P", "-"),
    "sdpa-cudnn": Style(_BLUE, "D", "--"),
    "sdpa-flash": Style(_BLUE, "v", "--"),
    "sdpa-efficient": Style(_SKY, "<", "--"),
    "sdpa-math": Style(_SKY, ">", "--"),
    "torch-varlen": Style(_BLUE, ">", "--"),
    "flash-attn-2": Style(_BLUE, "P", "--"),
    "flash-attn-3": Style(_BLUE, "X", "--"),
    "window": Style("#666666", "*", "-."),
    "linear": Style(_GREEN, "d", ":"),
    "gla": Style(_GREEN, "h", ":"),
    "gsa": Style(_GREEN, "p", ":"),
    "simple-gla": Style(_GREEN, "1", ":"),
    "gated-delta-rule": Style(_GREEN, "2", ":"),
}
_FAMILY_STYLES = {
    "nha": Style(_VERMILLION, ".", "-"),
    "full": Style(_BLUE, ".", "--"),
    "window": Style("#666666", ".", "-."),
    "linear": Style(_GREEN, ".", ":"),
}


def style_of(row: Row) -> Style:
    """That of the row's implementation, or of its family."""
    return _STYLES.get(row.implementation, _FAMILY_STYLES[row.family])


_DEFINITIONS = ("naive", "sdpa-math")
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]

Lines = dict[str, list[Row]]


def lines_of(rows: Sequence[Row], families: Sequence[str], at: Callable[[Row], int] = length_of) -> Lines:
    """Timed rows by implementation, each by rising T, or what else `at` gives; at one T the last row of the file
    stands."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row.timed and row.family in families:
            found.setdefault(row.implementation, {})[at(row)] = row
    return {name: [points[value] for value in sorted(points)] for name, points in found.items()}


def leaders_of(rows: Sequence[Row], families: Sequence[str], at: Callable[[Row], int] = length_of) -> set[str]:
    """The implementations that are the fastest of their family at some T, or what else `at` gives."""
    return {row.implementation for family in families for row in fastest_by(at, rows, family).values()}


def contest(rows: Sequence[Row], families: Sequence[str]) -> tuple[Lines, list[str]]:
    """The lines to draw, and the labels of those left out: plain definitions that are nowhere the fastest of their
    family, slow and measured at small T only."""
    lines, leaders = lines_of(rows, families), leaders_of(rows, FAMILIES)
    absent = [name for name in lines if name in _DEFINITIONS and name not in leaders]
    return {name: line for name, line in lines.items() if name not in absent}, [lines[name][0].label for name in absent]


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every workload of the rows into PNG files in the folder; returns their paths.

    forward-<workload>-latency.png, -speedup.png and -floor.png, of training training-<workload>-...; a workload's
    second dtype has its name in the file's. Rows without a time are absent; a plot that would have no line is not
    drawn. Raises OSError.
    """
    written: list[Path] = []
    seen: set[str] = set()
    for (workload, dtype, _, direction), group in grouped(rows).items():
        name = f"{direction}-{workload}"
        stem = name if name not in seen else f"{name}-{dtype}"
        seen.add(name)
        for kind, draw in (("latency", latency), ("speedup", speedup), ("floor", floor)):
            figure = draw(group)
            if figure is not None:
                written.append(save(figure, folder / f"{stem}-{kind}.png"))
    return written


def save(figure: Figure, path: Path) -> Path:
    """Write whole or not at all, as the CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    try:
        figure.savefig(beside, format="png")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def to_svg(figure: Figure, salt: str) -> str:
    """The figure as an <svg> element for a page: transparent, its texts as texts, and the same at every call.

    `salt` makes its ids differ from those of the page's other figures. The white seam of texts over lines is left to
    the page's CSS (paint-order): as an effect of matplotlib's it would turn every glyph into two paths. Takes it from
    the figure.
    """
    for artist in figure.findobj(Text):
        artist.set_path_effects([])
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    # Groups are numbered in each figure anew, and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :]).rstrip()


def new_figure(panels: int, right: float) -> tuple[Figure, list[Axes]]:
    """A figure with its axes side by side; `right` is where the last ones end, as a fraction of the width."""
    # Not through pyplot: it would keep every figure, and could look for a display.
    figure = Figure(figsize=(9.6 if panels == 1 else 12.8, 5.6 if panels == 1 else 4.4), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    top = 0.86 if panels == 1 else 0.80
    figure.subplots_adjust(left=0.085 if panels == 1 else 0.055, right=right, top=top, bottom=0.13, wspace=0.24)
    return figure, axes


def headline(
    figure: Figure, finding: str, subject: str, rows: Sequence[Row], absent: Sequence[str], sizes: str = ""
) -> None:
    """The finding first, then what was measured where, and what a reader should know about the rows; in the corner the
    names of what is not drawn. The finding is the figure's label too. sizes: what the rows share, the workload by
    default."""
    left, row = figure.subplotpars.left, rows[0]
    figure.set_label(finding)
    figure.text(left, 0.975, finding, fontsize=13, fontweight="bold", va="top")
    where = f"{subject} on {row.device}: {sizes or f'{row.workload} ({shape(row)}, {row.dtype})'}"
    remarks = [f"sequences of uneven lengths, {row.seq_len} tokens packed in a call"] if row.sequences else []
    remarks += [remark] if (remark := of_several_runs(rows)) else []
    if any(HOST_TIME in row.timer for row in rows):
        remarks.append("hollow: includes host time")
    where = "\n".join(
        [*textwrap.wrap(where, int(LINE * figure.get_figwidth())), *(["; ".join(remarks)] if remarks else [])]
    )
    further = where.count("\n") - (len(figure.axes) == 1)  # lines; several axes have titles of their own
    if further > 0:
        figure.subplots_adjust(top=figure.subplotpars.top - (0.02 + 0.03 * further))
    figure.text(left, 0.925 if len(figure.axes) == 1 else 0.905, where, fontsize=9.5, va="top", color="#333333")
    if absent:
        figure.text(0.99, 0.02, "\n".join(["slower, not drawn:", *absent]), fontsize=8, ha="right", color="#333333")


def subject_of(rows: Sequence[Row], what: str) -> str:
    """'Forward latency': what is drawn of the rows' calls."""
    return f"{passes(rows[0]).capitalize()} {what}"


def of_several_runs(rows: Sequence[Row]) -> str:
    """A warning where the rows come from more than one run; otherwise empty."""
    days = sorted({row.date for row in rows})
    if len(days) < 2:
        return ""
    return f"rows of {len(days)} runs, {days[0][:10]} to {days[-1][:10]}: compare those of one run"


def _length_axis(axis: Axes, rows: Sequence[Row], most: int = 12) -> None:
    """Log scale of T, with `most` lengths named at most, the largest always."""
    lengths = sorted(set(map(length_of, rows)))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(ticker.FixedLocator(lengths[:: -math.ceil(len(lengths) / most)]))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: in_k(x)))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xlim(lengths[0] / 1.2, lengths[-1] * 1.12)
    axis.set_xlabel(_length_title(rows))
    plain_axis(axis)


def _length_title(rows: Sequence[Row]) -> str:
    if rows[0].sequences:
        return "mean length T of the packed sequences"
    # Where B > 1 all lengths have (about) the same tokens; B = 1 says nothing of how many were held.
    held = max((row.batch * row.seq_len for row in rows if row.batch > 1), default=0)
    return f"sequence length T  (batch so that B·T = {held}, at least 1)" if held else "sequence length T  (B = 1)"


def in_k(tokens: float) -> str:
    """512, 1k, 128k."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 else f"{tokens:g}"


def plain_axis(axis: Axes) -> None:
    """A light grid beneath, and no frame where there is no scale."""
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def log_axis(axis: Axes, unit: str = "") -> None:
    """Log scale of what is drawn already; over few decades with more than the powers of ten named."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}{unit}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _draw_line(
    axis: Axes, rows: Sequence[Row], value: Callable[[Row], float], leads: bool, at: Callable[[Row], float] = length_of
) -> None:
    """An implementation's line over T, or over what else `at` gives; hollow where host time is in it."""
    style = style_of(rows[0])
    x, y = [at(row) for row in rows], [value(row) for row in rows]
    axis.plot(
        x, y, color=style.color, marker=style.marker, linestyle=style.line, linewidth=2.8 if leads else 1.3,
        markersize=5.5, zorder=4 if leads else 3,
    )  # fmt: skip
    hollow = [(at(row), value(row)) for row in rows if HOST_TIME in row.timer]
    if hollow:
        axis.plot(
            *zip(*hollow, strict=True), color=style.color, marker=style.marker, linestyle="none", markersize=5.5,
            markerfacecolor="white", zorder=5,
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as can be to the wanted (rising) ones, at least `gap` apart, in low..high where they fit."""
    # Runs of positions that would touch are pooled, and each run is centred on what its members wanted.
    runs: list[list[float]] = []  # of wanted positions, less the gaps below them
    for index, position in enumerate(wanted):
        runs.append([position - index * gap])
        while len(runs) > 1 and sum(runs[-1]) / len(runs[-1]) < sum(runs[-2]) / len(runs[-2]):
            runs[-2:] = [runs[-2] + runs[-1]]
    placed = [sum(run) / len(run) for run in runs for _ in run]
    highest = high - (len(wanted) - 1) * gap
    return [max(low, min(position, highest)) + index * gap for index, position in enumerate(placed)]


@dataclass(frozen=True)
class End:
    """Where a line ends, and its name."""

    x: float
    y: float
    text: str
    color: str
    bold: bool = False


def name_of(row: Row) -> str:
    """What a line is called in a plot."""
    return row.label.removesuffix(" (plain PyTorch)")


def ends_of(
    lines: Lines, value: Callable[[Row], float], leaders: set[str], at: Callable[[Row], float] = length_of
) -> list[End]:
    """The end of every line, those of the leaders in bold."""
    return [
        End(at(row), value(row), name_of(row), style_of(row).color, name in leaders)
        for name, (*_, row) in lines.items()
    ]


def label_ends(axis: Axes, ends: Sequence[End]) -> None:
    """Name each line at its end; lines that end at the same length share a column in which no two names overlap."""
    last = max(end.x for end in ends)
    pixels_per_point = axis.figure.dpi / 72
    gap = LABEL_POINTS * LABEL_GAP * pixels_per_point
    bottom, top = (float(axis.transAxes.transform((0, y))[1]) for y in (0, 1))
    for x in {end.x for end in ends}:
        column = sorted((end for end in ends if end.x == x), key=lambda end: end.y)
        wanted = [float(axis.transData.transform((x, end.y))[1]) for end in column]
        for end, point, height in zip(column, wanted, spread(wanted, gap, bottom, top), strict=True):
            _label(axis, end, 24.0 if x == last else 8.0, (height - point) / pixels_per_point)


def _label(axis: Axes, end: End, right: float, up: float) -> None:
    ink = tuple(0.65 * part for part in to_rgb(end.color))  # thin strokes in a line's own colour are hard to read
    axis.annotate(
        end.text, xy=(end.x, end.y), xytext=(right, up), textcoords="offset points", va="center",
        fontsize=LABEL_POINTS, fontweight="bold" if end.bold else "normal", color=ink, annotation_clip=False,
        arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4,
                    "relpos": (0.0, 0.5)},
        path_effects=_HALO, zorder=6,
    )  # fmt: skip


def draw_times(axis: Axes, lines: Lines, leaders: set[str], at: Callable[[Row], float] = length_of) -> None:
    """Every line in milliseconds, with its intervals, and the scale."""
    for name, line in lines.items():
        _draw_band(axis, line, at)
        _draw_line(axis, line, time_of, name in leaders, at)
    log_axis(axis)
    what = passes(next(iter(lines.values()))[0])
    axis.set_ylabel(f"median time of a {what} call, ms; 95 % interval shaded")


def _draw_band(axis: Axes, rows: Sequence[Row], at: Callable[[Row], float] = length_of) -> None:
    """Shade the medians' intervals; nothing where a row has none."""
    places = [at(row) for row in rows]
    low = [math.nan if row.low_ms is None else row.low_ms for row in rows]
    high = [math.nan if row.high_ms is None else row.high_ms for row in rows]
    axis.fill_between(places, low, high, color=style_of(rows[0]).color, alpha=0.25, linewidth=0)


def latency(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds against T on log axes, the median's interval shaded, the crossover with full attention marked."""
    lines, absent = contest(rows, FAMILIES)
    if not lines:
        return None
    figure, (axis,) = new_figure(1, right=0.76)
    timed = [row for line in lines.values() for row in line]
    leaders = leaders_of(rows, ("nha", "full"))
    _length_axis(axis, timed)
    draw_times(axis, lines, leaders)
    crossover = find_crossover(rows)
    if crossover is not None and crossover.at is not None:
        _mark_crossover(axis, crossover, timed)
    subject = subject_of(timed, "latency")
    headline(figure, crossover.sentence if crossover else subject, subject, timed, absent)
    label_ends(axis, ends_of(lines, time_of, leaders))
    return figure


def _mark_crossover(axis: Axes, crossover: Crossover, rows: Sequence[Row]) -> None:
    """A ring where the fastest NHA and the fastest full attention cross, and their names."""
    at = crossover.at or 0.0
    lengths = sorted(fastest_by_length(rows, "nha"))
    nha, full = fastest_by_length(rows, "nha"), fastest_by_length(rows, "full")
    after = crossover.seq_len or lengths[-1]
    before = max(length for length in lengths if length < after and length in full)
    part = math.log(at / before) / math.log(after / before)
    height = math.exp((1 - part) * math.log(time_of(nha[before])) + part * math.log(time_of(nha[after])))
    axis.axvline(at, color=_BLACK, linestyle=(0, (1, 2)), linewidth=1.0, zorder=2)
    axis.plot([at], [height], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=_BLACK, zorder=7)
    # Lines rise to the right: beside the mark, the upper left is the free side, unless the mark is at the very left.
    first, last = lengths[0], max(lengths[-1], after)
    at_left = math.log(at / first) < 0.4 * math.log(last / first)
    span = 0.4 * math.log(last / first)  # that the words take, to the one side
    beside = [row for row in rows if 0 <= math.log(length_of(row) / at) * (1 if at_left else -1) <= span]
    low, high = axis.get_ylim()
    highest = max((time_of(row) for row in beside), default=low)
    axis.set_ylim(top=max(high, low * (highest / low) ** (8 / 7)))  # an eighth of the height for them
    full_name = crossover.full.label.removeprefix("full: ")
    axis.annotate(
        f"{crossover.nha.label} overtakes\n{full_name} at {length_name(crossover.nha)} ≈ {significant(at, 2)} →",
        xy=(at, 1.0), xycoords=("data", "axes fraction"), xytext=(4 if at_left else -4, -4),
        textcoords="offset points", ha="left" if at_left else "right", va="top", fontsize=9, fontweight="bold",
        zorder=7, path_effects=_HALO,
    )  # fmt: skip


def speedup(rows: Sequence[Row]) -> Figure | None:
    """How many times faster than the fastest full attention at the same T, for NHA, window and linear attention."""
    full = fastest_by_length(rows, "full")
    lines, absent = contest([row for row in rows if length_of(row) in full], ("nha", "window", "linear"))
    if not lines:
        return None

    def gain(row: Row) -> float:
        return time_of(full[length_of(row)]) / time_of(row)

    figure, (axis,) = new_figure(1, right=0.76)
    timed = [row for line in lines.values() for row in line]
    leaders = leaders_of(rows, ("nha",))
    _length_axis(axis, timed)
    for name, line in lines.items():
        _draw_line(axis, line, gain, name in leaders)
    axis.axhline(1.0, color=_BLUE, linestyle="--", linewidth=2.8, zorder=2)
    log_axis(axis, "x")
    axis.set_ylabel("speed relative to the fastest full attention")
    subject = subject_of(timed, "speed-up over full attention")
    headline(figure, _speedup_finding(rows, gain), subject, [*timed, *full.values()], absent)
    names = " / ".join(dict.fromkeys(row.label.removeprefix("full: ") for row in full.values()))
    baseline = End(length_of(timed[-1]), 1.0, f"fastest full ({names})", _BLUE, bold=True)
    label_ends(axis, [*ends_of(lines, gain, leaders), baseline])
    return figure


def _speedup_finding(rows: Sequence[Row], gain: Callable[[Row], float]) -> str:
    crossover = find_crossover(rows)
    if crossover is None:
        return "Speed-up over full attention"
    nha, full = fastest_by_length(rows, "nha"), fastest_by_length(rows, "full")
    best = max((row for length, row in nha.items() if length in full), key=gain)
    word = "faster than" if gain(best) >= 1 else "the speed of"
    digits = 1 if gain(best) < 10 else 0
    return f"{best.label}: up to {gain(best):.{digits}f}x {word} full attention ({length_name(best)}={length_of(best)})"


def floor(rows: Sequence[Row]) -> Figure | None:
    """NHA against what the device can do: TB/s, TFLOP/s, and the fraction of the floor, by T."""
    lines, absent = contest(rows, ("nha",))
    if not lines:
        return None
    figure, axes = new_figure(3, right=0.865)
    timed = [row for line in lines.values() for row in line]
    first, leaders = timed[-1], leaders_of(rows, ("nha",))
    panels: tuple[tuple[str, Callable[[Row], float], float | None, str], ...] = (
        ("TB/s: bytes of the floor / time", lambda row: row.tb_per_s or 0.0, first.copy_tb_per_s, "copy"),
        ("TFLOP/s: FLOPs of the floor / time", lambda row: row.tflop_per_s or 0.0, first.matmul_tflop_per_s, "matmul"),
        ("speed, in per cent of the floor's", lambda row: 100 * (row.floor_fraction or 0.0), 100.0, "floor"),
    )
    for axis, (title, value, ceiling, ceiling_name) in zip(axes, panels, strict=True):
        _length_axis(axis, timed, most=6)
        axis.set_xlabel("mean length T of the packed sequences" if first.sequences else "sequence length T")
        axis.set_title(title, fontsize=10, loc="left")
        for name, line in lines.items():
            _draw_line(axis, line, value, name in leaders)
        if ceiling is not None:
            axis.axhline(ceiling, color=_BLACK, linestyle="--", linewidth=1.2)
            text = f"{ceiling_name}: {ceiling:.3g}" if ceiling_name != "floor" else "the floor"
            # Above it, where no line can be.
            axis.annotate(text, xy=(0.02, ceiling), xycoords=("axes fraction", "data"), xytext=(0, 3),
                          textcoords="offset points", va="bottom", fontsize=LABEL_POINTS)  # fmt: skip
        log_axis(axis)
        if ceiling is not None:
            axis.set_ylim(top=2.2 * ceiling)
    best = max(timed, key=lambda row: row.floor_fraction or 0.0)
    reached = [100 * (row.floor_fraction or 0.0) for row in lines[best.implementation]]
    low, high = f"{min(reached):.2g}", f"{max(reached):.2g}"
    finding = f"{best.label} runs at {low if low == high else f'{low} to {high}'} % of the speed that the floor allows"
    headline(figure, finding, f"Achieved rates of the {passes(first)} pass", timed, absent)
    label_ends(axes[-1], ends_of(lines, panels[-1][1], leaders))
    return figure
