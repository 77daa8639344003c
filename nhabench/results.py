"""The table of results: one row for each (case, implementation), one schema, one file that is never half-written."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nhabench.environment import Environment

STATUSES = ("ok", "incorrect", "unsupported", "unavailable", "out of memory", "skipped", "failed")
# Columns that an older file may lack: then they have their default.
ADDED = {"rope", "state_bytes", "graph_ratio", "warm_ms", "sequences"}
HOST_TIME = " with host time"  # behind the timer's name, where the host may have kept the device waiting


@dataclass(frozen=True, kw_only=True)
class Row(Environment):
    """One implementation at one case. The fields are the columns of the CSV, those of Environment after these.

    direction: 'forward', or 'training' for the forward pass and the gradients of its inputs (nhabench.training).
    sequences: how many are packed in the seq_len tokens, 0 where each row of the batch is one. Only a row with status
    'ok' has times; `note` says in a sentence what another status means, or what a reader should know. Times in
    milliseconds, sizes in bytes, rates in TB/s and TFLOP/s. graph_ratio is the time of the call as a CUDA graph, in
    units of its time by the first timer, both timed in turns. warm_ms is the median of a call right behind another one
    with the same inputs, which lie in the caches as far as they fit; it is there where it was asked for. floor_* is the
    least the operation must do (nhabench.floors); floor_fraction is floor_ms / median_ms. extra_peak_bytes is what one
    call takes beyond its inputs, output included, and peak_bytes adds the inputs; state_bytes is what the operation
    must keep of the past for a next token. error and tolerance are relative to the float64 reference, worst_* those of
    the worst block of 64 tokens; in training all four are of the gradient that comes nearest to its tolerance.
    """

    workload: str
    direction: str
    q_heads: int
    kv_heads: int
    head_dim: int
    slots: int
    window: int
    batch: int
    seq_len: int
    sequences: int = 0
    dtype: str
    rope: bool = False
    implementation: str
    label: str
    family: str
    status: str
    note: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    min_ms: float | None = None
    p95_ms: float | None = None
    graph_ratio: float | None = None
    warm_ms: float | None = None
    samples: int | None = None
    stop: str = ""
    timer: str = ""
    cache: str = ""
    input_sets: int | None = None
    floor_bytes: int | None = None
    floor_flops: int | None = None
    floor_ms: float | None = None
    floor_fraction: float | None = None
    tb_per_s: float | None = None
    tflop_per_s: float | None = None
    copy_tb_per_s: float | None = None
    matmul_tflop_per_s: float | None = None
    peak_bytes: int | None = None
    extra_peak_bytes: int | None = None
    state_bytes: int | None = None
    error: float | None = None
    tolerance: float | None = None
    worst_error: float | None = None
    worst_tolerance: float | None = None
    reference: str = ""
    sm_clock_before_mhz: int | None = None
    sm_clock_after_mhz: int | None = None
    clock_fell: bool | None = None
    throttle: str = ""

    @property
    def key(self) -> tuple[str | int, ...]:
        """What a row is about. A newer row with the same key replaces an older one."""
        heads = (self.q_heads, self.kv_heads, self.head_dim, self.slots, self.window)
        case = (self.batch, self.seq_len, self.sequences, self.rope, self.dtype)
        return (self.device, self.workload, self.direction, *heads, *case, self.implementation)

    @property
    def timed(self) -> bool:
        """Whether the row has a time."""
        return self.status == "ok" and self.median_ms is not None


def columns() -> tuple[str, ...]:
    """The CSV's columns: the row's own fields, then its provenance."""
    inherited = [field.name for field in dataclasses.fields(Environment)]
    own = [field.name for field in dataclasses.fields(Row) if field.name not in inherited]
    return (*own, *inherited)


def _parse(text: str, kind: object) -> object:
    """The inverse of _format for one column type: str, int, float, bool, or one of these or None."""
    if isinstance(kind, types.UnionType):
        options = typing.get_args(kind)
        if not text:
            return None
        kind = next(option for option in options if option is not types.NoneType)
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"expected true or false, got {text!r}")
        return text == "true"
    if kind is int:
        return int(text)
    if kind is float:
        return float(text)
    return text


def _format(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def load_rows(path: Path) -> list[Row]:
    """The rows of a CSV. Raises ValueError that names file, line and column, what was expected and what came."""
    kinds = typing.get_type_hints(Row)
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines, strict=True)
        header = tuple(next(reader, ()))
        different = sorted((set(header) ^ set(columns())) - (ADDED - set(header)))
        if different or len(header) != len(set(header)):
            problem = ", ".join(different) or "a column comes twice"
            raise ValueError(f"{path.name}: expected the columns of this version; differs in: {problem}")
        rows = []
        for record in reader:
            where = f"{path.name}: line {reader.line_num}"
            if len(record) != len(header):
                raise ValueError(f"{where}: expected {len(header)} values, got {len(record)}")
            values: dict[str, typing.Any] = {}
            for name, text in zip(header, record, strict=True):
                try:
                    values[name] = _parse(text, kinds[name])
                except ValueError as error:
                    raise ValueError(f"{where}, {name}: {error}") from error
            rows.append(Row(**values))
    return rows


def is_table(path: Path) -> bool:
    """Whether a CSV is a table of results, of this version or another, by the names in its first line."""
    with path.open(newline="", encoding="utf-8", errors="replace") as lines:
        header = next(csv.reader(lines), [])
    return {"workload", "implementation", "status", "median_ms"} <= set(header)


def _line(values: Iterable[str]) -> str:
    # csv quotes a line break inside a value only if it is one of its own line ends: give it both, keep one.
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(values)
    return text.getvalue().removesuffix("\r\n") + "\n"


def to_csv(rows: Iterable[Row]) -> str:
    """The rows as CSV text."""
    names = columns()
    return _line(names) + "".join(_line(_format(getattr(row, name)) for name in names) for row in rows)


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(path.name + ".part")


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then in its place. Raises OSError; the old file is intact."""
    beside = part_of(path)
    try:
        with beside.open("w", encoding="utf-8", newline="") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


class ResultFile:
    """The rows of one CSV, those of earlier runs included. put() keeps the file on disk complete at every moment."""

    def __init__(self, path: Path) -> None:
        """Reads the file where there is one; raises ValueError where it is not such a CSV."""
        self.path = path
        self._rows = {row.key: row for row in load_rows(path)} if path.exists() else {}

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order in which their keys first came."""
        return list(self._rows.values())

    def put(self, rows: Iterable[Row]) -> None:
        """Add rows, each in the place of an older one with its key, and write the file. Raises OSError."""
        self._rows.update({row.key: row for row in rows})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, to_csv(self.rows))
