"""What the rows of a workload say, in sentences: how the fastest NHA compares, and how near the floor it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from nhabench.crossover import fastest_by_length, find_crossover, length_name, time_of
from nhabench.plots import of_several_runs
from nhabench.results import HOST_TIME, Row
from nhabench.tables import Place, place_of, significant, where

RIVALS = {"full": "full attention", "window": "window alone", "linear": "linear attention"}


def crossing(rows: Sequence[Row]) -> str:
    """The crossover of NHA with full attention, or why there is none."""
    crossover = find_crossover(rows)
    if crossover is None:
        absent = [
            name for family, name in (("nha", "NHA"), ("full", RIVALS["full"])) if not fastest_by_length(rows, family)
        ]
        why = f"{' and '.join(absent)} not timed" if absent else "not timed at a common length"
        return f"No crossover: {why}"
    at = (
        f"; the lines cross at {length_name(crossover.nha)} ≈ {significant(crossover.at, 2)}"
        if crossover.at is not None
        else ""
    )
    return f"{crossover.sentence}{at}"


def findings(rows: Sequence[Row]) -> list[str]:
    """Sentences about one workload's rows: the fastest NHA against the fastest of each other family, its fraction of
    the floor, what was not timed, and whether the rows are of several runs."""
    if not fastest_by_length(rows, "nha"):
        return ["NHA was not timed."]
    told = [sentence for family in RIVALS if (sentence := against(rows, family))]
    told += [sentence] if (sentence := floor_reached(rows)) else []
    absent = [name for family, name in RIVALS.items() if not against(rows, family)]
    if absent:
        told.append(f"Not timed at the lengths of NHA: {', '.join(absent)}.")
    remark = of_several_runs([row for row in rows if row.timed])
    if remark:
        told.append(f"{remark[0].upper()}{remark[1:]}.")
    return told


def against(rows: Sequence[Row], family: str) -> str:
    """The fastest NHA against the fastest of a family, at the lengths that have both; empty where none has.

    Faster and slower are only said where the two medians' intervals are apart. Rows without one count by their median.
    """
    nha, rivals = fastest_by_length(rows, "nha"), fastest_by_length(rows, family)
    lengths = [length for length in nha if length in rivals]
    if not lengths:
        return ""
    pairs = {length: (nha[length], rivals[length]) for length in lengths}
    faster = [length for length, (ours, other) in pairs.items() if high_of(ours) < low_of(other)]
    slower = [length for length, (ours, other) in pairs.items() if low_of(ours) > high_of(other)]
    level = [length for length in lengths if length not in faster and length not in slower]
    name = length_name(rows[0])
    verdicts = [
        f"{word} at {_runs(name, some, lengths)}"
        for word, some in (("faster", faster), ("slower", slower), ("level within the intervals", level))
        if some
    ]
    first, last = lengths[0], lengths[-1]
    speeds = f"{_speed(*pairs[first])} its speed at {name}={first}"
    if last != first:
        speeds += f", {_speed(*pairs[last])} at {name}={last}"
    us = names_of(nha[length] for length in lengths)
    them = names_of(rivals[length] for length in lengths)
    rival = RIVALS[family] if them == RIVALS[family] else f"{RIVALS[family]} ({them})"
    return f"{us} against {rival}: {', '.join(verdicts)}; {speeds}."


def _speed(ours: Row, other: Row) -> str:
    return f"{significant(time_of(other) / time_of(ours), 3)}x"


def low_of(row: Row) -> float:
    return time_of(row) if row.low_ms is None else row.low_ms


def high_of(row: Row) -> float:
    return time_of(row) if row.high_ms is None else row.high_ms


def names_of(rows: Iterable[Row]) -> str:
    """The rows' labels, each once, without what their family is called: it is said before."""
    labels = dict.fromkeys(row.label for row in rows)
    plain = [label.removeprefix("full: ").removeprefix("linear: ").removeprefix("linear, ") for label in labels]
    return " or ".join(label.replace(" (", ", ").replace(")", "") for label in plain)


def _runs(name: str, some: Sequence[int], lengths: Sequence[int]) -> str:
    """'T=512, 2048 to 131072', where T is the name: neighbours among the measured lengths are drawn together."""
    if len(some) == len(lengths):
        return "every length measured"
    runs: list[list[int]] = []
    for length in some:
        before = lengths.index(length) - 1
        if runs and before >= 0 and runs[-1][-1] == lengths[before]:
            runs[-1].append(length)
        else:
            runs.append([length])
    return f"{name}=" + ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def floor_reached(rows: Sequence[Row]) -> str:
    """The fastest NHA's fraction of the floor, over all lengths; empty where no row has one."""
    rows = [row for row in fastest_by_length(rows, "nha").values() if row.floor_fraction is not None]
    if not rows:
        return ""
    reached = [100 * (row.floor_fraction or 0.0) for row in rows]
    low, high = significant(min(reached), 2), significant(max(reached), 2)
    return (
        f"{names_of(rows)} runs at {low if low == high else f'{low} to {high}'} % of the speed that the floor allows."
    )


def overview(groups: Sequence[Sequence[Row]]) -> str:
    """At how many workloads the fastest NHA is faster than the fastest full attention; empty where none timed both."""
    crossovers = [crossover for rows in groups if (crossover := find_crossover(rows))]
    if not crossovers:
        return ""
    at_last = sum(crossover.seq_len is not None for crossover in crossovers)
    everywhere = sum(crossover.seq_len is not None and crossover.at is None for crossover in crossovers)
    return (
        f"NHA is faster than full attention at the largest length of {at_last} of the {len(crossovers)} workloads that "
        f"timed both, and at every length of {everywhere or 'none'}."
    )


def marked(rows: Sequence[Row]) -> list[str]:
    """What a reader should know of timed rows, and of which: with host time, with a clock that fell."""
    marks: tuple[tuple[str, Callable[[Row], bool]], ...] = (
        ("Includes host time", lambda row: HOST_TIME in row.timer),
        ("The SM clock fell", lambda row: bool(row.clock_fell)),
    )
    told = []
    for what, holds in marks:
        places: dict[str, set[Place]] = {}
        for row in rows:
            if row.timed and holds(row):
                places.setdefault(row.label, set()).add(place_of(row))
        if places:
            told.append(f"{what}: {'; '.join(f'{label} ({where(at)})' for label, at in places.items())}.")
    return told
