"""The HTML report of a folder of results: what it says, that it needs nothing else, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nhabench.cli import app
from nhabench.data import latency_data, roofline_data, speedup_data, table
from nhabench.findings import against, crossing, findings, floor_reached, overview
from nhabench.report import build_report, find_tables, summary, write_report
from nhabench.results import Row, to_csv
from nhabench.roofline import allowed, intensity, roofline
from nhabench.tables import significant

RowMaker = Callable[..., Row]
Figures = dict[str, dict[str, Any]]
RUNNER = CliRunner()


class Page(HTMLParser):
    """What the tests ask of a page: its texts, attributes by element, and its tables by caption."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag in ("caption", "td", "th", "script", "style"):
            self._open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("td", "th"):
            self._rows[-1][-1] += data
        elif inside == "caption":
            self._caption += data
        if inside not in ("script", "style"):
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]


PLACED = {"floor_bytes": 10**9, "floor_flops": 5 * 10**9, "samples": 21, "peak_bytes": 3 * 2**20}


@pytest.fixture
def rows(row: RowMaker) -> list[Row]:
    """A race of two lengths that NHA wins at the second."""
    times = {("chunked", 512): 2.0, ("chunked", 1024): 2.5, ("sdpa-cudnn", 512): 1.0, ("sdpa-cudnn", 1024): 5.0}
    full = {"label": "full: cuDNN", "family": "full"}
    return [
        row(
            implementation=name, seq_len=length, median_ms=ms, low_ms=0.99 * ms, high_ms=1.01 * ms,
            **PLACED, **(full if name == "sdpa-cudnn" else {}),
        )
        for (name, length), ms in times.items()
    ]  # fmt: skip


def write(folder: Path, rows: list[Row], name: str = "forward.csv") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_csv(rows), encoding="utf-8")
    return path


