"""The default write strength, exact in value and in gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def write_strength(g: Tensor) -> Tensor:
    """s = 1 - exp(g) for log gates g <= 0.

    The value is expm1's, since 1 - exp(g) cancels for weak gates; the gradient is -exp(g), since expm1's own, computed
    from its result as result + 1, cancels for strong ones.
    """
    strength = 1 - torch.exp(g)
    return strength + (-torch.expm1(g) - strength).detach()
