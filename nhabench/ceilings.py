"""What the device reaches at best, measured once for each run: copying, and a large matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nhabench.floors import Ceilings
from nhabench.timing import CudaEvents, Timer, WallClock, summarise

TURNS = {"cuda": 40, "cpu": 7}


def warm_up(device: torch.device, seconds: float = 0.4, size: int = 4096) -> None:
    """Keep a GPU busy until its clocks are up: an idle one runs at a fraction of them, and takes a while to rise."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(a)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for _ in range(16):
            torch.mm(a, a, out=product)
        torch.cuda.synchronize(device)


def measure_ceilings(device: torch.device, dtype: torch.dtype, timer: Timer) -> Ceilings:
    """Copy rate in TB/s and matrix product rate in TFLOP/s in this dtype. About a second on a GPU, less on a CPU."""
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    elements = 2**29 if gpu else 2**25  # of one byte: far beyond any cache, and beside much else in the memory
    source = torch.randint(0, 100, (elements,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))  # on zeros a GPU is faster
    product = torch.empty_like(a)
    turns = TURNS[device.type]
    matmul_ms = _median_ms(lambda: torch.mm(a, b, out=product), timer, turns)
    copy_ms = _median_ms(lambda: target.copy_(source), timer, turns)
    return Ceilings(2 * elements / copy_ms * 1e-9, 2 * size**3 / matmul_ms * 1e-9)


def _median_ms(call: Callable[[], object], timer: Timer, turns: int) -> float:
    stopwatch = timer.stopwatch()
    samples = [stopwatch(call).ms for _ in range(turns)]
    return summarise(samples[turns // 2 :]).median_ms  # the first half brings the clocks up


def open_device(device: torch.device) -> Timer:
    """Make a device the current one, at the clocks that it has under load, and give the timer for it."""
    if device.type != "cuda":
        return WallClock()
    torch.cuda.set_device(device)
    warm_up(device)  # before anything is measured, the timer's own sleep included
    return CudaEvents()
