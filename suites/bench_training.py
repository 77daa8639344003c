"""Training: the forward pass and the gradients of queries, keys, values and gates, from short sequences to long ones,
all with as many tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nhabench.suite import Suite, model
from nhabench.workloads import Case, cases, load_workloads


def steps(device: torch.device, dtype: str) -> list[Case]:
    if device.type == "cpu":
        return cases([model(device)], (128, 256), dtype, "training")
    table = load_workloads()
    return [
        *cases([table["llama-3-8b"]], (2048, 4096, 8192, 16384, 32768, 131072), dtype, "training"),
        *cases([table["nha-340m"]], (2048, 8192, 32768), dtype, "training"),
    ]


SUITE = Suite(
    "training", steps,
    ("triton", "flash", "chunked", "sdpa-cudnn", "sdpa-flash", "window", "linear", "simple-gla"),
)  # fmt: skip


def test_training(device_time: Callable[[], None]) -> None:
    device_time()
