"""Measure Native Hybrid Attention against full, window-only and linear attention, and draw what was measured."""

__version__ = "0.1.0"
