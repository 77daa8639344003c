"""The second timer: a call as a CUDA graph, its time beside the first one's, and when the two disagree."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nhabench import racing
from nhabench.bench import make_lab
from nhabench.compare import Ratio
from nhabench.graphs import Graphs, capture, graph_ratio
from nhabench.guard import WROTE, guarded, marks
from nhabench.implementations import attend
from nhabench.inputs import Inputs, make_inputs
from nhabench.lab import Entry, attempt
from nhabench.measure import measure_case
from nhabench.racing import second_timer
from nhabench.timers import compare_timers
from nhabench.timing import LONG_MS, WARM_ROUNDS, Sample, Stopwatch, WallClock, agree, summarise
from nhabench.workloads import Workload

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = Workload("small", 16, 4, 64, 64, 64)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.mark.parametrize(
    ("ms", "ratio", "same"),
    [(1.0, 1.0098, True), (1.0, 1.0102, False), (1.0, 0.9898, False), (0.05, 1.02, False), (0.04, 1.2, True),
     (0.04, 100.0, False)],
)  # fmt: skip
def test_timers_agree_within_a_hundredth_where_calls_are_long_enough(ms: float, ratio: float, same: bool) -> None:
    assert agree(ms, ratio) is same
    assert LONG_MS == 0.05


def test_the_ratio_is_of_calls_and_graphs_in_turns() -> None:
    order: list[str] = []

    class Machine:
        name = "fake"

        def stopwatch(self) -> Stopwatch:
            def time(call: Callable[[], object]) -> Sample:
                call()
                return Sample(1.9 if order[-1].startswith("graph") else 2.0)

            return time

    def named(name: str) -> Any:
        return lambda: order.append(name)

    graphs = Graphs([named("graph 0"), named("graph 1")], torch.empty(0))
    ratio = graph_ratio([named("call 0"), named("call 1")], graphs, Machine(), 0.0)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.95, 0.95, 0.95))
    turns = order[2 * WARM_ROUNDS :]
    assert turns[:8] == ["call 0", "graph 0", "graph 1", "call 1", "call 0", "graph 0", "graph 1", "call 1"]


class Second:
    """A contender whose calls take 2 ms, and what happens when it is timed a second time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, contenders: Any, tiny: Workload) -> None:
        self.patch = monkeypatch
        self.sets = guarded([make_inputs(tiny.case(16, "float32"), CPU)])
        o = attend(self.sets.inputs[0], "chunked")
        held = torch.empty_like(o)
        self.graphs = Graphs([lambda: held.copy_(o)], held)
        self.entry = Entry(contenders.nha("a"), marks=marks(o))
        monkeypatch.setattr(racing, "capture", lambda calls: self.graphs)

    def __call__(self, ratio: float, late: int = 0) -> Entry:
        self.patch.setattr(racing, "graph_ratio", lambda *_: Ratio(ratio, ratio - 0.002, ratio + 0.003, 20))
        lab: Any = SimpleNamespace(timer=WallClock())
        timing = summarise([2.0] * 6, late=late)
        attempt(lab, self.entry, lambda: second_timer(lab, self.entry, timing, 0.1), self.sets)
        return self.entry


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch, contenders: Any, tiny: Workload) -> Second:
    return Second(monkeypatch, contenders, tiny)


def test_a_graph_that_does_the_work_has_its_ratio(second: Second) -> None:
    entry = second(1.005)
    assert (entry.status, entry.remarks, entry.changes) == ("", [], {"graph_ratio": 1.005})


@pytest.mark.parametrize(
    ("ratio", "told"),
    [(0.95, "disagree: -5.0% as a CUDA graph (-5.2% to -4.7%)"),
     (1.05, "disagree: +5.0% as a CUDA graph (+4.8% to +5.3%)"),
     (1.011, "may disagree: +1.1% as a CUDA graph (+0.9% to +1.4%)")],
)  # fmt: skip
def test_the_row_says_that_the_timers_disagree(ratio: float, told: str, second: Second) -> None:
    entry = second(ratio)
    assert entry.changes == {"graph_ratio": ratio}
    assert entry.remarks == [f"The timers {told}."]


def test_a_graph_that_does_not_do_the_work_has_no_ratio(second: Second) -> None:
    second.graphs.replays[0] = lambda: None
    entry = second(1.0)
    assert (entry.status, entry.changes) == ("", {})
    assert entry.remarks == ["As a CUDA graph it does not do its work."]


