"""Every variant of the fused kernels that may be launched compiles for every architecture, within its shared memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from nha_kernels.fused.forward import ForwardConfig, describe, launchable_problems
from nha_kernels.problem import Problem

from .compiling import backward_problems, empty_inputs, name, resident_problems
from .sass import constant_operands, early_reads, hazards, late_descriptors, unset_addresses

# Shared memory that a block may have: CUDA C++ programming guide, technical specifications per compute capability.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes that a kernel's code may move from registers to memory. Single heads: some seventy registers, since the
# accumulators alone are more than half of what a thread has; and with fp32 gates what the warp that counts the steps of
# a tile needs beyond its share. Triton 3.7 moves ten of the kernel for groups, 3.6 and 3.8 one.
SPILLED = {"ends_kernel": 0, "resident_kernel": 40, "single_kernel": 300}
SPILLED_WITH_FP32_GATES = {**SPILLED, "single_kernel": 1300}
SPILLED_WITH_ROPE = {  # by Triton 3.6 to 3.8
    "D128-NG4-W64-bfloat16-rope": 380,
    "D128-NG4-W64-float32-rope": 580,
    "D64-NG4-W64-bfloat16-rope": 100,
}
# A backward pass keeps sums over all columns in registers. The most that any takes by Triton 3.6 to 3.8, but for the
# rows of two query heads of 256.
SPILLED_BACKWARD = {"scan_kernel": 0, "rows_kernel": 320, "slots_kernel": 500, "window_kernel": 120}
SPILLED_WIDE = {"bfloat16-D256-NG2-delay40": 1000}
# Variants of the kernels for Hopper that find gradients, and what they move: for the most part constants of a loop, and
# in the window's, before it, where sums over all columns meet sums over all slots.
RESIDENT_BACKWARD = (
    "D128-NG4-W64-bfloat16", "D64-NG8-W64-float32", "D128-NG4-W16-bfloat16", "D128-NG8-W64-bfloat16-rope",
)  # fmt: skip
SPILLED_RESIDENT_BACKWARD = {
    "ends_kernel": 0, "resident_rows_kernel": 300, "resident_slots_kernel": 400, "resident_window_kernel": 250,
}  # fmt: skip
# And addresses of operands that are copied back between the wgmmas of a group, by Triton 3.6 to 3.8. Some forward
# kernels that are right have a few too; whether these do harm is unknown.
LATE_RESIDENT_BACKWARD = {"resident_rows_kernel": 40, "resident_slots_kernel": 60}
# From 3.9 on Triton calls ptxas 13 for sm_90, for which these kernels need too many registers: right all the same, but
# slow.
FAST = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
DTYPES = ("bfloat16", "float16", "float32")


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """What `compiling.py` says of each kernel that it compiles."""
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    program = Path(__file__).parent / "compiling.py"
    done = subprocess.run([sys.executable, str(program), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_sound(sass: str) -> None:
    """For Hopper: no register is used that holds something else."""
    assert hazards(sass) == []
    assert constant_operands(sass) == []
    assert unset_addresses(sass) == []


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_compiles(dtype: str, capability: int) -> None:
    rows = compiled(dtype, str(capability))
    expected = {name(problem) for problem in launchable_problems() if str(problem.dtype) == f"torch.{dtype}"}
    assert {row["problem"] for row in rows if row["kernel"] == "output_kernel"} == expected
    assert {row["kernel"] for row in rows} == {"segment_kernel", "scan_kernel", "output_kernel"}
    for row in rows:
        assert row["target"] == f"sm_{capability}"
        assert row["cubin"] > 0
        assert row["shared"] <= SHARED_MEMORY[capability], row
        # A left operand that is transposed in registers, not on its way through shared memory, is computed wrongly by
        # some versions of Triton on Hopper (triton-lang/triton#6124).
        assert row["transposed_left"] == 0, row
        assert not row["early"]
        assert row["between_launches"] == []  # which sm_80 does not know
        assert_sound(row.get("sass", ""))


@pytest.mark.parametrize("name", resident_problems())
def test_every_resident_variant_compiles(name: str) -> None:
    """The kernels for Hopper alone; what their speed and their results hang on is read from the compiler's output."""
    rows = compiled("resident", name)
    assert [(row["kernel"], row["between_launches"]) for row in rows] == [
        ("ends_kernel", ["launch_dependents"]),
        ("scan_kernel", ["launch_dependents", "wait"]),
        ("single_kernel" if "-NG1-" in name else "resident_kernel", ["wait"]),
    ]
    spilled = SPILLED_WITH_FP32_GATES if name.endswith("float32") else SPILLED
    if name.endswith("rope"):
        spilled = {**SPILLED, "resident_kernel": SPILLED_WITH_ROPE.get(name, 210)}
    for row in rows:
        sass = row.pop("sass")
        assert row["target"] == "sm_90"
        assert row["shared"] <= SHARED_MEMORY[90], row
        # Inputs come by the copy engine, but for the tables of an embedding, whose loads are marked (EL, evict last):
        # whatever else threads read here was written by the launches before.
        assert row["early"] == (row["kernel"] != "ends_kernel")
        tables = [read for read in early_reads(sass) if "LDG.E.EL." in read]
        assert early_reads(sass) == tables
        assert bool(tables) == (row["kernel"] == "resident_kernel" and name.endswith("rope"))
        assert len(tables) == sass.count("LDG.E.EL.")
        # What looks for them would find some, were there no wait.
        assert (early_reads(sass.replace("ACQBULK", "NOP")) != tables) == row["early"]
        if row["kernel"] == "scan_kernel":
            continue
        if FAST:
            assert row["serialised"] == []  # wgmmas that ptxas made wait for one another
            assert row["spilled"] <= spilled[row["kernel"]], row
        assert "HGMMA" in sass
        assert_sound(sass)


