"""What lies in memory beside the numbers must not matter: strides, neighbours, what a buffer held before; nor size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .helpers import (
    TOKEN_ARGUMENTS,
    Arguments,
    Case,
    Output,
    assert_same_gradients,
    assert_same_recent,
    backends,
    backends_and,
    call,
    clone,
    decode,
    dtypes,
    everything,
    gradients,
    has_lse_gradient,
    judge,
    leaves,
    make,
    precise,
    skip_unserved,
    slow,
    zero_state,
)

# Everything optional at once, packed and with a state.
FULL = Case(tokens=24, lengths=(3, 0, 21), past=(4, 2, 30), window=6, delay=9, strength=True, given=True)


def inputs(backend: str, case: Case = FULL) -> Arguments:
    if slow(backend):
        case = replace(case, kv_heads=1)
    args = make(case, precise(backend))
    skip_unserved(backend, args)
    return args


def assert_same_bits(got: Output, expected: Output) -> None:
    assert torch.equal(got.o, expected.o)
    assert torch.equal(got.lse, expected.lse)
    assert torch.equal(got.state.slot_k, expected.state.slot_k)
    assert torch.equal(got.state.slot_v, expected.state.slot_v)
    assert_same_recent(got.state, expected.state)


# ---- Strides ----


def transposed(x: Tensor) -> Tensor:
    """As from [B, H, T, D], the other common layout."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def last_strided(x: Tensor) -> Tensor:
    """Every second number of a last axis with NaN between."""
    wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def inside_nan(x: Tensor) -> Tensor:
    """A window on a larger tensor that is NaN all around, as a slice of a fused projection is."""
    larger = torch.full([n + 4 for n in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    middle = larger[tuple(slice(2, n + 2) for n in x.shape)]
    return middle.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed,
    "last axis strided": last_strided,
    "inside NaN": inside_nan,
}


def laid_out(args: Arguments, layout: Callable[[Tensor], Tensor]) -> Arguments:
    changed = {name: layout(args[name]) if args.get(name) is not None else None for name in TOKEN_ARGUMENTS}
    if args.get("rope") is not None:
        changed["rope"] = tuple(layout(table[None, :, None])[0, :, 0] for table in args["rope"])
    if args.get("initial_state") is not None:
        state = args["initial_state"]
        rings = {name: layout(x) for name, x in state.tensors().items() if name != "seen"}
        changed["initial_state"] = replace(state, **rings)
    return {**args, **changed}


@pytest.mark.parametrize(("backend", "layout"), backends_and(LAYOUTS, few=["inside NaN"]))
def test_strides_do_not_matter(backend: str, layout: str) -> None:
    args = inputs(backend)
    changed = laid_out(args, LAYOUTS[layout])
    assert not changed["q"].is_contiguous()
    judge(args).accept(call(changed, backend))


@pytest.mark.parametrize(("backend", "layout"), backends_and(LAYOUTS, few=["inside NaN"]))
def test_strides_do_not_matter_to_rope(backend: str, layout: str) -> None:
    args = inputs(backend, Case(tokens=20, batch=2, rope=True))
    judge(args).accept(call(laid_out(args, LAYOUTS[layout]), backend))


@pytest.mark.parametrize(("backend", "name"), backends_and(TOKEN_ARGUMENTS, few=["k"]))
def test_an_expanded_input_counts_as_its_copies(backend: str, name: str) -> None:
    """One sequence's numbers for the whole batch, without a copy: stride 0."""
    args = inputs(backend, Case(tokens=12, batch=2, strength=True, given=True))
    args[name] = args[name][:1].expand_as(args[name])
    assert args[name].stride(0) == 0
    judge({**args, name: args[name].contiguous()}).accept(call(args, backend))


@pytest.mark.parametrize(("backend", "layout"), backends_and(LAYOUTS, few=["inside NaN"], needs_grad=True))
def test_strides_do_not_matter_to_gradients(backend: str, layout: str) -> None:
    args = make(FULL, dtypes(backend, needs_grad=True)[0])
    skip_unserved(backend, leaves(args)[0])
    lse = has_lse_gradient(backend)
    expected = gradients(args, everything(backend, lse=lse))

    def strided(args: Arguments) -> tuple[Tensor, ...]:
        # From the leaves through the layout, as it happens in a model.
        return everything(backend, lse=lse)(laid_out_from(args, LAYOUTS[layout]))

    assert_same_gradients(gradients(args, strided), expected)


def laid_out_from(args: Arguments, layout: Callable[[Tensor], Tensor]) -> Arguments:
    """laid_out for leaves that want a gradient: a layout that copies into a buffer is made differentiable."""

    def through(x: Tensor) -> Tensor:
        return _Strided.apply(x, layout)

    return laid_out(args, through)


class _Strided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
        return layout(x.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@pytest.mark.parametrize("kind", ["transposed", "last axis strided", "expanded"])
@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_strides_of_an_incoming_gradient_do_not_matter(backend: str, kind: str) -> None:
    """Autograd hands over what it has: a sum's gradient is one number, expanded."""
    args, found = leaves(make(Case(tokens=20), dtypes(backend, needs_grad=True)[0]))
    o = everything(backend, lse=False)(args)[0]
    if kind == "expanded":
        grad = torch.ones((), dtype=o.dtype, device=o.device).expand_as(o)
    else:
        grad = LAYOUTS[kind](torch.randn_like(o))
    got = torch.autograd.grad(o, list(found.values()), grad, retain_graph=True)
    expected = torch.autograd.grad(o, list(found.values()), grad.contiguous())
    assert_same_gradients(dict(zip(found, got, strict=True)), dict(zip(found, expected, strict=True)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_to_decoding(layout: str) -> None:
    args = make(Case(tokens=6, batch=2, past=(4, 30), strength=True, given=True))
    judge(args).accept(decode(laid_out(args, LAYOUTS[layout])))


# ---- What a buffer held before ----

ALLOCATIONS = ("empty", "empty_like", "empty_strided")
METHODS = ("new_empty", "new_empty_strided")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated without being filled is full of NaN, and of nonsense where it holds integers."""

    def poison(x: Tensor) -> Tensor:
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x.fill_(True if x.dtype == torch.bool else 119)

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        for name in ALLOCATIONS:
            patch.setattr(torch, name, filled(getattr(torch, name)))
        for name in METHODS:
            patch.setattr(Tensor, name, filled(getattr(Tensor, name)))
        yield


def test_poison_works() -> None:
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(3).new_empty(2).isnan().all()
        assert torch.empty(3, dtype=torch.int32).tolist() == [119] * 3
    assert torch.zeros(3).new_zeros(2).tolist() == [0, 0]


POISONED = {
    "everything": FULL,
    "length no block divides": Case(tokens=37, batch=2),
    "one token": Case(tokens=1, past=(9,)),
    "no window, masked": Case(tokens=20, window=0, delay=5, mask=True),
    "a sequence without tokens": Case(tokens=20, lengths=(0, 20, 0)),
    "a sequence without tokens, state": Case(tokens=20, lengths=(0, 20, 0), past=(3, 0, 40), delay=12),
}


@pytest.mark.parametrize(("backend", "name"), backends_and(POISONED, few=["everything", "no window, masked"]))
def test_no_buffer_is_read_before_it_is_written(backend: str, name: str) -> None:
    args = inputs(backend, POISONED[name])
    expected = call(args, backend)
    with poisoned():
        got = call(args, backend)
    assert_same_bits(got, expected)


@pytest.mark.parametrize(("backend", "name"), backends_and(POISONED, few=["everything"], needs_grad=True))
def test_no_buffer_of_a_backward_pass_is_read_before_it_is_written(backend: str, name: str) -> None:
    args = make(POISONED[name], dtypes(backend, needs_grad=True)[0])
    skip_unserved(backend, leaves(args)[0])
    lse = has_lse_gradient(backend)
    expected = gradients(args, everything(backend, lse=lse))
    with poisoned():
        got = gradients(args, everything(backend, lse=lse))
    assert_same_gradients(got, expected)


@pytest.mark.parametrize("backend", backends())
def test_empty_places_of_a_ring_are_never_read(backend: str) -> None:
    """A ring with room for tokens that nobody has seen yet holds anything there."""
    args = inputs(backend, replace(FULL, window=12, delay=20))
    args["initial_state"] = args["initial_state"].with_full_capacity()
    expected = call(args, backend)
    dirty = clone(args)
    empty = dirty["initial_state"].recent_positions() < 0
    assert empty.any()
    for name, x in dirty["initial_state"].tensors().items():
        if name not in ("slot_k", "slot_v", "seen"):
            x[empty] = torch.nan
    assert_same_bits(call(dirty, backend), expected)


def test_decoding_never_reads_empty_places_of_a_ring() -> None:
    args = make(Case(tokens=30, batch=2, past=(1, 9), window=12, delay=20, strength=True, given=True))
    args["initial_state"] = args["initial_state"].with_full_capacity()
    dirty = clone(args)
    empty = dirty["initial_state"].recent_positions() < 0
    for name, x in dirty["initial_state"].tensors().items():
        if name not in ("slot_k", "slot_v", "seen"):
            x[empty] = torch.nan
    assert_same_bits(decode(dirty), decode(args))


# ---- Neighbours ----


def spoiled(args: Arguments, tokens: slice, rows: slice = slice(None)) -> Arguments:
    """The same call with NaN and infinities in everything but the gates (which may not be NaN) of some tokens."""
    args = clone(args)
    for name in ("q", "k", "v", "s", "q_window", "k_window"):
        if args.get(name) is not None:
            args[name][rows, tokens] = torch.nan
    args["v"][rows, tokens] = torch.inf
    args["g"][rows, tokens] = -torch.inf
    return args


@pytest.mark.parametrize(("backend", "place"), backends_and(("first", "second", "third"), few=["second"]))
def test_nan_stays_in_its_packed_sequence(backend: str, place: str) -> None:
    broken = ("first", "second", "third").index(place)
    lengths = (17, 9, 21)
    args = inputs(backend, Case(tokens=47, lengths=lengths, window=6, strength=True, given=True))
    expected = call(args, backend)
    low = sum(lengths[:broken])
    there = slice(low, low + lengths[broken])
    got = call(spoiled(args, there), backend)
    assert not got.o[:, there].isfinite().any()
    others = [n for n in range(3) if n != broken]
    for n in others:
        here = slice(sum(lengths[:n]), sum(lengths[: n + 1]))
        assert torch.equal(got.o[:, here], expected.o[:, here]), n
        assert torch.equal(got.lse[:, here], expected.lse[:, here]), n
    assert torch.equal(got.state.slot_k[others], expected.state.slot_k[others])
    assert torch.equal(got.state.slot_v[others], expected.state.slot_v[others])


@pytest.mark.parametrize("backend", backends())
def test_nan_stays_in_its_row_of_a_batch(backend: str) -> None:
    args = inputs(backend, Case(tokens=20, batch=3, window=6, kv_heads=1))
    expected = call(args, backend)
    got = call(spoiled(args, slice(None), slice(1, 2)), backend)
    for row in (0, 2):
        assert torch.equal(got.o[row], expected.o[row])
        assert torch.equal(got.lse[row], expected.lse[row])
        assert torch.equal(got.state.slot_k[row], expected.state.slot_k[row])


@pytest.mark.parametrize("backend", backends())
def test_nan_in_the_state_of_a_sequence_stays_there(backend: str) -> None:
    args = inputs(backend, Case(tokens=30, lengths=(12, 18), past=(20, 7)))
    expected = call(args, backend)
    dirty = clone(args)
    for name, x in dirty["initial_state"].tensors().items():
        if name not in ("seen", "g"):
            x[0] = torch.nan
    got = call(dirty, backend)
    assert torch.equal(got.o[:, 12:], expected.o[:, 12:])
    assert torch.equal(got.state.slot_k[1], expected.state.slot_k[1])


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_nan_of_a_sequence_stays_out_of_the_others_gradients(backend: str) -> None:
    args = make(Case(tokens=40, lengths=(17, 23), window=6), dtypes(backend, needs_grad=True)[0])
    expected = gradients(args, everything(backend, lse=False))
    got = gradients(spoiled(args, slice(0, 17)), everything(backend, lse=False))
    assert_same_gradients(*({name: grads[name][:, 17:] for name in "qkvg"} for grads in (got, expected)))


@pytest.mark.parametrize("backend", backends())
def test_nan_is_not_hidden(backend: str) -> None:
    """A NaN in a key reaches the rows that see it: in the window first, then through the slots."""
    args = inputs(backend, Case(tokens=20, window=4, kv_heads=1))
    args["k"][:, 8] = torch.nan
    o, _, lse = call(args, backend)
    assert not o[:, 8:].isfinite().any()
    assert not lse[:, 8:].isfinite().any()


# ---- Inputs belong to the caller ----


@pytest.mark.parametrize("backend", backends())
def test_inputs_are_not_modified(backend: str) -> None:
    args = inputs(backend)
    before = clone(args)
    call(args, backend)
    for name in (*TOKEN_ARGUMENTS, "cu_seqlens"):
        if args.get(name) is not None:
            assert torch.equal(args[name], before[name]), name
    for name, x in args["initial_state"].tensors().items():
        assert torch.equal(x, before["initial_state"].tensors()[name]), name


@pytest.mark.parametrize("backend", backends(needs_grad=True))
def test_inputs_and_incoming_gradients_are_not_modified_by_a_backward_pass(backend: str) -> None:
    args, found = leaves(make(FULL, dtypes(backend, needs_grad=True)[0]))
    skip_unserved(backend, args)
    before = {name: x.detach().clone() for name, x in found.items()}
    outputs = everything(backend, lse=False)(args)
    arriving = [torch.randn_like(x) for x in outputs]
    arriving_before = [x.clone() for x in arriving]
    torch.autograd.grad(outputs, list(found.values()), arriving)
    for name, x in found.items():
        assert torch.equal(x, before[name]), name
    for x, y in zip(arriving, arriving_before, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("past", [None, (4, 2, 30)], ids=["no state", "state"])
def test_the_final_state_shares_no_memory_with_the_inputs(backend: str, past: tuple[int, ...] | None) -> None:
    """Decoding works in place on it, and must not reach back into the inputs or into the state before."""
    args = inputs(backend, replace(FULL, past=past))
    given = {x.untyped_storage().data_ptr() for x in args.values() if isinstance(x, Tensor)}
    if past is not None:
        given |= {x.untyped_storage().data_ptr() for x in args["initial_state"].tensors().values()}
    state = call(args, backend).state
    for name, x in state.tensors().items():
        assert x.untyped_storage().data_ptr() not in given, name


# ---- Size ----

LONG = """
import json, re, sys, time
import torch
from nha_kernels import native_hybrid_attention

tokens = int(sys.argv[1])
backward = sys.argv[2] == "backward"
torch.set_num_threads(1)

def inputs(tokens):
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, tokens, 2, 16, generator=random)
    k, v = (torch.randn(1, tokens, 1, 16, generator=random) for _ in range(2))
    g = -torch.rand(1, tokens, 1, 8, generator=random)
    return [x.requires_grad_(backward) for x in (q, k, v, g)]

def run(tensors):
    o, _ = native_hybrid_attention(*tensors, 16, backend="chunked")
    if backward:
        o.sum().backward()

def peak():
    # Of this program: what resource.getrusage tells also counts the process that started it.
    with open("/proc/self/status") as file:
        status = file.read()
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])

run(inputs(256))
tensors, before, seconds = inputs(tokens), peak(), []
for _ in range(5):
    start = time.process_time()  # the wall clock also counts what else the machine does
    run(tensors)
    seconds.append(time.process_time() - start)
print(json.dumps({"bytes": peak() - before, "seconds": min(seconds)}))
"""


def measure(tokens: int, which: str) -> dict[str, float]:
    """Peak memory above what was there before, and the processor time of the fastest run, in a process of its own."""
    command = [sys.executable, "-c", LONG, str(tokens), which]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_long_sequence_takes_linear_time_and_memory(which: str) -> None:
    short, long = measure(16384, which), measure(65536, which)
    # A T x T matrix of fp32 would be 17 GB; the inputs are 15 MB.
    assert long["bytes"] < 65536 * 65536 * 4 / 16
    # Four times the tokens, and a quarter for what an allocator keeps.
    assert long["bytes"] < 4 * short["bytes"] * 1.25
    # Quadratic time would be 16 times.
    assert long["seconds"] < 6 * short["seconds"]


@pytest.mark.parametrize("backend", backends())
def test_the_state_does_not_grow(backend: str) -> None:
    """What a next segment needs is bounded by window and delay, not by what came before; nor is it a view of that."""
    args = inputs(backend, Case(tokens=60, window=5, delay=9))
    state, zeros = call(args, backend).state, zero_state(args)
    assert state.capacity == 9
    for name, x in state.tensors().items():
        assert x.untyped_storage().nbytes() <= zeros.tensors()[name].untyped_storage().nbytes(), name
