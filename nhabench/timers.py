"""Two timers of one GPU, events around a call and events around its CUDA graph: do they say the same?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from nhabench.ceilings import open_device
from nhabench.contender import Call, Contender
from nhabench.errors import first_line
from nhabench.graphs import capture, graph_ratio
from nhabench.inputs import Inputs, input_sets
from nhabench.timing import Timer, agree, next_ms
from nhabench.workloads import Case

LENGTHS_MS = (0.06, 0.25, 1.0)  # about, of calls that do nothing but read and write
PROBE = 2**26  # elements
SAMPLES = 20


@dataclass(frozen=True)
class TwoTimes:
    """A call's median time by events, in ms, and that of its CUDA graph in units of it, with its interval; and whether
    they are the same. note: why there are none."""

    call: str
    events_ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
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
    probe = next_ms(_copies(PROBE, device), timer)
    probe_ms = min(probe() for _ in range(SAMPLES))
    for wanted in LENGTHS_MS:
        elements = int(PROBE * wanted / probe_ms)
        found.append(_both(f"a copy of about {wanted:g} ms", partial(_copies, elements, device), timer, seconds))
    return found


def _both(name: str, make: Callable[[], list[Call]], timer: Timer, seconds: float) -> TwoTimes:
    try:
        calls = make()
        ratio = graph_ratio(calls, capture(calls), timer, seconds)
        sample = next_ms(calls, timer)
        ms = median(sample() for _ in range(SAMPLES))
    except Exception as error:  # told beside what the others say
        return TwoTimes(name, None, None, None, None, False, first_line(error))
    return TwoTimes(name, ms, ratio.median, ratio.low, ratio.high, agree(ms, ratio.median))


def _bind(contender: Contender, inputs: Sequence[Inputs]) -> list[Call]:
    return [contender.bind(one) for one in inputs]


def _copies(elements: int, device: torch.device) -> list[Call]:
    # A kernel, not the copy engine, which a graph would start in another way.
    source = torch.ones(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return [lambda: torch.neg(source, out=target)]
