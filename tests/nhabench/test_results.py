"""The CSV: what goes in comes out, one row for a key, and never half a file."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nhabench.environment import Environment
from nhabench.results import ResultFile, Row, columns, load_rows, replace_file, to_csv

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
VALUES: dict[object, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(-(10**15), 10**15),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
}


def any_value(kind: Any) -> st.SearchStrategy[Any]:
    options = typing.get_args(kind)
    return st.one_of([st.none() if o is type(None) else VALUES[o] for o in options]) if options else VALUES[kind]


ANY_ROW = st.builds(Row, **{name: any_value(kind) for name, kind in typing.get_type_hints(Row).items()})


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(ANY_ROW, max_size=4))
def test_rows_survive_the_file(rows: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "forward.csv"
    replace_file(path, to_csv(rows))
    assert load_rows(path) == rows


def test_columns_are_the_fields_once_with_the_provenance_last() -> None:
    assert sorted(columns()) == sorted(field.name for field in dataclasses.fields(Row))
    provenance = tuple(field.name for field in dataclasses.fields(Environment))
    assert columns()[-len(provenance) :] == provenance
    assert columns()[0] == "workload"


def test_a_new_row_replaces_its_key_and_keeps_the_others(tmp_path: Path, row: Callable[..., Row]) -> None:
    path = tmp_path / "new" / "forward.csv"
    first = [row(workload="a"), row(workload="b"), row(workload="a", seq_len=1024)]
    ResultFile(path).put(first)
    again = ResultFile(path)
    newer = row(workload="a", status="incorrect", median_ms=None)
    again.put([newer])
    assert load_rows(path) == [newer, first[1], first[2]] == again.rows


@pytest.mark.parametrize(
    "change",
    [{"batch": 2}, {"seq_len": 1}, {"dtype": "float16"}, {"implementation": "x"}, {"window": 1}, {"slots": 1},
     {"device": "x"}, {"rope": True}, {"direction": "backward"}, {"head_dim": 1}, {"q_heads": 8}, {"kv_heads": 1},
     {"sequences": 4}],
)  # fmt: skip
def test_rows_about_different_things_have_different_keys(change: dict[str, Any], row: Callable[..., Row]) -> None:
    assert row(**change).key != row().key


def test_only_the_measurement_is_not_in_the_key(row: Callable[..., Row]) -> None:
    assert row(median_ms=9.0, status="failed", note="x", date="", git_sha="1", command="x").key == row().key


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Callable[..., Row]
) -> None:
    path = tmp_path / "forward.csv"
    ResultFile(path).put([row()])
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    results = ResultFile(path)
    monkeypatch.setattr(os, broken, full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.put([row(workload="other")])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["forward.csv"]


def test_loading_names_line_and_column(tmp_path: Path, row: Callable[..., Row]) -> None:
    path = tmp_path / "forward.csv"
    text = to_csv([row(), row(batch=77)])
    for wrong, message in (
        (text.replace(",77,", ",many,"), r"line 3, batch: .*'many'"),
        (
            text.replace(",false,", ",maybe,", 1),
            r"line 2, rope: expected true or false, got 'maybe'",
        ),
        (text + "1,2\n", r"line 4: expected \d+ values, got 2"),
        (
            text.replace("workload,", "workloads,", 1),
            r"expected the columns of this version; differs in: workload, workl",
        ),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"forward\.csv") as error:
            load_rows(path)
        assert re.search(message, str(error.value)), error.value


@pytest.mark.parametrize("column", ["rope", "sequences", "state_bytes"])
def test_a_file_of_before_a_column_was_added(column: str, tmp_path: Path, row: Callable[..., Row]) -> None:
    path = tmp_path / "forward.csv"
    rows = [row(), row(batch=77)]
    table = [line.split(",") for line in to_csv([dataclasses.replace(one, note="") for one in rows]).splitlines()]
    at = table[0].index(column)
    path.write_text("".join(",".join(line[:at] + line[at + 1 :]) + "\n" for line in table))
    assert load_rows(path) == [dataclasses.replace(one, note="") for one in rows]
    at = table[0].index("median_ms")
    path.write_text("".join(",".join(line[:at] + line[at + 1 :]) + "\n" for line in table))
    with pytest.raises(ValueError, match="differs in: median_ms"):
        load_rows(path)


def test_an_empty_file_is_not_a_table(tmp_path: Path) -> None:
    path = tmp_path / "forward.csv"
    path.touch()
    with pytest.raises(ValueError, match="expected the columns"):
        ResultFile(path)


def test_a_row_without_status_ok_has_no_time(row: Callable[..., Row]) -> None:
    assert row().timed
    assert not row(status="incorrect").timed
    assert not row(median_ms=None).timed
