"""One case: who takes part, who is right, how fast. Every contender ends as one row, whatever happens to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nhabench import guard
from nhabench.check import Verdict, check_against, check_baseline, first_output, poison, release
from nhabench.contender import Call, Contender, Unsupported
from nhabench.environment import Environment
from nhabench.errors import first_line, is_out_of_memory, without_frames
from nhabench.floors import Ceilings
from nhabench.gpu import ClockSample, GpuWatch, clock_fell, extra_peak_bytes
from nhabench.graphs import Graphs, capture
from nhabench.guard import fingerprint, marks, out_of_turn, plain, refill
from nhabench.inputs import Inputs, bytes_needed, cache_bytes, cache_state, free_bytes, input_sets, set_count
from nhabench.reference import Judge, small_inputs
from nhabench.results import HOST_TIME, Row
from nhabench.timing import Timer, Timing, Warm, agree, in_turns, race
from nhabench.workloads import Case

SHORT_OF_MEMORY = "GiB are free"
SMALL_SEQUENCES = 5  # of the small check of a baseline at packed sequences
LONGEST_CALL_S = {"cuda": 1.5, "cpu": 2.5}  # a call that is predicted to take longer is skipped


class DeviceLost(Exception):
    """Nothing more can be measured in this process; str() says why. `rows`: those of the case so far."""

    def __init__(self, reason: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(reason)
        self.rows = list(rows)


@dataclass
class Lab:
    """What all cases of a run share: the device, its timer and ceilings, and what was learnt at earlier cases.

    warm: whether calls are also timed with their inputs in the caches.
    """

    device: torch.device
    timer: Timer
    watch: GpuWatch
    environment: Environment
    ceilings: Ceilings
    seconds: float
    warm: bool = False
    judges: dict[tuple[object, ...], Judge] = field(default_factory=dict)
    baseline_verdicts: dict[tuple[object, ...], Verdict | None] = field(default_factory=dict)
    last: dict[tuple[object, ...], tuple[Case, float]] = field(default_factory=dict)

    def judge(self, case: Case) -> Judge:
        """The judge of a case's workload and dtype."""
        key = (case.workload, case.dtype)
        if key not in self.judges:
            self.judges[key] = Judge(case.workload, case.dtype, self.device)
        return self.judges[key]

    def baseline_verdict(self, contender: Contender, case: Case) -> Verdict | None:
        """A baseline's check at a small size of the case's workload, with packed sequences if the case has them; made
        once."""
        packed = SMALL_SEQUENCES if case.sequences else 0
        key = (contender.name, case.workload, case.dtype, packed)
        if key not in self.baseline_verdicts:
            inputs = small_inputs(case.workload, case.dtype, self.device, packed)
            self.baseline_verdicts[key] = check_baseline(contender, inputs)
        return self.baseline_verdicts[key]

    def predicted_s(self, contender: Contender, case: Case) -> float | None:
        """Seconds that one call should take, from the last size of the workload; None where there was none."""
        known = self.last.get((contender.name, case.workload, case.dtype))
        if known is None:
            return None
        before, seconds = known
        power = 2 if contender.quadratic else 1
        now, then = (sum(length**power for length in one.lengths) for one in (case, before))
        return seconds * now / then


@dataclass
class Entry:
    """A contender on its way to its row. `changes`: the columns known so far."""

    contender: Contender
    status: str = ""
    note: str = ""
    calls: list[Call] = field(default_factory=list)
    graphs: Graphs | None = None
    marks: guard.Marks | None = None  # of the output that was checked
    changes: dict[str, Any] = field(default_factory=dict)
    all_ms: tuple[float, ...] = ()  # the samples
    remarks: list[str] = field(default_factory=list)  # for the note of a row that is ok

    @property
    def waiting(self) -> bool:
        """Whether it is still in the race."""
        return not self.status

    def end(self, status: str, note: str) -> None:
        """Take it out, with the reason. Its calls go too: they hold its inputs, and memory for what they make."""
        self.status, self.note, self.calls, self.graphs = status, note, [], None


