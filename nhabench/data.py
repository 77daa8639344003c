"""The numbers behind each plot, and where they come from, as tables of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nhabench.crossover import fastest_by_length, length_of, time_of
from nhabench.environment import Environment
from nhabench.results import Row
from nhabench.roofline import allowed, intensity, on_roofline
from nhabench.sweeps import LETTERS, Size, reader_of
from nhabench.tables import FAMILIES, significant

Value = float | str | None
MIB = 2**20


@dataclass(frozen=True)
class Table:
    """Titles, which columns hold numbers, and the cells as they are shown: empty where something is not known."""

    titles: list[str]
    numeric: list[bool]
    cells: list[list[str]]


def table(titles: Sequence[str], values: Iterable[Sequence[Value]]) -> Table:
    """Numbers with four digits, whole ones as they are. A column of numbers may lack some."""
    lines = list(values)
    numeric = [
        any(not isinstance(line[index], str | None) for line in lines)
        and not any(isinstance(line[index], str) for line in lines)
        for index in range(len(titles))
    ]
    return Table(list(titles), numeric, [[_shown(value) for value in line] for line in lines])


def _shown(value: Value) -> str:
    if value is None:
        return ""
    return significant(value, 4) if isinstance(value, float) else str(value)


Columns = Mapping[str, Callable[[Row], Value]]  # by title

_CASE: Columns = {
    "implementation": lambda row: row.label,
    "B": lambda row: row.batch,
    "T": lambda row: row.seq_len,
    "packed sequences": lambda row: row.sequences or None,
    "mean T": lambda row: length_of(row) if row.sequences else None,
}
_TIME: Columns = {
    "median, ms": lambda row: row.median_ms,
    "95 % low": lambda row: row.low_ms,
    "95 % high": lambda row: row.high_ms,
    "samples": lambda row: row.samples,
}
_FLOOR: Columns = {
    "% of the floor": lambda row: _scaled(row.floor_fraction, 100),
    "floor, ms": lambda row: row.floor_ms,
}
_MEMORY: Columns = {
    "peak, MiB": lambda row: _scaled(row.peak_bytes, 1 / MIB),
    "beyond inputs, MiB": lambda row: _scaled(row.extra_peak_bytes, 1 / MIB),
    "state, MiB": lambda row: _scaled(row.state_bytes, 1 / MIB),
}


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _of_rows(rows: Iterable[Row], *columns: Columns, at: Callable[[Row], int] = length_of) -> Table:
    """One line for each row, by rising T (or what `at` reads), in the columns of which anything is known.

    NHA first, then the other families; in each the implementation first that came to the largest T, and there was the
    fastest.
    """
    lines = sorted(rows, key=lambda row: (at(row), row.batch))
    known = {title: value for part in columns for title, value in part.items()}
    every = {title: value for title, value in known.items() if any(value(row) is not None for row in lines)}
    last = {row.implementation: (-at(row), time_of(row)) for row in lines}
    lines.sort(key=lambda row: (FAMILIES.index(row.family), last[row.implementation], row.implementation))
    return table(list(every), ([value(row) for value in every.values()] for row in lines))


_ALL: Columns = {
    "min, ms": lambda row: row.min_ms,
    "p95, ms": lambda row: row.p95_ms,
    "CUDA graph / call": lambda row: row.graph_ratio,
    "warm, ms": lambda row: row.warm_ms,
    **_FLOOR,
    **_MEMORY,
    "timer": lambda row: row.timer or None,
    "note": lambda row: row.note or None,
}


def latency_data(rows: Sequence[Row]) -> Table:
    """Times of every timed row, with what else is known of them."""
    return _of_rows((row for row in rows if row.timed), _CASE, _TIME, _ALL)


def sweep_data(rows: Sequence[Row], size: Size) -> Table:
    """Times of the rows of a sweep, with what else is known of them."""
    read = reader_of(size)
    return _of_rows(rows, _CASE, {LETTERS[size]: read}, _TIME, _ALL, at=read)


def speedup_data(rows: Sequence[Row]) -> Table:
    """The speed of every timed row, except full attention's, against the fastest full attention at its T."""
    full = fastest_by_length(rows, "full")
    gain: Columns = {"speed-up": lambda row: time_of(full[length_of(row)]) / time_of(row)}
    rival: Columns = {
        "fastest full": lambda row: full[length_of(row)].label.removeprefix("full: "),
        "its median, ms": lambda row: full[length_of(row)].median_ms,
        "its 95 % low": lambda row: full[length_of(row)].low_ms,
        "its 95 % high": lambda row: full[length_of(row)].high_ms,
    }
    shown = (row for row in rows if row.timed and row.family != "full" and length_of(row) in full)
    return _of_rows(shown, _CASE, gain, _TIME, rival)


def floor_data(rows: Sequence[Row]) -> Table:
    """Achieved rates of every timed row of NHA."""
    rates: Columns = {"TB/s": lambda row: row.tb_per_s, "TFLOP/s": lambda row: row.tflop_per_s}
    return _of_rows((row for row in rows if row.timed and row.family == "nha"), _CASE, rates, _FLOOR, _TIME)


def roofline_data(rows: Sequence[Row]) -> Table:
    """Where every timed row stands beneath the roof."""
    place: Columns = {
        "FLOP/B": intensity,
        "TFLOP/s": lambda row: row.tflop_per_s,
        "allowed TFLOP/s": allowed,
        "floor, GFLOP": lambda row: _scaled(row.floor_flops, 1e-9),
        "floor, MiB": lambda row: _scaled(row.floor_bytes, 1 / MIB),
    }
    return _of_rows(on_roofline(rows), _CASE, place, _FLOOR, _TIME)


_OF_A_RUN = ("date", "command", "git_sha", "git_dirty")
CODE = {None: "not known", True: "changed", False: "clean"}  # of git_dirty


def provenance(tables: Mapping[str, Sequence[Row]]) -> tuple[Table, Table]:
    """(machines with their software, runs) of the rows of each file: every distinct one. Machines have numbers."""
    fields = [field.name for field in dataclasses.fields(Environment) if field.name not in _OF_A_RUN]
    machines: dict[tuple[Value, ...], int] = {}
    runs: dict[tuple[Value, ...], list[Row]] = {}
    for name, rows in tables.items():
        for row in rows:
            machine = machines.setdefault(tuple(getattr(row, field) or None for field in fields), len(machines) + 1)
            code = (row.git_sha or "not known", CODE[row.git_dirty])
            ceilings = (row.copy_tb_per_s, row.matmul_tflop_per_s)
            runs.setdefault((name, row.date, *code, machine, *ceilings, row.command), []).append(row)
    units = {"power_cap_w": "power cap, W", "max_sm_clock_mhz": "SM clock at most, MHz", "device_type": "type"}
    counts = ((len(rows), sum(row.timed for row in rows)) for rows in runs.values())
    return (
        table(["machine", *(units.get(field, field) for field in fields)], [(n, *key) for key, n in machines.items()]),
        table(
            ["file", "date", "commit", "work tree", "machine", "copy, TB/s", "matmul, TFLOP/s", "rows", "timed",
             "command"],
            [(*run[:-1], *count, run[-1]) for run, count in zip(runs, counts, strict=True)],
        ),
    )  # fmt: skip
