"""naive against a second reading of the definition: explicit sums in Python floats, the recurrence unrolled.

Nothing here comes from the package: a slot is the sum over all tokens that entered it, each with the product of every
gate after it; a rotation turns a pair of numbers as a complex number by an angle.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import native_hybrid_attention

from .helpers import FLOAT64, Arguments, Case, budget, call, cast, error, make, one_by_one, parts, short

CASES = {
    "plain": Case(),
    "no window": Case(window=0),
    "only itself": Case(window=1),
    "window over everything": Case(window=20),
    "no delay": Case(delay=0),
    "delay below the window": Case(delay=1),
    "delay above the window": Case(delay=6),
    "delay over everything": Case(delay=50),
    "strength": Case(strength=True),
    "strength, no window": Case(strength=True, window=0, delay=2),
    "rope": Case(rope=True),
    "rope, state": Case(rope=True, past=(5,)),
    "given positions": Case(given=True),
    "scale": Case(scale=1.7),
    "masked": Case(mask=True),
    "masked, no window": Case(mask=True, window=0, delay=4),
    "masked, state": Case(mask=True, past=(2,)),
    "state": Case(past=(7,)),
    "state, delay above the window": Case(past=(7,), window=2, delay=5),
    "group of 3": Case(group=3, kv_heads=1),
    "one slot": Case(slots=1),
    "batch": Case(batch=2, past=(1, 4)),
    "packed": Case(tokens=10, lengths=(1, 0, 5, 4)),
    "everything": Case(tokens=10, lengths=(6, 4), past=(0, 3), given=True, strength=True, mask=True, scale=0.4),
    "mixed gates": Case(gates="mixed"),
}
SMALL = dict(head_dim=4, value_dim=3)


def small(name: str) -> Case:
    case = replace(CASES[name], **SMALL)
    case = replace(case, slots=min(case.slots, 3))
    if case.tokens == Case().tokens:
        case = replace(case, tokens=9)
    return replace(case, window=3) if case.window == Case().window else case


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def rotated(x: list[float], angles: list[float]) -> list[float]:
    """x's halves are the real and the imaginary parts of D/2 complex numbers; each is turned by its angle."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * cmath.exp(1j * angles[i]) for i in range(half)]
    return [z.real for z in turned] + [z.imag for z in turned]


