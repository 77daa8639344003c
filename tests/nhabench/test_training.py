"""Training: gradients are checked one by one, timed as they were checked, and never mixed with forward passes."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nha_kernels import flash_window
from nhabench import baselines as baselines_module
from nhabench import floors, guard, reference
from nhabench.baselines import baselines, blocked_window, linear_direct
from nhabench.bench import all_contenders, make_lab
from nhabench.cheats import ahead
from nhabench.check import check_baseline
from nhabench.contender import Contender, Unsupported
from nhabench.environment import read_environment
from nhabench.floors import Ceilings
from nhabench.gpu import GpuWatch
from nhabench.guard import fingerprint, marks, refill
from nhabench.implementations import attend
from nhabench.inputs import Inputs, bytes_needed, make_inputs
from nhabench.lab import Lab
from nhabench.measure import measure_case
from nhabench.outputs import tensors_of
from nhabench.plots import draw_all, floor, latency, speedup
from nhabench.reference import Distance, Judge, checked_at, distance, small_inputs
from nhabench.results import Row, load_rows, to_csv
from nhabench.rows import earlier_rows
from nhabench.sweeps import sweep
from nhabench.tables import grouped
from nhabench.timing import WallClock
from nhabench.training import bound
from nhabench.workloads import Case, Workload, load_workloads

CPU = torch.device("cpu")
Run = Callable[[Inputs], torch.Tensor]
Measure = Callable[..., dict[str, Row]]


def training(workload: Workload, length: int = 100, batch: int = 1, dtype: str = "float32", sequences: int = 0) -> Case:
    return Case(workload, batch, length, dtype, sequences, "training")


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 96)
    environment = dataclasses.replace(read_environment(CPU, GpuWatch(CPU), ""), git_sha="1", git_dirty=False)
    return Lab(CPU, WallClock(), GpuWatch(CPU), environment, Ceilings(1, 1), seconds=0.02)


@pytest.fixture
def measure(lab: Lab, tiny: Workload) -> Measure:
    """Contenders at a case, one of training by default: their rows by name."""

    def run(*contenders: Contender, case: Case | None = None) -> dict[str, Row]:
        with torch.no_grad():
            rows = measure_case(lab, case or training(tiny), contenders, lambda step: None)
        return {row.implementation: row for row in rows}

    return run


def named(name: str) -> Contender:
    return next(contender for contender in baselines() if contender.name == name)


def right(inputs: Inputs) -> torch.Tensor:
    return attend(inputs, "chunked")


class Changed(torch.autograd.Function):
    """x, whose gradient is changed on its way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.change(grad), None


def changing(name: str, change: Callable[[torch.Tensor], torch.Tensor], honest: Run = right) -> Run:
    """The work, but for the gradient of one input."""

    def run(inputs: Inputs) -> torch.Tensor:
        changed: Any = {name: Changed.apply(getattr(inputs, name), change)}
        return honest(dataclasses.replace(inputs, **changed))

    return run


def without_a_token(grad: torch.Tensor) -> torch.Tensor:
    grad = grad.clone()
    grad[:, 40] = 0
    return grad


# What is wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda grad: grad * 1.001, without_a_token, torch.zeros_like])
@pytest.mark.parametrize("name", "qkvg")
def test_a_wrong_gradient_of_each_input_is_caught(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], measure: Measure, contenders: Any
) -> None:
    rows = measure(contenders.nha("wrong", changing(name, change)), contenders.nha("honest"))
    assert (rows["wrong"].status, rows["wrong"].median_ms) == ("incorrect", None)
    assert rows["wrong"].note.startswith(f"Relative error of d{name}: ")
    assert rows["wrong"].error > rows["wrong"].tolerance  # type: ignore[operator]
    assert rows["honest"].status == "ok"


@pytest.mark.parametrize("name", "qkvg")
def test_a_gradient_that_is_not_written_everywhere_is_caught(name: str, measure: Measure, contenders: Any) -> None:
    def hole(inputs: Inputs) -> torch.Tensor:
        o = torch.empty_like(getattr(inputs, name))  # first of all: of the memory that was poisoned

        def but_one(grad: torch.Tensor) -> torch.Tensor:
            o[:, 1:] = grad[:, 1:]
            return o

        return changing(name, but_one)(inputs)

    assert measure(contenders.nha("wrong", hole))["wrong"].status == "incorrect"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-math", "window", "linear"])
