"""Rows, workloads and contenders that the tests of nhabench share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nhabench.cheats import Planted
from nhabench.contender import Contender
from nhabench.environment import read_environment
from nhabench.floors import full_floor, nha_floor
from nhabench.gpu import GpuWatch
from nhabench.implementations import attend
from nhabench.inputs import Inputs
from nhabench.repeat import Agreement, Process
from nhabench.results import Row
from nhabench.selftest import Trial
from nhabench.workloads import Workload

RowMaker = Callable[..., Row]


def row(**changes: Any) -> Row:
    """A timed row of an NHA implementation, with some columns changed."""
    base = Row(
        workload="tiny", direction="forward", q_heads=4, kv_heads=2, head_dim=16, slots=8, window=8, batch=1,
        seq_len=512, dtype="float32", implementation="chunked", label="NHA chunked", family="nha", status="ok",
        median_ms=2.0, low_ms=1.9, high_ms=2.2, tb_per_s=0.1, tflop_per_s=3.0, floor_ms=0.5, floor_fraction=0.25,
        copy_tb_per_s=1.0, matmul_tflop_per_s=10.0, date="2026-01-02T03:04:05+00:00",
        command="python -m nhabench bench", git_sha="0" * 40, git_dirty=False, device="Some CPU", device_type="cpu",
        power_cap_w=None, max_sm_clock_mhz=None, driver="", cuda="", cudnn="", torch="2.13.0", triton="3.7.1",
        ptxas="12.9", python="3.11.7", cpu="Some CPU", cores=2,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors: on a busy machine several threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="row")
def row_maker() -> RowMaker:
    return row


@pytest.fixture
def tiny() -> Workload:
    return Workload("tiny", q_heads=4, kv_heads=2, head_dim=16, slots=8, window=8, tokens=1)


def nha(name: str, run: Callable[[Inputs], torch.Tensor] | None = None, **changes: Any) -> Contender:
    """An NHA contender; `run` in place of the chunked implementation."""
    made = Contender(
        name=name,
        label=f"NHA {name}",
        family="nha",
        floor=nha_floor,
        bind=lambda inputs: lambda: run(inputs) if run else attend(inputs, "chunked"),
    )
    return dataclasses.replace(made, **changes)


def full(name: str, run: Callable[[Inputs], torch.Tensor]) -> Contender:
    """A full attention contender without a check."""
    return Contender(name, f"full: {name}", "full", full_floor, lambda inputs: lambda: run(inputs), quadratic=True)


@pytest.fixture
def contenders() -> type[Makers]:
    return Makers


class Makers:
    """Contenders for a test to put together."""

    nha = staticmethod(nha)
    full = staticmethod(full)


@pytest.fixture
def figures() -> dict[str, dict[str, Any]]:
    """What selftest and repeat wrote, by the file's name."""
    watch = GpuWatch(torch.device("cpu"))
    environment = vars(read_environment(torch.device("cpu"), watch, "python -m nhabench selftest"))
    trials = [Trial(0.0, 0.0, 200, 1, 3), Trial(0.01, 0.01, 50, 12, 30), Trial(0.02, 0.02, 200, 198, 2)]
    planted = [Planted("it idles", True, "told"), Planted("it lies", True, "told")]
    rows = [[row(median_ms=ms)] for ms in (2.0, 2.01, 2.005)]
    found = Agreement([Process(0, 1.0, some) for some in rows], 3, 0.01)
    return {
        "selftest.json": {
            "environment": environment, "case": "tiny", "limit": 0.01, "passed": True,
            "trials": [vars(one) for one in trials], "cheats": [vars(one) for one in planted],
            "timers": [],
        },
        "repeat.json": {"environment": environment, **found.summary()},
    }  # fmt: skip
