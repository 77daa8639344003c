"""Fused Triton kernels: a pass over the slots that is parallel over time, and one kernel for the output."""
