"""Rows of packed sequences in tables, plots and the report: by their mean length, and apart from all others."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from nhabench.crossover import fastest_by_length, find_crossover, length_of
from nhabench.data import latency_data, speedup_data
from nhabench.findings import crossing, findings, marked
from nhabench.plots import draw_all, floor, latency, speedup
from nhabench.report import build_report
from nhabench.results import HOST_TIME, Row, to_csv
from nhabench.tables import grouped, print_tables, reasons

TOKENS = 16384
COUNTS = (1, 4, 16, 64, 256)
RowMaker = Callable[..., Row]


@pytest.fixture
def packed(row: RowMaker) -> list[Row]:
    """NHA that takes as long for any lengths, beside full attention, which is faster for short ones."""
    rows = []
    for count in COUNTS:
        mean = TOKENS // count
        for name, family, ms in (("triton", "nha", 0.3), ("torch-varlen", "full", mean / 4096), ("gla", "linear", 0.5)):
            label = f"{'NHA' if family == 'nha' else family} {name}"
            rows.append(
                row(
                    implementation=name, label=label, family=family, seq_len=TOKENS, sequences=count, median_ms=ms,
                    low_ms=0.99 * ms, high_ms=1.01 * ms, floor_bytes=10**8, floor_flops=10**9,
                )
            )  # fmt: skip
    return rows


@pytest.fixture
def whole(row: RowMaker) -> list[Row]:
    """The same workload in batches, as long as the packed ones are in the mean."""
    return [row(seq_len=TOKENS // count, batch=count, median_ms=7.0) for count in COUNTS]


def test_packed_rows_are_apart_from_batches_and_from_other_numbers_of_tokens(
    packed: list[Row], whole: list[Row], row: RowMaker
) -> None:
    fewer = [row(seq_len=512, sequences=count) for count in (1, 4)]
    groups = grouped([*packed, *whole, *fewer])
    assert {name: len(group) for (name, *_), group in groups.items()} == {
        "tiny-packed-16384": 15, "tiny": 5, "tiny-packed-512": 2,
    }  # fmt: skip


def test_their_length_is_the_mean(packed: list[Row], row: RowMaker) -> None:
    assert sorted(fastest_by_length(packed, "nha")) == [64, 256, 1024, 4096, 16384]
    assert length_of(row(seq_len=100, sequences=3)) == 33
    assert length_of(row(seq_len=100, batch=3)) == 100


def test_the_findings_say_that_it_is_the_mean(packed: list[Row]) -> None:
    assert crossing(packed) == (
        "NHA triton is faster than full attention (full torch-varlen) from mean T=4096; "
        "the lines cross at mean T ≈ 1200"
    )
    told = findings(packed)
    assert told[0] == (
        "NHA triton against full attention (full torch-varlen): faster at mean T=4096 to 16384, slower at mean T=64 to "
        "1024; 0.0521x its speed at mean T=64, 13.3x at mean T=16384."
    )
    slow = [one for one in packed if one.sequences > 4]
    crossover = find_crossover(slow)
    assert crossover is not None
    assert crossover.sentence == "NHA triton is 1.2x slower than full attention (full torch-varlen) at mean T=1024"


def test_what_did_not_run_is_told_by_the_mean_length(packed: list[Row], whole: list[Row], row: RowMaker) -> None:
    missing = [
        row(seq_len=TOKENS, sequences=count, status="unsupported", note="Not so.", median_ms=None, label="x")
        for count in (4, 1)
    ]
    assert reasons([*packed, *missing]) == [
        ("unsupported", "x (mean T=4096, 16384, tiny): unsupported. Not so."),
    ]
    more = row(seq_len=64, status="unsupported", note="Not so.", median_ms=None, label="x")
    assert reasons([*packed, *whole, *missing, more])[0][1].startswith("x (T=64; mean T=4096, 16384, tiny): ")
    late = row(seq_len=TOKENS, sequences=4, timer=f"events{HOST_TIME}", label="y")
    assert marked([*packed, late]) == ["Includes host time: y (mean T=4096, tiny)."]


def test_the_table_has_a_column_for_each_packing(packed: list[Row]) -> None:
    text = io.StringIO()
    print_tables(packed, Console(file=text, width=200))
    lines = text.getvalue().splitlines()
    (head,) = (line for line in lines if "sequences x mean T" in line)
    places = [head.index(f"{count} x {TOKENS // count}") for count in reversed(COUNTS)]
    assert places == sorted(places)
    assert sum(line.count("*0.300") for line in lines) == 5
    assert any("*0.016" in line and "*4.00" in line for line in lines)


def test_the_plots_are_by_the_mean_length(packed: list[Row]) -> None:
    for draw in (latency, speedup, floor):
        figure = draw(packed)
        assert figure is not None
        for axis in figure.axes:
            assert axis.get_xlabel() == "mean length T of the packed sequences"
            assert [64.0, 256.0, 1024.0, 4096.0, 16384.0] in [list(line.get_xdata()) for line in axis.lines]
        words = " ".join(text.get_text() for text in figure.texts)
        assert "sequences of uneven lengths, 16384 tokens packed in a call" in words
    figure = speedup(packed)
    assert figure is not None
    (gains,) = (list(line.get_ydata()) for line in figure.axes[0].lines if line.get_marker() == "o")
    assert gains == pytest.approx([mean / 4096 / 0.3 for mean in (64, 256, 1024, 4096, 16384)])


def test_no_line_runs_through_the_words_of_the_crossover(packed: list[Row], row: RowMaker) -> None:
    slow = [
        row(implementation="chunked", seq_len=TOKENS, sequences=count, median_ms=9.0, low_ms=8.9, high_ms=9.1)
        for count in COUNTS
    ]
    figure = latency([*packed, *slow])
    assert figure is not None
    figure.canvas.draw()
    (axis,) = figure.axes
    (words,) = (text for text in axis.texts if "overtakes" in text.get_text())
    line = axis.transData.transform((64, 9.0))[1]
    assert words.get_window_extent().y0 > line


def test_their_plots_have_files_of_their_own(packed: list[Row], whole: list[Row], tmp_path: Path) -> None:
    names = {path.name for path in draw_all([*whole, *packed], tmp_path)}
    assert names >= {"forward-tiny-latency.png", "forward-tiny-packed-16384-latency.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_report_shows_them_as_a_workload_of_their_own(packed: list[Row], whole: list[Row], tmp_path: Path) -> None:
    (tmp_path / "varlen.csv").write_text(to_csv([*whole, *packed]))
    (section,) = build_report(tmp_path).sections
    assert [group.title for group in section.groups] == ["tiny", "tiny-packed-16384"]
    batches, cut = section.groups
    assert cut.anchor == "varlen-tiny-packed-16384-float32"
    assert "from mean T=4096" in cut.crossing
    assert batches.crossing == "No crossover: full attention not timed"
    assert [plot.kind for plot in cut.plots] == ["latency", "speed-up", "floor", "roofline"]
    assert "mean length T of the packed sequences" in cut.plots[0].svg
    assert "packed" not in batches.plots[0].svg


def test_the_data_tell_how_many_are_packed(packed: list[Row], whole: list[Row]) -> None:
    data = latency_data(packed)
    at = [data.titles.index(title) for title in ("packed sequences", "mean T", "T")]
    assert [[line[index] for index in at] for line in data.cells[:5]] == [
        [str(count), str(TOKENS // count), str(TOKENS)] for count in reversed(COUNTS)
    ]
    assert "packed sequences" not in latency_data(whole).titles
    assert "mean T" not in latency_data(whole).titles
    gains = speedup_data(packed)
    column = gains.titles.index("speed-up")
    assert [line[column] for line in gains.cells[:5]] == ["0.05208", "0.2083", "0.8333", "3.333", "13.33"]
