"""chunked's work by segments: wherever they are cut, and whatever happens between forward and backward."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nha_kernels import NHAState, layout, native_hybrid_attention, nha_decode_step

from .helpers import FLOAT64, Case, backends, call, dtypes, error, everything, gradients, make


def small_segments(monkeypatch: pytest.MonkeyPatch, blocks: int, case: Case) -> None:
    """Let a segment hold `blocks` blocks of a case."""
    row = case.kv_heads * case.slots * (layout.CHUNK + 2 * (2 * case.head_dim) // layout.CHUNK)
    row += case.kv_heads * case.group * case.slots
    keys = case.window + layout.ROWS - 1
    row += keys * (case.kv_heads * case.group + case.kv_heads * 2 * case.head_dim // layout.ROWS)
    monkeypatch.setitem(layout.SEGMENT_ELEMENTS, "cpu", blocks * layout.ROWS * row)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=330, batch=2, window=5, head_dim=4, slots=3),
        Case(tokens=330, lengths=(200, 1, 129), past=(4, 0, 9), window=5, head_dim=4, slots=3),
    ],
    ids=["batch", "packed"],
)
def test_sequences_may_span_many_segments(case: Case, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make(case, device="cpu")
    whole, whole_gradients = call(args, "chunked"), gradients(args, everything("chunked"))
    small_segments(monkeypatch, blocks, case)
    cut = call(args, "chunked")
    assert error(cut.o, whole.o) <= FLOAT64
    assert error(cut.state.slot_k, whole.state.slot_k) <= FLOAT64
    for name, x in gradients(args, everything("chunked")).items():
        assert error(x, whole_gradients[name]) <= FLOAT64, name


def test_the_default_segments_hold_a_usual_call() -> None:
    args = make(Case(tokens=1100, group=4, kv_heads=4, head_dim=64, slots=64, window=64), torch.float32, "cpu")
    o, _ = native_hybrid_attention(**args)
    assert o.isfinite().all()


def test_autocast_around_the_backward_changes_nothing() -> None:
    args = make(Case(tokens=80, window=8), torch.float32, "cpu")
    q, k, v, g = (args[name].requires_grad_() for name in "qkvg")
    plain = {name: x for name, x in args.items() if name not in "qkvg"}
    grads = []
    for enabled in (False, True):
        o, _ = native_hybrid_attention(q, k, v, g, backend="chunked", **plain)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(o.square().sum(), (q, k, v, g)))
    for without, within in zip(*grads, strict=True):
        assert torch.equal(without, within)


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_activation_checkpointing_keeps_nothing_between(backend: str) -> None:
    """What only the backward needs must be seen by autograd's hooks, or checkpointing would save no memory."""
    args = make(Case(tokens=80, window=8), dtypes(backend, needs_grad=True)[0])
    kept: list[weakref.ref[torch.Tensor]] = []

    def layer(q: torch.Tensor) -> torch.Tensor:
        k, v = q[:, :, :2] * 2, q[:, :, :2] * 3
        kept.append(weakref.ref(k))
        return native_hybrid_attention(q, k, v, args["g"], args["window_size"], backend=backend)[0]

    q = args["q"].requires_grad_()
    o = checkpoint(layer, q, use_reentrant=False)
    gc.collect()
    assert kept[0]() is None
    o.sum().backward()
    assert q.grad is not None


def test_a_second_derivative_is_refused_and_not_dropped() -> None:
    args = make(Case(tokens=20, window=4), device="cpu")
    q = args["q"].requires_grad_()
    o, _ = native_hybrid_attention(**args, backend="chunked")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(o.sum(), q, create_graph=True)


def test_only_the_gradients_that_are_needed() -> None:
    args = make(Case(tokens=20, window=4, strength=True), device="cpu")
    v = args["v"].requires_grad_()
    got = {}
    for backend in ("naive", "chunked"):
        o, _ = native_hybrid_attention(**args, backend=backend)
        (got[backend],) = torch.autograd.grad(o.square().sum(), v)
    assert error(got["chunked"], got["naive"]) <= FLOAT64


def test_growing_a_state_shares_nothing() -> None:
    state = NHAState.zeros(1, 2, 3, 4, 8)
    short = NHAState(
        **{name: getattr(state, name) for name in NHAState.__slots__}
        | {name: getattr(state, name)[:, :2] for name in ("k", "v", "g")}
    )
    one, other = short.with_full_capacity(), short.with_full_capacity()
    x = torch.ones(1, 1, 2, 4)
    nha_decode_step(x, x, x, -torch.ones(1, 1, 2, 3), one, 8)
    assert one.seen.tolist() == [1]
    assert other.seen.tolist() == short.seen.tolist() == [0]
