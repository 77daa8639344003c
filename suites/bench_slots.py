"""The slots: what a larger long-term memory costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nhabench.suite import Suite, model
from nhabench.sweeps import draw_sweeps
from nhabench.workloads import Case


def numbers_of_slots(device: torch.device, dtype: str) -> list[Case]:
    length = 256 if device.type == "cpu" else 8192
    return [model(device).changed(slots=slots).case(length, dtype) for slots in (16, 32, 64, 128, 256)]


SUITE = Suite(
    "slots", numbers_of_slots, ("triton", "flash", "chunked", "sdpa-cudnn", "gsa"),
    partial(draw_sweeps, "slots"),
)  # fmt: skip


def test_slots(device_time: Callable[[], None]) -> None:
    device_time()
