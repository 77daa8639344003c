"""Whole runs on tiny shapes: what is kept, what a row says and which exit code follows, whatever happens."""

from __future__ import annotations

import io
import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from nhabench import bench as module
from nhabench import ceilings, check, environment, lab, measure, racing, reference
from nhabench.bench import Options, Outcome, all_contenders, run
from nhabench.ceilings import warm_up
from nhabench.contender import Contender, Unsupported
from nhabench.environment import read_environment
from nhabench.floors import Ceilings
from nhabench.gpu import GpuWatch
from nhabench.implementations import attend
from nhabench.inputs import COLD_FACTOR, Inputs, bytes_needed
from nhabench.lab import Lab
from nhabench.results import Row, load_rows
from nhabench.timing import Sample, Stopwatch, WallClock
from nhabench.workloads import Case, Workload, cases

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 32)
    monkeypatch.setattr(check, "gc", SimpleNamespace(collect=lambda: 0))  # slow beside everything that tests import
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(module, "draw_all", lambda rows, folder: [])
    monkeypatch.setattr(module, "measure_ceilings", lambda device, dtype, timer: Ceilings(0.02, 0.2))


@pytest.fixture
def plots() -> None:
    """A test that asks for this gets real plots."""


class Bench:
    """Runs contenders on the tiny workload into a folder."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload, self.folder, self.said = workload, folder, io.StringIO()
        self.tables = io.StringIO()

    def __call__(self, contenders: Sequence[Contender], lengths: Sequence[int] = (16, 32), **changes: Any) -> Outcome:
        options: dict[str, Any] = {
            "cases": cases([self.workload], lengths, "float32"),
            "contenders": contenders,
            "device": CPU,
            "seconds": 0.02,
            "output": self.folder,
            "command": "python -m nhabench bench",
            "trim": False,
        }
        return run(Options(**{**options, **changes}), Console(file=self.tables, width=200), Console(file=self.said))

    @property
    def rows(self) -> dict[tuple[str, int], Row]:
        return {(row.implementation, row.seq_len): row for row in load_rows(self.folder / "forward.csv")}


@pytest.fixture
def bench(tiny: Workload, tmp_path: Path) -> Bench:
    return Bench(tiny, tmp_path)


def test_a_run_leaves_rows_plots_and_a_table(bench: Bench, plots: None) -> None:
    outcome = bench(
        [c for c in all_contenders() if c.name in ("chunked", "naive", "sdpa-flash", "linear", "sdpa-cudnn")]
    )
    assert outcome.exit_code == 0
    assert {path.name for path in outcome.plots} == {
        f"forward-tiny-{kind}.png" for kind in ("latency", "speedup", "floor")
    }
    assert all(path.stat().st_size > 5000 for path in outcome.plots)
    row = bench.rows["chunked", 32]
    assert (row.status, row.timer, row.cache, row.reference) == ("ok", "wall clock", "uncontrolled", "naive float64")
    assert row.median_ms is not None
    assert row.samples is not None
    assert row.samples >= 6
    assert row.low_ms <= row.median_ms <= row.high_ms  # type: ignore[operator]
    assert 0 < row.error < row.tolerance  # type: ignore[operator]
    assert row.floor_fraction == pytest.approx(row.floor_ms / row.median_ms)  # type: ignore[operator]
    assert row.tb_per_s == pytest.approx(row.floor_bytes / row.median_ms * 1e-9)  # type: ignore[operator]
    assert (row.copy_tb_per_s, row.matmul_tflop_per_s) == (0.02, 0.2)
    assert bench.rows["sdpa-cudnn", 16].status == "unavailable"
    assert bench.rows["linear", 16].reference == "its definition in float64 at T=32"
    assert "NHA chunked" in bench.tables.getvalue()
    assert "full: cuDNN: unavailable" in bench.tables.getvalue()


def test_a_wrong_implementation_gets_its_error_no_time_and_exit_code_1(bench: Bench, contenders: Any) -> None:
    calls: list[int] = []

    def wrong(inputs: Inputs) -> torch.Tensor:
        calls.append(inputs.case.seq_len)
        return attend(inputs, "chunked") * 1.01

    outcome = bench([contenders.nha("right"), contenders.nha("wrong", wrong)], lengths=[16])
    assert outcome.exit_code == 1
    row = bench.rows["wrong", 16]
    assert (row.status, row.median_ms, row.samples, row.tb_per_s) == ("incorrect", None, None, None)
    assert row.error == pytest.approx(0.01, rel=1e-3)
    assert "Relative error 1.00e-02" in row.note
    assert calls == [16]  # checked once, never timed
    assert bench.rows["right", 16].status == "ok"
    assert "WRONG" in bench.tables.getvalue()


def test_an_output_with_holes_is_incorrect(bench: Bench, contenders: Any) -> None:
    def holes(inputs: Inputs) -> torch.Tensor:
        o = attend(inputs, "chunked")
        o[0, 3] = torch.nan
        return o

    assert bench([contenders.nha("holes", holes)], lengths=[16]).exit_code == 1
    assert "holds NaN" in bench.rows["holes", 16].note


def test_wrong_comes_before_incomplete(bench: Bench, contenders: Any) -> None:
    def broken(inputs: Inputs) -> torch.Tensor:
        raise TypeError

    wrong = contenders.nha("wrong", lambda inputs: attend(inputs, "chunked") * 1.01)
    assert bench([wrong, contenders.full("broken", broken)], lengths=[16]).exit_code == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_baseline_that_writes_no_number_somewhere_is_incorrect(value: float, bench: Bench, contenders: Any) -> None:
    def holes(inputs: Inputs) -> torch.Tensor:
        o = inputs.q.clone()
        if inputs.case.seq_len == 32:
            o[0, 31, 0, 5] = value
        return o

    assert bench([contenders.full("holes", holes), contenders.nha("mine")], lengths=[16, 32]).exit_code == 3
    assert bench.rows["holes", 16].status == "ok"
    row = bench.rows["holes", 32]
    assert (row.status, row.median_ms) == ("incorrect", None)
    assert row.note == "Its output at this size holds NaN or infinity."


class FaultyTimer(WallClock):
    """A timer that finds, when it waits for the device, what an earlier call did to it."""

    def __init__(self, after: int, lost: list[str]) -> None:
        self.left, self.lost = after, lost

    def stopwatch(self) -> Stopwatch:
        time = super().stopwatch()

        def faulty(call: Callable[[], object]) -> Sample:
            self.left -= 1
            if self.left < 0:
                self.lost.append("yes")
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging ...")
            return time(call)

        return faulty


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[str]]:
    def make(after: int) -> list[str]:
        lost: list[str] = []
        timer = FaultyTimer(after, lost)
        monkeypatch.setattr(ceilings, "WallClock", lambda: timer)
        return lost

    return make


def replace_release(monkeypatch: pytest.MonkeyPatch, release: Callable[[torch.device], None]) -> None:
    """Put a function in the place of the one that gives memory back, after an error and after a case."""
    for one in (lab, measure):
        monkeypatch.setattr(one, "release", release)


def test_a_fault_that_shows_while_timing_is_a_row_of_each(
    bench: Bench, contenders: Any, faulty: Callable[[int], list[str]]
) -> None:
    faulty(9)
    outcome = bench([contenders.nha("a"), contenders.nha("b")], lengths=[16])
    assert outcome.exit_code == 3
    assert {row.status for row in outcome.rows} == {"failed"}
    assert "RuntimeError: CUDA error: an illegal memory access" in bench.rows["a", 16].note


def test_a_device_lost_while_timing_exits_70_with_its_rows(
    bench: Bench, contenders: Any, faulty: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = faulty(9)

    def release(device: torch.device) -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging ...")

    replace_release(monkeypatch, release)
    outcome = bench([contenders.nha("a"), contenders.nha("b")], lengths=[16, 32])
    assert outcome.exit_code == 70
    assert {key: row.status for key, row in bench.rows.items()} == {("a", 16): "failed", ("b", 16): "failed"}
    assert bench.rows["b", 16].note == (
        "The device stopped answering: CUDA error: an illegal memory access was encountered"
    )
    assert "For debugging" not in bench.said.getvalue()


@pytest.mark.parametrize("where", ["free_bytes", "cache_bytes", "input_sets"])
def test_a_question_that_the_device_does_not_answer_is_a_row(
    where: str, bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(measure, where)

    def fails_once(*arguments: Any) -> Any:
        monkeypatch.setattr(measure, where, real)
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(measure, where, fails_once)
    assert bench([contenders.nha("mine")], lengths=[16, 32]).exit_code == 3
    assert bench.rows["mine", 16].note == "RuntimeError: CUDA error: unknown error"
    assert bench.rows["mine", 32].status == "ok"


def test_a_device_lost_after_the_rows_keeps_them(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def release(device: torch.device) -> None:
        if timed:
            raise RuntimeError("CUDA error: unspecified launch failure")

    timed: list[int] = []
    original = racing.race

    def race(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        timed.append(1)
        return result

    monkeypatch.setattr(racing, "race", race)
    replace_release(monkeypatch, release)
    assert bench([contenders.nha("mine")], lengths=[16, 32]).exit_code == 70
    assert {key: row.status for key, row in bench.rows.items()} == {("mine", 16): "ok"}


def test_a_device_that_cannot_be_opened_exits_70(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> Ceilings:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "measure_ceilings", no_memory)
    assert bench([contenders.nha("mine")]).exit_code == 70
    assert "could not be opened: CUDA out of memory." in bench.said.getvalue()
    assert not (bench.folder / "forward.csv").exists()


def test_a_gpu_is_warm_before_its_timer_and_its_ceilings(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def step(name: str, answer: Any = None) -> Callable[..., Any]:
        return lambda *arguments: steps.append(name) or answer

    monkeypatch.setattr(torch.cuda, "set_device", step("set device"))
    monkeypatch.setattr(ceilings, "warm_up", step("warm up"))
    monkeypatch.setattr(ceilings, "CudaEvents", step("timer"))
    monkeypatch.setattr(module, "GpuWatch", step("watch"))
    monkeypatch.setattr(module, "read_environment", step("environment"))
    monkeypatch.setattr(module, "measure_ceilings", step("ceilings"))
    case = Case(bench.workload, 1, 16, "float32")
    module.make_lab(torch.device("cuda", 0), case.torch_dtype, "", 0.1)
    assert steps == ["set device", "warm up", "timer", "watch", "environment", "ceilings"]


def test_warming_up_goes_on_for_the_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    began = time.perf_counter()
    warm_up(CPU, seconds=0.02, size=8)
    assert time.perf_counter() - began >= 0.02
    assert waits


def test_host_time_is_in_the_row_and_in_the_table(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(WallClock):
        name = "cuda events"

        def stopwatch(self) -> Stopwatch:
            time, number = super().stopwatch(), next(contender)
            return lambda call: Sample(time(call).ms, late=number == 0)

    contender = iter(range(100))
    monkeypatch.setattr(ceilings, "WallClock", Late)
    bench([contenders.nha("waits", remark="A remark."), contenders.nha("queued")], lengths=[16])
    row = bench.rows["waits", 16]
    assert row.timer == "cuda events with host time"
    assert re.fullmatch(
        r"A remark\. Includes host time: in (\d+) of \1 samples the host had not queued .* when the device began it\.",
        row.note,
    )
    assert (bench.rows["queued", 16].timer, bench.rows["queued", 16].note) == ("cuda events", "")
    assert "h includes host time" in " ".join(bench.tables.getvalue().split())


def test_the_row_says_how_many_samples_were_left_out(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hesitant(WallClock):
        def stopwatch(self) -> Stopwatch:
            time = super().stopwatch()
            return lambda call: Sample(time(call).ms, late=next(sample) in (4, 7))

    sample = iter(range(10_000))
    monkeypatch.setattr(ceilings, "WallClock", Hesitant)
    bench([contenders.nha("queued")], lengths=[16])
    row = bench.rows["queued", 16]
    assert row.note == "2 further samples are left out: they may hold host time."
    assert row.timer == "wall clock"


def test_out_of_memory_at_one_size_costs_that_size(bench: Bench, contenders: Any) -> None:
    def big(inputs: Inputs) -> torch.Tensor:
        if inputs.case.seq_len == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return attend(inputs, "chunked")

    outcome = bench([contenders.nha("big", big), contenders.nha("small")], lengths=[16, 32, 64])
    assert outcome.exit_code == 3
    assert [bench.rows["big", length].status for length in (16, 32, 64)] == ["ok", "out of memory", "ok"]
    assert "9 GiB" in bench.rows["big", 32].note
    assert bench.rows["small", 32].status == "ok"
    assert "OOM" in bench.tables.getvalue()


def test_memory_that_runs_out_while_timing_is_told_as_well(bench: Bench, contenders: Any) -> None:
    calls = iter(range(100))

    def later(inputs: Inputs) -> torch.Tensor:
        if next(calls) == 2:
            raise MemoryError
        return attend(inputs, "chunked")

    assert bench([contenders.nha("later", later), contenders.nha("other")], lengths=[16]).exit_code == 3
    assert (bench.rows["later", 16].status, bench.rows["later", 16].median_ms) == ("out of memory", None)
    assert bench.rows["other", 16].status == "ok"


def test_a_reference_without_memory_leaves_nha_untimed_and_times_the_rest(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(self: object, inputs: Inputs) -> tuple[torch.Tensor, str]:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(lab.Judge, "reference", no_memory)
    bench([contenders.nha("mine"), contenders.full("theirs", lambda inputs: inputs.q.clone())], lengths=[16])
    row = bench.rows["mine", 16]
    assert (row.status, row.median_ms) == ("out of memory", None)
    assert row.note.startswith("the float64 reference: ")
    assert bench.rows["theirs", 16].status == "ok"


def test_unsupported_is_a_row_and_no_failure(bench: Bench, contenders: Any) -> None:
    def cannot(inputs: Inputs) -> torch.Tensor:
        raise Unsupported("Head sizes of 16 are not served.")

    outcome = bench([contenders.nha("picky", cannot), contenders.nha("fine")], lengths=[16])
    assert outcome.exit_code == 0
    assert (bench.rows["picky", 16].status, bench.rows["picky", 16].note) == (
        "unsupported",
        "Head sizes of 16 are not served.",
    )


def test_any_other_error_is_a_row_that_tells_it(bench: Bench, contenders: Any) -> None:
    def broken(inputs: Inputs) -> torch.Tensor:
        raise TypeError("a kernel\nwas given nonsense")

    assert bench([contenders.full("broken", broken), contenders.nha("fine")], lengths=[16]).exit_code == 3
    row = bench.rows["broken", 16]
    assert (row.status, row.note) == ("failed", "TypeError: a kernel was given nonsense")


def test_ctrl_c_keeps_the_finished_cases_draws_them_and_exits_130(bench: Bench, plots: None, contenders: Any) -> None:
    def interrupted(inputs: Inputs) -> torch.Tensor:
        if inputs.case.seq_len == 64:
            raise KeyboardInterrupt
        return inputs.q.clone()

    outcome = bench([contenders.nha("mine"), contenders.full("theirs", interrupted)], lengths=[16, 32, 64, 128])
    assert outcome.exit_code == 130
    assert sorted(bench.rows) == [("mine", 16), ("mine", 32), ("theirs", 16), ("theirs", 32)]
    assert all(row.status == "ok" for row in bench.rows.values())
    assert len(outcome.plots) == 3
    assert "Interrupted" in bench.said.getvalue()


def test_sigterm_keeps_the_finished_cases_draws_them_and_exits_143(bench: Bench, plots: None, contenders: Any) -> None:
    def terminated(inputs: Inputs) -> torch.Tensor:
        if inputs.case.seq_len == 64:
            signal.raise_signal(signal.SIGTERM)
        return inputs.q.clone()

    before = signal.getsignal(signal.SIGTERM)
    outcome = bench([contenders.nha("mine"), contenders.full("theirs", terminated)], lengths=[16, 32, 64, 128])
    assert outcome.exit_code == 143
    assert sorted(bench.rows) == [("mine", 16), ("mine", 32), ("theirs", 16), ("theirs", 32)]
    assert len(outcome.plots) == 3
    assert "Terminated" in bench.said.getvalue()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_the_plots_are_drawn_is_no_traceback(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> list[Path]:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "draw_all", interrupted)
    assert bench([contenders.nha("mine")], lengths=[16]).exit_code == 130
    assert bench.rows["mine", 16].status == "ok"


def test_no_commit_is_told_once(bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.delenv("NHABENCH_GIT_SHA", raising=False)
    bench([contenders.nha("mine")])
    assert bench.said.getvalue().count("NHABENCH_GIT_SHA") == 1
    monkeypatch.setenv("NHABENCH_GIT_SHA", "abcdef0+dirty")
    bench([contenders.nha("mine")])
    assert bench.said.getvalue().count("NHABENCH_GIT_SHA") == 1
    assert {(row.git_sha, row.git_dirty) for row in bench.rows.values()} == {("abcdef0", True)}


def test_a_full_disk_is_told_exits_74_and_leaves_the_old_file(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench([contenders.nha("mine")], lengths=[16])
    before = (bench.folder / "forward.csv").read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    outcome = bench([contenders.nha("mine")], lengths=[32])
    assert outcome.exit_code == 74
    assert (bench.folder / "forward.csv").read_bytes() == before
    assert "No space left on device" in bench.said.getvalue()
    assert not list(bench.folder.glob("*.part"))


def test_plots_that_cannot_be_written_exit_74_and_keep_the_rows(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "draw_all", full_disk)
    assert bench([contenders.nha("mine")], lengths=[16]).exit_code == 74
    assert bench.rows["mine", 16].status == "ok"


def test_a_second_run_keeps_what_it_does_not_measure(bench: Bench, contenders: Any) -> None:
    bench([contenders.nha("a"), contenders.nha("b")], lengths=[16, 32])
    before = bench.rows
    bench([contenders.nha("b")], lengths=[32])
    after = bench.rows
    assert sorted(after) == sorted(before)
    assert after["a", 32] == before["a", 32]
    assert after["b", 32].median_ms != before["b", 32].median_ms


def test_a_call_that_would_take_too_long_is_skipped_with_its_prediction(bench: Bench, contenders: Any) -> None:
    def slow(inputs: Inputs) -> torch.Tensor:
        assert inputs.case.seq_len <= 32
        time.sleep(0.01)
        return inputs.q.clone()

    bench([contenders.full("slow", slow)], lengths=[16, 32, 1024])
    assert [bench.rows["slow", length].status for length in (16, 32, 1024)] == ["ok", "ok", "skipped"]
    assert "predicted from T=32" in bench.rows["slow", 1024].note  # 32 * 32 times 0.01 s


def test_predictions_grow_with_the_tokens_and_for_full_attention_with_the_length(
    tiny: Workload, contenders: Any
) -> None:
    lab = Lab(CPU, WallClock(), GpuWatch(CPU), read_environment(CPU, GpuWatch(CPU), ""), Ceilings(1, 1), 0.1)
    linear, full = contenders.nha("linear"), contenders.full("full", lambda inputs: inputs.q.clone())
    before, after = Case(tiny, 4, 512, "float32"), Case(tiny, 1, 4096, "float32")
    assert lab.predicted_s(full, after) is None
    for contender in (linear, full):
        lab.last[contender.name, *before.kind] = (before, 0.5)
    assert lab.predicted_s(linear, after) == 1.0  # twice the tokens
    assert lab.predicted_s(full, after) == 8.0  # each of which sees eight times as many


def test_a_case_that_does_not_fit_is_a_row_that_says_so(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**20)
    bench([contenders.nha("mine")], lengths=[16, 1 << 16])
    assert bench.rows["mine", 16].status == "ok"
    row = bench.rows["mine", 1 << 16]
    assert row.status == "skipped"
    assert "0.0 GiB are free" in row.note


def test_every_input_set_counts_as_needed_memory(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(bench.workload, 1, 16, "float32")
    monkeypatch.setattr(measure, "cache_bytes", lambda device: case.input_bytes)  # so COLD_FACTOR sets
    for free, status in ((bytes_needed(case, COLD_FACTOR), "ok"), (bytes_needed(case, COLD_FACTOR) - 1, "skipped")):
        monkeypatch.setattr(measure, "free_bytes", lambda device, free=free: free)
        assert bench([contenders.nha("mine")], lengths=[16]).exit_code == 0
        assert bench.rows["mine", 16].status == status


def test_a_failed_call_lets_go_of_its_tensors_before_memory_is_released(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    release = measure.release

    def watched(device: torch.device) -> None:
        alive.extend(one() is not None for one in held)
        release(device)

    def runs_out(inputs: Inputs) -> torch.Tensor:
        intermediate = inputs.q + 1
        held.append(weakref.ref(intermediate))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    replace_release(monkeypatch, watched)
    bench([contenders.nha("big", runs_out)], lengths=[16])
    assert bench.rows["big", 16].status == "out of memory"
    assert alive
    assert not any(alive)


def test_a_lost_device_ends_the_run_with_its_rows(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(_: object, entry: Any, error: Exception, where: str = "") -> None:
        entry.end("failed", str(error))
        raise lab.DeviceLost("The device stopped answering: illegal memory access")

    monkeypatch.setattr(lab, "fail", lose)

    def kills(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("bad kernel")

    outcome = bench([contenders.nha("kills", kills), contenders.nha("next")], lengths=[16, 32])
    assert outcome.exit_code == 70
    assert sorted(bench.rows) == [("kills", 16), ("next", 16)]
    assert bench.rows["next", 16].note == "The device stopped answering: illegal memory access"


def test_a_cpu_that_is_slower_than_estimated_leaves_cases_out(
    bench: Bench, contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    outcome = bench([contenders.nha("mine")], lengths=[16, 32, 64], trim=True)
    assert {row.seq_len for row in outcome.rows} == {16}
    assert "Out of time: tiny 1 x 32" in bench.said.getvalue()


def test_naive_is_last_and_unknown_names_are_named() -> None:
    assert all_contenders()[-1].name == "naive"
    assert [contender.name for contender in all_contenders(["naive", "linear"])] == ["linear", "naive"]
    with pytest.raises(ValueError, match=r"only: expected some of .*sdpa-flash.*got 'sdpa'"):
        all_contenders(["sdpa"])


def test_every_contender_has_a_name_of_its_own(row: Callable[..., Row]) -> None:
    names = [contender.name for contender in all_contenders()]
    assert len(names) == len(set(names))
    assert {contender.family for contender in all_contenders()} == {"nha", "full", "window", "linear"}


def test_warm_times_are_there_where_they_were_asked_for(bench: Bench, contenders: Any) -> None:
    bench([contenders.nha("a")], lengths=[16])
    assert bench.rows["a", 16].warm_ms is None
    bench([contenders.nha("a")], lengths=[16], warm=True)
    assert bench.rows["a", 16].warm_ms > 0  # type: ignore[operator]
    assert bench.rows["a", 16].graph_ratio is None  # a CPU has no second timer
