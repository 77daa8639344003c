"""Crossovers, tables and plots from rows."""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from rich.console import Console

from nhabench.bench import all_contenders
from nhabench.crossover import find_crossover
from nhabench.implementations import implementations
from nhabench.packed import for_packed
from nhabench.plots import draw_all, floor, latency, speedup, spread
from nhabench.results import Row
from nhabench.tables import milliseconds, print_tables, where

RowMaker = Callable[..., Row]


def race(row: RowMaker, nha: dict[int, float], full: dict[int, float]) -> list[Row]:
    return [row(seq_len=length, median_ms=ms) for length, ms in nha.items()] + [
        row(seq_len=length, median_ms=ms, implementation="sdpa-cudnn", label="full: cuDNN", family="full")
        for length, ms in full.items()
    ]


def test_the_crossover_is_where_nha_stays_faster(row: RowMaker) -> None:
    rows = race(row, {512: 1.0, 1024: 1.0, 2048: 1.0, 4096: 1.0}, {512: 2.0, 1024: 0.5, 2048: 0.5, 4096: 2.0})
    found = find_crossover(rows)
    assert found is not None
    assert (found.seq_len, found.full.label) == (4096, "full: cuDNN")
    assert found.at == pytest.approx(2048 * 2**0.5)  # ratios 1/2 and 2: half way on log axes
    assert found.sentence == "NHA chunked is faster than full attention (cuDNN) from T=4096"


def test_no_crossing_is_told_in_words(row: RowMaker) -> None:
    never = find_crossover(race(row, {512: 3.0, 1024: 3.0}, {512: 1.0, 1024: 2.0, 2048: 9.0}))
    assert never is not None
    assert (never.seq_len, never.at) == (None, None)
    assert never.sentence == "NHA chunked is 1.5x slower than full attention (cuDNN) at T=1024"
    always = find_crossover(race(row, {512: 1.0, 1024: 1.0}, {512: 2.0, 1024: 3.0}))
    assert always is not None
    assert (always.seq_len, always.at) == (512, None)
    assert always.sentence.endswith("at every length measured")
    assert find_crossover(race(row, {512: 1.0}, {1024: 1.0})) is None


def test_only_timed_rows_count_and_the_fastest_of_each_kind(row: RowMaker) -> None:
    rows = race(row, {512: 4.0}, {512: 3.0})
    rows.append(row(median_ms=1.0, status="incorrect"))
    rows.append(row(median_ms=2.0, implementation="triton", label="NHA triton"))
    found = find_crossover(rows)
    assert found is not None
    assert found.nha.implementation == "triton"


@given(st.lists(st.floats(0, 500), min_size=1, max_size=14), st.floats(5, 30))
def test_labels_never_overlap_and_keep_their_order(wanted: list[float], gap: float) -> None:
    wanted = sorted(wanted)
    placed = spread(wanted, gap, 0, 500)
    assert all(after - before >= gap - 1e-6 for before, after in pairwise(placed))
    if len(wanted) * gap < 500:
        assert placed[0] >= -1e-6
        assert placed[-1] <= 500 + 1e-6


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread([10, 50, 90], 12, 0, 100) == [10, 50, 90]
    assert spread([50, 50], 10, 0, 100) == [45, 55]


@pytest.fixture
def crowd(row: RowMaker) -> list[Row]:
    """Every contender at three lengths, many of them at nearly the same time."""
    return [
        row(
            seq_len=length, median_ms=1 + index / 50 + length / 4096, low_ms=1.0, high_ms=2.0,
            implementation=contender.name, label=contender.label, family=contender.family,
        )
        for index, contender in enumerate(all_contenders())
        for length in (512, 1024, 2048)
    ]  # fmt: skip


def labels(figure: Figure | None) -> list[Annotation]:
    """The names of the lines, beside the last axes."""
    assert figure is not None
    axis = figure.axes[-1]
    assert isinstance(axis, Axes)
    return [text for text in axis.texts if isinstance(text, Annotation) and text.arrow_patch is not None]


def test_every_line_is_named_beside_its_end_inside_the_figure_without_overlap(crowd: list[Row]) -> None:
    for figure, count in ((latency(crowd), 14), (speedup(crowd), 10)):
        assert figure is not None
        figure.canvas.draw()
        boxes = [Text.get_window_extent(text) for text in labels(figure)]  # without the leader
        assert len(boxes) == count
        assert all(box.x1 <= figure.bbox.x1 for box in boxes)
        assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[index + 1 :])


