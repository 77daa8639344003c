"""What every test needs settled before the packages are imported.

Without a CUDA device the Triton kernels run in Triton's interpreter. Triton reads TRITON_INTERPRET where a kernel is
decorated, so it is set here, before any test module is imported; a value already in the environment wins.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker, and for what it starts: torch reads this when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes with numpy, which warns of the infinities that a kernel masks, and a GPU does not.
    config.addinivalue_line("filterwarnings", r"ignore::RuntimeWarning:triton\.runtime\.interpreter")


def pytest_xdist_auto_num_workers() -> int:
    """Workers for `--numprocesses=auto`: each holds a torch of its own, and on a GPU a CUDA context too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4 if torch.cuda.is_available() else 8)
