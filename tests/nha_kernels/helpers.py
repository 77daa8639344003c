"""What the tests of nha_kernels share: inputs, the float64 judge, tolerances, and the backends of this machine.

Sizes are named as in the package: B T N HQ H NG D Dv M W. `Arguments` are the keyword arguments of
`native_hybrid_attention` without `backend`, so a test can change, cut or cast them before it calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nha_kernels import NHAState, explain, layout, native_hybrid_attention, nha_decode_step
from nha_kernels.problem import Inputs, Problem, history_length
from nha_kernels.registry import BACKENDS, IMPLEMENTATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
# Head size of most cases: the smallest that every backend takes; in Triton's interpreter small is the point.
HEAD = 64 if ON_GPU else 16
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOKEN_ARGUMENTS = ("q", "k", "v", "g", "s", "q_window", "k_window")

Arguments = dict[str, Any]


# ---- The backends of this machine ----


def describe(**sizes: Any) -> Problem:
    """A plain call that every backend serves in the right dtype; `sizes` change what a test is about."""
    plain = Problem(
        batch=1, tokens=64, sequences=1, q_heads=4, kv_heads=2, head_dim=64, value_dim=64, slots=16, window=16,
        delay=16, dtype=torch.float16, gate_dtype=torch.float32, device=DEVICE,
        capability=torch.cuda.get_device_capability() if ON_GPU else None,
    )  # fmt: skip
    return replace(plain, **sizes)


def dtypes(backend: str, *, needs_grad: bool = False) -> tuple[torch.dtype, ...]:
    """The dtypes that a backend serves here, from the most precise to the least."""

    def served(dtype: torch.dtype) -> bool:
        # Triton's interpreter is wrong for bf16, whatever the kernel.
        if backend == "triton" and not ON_GPU and dtype == torch.bfloat16:
            return False
        gate = dtype if dtype == torch.float64 else torch.float32
        problem = describe(dtype=dtype, gate_dtype=gate, needs_grad=needs_grad, head_dim=HEAD, value_dim=HEAD)
        return IMPLEMENTATIONS[backend].why_not(problem) is None

    return tuple(dtype for dtype in DTYPES if served(dtype))


def _unavailable(backend: str) -> str | None:
    return IMPLEMENTATIONS[backend].why_unavailable(DEVICE)


def backends(*, without: Sequence[str] = (), needs_grad: bool = False) -> list[Any]:
    """Every backend as a pytest parameter; one that this machine has not, or without a gradient, skips and says why."""
    params = []
    for name in BACKENDS:
        if name in without:
            continue
        reason = _unavailable(name)
        if reason is None and needs_grad and not dtypes(name, needs_grad=True):
            reason = IMPLEMENTATIONS[name].why_not(describe(needs_grad=True))
        params.append(pytest.param(name, id=name, marks=[pytest.mark.skip(reason=reason)] if reason else []))
    return params


def backends_and_dtypes(*, without: Sequence[str] = (), needs_grad: bool = False) -> list[Any]:
    """(backend, dtype) as pytest parameters; a backend that is missing here skips once, not for each dtype."""
    params = []
    for param in backends(without=without, needs_grad=needs_grad):
        (name,) = param.values
        for dtype in (torch.float32,) if param.marks else dtypes(name, needs_grad=needs_grad):
            params.append(pytest.param(name, dtype, id=f"{name}-{short(dtype)}", marks=param.marks))
    return params


def backends_and(
    names: Iterable[str], few: Collection[str], *, without: Sequence[str] = (), needs_grad: bool = False
) -> list[Any]:
    """(backend, name) as pytest parameters; for Triton only `few` of the names: each new kind of call takes seconds to
    compile, or to interpret."""
    params = []
    for param in backends(without=without, needs_grad=needs_grad):
        (backend,) = param.values
        chosen = [name for name in names if name in few or backend != "triton"]
        for name in ["any"] if param.marks else chosen:
            params.append(pytest.param(backend, name, id=f"{backend}-{name}", marks=param.marks))
    return params


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def precise(backend: str, *, needs_grad: bool = False) -> torch.dtype:
    """The most precise dtype that a backend serves here."""
    return dtypes(backend, needs_grad=needs_grad)[0]


def slow(backend: str) -> bool:
    """Does a call take seconds here, so that a test must ask for little?"""
    return backend == "triton" and not ON_GPU


def skip_unserved(backend: str, args: Arguments) -> None:
    """Skip a test whose call the backend cannot serve; its reason becomes the test's."""
    reason = why_not(backend, args)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def why_not(backend: str, args: Arguments) -> str | None:
    asked = dict(args, output_final_state=True, return_lse=not _needs_grad(args))
    problem = explain(**asked).problem
    return IMPLEMENTATIONS[backend].why_unavailable(problem.device) or IMPLEMENTATIONS[backend].why_not(problem)


