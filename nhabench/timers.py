"""Two timers of one GPU, events around a call and events around its CUDA graph: do they say the same?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nhabench.ceilings import open_device
from nhabench.contender import Call, Contender
from nhabench.errors import first_line
from nhabench.graphs import capture, two_times
from nhabench.inputs import Inputs, input_sets
from nhabench.timing import Timer, agree
from nhabench.workloads import Case

LENGTHS_MS = (0.06, 0.25, 1.0)  # about, of calls that do nothing but read and write
PROBE, PROBES = 2**26, 20  # elements, samples


@dataclass(frozen=True)
class TwoTimes:
    """The median time of a call by both timers, in ms, and whether they are the same. note: why there are none."""

    call: str
    events_ms: float | None
    graph_ms: float | None
    agree: bool
    note: str = ""


def compare_timers(contenders: Sequence[Contender], case: Case, device: torch.device, seconds: float) -> list[TwoTimes]:
    """Time contenders at a case, and copies of three lengths, by both timers in turns; for `seconds` each.

    Those that cannot run here are left out; one that fails has no times, and its reason. A CPU has one timer only: the
    list is empty.
    """
    if device.type != "cuda":
        return []
    timer = open_device(device)
    inputs = input_sets(case, device)
    able = [one for one in contenders if not (one.missing(device) or one.cannot(case, device))]
    found = [_both(one.label, partial(_bind, one, inputs), timer, seconds) for one in able]
    stopwatch, copy = timer.stopwatch(), _copy(PROBE, device)
    probe_ms = min(stopwatch(copy).ms for _ in range(PROBES))
    for wanted in LENGTHS_MS:
        elements = int(PROBE * wanted / probe_ms)
        found.append(_both(f"a copy of about {wanted:g} ms", partial(_copies, elements, device), timer, seconds))
    return found


def _both(name: str, make: Callable[[], list[Call]], timer: Timer, seconds: float) -> TwoTimes:
    try:
        calls = make()
        by_call, by_graph = two_times(calls, capture(calls), timer, seconds)
    except Exception as error:  # told beside what the others say
        return TwoTimes(name, None, None, False, first_line(error))
    same = agree(by_call.median_ms, by_graph.median_ms)
    return TwoTimes(name, by_call.median_ms, by_graph.median_ms, same)


def _bind(contender: Contender, inputs: Sequence[Inputs]) -> list[Call]:
    return [contender.bind(one) for one in inputs]


def _copies(elements: int, device: torch.device) -> list[Call]:
    return [_copy(elements, device)]


def _copy(elements: int, device: torch.device) -> Call:
    # A kernel, not the copy engine, which a graph would start in another way.
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return lambda: torch.neg(source, out=target)