def test_the_longest_name_of_an_nha_is_inside_the_figure_of_the_floor(row: RowMaker) -> None:
    longest = max((one.label for one in [*implementations(), *for_packed()] if one.family == "nha"), key=len)
    figure = floor([row(seq_len=16384, sequences=4**n, label=longest) for n in range(5)])
    assert figure is not None
    figure.canvas.draw()
    (box,) = [Text.get_window_extent(text) for text in labels(figure)]
    assert box.x1 <= figure.bbox.x1


def test_the_headline_is_the_finding_and_the_title_says_what_was_measured(row: RowMaker) -> None:
    figure = latency(race(row, {512: 1.0, 1024: 1.0}, {512: 0.5, 1024: 2.0}))
    assert figure is not None
    finding, subject = (text.get_text() for text in figure.texts)
    assert finding == "NHA chunked is faster than full attention (cuDNN) from T=1024"
    for part in ("Some CPU", "tiny", "4/2 heads, D=16, M=8, W=8", "float32"):
        assert part in subject
    assert "NHA chunked overtakes\ncuDNN at T ≈ 720 →" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("at", [600, 3_000, 30_000, 100_000])
def test_the_name_of_the_crossover_is_on_the_free_side_inside_the_axes(at: int, row: RowMaker) -> None:
    lengths = [512 * 2**step for step in range(9)]
    figure = latency(race(row, dict.fromkeys(lengths, 1.0), {length: length / at for length in lengths}))
    assert figure is not None
    figure.canvas.draw()
    (axis,) = figure.axes
    (name,) = [text for text in axis.texts if "overtakes" in text.get_text()]
    assert name.get_text().endswith(f"at T ≈ {at} →")
    box, frame = Text.get_window_extent(name), axis.get_window_extent()
    assert frame.x0 < box.x0 < box.x1 < frame.x1
    curves = [line for line in axis.lines if len(line.get_xdata()) == len(lengths)]
    assert len(curves) == 2
    for curve in curves:
        assert not curve.get_path().transformed(curve.get_transform()).intersects_bbox(box, filled=False)


def styles(figure: Figure | None) -> dict[str, tuple[float | None, str]]:
    """By the name of a line: its width, and the weight of the name."""
    assert figure is not None
    lines = figure.axes[-1].lines
    widths = {(line.get_xdata()[-1], line.get_ydata()[-1]): line.get_linewidth() for line in lines}
    return {name.get_text(): (widths.get(name.xy), name.get_fontweight()) for name in labels(figure)}


def test_the_fastest_nha_and_the_fastest_full_attention_stand_out(row: RowMaker) -> None:
    rows = race(row, {512: 3.0, 1024: 3.1}, {512: 2.0, 1024: 4.0})
    rows += [row(seq_len=length, median_ms=2.5, implementation="triton", label="NHA triton") for length in (512, 1024)]
    rows += [
        row(seq_len=length, median_ms=9.0, implementation="sdpa-flash", label="full: SDPA flash", family="full")
        for length in (512, 1024)
    ]
    found = styles(latency(rows))
    assert found["NHA triton"] == found["full: cuDNN"] == (2.8, "bold")
    assert found["NHA chunked"] == found["full: SDPA flash"] == (1.3, "normal")
    assert styles(floor(rows))["NHA triton"] == (2.8, "bold")


def test_the_floor_is_drawn_with_its_name_above_every_line(row: RowMaker) -> None:
    """Also where NHA is so near that the name had no room below."""
    figure = floor(
        [row(seq_len=length, floor_fraction=0.98, copy_tb_per_s=3.0, tb_per_s=2.9) for length in (512, 1024)]
    )
    assert figure is not None
    for axis in figure.axes:
        low, high = axis.get_ylim()
        highest = max(max(line.get_ydata()) for line in axis.lines)  # type: ignore[type-var]
        lowest = min(min(line.get_ydata()) for line in axis.lines)  # type: ignore[type-var]
        assert 0 < low < lowest
        assert high > 2 * low  # the lines are not squeezed together
        for label in (text for text in axis.texts if isinstance(text, Annotation) and text.get_va() == "bottom"):
            assert highest <= label.xy[1] < high


