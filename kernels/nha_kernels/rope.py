"""Rotary position embedding as Llama has it: non-interleaved halves (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import accumulate_dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor) -> Tensor:
    """Rotate x [..., heads, D] by the rows `position` [...] of the tables cos, sin [P, D/2]; the dtype stays x's.

    Beyond the tables there is no angle: the result is NaN, since an error would have to wait for the device.
    """
    dtype = accumulate_dtype(x.dtype)
    inside = (position < len(cos))[..., None, None]
    row = position.clamp(max=len(cos) - 1)
    c = torch.where(inside, cos[row].to(dtype).unsqueeze(-2), torch.nan)  # [..., 1, D/2]
    s = torch.where(inside, sin[row].to(dtype).unsqueeze(-2), torch.nan)
    lower, upper = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((lower * c - upper * s, upper * c + lower * s), dim=-1).to(x.dtype)
