"""Compile the fused kernels for a GPU that is not there: `python compiling.py DTYPE CAPABILITY`.

A program of its own, since kernels that were imported for Triton's interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nha_kernels.fused.forward import ForwardConfig, describe, launchable_problems
from nha_kernels.fused.primitives import Launch
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
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
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
    return "fp32" if isinstance(value, float) else "i32"


def name(problem: Problem) -> str:
    """A problem's variant in a few words."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return f"{dtype}-D{problem.head_dim}-NG{problem.group}-delay{problem.delay}"


def meta_inputs(problem: Problem) -> Inputs:
    """Inputs without data, with every optional one."""

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = (problem.batch, problem.tokens, problem.kv_heads)
    g = empty(*rows, problem.slots, dtype=problem.gate_dtype)
    state = NHAState.zeros(
        problem.sequences, problem.kv_heads, problem.slots, problem.head_dim, problem.window,
        slot_delay=problem.delay, dtype=problem.dtype, gate_dtype=problem.gate_dtype, with_s=True, device="meta",
    )  # fmt: skip
    table = empty(problem.tokens + 64, problem.head_dim // 2, dtype=torch.float32)
    return Inputs(
        q=empty(problem.batch, problem.tokens, problem.q_heads, problem.head_dim),
        k=empty(*rows, problem.head_dim), v=empty(*rows, problem.value_dim), g=g, s=torch.empty_like(g),
        rope=(table, table), q_window=None, k_window=None, scale=0.1,
        cu_seqlens=empty(problem.sequences + 1, dtype=torch.int32), state=state,
    )  # fmt: skip


def main(dtype: str, capability: int) -> None:
    """Compile every launchable variant of a dtype for an architecture; a line of JSON for each kernel."""
    seen = set()
    for problem in launchable_problems():
        if str(problem.dtype) != f"torch.{dtype}":
            continue
        launches, _ = describe(problem, meta_inputs(problem), ForwardConfig.default(problem))
        for launch in launches:
            constants = {key: x for key, x in launch.arguments.items() if isinstance(x, (int, float))}
            key = (launch.kernel, *sorted(constants.items()), *launch.options.items())
            if key in seen:
                continue
            seen.add(key)
            compiled = compile_launch(launch, capability)
            target = re.search(r"\.target (sm_\d+)", compiled.asm["ptx"])
            row = {
                "problem": name(problem), "kernel": launch.kernel.__name__, "shared": compiled.metadata.shared,
                "target": target and target[1], "cubin": len(compiled.asm["cubin"]),
                "transposed_left": len(re.findall(r"\btt\.trans\b.*opIdx = 0", compiled.asm["ttgir"])),
            }  # fmt: skip
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
