"""Native Hybrid Attention (arXiv 2510.07019): one operator, interchangeable implementations."""

from .dispatch import Explanation
from .operator import explain, native_hybrid_attention, nha_decode_step
from .problem import Problem, UnsupportedCall
from .registry import BACKENDS, available_backends
from .state import NHAState

__all__ = [
    "BACKENDS",
    "Explanation",
    "NHAState",
    "Problem",
    "UnsupportedCall",
    "available_backends",
    "explain",
    "native_hybrid_attention",
    "nha_decode_step",
]
