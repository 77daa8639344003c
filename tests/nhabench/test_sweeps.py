"""Sweeps over the window and the slots: which rows belong together, what is said of them, and the files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nhabench.results import Row
from nhabench.sweeps import draw_sweeps, finding, sweep, sweeps

WINDOWS = (0, 16, 64, 256, 1024, 8192)
SHAPE = dict(q_heads=32, kv_heads=8, head_dim=128, slots=64, batch=2, seq_len=8192)


@pytest.fixture
def windows(row: Callable[..., Row]) -> list[Row]:
    """NHA that slows down as its window widens, beside full attention and the window alone."""

    def made(name: str, family: str, window: int, ms: float) -> Row:
        label = f"{'full: ' if family == 'full' else ''}{name}"
        return row(
            implementation=name, label=label, family=family, window=window, workload=f"w{window}", median_ms=ms,
            low_ms=0.99 * ms, high_ms=1.01 * ms, **SHAPE,
        )  # fmt: skip

    rows = []
    for window in WINDOWS:
        nha, alone = 0.17 + window / 1000, 0.1 + window / 1200
        rows += [made("triton", "nha", window, nha), made("cuDNN", "full", window, 1.75)]
        rows += [made("window", "window", window, alone)] if window else []
    return rows


def test_rows_that_differ_in_more_are_apart(windows: list[Row], row: Callable[..., Row]) -> None:
    assert [len(group) for group in sweeps(windows, "window")] == [len(windows)]
    assert sweeps(windows, "slots") == []
    other: dict[str, Any]
    for other in (
        {"seq_len": 4096},
        {"slots": 32},
        {"rope": True},
        {"dtype": "float16"},
        {"head_dim": 64},
        {"sequences": 9},
    ):
        more = [row(**{**SHAPE, "window": window, **other}) for window in (0, 16, 64)]
        assert sorted(len(group) for group in sweeps([*windows, *more], "window")) == [3, len(windows)]
        assert len(sweeps([*windows, *more[:2]], "window")) == 1  # two values are no sweep
    untimed = row(status="incorrect", median_ms=None, **{**SHAPE, "window": 4})
    assert sweeps([*windows, untimed], "window") == [windows]


def test_the_finding_is_the_widest_window_up_to_which_nha_wins(windows: list[Row], row: Callable[..., Row]) -> None:
    assert finding(windows, "window") == "triton is faster than full attention (cuDNN) up to W=1024"
    narrow = [one for one in windows if one.window < 8192]
    assert finding(narrow, "window") == "triton is faster than full attention (cuDNN) at every W measured"
    slow = [one for one in windows if one.window >= 8192 or one.family == "full"]
    assert finding(slow, "window") == "triton is not faster than full attention (cuDNN) at any W measured"
    # Where the intervals overlap it is level, and not faster.
    level = [dataclasses.replace(one, low_ms=0.0, high_ms=9.0) for one in windows]
    assert finding(level, "window") == "triton is not faster than full attention (cuDNN) at any W measured"
    alone = [one for one in windows if one.family == "nha"]
    assert finding(alone, "window") == "triton takes 49 times as long at W=8192 as at W=0"
    assert finding([one for one in windows if one.family == "full"], "window") == "Time by W"
    slots = [row(**{**SHAPE, "slots": m, "median_ms": m / 16, "family": "nha", "label": "NHA"}) for m in (16, 40)]
    assert finding(slots, "slots") == "NHA takes 2.5 times as long at M=40 as at M=16"


def test_the_finding_names_whom_it_is_about(row: Callable[..., Row]) -> None:
    def made(name: str, family: str, window: int, ms: float) -> Row:
        intervals = {"low_ms": 0.99 * ms, "high_ms": 1.01 * ms}
        return row(
            implementation=name, label=name, family=family, median_ms=ms, **intervals, **{**SHAPE, "window": window}
        )  # fmt: skip

    changing = [made("a", "nha", 16, 1.0), made("b", "nha", 16, 5.0), made("b", "nha", 64, 6.0)]
    assert finding(changing, "window") == "The fastest NHA (a or b) takes 6.0 times as long at W=64 as at W=16"
    rivals = [made("x", "full", 16, 2.0), made("y", "full", 64, 9.0)]
    assert finding([*changing, *rivals], "window") == (
        "The fastest NHA (a or b) is faster than full attention (x or y) at every W measured"
    )
    more = [made("b", "nha", 128, 9.0), made("b", "nha", 256, 3.0), made("y", "full", 128, 8.0)]
    more += [made("y", "full", 256, 8.0)]
    assert finding([*changing, *rivals, *more], "window") == (
        "The fastest NHA (a or b) is faster than full attention (x or y) at W=16, 64, 256 only"
    )


def test_the_ends_of_the_window_are_named(windows: list[Row]) -> None:
    (axis,) = sweep(windows, "window").axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "16", "64", "256", "1k", "8k = T"]
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in axis.lines}
    assert lines[tuple(map(float, range(1, 6)))][0] == pytest.approx(0.1 + 16 / 1200)  # no window at W = 0
    narrow = sweep([one for one in windows if one.window < 8192], "window").axes[0]
    assert narrow.get_xticklabels()[-1].get_text() == "1k"


def test_every_sweep_has_a_file(windows: list[Row], row: Callable[..., Row], tmp_path: Path) -> None:
    half = [row(**{**SHAPE, "window": window, "dtype": "float16"}) for window in (0, 16, 64)]
    paths = draw_sweeps("window", [*windows, *half], tmp_path)
    assert [path.name for path in paths] == ["window-32x8-D128-T8192.png", "window-32x8-D128-T8192-2.png"]
    assert all(path.stat().st_size > 5000 for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert draw_sweeps("window", windows[:2], tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