def earlier_rows(lab: Lab, case: Case, contenders: Sequence[Contender], rows: Sequence[Row]) -> list[Row] | None:
    """Of `rows`, those that the same run left of a case before it was interrupted; None where it must be measured.

    The same run: the same command on the same commit, device and software. Of changed code, or code that git does not
    know, nobody can say whether it is the same. What failed, lacked memory or was not installed is measured again: that
    may have been of that hour.
    """
    here = lab.environment
    if not here.git_sha or here.git_dirty is not False:
        return None
    same = {field.name: getattr(here, field.name) for field in dataclasses.fields(Environment) if field.name != "date"}
    same |= {**_case_columns(case), "direction": "forward"}
    found = {
        row.implementation: row
        for row in rows
        if not _of_the_hour(row) and all(getattr(row, name) == value for name, value in same.items())
    }
    if not all(contender.name in found for contender in contenders):
        return None
    earlier = [found[contender.name] for contender in contenders]
    for contender, row in zip(contenders, earlier, strict=True):
        if row.median_ms is not None:
            lab.last[contender.name, case.workload, case.dtype] = (case, row.median_ms / 1e3)
    return earlier


def _of_the_hour(row: Row) -> bool:
    if row.status == "skipped":
        return SHORT_OF_MEMORY in row.note
    return row.status in ("failed", "out of memory", "unavailable")


def measure_case(
    lab: Lab,
    case: Case,
    contenders: Sequence[Contender],
    said: Callable[[str], object],
    samples: dict[str, tuple[float, ...]] | None = None,
) -> list[Row]:
    """Check and time the contenders at a case; `said` is told what is going on. One row for each, in their order.

    samples: gets the times in ms behind the rows, by the contenders' names. Raises DeviceLost, which holds the rows,
    when the device stops answering.
    """
    entries = [Entry(contender) for contender in contenders]
    try:
        _all_steps(lab, case, entries, said)
    except DeviceLost as error:
        for entry in entries:
            if entry.waiting:
                entry.end("failed", str(error))
        raise DeviceLost(str(error), [_row(lab, case, entry) for entry in entries]) from error
    if samples is not None:
        samples.update({entry.contender.name: entry.all_ms for entry in entries})
    return [_row(lab, case, entry) for entry in entries]


def _all_steps(lab: Lab, case: Case, entries: Sequence[Entry], said: Callable[[str], object]) -> None:
    try:
        _screen(lab, case, entries)
        if any(entry.waiting for entry in entries):
            _check_and_time(lab, case, entries, said)
        release(lab.device)
        return
    except DeviceLost:
        raise
    except Exception as error:  # outside the contenders' own steps: a fault that showed late, a question to the device
        failure = without_frames(error)
    _fail_all(lab, entries, failure)
    _recover(lab.device)


def _screen(lab: Lab, case: Case, entries: Sequence[Entry]) -> None:
    """Turn away what cannot run or would take too long, before anything is allocated."""
    needed = bytes_needed(case, set_count(case, cache_bytes(lab.device)))
    free = free_bytes(lab.device)
    for entry in entries:
        _attempt(lab, entry, partial(_turn_away, lab, case, entry, needed, free))


def _turn_away(lab: Lab, case: Case, entry: Entry, needed: int, free: int) -> None:
    limit = LONGEST_CALL_S[lab.device.type]
    missing = entry.contender.missing(lab.device)
    cannot = None if missing else entry.contender.cannot(case, lab.device)
    predicted = lab.predicted_s(entry.contender, case)
    if missing:
        entry.end("unavailable", missing)
    elif cannot:
        entry.end("unsupported", cannot)
    elif needed > free:
        gib = 2**30
        entry.end("skipped", f"The case needs {needed / gib:.1f} GiB; {free / gib:.1f} {SHORT_OF_MEMORY}.")
    elif predicted is not None and predicted > limit:
        before = lab.last[entry.contender.name, case.workload, case.dtype][0].seq_len
        entry.end(
            "skipped",
            f"One call would take about {predicted:.1f} s (predicted from T={before}); the limit is {limit} s.",
        )


def _check_and_time(lab: Lab, case: Case, entries: Sequence[Entry], said: Callable[[str], object]) -> None:
    inputs = input_sets(case, lab.device)
    sets = len(inputs)
    for entry in entries:
        entry.changes.update(input_sets=sets, cache=cache_state(case, sets, cache_bytes(lab.device)))
    _check_all(lab, case, entries, inputs[0], said)
    racing = [entry for entry in entries if entry.waiting]
    for entry in racing:
        said(f"preparing {entry.contender.label}")
        _attempt(lab, entry, partial(_prepare, lab, case, entry, inputs))
    racing = [entry for entry in racing if entry.waiting]
    if racing:
        _race(lab, case, racing, inputs, said)


