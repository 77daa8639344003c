"""Contenders that cheat: each is caught, and costs the others nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nhabench import guard, racing, reference
from nhabench import inputs as inputs_of
from nhabench.baselines import masked_softmax
from nhabench.bench import make_lab
from nhabench.cheats import (
    CHEATS,
    CUDA_CHEATS,
    Cheat,
    knows_one_set,
    plant,
    slows_the_clock,
    works_when_watched,
    writes,
)
from nhabench.contender import Contender
from nhabench.environment import read_environment
from nhabench.floors import Ceilings
from nhabench.gpu import GpuWatch
from nhabench.guard import AN_INPUT, REMEMBERED, SPOILT, UNCHECKED, WROTE, fingerprint, mark, marks, out_of_turn, refill
from nhabench.implementations import attend
from nhabench.inputs import Inputs, make_inputs
from nhabench.lab import Lab
from nhabench.measure import measure_case
from nhabench.results import Row
from nhabench.timing import WallClock
from nhabench.workloads import Case, Workload

CPU = torch.device("cpu")


Measure = Callable[..., dict[str, Row]]


@pytest.fixture
def measure(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Contenders at one length of the tiny workload: their rows by name."""
    monkeypatch.setattr(reference, "SMALL_LENGTH", 32)

    def run(*contenders: Contender, length: int = 100, rope: bool = False) -> dict[str, Row]:
        watch = GpuWatch(CPU)
        lab = Lab(CPU, WallClock(), watch, read_environment(CPU, watch, ""), Ceilings(1, 1), seconds=0.02)
        with torch.no_grad():
            case = Case(tiny.changed(rope=rope), 1, length, "float32")
            rows = measure_case(lab, case, contenders, lambda step: None)
        return {row.implementation: row for row in rows}

    return run


def right(inputs: Inputs) -> torch.Tensor:
    return attend(inputs, "chunked")


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
def test_cheats_get_no_time_and_cost_the_others_nothing(cheat: Cheat, measure: Measure, contenders: Any) -> None:
    rows = measure(contenders.nha("cheat", cheat.make(right)), contenders.nha("honest"))
    assert (rows["cheat"].status, rows["cheat"].median_ms) == ("incorrect", None)
    if cheat.make is not works_when_watched:  # what lies in its output is another thing each time
        assert rows["cheat"].note == cheat.note
    assert rows["honest"].status == "ok"


