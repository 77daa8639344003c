"""Is one call slower than another? Both are timed in turns, and the ratio of their times is judged.

An absolute time says nothing on another machine, or on another day. A ratio of two times that were measured a moment
apart does: whatever slows the machine down slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from nhabench.timing import LEAST_SAMPLES, median_ranks

Verdict = Literal["pass", "regress", "inconclusive", "incorrect"]
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "regress": 1, "inconclusive": 3, "incorrect": 4}
WORST_FIRST: tuple[Verdict, ...] = ("incorrect", "regress", "inconclusive", "pass")

# A call that is slower by no more than this has not regressed. On a CPU two processes of the same code differ by some
# per cent.
LIMITS = {"cuda": 0.01, "cpu": 0.1}
WIDTH = 0.0025  # turns go on until the interval of a round's ratio reaches no further than this, or the time is up
LEAST_PAIRS = 20  # a first few turns that agree by chance are no reason to stop
ROUNDS = LEAST_SAMPLES  # as many as an interval takes


@dataclass(frozen=True)
class Ratio:
    """The time of one side in units of the other's: the median, and its interval, over `count` independent samples.

    The interval holds the true median with the confidence of `nhabench.timing.CONFIDENCE`, whatever the distribution,
    as long as the samples are independent.
    """

    median: float
    low: float
    high: float
    count: int

    def verdict(self, limit: float) -> Verdict:
        """'regress' where all of the interval is beyond 1 + limit, 'pass' where none of it is, else 'inconclusive'."""
        if self.low > 1 + limit:
            return "regress"
        return "pass" if self.high <= 1 + limit else "inconclusive"


def ratio_of(ratios: Sequence[float]) -> Ratio:
    """Median and interval. Raises ValueError for fewer than LEAST_SAMPLES ratios, and for one that is not positive."""
    if len(ratios) < LEAST_SAMPLES:
        raise ValueError(f"ratios: expected at least {LEAST_SAMPLES}, got {len(ratios)}")
    if not min(ratios) > 0:
        raise ValueError(f"ratios: expected positive numbers, got {min(ratios):g}")
    ordered = sorted(ratios)
    low, high = median_ranks(len(ordered))
    return Ratio(median(ordered), ordered[low], ordered[high], len(ordered))


def take_turns(
    base: Callable[[], float],
    new: Callable[[], float],
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Time both sides in turns until their ratio is known, or for `seconds`; each function times one call of its side.

    Who begins changes from turn to turn, so that neither always runs behind the other. The interval says how well the
    ratio of these two sides is known, not how much another two processes of the same code would differ from them.
    """
    ratios: list[float] = []
    begin = clock()
    while True:
        for _ in range(LEAST_PAIRS):
            if len(ratios) % 2 == 0:
                before = base()
                after = new()
            else:
                after = new()
                before = base()
            ratios.append(after / before)
            if clock() - begin >= seconds and len(ratios) >= LEAST_SAMPLES:
                return ratio_of(ratios)
        ratio = ratio_of(ratios)
        if max(ratio.high - ratio.median, ratio.median - ratio.low) <= WIDTH:
            return ratio


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several verdicts the one that counts; 'inconclusive' where there is none, since nothing was compared."""
    return next((verdict for verdict in WORST_FIRST if verdict in verdicts), "inconclusive")
