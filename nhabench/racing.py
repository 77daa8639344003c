"""Those that are right at a case are timed, by two timers on a GPU, and then asked again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from nhabench import guard
from nhabench.check import poison
from nhabench.errors import first_line, without_frames
from nhabench.gpu import ClockSample, clock_fell
from nhabench.graphs import capture, graph_ratio
from nhabench.guard import Sets, marks, out_of_turn, plain, refill, same_place
from nhabench.inputs import Inputs
from nhabench.lab import Entry, Lab, attempt, fail
from nhabench.outputs import Step, fill
from nhabench.results import HOST_TIME
from nhabench.timing import AGREE, SLOW_MS, Timing, Warm, agree, in_turns, race
from nhabench.training import bound
from nhabench.workloads import Case

# Of timed calls, by their input set: marks of the output, None for what is no output, or what looking at it raised.
Seen = dict[int, guard.Marks | Exception | None]


def race_entries(lab: Lab, case: Case, racing: Sequence[Entry], sets: Sets, said: Callable[[str], object]) -> None:
    """Time the entries at a case: each ends with its times, or with the reason why it has none.

    sets: of inputs, to each of which each entry has a call. `said` is told what is going on. Raises DeviceLost.
    """
    before: list[ClockSample | None] = []
    seen: list[Seen] = [{} for _ in racing]

    def after_turn(number: int, index: int, o: object, left: bool) -> None:
        try:
            # The last turn, of which a contender does not know that it is one, and one with inputs not checked yet.
            if left or (index and not any(seen[number])):
                seen[number][index] = marks(o) if plain(o) else None
            if plain(o):
                guard.spoil(o)
        except Exception as error:  # of this contender, not of the race
            seen[number][index] = without_frames(error)

    said(f"timing {len(racing)} implementations")
    results = race(
        [in_turns(entry.calls) for entry in racing],
        lab.timer,
        len(sets.inputs),
        lab.seconds,
        started=lambda: before.append(lab.watch.clocks()),
        after=after_turn,
    )
    after = lab.watch.clocks()
    if sets.restore():
        _find_writers(lab, racing, sets)
        left = [entry for entry in racing if entry.waiting]
        if left:
            race_entries(lab, case, left, sets, said)
        return
    passed: list[tuple[Entry, Timing]] = []
    try:
        for number, (entry, result) in enumerate(zip(racing, results, strict=True)):
            if isinstance(result, Exception):
                fail(lab, entry, result)
                continue
            lab.last[entry.contender.name, *case.kind] = (case, result.median_ms / 1e3)
            said(f"checking {entry.contender.label} again")
            attempt(lab, entry, partial(look_again, entry, sets.inputs, seen[number]), sets)
            passed += [(entry, result)] if entry.waiting else []
        if lab.device.type == "cuda":
            _race_graphs(lab, passed, sets, said)
        if lab.warm:
            said("timing warm calls")
            _race_warm(lab, [entry for entry, _ in passed if entry.waiting])
    finally:  # where the device is lost meanwhile, what was measured and passed is kept
        for entry, timing in passed:
            if entry.waiting:
                _keep_times(lab, entry, timing, _clock_columns(before[0], after))


def _race_graphs(lab: Lab, passed: Sequence[tuple[Entry, Timing]], sets: Sets, said: Callable[[str], object]) -> None:
    """Time the contenders by the second timer, one after the other: their graphs together would take much memory."""
    for entry, timing in passed:
        if entry.waiting and timing.median_ms < SLOW_MS:
            said(f"timing {entry.contender.label} as a CUDA graph")
            share_s = lab.seconds / len(passed)
            attempt(lab, entry, partial(second_timer, lab, entry, timing, share_s), sets)


def second_timer(lab: Lab, entry: Entry, timing: Timing, seconds: float) -> None:
    """Time a contender, which has its timing, as a CUDA graph, in turns with its calls; for `seconds` at most.

    Its remarks say where the two differ, or why it cannot be done.
    """
    assert entry.marks is not None
    try:
        graphs = capture(entry.calls)
        ratio = graph_ratio(entry.calls, graphs, lab.timer, seconds)
        fill(graphs.o, torch.nan)
        graphs.replays[0]()
        right = entry.marks.distance(marks(graphs.o)) <= guard.SAME
    except Exception as error:  # it has its time all the same
        torch.cuda.synchronize()  # raises where the device is lost
        entry.remarks.append(f"It cannot be timed as a CUDA graph: {first_line(error)}")
        return
    if not right:
        entry.remarks.append("As a CUDA graph it does not do its work.")
        return
    entry.changes.update(graph_ratio=ratio.median)
    if not timing.includes_host and not agree(timing.median_ms, ratio.median):
        told = f"{ratio.median - 1:+.1%} as a CUDA graph ({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})"
        sure = ratio.low > 1 + AGREE or ratio.high < 1 - AGREE
        entry.remarks.append(f"The timers {'' if sure else 'may '}disagree: {told}.")


def _race_warm(lab: Lab, entries: Sequence[Entry]) -> None:
    results = race([in_turns(entry.calls) for entry in entries], Warm(lab.timer), 1, lab.seconds)
    for entry, result in zip(entries, results, strict=True):
        if isinstance(result, Timing):
            entry.changes.update(warm_ms=result.median_ms)
        else:  # it has its time all the same
            entry.remarks.append(f"It has no warm time: {first_line(result)}")


def _keep_times(lab: Lab, entry: Entry, timing: Timing, clocks: Mapping[str, Any]) -> None:
    columns = dataclasses.asdict(timing)
    del columns["late"], columns["left_out"], columns["all_ms"]
    entry.all_ms = timing.all_ms
    timer = lab.timer.name + (HOST_TIME if timing.includes_host else "")
    entry.changes.update(columns, timer=timer, **clocks)
    entry.end("ok", " ".join(filter(None, (entry.contender.remark, _host_note(timing), *entry.remarks))))


def _find_writers(lab: Lab, racing: Sequence[Entry], sets: Sets) -> None:
    """End who writes into the inputs; all, where nobody does while being watched."""
    for entry in racing:

        def watched(entry: Entry = entry) -> None:
            for call in entry.calls:
                o = call()
                if plain(o):
                    guard.spoil(o)

        attempt(lab, entry, watched, sets)
    if all(entry.waiting for entry in racing):
        for entry in racing:
            entry.end("incorrect", guard.SPOILT)


def look_again(entry: Entry, inputs: Sequence[Inputs], seen: Seen) -> None:
    """No times for a contender that did not do, when it was timed, what it did when it was checked.

    It was checked at the first input set. There its output must be what it was, and at the sets of timed calls that of
    those calls; which must also be that of the first set with the values of the other in it.
    """
    assert entry.marks is not None
    now: dict[int, guard.Marks] = {}
    for index, then in ((0, entry.marks), *seen.items()):
        if isinstance(then, Exception):
            raise then
        found = now[index] if index in now else _look_now(entry, inputs[index], entry.calls[index])
        if not entry.waiting:
            return
        if then is None or found is None or not then.distance(found) <= guard.SAME:
            entry.end("incorrect", guard.UNCHECKED)
            return
        now[index] = found
    first = inputs[0]
    for index in filter(None, now) if len(now) > 1 else (-1,):
        other = _with_other_values(entry, first, seed=index)
        if not entry.marks.change(other) >= guard.OTHER:
            entry.end("incorrect", guard.REMEMBERED)
            return
        if index > 0 and not other.distance(now[index]) <= guard.SAME:
            entry.end("incorrect", guard.UNCHECKED)
            return
    sources = first.v if first.do is None else (first.v, first.do)
    if first.q.device.type == "cuda" and out_of_turn(entry.calls[0], sources, entry.marks):
        entry.end("incorrect", guard.OUT_OF_TURN)


def _look_now(entry: Entry, inputs: Inputs, call: Step) -> guard.Marks | None:
    """Marks of the output at an input set; None for what is no output. Ends who returns what was made before, or not
    the same twice."""
    poison(inputs)  # an output that is never written must not be the one that lay there
    o = call()
    _settle(inputs.q.device)
    if not plain(o):
        return None
    found = marks(o)
    fill(o, torch.nan)
    again = call()
    if not found.distance(marks(again)) <= guard.SAME:
        entry.end("incorrect", guard.REMEMBERED if same_place(again, o) else guard.UNCHECKED)
    return found


def _with_other_values(entry: Entry, inputs: Inputs, seed: int) -> guard.Marks:
    """Marks of a contender's output at the first input set, with the values of another seed in it."""
    refill(inputs, seed)
    # A baseline may lay out its inputs anew when it is bound.
    call = entry.calls[0] if entry.contender.family == "nha" else bound(entry.contender, inputs)
    poison(inputs)
    found = marks(call())
    refill(inputs, 0)
    return found


def _settle(device: torch.device) -> None:
    """Wait for all streams of a GPU: who works on one of their own is told so, and not that it does not work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
