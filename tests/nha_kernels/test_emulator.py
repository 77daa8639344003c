"""The kernels with the slots on the chip, on the CPU: their numbers, and how their partitions hand on what they share.

And the emulator itself: it finds what it is there for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import explain
from nha_kernels.fused import limits
from nha_kernels.state import advance

from .helpers import ON_GPU, Arguments, Case, Output, error, inputs_of, judge, make, parts

pytestmark = pytest.mark.skipif(
    ON_GPU or limits.why_unavailable("cpu") is not None,
    reason="with a GPU the kernels themselves are tested; without Triton's interpreter none is there",
)

GROUPS = Case(tokens=150, window=64, kv_heads=1, group=4, head_dim=64, slots=64, gates_like_q=True)
SINGLE = replace(GROUPS, window=32, group=1)
CASES: dict[str, Case] = {
    "a group of 4": replace(GROUPS, head_dim=128),
    "a group of 7, few slots": replace(GROUPS, batch=2, tokens=90, group=7, window=16, slots=40, mask=True),
    "fp32 gates": replace(GROUPS, gates_like_q=False, gates="strong"),
    "shorter than the window": replace(GROUPS, tokens=20),
    "rope": replace(GROUPS, rope=True, kv_heads=2),
    "rope, a group of 7": replace(GROUPS, rope=True, group=7, window=16, head_dim=128),
    "rope, fp32 gates": replace(GROUPS, rope=True, gates_like_q=False, gates="mixed"),
    "single": replace(SINGLE, tokens=300),
    "single, a window of 40": replace(SINGLE, tokens=200, window=40, slots=40, mask=True, head_dim=128),
    "single, taken in by several steps": replace(SINGLE, tokens=200, gates="spikes", gates_like_q=False),
    "single, heads of 256": replace(SINGLE, head_dim=256, window=64),
}


def serve(args: Arguments, tiles: int, **how: Any) -> Output:
    """The call by the kernels with the slots on the chip, in segments of so many tiles."""
    from nha_kernels.fused.forward import describe
    from nha_kernels.fused.resident import ResidentConfig
    from nha_kernels.fused.resident_single import SingleConfig

    from .emulator import run

    problem = explain(**args, output_final_state=True, return_lse=True).problem
    inputs = inputs_of(args)
    config = ResidentConfig(tiles) if problem.group > 1 else SingleConfig(tiles)
    launches, result, _ = describe(problem, inputs, config)
    for launch in launches:
        run(launch, **how)
    assert result.lse is not None
    return Output(result.o, advance(problem, inputs, result), result.lse)


@pytest.mark.parametrize("name", CASES)
def test_they_are_as_exact_as_bf16_allows_in_any_order_of_turns(name: str) -> None:
    args = make(CASES[name], torch.bfloat16)
    first = serve(args, 8)
    judge(args).accept(first)
    for seed in (1, 2, 3):
        again = serve(args, 8, seed=seed)
        assert all(torch.equal(x, parts(first)[key]) for key, x in parts(again).items())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.gates == "mild"])
def test_without_bf16_they_are_right_to_the_error_of_strength(name: str) -> None:
    """Mild gates: stronger ones are cut off."""
    args = make(CASES[name], torch.bfloat16)
    args |= {key: args[key].float() for key in ("q", "k", "v", "g")}
    expected = parts(judge(args).answer)
    errors = {key: error(x, expected[key]) for key, x in parts(serve(args, 4, exact=True)).items()}
    assert not {key: e for key, e in errors.items() if not e < 1e-5}


# ---- The emulator ----


def copy_in_pieces(x: Tensor, wait: bool = True, count: int = 1, fence: bool = True) -> tuple[Any, Tensor]:
    """The launch that copies x [*, 64] by pieces of 8 rows through one place in shared memory, and its result.

    wait: until the place is free. count: arrivals that make it free, of one that comes.
    """
    from nha_kernels.fused.hopper import (
        barrier,
        barriers,
        descriptor,
        fence_async_shared,
        gl,
        gluon,
        load_async,
        mbarrier,
        store_async,
        store_wait,
        tile_layout,
    )
    from nha_kernels.fused.primitives import Launch

    @gluon.jit
    def load_partition(d_x, s_x, full, empty, pieces, WAIT: gl.constexpr):
        for i in range(pieces):
            if WAIT:
                mbarrier.wait(empty.index(0), (i & 1) ^ 1)
            mbarrier.expect(full.index(0), 8 * 64 * 2)
            load_async(d_x, [i * 8, 0], full.index(0), s_x)

    @gluon.jit
    def store_partition(d_o, s_x, s_o, full, empty, pieces, FENCE: gl.constexpr):
        for i in range(pieces):
            mbarrier.wait(full.index(0), i & 1)
            b_x = s_x.load(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
            mbarrier.arrive(empty.index(0), count=1)
            store_wait(0)
            s_o.store(b_x)
            if FENCE:
                fence_async_shared()
            barrier()
            store_async(d_o, [i * 8, 0], s_o)
        store_wait(0)

    @gluon.jit
    def kernel(d_x, d_o, pieces, WAIT: gl.constexpr, COUNT: gl.constexpr, FENCE: gl.constexpr):
        s_x = gl.allocate_shared_memory(gl.bfloat16, [8, 64], tile_layout(2))
        s_o = gl.allocate_shared_memory(gl.bfloat16, [8, 64], tile_layout(2))
        full = barriers(1, 1)
        empty = barriers(1, COUNT)
        fence_async_shared()
        gl.warp_specialize(
            [
                (store_partition, (d_o, s_x, s_o, full, empty, pieces, FENCE)),
                (load_partition, (d_x, s_x, full, empty, pieces, WAIT)),
            ],
            [1],
            [24],
        )

    o = torch.full_like(x, torch.nan)
    arguments = dict(
        d_x=descriptor(x, [8, 64]), d_o=descriptor(o, [8, 64]), pieces=-(-len(x) // 8), WAIT=wait, COUNT=count,
        FENCE=fence,
    )  # fmt: skip
    return Launch(kernel, (1,), arguments), o


@pytest.fixture
def numbers() -> Tensor:
    return torch.arange(29.0 * 64).view(29, 64).bfloat16()  # the last piece is cut off


def test_a_pipeline_is_right_in_any_order(numbers: Tensor) -> None:
    from .emulator import run

    for seed in range(10):
        launch, o = copy_in_pieces(numbers)
        run(launch, seed=seed)
        assert torch.equal(o, numbers)


def test_what_is_overwritten_before_it_is_read_is_found(numbers: Tensor) -> None:
    from .emulator import run

    found = 0
    for seed in range(10):
        launch, o = copy_in_pieces(numbers, wait=False)
        try:
            run(launch, seed=seed)
            found += not torch.equal(o, numbers)
        except RuntimeError:
            found += 1
    assert found >= 5


def test_a_deadlock_is_named(numbers: Tensor) -> None:
    from .emulator import run

    launch, _ = copy_in_pieces(numbers, count=2)
    message = (
        r"^deadlock: kernel waits for its partitions; partition 0 \(store_partition\) waits for phase 1 of full\[0\]; "
        r"partition 1 \(load_partition\) waits for phase 0 of empty\[0\]"
    )
    with pytest.raises(RuntimeError, match=message):
        run(launch)


def test_a_missing_fence_is_found(numbers: Tensor) -> None:
    from .emulator import run

    launch, _ = copy_in_pieces(numbers, fence=False)
    with pytest.raises(RuntimeError, match=r"^no fence makes shared memory visible that was written by partition 0 "):
        run(launch)


@pytest.mark.parametrize("left", [None, 0, 1])
def test_a_product_keeps_what_it_reads_until_it_is_waited_for(left: int | None) -> None:
    """left: products that the wait before the next store leaves under way; None: no wait."""
    from nha_kernels.fused.hopper import (
        barrier,
        fence_async_shared,
        gl,
        gluon,
        tile_layout,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from nha_kernels.fused.primitives import Launch

    from .emulator import run

    @gluon.jit
    def kernel(p_o, LEFT: gl.constexpr):
        acc: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
        s_x = gl.allocate_shared_memory(gl.bfloat16, [64, 64], tile_layout(2))
        s_x.store(gl.full([64, 64], 1.0, gl.bfloat16, acc))
        fence_async_shared()
        barrier()
        b_o = warpgroup_mma(s_x, s_x, gl.zeros([64, 64], gl.float32, acc), is_async=True)
        if LEFT is not None:
            b_o = warpgroup_mma_wait(LEFT, deps=(b_o,))
        s_x.store(gl.full([64, 64], 2.0, gl.bfloat16, acc))
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, acc))[:, None]
        gl.store(p_o + row * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, acc))[None, :], b_o)

    o = torch.empty(64, 64)
    launch = Launch(kernel, (1,), dict(p_o=o, LEFT=left))
    if left == 0:
        run(launch)
        assert torch.equal(o, torch.full_like(o, 64.0))
    else:
        with pytest.raises(RuntimeError, match=r"^shared memory overwritten while a product reads it, of kernel"):
            run(launch)
