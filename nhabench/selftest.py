"""Does the harness tell a slowdown from noise on this machine? It is asked about slowdowns that it was given.

A call is compared with itself, which should raise no alarm, and with itself and a longer pause behind it, which should
be caught: longer by one, two and five times the limit beyond which a call counts as slower. All in one process: what
two processes of the same code differ by is for the rounds of `nhabench.regress` to see.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from nhabench.ceilings import open_device
from nhabench.compare import take_turns
from nhabench.contender import Call, Contender
from nhabench.inputs import input_sets
from nhabench.timing import WARM_ROUNDS, next_ms
from nhabench.workloads import Case

GROUND = 0.1  # of a call's time: a pause that both sides make, so that the slower one has no further launch
# How much slower the second side is made, in units of the limit, and at what share of the comparisons. Equals and twice
# the limit are what is promised for; a few show that one is where it is undecided, and that five leave no doubt.
SHARES = {0: 1.0, 1: 0.25, 2: 1.0, 5: 0.25}
ALARMS, CAUGHT = 0.01, 0.95  # at most this share of alarms between equals; at least this share of a double limit caught
PILOTS = 9


@dataclass(frozen=True)
class Trial:
    """Comparisons with a call that was made slower by `slowdown` (0.02: 2 %): by how much it was in the median, and how
    many said 'regress' or 'inconclusive'."""

    slowdown: float
    measured: float
    comparisons: int
    regress: int
    inconclusive: int


def passed(trials: Sequence[Trial], limit: float) -> bool:
    """Whether equals raised few enough alarms and slowdowns of twice the limit and more were caught, by their share of
    each trial's own comparisons, and all were as large as they should be, to a quarter and half the limit."""
    return all(
        abs(trial.measured - trial.slowdown) <= limit / 2 + trial.slowdown / 4
        and (trial.slowdown > 0 or trial.regress <= ALARMS * trial.comparisons)
        and (trial.slowdown < 1.5 * limit or trial.regress >= CAUGHT * trial.comparisons)
        for trial in trials
    )


def run_trials(
    contender: Contender, case: Case, device: torch.device, limit: float, comparisons: int, seconds: float,
    said: Callable[[str], object] = lambda step: None,
) -> list[Trial]:  # fmt: skip
    """Compare a contender's call with itself, and with itself slowed down; `seconds` at most for each comparison.

    comparisons: between equals, and with a call slower by twice the limit; a quarter of it, rounded up, with others.
    """
    timer = open_device(device)
    calls = [contender.bind(one) for one in input_sets(case, device)]

    def side(pause: Callable[[], object]) -> Callable[[], float]:
        def both(call: Call) -> None:
            call()
            pause()

        return next_ms([partial(both, call) for call in calls], timer)

    bare = side(lambda: None)
    for _ in range(WARM_ROUNDS):
        bare()
    ground_ms = GROUND * median(bare() for _ in range(PILOTS))
    plain = side(pause_of(ground_ms, device))
    typical_ms = median(plain() for _ in range(PILOTS))
    trials = []
    for multiple, share in SHARES.items():
        count = math.ceil(share * comparisons)
        slowed = side(pause_of(ground_ms + multiple * limit * typical_ms, device))
        ratios = []
        for number in range(count):
            said(f"slower by {multiple * limit:.1%}: {number + 1}/{count}")
            ratios.append(take_turns(plain, slowed, seconds))
        verdicts = [ratio.verdict(limit) for ratio in ratios]
        found = [verdicts.count(verdict) for verdict in ("regress", "inconclusive")]
        measured = median(ratio.median for ratio in ratios) - 1
        trials.append(Trial(multiple * limit, measured, count, *found))
    return trials


def pause_of(milliseconds: float, device: torch.device) -> Callable[[], object]:
    """A call that keeps the device busy for so long."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 10_000_000
        for _ in range(2):  # the first one also loads the kernel
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        wanted = int(cycles * milliseconds / start.elapsed_time(end))
        return lambda: torch.cuda._sleep(wanted)

    def spin() -> None:
        until = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < until:
            pass

    return spin