def test_gradients_of_baselines_are_right_and_wrong_ones_are_caught(name: str, dtype: str, tiny: Workload) -> None:
    contender = named(name)
    inputs = make_inputs(training(tiny, 200, dtype=dtype), CPU)
    verdict = check_baseline(contender, inputs)
    assert verdict is not None
    assert verdict.correct, verdict.sentence
    assert verdict.distance.total < 0.02
    for one in "qkv":
        wrong = dataclasses.replace(
            contender,
            bind=lambda x, one=one: lambda: changing(one, lambda grad: grad * 1.1, lambda y: contender.bind(y)())(x),
        )
        verdict = check_baseline(wrong, inputs)
        assert verdict is not None
        assert verdict.sentence.startswith(f"Relative error of d{one}: ")


@pytest.mark.parametrize("name", ["naive", "chunked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nha_is_right(name: str, dtype: str, measure: Measure, tiny: Workload, contenders: Any) -> None:
    for case in (training(tiny, 100, 2, dtype), training(tiny, 100, 1, dtype, sequences=4)):
        row = measure(contenders.nha(name, lambda x: attend(x, name)), case=case)[name]
        assert (row.status, row.reference, row.direction) == ("ok", "naive float64", "training"), row.note
        assert row.error is not None
        assert 0 < row.error < row.tolerance  # type: ignore[operator]


def test_long_cases_are_judged_by_chunked_float64(
    measure: Measure, tiny: Workload, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "NAIVE_LENGTH", 64)
    rows = measure(contenders.nha("honest"), contenders.nha("wrong", changing("g", lambda grad: grad * 1.001)))
    assert {row.reference for row in rows.values()} == {"chunked float64"}
    assert (rows["honest"].status, rows["wrong"].status) == ("ok", "incorrect")


def test_gradients_of_gates_that_nothing_follows_are_zero_and_right(
    measure: Measure, tiny: Workload, contenders: Any
) -> None:
    row = measure(contenders.nha("honest"), case=training(tiny, tiny.window))["honest"]
    assert row.status == "ok", row.note
    leaks = changing("g", lambda grad: grad + 1e-3)
    assert measure(contenders.nha("leaks", leaks), case=training(tiny, tiny.window))["leaks"].status == "incorrect"


def test_a_block_whose_truth_is_zero_is_held_against_the_mean_block() -> None:
    truth = torch.ones(1, 4 * reference.BLOCK, 2, 4, dtype=torch.float64)
    truth[:, -reference.BLOCK :] = 0
    assert distance(truth, truth) == Distance(0.0, 0.0)
    o = truth.clone()
    o[:, -reference.BLOCK :] = 0.01
    assert distance(o, truth).worst == pytest.approx(0.01 / 0.75**0.5)
    nothing = torch.zeros_like(truth)
    assert distance(nothing, nothing) == Distance(0.0, 0.0)
    assert not distance(o, nothing).within(Distance(1e9, 1e9))


# Where a whole sequence takes too much --------------------------------------------------------------------------------


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LONGEST_TRAINED", 150)
    monkeypatch.setattr(reference, "STAND_IN", 80)


@pytest.mark.usefixtures("_short")
def test_long_sequences_are_checked_at_a_shorter_one(measure: Measure, tiny: Workload, contenders: Any) -> None:
    def late(name: str, length: int, value: float) -> Run:
        """A gradient that is wrong in the first token, at one length only."""

        def change(grad: torch.Tensor) -> torch.Tensor:
            grad = grad.clone()
            if grad.shape[1] == length:
                grad[:, 0] = value
            return grad

        return changing(name, change)

    idle = iter(range(10**6))
    case = training(tiny, 200)
    rows = measure(
        contenders.nha("honest"),
        contenders.nha("wrong", late("k", 80, 7.0)),
        contenders.nha("holds NaN", late("k", 200, torch.nan)),
        contenders.nha("idles", changing("v", lambda grad: grad * (next(idle) < 4))),
        case=case,
    )
    assert (rows["honest"].status, rows["honest"].reference) == ("ok", "naive float64 at T=80")
    assert rows["honest"].seq_len == 200
    assert (rows["wrong"].status, rows["wrong"].reference) == ("incorrect", "naive float64 at T=80")
    assert rows["holds NaN"].note == "Its output at this size holds NaN or infinity."
    assert (rows["idles"].status, rows["idles"].note) == ("incorrect", guard.UNCHECKED)


def test_only_training_of_long_sequences_has_a_stand_in() -> None:
    workload = load_workloads()["llama-3-8b"]
    long, most = (workload.case(length, "bfloat16", "training") for length in (131072, 32768))
    assert checked_at(most) == most
    assert checked_at(long) == Case(workload, 1, 2048, "bfloat16", direction="training")
    forward = workload.case(131072, "bfloat16")
    assert checked_at(forward) == forward


# What was timed is what was checked -----------------------------------------------------------------------------------


def idles(after: int) -> Run:
    """The backward pass a few times; then nothing."""
    calls = iter(range(10**6))

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *operands: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*operands)
            return right(Inputs(training(Workload("tiny", 4, 2, 16, 8, 8)), *operands))

        @staticmethod
        def backward(ctx: Any, do: torch.Tensor) -> tuple[torch.Tensor, ...]:
            operands = ctx.saved_tensors
            if next(calls) >= after:
                return tuple(torch.zeros_like(x) for x in operands)
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in operands]
                q, k, v, g = leaves
                o = right(Inputs(training(Workload("tiny", 4, 2, 16, 8, 8)), q, k, v, g))
            return torch.autograd.grad(o, leaves, do)

    return lambda inputs: Once.apply(*inputs.operands)  # type: ignore[no-any-return]


