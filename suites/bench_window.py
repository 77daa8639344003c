"""The window, from linear attention (W = 0) to full attention (W = T), at one length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nhabench.suite import Suite, model
from nhabench.sweeps import draw_sweeps
from nhabench.workloads import Case


def windows(device: torch.device, dtype: str) -> list[Case]:
    length = 256 if device.type == "cpu" else 8192
    widths = [0, *(2**n for n in range(4, length.bit_length()))]
    return [model(device).changed(window=width).case(length, dtype) for width in widths]


SUITE = Suite(
    "window", windows, ("triton", "flash", "chunked", "sdpa-cudnn", "sdpa-flash", "window", "linear"),
    partial(draw_sweeps, "window"),
)  # fmt: skip


def test_window(device_time: Callable[[], None]) -> None:
    device_time()
