"""The fused kernels under launch settings other than the default, against naive in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nha_kernels import explain
from nha_kernels.fused import limits
from nha_kernels.problem import Inputs, Problem
from nha_kernels.state import advance

from .helpers import DEVICE, ON_GPU, Arguments, Case, Judge, Output, error, judge, make, parts

reason = limits.why_unavailable(DEVICE)
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

# Packed, with a state, tiles that straddle the chunks of stored states, more slots than a block.
AWKWARD = Case(
    tokens=45,
    lengths=(1, 0, 28, 16),
    past=(3, 0, 20, 9),
    window=21,
    delay=13,
    kv_heads=1,
    slots=20,
    rope=True,
    mask=True,
)
ALIGNED = Case(tokens=70, window=16, group=4, kv_heads=1)

STATES: dict[str, dict[str, int]] = {
    "dense states": {"chunk": 16, "segment": 64, "block": 16},
    "sparse states": {"chunk": 64, "segment": 64, "block": 64},
    "sparser states than steps": {"chunk": 128, "segment": 256, "block": 32},
    "narrow columns": {"columns": 16},
}
OUTPUT: dict[str, dict[str, Any]] = {
    "small tile": {"rows": 16},
    "large tile": {"rows": 128},
    "wide keys": {"keys": 64},
    "small blocks of slots": {"slots": 16},
}


def serve(args: Arguments, states: dict[str, Any], output: dict[str, Any]) -> Output:
    """Run a call with some launch settings changed."""
    from nha_kernels.fused.forward import ForwardConfig, run

    problem: Problem = explain(**args, output_final_state=True, return_lse=True).problem
    config = ForwardConfig.default(problem)
    config = ForwardConfig(replace(config.states, **states), replace(config.output, **output))
    names = ("q", "k", "v", "g", "s", "rope", "q_window", "k_window", "scale", "cu_seqlens", "initial_state")
    inputs = Inputs(*(args.get(name) for name in names))
    if inputs.scale is None:
        inputs = replace(inputs, scale=inputs.q.shape[-1] ** -0.5)
    result = run(problem, inputs, config)
    assert result.lse is not None
    return Output(result.o, advance(problem, inputs, result), result.lse)


def judged(case: Case) -> tuple[Arguments, Judge]:
    args = make(case, torch.bfloat16 if ON_GPU else torch.float32)
    return args, judge(args)


@pytest.mark.parametrize("case", [AWKWARD, ALIGNED], ids=["awkward", "aligned"])
@pytest.mark.parametrize("name", [*STATES, *OUTPUT])
def test_settings_do_not_change_the_answer(name: str, case: Case) -> None:
    args, right = judged(case)
    right.accept(serve(args, STATES.get(name, {}), OUTPUT.get(name, {})), what=name)


@pytest.mark.parametrize(
    ("case", "gates"), [(ALIGNED, "strong"), (ALIGNED, "spikes"), (AWKWARD, "mixed")], ids=["strong", "spikes", "mixed"]
)
def test_the_anchor_loses_no_more_than_its_cut(case: Case, gates: str) -> None:
    """The anchored decays, which bf16 uses, in fp32: all they may lose is the cut of a step's decay at 2^-13, and with
    it what an exponent around 104 costs in fp32."""
    args = make(replace(case, gates=gates), torch.float32)
    answer = judge(args).answer
    output = serve(args, {}, {"anchored": True})
    for name, x in parts(output).items():
        assert error(x, parts(answer)[name]) <= 2**-13, name
