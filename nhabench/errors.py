"""What is done with an exception that becomes a row."""

from __future__ import annotations

import torch


def without_frames(error: Exception) -> Exception:
    """The exception without tracebacks and causes: their frames would keep the tensors of the failed call alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type. CUDA's errors go on with advice for developers."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
