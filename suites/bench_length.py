"""One sequence, up to a million tokens: what grows with its length, and how."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nhabench.suite import Suite, model
from nhabench.workloads import Case, cases


def lengths(device: torch.device, dtype: str) -> list[Case]:
    powers = range(7, 11) if device.type == "cpu" else range(9, 21)
    return cases([model(device).changed(tokens=1)], (2**n for n in powers), dtype)


SUITE = Suite("length", lengths, ("triton", "sdpa-cudnn", "sdpa-flash", "window", "linear", "simple-gla"))


def test_length(device_time: Callable[[], None]) -> None:
    device_time()