def test_a_wrong_output_of_a_step_is_caught(measure: Measure, contenders: Any) -> None:
    rows = measure(contenders.nha("wrong", lambda x: (o := right(x)) + 1e-3 * o.detach()), contenders.nha("honest"))
    assert (rows["wrong"].status, rows["honest"].status) == ("incorrect", "ok")
    assert rows["wrong"].note.startswith("Relative error of o: ")


@pytest.mark.parametrize("after", [1, 4])
def test_who_skips_the_backward_pass_when_timed_is_caught(after: int, measure: Measure, contenders: Any) -> None:
    rows = measure(contenders.nha("cheat", idles(after)), contenders.nha("honest"))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", guard.UNCHECKED)
    assert rows["honest"].status == "ok"


@pytest.mark.parametrize("name", "qkvg")
def test_who_skips_or_remembers_one_gradient_is_caught(name: str, measure: Measure, contenders: Any) -> None:
    calls = iter(range(10**6))
    kept: list[torch.Tensor] = []

    def remembers(grad: torch.Tensor) -> torch.Tensor:
        kept[:] = kept or [grad.clone()]
        return kept[0].clone()

    rows = measure(
        contenders.nha("skips", changing(name, lambda grad: grad * (next(calls) < 3))),
        contenders.nha("remembers", changing(name, remembers)),
        contenders.nha("honest"),
    )
    assert (rows["skips"].status, rows["skips"].note) == ("incorrect", guard.UNCHECKED)
    assert (rows["remembers"].status, rows["remembers"].note) == ("incorrect", guard.REMEMBERED)
    assert rows["honest"].status == "ok"


def test_the_gradient_that_arrives_is_guarded(measure: Measure, contenders: Any, tiny: Workload) -> None:
    def writing(inputs: Inputs) -> torch.Tensor:
        def write(grad: torch.Tensor) -> torch.Tensor:
            assert inputs.do is not None
            inputs.do.copy_(inputs.do.flip(1))
            return grad

        return changing("q", write)(inputs)

    rows = measure(contenders.nha("cheat", writing), contenders.nha("honest"))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", guard.WROTE)
    assert rows["honest"].status == "ok"


