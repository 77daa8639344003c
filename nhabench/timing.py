"""How long a call takes: contenders interleaved, until the median is known well enough.

On a GPU the time is the device's own, between two events around each call. On a CPU it is the wall clock.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from statistics import median
from typing import Any, Protocol

import torch

from nhabench.errors import without_frames

CONFIDENCE = 0.95
host_clock = time.perf_counter  # as it is now: a contender could put another one in its place
TARGET = 0.005  # stop when the median's interval is within +-0.5 % of it
AGREE = 0.01  # two timers differ by no more, at long calls
LONG_MS = 0.05  # what is shorter is a few steps of a GPU's clock and of its events, and is not asked so much
WARM_ROUNDS = 2  # for calls that are not slow, beside the pilot
SLOW_MS = 100.0  # a call this long is warm after its pilot, which is its first sample
LEAST_SAMPLES = 6  # with fewer there is no interval of that confidence
LONGEST_RACE_S = 30.0  # after it, fewer will do, without an interval: on a machine that does much else, or too slow
LONGEST_HEAD_START_MS = 20.0  # a host that waits for room in the launch queue must not make the sleep ever longer

TimedCall = Callable[[int], object]  # takes the number of the input set


@dataclass(frozen=True)
class Sample:
    """The milliseconds of one call. late: the host had not queued all of it when the device began, so host time may be
    part of them."""

    ms: float
    late: bool = False


Stopwatch = Callable[[Callable[[], object]], Sample]


class Timer(Protocol):
    """Makes stopwatches. Each contender has its own, which may remember how long its host needs."""

    name: str

    def stopwatch(self) -> Stopwatch:
        """A function that runs a call and times it. It raises what the call raises, and what waiting for it raises."""


class WallClock:
    """Wall-clock time, for calls that have finished when they return (CPU)."""

    name = "wall clock"

    def stopwatch(self) -> Stopwatch:
        """See Timer."""
        return self._time

    def _time(self, call: Callable[[], object]) -> Sample:
        start = host_clock()
        call()
        return Sample((host_clock() - start) * 1e3)


class _HeadStart:
    """How long the device sleeps before a contender's call, by what the host took to queue it the last time.

    A call that itself waits for the device is late however long the sleep is, and its host's time includes the sleep.
    So a late call gets a longer sleep once; if it is late again, it did wait, and the sleep is taken off.
    """

    def __init__(self) -> None:
        self.ms = 2.0
        self._lengthened = False

    def learn(self, host_ms: float, late: bool) -> None:
        """Take in how long the host was at the call just made."""
        waited_ms = self.ms if late and self._lengthened else 0.0
        self._lengthened = late and not self._lengthened
        self.ms = min(LONGEST_HEAD_START_MS, 1.3 * max(0.0, host_ms - waited_ms) + 0.1)


class CudaEvents:
    """Device time between two events around each call.

    An event pair also sees the time that the device waits for the host. So every call has a head start: the device
    sleeps before it, somewhat longer than the host needs to queue it. An event behind the sleep tells whether the
    device woke before everything was queued. The device is idle before each call, so none delays its neighbour.
    """

    name = "cuda events"

    def __init__(self, cuda: Any = torch.cuda, clock: Callable[[], float] = time.perf_counter) -> None:
        self._event, self._clock = partial(cuda.Event, enable_timing=True), clock
        # As they are now: a contender could put others in their place.
        kind = type(self._event())
        self._record, self._query, self._elapsed_time = kind.record, kind.query, kind.elapsed_time
        self._synchronize, self._spin = cuda.synchronize, cuda._sleep
        self._cycles_per_ms = 1e6
        for _ in range(2):  # the first one also loads the kernel
            asleep, awake = self._sleep(2.0)
            self._synchronize()
            self._cycles_per_ms = 2.0 * self._cycles_per_ms / self._elapsed_time(asleep, awake)

    def stopwatch(self) -> Stopwatch:
        """See Timer."""
        return partial(self._time, _HeadStart())

    def _sleep(self, milliseconds: float) -> tuple[Any, Any]:
        """Queue a sleep; the events before and behind it."""
        asleep, awake = self._event(), self._event()
        self._record(asleep)
        self._spin(int(milliseconds * self._cycles_per_ms))
        self._record(awake)
        return asleep, awake

    def _time(self, head_start: _HeadStart, call: Callable[[], object]) -> Sample:
        start, end = self._event(), self._event()
        self._synchronize()
        asleep, awake = self._sleep(head_start.ms)
        begin = self._clock()
        self._record(start)
        call()
        self._record(end)
        late = bool(self._query(awake))
        host_ms = (self._clock() - begin) * 1e3
        self._synchronize()
        # A sleep is counted in cycles: their rate follows the clocks, which rise under load.
        self._cycles_per_ms *= head_start.ms / self._elapsed_time(asleep, awake)
        head_start.learn(host_ms, late)
        return Sample(float(self._elapsed_time(start, end)), late)


class Warm:
    """Another timer's times of a call that follows another one of its kind, whose inputs it finds in the caches."""

    def __init__(self, timer: Timer) -> None:
        self.name = f"{timer.name}, warm"
        self._timer = timer

    def stopwatch(self) -> Stopwatch:
        """See Timer."""
        cold = self._timer.stopwatch()

        def time(call: Callable[[], object]) -> Sample:
            call()
            return cold(call)

        return time


