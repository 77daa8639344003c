"""One door to Gluon, Triton's lower-level language, for kernels written for Hopper.

Its names move between versions of Triton; every kernel takes them from here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "TensorDescriptor",
    "aligned",
    "barrier",
    "barriers",
    "descriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "load_async",
    "mbarrier",
    "mma_v2",
    "store_async",
    "store_wait",
    "tile_layout",
    "unknown_place",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


def _named(module: Any, *names: str) -> Any:
    """The first of the names that this version of Triton has."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"{module.__name__} has none of {', '.join(names)}")


# Threads of a partition meet; the copy engine moves a tile to or from shared memory.
barrier = _named(gl, "barrier", "thread_barrier")
load_async = _named(tma, "async_load", "async_copy_global_to_shared")
store_async = _named(tma, "async_store", "async_copy_shared_to_global")
store_wait = tma.store_wait


@gluon.jit
def barriers(size: gl.constexpr, count: gl.constexpr):
    """[size, 1] mbarriers in shared memory, each of whose phases `count` arrivals complete."""
    s_barrier = gl.allocate_shared_memory(gl.int64, [size, 1], mbarrier.MBarrierLayout())
    for x in gl.static_range(size):
        mbarrier.init(s_barrier.index(x), count=count)
    return s_barrier


@gluon.jit
def unknown_place(place: gl.constexpr, turn, turns):
    """`place`, which the compiler does not know, in each of so many turns.

    Of operands of wgmma that always lie in one place it would keep all addresses, many more than it has registers for:
    they would go to memory and come back between one wgmma and the next.
    """
    return place + gl.minimum(turns - turn, 0)


@gluon.constexpr_function
def tile_layout(rank: int, bits: int = 16) -> Any:
    """Shared memory of a tile as both the copy engine and wgmma take it: rows of 128 bytes, swizzled."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=rank)


# As a kernel's code says it, for the host: there Triton's way to it takes longer than all else of a descriptor.
_layout = cache(tile_layout)


def aligned(x: Tensor, *shape: int) -> Tensor:
    """Contiguous, at an address and with strides that the copy engine takes; in another shape, if given."""
    x = x.contiguous().view(shape or x.shape)  # a size of 1 may have come with any stride
    return x if x.data_ptr() % 16 == 0 else x.clone()


def descriptor(x: Tensor, box: list[int]) -> Any:
    """A tensor as the copy engine sees it, moved in boxes; what lies outside of it reads as 0 and is not written."""
    return TensorDescriptor.from_tensor(x, box, _layout(len(box), 8 * x.element_size()))
