"""Timing: intervals that cover, races that interleave and stop, and a device that never waits for its host."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nhabench.timing import (
    LEAST_SAMPLES,
    SLOW_SAMPLES,
    CudaEvents,
    Timing,
    WallClock,
    median_ranks,
    precise,
    race,
    summarise,
)


@given(st.integers(6, 800))
def test_ranks_have_the_confidence_and_no_narrower_pair_has(count: int) -> None:
    low, high = median_ranks(count)
    assert low + high == count - 1

    def coverage(rank: int) -> float:
        outside = sum(math.comb(count, hits) for hits in range(rank + 1))
        return 1 - 2 * outside / 2**count

    assert coverage(low) >= 0.95
    assert coverage(low + 1) < 0.95


def test_few_samples_span_all_of_them() -> None:
    assert [median_ranks(count) for count in (1, 2, 5)] == [(0, 0), (0, 1), (0, 4)]
    with pytest.raises(ValueError, match="count: expected an integer >= 1, got 0"):
        median_ranks(0)


@pytest.mark.parametrize("count", [8, 25, 60])
def test_the_interval_covers_the_true_median(count: int) -> None:
    generator = random.Random(20260102)
    trials, covered = 2000, 0
    for _ in range(trials):
        timing = summarise([generator.lognormvariate(0, 0.3) for _ in range(count)])
        covered += timing.low_ms <= 1.0 <= timing.high_ms
    # 95 % or more by construction; 0.9 % is two standard deviations of 2000 trials.
    assert covered / trials >= 0.95 - 0.009


def test_summary_of_known_samples() -> None:
    timing = summarise([float(value) for value in range(100, 0, -1)], "interval")
    assert (timing.median_ms, timing.min_ms, timing.p95_ms, timing.samples) == (50.5, 1.0, 95.0, 100)
    assert timing.low_ms < 50.5 < timing.high_ms
    assert summarise([3.0, 1.0, 2.0]).median_ms == 2.0


def test_precise_needs_an_interval() -> None:
    assert not precise([1.0] * 5)
    assert precise([1.0] * 6)
    assert not precise([1.0, 1.1] * 20)


class FakeTime:
    """A timer and a clock on which each call takes what it says."""

    name = "fake"

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, milliseconds: Callable[[], float]) -> Callable[[int], object]:
        def run(inputs: int) -> object:
            self.order.append(f"{name}{inputs}")
            self.now += milliseconds() / 1e3
            return None

        return run

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        times = []
        for call in calls:
            before = self.now
            call()
            times.append((self.now - before) * 1e3)
        return times


def test_contenders_take_turns_and_inputs_rotate() -> None:
    time = FakeTime()
    race([time.call("a", lambda: 1.0), time.call("b", lambda: 2.0)], time, sets=3, seconds=1.0, clock=time)
    assert time.order[:8] == ["a0", "b0", "a1", "b1", "a2", "b2", "a1", "b1"]
    assert [name[0] for name in time.order] == ["a", "b"] * (len(time.order) // 2)
    assert {name[1] for name in time.order} == {"0", "1", "2"}


def test_a_steady_call_stops_by_its_interval_and_a_noisy_one_by_time() -> None:
    time, generator = FakeTime(), random.Random(1)
    steady, noisy = race(
        [time.call("s", lambda: 1.0), time.call("n", lambda: generator.uniform(0.5, 1.5))],
        time, sets=1, seconds=0.2, clock=time,
    )  # fmt: skip
    assert isinstance(steady, Timing)
    assert isinstance(noisy, Timing)
    assert (steady.stop, steady.samples) == ("interval", 8)
    assert steady.median_ms == pytest.approx(1.0)
    assert noisy.stop == "time limit"
    assert time.now < 0.3


def test_a_slow_call_is_repeated_a_few_times_only() -> None:
    time = FakeTime()
    slow, medium = race(
        [time.call("s", lambda: 400.0), time.call("m", lambda: 60.0)], time, sets=1, seconds=0.1, clock=time
    )
    assert isinstance(slow, Timing)
    assert isinstance(medium, Timing)
    assert slow.samples == SLOW_SAMPLES
    assert medium.samples == LEAST_SAMPLES
    assert time.order.count("s0") == SLOW_SAMPLES  # its pilot is its first sample


def test_what_a_call_raises_is_its_result_and_the_others_go_on() -> None:
    time = FakeTime()
    turns = iter(range(100))

    def fails() -> float:
        if next(turns) == 4:
            raise MemoryError("gone")
        return 1.0

    started: list[float] = []
    failed, fine = race(
        [time.call("f", fails), time.call("a", lambda: 1.0)],
        time, sets=1, seconds=1.0, clock=time, started=lambda: started.append(time.now),
    )  # fmt: skip
    assert isinstance(failed, MemoryError)
    assert isinstance(fine, Timing)
    assert len(started) == 1


def test_the_wall_clock_measures_milliseconds() -> None:
    import time

    (slept,) = WallClock().round([lambda: time.sleep(0.02)])
    assert 19 < slept < 20_000


class FakeCuda:
    """A host and a device that works behind it: what CUDA events would show on such a pair."""

    cycles_per_ms = 1000.0

    def __init__(self) -> None:
        self.host, self.device = 0.0, 0.0  # in ms

    def work(self, device_ms: float, host_ms: float = 0.0) -> None:
        self.host += host_ms
        self.device = max(self.device, self.host) + device_ms

    def _sleep(self, cycles: int) -> None:
        self.work(cycles / self.cycles_per_ms)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def clock(self) -> float:
        return self.host / 1e3

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, 0.0

    def record(self) -> None:
        self.cuda.work(0.0)
        self.at = self.cuda.device

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_events_show_the_device_and_not_the_host_that_is_slower() -> None:
    cuda = FakeCuda()
    timer = CudaEvents(cuda, cuda.clock)
    calls = [lambda: cuda.work(1.0, host_ms=5.0), lambda: cuda.work(0.2, host_ms=3.0)]
    assert timer.round(calls)[0] > 2.0  # the first round does not know the host yet: the device waits inside a call
    for _ in range(3):
        assert timer.round(calls) == pytest.approx([1.0, 0.2])


def test_the_head_start_has_a_limit() -> None:
    cuda = FakeCuda()
    timer = CudaEvents(cuda, cuda.clock)
    timer.round([lambda: cuda.work(1.0, host_ms=5000.0)])
    before = cuda.device
    timer.round([lambda: cuda.work(1.0)])
    assert cuda.device - before <= 21.0 + 1e-6
