"""The fused backward pass: launch settings other than the default, its anchor, what it keeps, and states in between."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import UnsupportedCall, native_hybrid_attention
from nha_kernels.fused import limits
from nha_kernels.problem import Problem

from .helpers import (
    DEVICE,
    ON_GPU,
    Arguments,
    Case,
    Output,
    assert_gradients,
    call,
    cast,
    clone,
    error,
    everything,
    gradients,
    in_pieces,
    leaves,
    make,
    short,
)

reason = limits.why_unavailable(DEVICE)
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

NARROW = torch.bfloat16 if ON_GPU else torch.float32
CASES = {
    # Packed, with a state; tokens wait in the ring, sequences and the ring begin at no multiple of 16; more slots than
    # a block, fewer query heads than whole tiles of them.
    "awkward": Case(
        tokens=29, lengths=(1, 0, 20, 8), past=(3, 0, 20, 9), window=21, delay=13, kv_heads=1, group=3, slots=20,
        strength=True, given=True, mask=True,
    ),
    # Several segments of stored states.
    "long": Case(tokens=90, window=16, kv_heads=1, group=3, value_dim=2 * Case().head_dim, slots=20),
}  # fmt: skip
# Of all kernels at once, each kernel's every setting in one of them: a call takes seconds to interpret.
SETTINGS: dict[str, dict[str, dict[str, int]]] = {
    "small tiles": {
        "states": {"segment": 64, "block": 16},
        "rows": {"heads": 1, "keys": 16},
        "slots": {"heads": 1, "columns": 16},
        "window": {"heads": 1, "keys": 16},
    },
    "large tiles": {
        "states": {"segment": 256},
        "rows": {"heads": 2, "keys": 64},
        "slots": {"heads": 2, "columns": 32},
        "window": {"heads": 2, "keys": 64},
    },
    "small blocks of slots": {
        "rows": {"slots": 16},
        "slots": {"heads": 4, "slots": 16},
        "window": {"heads": 4, "slots": 16},
    },
}


@contextmanager
def launched(settings: dict[str, dict[str, Any]]) -> Iterator[None]:
    """With some launch settings changed, the gradients of calls that are made as any other."""
    from nha_kernels.fused import backward
    from nha_kernels.fused.backward import BackwardConfig

    def changed(problem: Problem, processors: int) -> BackwardConfig:
        config = BackwardConfig.default(problem)
        return replace(config, **{name: replace(getattr(config, name), **x) for name, x in settings.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "choose", changed)
        yield


@cache
def judged(name: str) -> tuple[Arguments, dict[str, Tensor], dict[str, Tensor]]:
    """A case's call, and naive's gradients: in float64 and in the dtype of the call."""
    args = make(CASES[name], NARROW)
    reference = gradients(cast(args, torch.float64), everything("naive"))
    return args, reference, gradients(args, everything("naive"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("name", "case"),
    # A call takes seconds to interpret: there each of the settings meets one of the cases.
    [(name, case) for i, name in enumerate(SETTINGS) for j, case in enumerate(CASES) if ON_GPU or i % len(CASES) == j],
)
def test_settings_do_not_change_the_answer(name: str, case: str) -> None:
    args, reference, naive = judged(case)
    with launched(SETTINGS[name]):
        assert_gradients(gradients(args, everything("triton")), reference, naive, NARROW)


@pytest.mark.parametrize("heads", [0, 3, 4])
def test_heads_that_are_refused(heads: int) -> None:
    from nha_kernels.fused.backward_rows import RowsConfig

    with pytest.raises(ValueError, match=f"heads: expected 1 or 2; got {heads}"):
        RowsConfig(heads=heads, keys=32, slots=64, warps=4, stages=1, anchored=True)


@pytest.mark.parametrize(("size", "value_size", "named"), [(272, 16, "D"), (16, 272, "Dv")])
def test_head_sizes_that_are_refused(size: int, value_size: int, named: str) -> None:
    args, _ = leaves(make(Case(tokens=3, head_dim=size, value_dim=value_size), NARROW))
    with pytest.raises(UnsupportedCall, match=f"the fused backward takes head sizes up to 256, not {named} = 272"):
        native_hybrid_attention(**args, backend="triton")


ANCHORED = {"rows": {"anchored": True}, "slots": {"anchored": True}}


@pytest.mark.parametrize(
    ("gates", "group"),
    [("mild", 2), ("-20", 2), ("-60", 1), ("spikes", 1), ("mixed", 4), ("strong", 4)],
)
def test_the_anchor_loses_no_more_than_its_cut(gates: str, group: int) -> None:
    """The anchored decays, which bf16 uses, in fp32. A token is never forgotten below 2^-13 of what it wrote; so each
    logit, and each gradient of a value, may be off by 2^-13 of what it is made of. A gradient is a product of two such:
    twice that. A gate's gradient, which carries the gate's own decay, does so as it is, not as it is cut: what it may
    lose comes from the steps before and behind, 2^-13 each."""
    case = Case(tokens=50, window=16, kv_heads=1, group=group, gates=gates)
    args = make(case, torch.float32)
    reference = gradients(cast(args, torch.float64), everything("naive"))
    with launched(ANCHORED):
        got = gradients(args, everything("triton"))
    errors = {name: error(x, reference[name]) for name, x in got.items()}
    assert max(errors.values()) <= 2**-12, errors


def test_every_run_gives_the_same_bits() -> None:
    args = make(Case(tokens=29, lengths=(20, 9), past=(9, 3), kv_heads=1, group=3), NARROW)
    first, second = (gradients(args, everything("triton")) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize(
    "options", [{}, {"rope": True}, {"given": True, "strength": True}], ids=["plain", "rope", "all"]
)
def test_nothing_is_kept_but_inputs_and_lse(options: dict[str, Any]) -> None:
    """Not even o: what it is needed for is found anew from weights and values."""
    args, _ = leaves(make(Case(tokens=45, lengths=(20, 25), past=(3, 9), **options), NARROW))
    given = {x.untyped_storage().data_ptr() for x in tensors_of(args)}
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o, _ = native_hybrid_attention(**args, backend="triton")
    assert o.requires_grad
    *copies, lse = (x for place, x in kept.items() if place not in given)
    assert (lse.shape, lse.dtype) == (o.shape[:3], torch.float32)
    assert lse.untyped_storage().nbytes() == lse.numel() * 4
    # The state, which may move on.
    assert [x.shape for x in copies] == [x.shape for x in args["initial_state"].tensors().values()]


@pytest.mark.usefixtures("interpreted")  # the emulator holds on to what it was given
def test_what_a_pass_no_longer_needs_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots' states, the weights on them and the terms are the largest buffers, and not for the last pass."""
    from nha_kernels.fused import backward

    slots_launches, window_launch = backward.slots_launches, backward.window_launch
    large: list[weakref.ref[Tensor]] = []

    def noting(problem: Any, inputs: Any, operands: Any, stored: Any, states: Any, rows: Any, *rest: Any) -> Any:
        large.extend(map(weakref.ref, (stored.states, rows.weights, rows.logits, rows.terms)))
        return slots_launches(problem, inputs, operands, stored, states, rows, *rest)

    def checking(*arguments: Any) -> Any:
        assert [x() for x in large] == [None] * 4
        return window_launch(*arguments)

    monkeypatch.setattr(backward, "slots_launches", noting)
    monkeypatch.setattr(backward, "window_launch", checking)
    gradients(make(Case(tokens=20, window=4, kv_heads=1, group=1), NARROW), everything("triton"))
    assert large


