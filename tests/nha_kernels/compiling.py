"""Compile the fused kernels for a GPU that is not there: `python compiling.py DTYPE CAPABILITY`, `python compiling.py
backward DTYPE CAPABILITY`, or for one of `resident_problems` `python compiling.py resident NAME` or `python
compiling.py resident-backward NAME`.

A program of its own, since kernels that were imported for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from nha_kernels.fused import backward
from nha_kernels.fused.backward import BackwardConfig
from nha_kernels.fused.backward_rows_resident import ResidentRowsConfig
from nha_kernels.fused.backward_window_resident import resident_window_kernel
from nha_kernels.fused.forward import ForwardConfig, choose, describe, launchable_problems
from nha_kernels.fused.hopper import TensorDescriptor
from nha_kernels.fused.output import output_kernel
from nha_kernels.fused.primitives import Launch
from nha_kernels.fused.states import segment_kernel
from nha_kernels.problem import Inputs, Problem
from nha_kernels.state import NHAState

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
ALIGNED = [["tt.divisibility", 16]]


def compile_launch(launch: Launch, capability: int) -> Any:
    """The kernel as the launch's arguments and options specialise it, compiled for sm_<capability>."""
    kernel = launch.kernel
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    parameters = {parameter.name: parameter for parameter in kernel.params}
    for i, name in enumerate(kernel.arg_names):
        value = launch.arguments[name]
        if parameters[name].is_constexpr:
            signature[name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[name] = argument_type(value, (i,), constants, attributes)
    language = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = language(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))


