"""All rivals in one place: every full attention, the window alone and every linear attention, at the shapes of a large
model and of an NHA model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nhabench.baselines import baselines
from nhabench.suite import Suite, model
from nhabench.workloads import Case, cases, load_workloads


def shapes(device: torch.device, dtype: str) -> list[Case]:
    if device.type == "cpu":
        return cases([model(device)], (128, 256), dtype)
    table = load_workloads()
    return cases([table["llama-3-8b"], table["nha-340m"]], (2048, 8192, 32768), dtype)


SUITE = Suite("baselines", shapes, ("triton", "chunked", *(rival.name for rival in baselines())))


def test_baselines(device_time: Callable[[], None]) -> None:
    device_time()
