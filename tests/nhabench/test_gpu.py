"""Readings of a GPU, from a fake NVML."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nhabench import gpu
from nhabench.gpu import ClockSample, GpuWatch, clock_fell, extra_peak_bytes

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    pass


class FakeNvml:
    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    nvmlClocksEventReasonSwPowerCap = 4
    nvmlClocksEventReasonHwThermalSlowdown = 64

    def __init__(self, fails: tuple[str, ...] = ()) -> None:
        self.fails = fails

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetHandleByUUID": "handle",
            "nvmlDeviceGetClockInfo": 1755,
            "nvmlDeviceGetMaxClockInfo": 1980,
            "nvmlDeviceGetCurrentClocksEventReasons": 4 | 64 | 1,
            "nvmlDeviceGetPowerManagementLimit": 700_000,
            "nvmlSystemGetDriverVersion": "580.1",
        }
        if name not in answers:
            raise AttributeError(name)

        def function(*arguments: Any) -> Any:
            if name in self.fails:
                raise NVMLError(name)
            if name == "nvmlDeviceGetHandleByUUID":
                assert arguments == ("GPU-12-34",)
            return answers[name]

        return function


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))


def test_a_card_tells_clocks_throttling_and_power() -> None:
    watch = GpuWatch(CUDA, FakeNvml())
    assert watch.clocks() == ClockSample(1755, "power cap, thermal (hardware)")
    assert (watch.power_cap_w(), watch.max_sm_mhz(), watch.driver()) == (700.0, 1980, "580.1")


def test_what_cannot_be_read_is_none_and_the_rest_is_told() -> None:
    watch = GpuWatch(CUDA, FakeNvml(fails=("nvmlDeviceGetClockInfo",)))
    assert watch.clocks() is None
    assert watch.power_cap_w() == 700.0
    without = GpuWatch(CUDA, FakeNvml(fails=("nvmlInit",)))
    assert (without.clocks(), without.power_cap_w(), without.driver()) == (None, None, "")


def test_an_older_nvml_without_a_function_costs_that_reading() -> None:
    class Older(FakeNvml):
        def __getattr__(self, name: str) -> Any:
            if name == "nvmlDeviceGetCurrentClocksEventReasons":
                raise AttributeError(name)
            return super().__getattr__(name)

    assert GpuWatch(CUDA, Older()).clocks() == ClockSample(1755, "unknown")


def test_a_card_that_cannot_be_found_has_no_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())  # an older torch
    assert GpuWatch(CUDA, FakeNvml()).clocks() is None


def test_without_the_package_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(gpu.importlib, "import_module", absent)
    assert GpuWatch(CUDA).clocks() is None


def test_a_fall_of_five_per_cent_is_a_fall() -> None:
    fast = ClockSample(2000, "")
    assert clock_fell(fast, ClockSample(1900, "")) is True
    assert clock_fell(fast, ClockSample(1901, "")) is False
    assert clock_fell(fast, None) is None


def test_extra_memory_is_the_peak_beyond_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"now": 100, "peak": 900}

    def call() -> None:
        memory["peak"] = 350

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: memory.update(peak=memory["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    assert extra_peak_bytes(call, CUDA) == 250


def test_on_a_cpu_the_call_runs_and_no_memory_is_told() -> None:
    ran: list[int] = []
    assert extra_peak_bytes(lambda: ran.append(1), torch.device("cpu")) is None
    assert ran == [1]
