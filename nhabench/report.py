"""Results, a folder of them or one CSV, as one HTML file that needs nothing beside it: findings, provenance, plots and
their data."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from nhabench.data import Table, floor_data, latency_data, provenance, roofline_data, speedup_data, sweep_data
from nhabench.findings import crossing, findings, marked, overview
from nhabench.plots import floor, latency, speedup, to_svg
from nhabench.results import Row, is_table, load_rows, replace_file
from nhabench.roofline import roofline
from nhabench.sweeps import Size, finding, shared_sizes, sweep, sweeps
from nhabench.tables import grouped, passes, reasons, shape
from nhabench.trust import Figures, read_figures

FILE_NAME = "report.html"
SIZES: tuple[Size, ...] = ("window", "slots")

Draw = Callable[[Sequence[Row]], Figure | None]


@dataclass(frozen=True)
class Plot:
    """A plot and its data. `finding` is what it says, for who cannot see it; `panels`: how wide it is drawn."""

    kind: str
    finding: str
    svg: str
    panels: int
    table: Table


@dataclass(frozen=True)
class Group:
    """One workload, or a sweep over one size of it; of one dtype and device."""

    anchor: str
    title: str
    subject: str
    crossing: str
    findings: list[str]
    plots: list[Plot]


@dataclass(frozen=True)
class Section:
    """One CSV, direction and device."""

    title: str
    overview: str
    groups: list[Group]
    incorrect: list[str]
    absent: list[str]
    marks: list[str]


@dataclass(frozen=True)
class Report:
    """What the page shows. `left_out`: files that are no tables of results, or hold no rows, and why."""

    folder: str
    files: list[str]
    left_out: dict[str, str]
    rows: list[Row]
    sections: list[Section]
    machines: Table
    runs: Table
    trust: list[Figures]

    @property
    def devices(self) -> list[str]:
        """Every device of the rows, once."""
        return list(dict.fromkeys(row.device for row in self.rows))

    @property
    def days(self) -> list[str]:
        """The first and the last day of the rows, one where they are the same."""
        days = sorted(row.date[:10] for row in self.rows)
        return list(dict.fromkeys((days[0], days[-1])))


def find_tables(path: Path) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """(rows by file, left-out files with the reason) of one CSV, or of a folder's CSVs and those of its subfolders.

    Files are named relative to the folder. Raises ValueError where no file holds rows, or one is of another version;
    OSError where one cannot be read.
    """
    folder = folder_of(path)
    found = [path] if path.is_file() else [*sorted(path.glob("*.csv")), *sorted(path.glob("*/*.csv"))]
    tables: dict[str, list[Row]] = {}
    left_out: dict[str, str] = {}
    for file in filter(Path.is_file, found):
        name = file.relative_to(folder).as_posix()
        try:
            if not is_table(file):
                left_out[name] = "not a table of results"
                continue
            rows = load_rows(file)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{name}: expected CSV, got: {error}") from error
        except ValueError as error:
            raise ValueError(f"{name.removesuffix(file.name)}{error}") from error  # it begins with the file's name
        if rows:
            tables[name] = rows
        else:
            left_out[name] = "holds no rows"
    if not tables:
        what = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no CSV"
        raise ValueError(f"expected results that bench or a suite wrote, got {path.name or path}: {what}")
    return tables, left_out


def folder_of(path: Path) -> Path:
    """The folder of a CSV, or the folder itself."""
    return path.parent if path.is_file() else path


def build_report(path: Path) -> Report:
    """Read one CSV, or those of a folder, and draw their plots. Raises as find_tables and read_figures."""
    tables, left_out = find_tables(path)
    taken: set[str] = set()
    sections = []
    for name, rows in tables.items():
        parts: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            parts.setdefault((row.direction, row.device), []).append(row)
        sections += [_section(name, part, taken) for part in parts.values()]
    every = [row for rows in tables.values() for row in rows]
    figures = read_figures(folder_of(path), {row.device for row in every})
    return Report(folder_of(path.resolve()).name, list(tables), left_out, every, sections, *provenance(tables), figures)


def write_report(report: Report, path: Path) -> int:
    """Render the page into a file, whole or not at all; returns its bytes. Raises OSError."""
    template = resources.files("nhabench").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(report=report)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
    return len(page.encode())


def summary(report: Report) -> dict[str, object]:
    """What a program may want to know of a report, ready for JSON."""
    groups = [group for section in report.sections for group in section.groups]
    return {
        "files": report.files,
        "left_out": report.left_out,
        "devices": report.devices,
        "rows": len(report.rows),
        "timed": sum(row.timed for row in report.rows),
        "plots": sum(len(group.plots) for group in groups),
        "trust": {one.file: one.sentences for one in report.trust},
        "findings": {group.anchor: [group.crossing, *group.findings] for group in groups},
    }


def _section(name: str, rows: Sequence[Row], taken: set[str]) -> Section:
    swept = [(size, group) for size in SIZES for group in sweeps(rows, size)]
    groups = {key: group for key, group in grouped(rows).items() if not _only_swept(group, swept)}
    told = reasons(rows)
    return Section(
        title=f"{name}: {passes(rows[0])}, {rows[0].device}",
        overview=overview(list(groups.values())),
        groups=[
            *(_sweep(name, size, group, taken) for size, group in swept),
            *(_group(name, title, group, taken) for (title, *_), group in groups.items()),
        ],
        incorrect=[sentence for status, sentence in told if status == "incorrect"],
        absent=[sentence for status, sentence in told if status != "incorrect"],
        marks=marked(rows),
    )


def _only_swept(rows: Sequence[Row], swept: Sequence[tuple[Size, Sequence[Row]]]) -> bool:
    """Whether a workload stands at one length, and in a sweep: alone it would be a plot of single points."""
    keys = {row.key for _, group in swept for row in group}
    return len({(row.seq_len, row.sequences) for row in rows}) == 1 and any(row.key in keys for row in rows)


def _sweep(name: str, size: Size, rows: Sequence[Row], taken: set[str]) -> Group:
    first = rows[0]
    packed = f", {first.sequences} packed" if first.sequences else ""
    title = f"{size}: {shared_sizes(first, size)}, T={first.seq_len}{packed}"
    anchor = _anchor(name, title, first, taken)
    figure = sweep(rows, size)
    plot = Plot(size, str(figure.get_label()), to_svg(figure, f"{anchor}-{size}"), 1, sweep_data(rows, size))
    subject = f"{passes(first)} on {first.device}, B={first.batch}, {first.dtype}; {name}"
    return Group(anchor, title, subject, finding(rows, size), [], [plot])


def _anchor(name: str, title: str, first: Row, taken: set[str]) -> str:
    """A name for a link, of which there is no other on the page."""
    anchor = re.sub(r"[^a-z0-9.]+", "-", f"{name.removesuffix('.csv')}-{title}-{first.dtype}".lower())
    while anchor in taken:  # on a second device
        anchor += "-more"
    taken.add(anchor)
    return anchor


def _group(name: str, title: str, rows: Sequence[Row], taken: set[str]) -> Group:
    first = rows[0]
    anchor = _anchor(name, title, first, taken)
    subject = f"{passes(first)} on {first.device}, {shape(first)}, {first.dtype}; {name}"
    plots = list(_plots(rows, anchor))
    return Group(anchor, title, subject, crossing(rows), findings(rows), plots)


# What is drawn, with its data and the number of its panels side by side.
_KINDS: tuple[tuple[str, Draw, Callable[[Sequence[Row]], Table], int], ...] = (
    ("latency", latency, latency_data, 1),
    ("speed-up", speedup, speedup_data, 1),
    ("floor", floor, floor_data, 3),
    ("roofline", roofline, roofline_data, 1),
)


def _plots(rows: Sequence[Row], anchor: str) -> Iterator[Plot]:
    """The plots that have a line."""
    for kind, draw, data, panels in _KINDS:
        figure = draw(rows)
        if figure is not None:
            yield Plot(kind, str(figure.get_label()), to_svg(figure, f"{anchor}-{kind}"), panels, data(rows))
