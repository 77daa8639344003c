"""How far the numbers of a folder can be trusted: what `selftest` and `repeat` wrote beside them, in sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nhabench.data import CODE

Told = Mapping[str, Any]  # the JSON that a command wrote


@dataclass(frozen=True)
class Figures:
    """One file: its name, whether what it asks was passed, what it says, and where that comes from."""

    file: str
    passed: bool
    sentences: list[str]
    source: str


def percent(fraction: float) -> str:
    """Three digits, without zeros behind them: 0.312 %, 1 %, 20 %."""
    return f"{100 * fraction:{'.3g' if fraction < 10 else '.0f'}} %"


def alarms(told: Told) -> str:
    """What selftest found between equals."""
    (equal,) = (one for one in told["trials"] if one["slowdown"] == 0)
    return (
        f"Of {equal['comparisons']} comparisons of a call with itself, {equal['regress']} said that it became slower "
        f"by more than {percent(told['limit'])}."
    )


def caught(told: Told) -> str:
    """Which slowdowns selftest caught, by their size."""
    slowed = [one for one in told["trials"] if one["slowdown"] > 0]
    shares = ", ".join(f"{one['regress']} of {one['comparisons']} by {percent(one['slowdown'])}" for one in slowed)
    return f"Of calls that were slowed down, it said so of {shares}."


def cheats(told: Told) -> str:
    """Which of the planted cheats selftest caught."""
    planted = told["cheats"]
    missed = [one["name"] for one in planted if not one["caught"]]
    but = f"; not so: {', '.join(missed)}" if missed else ""
    return f"Of {len(planted)} ways to cheat, {len(planted) - len(missed)} were caught or of no use{but}."


def timers(told: Told) -> str:
    """How far the two timers of a GPU agree; "" on a CPU, which has one."""
    found = told["timers"]
    if not found:
        return ""
    apart = {one["call"]: abs(one["ratio"] - 1) for one in found if one["ratio"] is not None}
    worst = max(apart, key=apart.__getitem__, default="")
    failed = "".join(f" Not timed: {one['call']} ({one['note']})." for one in found if one["ratio"] is None)
    said = f"Of {len(apart)} calls, events around them and around their CUDA graphs differ by"
    return f"{said} {percent(apart[worst])} at most ({worst}).{failed}" if apart else failed.strip()


def selftest_sentences(told: Told) -> list[str]:
    """Each thing that selftest asks, in a sentence."""
    return [said for sentence in (alarms, caught, cheats, timers) if (said := sentence(told))]


def repeat_sentences(told: Told) -> list[str]:
    """How far fresh processes agree, and what went wrong."""
    limits, worst = told["limits"], told["worst"]
    spreads = [row["spread"] for row in told["rows"] if row["spread"] is not None]
    if not spreads:
        return ["No row was timed by every process.", *told["troubles"]]
    least = f"{1e3 * limits['worst_from_ms']:.0f} µs"
    within = {name: f"limit: {percent(limits[name])}" for name in ("median", "worst")}
    middle = f"{percent(told['median'])} in the median of {len(spreads)} rows ({within['median']})"
    most = f"and no row takes {least}"
    if worst:
        row = f"{worst['label']} at {worst['case']}"
        most = f"by {percent(worst['spread'])} in the worst row of {least} or more, {row} ({within['worst']})"
    return [f"The medians of {len(told['processes'])} fresh processes differ by {middle}, {most}.", *told["troubles"]]


FILES: Mapping[str, Callable[[Told], list[str]]] = {
    "selftest.json": selftest_sentences,
    "repeat.json": repeat_sentences,
}


def read_figures(folder: Path, devices: Collection[str]) -> list[Figures]:
    """What the files of a folder, whose rows are of these devices, say, those that are there.

    Raises ValueError that names a file that is none of theirs; OSError where one cannot be read.
    """
    found = []
    for name, sentences in FILES.items():
        path = folder / name
        if not path.exists():
            continue
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            environment = told["environment"]
            other = "" if environment["device"] in devices else f"Measured elsewhere, on {environment['device']}."
            said = [*sentences(told), *filter(None, [other])]
            found.append(Figures(name, bool(told["passed"]), said, _source(environment)))
        except (ValueError, LookupError, TypeError) as error:  # ValueError: no JSON, no UTF-8
            command = name.removesuffix(".json")
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name}: expected what {command} --output wrote, got: {problem}") from error
    return found


def _source(environment: Told) -> str:
    code = f"commit {environment['git_sha'] or 'not known'} ({CODE[environment['git_dirty']]})"
    software = f"torch {environment['torch']}, triton {environment['triton'] or 'none'}"
    driver = f", driver {environment['driver']}" if environment["driver"] else ""
    where = f"{environment['device']}, {software}{driver}"
    return f"{environment['command']}: {environment['date']}, {where}, {code}"
