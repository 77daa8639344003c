"""Calls as CUDA graphs: the same kernels, which the device starts by itself, for a second timer to time."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from nhabench.contender import Call


@dataclass(frozen=True)
class Graphs:
    """A graph of each of a contender's calls, and the output [B,T,HQ,D] that a replay of the first one writes."""

    replays: list[Callable[[], None]]
    o: torch.Tensor


def capture(calls: Sequence[Call], pool: tuple[int, int]) -> Graphs:
    """Capture each call, which has run before. Raises what the call raises, and RuntimeError where it cannot be done.

    pool: of `torch.cuda.graph_pool_handle()`. Graphs that share one must not be replayed at the same time. Of their
    outputs only the first one of `calls` keeps its memory for itself.
    """
    graphs = [torch.cuda.CUDAGraph() for _ in calls]
    first: torch.Tensor | None = None
    with _undisturbed():
        for graph, call in zip(graphs, calls, strict=True):
            graph.capture_begin(pool=pool)  # type: ignore[arg-type] # torch has a type of its own for it
            try:
                o = call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what the call did may have spoilt the capture
                    graph.capture_end()
                raise
            graph.capture_end()
            first = o if first is None else first
            del o
    if first is None:
        raise ValueError("calls: expected at least one, got none")
    return Graphs([graph.replay for graph in graphs], first)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """On a stream of its own, which a capture needs; what was queued before has finished. No garbage is collected: what
    is destroyed inside a capture can spoil it. An empty graph is no news: what it leaves is looked at later."""
    torch.cuda.synchronize()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(torch.cuda.Stream()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            yield
    finally:
        if collects:
            gc.enable()
        torch.cuda.synchronize()
