"""Two timers of one GPU, events around a call and events around its CUDA graph: do they say the same?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nhabench.ceilings import open_device
from nhabench.contender import Call, Contender
from nhabench.graphs import capture
from nhabench.inputs import input_sets
from nhabench.timing import Timing, agree, in_turns, race
from nhabench.workloads import Case

LENGTHS_MS = (0.06, 0.25, 1.0)  # about, of calls that do nothing but read and write
PROBE = 2**26  # elements


@dataclass(frozen=True)
class TwoTimes:
    """The median time of a call by both timers, in ms, and whether they are the same."""

    call: str
    events_ms: float
    graph_ms: float
    agree: bool


def compare_timers(contenders: Sequence[Contender], case: Case, device: torch.device, seconds: float) -> list[TwoTimes]:
    """Time copies of three lengths, and contenders at a case, by both timers in turns; for `seconds` each.

    A CPU has one timer only: the list is empty. Raises what a call raises.
    """
    if device.type != "cuda":
        return []
    timer = open_device(device)
    inputs = input_sets(case, device)
    named: list[tuple[str, list[Call]]] = [
        (one.label, [one.bind(each) for each in inputs]) for one in contenders if not one.missing(device)
    ]

    (probe,) = race([in_turns([_copies(PROBE, device)])], timer, 1, seconds)
    for wanted in LENGTHS_MS:
        elements = int(PROBE * wanted / _median(probe))
        named.append((f"a copy of about {wanted:g} ms", [_copies(elements, device)]))
    found = []
    for name, calls in named:
        for call in calls:
            call()
        replays = capture(calls, torch.cuda.graph_pool_handle()).replays
        events_ms, graph_ms = map(_median, race([in_turns(calls), in_turns(replays)], timer, len(calls), seconds))
        found.append(TwoTimes(name, events_ms, graph_ms, agree(events_ms, graph_ms)))
    return found


def _median(result: Timing | Exception) -> float:
    if isinstance(result, Exception):
        raise result
    return result.median_ms


def _copies(elements: int, device: torch.device) -> Call:
    # A kernel, not the copy engine, which a graph would start in another way.
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return lambda: torch.neg(source, out=target)
