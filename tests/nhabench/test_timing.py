"""Timing: intervals that cover, races that interleave and stop, and a device that never waits for its host."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nhabench.timing import (
    LEAST_SAMPLES,
    LONGEST_HEAD_START_MS,
    CudaEvents,
    Sample,
    Stopwatch,
    Timing,
    WallClock,
    Warm,
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


def test_few_samples_have_no_interval() -> None:
    assert median_ranks(LEAST_SAMPLES) == (0, LEAST_SAMPLES - 1)
    with pytest.raises(ValueError, match="count: expected an integer >= 6, got 5"):
        median_ranks(5)
    for count in (1, 2, 5):
        timing = summarise([1.0] * count)
        assert (timing.median_ms, timing.low_ms, timing.high_ms) == (1.0, None, None)
    assert summarise([1.0] * 6).low_ms == 1.0
    with pytest.raises(ValueError, match="samples: expected at least one"):
        summarise([])


@pytest.mark.parametrize("count", [8, 25, 60])
def test_the_interval_covers_the_true_median(count: int) -> None:
    generator = random.Random(20260102)
    trials, covered = 2000, 0
    for _ in range(trials):
        timing = summarise([generator.lognormvariate(0, 0.3) for _ in range(count)])
        assert timing.low_ms is not None
        assert timing.high_ms is not None
        covered += timing.low_ms <= 1.0 <= timing.high_ms
    # 95 % or more by construction; 0.9 % is two standard deviations of 2000 trials.
    assert covered / trials >= 0.95 - 0.009


def test_summary_of_known_samples() -> None:
    timing = summarise([float(value) for value in range(100, 0, -1)], "interval")
    assert (timing.median_ms, timing.min_ms, timing.p95_ms, timing.samples) == (50.5, 1.0, 95.0, 100)
    assert timing.low_ms is not None
    assert timing.high_ms is not None
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

    def stopwatch(self) -> Stopwatch:
        return self.time

    def time(self, call: Callable[[], object]) -> Sample:
        before = self.now
        call()
        return Sample((self.now - before) * 1e3)


@pytest.mark.parametrize(("contenders", "sets"), [(2, 3), (2, 2), (3, 3), (4, 2), (1, 2), (5, 8)])
def test_contenders_take_turns_and_none_gets_the_inputs_of_its_predecessor(contenders: int, sets: int) -> None:
    time = FakeTime()
    names = "abcde"[:contenders]
    race([time.call(name, lambda: 1.0) for name in names], time, sets=sets, seconds=1.0, clock=time)
    assert [turn[0] for turn in time.order] == list(names) * (len(time.order) // contenders)
    inputs = [int(turn[1]) for turn in time.order]
    # Every set is used again only after all the others, also from one round to the next.
    assert inputs == [index % sets for index in range(len(inputs))]


def test_inputs_rotate_when_a_contender_has_left() -> None:
    time, generator = FakeTime(), random.Random(2)
    noisy = [time.call(name, lambda: generator.uniform(0.5, 1.5)) for name in "ac"]
    race([noisy[0], time.call("b", lambda: 1.0), noisy[1]], time, sets=2, seconds=0.2, clock=time)
    assert {turn[0] for turn in time.order[-10:]} == {"a", "c"}
    assert all(before[1] != after[1] for before, after in pairwise(time.order))


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


def test_a_slow_call_is_repeated_as_often_as_an_interval_needs() -> None:
    time = FakeTime()
    slow, medium = race(
        [time.call("s", lambda: 400.0), time.call("m", lambda: 60.0)], time, sets=1, seconds=0.1, clock=time
    )
    assert isinstance(slow, Timing)
    assert isinstance(medium, Timing)
    assert slow.samples == medium.samples == LEAST_SAMPLES == 6
    assert time.order.count("s0") == LEAST_SAMPLES  # its pilot is its first sample
    assert slow.low_ms == pytest.approx(400.0)


def test_slow_calls_do_not_use_up_the_time_of_the_others() -> None:
    time, generator = FakeTime(), random.Random(3)
    fast, slow = race(
        [time.call("f", lambda: generator.uniform(0.5, 1.5)), time.call("s", lambda: 90.0)],
        time, sets=1, seconds=0.1, clock=time,
    )  # fmt: skip
    assert isinstance(fast, Timing)
    assert isinstance(slow, Timing)
    assert slow.samples == LEAST_SAMPLES
    assert fast.samples > 40  # of about 1 ms, in its 50


class Lateness(FakeTime):
    """Every so many samples is late, and ten times as long for it."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.count, self.every = 0, every

    def time(self, call: Callable[[], object]) -> Sample:
        self.count += 1
        late = self.count % self.every == 0
        if late:
            self.now += 9e-3
        return Sample(super().time(call).ms * (10 if late else 1), late)


