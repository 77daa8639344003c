"""triton: the fused forward, a state pass and an output kernel, or one kernel that keeps the slots on the chip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import torch

from ..problem import Inputs, Problem, Result
from ..slots import final_slots, initial_slots
from .backward import run_differentiably
from .limits import DTYPES
from .output import OutputConfig, output_launch
from .primitives import Launch, Operands, processors_of
from .resident import ResidentConfig, Starts, resident_launch, resident_launches, why_not_resident
from .resident_single import SingleConfig, single_launch, why_not_single
from .states import StatesConfig, state_launches


@dataclass(frozen=True, slots=True)
class ForwardConfig:
    """How a forward is launched."""

    states: StatesConfig
    output: OutputConfig

    @classmethod
    def default(cls, problem: Problem) -> ForwardConfig:
        """By the problem's sizes; no search, no measurement."""
        output = OutputConfig.default(problem)
        # States twice as dense where a tile may reach into a second chunk: the tokens in between stay as many.
        sparse = problem.dtype != torch.float32 and output.stays_in_chunk(problem, 32)
        return cls(StatesConfig.default(problem, chunk=32 if sparse else 16), output)


def launchable_problems() -> Iterator[Problem]:
    """A problem for each variant of the kernels that `ForwardConfig.default` leads to, everything optional switched on.

    What varies a kernel's registers and shared memory is here: dtype, head size, rows of a tile, alignment.
    """
    variants = product(DTYPES, (64, 128, 256, 512), (1, 2, 4), (64, 40))
    odd = ((torch.bfloat16, head_dim, 4, 64) for head_dim in (16, 96))  # the smallest, and one that is padded
    for dtype, head_dim, group, delay in (*variants, *odd):
        if dtype == torch.float32 and group > 1:
            continue  # one tile serves every group
        yield Problem(
            batch=1, tokens=4096, sequences=4, q_heads=group, kv_heads=1, head_dim=head_dim, value_dim=head_dim,
            slots=64, window=64, delay=delay, dtype=dtype, gate_dtype=torch.float32, device="cuda", packed=True,
            positions="rope", explicit_strength=True, mask_empty_slots=True, has_state=True, output_final_state=True,
            return_lse=True,
        )  # fmt: skip


@lru_cache  # most calls are like one of the last
def choose(problem: Problem, processors: int) -> ForwardConfig | ResidentConfig:
    """The kernels that serve a problem on a GPU with so many multiprocessors, and how they are launched."""
    if why_not_resident(problem) is None:
        return ResidentConfig.default(problem, processors)
    if why_not_single(problem) is None:
        return SingleConfig.default(problem, processors)
    return ForwardConfig.default(problem)


def run(problem: Problem, inputs: Inputs, config: ForwardConfig | ResidentConfig | None = None) -> Result:
    """Serve a call with a config (default: `choose`); never waits for the device."""
    if problem.needs_grad and torch.is_grad_enabled():
        return run_differentiably(problem, inputs, partial(_serve, config=config))
    return _serve(problem, inputs, config)[0]


def _serve(
    problem: Problem, inputs: Inputs, config: ForwardConfig | ResidentConfig | None
) -> tuple[Result, Starts | None]:
    if config is None:
        config = choose(problem, processors_of(inputs.q.device))
    launches, result, starts = describe(problem, inputs, config)
    with torch.cuda.device(inputs.q.device) if problem.device == "cuda" else nullcontext():
        for launch in launches:
            launch()
    return result, starts


def describe(
    problem: Problem, inputs: Inputs, config: ForwardConfig | ResidentConfig
) -> tuple[list[Launch], Result, Starts | None]:
    """The launches, in order, and what they fill: the result, and the segments' starts where there are some."""
    if isinstance(config, ResidentConfig):
        last = single_launch if isinstance(config, SingleConfig) else resident_launch
        launches, o, lse, final, starts = resident_launches(problem, inputs, config, last)
        return launches, Result(o, lse, *((None, None) if final is None else final_slots(problem, final))), starts
    operands = Operands.of(problem, inputs)
    launches, stored = state_launches(problem, operands, initial_slots(problem, inputs), config.states)
    launch, o, lse = output_launch(problem, inputs, operands, stored, config.output)
    slots = (None, None) if stored.final is None else final_slots(problem, stored.final)
    return [*launches, launch], Result(o, lse, *slots), None
