"""flash without a flash-attention kernel: packing, merging and gradients, around a window kernel in plain float64.

The kernel is the only part of `flash` that needs a GPU. Here a reference stands in its place, under the same contract:
queries aligned with the last keys of their sequence, a backward that takes whatever output and lse it is given.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import NHAState, flash, flash_window, native_hybrid_attention
from nha_kernels.checks import check_call
from nha_kernels.flash_window import Packing
from nha_kernels.problem import Inputs
from nha_kernels.state import advance

HEADS, GROUP, DIM, SLOTS = 2, 3, 4, 5


class ReferenceKernel:
    name = "reference"

    def _logits(self, q: Tensor, k: Tensor, packing: Packing, n: int) -> tuple[Tensor, slice, slice]:
        rows = slice(int(packing.cu_q[n]), int(packing.cu_q[n + 1]))
        keys = slice(int(packing.cu_k[n]), int(packing.cu_k[n + 1]))
        assert rows.stop - rows.start <= packing.max_q
        assert keys.stop - keys.start <= packing.max_k
        group = q.shape[1] // k.shape[1]
        logits = torch.einsum("ihd,jhd->hij", q[rows], k[keys].repeat_interleave(group, 1)) * packing.scale
        row = torch.arange(rows.stop - rows.start)[:, None] + (keys.stop - keys.start) - (rows.stop - rows.start)
        key = torch.arange(keys.stop - keys.start)[None, :]
        return logits.masked_fill((key > row) | (key < row - packing.left), float("-inf")), rows, keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        o, lse = torch.full_like(q, float("nan")), q.new_full((q.shape[1], len(q)), float("nan"))
        for n in range(len(packing.cu_q) - 1):
            logits, rows, keys = self._logits(q, k, packing, n)
            lse[:, rows] = logits.logsumexp(-1)
            values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
            o[rows] = torch.einsum("hij,jhd->ihd", logits.softmax(-1), values)
        return o, lse, ("saved",)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, packing: Packing, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert saved == ("saved",)
        group = q.shape[1] // k.shape[1]
        dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))  # as a kernel leaves what it does not write
        for n in range(len(packing.cu_q) - 1):
            logits, rows, keys = self._logits(q, k, packing, n)
            p = torch.exp(logits - lse[:, rows, None])
            delta = (do[rows] * o[rows]).sum(-1).T[..., None]
            ds = p * (torch.einsum("ihd,jhd->hij", do[rows], v[keys].repeat_interleave(group, 1)) - delta)
            ds = ds * packing.scale
            dq[rows] = torch.einsum("hij,jhd->ihd", ds, k[keys].repeat_interleave(group, 1))
            dk[keys] = torch.einsum("hij,ihd->jhd", ds, q[rows]).unflatten(1, (-1, group)).sum(2)
            dv[keys] = torch.einsum("hij,ihd->jhd", p, do[rows]).unflatten(1, (-1, group)).sum(2)
        return dq, dk, dv


@pytest.fixture(autouse=True)
def reference_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "window_kernel", lambda capability: ReferenceKernel())


def make(tokens: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)

    def normal(heads: int, size: int) -> Tensor:
        return torch.randn(batch, tokens, heads, size, generator=generator, dtype=torch.float64)

    g = torch.nn.functional.logsigmoid(normal(HEADS, SLOTS)) * 2
    return [normal(HEADS * GROUP, DIM), normal(HEADS, DIM), normal(HEADS, DIM), g]


def run_flash(
    tensors: list[Tensor], window: int, state: NHAState | None = None, *, s: Tensor | None = None, rope: Any = None,
    cu_seqlens: Tensor | None = None, slot_delay: int | None = None, mask_empty_slots: bool = False,
) -> tuple[Tensor, NHAState]:  # fmt: skip
    inputs = Inputs(*tensors, s, rope, None, None, DIM**-0.5, cu_seqlens, state)
    problem = check_call(inputs, window, slot_delay, mask_empty_slots, True, False)
    result = flash.run(problem, inputs)
    return result.o, advance(problem, inputs, result)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"tokens": 70},
    "delay": {"slot_delay": 3},
    "late": {"slot_delay": 25, "mask_empty_slots": True},
    "overlap": {"slot_delay": 0},
    "rope": {"rope": True},
    "strength": {"s": True, "slot_delay": 17},
    "packed": {"cu_seqlens": torch.tensor([0, 1, 1, 13, 30], dtype=torch.int32), "mask_empty_slots": True},
    "split": {"cuts": (0, 2, 9, 30)},
    "split late rope": {"cuts": (0, 1, 5, 30), "slot_delay": 12, "rope": True, "s": True},
}


@pytest.mark.parametrize("window", [1, 7, 50])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, window: int) -> None:
    options = dict(CASES[case])
    tokens = options.pop("tokens", 30)
    tensors = [x.requires_grad_() for x in make(tokens, 1 if "cu_seqlens" in options else 2)]
    if options.get("s"):
        options["s"] = torch.rand_like(tensors[3]).requires_grad_()
    if options.get("rope"):
        angle = torch.arange(tokens)[:, None] * torch.tensor([1.0, 0.1], dtype=torch.float64)
        options["rope"] = (angle.cos(), angle.sin())
    cuts = options.pop("cuts", (0, tokens))
    wanted = [*tensors, *([options["s"]] if "s" in options else [])]

    def pieces(function: Any) -> list[Tensor]:
        state, outputs = None, []
        for begin, end in pairwise(cuts):
            own = dict(options)
            if "s" in own:
                own["s"] = own["s"][:, begin:end]
            o, state = function([x[:, begin:end] for x in tensors], window, state, **own)
            outputs.append(o)
        o = torch.cat(outputs, 1)
        weight = torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)
        loss = (o * weight).sum() + state.slot_k.sin().sum() + state.slot_v.cos().sum()
        return [o, state.slot_k, state.slot_v, *torch.autograd.grad(loss, wanted, materialize_grads=True)]

    def naive(x: list[Tensor], w: int, state: NHAState | None, **own: Any) -> tuple[Tensor, NHAState]:
        o, after = native_hybrid_attention(*x, w, initial_state=state, output_final_state=True, backend="naive", **own)
        return o, after

    for got, expected in zip(pieces(run_flash), pieces(naive), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_initial_slots_have_a_gradient() -> None:
    tensors = make(20)
    state = NHAState.zeros(1, HEADS, SLOTS, DIM, 4, dtype=torch.float64)
    slots = torch.randn(1, HEADS, SLOTS, DIM, dtype=torch.float64, requires_grad=True)
    grads = []
    for function in (run_flash, None):
        started = NHAState(**{name: getattr(state, name) for name in NHAState.__slots__} | {"slot_k": slots})
        if function is None:
            o, _ = native_hybrid_attention(*tensors, 4, initial_state=started, backend="naive")
        else:
            o, _ = function(tensors, 4, started)
        grads.append(torch.autograd.grad((o * torch.arange(DIM)).sum(), slots)[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    assert grads[0].abs().max() > 0


def test_torch_kernel_takes_these_arguments() -> None:
    """The private functions of torch still have the signature that the adapter calls: shapes go through on `meta`."""
    kernel = flash_window._TorchFlash()
    q = torch.empty(30, 8, 64, dtype=torch.bfloat16, device="meta")
    k = torch.empty(40, 2, 64, dtype=torch.bfloat16, device="meta")
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    packing = Packing(cu, cu, 12, 16, 7, 0.125)
    o, lse, saved = kernel.forward(q, k, k, packing)
    assert o.shape == q.shape
    assert lse.shape == (8, 30)
    assert lse.dtype == torch.float32
    grads = kernel.backward(o, q, k, k, o, lse, packing, saved)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