def tensors_of(args: Arguments) -> list[Tensor]:
    found = [x for x in args.values() if isinstance(x, Tensor)]
    found += args.get("rope") or ()
    state = args.get("initial_state")
    return found if state is None else [*found, *state.tensors().values()]


PIECES = {
    "longer delay than pieces": (Case(tokens=30, window=5, delay=21), (7, 18)),
    "rope": (Case(tokens=30, window=21, delay=13, rope=True, batch=2), (19,)),
    "packed, state, given, strength": (
        Case(tokens=31, lengths=(16, 1, 14), past=(3, 0, 20), window=9, delay=12, strength=True, given=True), (11,),
    ),
    "packed, state, rope": (Case(tokens=31, lengths=(16, 1, 14), past=(3, 0, 20), window=9, rope=True), (11,)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", sorted({torch.float32, NARROW}, key=str), ids=short)
@pytest.mark.parametrize("name", PIECES)
def test_pieces_have_the_gradients_of_the_whole(name: str, dtype: torch.dtype) -> None:
    """What the first leaves to the second passes its gradient back: slots, and k, v, g, s, k_window of tokens that the
    window still sees or that still wait to enter the slots."""
    case, cuts = PIECES[name]
    args = make(replace(case, kv_heads=1), dtype)

    def cut(backend: str, args: Arguments) -> tuple[Tensor, ...]:
        return results(in_pieces(args, cuts, partial(call, backend=backend)))

    reference = gradients(cast(args, torch.float64), lambda args: results(call(args, "naive")))
    # A token's gradient comes from both pieces, each rounded to its dtype: so is naive's here.
    naive = gradients(args, partial(cut, "naive"))
    assert_gradients(gradients(args, partial(cut, "triton")), reference, naive, dtype)


def results(output: Output) -> tuple[Tensor, ...]:
    return output.o, output.lse, output.state.slot_k, output.state.slot_v


@pytest.mark.parametrize("dtype", sorted({torch.float32, NARROW}, key=str), ids=short)
@pytest.mark.parametrize("rope", [False, True], ids=["given", "rope"])
def test_of_everything_in_the_state(rope: bool, dtype: torch.dtype) -> None:
    """Rings that hold more than is waiting, that have wrapped, and that have places still empty."""
    case = Case(
        tokens=30, lengths=(14, 1, 0, 15), past=(40, 3, 5, 21), window=12, delay=7, kv_heads=1, strength=True,
        given=not rope, rope=rope,
    )  # fmt: skip
    args = make(case, dtype)
    reference = of_state(cast(args, torch.float64), "naive")
    assert set(reference) == {"slot_k", "slot_v", "k", "v", "g", "s"} | ({"k_window"} if not rope else set())
    assert_gradients(of_state(args, "triton"), reference, of_state(args, "naive"), dtype)


def of_state(args: Arguments, backend: str) -> dict[str, Tensor]:
    """`gradients` for the tensors of the initial state."""
    args = clone(args)
    state = args["initial_state"].detach()
    found = {name: x.requires_grad_() for name, x in state.tensors().items() if name != "seen"}
    args["initial_state"] = replace(state, **found)
    random = torch.Generator().manual_seed(7)
    loss = args["q"].new_zeros((), dtype=torch.float64)
    for x in results(call(args, backend)):
        weight = torch.randn(x.shape, generator=random).to(torch.bfloat16).to(x.device, torch.float64)
        loss = loss + (x.double() * weight).sum()
    grads = torch.autograd.grad(loss, list(found.values()))
    return dict(zip(found, grads, strict=True))