def _needs_grad(args: Arguments) -> bool:
    state = args.get("initial_state")
    tensors = [*args.values(), *(state.tensors().values() if state is not None else ())]
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


@contextmanager
def one_block_a_segment() -> Iterator[None]:
    """Cut the work of the PyTorch implementations as finely as it goes, so that small inputs cross segments too."""
    before = dict(layout.SEGMENT_ELEMENTS)
    layout.SEGMENT_ELEMENTS.update(dict.fromkeys(before, 1))
    try:
        yield
    finally:
        layout.SEGMENT_ELEMENTS.update(before)


# ---- Inputs ----


@dataclass(frozen=True)
class Case:
    """A call to make inputs for. `lengths` packs sequences; `past`: the tokens that each has seen before the call."""

    tokens: int = 80
    window: int = 8
    delay: int | None = None
    batch: int = 1
    lengths: tuple[int, ...] | None = None
    past: tuple[int, ...] | None = None
    kv_heads: int = 2
    group: int = 2
    head_dim: int = HEAD
    value_dim: int | None = None
    slots: int = 16
    strength: bool = False
    rope: bool = False
    given: bool = False
    mask: bool = False
    scale: float | None = None
    gates: str = "mild"
    gates_like_q: bool = False
    seed: int = 0

    @property
    def sequences(self) -> int:
        return self.batch if self.lengths is None else len(self.lengths)

    @property
    def history(self) -> int:
        return history_length(self.window, self.window if self.delay is None else self.delay)


