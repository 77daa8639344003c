"""Those that are right at a case are timed, by two timers on a GPU, and then asked again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from nhabench import guard
from nhabench.check import poison
from nhabench.errors import first_line
from nhabench.gpu import ClockSample, clock_fell
from nhabench.graphs import capture
from nhabench.guard import fingerprint, marks, out_of_turn, plain, refill
from nhabench.inputs import Inputs
from nhabench.lab import Entry, Lab, attempt, fail, kept
from nhabench.results import HOST_TIME
from nhabench.timing import Timing, Warm, agree, in_turns, race
from nhabench.workloads import Case


def race_entries(
    lab: Lab, case: Case, racing: Sequence[Entry], inputs: Sequence[Inputs], said: Callable[[str], object]
) -> None:
    """Time the entries at a case: each ends with its times, or with the reason why it has none.

    inputs: the sets to rotate, from the seeds 0, 1, ..., to which each entry has its calls. `said` is told what is
    going on. Raises DeviceLost.
    """
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
            race_entries(lab, case, left, inputs, said)
        return
    again = dict(zip(captured, results[len(racing) :], strict=True))
    warmed = dict(zip((entry.contender.name for entry in racing), warm, strict=False))
    for entry, result in zip(racing, results, strict=False):
        if isinstance(result, Exception):
            fail(lab, entry, result)
            continue
        name = entry.contender.name
        lab.last[name, case.workload, case.dtype] = (case, result.median_ms / 1e3)
        said(f"checking {entry.contender.label} again")
        attempt(lab, entry, partial(look_again, entry, inputs[0]))
        attempt(lab, entry, partial(second_timer, entry, result, again.get(name)))
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
                with kept(entry, one, seed):
                    call()

        attempt(lab, entry, watched)
    if all(entry.waiting for entry in racing):
        for entry in racing:
            entry.end("incorrect", guard.SPOILT)


def look_again(entry: Entry, inputs: Inputs) -> None:
    """No times for a contender that did not do, when it was timed, what it did when it was checked."""
    assert entry.marks is not None
    with kept(entry, inputs):
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