def test_a_gradient_that_is_an_input_is_none(measure: Measure, contenders: Any) -> None:
    # The gradient of q is do itself.
    rows = measure(contenders.full("cheat", lambda x: x.q + 0 * (x.k.sum() + x.v.sum())))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", guard.AN_INPUT)


def test_a_tuple_is_no_output_of_a_forward_pass_nor_a_tensor_gradients(
    measure: Measure, contenders: Any, tiny: Workload
) -> None:
    pair = contenders.full("pair", lambda inputs: (inputs.q * 2, inputs.q * 3))
    assert measure(pair, case=Case(tiny, 1, 40, "float32"))["pair"].note == guard.NO_TENSOR
    single = dataclasses.replace(contenders.nha("single"), train=lambda inputs: lambda: inputs.q * 2)
    assert measure(single)["single"].note == guard.NO_GRADIENTS
    few = dataclasses.replace(contenders.nha("few"), train=lambda x: lambda: (x.q * 2, x.k * 2, x.v * 2))
    assert measure(few)["few"].status == "failed"


def test_marks_of_gradients_are_those_of_each() -> None:
    a, b, zero = torch.randn(1, 70, 2, 8), torch.randn(1, 70, 1, 8), torch.zeros(1, 70, 2)
    before = marks((a, b, zero))
    assert before.distance(marks((a, b, zero))) == before.change(marks((a, b, zero))) == 0.0
    one = marks((a, 2 * b, zero))
    assert before.distance(one) > 0.5
    assert before.change(one) == 0.0
    assert before.change(marks((2 * a, 2 * b, zero))) > 0.5  # what stays zero does not count
    assert before.change(marks((2 * a, 2 * b, zero + 1))) > 0.5
    assert not before.distance(marks((a, b * torch.nan, zero))) <= 1e9
    assert not before.change(marks((2 * a, b * torch.nan, zero))) >= 0
    assert not before.distance(marks((a, b))) <= 1e9
    assert not before.distance(marks((a, b[:, :60], zero))) <= 1e9


# Inputs and calls -----------------------------------------------------------------------------------------------------


def test_the_inputs_of_a_forward_pass_are_the_same_with_the_gradient_beside_them(tiny: Workload) -> None:
    forward, both = make_inputs(Case(tiny, 2, 12, "float32"), CPU), make_inputs(training(tiny, 12, 2), CPU)
    assert both.do is not None
    assert fingerprint(both)[:4] == fingerprint(forward)
    assert both.do.shape == both.q.shape
    assert not torch.equal(both.do, both.q)
    assert both.case.input_bytes == sum(x.nbytes for x in both.tensors())
    assert both.case.output_bytes == both.q.nbytes + sum(x.nbytes for x in both.operands)
    assert bytes_needed(both.case, 2) - bytes_needed(both.case) == both.case.input_bytes
    wide = both.to(torch.float64)
    assert wide.do is not None
    assert wide.do.dtype == torch.float64
    assert [one.do.shape for one in both.apart() if one.do is not None] == [(1, 12, 4, 16)] * 2


