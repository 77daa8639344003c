"""Contenders that cheat, and what each should be told: planted, to see that they are caught."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nhabench import guard
from nhabench.contender import Contender
from nhabench.floors import nha_floor
from nhabench.implementations import attend
from nhabench.inputs import Inputs
from nhabench.lab import Lab
from nhabench.measure import measure_case
from nhabench.workloads import Case

USELESS = 0.5  # of the honest time: a clock that goes at a tenth of its rate would show a tenth

Run = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Cheat:
    """One way to cheat: `make` gives a fresh one, around the honest work. `note`: what its row should say, if nothing
    else shows first; "" where it cannot be told from honest work, but must not help either."""

    name: str
    make: Callable[[Run], Run]
    note: str


def remembers(honest: Run) -> Run:
    """The work once for every tensor that comes, whatever it holds later."""
    known: dict[int, torch.Tensor] = {}

    def run(inputs: Inputs) -> torch.Tensor:
        if id(inputs.q) not in known:
            known[id(inputs.q)] = honest(inputs)
        return known[id(inputs.q)]

    return run


def idles(after: int) -> Callable[[Run], Run]:
    """The work a few times, for the check; then nothing."""

    def make(honest: Run) -> Run:
        calls = iter(range(10**9))

        def run(inputs: Inputs) -> torch.Tensor:
            return honest(inputs) if next(calls) < after else torch.zeros_like(inputs.q)

        return run

    return make


def writes(name: str, after: int = 0) -> Callable[[Run], Run]:
    """The tokens of one input in another order, from some call on."""

    def make(honest: Run) -> Run:
        calls = iter(range(10**9))

        def run(inputs: Inputs) -> torch.Tensor:
            o = honest(inputs)
            if next(calls) >= after:
                x = getattr(inputs, name)
                x.copy_(x.roll(1, 1))  # which calls in even number do not undo
            return o

        return run

    return make


class Lazy(torch.Tensor):
    """Looks like an output; the work could begin when it is read."""


def lazy(honest: Run) -> Run:
    """An output that is none yet."""
    return lambda inputs: honest(inputs).as_subclass(Lazy)


def works_when_watched(honest: Run) -> Run:
    """The work where the memory of its output was poisoned, for a check; else what lies there."""

    def run(inputs: Inputs) -> torch.Tensor:
        o = torch.empty_like(inputs.q)
        if not o.isnan().any():
            return o
        o.zero_()  # poisoned memory that is left over from a check is no reason to work when it is timed
        return honest(inputs)

    return run


def knows_one_set(honest: Run) -> Run:
    """The work for the first inputs that come; nothing for others."""
    first: list[Inputs] = []

    def run(inputs: Inputs) -> torch.Tensor:
        first[:] = first or [inputs]
        return honest(inputs) if inputs is first[0] else torch.zeros_like(inputs.q)

    return run


def becomes_an_input(honest: Run) -> Run:
    """The work a few times, for the check and to be warm; then an input for an output."""
    calls = iter(range(10**9))
    return lambda inputs: honest(inputs) if next(calls) < 4 else inputs.q[:, :]


CHEATS = (
    Cheat("it remembers its output", remembers, guard.REMEMBERED),
    Cheat("it idles once it was checked", idles(1), guard.UNCHECKED),
    Cheat("it idles once it is warm", idles(4), guard.UNCHECKED),
    *(Cheat(f"it writes into {name}", writes(name), guard.WROTE) for name in "qkvg"),
    Cheat("it writes when it is timed", writes("k", after=3), guard.WROTE),
    Cheat("its output is lazy", lazy, guard.NO_TENSOR),
    Cheat("its output becomes an input", becomes_an_input, guard.WROTE),
    Cheat("it works when it is watched", works_when_watched, guard.UNCHECKED),
)


def on_the_side(honest: Run) -> Run:
    """The work on a stream of its own, for which nobody waits."""
    side = torch.cuda.Stream()

    def run(inputs: Inputs) -> torch.Tensor:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            return honest(inputs)

    return run


def ahead(honest: Run) -> Run:
    """The work on a stream of its own, which waits for nobody: it is done before its turn."""
    side = torch.cuda.Stream()

    def run(inputs: Inputs) -> torch.Tensor:
        with torch.cuda.stream(side):
            o = honest(inputs)
        torch.cuda.current_stream().wait_stream(side)
        return o

    return run


def ahead_and_copies(honest: Run) -> Run:
    """The same, and a copy of what was done then, in its turn."""
    early = ahead(honest)
    return lambda inputs: early(inputs).clone()


def writes_when_captured(honest: Run) -> Run:
    """The tokens of k in another order, whenever the graph is replayed that was captured."""

    def run(inputs: Inputs) -> torch.Tensor:
        o = honest(inputs)
        if torch.cuda.is_current_stream_capturing():
            inputs.k.copy_(inputs.k.roll(1, 1))
        return o

    return run


def slows_the_clock(honest: Run) -> Run:
    """A clock that goes at a tenth of its rate from the first call on."""
    real = time.perf_counter
    began = real()

    def run(inputs: Inputs) -> torch.Tensor:
        time.perf_counter = lambda: began + (real() - began) / 10
        return honest(inputs)

    return run


def slows_the_events(honest: Run) -> Run:
    """Events that show a tenth of the time from the first call on."""
    real = torch.cuda.Event.elapsed_time

    def slower(self: torch.cuda.Event, end_event: torch.cuda.Event) -> float:
        return real(self, end_event) / 10

    def run(inputs: Inputs) -> torch.Tensor:
        torch.cuda.Event.elapsed_time = slower  # type: ignore[method-assign]
        return honest(inputs)

    return run


CLOCKS = (Cheat("it slows the clock", slows_the_clock, ""),)
CUDA_CHEATS = (
    Cheat("it knows one set of inputs", knows_one_set, guard.UNCHECKED),  # of which a CPU gets one only
    Cheat("it writes when it is captured", writes_when_captured, guard.WROTE),
    Cheat("it works on the side", on_the_side, guard.OUT_OF_TURN),
    Cheat("it works ahead", ahead, guard.OUT_OF_TURN),
    Cheat("it works ahead, and copies", ahead_and_copies, guard.OUT_OF_TURN),
    Cheat("it slows the events", slows_the_events, ""),
)


@dataclass(frozen=True)
class Planted:
    """How it ended: was it caught, or of no use, and did an honest contender beside it keep its time?

    told: what its row says, or its time over the honest one's.
    """

    name: str
    caught: bool
    told: str


def plant(lab: Lab, case: Case, backend: str) -> list[Planted]:
    """Race every cheat, around the work of an NHA backend, against the honest backend at a case."""
    found = []
    clock, elapsed_time = time.perf_counter, torch.cuda.Event.elapsed_time
    for cheat in (*CHEATS, *CLOCKS, *(CUDA_CHEATS if lab.device.type == "cuda" else ())):
        contenders = [_contender(name, make, backend) for name, make in (("honest", _as_it_is), ("cheat", cheat.make))]
        try:
            honest, row = measure_case(lab, case, contenders, lambda step: None)
        finally:
            time.perf_counter, torch.cuda.Event.elapsed_time = clock, elapsed_time  # type: ignore[method-assign]
        if cheat.note:
            caught, told = row.status == "incorrect", row.note or row.status
        else:
            ratio = (row.median_ms or 0.0) / (honest.median_ms or 1.0)
            caught, told = ratio > USELESS, f"{ratio:.2f} of the honest time"
        found.append(Planted(cheat.name, caught and honest.timed, told))
    return found


def _as_it_is(honest: Run) -> Run:
    return honest


def _contender(name: str, make: Callable[[Run], Run], backend: str) -> Contender:
    run = make(lambda inputs: attend(inputs, backend))
    return Contender(name, f"NHA {name}", "nha", nha_floor, lambda inputs: lambda: run(inputs))