def argument_type(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The type of an argument as Triton writes it; what is absent becomes a constant."""
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, tuple):
        parts = [argument_type(part, (*path, i), constants, attributes) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, torch.Tensor):
        attributes[path] = ALIGNED
        return "*" + TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    return "fp32" if isinstance(value, float) else "i32"


def name(problem: Problem) -> str:
    """A problem's variant in a few words."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{dtype}-D{problem.head_dim}-NG{problem.group}-delay{problem.delay}"


def resident_problems() -> dict[str, Problem]:
    """By name, a problem for each variant of the kernels for Hopper that keep the slots on the chip: everything
    optional switched on, but for the plain ones, as most calls are."""
    sizes = [(*size, 64) for size in product((64, 128), (4, 8), (torch.bfloat16, torch.float32))]
    sizes += [(128, 4, torch.bfloat16, window) for window in (16, 32, 48)]
    sizes += [(head_dim, 1, torch.bfloat16, window) for head_dim in (64, 128, 256) for window in (32, 64)]
    sizes += [(64, 1, torch.float32, 64), (128, 1, torch.float32, 16)]
    problems = {}
    for head_dim, group, gate_dtype, window in sizes:
        gates = str(gate_dtype).removeprefix("torch.")
        problems[f"D{head_dim}-NG{group}-W{window}-{gates}"] = Problem(
            batch=1, tokens=4096, sequences=1, q_heads=group, kv_heads=1, head_dim=head_dim, value_dim=head_dim,
            slots=64, window=window, delay=window, dtype=torch.bfloat16, gate_dtype=gate_dtype, device="cuda",
            capability=(9, 0), mask_empty_slots=True, output_final_state=True, return_lse=True,
        )  # fmt: skip
    for rotated in (
        "D128-NG4-W64-bfloat16", "D128-NG4-W64-float32", "D128-NG8-W64-bfloat16", "D64-NG4-W64-bfloat16",
        "D128-NG4-W16-bfloat16",
    ):  # fmt: skip
        problems[f"{rotated}-rope"] = replace(problems[rotated], positions="rope")
    problems["D128-NG4-W64-bfloat16-plain-rope"] = replace(
        problems["D128-NG4-W64-bfloat16"], positions="rope", mask_empty_slots=False, output_final_state=False,
        return_lse=False,
    )  # fmt: skip
    for usual in ("D128-NG4-W64-bfloat16", "D256-NG1-W32-bfloat16"):
        plain = replace(problems[usual], mask_empty_slots=False, output_final_state=False, return_lse=False)
        problems[f"{usual}-plain"] = plain
    return problems


# Head size and group of the backward passes that are compiled: a few of the tiles that BackwardConfig.default chooses,
# since ptxas takes seconds for each; but for Hopper only the last of a dtype, which takes the most shared memory.
BACKWARD = {
    torch.bfloat16: ((16, 4), (128, 4), (256, 1), (256, 2)),
    torch.float16: ((128, 4),),
}


def backward_problems(dtype: str, capability: int) -> list[Problem]:
    """With everything optional switched on; `describe` meets a rotary embedding as given positions."""
    return [
        Problem(
            batch=1, tokens=4096, sequences=4, q_heads=group, kv_heads=1, head_dim=head_dim, value_dim=head_dim,
            slots=64, window=64, delay=40, dtype=kind, gate_dtype=torch.float32, device="cuda", packed=True,
            positions="given", explicit_strength=True, mask_empty_slots=True, has_state=True, output_final_state=True,
            return_lse=True, needs_grad=True,
        )
        for kind, sizes in BACKWARD.items()
        for head_dim, group in (sizes if capability == 90 else sizes[-1:])
        if str(kind) == f"torch.{dtype}"
    ]  # fmt: skip


def empty_inputs(problem: Problem, device: str = "meta") -> Inputs:
    """Inputs that hold nothing, as a problem describes them."""

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    rows = (problem.batch, problem.tokens, problem.kv_heads)
    g = empty(*rows, problem.slots, dtype=problem.gate_dtype)
    state = None
    if problem.has_state:
        state = NHAState.zeros(
            problem.sequences, problem.kv_heads, problem.slots, problem.head_dim, problem.window,
            slot_delay=problem.delay, dtype=problem.dtype, gate_dtype=problem.gate_dtype,
            with_s=problem.explicit_strength, with_k_window=problem.positions == "given", device=device,
        )  # fmt: skip
    table = empty(problem.tokens + 64, problem.head_dim // 2, dtype=torch.float32)
    q, k = empty(problem.batch, problem.tokens, problem.q_heads, problem.head_dim), empty(*rows, problem.head_dim)
    given = problem.positions == "given"
    return Inputs(
        q=q, k=k, v=empty(*rows, problem.value_dim), g=g,
        s=torch.empty_like(g) if problem.explicit_strength else None,
        rope=(table, table) if problem.positions == "rope" else None,
        q_window=torch.empty_like(q) if given else None, k_window=torch.empty_like(k) if given else None, scale=0.1,
        cu_seqlens=empty(problem.sequences + 1, dtype=torch.int32) if problem.packed else None, state=state,
    )  # fmt: skip


def report(problem: str, launch: Launch, capability: int, listing: bool = False) -> Any:
    """Compile a launch and print a line of JSON; with the assembly and what ptxas says, if asked for."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = compile_launch(launch, capability)
    target = re.search(r"\.target (sm_\d+)", compiled.asm["ptx"])
    row = {
        "problem": problem, "kernel": launch.kernel.__name__, "shared": compiled.metadata.shared,
        "target": target and target[1], "cubin": len(compiled.asm["cubin"]),
        "transposed_left": len(re.findall(r"\btt\.trans\b.*opIdx = 0", compiled.asm["ttgir"])),
        "early": bool(launch.options.get("launch_pdl", False)),
        "between_launches": re.findall(r"\bgriddepcontrol\.(\w+)", compiled.asm["ptx"]),
    }  # fmt: skip
    if listing:
        spills = re.findall(r"(\d+) bytes spill stores", log.getvalue())
        row |= {
            "spilled": sum(map(int, spills)) if spills else None,  # None: the log is not what it was
            "serialised": re.findall(r".*\bC75\d\d\b.*", log.getvalue()),
            "sass": disassemble(compiled.asm["cubin"]),
        }
    print(json.dumps(row), flush=True)


def disassemble(cubin: bytes) -> str:
    """The assembly, all of it: Triton's own listing ends at 64 KB of code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_for(dtype: str, capability: int) -> None:
    """Every launchable variant of a dtype for an architecture."""
    seen: set[Any] = set()
    for problem in launchable_problems():
        if str(problem.dtype) != f"torch.{dtype}":
            continue
        launches, *_ = describe(problem, empty_inputs(problem), ForwardConfig.default(problem))
        for launch in launches:
            if is_new(launch, seen):
                # Only this kernel has wgmmas, and a listing takes time.
                listing = capability == 90 and launch.kernel is output_kernel and problem.dtype != torch.float32
                report(name(problem), launch, capability, listing)


def is_new(launch: Launch, seen: set[Any]) -> bool:
    """Has no launch like it been seen? From now on it has."""
    constants = {key: x for key, x in launch.arguments.items() if isinstance(x, (int, float))}
    key = (launch.kernel, *sorted(constants.items()), *launch.options.items())
    before = len(seen)
    seen.add(key)
    return len(seen) > before


def compile_backward(dtype: str, capability: int) -> None:
    """The backward pass of `backward_problems`; for Hopper with what ptxas says and the assembly.

    But for the pass that stores the slots: forward passes launch it likewise.
    """
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    seen: set[Any] = set()
    for problem in backward_problems(dtype, capability):
        inputs, config = empty_inputs(problem), BackwardConfig.default(problem)
        rows = (problem.batch, problem.tokens, problem.q_heads)
        lse = torch.empty(rows, device="meta")
        grad_o = torch.empty(*rows, problem.value_dim, dtype=problem.dtype, device="meta")
        slots = (problem.sequences, problem.kv_heads, problem.slots, problem.head_dim + problem.value_dim)
        launches = backward.passes(
            problem, inputs, lse, grad_o, torch.empty_like(lse), torch.empty(slots, device="meta"), config, {}
        )
        for launch in launches:
            if launch.kernel is not segment_kernel and is_new(launch, seen):
                report(name(problem), launch, capability, listing=capability == 90)


def compile_resident(name: str) -> None:
    """The kernels that serve one of `resident_problems`, with what ptxas says of them as it compiles them."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    problem = resident_problems()[name]
    # A descriptor asks for an address, so these inputs have one.
    launches, *_ = describe(problem, empty_inputs(problem, "cpu"), choose(problem, processors=132))
    for launch in launches:
        report(name, launch, 90, listing=True)


def compile_resident_backward(name: str) -> None:
    """The gradients of one of `resident_problems` by the kernels for Hopper, likewise."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    problem = replace(resident_problems()[name], needs_grad=True, output_final_state=False)
    lse = torch.empty(problem.batch, problem.tokens, problem.q_heads)
    grad_o = torch.empty(*lse.shape, problem.value_dim, dtype=problem.dtype)
    final = torch.empty(problem.sequences, problem.kv_heads, problem.slots, problem.head_dim + problem.value_dim)
    config = ResidentRowsConfig.default(problem, processors=132)
    short = replace(problem, tokens=problem.delay)  # of which no token enters the slots
    for called, grad_final in ((problem, final), (short, None)):
        rows, grad = lse[:, : called.tokens].contiguous(), grad_o[:, : called.tokens].contiguous()
        inputs = empty_inputs(called, "cpu")
        passes = backward.passes(called, inputs, rows, grad, rows, grad_final, config, {})
        for launch in passes:
            if called is problem or launch.kernel is resident_window_kernel:
                report(name, launch, 90, listing=True)


if __name__ == "__main__":
    if sys.argv[1] == "resident":
        compile_resident(sys.argv[2])
    elif sys.argv[1] == "resident-backward":
        compile_resident_backward(sys.argv[2])
    elif sys.argv[1] == "backward":
        compile_backward(sys.argv[2], int(sys.argv[3]))
    else:
        compile_for(sys.argv[1], int(sys.argv[2]))