@pytest.mark.parametrize("name", ["chunked", "sdpa-math", "sdpa-flash", "window", "linear"])
def test_a_step_sees_what_is_written_into_its_inputs(name: str, tiny: Workload, contenders: Any) -> None:
    contender = contenders.nha(name) if name == "chunked" else named(name)
    inputs = make_inputs(training(tiny, 40), CPU)
    with torch.no_grad():
        call = bound(contender, inputs)
        before = marks(call())
        refill(inputs, 1)
        after = call()
        assert before.change(marks(after)) > guard.OTHER
        fresh = bound(contender, make_inputs(inputs.case, CPU, 1))()
    for one, other in zip(tensors_of(after), tensors_of(fresh), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_a_step_does_no_work_beside_the_operation(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after its inputs were written to: gradients of views made before would be found by other kernels."""
    inputs = make_inputs(training(tiny, 40), CPU)
    counts = []
    with torch.no_grad():
        call = bound(named("sdpa-math"), inputs)
        for _ in range(2):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
                call()
            counts.append({one.key: one.count for one in profile.key_averages()})
            refill(inputs, 1)
    assert counts[0] == counts[1]
    assert "aten::as_strided_backward" not in counts[0]


def test_the_flash_kernel_of_the_window_has_its_own_backward_pass(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    packings: list[flash_window.Packing] = []

    class Kernel:
        def forward(self, q: Any, k: Any, v: Any, packing: flash_window.Packing) -> Any:
            packings.append(packing)
            o = blocked_window(q[None], k[None], v[None], packing.window, packing.cu_q)[0]
            return o, q.new_zeros(q.shape[1], len(q)), ("kept",)

        def backward(self, do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, packing: Any, saved: Any) -> Any:
            assert saved == ("kept",)
            assert packing is packings[-1]
            assert lse.shape == (4, len(q))
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            with torch.enable_grad():
                again = self.forward(*leaves, packing)[0]
            assert torch.equal(again, o)
            return torch.autograd.grad(again, leaves, do)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_window, "window_kernel", lambda capability: Kernel())
    for case in (training(tiny, 40, 3), training(tiny, 40, sequences=3)):
        inputs = make_inputs(case, CPU)
        with torch.no_grad():
            monkeypatch.setattr(baselines_module, "_flash_window", lambda case, device: False)
            expected = bound(named("window"), inputs)()
            monkeypatch.setattr(baselines_module, "_flash_window", lambda case, device: True)
            found = bound(named("window"), inputs)()
        for one, other in zip(tensors_of(found), tensors_of(expected), strict=True):
            torch.testing.assert_close(one, other)
        assert packings[-1].cu_q.tolist()[-1] == case.tokens
        assert len(packings[-1].cu_q) == len(case.lengths) + 1


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """In place of flash-linear-attention's simple GLA: linear attention with weighted values."""

    def kernel(q: Any, k: Any, v: Any, gate: Any) -> tuple[torch.Tensor, None]:
        x = Inputs(training(Workload("tiny", 4, 4, 16, 8, 8), 40), q, k, v * gate.exp()[..., None], gate)
        return linear_direct(x), None

    fake = types.ModuleType("fla.ops.simple_gla")
    fake.chunk_simple_gla = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return fake


def test_flash_linear_attention_has_the_gradients_of_what_its_kernels_take(
    fla: types.ModuleType, measure: Measure, tiny: Workload
) -> None:
    call = bound(named("simple-gla"), make_inputs(training(tiny, 40), CPU))
    with torch.no_grad():
        assert [tuple(x.shape) for x in tensors_of(call())] == [(1, 40, 4, 16)] * 4 + [(1, 40, 4)]
    here = dataclasses.replace(named("simple-gla"), missing=lambda device: None)
    row = measure(here)["simple-gla"]
    assert (row.status, row.reference) == ("ok", ""), row.note


def test_flash_linear_attention_may_refuse_its_backward_pass(
    fla: types.ModuleType, measure: Measure, tiny: Workload
) -> None:
    def refuse(grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("Triton >= 3.4.0 on Hopper GPUs produces\nincorrect results")

    real = fla.chunk_simple_gla
    fla.chunk_simple_gla = lambda q, *rest: real(Changed.apply(q, refuse), *rest)  # type: ignore[attr-defined]
    here = dataclasses.replace(named("simple-gla"), missing=lambda device: None)
    row = measure(here)["simple-gla"]
    assert (row.status, row.note) == ("unsupported", "Triton >= 3.4.0 on Hopper GPUs produces incorrect results")
    fla.chunk_simple_gla = lambda q, *rest: real(q.no_such_thing, *rest)  # type: ignore[attr-defined]
    assert measure(here)["simple-gla"].status == "failed"


def test_what_cannot_be_served_says_so_in_training_too(measure: Measure, contenders: Any) -> None:
    def refuses(inputs: Inputs) -> torch.Tensor:
        raise Unsupported("Not with gradients.")

    row = measure(contenders.nha("refuses", refuses))["refuses"]
    assert (row.status, row.note) == ("unsupported", "Not with gradients.")


# Cases, floors and rows -----------------------------------------------------------------------------------------------


def test_the_direction_is_part_of_a_case(tiny: Workload) -> None:
    forward, both = Case(tiny, 2, 8, "float32"), training(tiny, 8, 2)
    assert forward != both
    assert (str(forward), str(both)) == ("tiny 2 x 8 float32", "tiny 2 x 8 float32 training")
    assert tiny.case(8, "float32", "training").training
    with pytest.raises(ValueError, match="direction: expected one of forward, training, got 'backward'"):
        Case(tiny, 1, 8, "float32", direction="backward")
    with pytest.raises(ValueError, match="direction: expected 'forward' with rope, got 'training'"):
        Case(tiny.changed(rope=True), 1, 8, "float32", direction="training")


def test_what_was_learnt_in_one_direction_is_not_said_of_the_other(lab: Lab, tiny: Workload, contenders: Any) -> None:
    contender = contenders.nha("a")
    lab.last["a", *training(tiny).kind] = (training(tiny), 9.0)
    assert lab.predicted_s(contender, training(tiny, 200)) == 18.0
    assert lab.predicted_s(contender, Case(tiny, 1, 200, "float32")) is None
    assert len(lab.judge(training(tiny)).tolerance) == 5
    assert len(lab.judge(Case(tiny, 1, 8, "float32")).tolerance) == 1
    window = named("window")
    verdicts = [lab.baseline_verdict(window, case) for case in (training(tiny), Case(tiny, 1, 8, "float32"))]
    assert [verdict.of in ("o", "dq", "dk", "dv") for verdict in verdicts if verdict is not None] == [True, False]


def test_each_result_has_a_tolerance_of_its_own(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 96)
    judge = Judge(tiny, "bfloat16", CPU, "training")
    assert judge.chunked_is_exact
    assert len({one.total for one in judge.tolerance}) == 5
    assert all(1e-3 < one.total <= one.worst < 5e-2 for one in judge.tolerance)
    assert small_inputs(tiny, "float32", CPU, 0, "training").do is not None


def test_training_moves_three_times_the_bytes() -> None:
    workload = Workload("w", 4, 2, 16, slots=8, window=8)
    forward, both = Case(workload, 3, 10, "bfloat16"), training(workload, 10, 3, "bfloat16")
    inputs = make_inputs(both, CPU)
    q, k, v, g = (x.nbytes for x in inputs.operands)
    moved = (q + k + v + g + q) + (q + k + v + g + q + q) + (q + k + v + g)  # o and do are as large as q
    assert floors.nha_floor(both).bytes == moved
    assert floors.nha_floor(both).state_bytes == floors.nha_floor(forward).state_bytes
    for one in (floors.full_floor, floors.linear_floor, floors.gla_floor, floors.gsa_floor):
        assert one(both).bytes == 3 * one(forward).bytes
    packed = [Case(workload, 1, 30, "bfloat16", 3, direction) for direction in ("forward", "training")]
    once, thrice = (floors.window_floor(case) for case in packed)
    assert thrice.bytes - 2 * 4 * 4 == 3 * (once.bytes - 4 * 4)


def test_training_computes_five_products_for_two_and_two_for_one() -> None:
    workload = Workload("w", 4, 2, 16, slots=8, window=0)
    forward, both = Case(workload, 1, 10, "float32"), training(workload, 10)
    assert 2 * floors.full_floor(both).flops == 7 * floors.full_floor(forward).flops
    # A token: 4 heads read 8 slots, seven products of 2*16 each; 2 heads have 2*8*16 numbers that decay and are
    # updated, 3 FLOPs each, and as many gradients: 4 for the update, 4 for the decay.
    assert floors.nha_floor(both).flops == 10 * (4 * 8 * 7 * 32 + 2 * 2 * 8 * 16 * (3 + 8))
    assert floors.gsa_floor(both).flops == floors.nha_floor(both).flops
    assert floors.linear_floor(both).flops == 3 * floors.linear_floor(forward).flops
    decays = 10 * 2 * 16 * 16
    assert floors.simple_gla_floor(both).flops == floors.linear_floor(both).flops + 5 * decays
    assert floors.simple_gla_floor(forward).flops == floors.linear_floor(forward).flops + decays


def test_rows_of_training_are_written_read_and_not_taken_for_others(
    lab: Lab, measure: Measure, tiny: Workload, contenders: Any, tmp_path: Path
) -> None:
    contender = contenders.nha("chunked")
    forward, both = Case(tiny, 1, 60, "float32"), training(tiny, 60)
    rows = [measure(contender, case=case)["chunked"] for case in (forward, both)]
    (tmp_path / "both.csv").write_text(to_csv(rows))
    read = load_rows(tmp_path / "both.csv")
    assert read == rows
    assert [row.direction for row in read] == ["forward", "training"]
    assert len({row.key for row in read}) == 2
    assert [len(group) for group in grouped(read).values()] == [1, 1]
    assert earlier_rows(lab, both, [contender], read) == [rows[1]]
    assert earlier_rows(lab, both, [contender], read[:1]) is None
    assert earlier_rows(lab, forward, [contender], read[1:]) is None


def test_the_results_that_are_here_are_forward_passes() -> None:
    files = sorted((Path(__file__).parents[2] / "results").rglob("*.csv"))
    assert files
    for file in files:
        assert {row.direction for row in load_rows(file)} <= {"forward", "training"}


def test_plots_say_what_was_timed(row: Callable[..., Row], tmp_path: Path) -> None:
    rows = [row(seq_len=length, direction="training") for length in (512, 1024)]
    rows += [dataclasses.replace(one, implementation="x", label="full: x", family="full") for one in rows]
    figures = [draw(rows) for draw in (latency, speedup, floor)]
    texts = [[text.get_text() for text in figure.texts] for figure in figures if figure is not None]
    assert [next(text.split(" on ")[0] for text in some if "Some CPU" in text) for some in texts] == [
        "Forward + backward latency", "Forward + backward speed-up over full attention",
        "Achieved rates of the forward + backward pass",
    ]  # fmt: skip
    assert figures[0] is not None
    assert figures[0].axes[0].get_ylabel() == "median time of a forward + backward call, ms; 95 % interval shaded"
    swept = [row(window=window, direction="training") for window in (0, 8, 16)]
    assert "Forward + backward latency" in sweep(swept, "window").texts[1].get_text()
    names = {path.name for path in draw_all([*rows, row()], tmp_path)}
    assert {"training-tiny-latency.png", "training-tiny-speedup.png", "forward-tiny-latency.png"} <= names


# On a GPU -------------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels, streams and graphs are a GPU's")


@pytest.fixture
def gpu() -> Measure:
    """Contenders at a training case on a GPU: their rows by name."""
    case = Case(Workload("small", 16, 4, 64, 64, 64), 2, 1024, "bfloat16", direction="training")

    def run(*contenders: Contender) -> dict[str, Row]:
        with torch.no_grad():
            lab = make_lab(torch.device("cuda", 0), torch.bfloat16, "", 0.1)
            return {row.implementation: row for row in measure_case(lab, case, contenders, lambda step: None)}

    return run


@needs_cuda
def test_training_is_right_and_timed_on_a_gpu(gpu: Measure) -> None:
    names = ("triton", "flash", "chunked", "sdpa-flash", "window", "linear")
    rows = gpu(*all_contenders(names))
    assert {name: (row.status, row.note) for name, row in rows.items() if row.status != "ok"} == {}
    for row in rows.values():
        assert row.peak_bytes is not None
        assert row.extra_peak_bytes is not None
        assert row.peak_bytes > row.extra_peak_bytes > 0
        assert "does not do its work" not in row.note
    assert rows["triton"].graph_ratio is not None


@needs_cuda
def test_who_works_ahead_is_caught_in_training_too(gpu: Measure, contenders: Any) -> None:
    run = ahead(lambda inputs: attend(inputs, "triton"))
    rows = gpu(contenders.nha("ahead", run), *all_contenders(("triton",)))
    assert (rows["ahead"].status, rows["triton"].status) == ("incorrect", "ok")