def agree(ms: float, ratio: float) -> bool:
    """Whether two timers' times, ms and ms * ratio, are the same, or both too short for them to be."""
    return ms * max(1.0, ratio) < LONG_MS or abs(ratio - 1) <= AGREE


@lru_cache(maxsize=4096)
def median_ranks(count: int) -> tuple[int, int]:
    """The ranks (from 0) of sorted samples between which the median lies with CONFIDENCE, whatever the distribution.

    Raises ValueError for fewer than LEAST_SAMPLES: not even the widest pair of ranks has that confidence then.
    """
    if count < LEAST_SAMPLES:
        raise ValueError(f"count: expected an integer >= {LEAST_SAMPLES}, got {count}")
    # P(median below the sample of rank r) = P(Binomial(count, 1/2) <= r); leave (1 - CONFIDENCE) / 2 on each side.
    tail, low = 0.0, -1
    while tail <= (1 - CONFIDENCE) / 2:
        low += 1
        log_choose = math.lgamma(count + 1) - math.lgamma(low + 1) - math.lgamma(count - low + 1)
        tail += math.exp(log_choose - count * math.log(2))
    return low - 1, count - low


@dataclass(frozen=True)
class Timing:
    """Summary of the samples of one contender, in milliseconds. `stop`: why there are no more of them.

    low_ms, high_ms: the median's interval, None with too few samples for one. late: how many of them were late.
    left_out: how many late samples were taken beside them, and do not count. all_ms: the samples as they came.
    """

    median_ms: float
    low_ms: float | None
    high_ms: float | None
    min_ms: float
    p95_ms: float
    samples: int
    stop: str
    late: int = 0
    left_out: int = 0
    all_ms: tuple[float, ...] = ()

    @property
    def includes_host(self) -> bool:
        """Whether host time may be part of the median: most samples were late."""
        return 2 * self.late > self.samples


def summarise(samples: Sequence[float], stop: str = "", late: int = 0, left_out: int = 0) -> Timing:
    """Median, its interval, least and 95th percentile. Raises ValueError without samples."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    ordered = sorted(samples)
    low, high = None, None
    if len(ordered) >= LEAST_SAMPLES:
        low, high = (ordered[rank] for rank in median_ranks(len(ordered)))
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return Timing(median(ordered), low, high, ordered[0], p95, len(ordered), stop, late, left_out, tuple(samples))


def precise(samples: Sequence[float]) -> bool:
    """Whether the median's interval lies within +-TARGET of it. Never with so few samples that there is no interval."""
    if len(samples) < LEAST_SAMPLES:
        return False
    timing = summarise(samples)
    if timing.low_ms is None or timing.high_ms is None:
        return False
    return max(timing.high_ms - timing.median_ms, timing.median_ms - timing.low_ms) <= TARGET * timing.median_ms