def test_a_clock_that_is_slowed_down_slows_no_time_down(
    measure: Measure, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", real)  # puts it back afterwards
    rows = measure(contenders.nha("cheat", slows_the_clock(right)), contenders.nha("honest"))
    assert time.perf_counter is not real
    assert rows["cheat"].status == rows["honest"].status == "ok"
    assert rows["cheat"].median_ms > 0.4 * rows["honest"].median_ms  # type: ignore[operator]


@pytest.mark.parametrize("what", ["a table", "the rotated keys"])
def test_what_comes_with_a_rotary_embedding_is_guarded_too(what: str, measure: Measure, contenders: Any) -> None:
    def writing(inputs: Inputs) -> torch.Tensor:
        o = right(inputs)
        assert inputs.rope is not None
        x = inputs.rope[0] if what == "a table" else inputs.rotated.k
        x.copy_(x.flip(0 if what == "a table" else 1))
        return o

    def rotated(inputs: Inputs) -> torch.Tensor:
        return masked_softmax(inputs, 100)

    rows = measure(
        contenders.full("before", rotated), contenders.nha("cheat", writing), contenders.nha("honest"),
        contenders.full("after", rotated), rope=True,
    )  # fmt: skip
    assert rows["cheat"].note == WROTE
    assert {name: row.status for name, row in rows.items() if name != "cheat"} == {
        "before": "ok", "honest": "ok", "after": "ok",
    }  # fmt: skip


def test_who_writes_and_then_fails_spoils_nothing(measure: Measure, contenders: Any) -> None:
    writing = writes("k")(right)

    def fails(inputs: Inputs) -> torch.Tensor:
        writing(inputs)
        raise RuntimeError("it broke")

    rows = measure(contenders.nha("cheat", fails), contenders.nha("honest"))
    assert rows["cheat"].status == "failed"
    assert rows["honest"].status == "ok"


def test_who_writes_unseen_costs_all_their_times(measure: Measure, contenders: Any) -> None:
    def once() -> Callable[[Inputs], torch.Tensor]:
        calls = iter(range(10**6))

        def run(inputs: Inputs) -> torch.Tensor:
            o = right(inputs)
            if next(calls) == 5:
                inputs.g.zero_()
            return o

        return run

    rows = measure(contenders.nha("cheat", once()), contenders.nha("honest"))
    assert {row.note for row in rows.values()} == {SPOILT}


def test_who_knows_one_set_of_inputs_is_caught_where_there_are_more(
    measure: Measure, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_of, "set_count", lambda case, l2_bytes: 4)
    # With as many contenders as sets each would meet one of them only.
    rows = measure(contenders.nha("cheat", knows_one_set(right)), *(contenders.nha(name) for name in "ab"))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", UNCHECKED)
    assert (rows["a"].status, rows["b"].status, rows["a"].input_sets) == ("ok", "ok", 4)


def test_a_baseline_that_works_while_it_is_bound_is_caught(measure: Measure, contenders: Any) -> None:
    def early(inputs: Inputs) -> Callable[[], torch.Tensor]:
        o = inputs.q * 2
        return lambda: o

    cheat = dataclasses.replace(contenders.full("cheat", right), bind=early)
    rows = measure(cheat, contenders.full("honest", lambda inputs: inputs.q * 2))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", REMEMBERED)
    assert rows["honest"].status == "ok"


def test_an_output_that_is_an_input_is_none(measure: Measure, contenders: Any) -> None:
    rows = measure(contenders.full("cheat", lambda inputs: inputs.q[:, :]), contenders.nha("honest"))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", AN_INPUT)
    assert rows["honest"].status == "ok"


def test_an_error_while_looking_again_costs_the_others_nothing(
    measure: Measure, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = racing.refill, iter([True])

    def refill(inputs: Inputs, seed: int) -> None:
        real(inputs, seed)
        if next(fails, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(racing, "refill", refill)
    rows = measure(contenders.nha("unlucky"), contenders.nha("honest"))
    assert (rows["unlucky"].status, rows["honest"].status) == ("out of memory", "ok")


def test_a_baseline_that_idles_is_caught_too(measure: Measure, contenders: Any) -> None:
    calls = iter(range(10**6))

    def idles(inputs: Inputs) -> torch.Tensor:
        return inputs.q.clone() if next(calls) < 3 else torch.zeros_like(inputs.q)

    rows = measure(contenders.full("cheat", idles), contenders.full("honest", lambda inputs: inputs.q * 2))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", UNCHECKED)
    assert rows["honest"].status == "ok"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 63, 200])
def test_marks_tell_other_outputs_from_rounding(length: int, dtype: str) -> None:
    case = Case(Workload("tiny", 4, 2, 16, 8, 8, tokens=1), 2, length, dtype)
    inputs = make_inputs(case, CPU)
    o, untouched = right(inputs), fingerprint(inputs)
    before = marks(o)
    assert before.distance(marks(o * (1 + torch.finfo(torch.bfloat16).eps))) < 0.02
    refill(inputs, 1)
    assert fingerprint(inputs) != untouched
    assert before.distance(marks(right(inputs))) > 0.5
    refill(inputs, 0)
    assert fingerprint(inputs) == untouched
    o[-1, -1, -1, -1] = torch.nan
    assert not before.distance(marks(o)) <= 1e9


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and events are a GPU's")


@needs_cuda
def test_every_cheat_on_a_gpu_is_caught_or_of_no_use() -> None:
    case = Workload("small", 16, 4, 64, 64, 64).case(2048, "bfloat16")
    with torch.no_grad():
        planted = plant(make_lab(torch.device("cuda", 0), torch.bfloat16, "", 0.1), case, "triton")
    assert [(one.name, one.told) for one in planted if not one.caught] == []
    assert {cheat.name for cheat in CUDA_CHEATS} < {one.name for one in planted}


@needs_cuda
def test_honest_work_on_a_gpu_is_in_turn() -> None:
    case = Workload("small", 16, 4, 64, 64, 64).case(2048, "bfloat16")
    inputs = make_inputs(case, torch.device("cuda", 0))
    side = torch.cuda.Stream()

    def forked_and_joined() -> torch.Tensor:
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            o = attend(inputs, "triton")
        here.wait_stream(side)
        return o

    def waits() -> torch.Tensor:
        torch.cuda.synchronize()
        return attend(inputs, "triton")

    known = marks(attend(inputs, "triton"))
    for call in (lambda: attend(inputs, "triton"), forked_and_joined, waits):
        for _ in range(10):
            assert not out_of_turn(call, inputs.v, known)
    assert fingerprint(inputs) == fingerprint(make_inputs(case, inputs.q.device))


@pytest.mark.parametrize("length", [1, 64, 200])
def test_marks_do_not_hang_on_how_much_is_read_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    o = torch.randn(2, length, 4, 16, generator=torch.Generator().manual_seed(3))
    whole = mark(o)
    assert whole.projections.shape == (-(-length // guard.BLOCK), 2, guard.VECTORS)
    assert whole.norm == pytest.approx(float(o.norm()))
    monkeypatch.setattr(guard, "ROOM", 1)
    assert torch.allclose(mark(o).projections, whole.projections, rtol=0, atol=1e-4)
    in_blocks = mark(o)
    o[1, -1] += 1.0  # of the last block of one sequence only
    changed = (mark(o).projections != in_blocks.projections).any(-1).nonzero().tolist()
    assert changed == [[len(whole.projections) - 1, 1]]