def _check_all(lab: Lab, case: Case, entries: Sequence[Entry], inputs: Inputs, said: Callable[[str], object]) -> None:
    """Compare every waiting contender with its reference: NHA at this case, baselines at a small size."""
    waiting = [entry for entry in entries if entry.waiting]
    nha = [entry for entry in waiting if entry.contender.family == "nha"]
    if nha:
        _check_nha(lab, nha, inputs, said)
    release(lab.device)
    for entry in waiting:
        if entry.contender.family != "nha":
            said(f"checking {entry.contender.label}")
            _attempt(lab, entry, partial(_check_baseline, lab, case, entry))


def _check_nha(lab: Lab, entries: Sequence[Entry], inputs: Inputs, said: Callable[[str], object]) -> None:
    said("computing the float64 reference")
    failure: Exception | None = None
    try:
        judge = lab.judge(inputs.case)
        truth, name = judge.reference(inputs)
    except Exception as error:  # without a reference none of them is timed
        failure = without_frames(error)
    if failure is not None:
        _fail_all(lab, entries, failure, "the float64 reference: ")
        return
    for entry in entries:
        said(f"checking {entry.contender.label}")

        def check(entry: Entry = entry) -> None:
            with _kept(entry, inputs):
                o, extra = first_output(entry.contender.bind(inputs), inputs.q)
            _memory(entry, inputs.case, extra)
            _first_look(entry, o)
            if entry.waiting:
                _judge(entry, check_against(o, truth, name, judge.tolerance))

        _attempt(lab, entry, check)


@contextmanager
def _kept(entry: Entry, inputs: Inputs, seed: int = 0) -> Iterator[None]:
    """The inputs, made from `seed`, are afterwards as they were before; a contender that wrote into them is ended."""
    before = fingerprint(inputs)
    try:
        yield
    finally:
        if fingerprint(inputs) != before:
            refill(inputs, seed)
            entry.end("incorrect", guard.WROTE)


def _first_look(entry: Entry, o: object) -> None:
    """Keep the marks of an output; what is none is not timed."""
    if not entry.waiting:
        return
    if plain(o):
        entry.marks = marks(o)
    else:
        entry.end("incorrect", guard.NO_TENSOR)


def _memory(entry: Entry, case: Case, extra: int | None) -> None:
    if extra is not None:
        entry.changes.update(extra_peak_bytes=extra, peak_bytes=extra + case.input_bytes)


def _check_baseline(lab: Lab, case: Case, entry: Entry) -> None:
    verdict = lab.baseline_verdict(entry.contender, case)
    if verdict is not None:
        _judge(entry, verdict)


def _judge(entry: Entry, verdict: Verdict) -> None:
    entry.changes.update(
        error=verdict.distance.total,
        worst_error=verdict.distance.worst,
        tolerance=verdict.tolerance.total,
        worst_tolerance=verdict.tolerance.worst,
        reference=verdict.reference,
    )
    if not verdict.correct:
        entry.end("incorrect", verdict.sentence)


def _prepare(lab: Lab, case: Case, entry: Entry, inputs: Sequence[Inputs]) -> None:
    """Bind every input set. A baseline, which its check ran at a small size, runs here for the first time at this one:
    that compiles it, shows whether it fits, tells its memory, and whether it writes numbers everywhere."""
    entry.calls = [entry.contender.bind(one) for one in inputs]
    if entry.contender.family != "nha":
        with _kept(entry, inputs[0]):
            o, _ = first_output(entry.calls[0], inputs[0].q)
        _first_look(entry, o)
        if not entry.waiting:
            return
        if not o.isfinite().all():
            entry.end("incorrect", "Its output at this size holds NaN or infinity.")
            return
        del o
        if lab.device.type == "cuda":  # a first call may take memory for its compiler's own timing runs
            _memory(entry, case, extra_peak_bytes(entry.calls[0], lab.device))