def test_a_slow_definition_is_named_and_not_drawn(row: RowMaker) -> None:
    rows = race(row, {512: 3.0, 1024: 3.0}, {512: 2.0, 1024: 4.0})
    rows.append(row(median_ms=99.0, implementation="naive", label="NHA naive"))
    rows.append(row(median_ms=98.0, implementation="sdpa-math", label="full: SDPA math", family="full"))
    for draw, absent in ((latency, ["NHA naive", "full: SDPA math"]), (speedup, ["NHA naive"]), (floor, ["NHA naive"])):
        figure = draw(rows)
        assert figure is not None
        assert figure.texts[-1].get_text().splitlines() == ["slower, not drawn:", *absent]
        assert not {"NHA naive", "full: SDPA math"} & set(styles(figure))
        figure.canvas.draw()
        note = figure.texts[-1].get_window_extent()
        axis = figure.axes[-1]
        boxes = [
            axis.get_window_extent(),
            axis.xaxis.label.get_window_extent(),
            *map(Text.get_window_extent, labels(figure)),
        ]
        assert not any(note.overlaps(box) for box in boxes)


def test_a_definition_is_drawn_where_it_is_the_fastest(row: RowMaker) -> None:
    rows = [row(seq_len=length, implementation="naive", label="NHA naive") for length in (512, 1024)]
    rows.append(row(seq_len=1024, median_ms=9.0))
    for draw in (latency, floor):
        figure = draw(rows)
        assert figure is not None
        assert not any("not drawn" in text.get_text() for text in figure.texts)
        assert "NHA naive" in styles(figure)


def test_many_lengths_are_not_all_named_in_a_narrow_panel(row: RowMaker) -> None:
    lengths = [512 * 2**step for step in range(9)]
    rows = [row(seq_len=length) for length in lengths]
    for draw, named in ((latency, lengths), (floor, lengths[::2])):
        figure = draw(rows)
        assert figure is not None
        assert sorted(figure.axes[0].get_xticks()) == named


def subtitle(figure: Figure | None) -> str:
    assert figure is not None
    return figure.texts[1].get_text()


def test_rows_of_two_runs_are_told(row: RowMaker) -> None:
    rows = race(row, {512: 1.0, 1024: 1.0}, {512: 0.5, 1024: 2.0})
    for draw in (latency, speedup, floor):
        assert "runs" not in subtitle(draw(rows))
    later = [*rows[1:], row(seq_len=512, median_ms=1.0, date="2026-02-03T03:04:05+00:00")]
    for draw in (latency, speedup, floor):
        assert "rows of 2 runs, 2026-01-02 to 2026-02-03: compare those of one run" in subtitle(draw(later))
    # A row without a time is not drawn: its run does not count.
    failed = row(seq_len=2048, status="failed", median_ms=None, date="2026-02-03T03:04:05+00:00")
    assert "runs" not in subtitle(latency([*rows, failed]))


def test_times_with_host_time_are_hollow_and_told(row: RowMaker) -> None:
    rows = [row(seq_len=512), row(seq_len=1024, timer="cuda events with host time")]
    for draw in (latency, floor):
        figure = draw(rows)
        assert "hollow: includes host time" in subtitle(figure)
        assert figure is not None
        hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
        assert [list(line.get_xdata()) for line in hollow] == [[1024]]
    assert "hollow" not in subtitle(latency(rows[:1]))


def test_a_row_without_an_interval_has_no_band(row: RowMaker) -> None:
    rows = [row(seq_len=length) for length in (512, 1024, 2048, 4096)]
    rows[3] = row(seq_len=4096, low_ms=None, high_ms=None)
    figure = latency(rows)
    assert figure is not None
    (band,) = figure.axes[0].collections
    shaded = np.concatenate([path.vertices for path in band.get_paths()])
    assert shaded[:, 0].max() == 2048


def test_the_second_line_of_a_subtitle_stays_above_the_axes(row: RowMaker) -> None:
    rows = [row(seq_len=512), row(seq_len=1024, date="2026-02-03T03:04:05+00:00", timer="cuda events with host time")]
    for draw in (latency, floor):
        figure = draw(rows)
        assert figure is not None
        figure.canvas.draw()
        box = Text.get_window_extent(figure.texts[1])
        assert box.x1 <= figure.bbox.x1
        titles = [axis.title for axis in figure.axes] + [axis._left_title for axis in figure.axes]
        tops = [Text.get_window_extent(title).y1 for title in titles if title.get_text()]
        assert box.y0 >= max([*tops, *(axis.get_window_extent().y1 for axis in figure.axes)])


