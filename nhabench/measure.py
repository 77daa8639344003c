"""One case: who takes part, who is right, how fast. Every contender ends as one row, whatever happens to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from nhabench import guard
from nhabench.check import Verdict, check_against, first_output, release
from nhabench.contender import Contender
from nhabench.errors import without_frames
from nhabench.gpu import extra_peak_bytes
from nhabench.guard import Sets, guarded, marks, plain
from nhabench.inputs import (
    Inputs,
    bytes_needed,
    cache_bytes,
    cache_state,
    free_bytes,
    input_sets,
    make_inputs,
    set_count,
)
from nhabench.lab import DeviceLost, Entry, Lab, attempt, fail_all, recover
from nhabench.outputs import finite
from nhabench.racing import race_entries
from nhabench.reference import checked_at
from nhabench.results import Row
from nhabench.rows import SHORT_OF_MEMORY, row_of
from nhabench.training import bound
from nhabench.workloads import Case

LONGEST_CALL_S = {"cuda": 1.5, "cpu": 2.5}  # a call that is predicted to take longer is skipped


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
        raise DeviceLost(str(error), [row_of(lab, case, entry) for entry in entries]) from error
    if samples is not None:
        samples.update({entry.contender.name: entry.all_ms for entry in entries})
    return [row_of(lab, case, entry) for entry in entries]


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
    fail_all(lab, entries, failure)
    recover(lab.device)


def _screen(lab: Lab, case: Case, entries: Sequence[Entry]) -> None:
    """Turn away what cannot run or would take too long, before anything is allocated."""
    needed = bytes_needed(case, set_count(case, cache_bytes(lab.device)), lab.device.type)
    free = free_bytes(lab.device)
    for entry in entries:
        attempt(lab, entry, partial(_turn_away, lab, case, entry, needed, free))


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
        before = lab.last[entry.contender.name, *case.kind][0].seq_len
        entry.end(
            "skipped",
            f"One call would take about {predicted:.1f} s (predicted from T={before}); the limit is {limit} s.",
        )


def _check_and_time(lab: Lab, case: Case, entries: Sequence[Entry], said: Callable[[str], object]) -> None:
    sets = guarded(input_sets(case, lab.device))
    count = len(sets.inputs)
    for entry in entries:
        entry.changes.update(input_sets=count, cache=cache_state(case, count, cache_bytes(lab.device)))
    _check_all(lab, case, entries, sets, said)
    racing = [entry for entry in entries if entry.waiting]
    for entry in racing:
        said(f"preparing {entry.contender.label}")
        attempt(lab, entry, partial(_prepare, lab, case, entry, sets.inputs), sets)
    racing = [entry for entry in racing if entry.waiting]
    if racing:
        race_entries(lab, case, racing, sets, said)


def _check_all(lab: Lab, case: Case, entries: Sequence[Entry], sets: Sets, said: Callable[[str], object]) -> None:
    """Compare every waiting contender with its reference: NHA at this case, baselines at a small size."""
    waiting = [entry for entry in entries if entry.waiting]
    nha = [entry for entry in waiting if entry.contender.family == "nha"]
    if nha:
        _check_nha(lab, nha, sets, said)
    release(lab.device)
    for entry in waiting:
        if entry.contender.family != "nha":
            said(f"checking {entry.contender.label}")
            attempt(lab, entry, partial(_check_baseline, lab, case, entry))


def _check_nha(lab: Lab, entries: Sequence[Entry], sets: Sets, said: Callable[[str], object]) -> None:
    """At this case, whose sets of inputs these are, or at one that stands in for it."""
    said("computing the float64 reference")
    case = sets.inputs[0].case
    failure: Exception | None = None
    try:
        judge, at = lab.judge(case), checked_at(case)
        here = at == case
        sets = sets if here else guarded([make_inputs(at, lab.device)])
        inputs = sets.inputs[0]
        truth, name = judge.reference(inputs)
        name += "" if here else f" at T={at.seq_len}"
    except Exception as error:  # without a reference none of them is timed
        failure = without_frames(error)
    if failure is not None:
        fail_all(lab, entries, failure, "the float64 reference: ")
        return
    for entry in entries:
        said(f"checking {entry.contender.label}")

        def check(entry: Entry = entry) -> None:
            o, extra = first_output(bound(entry.contender, inputs), inputs)
            _first_look(entry, o, inputs)
            if here:
                _memory(entry, case, extra)
            else:
                entry.marks = None  # of another case
            if entry.waiting:
                _judge(entry, check_against(o, truth, name, judge.tolerance))

        attempt(lab, entry, check, sets)


def _first_look(entry: Entry, o: object, inputs: Inputs) -> None:
    """Keep the marks of an output; what is none is not timed."""
    if not entry.waiting:
        return
    if not plain(o) or isinstance(o, tuple) != inputs.case.training:
        entry.end("incorrect", guard.NO_GRADIENTS if inputs.case.training else guard.NO_TENSOR)
    elif guard.shares_memory(o, inputs):
        entry.end("incorrect", guard.AN_INPUT)
    else:
        entry.marks = marks(o)


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
    """Bind every input set. Who was checked at another size, as every baseline, runs here for the first time at this
    one: that compiles it, shows whether it fits, tells its memory, and whether it writes numbers everywhere."""
    entry.calls = [bound(entry.contender, one) for one in inputs]
    if entry.marks is None:
        o, _ = first_output(entry.calls[0], inputs[0])
        _first_look(entry, o, inputs[0])
        if not entry.waiting:
            return
        if not finite(o):
            entry.end("incorrect", "Its output at this size holds NaN or infinity.")
            return
        del o
        if lab.device.type == "cuda":  # a first call may take memory for its compiler's own timing runs
            _memory(entry, case, extra_peak_bytes(entry.calls[0], lab.device))
