"""The second timer: a call as a CUDA graph, its time beside the first one's, and when the two disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nhabench.bench import make_lab
from nhabench.graphs import Graphs, capture
from nhabench.guard import marks
from nhabench.implementations import attend
from nhabench.inputs import Inputs, make_inputs
from nhabench.lab import Entry
from nhabench.measure import measure_case
from nhabench.racing import second_timer
from nhabench.timers import compare_timers
from nhabench.timing import LONG_MS, Timing, agree, summarise
from nhabench.workloads import Workload

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = Workload("small", 16, 4, 64, 64, 64)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")


@pytest.mark.parametrize(
    ("one_ms", "other_ms", "same"),
    [(1.0, 1.0098, True), (1.0, 1.0102, False), (1.0, 0.9898, False), (0.05, 0.051, False), (0.049, 0.09, True)],
)
def test_timers_agree_within_a_hundredth_where_calls_are_long_enough(
    one_ms: float, other_ms: float, same: bool
) -> None:
    assert agree(one_ms, other_ms) is same
    assert LONG_MS == 0.05


@pytest.fixture
def entry(contenders: Any) -> Entry:
    o = torch.randn(1, 8, 2, 4)
    entry = Entry(contenders.nha("a"), marks=marks(o))
    held = torch.empty_like(o)
    entry.graphs = Graphs([lambda: held.copy_(o)], held)
    return entry


def test_a_graph_that_does_the_work_has_its_time(entry: Entry) -> None:
    second_timer(entry, summarise([2.0] * 6), summarise([2.01] * 6))
    assert (entry.changes, entry.remarks) == ({"graph_ms": 2.01}, [])


@pytest.mark.parametrize(("graph_ms", "told"), [(1.9, "5.0% less"), (2.1, "5.0% more")])
def test_the_row_says_that_the_timers_disagree(graph_ms: float, told: str, entry: Entry) -> None:
    second_timer(entry, summarise([2.0] * 6), summarise([graph_ms] * 6))
    assert entry.changes == {"graph_ms": graph_ms}
    assert entry.remarks == [f"The timers disagree: as a CUDA graph it takes {told}."]


def idle() -> None:
    pass


@pytest.mark.parametrize(
    ("replay", "result", "told"),
    [
        (idle, summarise([2.0] * 6), "Its CUDA graph does not do its work: it has no time."),
        (None, RuntimeError("it broke\nand more"), "Its CUDA graph failed: it broke."),
    ],
)
def test_a_graph_that_does_not_do_the_work_has_no_time(
    replay: Callable[[], None] | None, result: Timing | Exception, told: str, entry: Entry
) -> None:
    assert entry.graphs is not None
    if replay is not None:
        entry.graphs.replays[0] = replay
    second_timer(entry, summarise([2.0] * 6), result)
    assert (entry.changes, entry.remarks) == ({}, [told])


def test_a_cpu_has_one_timer(contenders: Any, tiny: Workload) -> None:
    assert compare_timers([contenders.nha("a")], tiny.case(16, "float32"), CPU, 0.0) == []


@needs_cuda
def test_a_graph_repeats_its_call_and_keeps_the_first_output() -> None:
    case = SHAPE.case(2048, "bfloat16")
    sets = [make_inputs(case, GPU, seed) for seed in range(3)]
    calls = [lambda one=one: attend(one, "triton") for one in sets]
    with torch.no_grad():
        known = [call() for call in calls]
        graphs = capture(calls, torch.cuda.graph_pool_handle())
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
        assert rows[name].graph_ms == pytest.approx(rows[name].median_ms, rel=0.05)
    assert "cannot be captured" in rows["waits"].note
    assert "does not do its work" in rows["idles"].note
    assert rows["waits"].graph_ms is rows["idles"].graph_ms is None


@needs_cuda
def test_the_timers_agree_on_copies() -> None:
    found = compare_timers([], SHAPE.case(2048, "bfloat16"), GPU, 0.5)
    assert [one.call for one in found if not one.agree] == []
    for one, wanted in zip(found, (0.06, 0.25, 1.0), strict=True):
        assert one.events_ms == pytest.approx(wanted, rel=0.3)
