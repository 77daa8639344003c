"""The implementations of native hybrid attention, as contenders."""

from __future__ import annotations

import torch

from nha_kernels import BACKENDS, UnsupportedCall, native_hybrid_attention
from nha_kernels.registry import IMPLEMENTATIONS
from nhabench.contender import Call, Contender, Unsupported
from nhabench.floors import nha_floor
from nhabench.inputs import Inputs
from nhabench.workloads import Case

NAIVE_LENGTH = 512  # naive walks through T in Python: beyond, it would only show how slow that is


def attend(inputs: Inputs, backend: str) -> torch.Tensor:
    """o [B,T,HQ,D] of the named NHA backend. Raises Unsupported with the backend's own reason."""
    window = inputs.case.workload.window
    try:
        o, _ = native_hybrid_attention(
            inputs.q, inputs.k, inputs.v, inputs.g, window,
            rope=inputs.rope, cu_seqlens=inputs.cu_seqlens, backend=backend,
        )  # fmt: skip
        return o
    except UnsupportedCall as error:
        raise Unsupported(str(error)) from error


def missing_backend(backend: str, device: torch.device) -> str | None:
    """A sentence saying why an NHA backend cannot run on this device at all, or None."""
    reason = IMPLEMENTATIONS[backend].why_unavailable(device.type)
    return None if reason is None else f"{reason[0].upper()}{reason[1:]}."


def _too_long(case: Case, device: torch.device) -> str | None:
    if case.seq_len <= NAIVE_LENGTH:
        return None
    return f"naive walks through T step by step and is measured up to T={NAIVE_LENGTH} only."


def _contender(backend: str) -> Contender:
    def bind(inputs: Inputs) -> Call:
        return lambda: attend(inputs, backend)

    return Contender(
        name=backend,
        label=f"NHA {backend}",
        family="nha",
        floor=nha_floor,
        bind=bind,
        missing=lambda device: missing_backend(backend, device),
        cannot=_too_long if backend == "naive" else lambda case, device: None,
    )


def implementations() -> list[Contender]:
    """Every backend of nha_kernels, naive last: its thousands of launches would leave the host behind the device."""
    return [_contender(backend) for backend in sorted(BACKENDS, key=lambda name: name == "naive")]