@pytest.mark.parametrize("draw", [latency, speedup, floor])
def test_a_long_subtitle_stays_inside_the_figure(draw: Callable[..., Figure | None], row: RowMaker) -> None:
    changes = dict(workload="qwen2.5-7b-w1024-m128-rope", rope=True, device="NVIDIA GH200 144G HBM3e", seq_len=2048)
    for case in (changes, {**changes, "workload": "llama-3-8b"}):
        rival = dict(implementation="sdpa-cudnn", label="full: cuDNN", family="full", median_ms=2.0)
        figure = draw([row(**case, median_ms=1.0), row(**case, **rival)])
        assert figure is not None
        assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)


def test_plots_of_one_point_and_of_no_rival_are_drawn(row: RowMaker, tmp_path: Path) -> None:
    names = [path.name for path in draw_all([row()], tmp_path)]
    assert names == ["forward-tiny-latency.png", "forward-tiny-floor.png"]


def test_rows_without_a_time_draw_nothing(row: RowMaker, tmp_path: Path) -> None:
    assert draw_all([row(status="failed", median_ms=None)], tmp_path) == []
    assert draw_all([], tmp_path) == []


def test_a_second_dtype_has_its_own_files(row: RowMaker, tmp_path: Path) -> None:
    names = {path.name for path in draw_all([row(), row(dtype="float16")], tmp_path)}
    assert {"forward-tiny-latency.png", "forward-tiny-float16-latency.png"} <= names


def test_the_table_marks_the_fastest_of_each_family_and_says_why_the_rest_is_missing(row: RowMaker) -> None:
    rows = race(row, {512: 3.0, 1024: 4.0}, {512: 9.0, 1024: 10.5})
    rows.append(row(median_ms=2.0, implementation="triton", label="NHA triton"))
    rows.append(
        row(
            seq_len=1024, status="incorrect", median_ms=None, note="Wrong.", implementation="triton", label="NHA triton"
        )
    )
    rows += [
        row(seq_len=length, status="unavailable", note="No [GPU].", implementation="x", label="x")
        for length in (512, 1024)
    ]
    text = io.StringIO()
    print_tables(rows, Console(file=text, width=120))
    lines = text.getvalue().splitlines()

    def cells(label: str) -> list[str]:
        return next(line for line in lines if line.startswith(f"│ {label}")).replace("│", " ").split()[-2:]

    assert cells("NHA chunked") == ["3.00", "*4.00"]
    assert cells("NHA triton") == ["*2.00", "WRONG"]
    assert cells("full: cuDNN") == ["*9.00", "*10.5"]
    assert "x: unavailable. No [GPU]." in lines
    assert "NHA triton (T=1024, tiny): incorrect. Wrong." in lines


def test_the_table_marks_times_that_include_host_time(row: RowMaker) -> None:
    text = io.StringIO()
    print_tables([row(timer="cuda events with host time")], Console(file=text, width=120))
    assert "*2.00h" in text.getvalue()
    assert "h includes host time" in " ".join(text.getvalue().split())
    text = io.StringIO()
    print_tables([row()], Console(file=text, width=120))
    assert "h includes" not in text.getvalue()


def test_reasons_that_differ_in_their_numbers_are_told_once(row: RowMaker) -> None:
    rows = [row()]
    rows += [
        row(seq_len=length, status="unsupported", median_ms=None, note=f"It takes {length / 100:.1f} GiB of 4 GiB.")
        for length in (1024, 2048, 4096)
    ]
    text = io.StringIO()
    print_tables(rows, Console(file=text, width=120))
    lines = [line for line in text.getvalue().splitlines() if "unsupported" in line]
    assert lines == ["NHA chunked (T=1024, 2048, 4096, tiny): unsupported. It takes 10.2 GiB of 4 GiB. (T=1024, tiny)"]


def test_lengths_are_told_of_the_workload_that_they_are_of() -> None:
    both = {("a", "T", 512), ("a", "T", 1024), ("b", "T", 1024), ("b", "T", 512)}
    assert where(both) == "T=512, 1024, 2 workloads"
    assert where({*both, ("c", "T", 2048)}) == "T=512, 1024, 2 workloads; T=2048, c"


def test_milliseconds_keep_three_digits() -> None:
    assert [milliseconds(value) for value in (0.0123, 1.234, 12.34, 1234.5)] == ["0.012", "1.23", "12.3", "1234"]