@pytest.mark.parametrize("name", RESIDENT_BACKWARD)
def test_the_resident_backward_pass_compiles(name: str) -> None:
    rows = compiled("resident-backward", name)
    assert [row["kernel"] for row in rows] == [
        "ends_kernel", "scan_kernel", "resident_rows_kernel", "resident_slots_kernel", "scan_kernel",
        "resident_window_kernel", "resident_window_kernel",
    ]  # fmt: skip
    for row in rows:
        sass = row.pop("sass")
        assert row["target"] == "sm_90"
        assert row["shared"] <= SHARED_MEMORY[90], row
        if row["kernel"] == "scan_kernel":
            continue
        assert "HGMMA" in sass
        assert_sound(sass)
        if FAST:
            assert row["serialised"] == []
            assert row["spilled"] <= SPILLED_RESIDENT_BACKWARD[row["kernel"]], row
            assert len(late_descriptors(sass)) <= LATE_RESIDENT_BACKWARD.get(row["kernel"], 0), row


# fp32 has no wgmmas whose registers could be given away, and takes as much shared memory everywhere: sm_80 has least.
BACKWARD = [("bfloat16", 80), ("bfloat16", 90), ("float16", 90), ("bfloat16", 100)]


@pytest.mark.parametrize(("dtype", "capability"), BACKWARD)
def test_the_backward_pass_compiles(dtype: str, capability: int) -> None:
    rows = compiled("backward", dtype, str(capability))
    expected = {name(problem) for problem in backward_problems(dtype, capability)}
    assert {row["problem"] for row in rows if row["kernel"] == "rows_kernel"} == expected
    assert {row["kernel"] for row in rows} == {"scan_kernel", "rows_kernel", "slots_kernel", "window_kernel"}
    for row in rows:
        sass = row.pop("sass", None)
        assert row["target"] == f"sm_{capability}"
        assert row["cubin"] > 0
        assert row["shared"] <= SHARED_MEMORY[capability], row
        assert row["transposed_left"] == 0, row
        assert not row["early"]
        assert row["between_launches"] == []
        if capability == 90:
            assert ("HGMMA" in sass) == (row["kernel"] == "slots_kernel")
            assert_sound(sass)
            assert late_descriptors(sass) == []
            if FAST:
                assert row["serialised"] == []
            if FAST and dtype == "bfloat16":
                most = SPILLED_BACKWARD[row["kernel"]]
                if row["kernel"] == "rows_kernel":
                    most = SPILLED_WIDE.get(row["problem"], most)
                assert row["spilled"] <= most, row


def variant(problem: Problem) -> tuple[object, ...]:
    """What decides an output kernel's registers and shared memory."""
    config = ForwardConfig.default(problem)
    launches, *_ = describe(problem, empty_inputs(problem), config)
    output = launches[-1].arguments
    sizes = (output[key] for key in ("BR", "J", "BN", "BM", "BD", "BDV", "EXACT"))
    return problem.dtype, config.states.chunk, config.output.warps, *sizes


def test_every_default_is_among_them() -> None:
    """Whatever `ForwardConfig.default` chooses, over a wide range of problems, is a variant that is compiled above."""
    problems = list(launchable_problems())
    covered = {variant(problem) for problem in problems}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (64, 128, 256, 512):
            for group in (1, 2, 3, 4, 5, 7, 8, 16, 20, 32):
                for delay in (0, 1, 16, 32, 40, 64):
                    problem = dataclasses.replace(
                        problems[0], dtype=dtype, head_dim=head_dim, value_dim=head_dim, q_heads=group, delay=delay
                    )
                    assert variant(problem) in covered, problem
