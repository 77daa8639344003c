"""The fused kernels under launch settings other than the default, against naive in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nha_kernels import explain
from nha_kernels.fused import limits
from nha_kernels.problem import Problem
from nha_kernels.state import advance

from .helpers import (
    DEVICE,
    ON_GPU,
    Arguments,
    Case,
    Judge,
    Output,
    dtypes,
    error,
    inputs_of,
    judge,
    make,
    parts,
    short,
    zero_state,
)

reason = limits.why_unavailable(DEVICE)
pytestmark = [pytest.mark.skipif(reason is not None, reason=str(reason)), pytest.mark.usefixtures("interpreted")]

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
# Heads of more columns than one product takes, values of more than one program takes.
WIDE = {
    "D 512, Dv 512": Case(tokens=40, window=20, kv_heads=1, group=4, head_dim=512, slots=40),
    "D 512, Dv 64": Case(tokens=40, window=20, kv_heads=1, head_dim=512, value_dim=64, given=True, strength=True),
    "D 64, Dv 512": Case(tokens=40, window=20, kv_heads=1, head_dim=64, value_dim=512, past=(9,)),
    "no multiples of a block": replace(AWKWARD, head_dim=336, value_dim=320),
}

STATES: dict[str, dict[str, int]] = {
    "dense states": {"chunk": 16, "segment": 64, "block": 16},
    "steps longer than chunks": {"chunk": 16, "segment": 64, "block": 64},
    "narrow columns": {"columns": 16},
}
OUTPUT: dict[str, dict[str, Any]] = {
    "small tile": {"rows": 16},
    "wide keys": {"keys": 64},
    "small blocks of slots": {"rows": 32, "slots": 16},
}


def serve(args: Arguments, states: dict[str, Any], output: dict[str, Any]) -> Output:
    """Run a call with some launch settings changed."""
    from nha_kernels.fused.forward import ForwardConfig, run

    problem: Problem = explain(**args, output_final_state=True, return_lse=True).problem
    config = ForwardConfig.default(problem)
    config = ForwardConfig(replace(config.states, **states), replace(config.output, **output))
    inputs = inputs_of(args)
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


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype", dtypes("triton") if ON_GPU else [torch.float32], ids=short)
def test_wide_heads(name: str, dtype: torch.dtype) -> None:
    args = make(WIDE[name], dtype)
    judge(args).accept(serve(args, {}, {}))


@pytest.mark.parametrize("chunk", [8, 64, 128])
def test_chunks_that_are_refused(chunk: int) -> None:
    from nha_kernels.fused.states import StatesConfig

    with pytest.raises(ValueError, match=f"chunk: expected 16 or 32; got {chunk}"):
        StatesConfig(chunk=chunk, segment=256, block=64, columns=64, warps=4, stages=2)


@pytest.mark.parametrize("rows", [8, 48, 128])
def test_rows_that_are_refused(rows: int) -> None:
    from nha_kernels.fused.output import OutputConfig

    with pytest.raises(ValueError, match=f"rows: expected 16, 32 or 64; got {rows}"):
        OutputConfig(rows=rows, keys=32, slots=64, columns=64, values=64, warps=4, stages=2, anchored=True)


@pytest.mark.parametrize("name", ["slots", "columns", "values"])
def test_narrow_blocks_that_are_refused(name: str) -> None:
    from nha_kernels.fused.output import OutputConfig

    sizes = dict.fromkeys(("slots", "columns", "values"), 64) | {name: 32}
    with pytest.raises(ValueError, match=f"{name}: expected at least 64 with 64 rows; got 32"):
        OutputConfig(rows=64, keys=32, warps=4, stages=2, anchored=True, **sizes)


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


@pytest.mark.parametrize("gate", [-1e-6, -1e-4, -1e-2, -0.09, -0.11, -1.0])
def test_weak_gates_write_as_exactly_as_strong_ones(gate: float) -> None:
    """1 - exp(g) cancels where g is near 0, and all slots would be wrong by the same factor."""
    args = make(Case(tokens=64, window=4, kv_heads=1, group=1, gates=str(gate)), torch.float32)
    judge(args).accept(serve(args, {}, {}))


def test_large_logits_do_not_overflow_fp16() -> None:
    """q . k alone is beyond fp16's range here; scaled it is not."""
    args = make(Case(tokens=40, window=4, kv_heads=1, scale=1e-4), torch.float16)
    args["q"], args["k"] = args["q"] * 90, args["k"] * 90
    output = serve(args, {}, {})
    reference = judge(dict(args, q=args["q"].float(), k=args["k"].float(), v=args["v"].float())).answer
    assert error(output.o, reference.o) < 2**-8  # some roundings to fp16's 2^-11


def test_initial_slots_without_room_for_tokens() -> None:
    """A state that has seen nothing may bring slots of its own, and no ring."""
    args = make(Case(tokens=20, window=4, kv_heads=1), torch.float32)
    state = zero_state(args)
    empty = {name: x[:, :0] for name, x in state.tensors().items() if name in ("k", "v", "g")}
    slots = {name: torch.randn_like(x) for name, x in state.tensors().items() if name.startswith("slot")}
    args["initial_state"] = replace(state, **empty, **slots)
    judge(args).accept(serve(args, {}, {}))


def test_strided_offsets_and_counts() -> None:
    args = make(Case(tokens=40, lengths=(10, 30), past=(3, 3), window=4, kv_heads=1), torch.float32)
    right = judge(args)
    args["cu_seqlens"] = torch.stack((args["cu_seqlens"], args["cu_seqlens"] + 1), 1)[:, 0]
    state = args["initial_state"]
    args["initial_state"] = replace(state, seen=state.seen[:1].expand(2))
    right.accept(serve(args, {}, {}))


def test_many_short_sequences_take_no_more_states_than_their_tokens() -> None:
    """States are stored by whole segments, so segments must be short where sequences are."""
    from nha_kernels.fused.forward import ForwardConfig, describe

    case = Case(tokens=4096, lengths=(8,) * 512, window=4, kv_heads=1, head_dim=64)
    args = make(case, torch.float32, "cpu")
    problem = explain(**args).problem
    launches, *_ = describe(problem, inputs_of(args), ForwardConfig.default(problem))
    states = launches[0].arguments["p_states"]
    chunk = launches[-1].arguments["C"]
    assert len(states) <= 4 * (case.tokens // chunk + problem.sequences)