@pytest.mark.parametrize("every", [3, 5, 7])
def test_late_samples_are_left_out_where_there_are_enough_others(every: int) -> None:
    time = Lateness(every)
    (timing,) = race([time.call("a", lambda: 1.0)], time, sets=1, seconds=0.05, clock=time)
    assert isinstance(timing, Timing)
    assert timing.samples >= LEAST_SAMPLES
    assert timing.left_out > 0
    assert (timing.high_ms, timing.late) == (pytest.approx(1.0), 0)
    assert not timing.includes_host


def test_a_call_that_is_always_late_is_timed_all_the_same() -> None:
    time = Lateness(1)
    (timing,) = race([time.call("a", lambda: 1.0)], time, sets=1, seconds=0.05, clock=time)
    assert isinstance(timing, Timing)
    assert (timing.left_out, timing.late) == (0, timing.samples)
    assert timing.includes_host


def test_a_race_that_takes_far_too_long_ends_without_an_interval() -> None:
    time = FakeTime()
    (slow,) = race([time.call("s", lambda: 11_000.0)], time, sets=1, seconds=2.0, clock=time)
    assert isinstance(slow, Timing)
    assert (slow.samples, slow.median_ms) == (4, pytest.approx(11_000.0))  # 33 s after its pilot
    assert (slow.low_ms, slow.high_ms, slow.stop) == (None, None, "time limit")


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


def test_what_the_timer_raises_ends_that_contender_only() -> None:
    """An asynchronous fault of the device shows when it is waited for, after the call itself has returned."""

    class Faulty(FakeTime):
        def time(self, call: Callable[[], object]) -> Sample:
            sample = super().time(call)
            if self.order[-1].startswith("f"):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return sample

    time = Faulty()
    failed, fine = race(
        [time.call("f", lambda: 1.0), time.call("a", lambda: 1.0)], time, sets=1, seconds=1.0, clock=time
    )
    assert isinstance(failed, RuntimeError)
    assert isinstance(fine, Timing)
    assert time.order.count("f0") == 1


def test_an_error_lets_go_of_what_its_call_held() -> None:
    class Big:
        pass

    held: list[weakref.ref[Big]] = []

    def fails(inputs: int) -> object:
        big = Big()
        held.append(weakref.ref(big))
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise MemoryError("outer") from error

    time = FakeTime()
    (failed,) = race([fails], time, sets=1, seconds=1.0, clock=time)
    assert isinstance(failed, MemoryError)
    assert (failed.__traceback__, failed.__cause__, failed.__context__) == (None, None, None)
    assert held[0]() is None


def test_most_samples_late_is_host_time() -> None:
    assert not summarise([1.0] * 6, late=3).includes_host
    assert summarise([1.0] * 6, late=4).includes_host


def test_the_wall_clock_measures_milliseconds() -> None:
    import time

    slept = WallClock().stopwatch()(lambda: time.sleep(0.02))
    assert 19 < slept.ms < 20_000
    assert not slept.late


class FakeCuda:
    """A host and a device that works behind it: what CUDA events would show on such a pair."""

    def __init__(self) -> None:
        self.host, self.device = 0.0, 0.0  # in ms
        self.cycles_per_ms = 1.98e6

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

    def query(self) -> bool:
        return self.at <= self.cuda.host

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def test_events_show_the_device_and_not_the_host_that_is_slower() -> None:
    cuda = FakeCuda()
    timer = CudaEvents(cuda, cuda.clock)
    one, two = timer.stopwatch(), timer.stopwatch()

    def first() -> Sample:
        return one(lambda: cuda.work(1.0, host_ms=5.0))

    def second() -> Sample:
        return two(lambda: cuda.work(0.2, host_ms=3.0))

    assert first().late  # the host is not known yet: the device waits inside the call, which is told
    second()
    for _ in range(3):
        for sample, milliseconds in ((first(), 1.0), (second(), 0.2)):
            assert sample.ms == pytest.approx(milliseconds)
            assert not sample.late