@dataclass
class _Runner:
    call: TimedCall
    stopwatch: Stopwatch
    clock: Callable[[], float]
    in_time: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    spent_s: float = 0.0  # of this machine's time, whatever the device needed
    pilot_ms: float = 0.0
    stop: str = ""
    error: Exception | None = None
    output: object = None  # of the last call

    @property
    def active(self) -> bool:
        return not self.stop and self.error is None

    @property
    def slow(self) -> bool:
        return self.pilot_ms >= SLOW_MS

    @property
    def taken(self) -> int:
        """Samples so far, of the kind of which there are more."""
        return max(len(self.in_time), len(self.late))

    @property
    def samples(self) -> list[float]:
        """Those that count: late ones, which may hold host time, only where there are not enough others."""
        return self.in_time if len(self.in_time) >= max(LEAST_SAMPLES, len(self.late)) else self.in_time + self.late

    def run(self, inputs: int) -> Sample | None:
        """One call. What it raises, or what shows only when the device is waited for, ends this runner."""

        def call() -> None:
            self.output = self.call(inputs)

        self.output = None  # a call finds as much memory as any other
        begin = self.clock()
        try:
            return self.stopwatch(call)
        except Exception as error:
            self.error = without_frames(error)
            return None
        finally:
            self.spent_s += self.clock() - begin

    def keep(self, sample: Sample | None) -> None:
        if sample is not None:
            (self.late if sample.late else self.in_time).append(sample.ms)

    def timing(self) -> Timing:
        late = len(self.late)
        if self.samples is self.in_time:
            return summarise(self.in_time, self.stop, left_out=late)
        return summarise(self.samples, self.stop, late)


def next_ms(calls: Sequence[Callable[[], object]], timer: Timer) -> Callable[[], float]:
    """What times the next of the calls, one for each input set, and gives its ms; behind the last comes the first."""
    stopwatch, rotated = timer.stopwatch(), itertools.cycle(calls)
    return lambda: stopwatch(next(rotated)).ms


def in_turns(calls: Sequence[Callable[[], object]]) -> TimedCall:
    """Calls, one for each input set, as one that takes the number of the set."""
    return lambda turn: calls[turn]()


def race(
    calls: Sequence[TimedCall],
    timer: Timer,
    sets: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    started: Callable[[], object] = lambda: None,
    after: Callable[[int, int, Any, bool], object] = lambda runner, inputs, output, left: None,
) -> list[Timing | Exception]:
    """Time the calls interleaved, A B C A B C ..., for about `seconds` in all.

    Every call gets the next of the rotated input sets, whoever makes it: none finds the inputs of its predecessor in a
    cache. A contender leaves the race when its median is precise, or when it has had its share of the time (but at
    least LEAST_SAMPLES turns, unless all of that takes longer than LONGEST_RACE_S): so slow ones do not use up the time
    of the others. `started` is called once everything is warm; `after` behind each turn that counts, with the number of
    the call, that of its input set, its output, and whether it was its last turn. The result holds, for each call, its
    timing, or what it raised.
    """
    runners = [_Runner(call, timer.stopwatch(), clock) for call in calls]
    inputs = itertools.cycle(range(sets))
    for runner in runners:
        pilot = runner.run(next(inputs))
        if pilot is not None:
            runner.pilot_ms = pilot.ms
            if runner.slow:
                runner.keep(pilot)
        runner.output = None
    for _ in range(WARM_ROUNDS):
        for runner in runners:
            if runner.active and not runner.slow:
                runner.run(next(inputs))
                runner.output = None
    started()
    begin, turn = clock(), 0
    share_s = seconds / max(1, len(runners))
    for runner in runners:
        runner.spent_s = 0.0
    while any(runner.active for runner in runners):
        turn += 1
        for number, runner in enumerate(runners):
            if not runner.active:
                continue
            its_inputs = next(inputs)
            runner.keep(runner.run(its_inputs))
            least = 1 if clock() - begin >= max(seconds, LONGEST_RACE_S) else LEAST_SAMPLES
            if runner.active and runner.taken >= least:
                runner.stop = _stop(runner, runner.spent_s >= share_s, turn)
            if runner.error is None:
                after(number, its_inputs, runner.output, not runner.active)
            runner.output = None
    return [runner.error or runner.timing() for runner in runners]


def _stop(runner: _Runner, over: bool, turn: int) -> str:
    if over:
        return "interval" if precise(runner.samples) else "time limit"
    # Sorting after every single turn would cost the host more than some calls take.
    return "interval" if turn % 8 == 0 and precise(runner.samples) else ""
