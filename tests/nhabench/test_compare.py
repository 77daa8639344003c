"""Ratios and verdicts: no false alarm between equals, no slowdown missed, and the time is kept."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nhabench.compare import EXIT_CODES, LEAST_PAIRS, ROUNDS, Ratio, Verdict, ratio_of, take_turns, worst


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.011, 1.03, "regress"),
        (1.0, 1.01, "pass"),
        (0.5, 0.6, "pass"),
        (1.01, 1.011, "inconclusive"),
        (0.9, 1.2, "inconclusive"),
    ],
)
def test_the_whole_interval_decides(low: float, high: float, verdict: Verdict) -> None:
    assert Ratio((low + high) / 2, low, high, 6).verdict(0.01) == verdict


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=60))
def test_the_interval_holds_the_median_and_reversed_sides_give_the_reciprocal(ratios: list[float]) -> None:
    ratio = ratio_of(ratios)
    assert min(ratios) <= ratio.low <= ratio.median <= ratio.high <= max(ratios)
    back = ratio_of([1 / x for x in ratios])
    assert (back.low, back.high) == (pytest.approx(1 / ratio.high), pytest.approx(1 / ratio.low))


def test_few_ratios_and_wrong_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="ratios: expected at least 6, got 5"):
        ratio_of([1.0] * 5)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ratios: expected positive numbers, got"):
            ratio_of([wrong] + [1.0] * 5)


def test_the_worst_verdict_counts() -> None:
    assert worst(["pass", "regress", "inconclusive"]) == "regress"
    assert worst(["incorrect", "regress"]) == "incorrect"
    assert worst(["pass", "pass"]) == "pass"
    assert worst([]) == "inconclusive"
    assert len(set(EXIT_CODES.values())) == 4
    assert EXIT_CODES["pass"] == 0


class Machine:
    """A clock, and calls that take their time on it."""

    def __init__(self, seed: int = 0) -> None:
        self.now, self.order = 0.0, ""
        self.random = random.Random(seed)

    def clock(self) -> float:
        return self.now

    def call(self, name: str, milliseconds: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            self.order += name
            spent = milliseconds()
            self.now += spent / 1e3
            return spent

        return run


def test_who_begins_changes_from_turn_to_turn() -> None:
    machine = Machine()
    ratio = take_turns(machine.call("b", lambda: 2.0), machine.call("n", lambda: 3.0), 10.0, machine.clock)
    assert machine.order == "bnnb" * (LEAST_PAIRS // 2)
    assert (ratio.median, ratio.low, ratio.high, ratio.count) == (1.5, 1.5, 1.5, LEAST_PAIRS)


def test_noise_is_measured_until_the_time_is_up() -> None:
    machine = Machine()
    noisy = machine.call("x", lambda: machine.random.uniform(0.5, 1.5))
    ratio = take_turns(noisy, noisy, 1.0, machine.clock)
    assert 1.0 <= machine.now < 1.01
    assert ratio.low < 1 < ratio.high
    # Slow calls: as many turns as an interval takes.
    machine = Machine()
    slow = machine.call("s", lambda: 5000.0)
    assert take_turns(slow, slow, 1.0, machine.clock).count == 6


def drifting(machine: Machine, slowdown: float) -> Ratio:
    """A comparison on a machine whose speed drifts, whose calls vary, and whose processes differ by 0.3 %."""
    ratios = []
    for _ in range(ROUNDS):
        bias = [machine.random.gauss(1, 0.002) for _ in range(2)]

        def milliseconds(side: int, factor: float, bias: list[float] = bias) -> float:
            drift = 1 + 0.2 * (machine.now % 3)
            return drift * factor * bias[side] * machine.random.lognormvariate(0, 0.005)

        sides = [
            machine.call(name, lambda side=side, factor=factor: milliseconds(side, factor))  # type: ignore[misc]
            for side, (name, factor) in enumerate((("b", 1.0), ("n", slowdown)))
        ]
        ratios.append(take_turns(sides[0], sides[1], 0.15, machine.clock).median)
    return ratio_of(ratios)


def test_equals_raise_no_alarm_and_slowdowns_are_caught() -> None:
    machine = Machine(20260102)
    alarms = sum(drifting(machine, 1.0).verdict(0.01) == "regress" for _ in range(200))
    assert alarms <= 2
    for slowdown, share in ((1.02, 0.95), (1.05, 1.0)):
        caught = sum(drifting(machine, slowdown).verdict(0.01) == "regress" for _ in range(100))
        assert caught >= share * 100, slowdown
