"""One door to the flash-attention kernels: windowed causal attention of packed sequences, with its log-sum-exp.

The kernel is flash-attn's where that is installed (FA3 `flash_attn_interface`, FA2 `flash_attn`: found by their
distributions, imported at the first call), else the FlashAttention-2 that torch carries. All three take private
functions, since the public ones lose a gradient that arrives at the log-sum-exp: versions are checked here.

Shapes: q [Tq, HQ, D], k and v [Tk, H, D], packed by cu_q and cu_k [N + 1] int32; queries are aligned with the last keys
of their sequence. lse [HQ, Tq] fp32.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
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
        for function in (self._interface._flash_attn_varlen_forward, self._interface._flash_attn_varlen_backward):
            _require(_python(function), "max_seqlen_k", "softmax_scale", "window_size_left", "window_size_right")

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
        for function in (self._interface._flash_attn_forward, self._interface._flash_attn_backward):
            _require(_python(function), "cu_seqlens_k", "max_seqlen_k", "window_size_left", "window_size_right")

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


def why_unavailable() -> str | None:
    """The sentence that says why this machine has no flash-attention kernel, or None where it has one."""
    if not torch.cuda.is_available():
        return "flash-attention kernels need a CUDA GPU, and torch sees none"
    kernel = _select(torch.cuda.get_device_capability())
    return kernel if isinstance(kernel, str) else None


def window_kernel(capability: tuple[int, int]) -> WindowKernel:
    """The kernel for a GPU of this compute capability; raises RuntimeError where `why_unavailable` has a reason."""
    kernel = _select(capability)
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    return kernel


@cache
def _select(capability: tuple[int, int]) -> WindowKernel | str:
    """The first kernel that can be used, or the sentence that says why there is none.

    An installed package that cannot be used is named in a warning, not passed over in silence.
    """
    if torch.version.hip is not None:
        return "the flash-attention kernels used here are for CUDA, and this torch is built for ROCm"
    packages: list[tuple[str, Any, Callable[[str], WindowKernel]]] = [
        ("flash-attn-3", FA3_VERSIONS, _FlashAttn3),  # for Hopper only
        ("flash-attn", FA2_VERSIONS, _FlashAttn2),
    ]
    for distribution, versions, adapter in packages if capability[0] == 9 else packages[1:]:
        version = installed_version(distribution)
        if version is None:
            continue
        try:
            if not _within(version, versions):
                raise ValueError(f"its version is outside {_range(versions)}")
            return adapter(version)
        except (ImportError, AttributeError, ValueError) as error:
            warnings.warn(f"{distribution} {version} is installed but not used: {error}", stacklevel=2)
    if not _within(torch.__version__, TORCH_VERSIONS):
        return f"torch {torch.__version__} is outside {_range(TORCH_VERSIONS)}, whose FlashAttention-2 is known"
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without FlashAttention-2"
    return _TorchFlash()


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; nothing is imported."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


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


def _python(function: Any) -> Any:
    """The Python function of a torch.library.custom_op, which itself shows no signature."""
    return getattr(function, "_init_fn", function)


def _require(function: Any, *parameters: str) -> None:
    """Raise ValueError where a private function of another package no longer has the parameters used here."""
    missing = [name for name in parameters if name not in inspect.signature(function).parameters]
    if missing:
        raise ValueError(f"its {function.__name__} has no {', '.join(missing)}")


def _within(version: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and bounds[0] <= (int(match[1]), int(match[2])) < bounds[1]


def _range(bounds: tuple[tuple[int, int], tuple[int, int]]) -> str:
    low, high = (".".join(map(str, version)) for version in bounds)
    return f"{low} <= version < {high}"