def _race(
    lab: Lab, case: Case, racing: Sequence[Entry], inputs: Sequence[Inputs], said: Callable[[str], object]
) -> None:
    before: list[ClockSample | None] = []
    untouched = [fingerprint(one) for one in inputs]
    if lab.device.type == "cuda":
        said(f"capturing {len(racing)} implementations")
        _capture_all(racing)
    captured = {entry.contender.name: entry.graphs.replays for entry in racing if entry.graphs is not None}
    said(f"timing {len(racing)} implementations")
    results = race(
        [*(in_turns(entry.calls) for entry in racing), *map(in_turns, captured.values())],
        lab.timer,
        sets=len(inputs),
        seconds=lab.seconds,
        started=lambda: before.append(lab.watch.clocks()),
    )
    after = lab.watch.clocks()
    # From a race of their own: between two calls of a contender the others would cool its caches.
    warm = race([in_turns(entry.calls) for entry in racing], Warm(lab.timer), 1, lab.seconds) if lab.warm else []
    if [fingerprint(one) for one in inputs] != untouched:
        _find_writers(lab, racing, inputs)
        left = [entry for entry in racing if entry.waiting]
        if left:
            _race(lab, case, left, inputs, said)
        return
    again = dict(zip(captured, results[len(racing) :], strict=True))
    warmed = dict(zip((entry.contender.name for entry in racing), warm, strict=False))
    for entry, result in zip(racing, results, strict=False):
        if isinstance(result, Exception):
            _fail(lab, entry, result)
            continue
        name = entry.contender.name
        lab.last[name, case.workload, case.dtype] = (case, result.median_ms / 1e3)
        said(f"checking {entry.contender.label} again")
        _attempt(lab, entry, partial(_look_again, entry, inputs[0]))
        _attempt(lab, entry, partial(second_timer, entry, result, again.get(name)))
        if entry.waiting:
            _keep_times(lab, entry, result, warmed.get(name), _clock_columns(before[0], after))


def _capture_all(racing: Sequence[Entry]) -> None:
    pool = torch.cuda.graph_pool_handle()
    for entry in racing:
        if entry.graphs is None:
            try:
                entry.graphs = capture(entry.calls, pool)
            except Exception as error:  # it can be timed all the same
                entry.remarks.append(f"It cannot be captured in a CUDA graph: {first_line(error)}.")
                pool = torch.cuda.graph_pool_handle()  # torch may believe that the failed capture still goes on


def second_timer(entry: Entry, timing: Timing, of_graph: Timing | Exception | None) -> None:
    """Keep the time that the contender's graph took, if it did the work, and say where it is another one."""
    if not entry.waiting or entry.graphs is None or of_graph is None:
        return
    if isinstance(of_graph, Exception):
        entry.remarks.append(f"Its CUDA graph failed: {first_line(of_graph)}.")
        return
    assert entry.marks is not None
    entry.graphs.o.fill_(torch.nan)
    entry.graphs.replays[0]()
    if not entry.marks.distance(marks(entry.graphs.o)) <= guard.SAME:
        entry.remarks.append("Its CUDA graph does not do its work: it has no time.")
        return
    entry.changes.update(graph_ms=of_graph.median_ms)
    if not agree(timing.median_ms, of_graph.median_ms):
        more = of_graph.median_ms / timing.median_ms - 1
        entry.remarks.append(
            f"The timers disagree: as a CUDA graph it takes {abs(more):.1%} {'more' if more > 0 else 'less'}."
        )


def _keep_times(
    lab: Lab, entry: Entry, timing: Timing, warm: Timing | Exception | None, clocks: Mapping[str, Any]
) -> None:
    columns = dataclasses.asdict(timing)
    del columns["late"], columns["left_out"], columns["all_ms"]
    entry.all_ms = timing.all_ms
    timer = lab.timer.name + (HOST_TIME if timing.includes_host else "")
    if isinstance(warm, Timing):
        columns["warm_ms"] = warm.median_ms
    entry.changes.update(columns, timer=timer, **clocks)
    entry.end("ok", " ".join(filter(None, (entry.contender.remark, _host_note(timing), *entry.remarks))))


def _find_writers(lab: Lab, racing: Sequence[Entry], inputs: Sequence[Inputs]) -> None:
    """Restore the inputs, and end who writes into them; all, where nobody does while being watched."""
    for seed, one in enumerate(inputs):
        refill(one, seed)
    for entry in racing:

        def watched(entry: Entry = entry) -> None:
            for seed, (call, one) in enumerate(zip(entry.calls, inputs, strict=True)):
                with _kept(entry, one, seed):
                    call()

        _attempt(lab, entry, watched)
    if all(entry.waiting for entry in racing):
        for entry in racing:
            entry.end("incorrect", guard.SPOILT)