def test_a_call_that_waits_for_the_device_says_so_and_costs_its_neighbour_nothing() -> None:
    cuda = FakeCuda()
    timer = CudaEvents(cuda, cuda.clock)

    def waits() -> None:
        cuda.work(0.5, host_ms=0.2)
        cuda.synchronize()  # as a copy from pageable memory does
        cuda.work(0.5, host_ms=0.7)

    waiting, queued, times = timer.stopwatch(), timer.stopwatch(), []
    for _ in range(20):
        before = cuda.host
        sample = waiting(waits)
        times.append(cuda.host - before)
        assert sample.late
        assert sample.ms == pytest.approx(1.7)  # device and host
        follower = queued(lambda: cuda.work(0.3, host_ms=1.5))
    assert follower == Sample(pytest.approx(0.3), late=False)
    # A host time that holds the sleep is not made into a longer sleep each time.
    assert max(times) < 10


def test_a_host_that_is_late_once_keeps_its_head_start() -> None:
    cuda = FakeCuda()
    watch = CudaEvents(cuda, cuda.clock).stopwatch()
    hosts = [1.0] * 3 + [9.0] + [1.0] * 3  # something else took the core for a moment
    samples = [watch(lambda host=host: cuda.work(0.5, host_ms=host)) for host in hosts]
    assert [sample.late for sample in samples] == [False] * 3 + [True] + [False] * 3
    assert [sample.ms for sample in samples if not sample.late] == pytest.approx([0.5] * 6)


def test_the_head_start_has_a_limit() -> None:
    cuda = FakeCuda()
    watch = CudaEvents(cuda, cuda.clock).stopwatch()
    for _ in range(3):
        assert watch(lambda: cuda.work(1.0, host_ms=5000.0)).late
    before = cuda.device
    watch(lambda: cuda.work(1.0))
    assert cuda.device - before <= LONGEST_HEAD_START_MS + 1.0 + 1e-6


def test_the_sleep_follows_the_clocks() -> None:
    cuda = FakeCuda()
    cuda.cycles_per_ms = 345e3  # idle
    watch = CudaEvents(cuda, cuda.clock).stopwatch()

    def sample() -> tuple[Sample, float]:
        before = cuda.host
        return watch(lambda: cuda.work(0.5, host_ms=4.0)), cuda.host - before

    for _ in range(3):
        sample()
    cuda.cycles_per_ms = 1.98e6  # under load
    assert sample()[0].late  # it slept too short
    sample()
    last, took = sample()
    assert last == Sample(pytest.approx(0.5), late=False)
    assert took == pytest.approx(1.3 * 4.0 + 0.1 + 0.5)


def test_a_warm_call_follows_another_one_of_its_kind() -> None:
    time = FakeTime()
    costs = iter([5.0, 1.0] * 100)  # the first of each pair fetches the inputs
    (timing,) = race([time.call("a", lambda: next(costs))], Warm(time), sets=1, seconds=0.0, clock=time)
    assert isinstance(timing, Timing)
    assert timing.median_ms == pytest.approx(1.0)
    assert Warm(time).name == "fake, warm"


def test_events_that_are_put_in_their_place_show_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    watch = CudaEvents(cuda, cuda.clock).stopwatch()
    for name in ("record", "query", "elapsed_time"):
        monkeypatch.setattr(FakeEvent, name, lambda *_: 0.0)
    for name in ("synchronize", "_sleep", "Event"):
        monkeypatch.setattr(cuda, name, lambda *_, **__: None)
    watch(lambda: cuda.work(0.5))
    assert watch(lambda: cuda.work(0.5)) == Sample(pytest.approx(0.5), late=False)
