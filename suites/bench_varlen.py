"""Packed sequences: what a call costs when its tokens belong to one long sequence, and what when to many short ones of
uneven lengths, as training batches and prefill servers pack them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nhabench.suite import Suite, model
from nhabench.workloads import Case


def packings(device: torch.device, dtype: str) -> list[Case]:
    tokens = 512 if device.type == "cpu" else 16384
    # From one sequence to those with a mean length of 8 and 64 tokens.
    return [Case(model(device), 1, tokens, dtype, 4**n) for n in range(4 if device.type == "cpu" else 5)]


SUITE = Suite(
    "varlen", packings,
    ("triton", "flash", "chunked", "triton-padded", "torch-varlen", "flash-attn-2", "flash-attn-3", "window",
     "simple-gla"),
)  # fmt: skip


def test_varlen(device_time: Callable[[], None]) -> None:
    device_time()
