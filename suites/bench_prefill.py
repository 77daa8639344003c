"""Prefill: the forward pass at the attention shapes of real models, from short sequences to long ones, all with as many
tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nhabench.suite import Suite, model
from nhabench.workloads import Case, cases, load_workloads


def prefills(device: torch.device, dtype: str) -> list[Case]:
    if device.type == "cpu":
        return cases([model(device)], (256, 512), dtype)
    return cases(load_workloads().values(), (512, 2048, 8192, 32768, 131072), dtype)


SUITE = Suite("prefill", prefills, ("triton", "flash", "chunked", "sdpa-cudnn", "sdpa-flash", "window", "simple-gla"))


def test_prefill(device_time: Callable[[], None]) -> None:
    device_time()
