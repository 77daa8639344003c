"""Rotary position embedding as Llama has it: non-interleaved halves (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import accumulate_dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Rotate x [..., heads, D] by the rows `position` [...] of the tables cos, sin [P, D/2]; the dtype stays x's."""
    dtype = accumulate_dtype(x.dtype)
    c = cos[position].to(dtype).unsqueeze(-2)  # [..., 1, D/2]
    s = sin[position].to(dtype).unsqueeze(-2)
    lower, upper = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((lower * c - upper * s, upper * c + lower * s), dim=-1).to(x.dtype)