def make(case: Case, dtype: torch.dtype = torch.float64, device: str = DEVICE) -> Arguments:
    """Random inputs of a case, already rounded to `dtype`."""
    random = torch.Generator().manual_seed(case.seed)
    args = _tokens(case, case.batch, case.tokens, case.lengths, random)
    args.update(window_size=case.window, slot_delay=case.delay, mask_empty_slots=case.mask, scale=case.scale)
    if case.rope:
        positions = case.tokens + max(case.past or (0,))
        # Any angles will do; tables must not be the same at every position.
        angle = torch.randn(positions, case.head_dim // 2, generator=random, dtype=torch.float64)
        args["rope"] = (angle.cos(), angle.sin())
    if case.past is not None:
        args["initial_state"] = _state_after(case, args, random)
    return cast(args, dtype, device, gates_like_q=case.gates_like_q)


def _tokens(case: Case, batch: int, tokens: int, lengths: tuple[int, ...] | None, random: torch.Generator) -> Arguments:
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    heads = {"q": case.kv_heads * case.group, "k": case.kv_heads, "v": case.kv_heads}
    heads |= {"q_window": case.kv_heads * case.group, "k_window": case.kv_heads} if case.given else {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    args: Arguments = {
        name: normal(batch, tokens, count, value_dim if name == "v" else case.head_dim) for name, count in heads.items()
    }
    shape = (batch, tokens, case.kv_heads, case.slots)
    args["g"] = gates(case.gates, shape, random)
    if case.strength:
        args["s"] = torch.rand(shape, generator=random, dtype=torch.float64)
    if lengths is not None:
        assert sum(lengths) == tokens
        args["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return args


def gates(kind: str, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Log forget gates [B, T, H, M]. "mild": every slot has a time scale of its own, from 1 to 100 tokens."""
    rate = torch.logspace(-2, 0, shape[-1], dtype=torch.float64)
    mild = -torch.rand(shape, generator=random, dtype=torch.float64) * rate
    if kind == "mild":
        return mild
    if kind == "strong":
        return -20 - 40 * torch.rand(shape, generator=random, dtype=torch.float64)
    if kind == "spikes":  # one token in eight forgets everything, in all slots
        spike = torch.rand(shape[:2], generator=random) < 1 / 8
        return torch.where(spike[..., None, None], torch.full_like(mild, -100.0), mild)
    if kind == "mixed":  # mild and strong by token, head and slot, with some forgetting nothing and some everything
        choice = torch.randint(0, 5, shape, generator=random)
        values = (mild, torch.zeros_like(mild), mild * 60, mild - 60, torch.full_like(mild, -math.inf))
        return torch.stack(values).gather(0, choice[None])[0]
    return torch.full(shape, float(kind), dtype=torch.float64)


def _state_after(case: Case, args: Arguments, random: torch.Generator) -> NHAState:
    """The state of sequences that have seen case.past tokens: the reference's own, in float64."""
    assert case.past is not None
    assert len(case.past) == case.sequences
    seen = sum(case.past)
    if seen == 0:
        raise ValueError("a state that has seen nothing is NHAState.zeros")
    before = _tokens(case, 1, seen, case.past, random)
    before.update({name: args[name] for name in ("window_size", "slot_delay", "mask_empty_slots", "scale")})
    before["rope"] = args.get("rope")
    _, state = native_hybrid_attention(**before, output_final_state=True, backend="naive")
    return state


def cast(args: Arguments, dtype: torch.dtype, device: str = DEVICE, *, gates_like_q: bool = False) -> Arguments:
    """The same call in another dtype: fp32 (or float64) stays for gates, slots and rope tables, as a model has them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = dict.fromkeys(("q", "k", "v", "q_window", "k_window"), dtype) | dict.fromkeys(
        ("g", "s"), dtype if gates_like_q else wide
    )
    cast_args = dict(args)
    for name, x in args.items():
        if name in kinds and x is not None:
            cast_args[name] = x.to(device, kinds[name])
        elif name == "rope" and x is not None:
            cast_args[name] = tuple(table.to(device, wide) for table in x)
        elif name == "cu_seqlens" and x is not None:
            cast_args[name] = x.to(device)
        elif name == "initial_state" and x is not None:
            cast_args[name] = replace(
                x, **{n: t.to(device, kinds.get(n, wide) if n != "seen" else None) for n, t in x.tensors().items()}
            )
    return cast_args


def zero_state(args: Arguments) -> NHAState:
    """The state of sequences that have seen nothing, of the right sizes for a call."""
    q, k, v, g = (args[name] for name in "qkvg")
    sequences = len(q) if args.get("cu_seqlens") is None else len(args["cu_seqlens"]) - 1
    return NHAState.zeros(
        sequences, k.shape[2], g.shape[3], k.shape[3], args["window_size"], value_dim=v.shape[3],
        slot_delay=args.get("slot_delay"), dtype=q.dtype, gate_dtype=g.dtype, with_s=args.get("s") is not None,
        with_k_window=args.get("k_window") is not None, device=q.device,
    )  # fmt: skip


def clone(args: Arguments) -> Arguments:
    """A copy that shares no memory."""
    copied = {name: x.clone() if isinstance(x, (Tensor, NHAState)) else x for name, x in args.items()}
    if copied.get("rope") is not None:
        copied["rope"] = tuple(table.clone() for table in copied["rope"])
    return copied


def bounds(args: Arguments) -> list[tuple[int, int]]:
    """First and last-plus-one token of each sequence along T, for one batch row or packed ones."""
    if args.get("cu_seqlens") is None:
        return [(0, args["q"].shape[1])]
    offsets = args["cu_seqlens"].tolist()
    return list(pairwise(offsets))


def part(args: Arguments, ranges: Sequence[tuple[int, int]]) -> Arguments:
    """The call on a range of tokens of each sequence (counted from the sequence's start)."""
    chosen = dict(args)
    index: Any
    if args.get("cu_seqlens") is None:
        ((low, high),) = ranges
        index = slice(low, high)
    else:
        starts = [low for low, _ in bounds(args)]
        index = [start + t for start, (low, high) in zip(starts, ranges, strict=True) for t in range(low, high)]
        lengths = [high - low for low, high in ranges]
        chosen["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(args["cu_seqlens"])
    for name in TOKEN_ARGUMENTS:
        if args.get(name) is not None:
            chosen[name] = args[name][:, index]
    return chosen


def one_by_one(args: Arguments) -> list[Arguments]:
    """The same sequences as calls of their own with B = 1, not packed; those of length 0 have none."""
    calls = []
    packed = args.get("cu_seqlens") is not None
    for n, (low, high) in enumerate(bounds(args) if packed else [bounds(args)[0]] * len(args["q"])):
        if low == high:
            continue
        call = dict(args, cu_seqlens=None)
        for name in TOKEN_ARGUMENTS:
            if args.get(name) is not None:
                call[name] = args[name][:, low:high] if packed else args[name][n : n + 1]
        state = args.get("initial_state")
        if state is not None:
            call["initial_state"] = replace(state, **{k: x[n : n + 1] for k, x in state.tensors().items()})
        calls.append(call)
    return calls


# ---- Calls ----


def inputs_of(args: Arguments) -> Inputs:
    """The tensors of a call, as implementations take them."""
    named = {name: args.get(name) for name in (*TOKEN_ARGUMENTS, "rope", "cu_seqlens")}
    scale = args.get("scale") or args["q"].shape[-1] ** -0.5
    return Inputs(**named, scale=scale, state=args.get("initial_state"))


class Output(NamedTuple):
    """What a call gives back, all of it asked for; lse is None where it would need a gradient that a backend lacks."""

    o: Tensor
    state: NHAState
    lse: Tensor


def call(args: Arguments, backend: str) -> Output:
    return Output(*native_hybrid_attention(**args, output_final_state=True, return_lse=True, backend=backend))


def decode(args: Arguments, step: Callable[..., Any] = nha_decode_step) -> Output:
    """The same call token by token, for [B, T] inputs with or without a state."""
    state = args.get("initial_state")
    state = zero_state(args) if state is None else state.clone().with_full_capacity()
    given = {name: x for name, x in args.items() if name not in ("initial_state", "cu_seqlens")}
    steps = []
    for t in range(args["q"].shape[1]):
        token = {name: given[name][:, t : t + 1] for name in TOKEN_ARGUMENTS if given.get(name) is not None}
        steps.append(step(**{**given, **token}, state=state, return_lse=True))
    o, lse = zip(*steps, strict=True)
    return Output(torch.cat(o, dim=1), state, torch.cat(lse, dim=1))


def in_pieces(args: Arguments, cuts: Sequence[int], run: Callable[[Arguments], Output]) -> Output:
    """The same call cut along time, each piece going on from the state after the one before.

    Every sequence is cut at the same positions, or where it ends.
    """
    whole = bounds(args)
    longest = max(high - low for low, high in whole)
    cuts = [cut for cut in cuts if cut < longest]
    state = args.get("initial_state")
    outputs: list[list[Tensor]] = [[] for _ in whole]
    lses: list[list[Tensor]] = [[] for _ in whole]
    for low, high in pairwise([0, *cuts, longest]):
        ranges = [(min(low, b - a), min(high, b - a)) for a, b in whole]
        piece = dict(part(args, ranges), initial_state=state)
        o, state, lse = run(piece)
        for n, (a, b) in enumerate(bounds(piece)):
            outputs[n].append(o[:, a:b])
            lses[n].append(lse[:, a:b])
    assert state is not None
    return Output(
        torch.cat([x for pieces in outputs for x in pieces], dim=1),
        state,
        torch.cat([x for pieces in lses for x in pieces], dim=1),
    )


# ---- The judge, and the only tolerances ----

# Another implementation in the same dtype has other roundings of the same kind, and as many: twice the error is the
# most that it may make. So the budget of each comparison is twice what naive itself loses in that dtype on the very
# same inputs.
MULTIPLE = 2
# Where naive was lucky, as it may be with few numbers: a result still is the end of a chain of some sixteen roundings
# in fp32 (gate, strength, decay, product, sum, logit, scale, maximum, exponential, ...), which at random make sqrt(16)
# of one, and of one rounding to its own dtype.
CHAIN = 4 * torch.finfo(torch.float32).eps / 2
# Two float64 results have no better judge. No mistake is this small; no sum of a few thousand roundings is this large.
FLOAT64 = 1e-12


def budget(naive_error: float, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return FLOAT64
    return MULTIPLE * max(naive_error, CHAIN, torch.finfo(dtype).eps / 2)


def error(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; infinite for another shape, for NaN, or for infinities at other places."""
    x, reference = x.detach().double(), reference.detach().double()
    if x.shape != reference.shape or not torch.equal(x.isfinite(), reference.isfinite()):
        return math.inf
    finite = reference.isfinite()
    if not torch.equal(x[~finite], reference[~finite]):  # NaN is equal to nothing
        return math.inf
    distance = (x - reference)[finite].norm().item()
    size = reference[finite].norm().item()
    return distance / size if size > 0 else (0.0 if distance == 0 else math.inf)


def parts(output: Output) -> dict[str, Tensor]:
    return {
        "o": output.o,
        "lse": output.lse,
        "slot_k": output.state.slot_k,
        "slot_v": output.state.slot_v,
    }


@dataclass(frozen=True)
class Judge:
    """The float64 answer to a call, and for each part of it the error that may be made in the call's own dtype."""

    answer: Output
    budgets: dict[str, float]
    dtype: torch.dtype

    def accept(self, output: Output, *, what: str = "") -> None:
        """Assert that an output is as exact as its dtype allows, and that its state remembers the right tokens."""
        assert output.o.dtype == self.dtype
        expected = parts(self.answer)
        errors = {name: error(x, expected[name]) for name, x in parts(output).items()}
        worse = {name: (e, self.budgets[name]) for name, e in errors.items() if not e <= self.budgets[name]}
        assert not worse, f"{what}: (error, budget) of {worse}"
        assert_same_recent(output.state, self.answer.state)


def judge(args: Arguments, answer: Output | None = None) -> Judge:
    """Judge a call by naive in float64 (or by another float64 answer), on the same, already rounded, inputs."""
    dtype = args["q"].dtype
    if answer is None:
        answer = call(cast(args, torch.float64, args["q"].device.type), "naive")
    expected = parts(answer)
    errors = dict.fromkeys(expected, 0.0)
    if dtype != torch.float64:
        naive = parts(call(args, "naive"))
        # naive keeps its slots in fp32, but meets them in the dtype of q: that is as exact as they have to be.
        naive |= {name: naive[name].to(dtype) for name in ("slot_k", "slot_v")}
        errors = {name: error(x, expected[name]) for name, x in naive.items()}
    return Judge(answer, {name: budget(e, dtype) for name, e in errors.items()}, dtype)


def recent(state: NHAState) -> list[dict[int, dict[str, Tensor]]]:
    """For each sequence, what the state remembers of each token position; the place in the ring does not matter."""
    positions = state.recent_positions().tolist()
    rings = {name: x for name, x in state.tensors().items() if name in ("k", "v", "g", "s", "k_window")}
    return [
        {
            position: {name: x[n, place] for name, x in rings.items()}
            for place, position in enumerate(row)
            if position >= 0
        }
        for n, row in enumerate(positions)
    ]


def assert_same_recent(state: NHAState, expected: NHAState) -> None:
    """The same tokens at the same positions, copied bit for bit, and the same counts."""
    assert torch.equal(state.seen, expected.seen)
    assert (state.window_size, state.slot_delay) == (expected.window_size, expected.slot_delay)
    for here, there in zip(recent(state), recent(expected), strict=True):
        assert here.keys() == there.keys()
        for position, token in here.items():
            assert token.keys() == there[position].keys()
            for name, x in token.items():
                assert torch.equal(x, there[position][name].to(x.dtype)), f"{name} of position {position}"


# ---- Gradients ----


def leaves(args: Arguments) -> tuple[Arguments, dict[str, Tensor]]:
    """The call with every differentiable input made a leaf, and these leaves by name (slots of the state included)."""
    args = clone(args)
    found: dict[str, Tensor] = {}
    for name in TOKEN_ARGUMENTS:
        if args.get(name) is not None:
            found[name] = args[name] = args[name].detach().clone().requires_grad_()
    if args.get("initial_state") is not None:
        state = args["initial_state"].detach()
        found |= {name: getattr(state, name).clone().requires_grad_() for name in ("slot_k", "slot_v")}
        args["initial_state"] = replace(state, slot_k=found["slot_k"], slot_v=found["slot_v"])
    return args, found


def gradients(args: Arguments, run: Callable[[Arguments], tuple[Tensor, ...]], seed: int = 7) -> dict[str, Tensor]:
    """The gradients of a random linear function of run(args)'s tensors, the same one for every dtype and backend.

    The weights are made in float64 and rounded to bf16, which every dtype holds exactly.
    """
    args, found = leaves(args)
    random = torch.Generator().manual_seed(seed)
    loss = args["q"].new_zeros((), dtype=torch.float64)
    for x in run(args):
        weight = torch.randn(x.shape, generator=random).to(torch.bfloat16).to(x.device, torch.float64)
        # A row with nothing to attend to has lse = -inf, a constant.
        loss = loss + (torch.where(x.isneginf(), torch.zeros_like(x), x).double() * weight).sum()
    grads = torch.autograd.grad(loss, list(found.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(found, grads, strict=True))


def everything(backend: str, *, lse: bool = True) -> Callable[[Arguments], tuple[Tensor, ...]]:
    """A run for `gradients`: o, the final slots, and the log-sum-exp where a backend has a gradient for it."""

    def run(args: Arguments) -> tuple[Tensor, ...]:
        if lse:
            o, state, row_lse = call(args, backend)
            return o, state.slot_k, state.slot_v, row_lse
        o, state = native_hybrid_attention(**args, output_final_state=True, backend=backend)
        return o, state.slot_k, state.slot_v

    return run


def has_lse_gradient(backend: str) -> bool:
    dtype = precise(backend, needs_grad=True)
    return IMPLEMENTATIONS[backend].why_not(describe(dtype=dtype, needs_grad=True, return_lse=True)) is None


def assert_gradients(
    got: dict[str, Tensor], reference: dict[str, Tensor], naive: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Each gradient within the budget that naive's own gradient in the same dtype sets."""
    assert got.keys() == reference.keys()
    worse = {}
    for name, x in got.items():
        allowed = budget(error(naive[name], reference[name]) if dtype != torch.float64 else 0.0, dtype)
        made = error(x, reference[name])
        if not made <= allowed:
            worse[name] = (made, allowed)
    assert not worse, f"(error, budget) of {worse}"


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same arithmetic on the same numbers: equal, but for the order in which a GPU adds up contributions."""
    assert got.keys() == expected.keys()
    differing = {name: error(x, expected[name]) for name, x in got.items()}
    assert not {name: e for name, e in differing.items() if not e <= budget(0.0, got[name].dtype)}, differing