def page_of(folder: Path) -> Page:
    write_report(build_report(folder), folder / "report.html")
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_plot_has_its_data_and_the_data_are_the_rows(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    page = page_of(tmp_path)
    assert len(page.all("svg")) == 4
    titles = [title for title in page.tables if title.startswith("tiny, ")]
    assert titles == [f"tiny, {kind}: data" for kind in ("latency", "speed-up", "floor", "roofline")]
    assert [element["aria-label"] for element in page.all("div", role="img")] == [
        "latency: NHA chunked is faster than full attention (cuDNN) from T=1024",
        "speed-up: NHA chunked: up to 2.0x faster than full attention (T=1024)",
        "floor: NHA chunked runs at 25 % of the speed that the floor allows",
        "roofline: The floor of NHA is memory-bound: 5.00 FLOP/B, ridge at 10.0",
    ]
    header, *lines = page.tables["tiny, latency: data"]
    found = [dict(zip(header, line, strict=True)) for line in lines]
    assert [(line["implementation"], line["T"], line["median, ms"]) for line in found] == [
        ("NHA chunked", "512", "2.000"), ("NHA chunked", "1024", "2.500"),
        ("full: cuDNN", "512", "1.000"), ("full: cuDNN", "1024", "5.000"),
    ]  # fmt: skip
    first = {key: found[0][key] for key in ("95 % low", "95 % high", "samples", "% of the floor", "peak, MiB")}
    assert first == {
        "95 % low": "1.980", "95 % high": "2.020", "samples": "21", "% of the floor": "25.00", "peak, MiB": "3.000"
    }  # fmt: skip
    header, *lines = page.tables["tiny, speed-up: data"]
    assert [line[header.index("speed-up")] for line in lines] == ["0.5000", "2.000"]
    header, *lines = page.tables["tiny, roofline: data"]
    assert {line[header.index("FLOP/B")] for line in lines} == {"5.000"}
    assert {line[header.index("allowed TFLOP/s")] for line in lines} == {"5.000"}


def test_the_findings_are_in_words(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    text = page_of(tmp_path).text
    assert "NHA chunked is faster than full attention (cuDNN) from T=1024; the lines cross at T ≈ 720" in text
    assert (
        "NHA chunked against full attention (cuDNN): faster at T=1024, slower at T=512; 0.500x its speed at T=512, "
        "2.00x at T=1024." in text
    )
    assert "NHA chunked runs at 25 % of the speed that the floor allows." in text
    assert "Not timed at the lengths of NHA: window alone, linear attention." in text
    assert "faster than full attention at the largest length of 1 of the 1 workloads that timed both" in text


def test_faster_is_only_said_where_the_intervals_are_apart(row: RowMaker) -> None:
    full = {"implementation": "sdpa-cudnn", "label": "full: cuDNN", "family": "full"}
    rows = [row(seq_len=512, median_ms=2.0, low_ms=1.0, high_ms=3.0), row(seq_len=512, median_ms=2.5, **full)]
    assert "level within the intervals at every length measured" in against(rows, "full")
    bare = [row(median_ms=2.0, low_ms=None, high_ms=None), row(median_ms=2.1, low_ms=None, high_ms=None, **full)]
    assert "faster at every length measured" in against(bare, "full")
    assert against(rows, "linear") == ""


def test_neighbouring_lengths_are_drawn_together(row: RowMaker) -> None:
    window = {"implementation": "window", "label": "window alone", "family": "window", "low_ms": None, "high_ms": None}
    ours = {512: 1.0, 1024: 9.0, 2048: 1.0, 4096: 1.0}
    rows = [row(seq_len=length, median_ms=ms, low_ms=None, high_ms=None) for length, ms in ours.items()]
    rows += [row(seq_len=length, median_ms=2.0, **window) for length in ours]
    assert against(rows, "window") == (
        "NHA chunked against window alone: faster at T=512, 2048 to 4096, slower at T=1024; 2.00x its speed at T=512, "
        "2.00x at T=4096."
    )


def test_findings_without_a_rival_or_without_nha(row: RowMaker) -> None:
    full = row(implementation="sdpa-cudnn", label="full: cuDNN", family="full")
    assert crossing([row()]) == "No crossover: full attention not timed"
    assert crossing([full]) == "No crossover: NHA not timed"
    assert crossing([]) == "No crossover: NHA and full attention not timed"
    assert crossing([row(seq_len=1024), full]) == "No crossover: not timed at a common length"
    assert findings([full]) == ["NHA was not timed."]
    assert floor_reached([row(floor_fraction=None)]) == ""
    assert overview([[row()]]) == ""


def test_rows_of_several_runs_are_told_in_the_findings(row: RowMaker) -> None:
    rows = [row(), row(seq_len=1024, date="2026-02-03T03:04:05+00:00")]
    assert findings(rows)[-1] == "Rows of 2 runs, 2026-01-02 to 2026-02-03: compare those of one run."


def test_what_did_not_run_was_wrong_or_holds_host_time_is_told(rows: list[Row], row: RowMaker, tmp_path: Path) -> None:
    bad = {"implementation": "triton", "label": "NHA triton", "median_ms": None}
    rows += [
        row(**bad, status="incorrect", note="Wrong by 3."),
        row(**bad, seq_len=1024, status="out of memory", note="Too large."),
        row(implementation="flash", label="NHA flash", timer="cuda events with host time", clock_fell=True),
    ]
    write(tmp_path, rows)
    report = build_report(tmp_path)
    (section,) = report.sections
    assert section.incorrect == ["NHA triton (T=512, tiny): incorrect. Wrong by 3."]
    assert section.absent == ["NHA triton (T=1024, tiny): out of memory. Too large."]
    assert section.marks == [
        "Includes host time: NHA flash (T=512, tiny).",
        "The SM clock fell: NHA flash (T=512, tiny).",
    ]
    page = page_of(tmp_path)
    for sentence in (*section.incorrect, *section.absent, *section.marks):
        assert sentence in page.text
    assert not any("NHA triton" in line[0] for lines in page.tables.values() for line in lines[1:])


def test_notes_and_labels_are_escaped(rows: list[Row], row: RowMaker, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    rows += [
        row(implementation="evil", label=f"NHA {evil}", note=f"{evil} &amp;", command=f"bench {evil}", **PLACED),
        row(implementation="dead", label="NHA dead", status="failed", median_ms=None, note=f"Failed: {evil}"),
    ]
    write(tmp_path, rows)
    page = page_of(tmp_path)
    assert len(page.all("script")) == 1  # the page's own
    header, *lines = page.tables["tiny, latency: data"]
    notes = {line[0]: line[header.index("note")] for line in lines}
    assert notes[f"NHA {evil}"] == f"{evil} &amp;"
    assert f"Failed: {evil}" in page.text


def test_the_page_needs_nothing_but_itself(rows: list[Row], figures: Figures, tmp_path: Path) -> None:
    write(tmp_path, rows)
    for name, told in figures.items():
        (tmp_path / name).write_text(json.dumps(told))
    write_report(build_report(tmp_path), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    page = Page(text)
    assert not [tag for tag, _ in page.elements if tag in ("link", "img", "iframe", "object", "embed", "base")]
    for _, attributes in page.elements:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(attributes["href"])[1:] for attributes in page.all("a")}
    assert links <= set(ids)
    assert "tiny" not in links
    assert str(tmp_path.parent) not in text


def test_tables_are_marked_up_for_sorting_and_scroll_by_themselves(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    page = page_of(tmp_path)
    headers = page.all("th", scope="col")
    assert len(headers) == sum(len(lines[0]) for lines in page.tables.values())
    assert all(header["aria-sort"] == "none" for header in headers)
    assert len(page.all("button", type="button")) == len(headers)
    regions = page.all("div", role="region", tabindex="0")
    assert len(regions) == len(page.tables) + len(page.all("svg"))
    assert all("scroll" in str(region["class"]).split() and region["aria-label"] for region in regions)


def test_the_page_is_for_light_and_dark_and_for_phones(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    page = page_of(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "color-scheme: light dark" in text
    colors = {name: set(re.findall(rf"--{name}: (#\w+)", text)) for name in ("page", "ink", "plot")}
    assert all(len(values) == 2 for values in colors.values())  # one for each scheme
    assert "@media (prefers-color-scheme: dark)" in text
    assert page.all("meta", name="viewport", content="width=device-width, initial-scale=1")


def test_every_environment_and_run_is_listed_once(rows: list[Row], row: RowMaker, tmp_path: Path) -> None:
    other = row(seq_len=2048, torch="2.14.0", date="2026-02-03T03:04:05+00:00", git_sha="a" * 40, git_dirty=True)
    write(tmp_path, [*rows, other])
    page = page_of(tmp_path)
    header, *machines = page.tables["Machines and their software"]
    assert [line[header.index("torch")] for line in machines] == ["2.13.0", "2.14.0"]
    (title,) = [title for title in page.tables if title.startswith("Runs")]
    header, *runs = page.tables[title]
    found = [dict(zip(header, line, strict=True)) for line in runs]
    assert [(run["commit"][0], run["work tree"], run["machine"], run["rows"]) for run in found] == [
        ("0", "clean", "1", "4"),
        ("a", "changed", "2", "1"),
    ]
    assert {run["command"] for run in found} == {"python -m nhabench bench"}


def test_two_devices_and_subfolders_are_sections_of_their_own(rows: list[Row], row: RowMaker, tmp_path: Path) -> None:
    write(tmp_path, [*rows, row(device="Other <GPU>", **PLACED)])
    write(tmp_path, rows, "linear/forward.csv")
    write(tmp_path, rows, "linear/deeper/forward.csv")  # two levels down: not taken
    report = build_report(tmp_path)
    assert [section.title for section in report.sections] == [
        "forward.csv: forward, Some CPU", "forward.csv: forward, Other <GPU>", "linear/forward.csv: forward, Some CPU",
    ]  # fmt: skip
    anchors = [group.anchor for section in report.sections for group in section.groups]
    assert len(set(anchors)) == 3
    page = page_of(tmp_path)
    assert "Other <GPU>" in page.text
    assert len(page.all("svg")) == 4 + 3 + 4  # alone, NHA has no speed-up


def test_directions_are_told_apart(rows: list[Row], row: RowMaker, tmp_path: Path) -> None:
    write(tmp_path, [*rows, row(direction="decode", median_ms=0.01)])
    titles = [section.title for section in build_report(tmp_path).sections]
    assert titles == ["forward.csv: forward, Some CPU", "forward.csv: decode, Some CPU"]


def test_rows_without_a_time_alone_make_a_page_without_plots(row: RowMaker, tmp_path: Path) -> None:
    write(tmp_path, [row(status="failed", median_ms=None, low_ms=None, high_ms=None, note="Lost.")])
    page = page_of(tmp_path)
    assert not page.all("svg")
    assert "Nothing was timed." in page.text
    assert "NHA chunked: failed. Lost." in page.text


def test_the_same_folder_gives_the_same_page(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    first, again = tmp_path / "first.html", tmp_path / "again.html"
    for path in (first, again):
        write_report(build_report(tmp_path), path)
    assert first.read_bytes() == again.read_bytes()


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, rows)
    page = tmp_path / "report.html"
    page.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nhabench.results.os.fsync", full_disk)
    done = RUNNER.invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2
    assert "No space left on device" in " ".join(done.output.replace("│", "").split())
    assert page.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["forward.csv", "report.html"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        (None, "", "got results: no CSV"),
        ("notes.csv", "a,b\n1,2\n", "got results: notes.csv: not a table of results"),
        ("forward.csv", "", "forward.csv: not a table of results"),
        ("forward.csv", to_csv([]), "forward.csv: holds no rows"),
        ("old.csv", "workload,implementation,status,median_ms\n", "old.csv: expected the columns of this version"),
        ("torn.csv", to_csv([]) + '"torn', "torn.csv: expected CSV, got: unexpected end of data"),
        ("sub/forward.csv", to_csv([]) + "cut,short\n", "sub/forward.csv: line 2"),
    ],
)
def test_a_folder_without_readable_results_is_refused(
    name: str | None, text: str, problem: str, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    if name:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(problem)):
        find_tables(folder)
    done = RUNNER.invoke(app, ["report", str(folder)])
    assert done.exit_code == 2
    assert problem[:30] in " ".join(done.output.replace("│", " ").split())
    assert not (folder / "report.html").exists()


def test_a_sweep_is_a_plot_of_its_own_and_its_widths_are_not(rows: list[Row], row: RowMaker, tmp_path: Path) -> None:
    times, cudnn = {8: 2.0, 16: 1.9, 512: 4.0}, {"implementation": "sdpa-cudnn", "label": "full: cuDNN"}
    swept = [
        row(workload=f"tiny-w{width}", window=width, family=family, median_ms=ms, low_ms=ms, high_ms=ms, **changes)
        for width, time in times.items()
        for family, ms, changes in (("nha", time, {}), ("full", 1.5 * time, cudnn))
    ]
    write(tmp_path, swept, "window.csv")
    page = page_of(tmp_path)
    assert len(page.all("svg")) == 1
    (title,) = [title for title in page.tables if title.startswith("window")]
    assert title == "window: 4/2 heads, D=16, M=8, T=512, window: data"
    header, *lines = page.tables[title]
    assert [line[header.index("W")] for line in lines] == ["8", "16", "512"] * 2
    assert [line[header.index("median, ms")] for line in lines[:3]] == ["2.000", "1.900", "4.000"]
    assert "NHA chunked is faster than full attention (cuDNN) at every W measured" in page.text
    # A workload with several lengths stays, beside the sweep in which one of them stands.
    write(tmp_path, [*swept, *rows], "window.csv")
    assert len(page_of(tmp_path).all("svg")) == 5


def test_one_csv_is_a_page_beside_it(rows: list[Row], tmp_path: Path) -> None:
    path = write(tmp_path, rows)
    write(tmp_path, rows, "other.csv")
    done = RUNNER.invoke(app, ["report", str(path), "--json"])
    told = json.loads(done.stdout)
    assert (told["report"], told["files"]) == (str(tmp_path / "forward.html"), ["forward.csv"])
    assert (tmp_path / "forward.html").exists()


def test_other_csvs_are_left_out_and_named(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    (tmp_path / "notes.csv").write_text("a,b\n")
    assert "Left out: notes.csv (not a table of results)." in page_of(tmp_path).text


def test_how_far_the_numbers_can_be_trusted_is_told_where_it_was_measured(
    rows: list[Row], figures: Figures, tmp_path: Path
) -> None:
    write(tmp_path, rows)
    heading = "How far these numbers can be trusted"
    page = page_of(tmp_path)
    assert heading not in page.text
    assert not page.all("section", id="trust")
    figures["repeat.json"]["passed"] = False
    figures["repeat.json"]["troubles"] = ["Process 2 of 3 ended with exit code 70: <lost>"]
    for count, (name, told) in enumerate(figures.items(), start=1):
        (tmp_path / name).write_text(json.dumps(told))
        page = page_of(tmp_path)
        assert page.text.count(heading) == 2  # in the contents too
        assert len(page.all("section", id="trust")) == 1
        assert sum(f"{name}: " in page.text for name in figures) == count
    assert "selftest.json: passed" in page.text
    assert "repeat.json: failed" in page.text
    report = build_report(tmp_path)
    assert summary(report)["trust"] == {one.file: one.sentences for one in report.trust}
    for one in report.trust:
        assert one.source in page.text
        for sentence in one.sentences:
            assert sentence in page.text  # "<lost>" is text


@pytest.mark.parametrize("name", ["selftest.json", "repeat.json"])
def test_figures_that_are_none_are_told_by_name(name: str, rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path, rows)
    for text in ("{", "[]", "{}", '{"passed": true, "environment": {}}', "\udcff"):
        (tmp_path / name).write_text(text, errors="surrogateescape")
        done = RUNNER.invoke(app, ["report", str(tmp_path)], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        assert f"{name}: expected what {name.removesuffix('.json')} --output wrote, got: " in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_the_command_prints_the_path_or_a_summary(rows: list[Row], tmp_path: Path) -> None:
    write(tmp_path / "results", rows)
    done = RUNNER.invoke(app, ["report", str(tmp_path / "results")])
    assert done.exit_code == 0, done.output
    assert done.output == f"{tmp_path / 'results' / 'report.html'}\n"
    elsewhere = tmp_path / "new" / "page.html"
    done = RUNNER.invoke(app, ["report", str(tmp_path / "results"), "--output", str(elsewhere), "--json"])
    told = json.loads(done.output)
    assert (told["report"], told["bytes"]) == (str(elsewhere), elsewhere.stat().st_size)
    assert {key: told[key] for key in ("files", "left_out", "devices", "rows", "timed", "plots")} == {
        "files": ["forward.csv"], "left_out": {}, "devices": ["Some CPU"], "rows": 4, "timed": 4, "plots": 4,
    }  # fmt: skip
    assert told["findings"]["forward-tiny-float32"][0].startswith("NHA chunked is faster than full attention")
    for wrong, hint in ((["nowhere"], "nowhere"), ([str(tmp_path / "results"), "--output", str(tmp_path)], "--output")):
        done = RUNNER.invoke(app, ["report", *wrong])
        assert done.exit_code == 2
        assert hint in done.output


def test_the_roof_is_the_lower_of_the_two_ceilings(row: RowMaker) -> None:
    low = row(floor_bytes=10, floor_flops=20, copy_tb_per_s=3.0, matmul_tflop_per_s=100.0)
    high = row(floor_bytes=10, floor_flops=2000, copy_tb_per_s=3.0, matmul_tflop_per_s=100.0)
    assert (intensity(low), allowed(low)) == (2.0, 6.0)
    assert (intensity(high), allowed(high)) == (200.0, 100.0)
    for lacking in (row(), row(**PLACED, copy_tb_per_s=None), row(**PLACED, tflop_per_s=None)):
        assert roofline([lacking]) is None
        assert roofline_data([lacking]).cells == []
    figure = roofline([high])
    assert figure is not None
    assert figure.get_label() == "The floor of NHA is compute-bound: 200 FLOP/B, ridge at 33.3"
    both = roofline([low, row(**{**PLACED, "floor_flops": 10**12}, seq_len=1024, matmul_tflop_per_s=100.0)])
    assert both is not None
    assert "memory-bound at some T, compute-bound at others" in both.get_label()
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "NHA chunked"]
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[200.0], [3.0]]


def test_tables_of_data_know_numbers_from_words(row: RowMaker) -> None:
    made = table(["a", "b", "c", "d"], [(1, None, 0.12345, None), (None, "x", 12345.6, None)])
    assert made.numeric == [True, False, True, False]
    assert made.cells == [["1", "", "0.1235", ""], ["", "x", "12350", ""]]
    assert speedup_data([row()]).cells == []
    assert [line[2] for line in latency_data([row(seq_len=1024), row(seq_len=512)]).cells] == ["512", "1024"]


def test_data_are_in_the_order_of_families_and_of_speed_at_the_largest_length(row: RowMaker) -> None:
    full = {"implementation": "sdpa-cudnn", "label": "full: cuDNN", "family": "full"}
    rows = [
        row(seq_len=512, median_ms=0.1, **full),
        row(seq_len=512, median_ms=1.0, implementation="naive", label="NHA naive"),
        *(row(seq_len=length, median_ms=3.0) for length in (512, 1024)),
        *(row(seq_len=length, median_ms=2.0, implementation="triton", label="NHA triton") for length in (512, 1024)),
    ]
    names = [line[0] for line in latency_data(rows).cells]
    assert names == ["NHA triton"] * 2 + ["NHA chunked"] * 2 + ["NHA naive", "full: cuDNN"]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.139, 4, "0.1390"),
        (131072.0, 4, "131100"),
        (9.999, 2, "10"),
        (0.0, 3, "0.00"),
        (-2.5, 2, "-2.5"),
        (720.4, 2, "720"),
        (float("inf"), 2, "inf"),
    ],
)
def test_significant_digits(value: float, digits: int, text: str) -> None:
    assert significant(value, digits) == text
