"""From which length on NHA is faster than full attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nhabench.results import Row


def length_of(row: Row) -> int:
    """T of a row; of packed sequences their mean length."""
    return round(row.seq_len / row.sequences) if row.sequences else row.seq_len


def length_name(row: Row) -> str:
    """What that length is called."""
    return "mean T" if row.sequences else "T"


def fastest_by(at: Callable[[Row], int], rows: Sequence[Row], family: str) -> dict[int, Row]:
    """The fastest timed row of a family at each value of a size that `at` gives, by rising value."""
    best: dict[int, Row] = {}
    for row in rows:
        if row.family != family or not row.timed:
            continue
        if at(row) not in best or time_of(row) < time_of(best[at(row)]):
            best[at(row)] = row
    return dict(sorted(best.items()))


def fastest_by_length(rows: Sequence[Row], family: str) -> dict[int, Row]:
    """The same at each length T."""
    return fastest_by(length_of, rows, family)


def time_of(row: Row) -> float:
    """The median of a timed row in ms. Raises ValueError for a row without a time."""
    if row.median_ms is None:
        raise ValueError(f"row: expected one with a time, got status {row.status!r}")
    return row.median_ms


@dataclass(frozen=True)
class Crossover:
    """How the fastest NHA and the fastest full attention compare over the lengths at which both were timed.

    seq_len: the least measured T from which on NHA is faster at every measured T; None where it is not at the largest.
    at: T where the lines cross, between measured lengths on log axes; None without a crossing.
    nha, full: the fastest of each at seq_len, or at the largest T where there is none.
    """

    seq_len: int | None
    at: float | None
    nha: Row
    full: Row

    @property
    def sentence(self) -> str:
        """The finding in words."""
        nha, full = self.nha.label, self.full.label.removeprefix("full: ")
        if self.seq_len is None:
            ratio = time_of(self.nha) / time_of(self.full)
            at = f"{length_name(self.nha)}={length_of(self.nha)}"
            return f"{nha} is {ratio:.1f}x slower than full attention ({full}) at {at}"
        where = f"from {length_name(self.nha)}={self.seq_len}" if self.at is not None else "at every length measured"
        return f"{nha} is faster than full attention ({full}) {where}"


def find_crossover(rows: Sequence[Row]) -> Crossover | None:
    """The crossover of one workload's rows; None where no length has both an NHA and a full attention time."""
    nha, full = fastest_by_length(rows, "nha"), fastest_by_length(rows, "full")
    lengths = [length for length in nha if length in full]
    if not lengths:
        return None
    gain = [math.log(time_of(full[length]) / time_of(nha[length])) for length in lengths]
    first = len(lengths)
    while first > 0 and gain[first - 1] > 0:
        first -= 1
    if first == len(lengths):
        return Crossover(None, None, nha[lengths[-1]], full[lengths[-1]])
    at = None
    if first > 0:
        before, after = math.log(lengths[first - 1]), math.log(lengths[first])
        at = math.exp(before + (after - before) * gain[first - 1] / (gain[first - 1] - gain[first]))
    return Crossover(lengths[first], at, nha[lengths[first]], full[lengths[first]])