def by_hand(args: Arguments, past: Arguments | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o [T, HQ, Dv], lse [T, HQ] and slots [H, M, ...] of the only sequence, after `past` tokens that come before it.

    A state is given as the tokens that made it: the definition knows no segments.
    """
    x: dict[str, Any] = {
        name: args[name][0].tolist()
        for name in ("q", "k", "v", "g", "s", "q_window", "k_window")
        if args.get(name) is not None
    }
    before = 0
    if past is not None:
        before = past["k"].shape[1]
        x = {name: past[name][0].tolist() + rows for name, rows in x.items()}
    window, scale = args["window_size"], args["scale"]
    delay = window if args["slot_delay"] is None else args["slot_delay"]
    tokens, q_heads, kv_heads, slots = len(x["q"]), len(x["q"][0]), len(x["k"][0]), len(x["g"][0][0])
    scale = len(x["q"][0][0]) ** -0.5 if scale is None else scale
    q_window, k_window = x.get("q_window", x["q"]), x.get("k_window", x["k"])
    if args.get("rope") is not None:
        cos, sin = (table.tolist() for table in args["rope"])
        angles = [[math.atan2(b, a) for a, b in zip(*row, strict=True)] for row in zip(cos, sin, strict=True)]
        q_window = [[rotated(head, angles[t]) for head in x["q"][t]] for t in range(tokens)]
        k_window = [[rotated(head, angles[t]) for head in x["k"][t]] for t in range(tokens)]

    def strength(j: int, h: int, m: int) -> float:
        return x["s"][j][h][m] if "s" in x else 1 - math.exp(x["g"][j][h][m])

    def slot(rows: list[Any], t: int, h: int, m: int) -> list[float]:
        """sum_j s_j alpha_{j+1} ... alpha_t row_j: what slot m of head h holds once token t has entered."""
        held = [0.0] * len(rows[0][h])
        for j in range(t + 1):
            weight = strength(j, h, m) * math.prod(math.exp(x["g"][i][h][m]) for i in range(j + 1, t + 1))
            held = [a + weight * b for a, b in zip(held, rows[j][h], strict=True)]
        return held

    o, lse = [], []
    for t in range(before, tokens):
        o.append([])
        lse.append([])
        for hq in range(q_heads):
            h = hq // (q_heads // kv_heads)
            weighted = []
            if not (args["mask_empty_slots"] and t - delay < 0):
                for m in range(slots):
                    logit = scale * dot(x["q"][t][hq], slot(x["k"], t - delay, h, m))
                    weighted.append((math.exp(logit), slot(x["v"], t - delay, h, m)))
            for j in range(t + 1):
                if t - window < j <= t:
                    weighted.append((math.exp(scale * dot(q_window[t][hq], k_window[j][h])), x["v"][j][h]))
            total = sum(weight for weight, _ in weighted)
            row = [0.0] * len(x["v"][0][0])
            for weight, value in weighted:
                row = [a + weight / total * b for a, b in zip(row, value, strict=True)]
            o[-1].append(row)
            lse[-1].append(math.log(total) if weighted else -math.inf)
    final = [
        [[slot(x[name], tokens - 1 - delay, h, m) for m in range(slots)] for h in range(kv_heads)]
        for name in ("k", "v")
    ]
    return tuple(torch.tensor(part, dtype=torch.float64) for part in (o, lse, *final))  # type: ignore[return-value]


def with_tokens_for_a_state(case: Case) -> tuple[Arguments, list[Arguments | None]]:
    """The inputs of a case, its state made by a call over tokens that are given back too, for each sequence."""
    if case.past is None:
        return make(case, device="cpu"), [None] * case.sequences
    seen = sum(case.past)
    before = make(replace(case, past=None, batch=1, tokens=seen, lengths=case.past, seed=case.seed + 1), device="cpu")
    args = make(replace(case, past=None), device="cpu")
    if case.rope:
        longest = case.tokens + max(case.past)
        tables = make(replace(case, past=None, batch=1, lengths=None, tokens=longest), device="cpu")["rope"]
        args["rope"] = before["rope"] = tables
    _, state = native_hybrid_attention(**before, output_final_state=True, backend="naive")
    pasts: list[Arguments | None] = []
    alone = iter(one_by_one(before))
    for length in case.past:
        pasts.append(next(alone) if length else None)
    return dict(args, initial_state=state), pasts


@pytest.mark.parametrize("name", CASES)
def test_naive_is_the_definition(name: str) -> None:
    case = small(name)
    args, pasts = with_tokens_for_a_state(case)
    if case.lengths is not None:
        pasts = [past for past, length in zip(pasts, case.lengths, strict=True) if length]
    o, state, lse = native_hybrid_attention(**args, output_final_state=True, return_lse=True, backend="naive")
    expected = [by_hand(alone, past) for alone, past in zip(one_by_one(args), pasts, strict=True)]
    holds = [n for n in range(case.sequences) if case.lengths is None or case.lengths[n]]
    o_by_hand, lse_by_hand, slot_k, slot_v = zip(*expected, strict=True)
    assert error(o.flatten(0, 1), torch.cat(o_by_hand)) <= FLOAT64
    assert error(lse.flatten(0, 1), torch.cat(lse_by_hand)) <= FLOAT64
    assert error(state.slot_k[holds], torch.stack(slot_k)) <= FLOAT64
    assert error(state.slot_v[holds], torch.stack(slot_v)) <= FLOAT64


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(tokens=100, strength=True, rope=True), id="strength"),
        pytest.param(Case(tokens=100, rope=True), id="no strength"),
        pytest.param(Case(tokens=100, gates_like_q=True), id="gates in the dtype of q"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=short)
def test_naive_loses_no_more_than_its_dtype(dtype: torch.dtype, case: Case) -> None:
    """Every budget comes from naive's error in a dtype, so that error must itself be one of rounding."""
    args = make(case, dtype)
    answer = parts(call(cast(args, torch.float64), "naive"))
    for name, x in parts(call(args, "naive")).items():
        assert error(x, answer[name]) <= budget(0.0, dtype), name


def test_a_sequence_without_tokens_keeps_its_state() -> None:
    args = make(Case(tokens=4, lengths=(0, 4), past=(6, 1)), device="cpu")
    before = args["initial_state"]
    _, state = native_hybrid_attention(**args, output_final_state=True, backend="naive")
    assert torch.equal(state.slot_k[0], before.slot_k[0])
    assert torch.equal(state.slot_v[0], before.slot_v[0])
    assert state.seen.tolist() == [6, 5]


def test_the_default_scale_delay_and_strength() -> None:
    args = make(Case(window=5), device="cpu")
    spelled_out = dict(args, scale=args["q"].shape[-1] ** -0.5, slot_delay=5, s=-args["g"].expm1())
    o, _ = native_hybrid_attention(**args, backend="naive")
    expected, _ = native_hybrid_attention(**spelled_out, backend="naive")
    assert torch.equal(o, expected)


def test_rope_is_the_same_as_rotating_before_the_call() -> None:
    """With its position as angle, the rotation as Llama has it: cos(x) and sin(x) of rotate_half."""
    args = make(Case(tokens=30, batch=2, head_dim=8), device="cpu")
    inverse = 1e4 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angle = torch.arange(30, dtype=torch.float64)[:, None] * inverse
    cos, sin = (torch.cat((f(angle), f(angle)), dim=-1)[None, :, None] for f in (torch.cos, torch.sin))

    def llama(x: Tensor) -> Tensor:
        half = torch.cat((-x[..., 4:], x[..., :4]), dim=-1)
        return x * cos + half * sin

    o, _ = native_hybrid_attention(**args, rope=(angle.cos(), angle.sin()), backend="naive")
    expected, _ = native_hybrid_attention(**args, q_window=llama(args["q"]), k_window=llama(args["k"]), backend="naive")
    assert error(o, expected) <= FLOAT64


@pytest.mark.parametrize("given", ["q_window", "k_window"])
def test_one_ready_made_side_leaves_the_other_as_it_is(given: str) -> None:
    args = make(Case(tokens=20, given=True), device="cpu")
    other = "k_window" if given == "q_window" else "q_window"
    both = dict(args, **{other: args[other[0]]})
    alone = {name: x for name, x in args.items() if name != other}
    o, _ = native_hybrid_attention(**alone, backend="naive")
    expected, _ = native_hybrid_attention(**both, backend="naive")
    assert torch.equal(o, expected)
