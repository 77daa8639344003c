"""What the fused kernels can serve. Apart from them, so that asking does not import Triton."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from ..problem import Problem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_unavailable(device_type: str) -> str | None:
    """Why `triton` cannot run on a device type of this machine at all, or None."""
    if find_spec("triton") is None:
        return "the fused kernels need Triton, which is not installed"
    if device_type == "cuda":
        return None if torch.cuda.is_available() else "the fused kernels need a GPU, and torch sees none"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the fused kernels need a CUDA GPU; the tensors are on {device_type}"


def why_not(problem: Problem) -> str | None:
    """Why `triton` cannot serve a call: the limits of the fused kernels."""
    if problem.capability is not None and not has_room(problem.capability):
        return (
            "the fused kernels are sized for GPUs with 163 KB of shared memory a block (compute capability 8.0, 8.7, "
            f"9.0, 10.x, 11.0), this one has {'.'.join(map(str, problem.capability))}"
        )
    if problem.dtype not in DTYPES:
        return f"the fused kernels take float16, bfloat16 or float32, not {str(problem.dtype).removeprefix('torch.')}"
    for name, size in (("D", problem.head_dim), ("Dv", problem.value_dim)):
        if size > 512 or size % 16:
            return f"the fused kernels take multiples of 16 up to 512 as head size, not {name} = {size}"
        if problem.needs_grad and size > 256:
            return f"the fused backward takes head sizes up to 256, not {name} = {size}"
    if problem.slots > 256:
        return f"the fused kernels take up to 256 slots, not {problem.slots}"
    if problem.device == "cpu" and problem.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def has_room(capability: tuple[int, int]) -> bool:
    """GPUs with at least 163 KB of shared memory a block: CUDA C++ programming guide, technical specifications."""
    return capability in ((8, 0), (8, 7), (9, 0), (11, 0)) or capability[0] == 10
