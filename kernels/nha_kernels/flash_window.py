"""One door to the flash-attention kernels: windowed causal attention of packed sequences, with its log-sum-exp.

The kernel is flash-attn's where that is installed (FA3 `flash_attn_interface`, FA2 `flash_attn`: found by their
distributions, imported at the first call), else the FlashAttention-2 that torch carries. All three take private
functions, since the public ones lose a gradient that arrives at the log-sum-exp: versions are checked here.

Shapes: q [Tq, HQ, D], k and v [Tk, H, D], packed by cu_q and cu_k [N + 1] int32; queries are aligned with the last keys
of their sequence. lse [HQ, Tq] fp32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any, Protocol

import torch
from torch import Tensor

TORCH_VERSIONS = ((2, 11), (2, 16))  # the first that is known to work, and the first that is not known
FA2_VERSIONS = ((2, 7), (3, 0))
FA3_VERSIONS = ((3, 0), (4, 0))


@dataclass(frozen=True, slots=True)
class Packing:
    """Which rows are whose: cu_q, cu_k [N + 1] int32 offsets, the longest lengths, and the call's window and scale."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    window: int
    scale: float

    @property
    def left(self) -> int:
        """Keys before its own that a query sees; more than any sequence has means all."""
        return min(self.window - 1, self.max_k)


class WindowKernel(Protocol):
    """A flash-attention kernel. `saved` is what its own backward wants back."""

    name: str

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor, tuple[Any, ...]]: ...

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing,
        saved: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class _TorchFlash:
    def __init__(self) -> None:
        self.name = f"FlashAttention-2 of torch {torch.__version__}"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        o, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k, 0.0, False, False,
            scale=packing.scale, window_size_left=packing.left, window_size_right=0,
        )  # fmt: skip
        return o, lse, (rng_state, unused)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing,
        saved: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rng_state, unused = saved
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, lse, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k, 0.0, False,
            rng_state, unused, scale=packing.scale, window_size_left=packing.left, window_size_right=0,
        )  # fmt: skip
        return dq, dk, dv


class _FlashAttn2:
    def __init__(self, version: str) -> None:
        self.name = f"flash-attn {version}"
        self._interface = import_module("flash_attn.flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        o, lse, _, rng_state = self._interface._flash_attn_varlen_forward(
            q, k, v, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k, 0.0, packing.scale, False,
            window_size_left=packing.left, window_size_right=0,
        )  # fmt: skip
        return o, lse, (rng_state,)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing,
        saved: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._interface._flash_attn_varlen_backward(
            do, q, k, v, o, lse, dq, dk, dv, packing.cu_q, packing.cu_k, packing.max_q, packing.max_k, 0.0,
            packing.scale, False, packing.left, 0, 0.0, None, False, rng_state=saved[0],
        )  # fmt: skip
        return dq, dk, dv


class _FlashAttn3:
    def __init__(self, version: str) -> None:
        self.name = f"flash-attn-3 {version}"
        self._interface = import_module("flash_attn_interface")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        o, lse, *_ = self._interface._flash_attn_forward(
            q, k, v, cu_seqlens_q=packing.cu_q, cu_seqlens_k=packing.cu_k, max_seqlen_q=packing.max_q,
            max_seqlen_k=packing.max_k, softmax_scale=packing.scale, causal=False, window_size_left=packing.left,
            window_size_right=0,
        )  # fmt: skip
        return o, lse, ()

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing,
        saved: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._interface._flash_attn_backward(
            do, q, k, v, o, lse, cu_seqlens_q=packing.cu_q, cu_seqlens_k=packing.cu_k, max_seqlen_q=packing.max_q,
            max_seqlen_k=packing.max_k, dq=dq, dk=dk, dv=dv, softmax_scale=packing.scale, is_causal=False,
            window_size_left=packing.left, window_size_right=0,
        )  # fmt: skip
        return dq, dk, dv


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed; nothing is imported."""
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


@cache
def why_unavailable() -> str | None:
    """The sentence that says why this machine has no flash-attention kernel, or None where it has one."""
    if not torch.cuda.is_available():
        return "flash-attention kernels need a CUDA GPU, and torch sees none"
    if torch.version.hip is not None:
        return "the flash-attention kernels used here are for CUDA, and this torch is built for ROCm"
    if _flash_attn_installed() or _within(torch.__version__, TORCH_VERSIONS):
        return None
    first, last = (".".join(map(str, version)) for version in TORCH_VERSIONS)
    return f"torch {torch.__version__} is outside {first} <= torch < {last}, whose FlashAttention-2 is known"


@cache
def window_kernel(capability: tuple[int, int]) -> WindowKernel:
    """The kernel for a GPU of this compute capability; raises RuntimeError where `why_unavailable` has a reason."""
    reason = why_unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    version = _usable("flash-attn-3", "flash_attn_3", FA3_VERSIONS)
    if version is not None and capability[0] == 9:
        return _FlashAttn3(version)
    version = _usable("flash-attn", "flash_attn", FA2_VERSIONS)
    if version is not None:
        return _FlashAttn2(version)
    return _TorchFlash()


def window_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int, scale: float | None = None) -> Tensor:
    """Causal attention to the last `window_size` tokens alone: q [B, T, HQ, D], k and v [B, T, H, D] -> [B, T, HQ, D].

    CUDA, fp16 or bf16, forward only; the window half of NHA, for comparison. Raises RuntimeError without a kernel.
    """
    batch, tokens = q.shape[:2]
    cu = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    packing = Packing(cu, cu, tokens, tokens, window_size, scale)
    kernel = window_kernel(torch.cuda.get_device_capability(q.device))
    o, _, _ = kernel.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), packing)
    return o.view_as(q)


def _flash_attn_installed() -> bool:
    return any(
        _usable(*names) is not None
        for names in (("flash-attn-3", "flash_attn_3", FA3_VERSIONS), ("flash-attn", "flash_attn", FA2_VERSIONS))
    )


def _usable(name: str, alias: str, versions: tuple[tuple[int, int], tuple[int, int]]) -> str | None:
    version = installed_version(name, alias)
    return version if version is not None and _within(version, versions) else None


def _within(version: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and bounds[0] <= (int(match[1]), int(match[2])) < bounds[1]
