"""From a case to its rows: of what was found, or of what an interrupted run found earlier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nhabench.contender import Contender
from nhabench.environment import Environment
from nhabench.lab import Entry, Lab
from nhabench.results import Row
from nhabench.workloads import Case

SHORT_OF_MEMORY = "GiB are free"  # in the note of a case that did not fit


def earlier_rows(lab: Lab, case: Case, contenders: Sequence[Contender], rows: Sequence[Row]) -> list[Row] | None:
    """Of `rows`, those that the same run left of a case before it was interrupted; None where it must be measured.

    The same run: the same command on the same commit, device and software. Of changed code, or code that git does not
    know, nobody can say whether it is the same. What failed, lacked memory, or was not installed and is now, is
    measured again: that may have been of that hour.
    """
    here = lab.environment
    if not here.git_sha or here.git_dirty is not False:
        return None
    same = {field.name: getattr(here, field.name) for field in dataclasses.fields(Environment) if field.name != "date"}
    same |= case_columns(case)
    found = {row.implementation: row for row in rows if all(getattr(row, name) == same[name] for name in same)}
    earlier = [found[contender.name] for contender in contenders if contender.name in found]
    if len(earlier) < len(contenders):
        return None
    if any(_of_the_hour(row, one.missing(lab.device)) for one, row in zip(contenders, earlier, strict=True)):
        return None
    for contender, row in zip(contenders, earlier, strict=True):
        if row.median_ms is not None:
            lab.last[contender.name, *case.kind] = (case, row.median_ms / 1e3)
    return earlier


def _of_the_hour(row: Row, missing: str | None) -> bool:
    """`missing`: why its contender cannot run here now, if it cannot."""
    if row.status == "skipped":
        return SHORT_OF_MEMORY in row.note
    return row.status in ("failed", "out of memory") or (row.status == "unavailable" and row.note != missing)


def row_of(lab: Lab, case: Case, entry: Entry) -> Row:
    """The finished row: the case, what happened, and the rates that follow from it."""
    floor, contender = entry.contender.floor(case), entry.contender
    columns: dict[str, Any] = {
        "floor_bytes": floor.bytes,
        "floor_flops": floor.flops,
        "state_bytes": floor.state_bytes,
        "floor_ms": floor.milliseconds(lab.ceilings),
        "copy_tb_per_s": lab.ceilings.copy_tb_per_s,
        "matmul_tflop_per_s": lab.ceilings.matmul_tflop_per_s,
        **entry.changes,
    }
    if entry.status == "ok":
        milliseconds = entry.changes["median_ms"]
        columns["floor_fraction"] = columns["floor_ms"] / milliseconds
        columns["tb_per_s"] = floor.bytes / milliseconds * 1e-9
        columns["tflop_per_s"] = floor.flops / milliseconds * 1e-9
    return Row(
        **dataclasses.asdict(lab.environment),
        **case_columns(case),
        implementation=contender.name,
        label=contender.label,
        family=contender.family,
        status=entry.status,
        note=entry.note,
        **columns,
    )


def case_columns(case: Case) -> Mapping[str, Any]:
    shape = dataclasses.asdict(case.workload)
    del shape["tokens"]
    sizes = {name: getattr(case, name) for name in ("direction", "batch", "seq_len", "sequences", "dtype")}
    return {"workload": shape.pop("name"), **shape, **sizes}
