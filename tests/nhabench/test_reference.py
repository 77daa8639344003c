"""The judge: distances, tolerances that follow from the definition, references that are checked themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nha_kernels import native_hybrid_attention
from nhabench import reference
from nhabench.check import check_against
from nhabench.implementations import attend
from nhabench.inputs import Inputs, make_inputs
from nhabench.reference import BLOCK, Distance, Judge, allowed, distance, in_pieces, slack
from nhabench.workloads import Case, Workload

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 96)


def carried(inputs: Inputs, segment: int, back: int) -> torch.Tensor:
    """chunked, segment by segment, with a state that knows only the last `back` segments (0: no state at all)."""
    window, length = inputs.case.workload.window, inputs.q.shape[1]

    def part(low: int, high: int) -> list[torch.Tensor]:
        return [x[:, low:high] for x in (inputs.q, inputs.k, inputs.v, inputs.g)]

    outputs = []
    for low in range(0, length, segment):
        state, first = None, max(0, low - back * segment)
        if first < low:
            state = native_hybrid_attention(*part(first, low), window, backend="chunked", output_final_state=True)[1]
        outputs.append(
            native_hybrid_attention(*part(low, low + segment), window, backend="chunked", initial_state=state)[0]
        )
    return torch.cat(outputs, 1)


def test_a_call_that_forgets_the_rotary_embedding_is_wrong(tiny: Workload) -> None:
    inputs = make_inputs(Case(tiny.changed(rope=True), 1, 700, "float32"), CPU)
    judge = Judge(inputs.case.workload, "float32", CPU)
    truth, name = judge.reference(inputs)
    assert check_against(attend(inputs, "chunked"), truth, name, judge.tolerance).correct
    forgot = attend(dataclasses.replace(inputs, rope=None), "chunked")
    assert not check_against(forgot, truth, name, judge.tolerance).correct


def test_distance_of_a_known_error() -> None:
    truth = torch.ones(2, 3 * BLOCK, 2, 4, dtype=torch.float64)
    o = truth.clone()
    o[1, :BLOCK] += 0.5  # one of six blocks
    measured = distance(o, truth)
    assert measured.worst == pytest.approx(0.5)
    assert measured.total == pytest.approx(0.5 / 6**0.5)
    assert distance(truth, truth) == Distance(0.0, 0.0)


def test_one_wrong_row_of_a_long_output_is_seen() -> None:
    truth = torch.randn(1, 256 * BLOCK, 1, 8, dtype=torch.float64)
    o = truth.clone()
    o[0, 5000] = 0
    measured = distance(o, truth)
    assert measured.total < 0.02
    assert measured.worst > 0.05


def test_nan_and_a_wrong_shape_are_never_right() -> None:
    truth = torch.ones(1, 100, 2, 4, dtype=torch.float64)
    o = truth.clone()
    o[0, 99, 1, 3] = torch.nan
    assert not distance(o, truth).within(Distance(torch.inf, torch.inf))
    with pytest.raises(ValueError, match=r"o: expected shape \(1, 100, 2, 4\), got \(1, 99, 2, 4\)"):
        distance(o[:, 1:], truth)


def test_the_tolerance_is_twice_the_definitions_own_error(tiny: Workload) -> None:
    assert slack(tiny) == pytest.approx((16 + 8 + 8) * 2**-23)
    assert allowed(Distance(0.25, 0.5), tiny) == Distance(0.5 + slack(tiny), 1.0 + slack(tiny))


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("bfloat16", 1e-3, 3e-2), ("float16", 1e-4, 5e-3), ("float32", 0, 2e-5)]
)
def test_the_judge_follows_the_precision(tiny: Workload, dtype: str, least: float, most: float) -> None:
    judge = Judge(tiny, dtype, CPU)
    (tolerance,) = judge.tolerance
    assert least < tolerance.total <= tolerance.worst < most
    assert judge.chunked_is_exact


def test_the_right_output_passes_and_a_shifted_window_does_not(tiny: Workload) -> None:
    judge = Judge(tiny, "float32", CPU)
    inputs = make_inputs(Case(tiny, 1, 100, "float32"), CPU)
    truth, _ = judge.reference(inputs)
    assert distance(attend(inputs, "chunked"), truth).within(judge.tolerance[0])
    shifted = Inputs(Case(tiny.changed(window=9), 1, 100, "float32"), inputs.q, inputs.k, inputs.v, inputs.g)
    assert not distance(attend(shifted, "chunked"), truth).within(judge.tolerance[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_carry_that_is_dropped_or_reaches_one_segment_only_is_seen(dtype: str) -> None:
    workload = Workload("head", q_heads=4, kv_heads=1, head_dim=64, slots=64, window=64)
    judge = Judge(workload, dtype, CPU)
    inputs = make_inputs(Case(workload, 1, 2048, dtype), CPU)
    truth, _ = judge.reference(inputs)

    def right(o: torch.Tensor) -> bool:
        return check_against(o, truth, "chunked float64", judge.tolerance).correct

    assert right(carried(inputs, 1024, back=1))
    assert right(carried(inputs, 512, back=3))
    assert not right(carried(inputs, 1024, back=0))
    assert not right(carried(inputs, 512, back=0))
    assert not right(carried(inputs, 512, back=1))  # a state that was not carried on: what it misses is 512 tokens old


def test_large_cases_are_judged_by_chunked_float64(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(tiny, "float32", CPU)
    monkeypatch.setattr(reference, "NAIVE_LENGTH", 50)
    large, small = (make_inputs(Case(tiny, 2, length, "float32"), CPU) for length in (30, 25))
    truth, name = judge.reference(large)
    assert (name, truth.dtype) == ("chunked float64", torch.float64)
    assert distance(attend(large.to(torch.float64), "naive"), truth).worst < 1e-12
    assert judge.reference(small)[1] == "naive float64"


def test_a_chunked_that_is_wrong_is_no_reference(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(inputs: Inputs, backend: str) -> torch.Tensor:
        return attend(inputs, "naive") * (1 + 1e-9 * (backend == "chunked"))

    monkeypatch.setattr(reference, "attend", wrong)
    judge = Judge(tiny, "float32", CPU)
    with pytest.raises(ArithmeticError, match=r"chunked in float64 is 1\.0e-09 away from naive"):
        judge.reference(make_inputs(Case(tiny, 1, 600, "float32"), CPU))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_pieces_are_one_sequence(backend: str, rope: bool, tiny: Workload) -> None:
    inputs = make_inputs(tiny.changed(rope=rope).case(150, "float32"), CPU)
    whole = attend(inputs.to(torch.float64), backend)
    pieces = list(in_pieces(inputs, backend, 64))
    assert [piece.shape[1] for piece in pieces] == [64, 64, 22]
    assert torch.allclose(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


def test_a_long_reference_is_made_in_pieces_and_is_the_same(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Case(tiny, 2, 600, "float32"), CPU)
    judge = Judge(tiny, "float32", CPU)
    whole, name = judge.reference(inputs)
    sizes: list[int] = []
    real = reference.native_hybrid_attention

    def watched(q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(q.shape[1])
        return real(q, *arguments, **options)

    monkeypatch.setattr(reference, "PIECE", 256)
    monkeypatch.setattr(reference, "native_hybrid_attention", watched)
    pieces, _ = judge.reference(inputs)
    assert (name, sizes) == ("chunked float64", [256, 256, 88] * 2)
    assert distance(pieces, whole).worst < 1e-12


@pytest.mark.parametrize("length", [1, 64, 150])
def test_a_distance_does_not_hang_on_how_much_is_read_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = torch.randn(2, length, 4, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    o = truth.float()
    o[1, -1] += 0.5
    whole = distance(o, truth)
    parts = [truth[1, start : start + BLOCK] for start in range(0, length, BLOCK)]
    assert whole.worst == pytest.approx(float((o[1, -1] - truth[1, -1]).norm() / parts[-1].norm()), rel=1e-5)
    monkeypatch.setattr(reference, "ROOM", 1)
    apart = distance(o, truth)
    assert (apart.total, apart.worst) == pytest.approx((whole.total, whole.worst), rel=1e-12)
