"""How long a call takes: contenders interleaved, until the median is known well enough.

On a GPU the time is the device's own, between two events around each call. On a CPU it is the wall clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch

CONFIDENCE = 0.95
TARGET = 0.005  # stop when the median's interval is within +-0.5 % of it
WARM_ROUNDS = 2  # for calls that are not slow, beside the pilot
SLOW_MS = 100.0  # a call this long is warm after its pilot, and is repeated SLOW_SAMPLES times only
SLOW_SAMPLES = 3
LEAST_SAMPLES = 5
LONGEST_HEAD_START_MS = 20.0  # a host that waits for room in the launch queue must not make the sleep ever longer

TimedCall = Callable[[int], object]  # takes the number of the input set


class Timer(Protocol):
    """Times one round of calls."""

    name: str

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Run the calls one after another and return the milliseconds of each."""


class WallClock:
    """Wall-clock time, for calls that have finished when they return (CPU)."""

    name = "wall clock"

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """See Timer."""
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times


class CudaEvents:
    """Device time between two events around each call.

    An event pair also sees the time the device waits for the host. So each round begins with a sleep on the device,
    somewhat longer than the host took to queue the last round: it has queued all of this one when the device wakes up.
    """

    name = "cuda events"

    def __init__(self, cuda: Any = torch.cuda, clock: Callable[[], float] = time.perf_counter) -> None:
        self._cuda, self._clock = cuda, clock
        self._head_start_ms = 2.0
        self._cycles_per_ms = self._calibrate()

    def _calibrate(self) -> float:
        cycles = 2_000_000
        for _ in range(2):  # the first one also loads the kernel
            start, end = self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)
            start.record()
            self._cuda._sleep(cycles)
            end.record()
            self._cuda.synchronize()
        return float(cycles / start.elapsed_time(end))

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """See Timer."""
        pairs = [(self._cuda.Event(enable_timing=True), self._cuda.Event(enable_timing=True)) for _ in calls]
        self._cuda.synchronize()
        self._cuda._sleep(int(self._head_start_ms * self._cycles_per_ms))
        begin = self._clock()
        for call, (start, end) in zip(calls, pairs, strict=True):
            start.record()
            call()
            end.record()
        queued_ms = (self._clock() - begin) * 1e3
        self._cuda.synchronize()
        self._head_start_ms = min(LONGEST_HEAD_START_MS, 1.2 * queued_ms + 0.1)
        return [float(start.elapsed_time(end)) for start, end in pairs]


@lru_cache(maxsize=4096)
def median_ranks(count: int) -> tuple[int, int]:
    """The ranks (from 0) of sorted samples between which the median lies with CONFIDENCE, whatever the distribution.

    Below 6 samples no pair of ranks has that confidence: the widest one is returned.
    """
    if count < 1:
        raise ValueError(f"count: expected an integer >= 1, got {count}")
    # P(median below the sample of rank r) = P(Binomial(count, 1/2) <= r); leave (1 - CONFIDENCE) / 2 on each side.
    tail, low = 0.0, -1
    while tail <= (1 - CONFIDENCE) / 2:
        low += 1
        log_choose = math.lgamma(count + 1) - math.lgamma(low + 1) - math.lgamma(count - low + 1)
        tail += math.exp(log_choose - count * math.log(2))
    low = max(0, low - 1)
    return low, count - 1 - low


@dataclass(frozen=True)
class Timing:
    """Summary of the samples of one contender, in milliseconds. `stop`: why there are no more of them."""

    median_ms: float
    low_ms: float
    high_ms: float
    min_ms: float
    p95_ms: float
    samples: int
    stop: str


def summarise(samples: Sequence[float], stop: str = "") -> Timing:
    """Median, its interval, least and 95th percentile. Raises ValueError without samples."""
    ordered = sorted(samples)
    low, high = median_ranks(len(ordered))
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Timing(median, ordered[low], ordered[high], ordered[0], p95, len(ordered), stop)


def precise(samples: Sequence[float]) -> bool:
    """Whether the median's interval lies within +-TARGET of it. Never with so few samples that there is no interval."""
    if len(samples) < 6:
        return False
    timing = summarise(samples)
    return max(timing.high_ms - timing.median_ms, timing.median_ms - timing.low_ms) <= TARGET * timing.median_ms


@dataclass
class _Runner:
    call: TimedCall
    samples: list[float] = field(default_factory=list)
    pilot_ms: float = 0.0
    stop: str = ""
    error: Exception | None = None

    @property
    def active(self) -> bool:
        return not self.stop and self.error is None

    @property
    def slow(self) -> bool:
        return self.pilot_ms >= SLOW_MS


def _run_round(timer: Timer, runners: Sequence[_Runner], inputs: int) -> list[tuple[_Runner, float]]:
    """One round of the active runners. One that raises is out, and the time of its turn is not counted."""

    def guarded(runner: _Runner) -> Callable[[], object]:
        def call() -> object:
            try:
                return runner.call(inputs)
            except Exception as error:
                runner.error = error
                return None

        return call

    active = [runner for runner in runners if runner.active]
    times = timer.round([guarded(runner) for runner in active])
    return [(runner, ms) for runner, ms in zip(active, times, strict=True) if runner.error is None]


def race(
    calls: Sequence[TimedCall],
    timer: Timer,
    sets: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    started: Callable[[], object] = lambda: None,
) -> list[Timing | Exception]:
    """Time the calls interleaved, A B C A B C ..., over rotated input sets, for about `seconds` in all.

    A call leaves the race when its median is precise, or when it has had its share of the time (but at least
    LEAST_SAMPLES turns, SLOW_SAMPLES if it is slow). `started` is called once everything is warm. The result holds, for
    each call, its timing, or what it raised.
    """
    runners = [_Runner(call) for call in calls]
    for runner, ms in _run_round(timer, runners, 0):
        runner.pilot_ms = ms
        if runner.slow:
            runner.samples.append(ms)
    for turn in range(WARM_ROUNDS):
        _run_round(timer, [runner for runner in runners if not runner.slow], (turn + 1) % sets)
    started()
    begin, turn = clock(), 0
    share_ms = seconds * 1e3 / max(1, len(runners))
    while any(runner.active for runner in runners):
        turn += 1
        for runner, ms in _run_round(timer, runners, turn % sets):
            runner.samples.append(ms)
        over = clock() - begin >= seconds
        for runner in runners:
            if runner.active:
                runner.stop = _stop(runner, over, share_ms, turn)
    return [runner.error or summarise(runner.samples, runner.stop) for runner in runners]


def _stop(runner: _Runner, over: bool, share_ms: float, turn: int) -> str:
    least = SLOW_SAMPLES if runner.slow else LEAST_SAMPLES
    if len(runner.samples) < least:
        return ""
    if over or sum(runner.samples) >= share_ms:
        return "interval" if precise(runner.samples) else "time limit"
    # Sorting after every single turn would cost the host more than some calls take.
    return "interval" if turn % 8 == 0 and precise(runner.samples) else ""
