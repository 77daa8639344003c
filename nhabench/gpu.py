"""What the GPU says of itself: clocks, throttling, power cap (through NVML, where nvidia-ml-py is installed)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

CLOCK_DROP = 0.05  # a clock that falls by this much while a case is measured marks its rows

_REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "thermal (hardware)",
    "SwThermalSlowdown": "thermal (software)",
    "HwPowerBrakeSlowdown": "power brake",
    "SyncBoost": "sync boost",
}


@dataclass(frozen=True)
class ClockSample:
    """The SM clock in MHz, and why it is held back (comma-separated; empty when nothing does, or 'unknown')."""

    sm_mhz: int
    throttle: str


class GpuWatch:
    """Reads one GPU through NVML. Every reading is None where NVML, or this reading on this card, is not to be had."""

    def __init__(self, device: torch.device, nvml: Any = None) -> None:
        self._nvml, self._handle = nvml, None
        if device.type != "cuda":
            return
        try:
            self._nvml = nvml or importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            # By UUID: NVML counts all cards of the machine, torch only the visible ones.
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        except (
            Exception
        ):  # no NVML, or one that does not know this card: these readings are an extra, never a reason to stop
            self._handle = None

    def _read(self, function: Callable[[Any], Any]) -> Any:
        if self._handle is None:
            return None
        try:
            return function(self._nvml)
        except Exception:  # a card may not support a single reading, an older NVML may not have it
            return None

    def clocks(self) -> ClockSample | None:
        """The SM clock now, and what holds it back."""
        mhz = self._read(lambda nvml: nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM))
        if mhz is None:
            return None
        bits = self._read(lambda nvml: nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        if bits is None:
            return ClockSample(int(mhz), "unknown")
        names = [name for key, name in _REASONS.items() if bits & getattr(self._nvml, f"nvmlClocksEventReason{key}", 0)]
        return ClockSample(int(mhz), ", ".join(names))

    def power_cap_w(self) -> float | None:
        """The power limit in watts."""
        milliwatts = self._read(lambda nvml: nvml.nvmlDeviceGetPowerManagementLimit(self._handle))
        return None if milliwatts is None else milliwatts / 1000

    def max_sm_mhz(self) -> int | None:
        """The highest SM clock in MHz."""
        mhz = self._read(lambda nvml: nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM))
        return None if mhz is None else int(mhz)

    def driver(self) -> str:
        """The driver's version, empty where unknown."""
        version = self._read(lambda nvml: nvml.nvmlSystemGetDriverVersion())
        return "" if version is None else str(version)


def clock_fell(before: ClockSample | None, after: ClockSample | None) -> bool | None:
    """Whether the SM clock fell by CLOCK_DROP or more between two samples; None where it could not be read."""
    if before is None or after is None:
        return None
    return after.sm_mhz <= (1 - CLOCK_DROP) * before.sm_mhz


def extra_peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Run a call; the device memory it takes at its peak beyond what was there before it (None on a CPU)."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before