def _look_again(entry: Entry, inputs: Inputs) -> None:
    """No times for a contender that did not do, when it was timed, what it did when it was checked."""
    assert entry.marks is not None
    with _kept(entry, inputs):
        poison(inputs.q)  # an output that is never written must not be the one that lay there
        again = entry.calls[0]()
        if inputs.q.device.type == "cuda":
            torch.cuda.synchronize()  # who works on another stream is told so below, and not that it did not work
    if not entry.waiting:
        return
    if not plain(again) or not entry.marks.distance(marks(again)) <= guard.SAME:
        entry.end("incorrect", guard.UNCHECKED)
    elif entry.contender.family == "nha":  # a baseline may have laid out its inputs anew before it was timed
        refill(inputs, seed=-1)
        poison(inputs.q)
        distance = entry.marks.distance(marks(entry.calls[0]()))
        refill(inputs, 0)
        if not distance >= guard.OTHER:
            entry.end("incorrect", guard.REMEMBERED)
    if entry.waiting and inputs.q.device.type == "cuda":
        del again
        told = out_of_turn(entry.calls[0], entry.marks)
        if told == guard.UNSEEN:
            entry.remarks.append(told)
        elif told:
            entry.end("incorrect", told)


def _host_note(timing: Timing) -> str:
    if timing.left_out:
        return f"{timing.left_out} further samples are left out: they may hold host time."
    if timing.includes_host:
        return (
            f"Includes host time: in {timing.late} of {timing.samples} samples the host had not queued the whole call "
            "when the device began it."
        )
    return f"{timing.late} of {timing.samples} samples may hold host time." if timing.late else ""


def _clock_columns(before: ClockSample | None, after: ClockSample | None) -> dict[str, Any]:
    held_back = [sample.throttle for sample in (before, after) if sample is not None and sample.throttle]
    return {
        "sm_clock_before_mhz": None if before is None else before.sm_mhz,
        "sm_clock_after_mhz": None if after is None else after.sm_mhz,
        "clock_fell": clock_fell(before, after),
        "throttle": "; ".join(dict.fromkeys(held_back)),
    }


def _attempt(lab: Lab, entry: Entry, step: Callable[[], object]) -> None:
    """Run a step of one contender; whatever it raises becomes its row, and the others go on."""
    try:
        step()
        return
    except Exception as error:
        failure = without_frames(error)
    # Not inside the handler: until its end the failed step keeps its tensors, and no memory could be released.
    _fail(lab, entry, failure)


def _fail_all(lab: Lab, entries: Sequence[Entry], error: Exception, where: str = "") -> None:
    for entry in entries:
        if entry.waiting:
            _fail(lab, entry, error, where)


def _fail(lab: Lab, entry: Entry, error: Exception, where: str = "") -> None:
    """End a contender with what it raised. Raises DeviceLost when the error took the device with it."""
    if isinstance(error, Unsupported):
        entry.end("unsupported", str(error))
        return
    text = " ".join(str(error).split()) or type(error).__name__
    status = "out of memory" if is_out_of_memory(error) else "failed"
    entry.end(status, f"{where}{type(error).__name__}: {text[:300]}")
    _recover(lab.device)


def _recover(device: torch.device) -> None:
    """Release memory after an error. Raises DeviceLost: after an illegal access, for one, every further call fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        release(device)
    except RuntimeError as lost:
        raise DeviceLost(f"The device stopped answering: {first_line(lost)}") from lost


def _row(lab: Lab, case: Case, entry: Entry) -> Row:
    """The finished row: the case, what happened, and the rates that follow from it."""
    floor, contender = entry.contender.floor(case), entry.contender
    columns: dict[str, Any] = {
        "floor_bytes": floor.bytes,
        "floor_flops": floor.flops,
        "state_bytes": floor.state_bytes,
        "floor_ms": floor.milliseconds(lab.ceilings),
        "copy_tb_per_s": lab.ceilings.copy_tb_per_s,
        "matmul_tflop_per_s": lab.ceilings.matmul_tflop_per_s,
        **entry.changes,
    }
    if entry.status == "ok":
        milliseconds = entry.changes["median_ms"]
        columns["floor_fraction"] = columns["floor_ms"] / milliseconds
        columns["tb_per_s"] = floor.bytes / milliseconds * 1e-9
        columns["tflop_per_s"] = floor.flops / milliseconds * 1e-9
    return Row(
        **dataclasses.asdict(lab.environment),
        **_case_columns(case),
        direction="forward",
        implementation=contender.name,
        label=contender.label,
        family=contender.family,
        status=entry.status,
        note=entry.note,
        **columns,
    )


def _case_columns(case: Case) -> Mapping[str, Any]:
    shape = dataclasses.asdict(case.workload)
    del shape["tokens"]
    sizes = {"batch": case.batch, "seq_len": case.seq_len, "sequences": case.sequences, "dtype": case.dtype}
    return {"workload": shape.pop("name"), **shape, **sizes}
