"""Calls as CUDA graphs: the same kernels, which the device starts by itself, for a second timer to time."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from nhabench.compare import Ratio, take_turns
from nhabench.outputs import Output, Step
from nhabench.timing import WARM_ROUNDS, Timer, next_ms


@dataclass(frozen=True)
class Graphs:
    """A graph of each of a contender's calls, and the output that a replay of the first one writes."""

    replays: list[Callable[[], None]]
    o: Output


def graph_ratio(calls: Sequence[Step], graphs: Graphs, timer: Timer, seconds: float) -> Ratio:
    """The time of the graphs in units of that of the calls, timed in turns for `seconds` at most; all run before."""

    sides = next_ms(calls, timer), next_ms(graphs.replays, timer)
    for side in sides:
        for _ in range(WARM_ROUNDS):
            side()
    return take_turns(*sides, seconds)


def capture(calls: Sequence[Step]) -> Graphs:
    """Capture the calls, one for each input set; each is made once before, so that it finds all that it keeps.

    Raises what a call raises, and RuntimeError where it cannot be captured. The graphs share their memory, but for the
    first one's output: no two must be replayed at the same time.
    """
    pool = torch.cuda.graph_pool_handle()
    outputs: list[Output] = []
    graphs = []
    with _undisturbed():
        for call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # inside a capture torch does not give back what it keeps when memory runs out
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)
            with _ended(graph, pool):
                o = call()
            graphs.append(graph)
            if not outputs:
                outputs.append(o)
            del o  # the next graph may have its memory
    return Graphs([graph.replay for graph in graphs], outputs[0])


@contextlib.contextmanager
def _ended(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> Iterator[None]:
    """End a capture that has begun, whatever happens in it."""
    try:
        try:
            yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what the call did may have spoilt the capture: its error counts
                graph.capture_end()
            raise
        graph.capture_end()
    except BaseException:
        # A capture that cannot be ended is one that goes on, for torch's allocator: it would never again give memory
        # back before it says that there is none.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all captures: libraries keep memory for every stream that they have seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """On a stream of its own, which a capture needs; what was queued before has finished. No garbage is collected: what
    is destroyed inside a capture can spoil it. An empty graph is no news: what it leaves is looked at later."""
    torch.cuda.synchronize()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(_stream(torch.cuda.current_device())), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            yield
    finally:
        if collects:
            gc.enable()
        torch.cuda.synchronize()