def test_a_graph_that_writes_into_inputs_costs_its_contender_the_time_and_others_nothing(second: Second) -> None:
    k = second.sets.inputs[0].k
    before, work = k.clone(), second.graphs.replays[0]

    def writes() -> None:
        work()
        k.copy_(k.flip(1))

    second.graphs.replays[0] = writes
    entry = second(1.0)
    assert (entry.status, entry.note) == ("incorrect", WROTE)
    assert torch.equal(k, before)


def test_what_cannot_be_captured_says_so_and_keeps_its_time(second: Second, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(calls: object) -> Graphs:
        raise RuntimeError("operation not permitted\nand advice")

    monkeypatch.setattr(racing, "capture", refuses)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    entry = second(1.0)
    assert (entry.status, entry.changes) == ("", {})
    assert entry.remarks == ["It cannot be timed as a CUDA graph: operation not permitted"]


def test_a_graph_without_room_beside_its_calls_costs_no_time(second: Second, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    second.graphs.replays[0] = no_memory
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    entry = second(1.0)
    assert (entry.status, entry.changes) == ("", {})
    assert entry.remarks == ["It cannot be timed as a CUDA graph: CUDA out of memory."]


def test_nobody_says_that_timers_disagree_where_one_of_them_shows_the_host(second: Second) -> None:
    entry = second(0.5, late=6)
    assert (entry.changes, entry.remarks) == ({"graph_ratio": 0.5}, [])


def test_a_cpu_has_one_timer(contenders: Any, tiny: Workload) -> None:
    assert compare_timers([contenders.nha("a")], tiny.case(16, "float32"), CPU, 0.0) == []


@needs_cuda
def test_a_graph_repeats_its_call_and_keeps_the_first_output() -> None:
    case = SHAPE.case(2048, "bfloat16")
    sets = [make_inputs(case, GPU, seed) for seed in range(3)]
    calls = [lambda one=one: attend(one, "triton") for one in sets]
    with torch.no_grad():
        known = [call() for call in calls]
        graphs = capture(calls)
        graphs.o.fill_(torch.nan)
        graphs.replays[1]()
        graphs.replays[2]()
        assert graphs.o.isnan().all()
        graphs.replays[0]()
    assert torch.equal(graphs.o, known[0])


@needs_cuda
def test_what_cannot_be_captured_is_timed_all_the_same_and_costs_the_others_nothing(contenders: Any) -> None:
    def waits(inputs: Inputs) -> torch.Tensor:
        o = attend(inputs, "triton")
        o.sum().item()
        return o

    def idles_in_graphs(inputs: Inputs) -> torch.Tensor:
        return torch.empty_like(inputs.q) if torch.cuda.is_current_stream_capturing() else attend(inputs, "triton")

    named = {"before": None, "waits": waits, "idles": idles_in_graphs, "after": None}
    racing = [contenders.nha(name, run or (lambda inputs: attend(inputs, "triton"))) for name, run in named.items()]
    with torch.no_grad():
        lab = make_lab(GPU, torch.bfloat16, "", 0.2, warm=True)
        rows = {row.implementation: row for row in measure_case(lab, SHAPE.case(2048, "bfloat16"), racing, print)}
    assert {row.status for row in rows.values()} == {"ok"}
    assert all(row.warm_ms for row in rows.values())
    for name in ("before", "after"):
        assert rows[name].graph_ratio == pytest.approx(1.0, abs=0.05)
    assert "cannot be timed as a CUDA graph" in rows["waits"].note
    assert "does not do its work" in rows["idles"].note
    assert rows["waits"].graph_ratio is rows["idles"].graph_ratio is None


@needs_cuda
def test_a_failed_capture_is_over_for_the_allocator_too() -> None:
    def waits() -> torch.Tensor:
        return torch.ones(2**20, device=GPU).sum().cpu()

    for _ in range(3):
        with pytest.raises(RuntimeError):
            capture([waits])
    torch.cuda.empty_cache()
    _, whole = torch.cuda.mem_get_info()
    room = 2**30  # of this process: other tests may use the GPU meanwhile
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / whole)
        cached = [torch.empty(room // 4, dtype=torch.uint8, device=GPU) for _ in range(3)]
        del cached
        # There is room for it only when cached blocks are given back.
        assert torch.empty(room // 2 + room // 8, dtype=torch.uint8, device=GPU).numel() > room // 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@needs_cuda
def test_copies_are_timed_by_both_timers() -> None:
    found = compare_timers([], SHAPE.case(2048, "bfloat16"), GPU, 0.5)
    for one, wanted in zip(found, (0.06, 0.25, 1.0), strict=True):
        assert one.events_ms is not None, one.note
        # Loose, as other tests may use the GPU meanwhile: how far they agree is for `selftest` to measure.
        assert wanted / 2 < one.events_ms < wanted * 4
        assert one.ratio == pytest.approx(1.0, abs=0.5)
