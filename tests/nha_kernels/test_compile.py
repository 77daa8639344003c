"""torch.compile: one graph without a break, one compilation for every T, and the eager results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from nha_kernels import UnsupportedCall, explain, library, native_hybrid_attention, nha_decode_step

from .helpers import (
    DEVICE,
    ON_GPU,
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
    everything,
    gradients,
    has_lse_gradient,
    in_pieces,
    inputs_of,
    leaves,
    make,
    parts,
    precise,
    skip_unserved,
    slow,
)

# No two sizes alike but those that must be: torch.compile takes sizes that are equal at first for the same size.
CASES = {
    "plain": Case(tokens=30, window=9, kv_heads=3),
    "packed": Case(tokens=30, window=9, lengths=(3, 0, 27), kv_heads=5),
    "state": Case(tokens=30, window=9, batch=3, past=(1, 9, 20), kv_heads=5),
    "rope": Case(tokens=30, window=9, kv_heads=3, rope=True),
    "everything": Case(
        tokens=30, window=6, delay=11, lengths=(3, 0, 4, 23), past=(4, 2, 30, 0), kv_heads=3, strength=True,
        given=True, mask=True, scale=0.3,
    ),
}  # fmt: skip
FEW = ["packed"]
TENSORS = (*TOKEN_ARGUMENTS, "rope", "cu_seqlens", "initial_state")


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def inputs(backend: str, case: Case) -> Arguments:
    dtype = precise(backend)
    args = make(replace(case, kv_heads=1) if slow(backend) else case, dtype)
    skip_unserved(backend, args)
    return args


def longer(case: Case, tokens: int) -> Case:
    """The same kind of call with more tokens, all of them in the last sequence."""
    if case.lengths is None:
        return replace(case, tokens=tokens)
    return replace(case, tokens=tokens, lengths=(*case.lengths[:-1], case.lengths[-1] + tokens - case.tokens))


def compiled(run: Callable[..., Any], args: Arguments) -> Callable[[Arguments], Any]:
    """`run` as a model has it, compiled once: tensors come from outside, numbers are constants."""
    constants = {name: x for name, x in args.items() if name not in TENSORS}

    def of_tensors(tensors: Arguments) -> Any:
        return run({**constants, **tensors})

    graph = torch.compile(of_tensors, fullgraph=True, dynamic=True, backend="aot_eager")

    def go(args: Arguments) -> Any:
        return graph({name: args[name] for name in TENSORS if args.get(name) is not None})

    return go


def assert_same(got: Output, expected: Output) -> None:
    for name, x in parts(got).items():
        assert torch.equal(x, parts(expected)[name]), name
    assert_same_recent(got.state, expected.state)


# ---- The operator ----


def of_operator(args: Arguments, backend: str, *, everything: bool = True) -> library.Arguments:
    asked = dict(output_final_state=everything, return_lse=everything)
    return library.Arguments.of(explain(**args, **asked).problem, inputs_of(args), backend)


@pytest.mark.parametrize(("backend", "name"), backends_and(CASES, few=["plain"]))
def test_the_operator_keeps_the_rules(backend: str, name: str) -> None:
    """opcheck: nothing is changed in place, nothing aliased, and shapes are as declared, whatever the tracer."""
    args = inputs(backend, CASES[name])
    forward = torch.ops.nha_kernels.forward.default
    torch.library.opcheck(forward, of_operator(args, backend))
    torch.library.opcheck(forward, of_operator(args, backend, everything=False))


# opcheck of torch 2.14 looks at the gradients of its own copies.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(("backend", "name"), backends_and(CASES, few=["plain"], needs_grad=True))
def test_the_operator_keeps_the_rules_with_gradients(backend: str, name: str) -> None:
    args = make(CASES[name], precise(backend, needs_grad=True))
    args, _ = leaves(args)
    skip_unserved(backend, args)
    forward = torch.ops.nha_kernels.forward.default
    torch.library.opcheck(forward, of_operator(args, backend, everything=has_lse_gradient(backend)))


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
def test_slots_of_one_number_are_apart() -> None:
    """Where the slots are so few that views of them would be contiguous."""
    case = Case(tokens=4, window=1, kv_heads=1, group=1, head_dim=1, slots=1, past=(3,))
    args, _ = leaves(make(case))
    torch.library.opcheck(torch.ops.nha_kernels.forward.default, of_operator(args, "chunked"))


# ---- Compiled calls ----


@pytest.mark.parametrize(("backend", "name"), backends_and(CASES, few=FEW, without=["naive"]))
def test_one_graph_for_every_length(backend: str, name: str) -> None:
    args = inputs(backend, CASES[name])
    go = compiled(partial(call, backend=backend), args)
    assert_same(go(args), call(args, backend))
    for tokens in (37, 64) if slow(backend) else (31, 64, 200):
        args = inputs(backend, longer(CASES[name], tokens))
        with torch.compiler.set_stance("fail_on_recompile"):
            got = go(args)
        assert_same(got, call(args, backend))


@pytest.mark.parametrize(("backend", "name"), backends_and(CASES, few=FEW, without=["naive"], needs_grad=True))
def test_gradients_are_the_eager_ones(backend: str, name: str) -> None:
    lse = has_lse_gradient(backend)
    run = everything(backend, lse=lse)
    go = None
    for tokens in (30, 31) if slow(backend) else (30, 31, 100):
        args = make(longer(CASES[name], tokens), precise(backend, needs_grad=True))
        skip_unserved(backend, leaves(args)[0])
        go = go or compiled(run, args)
        with torch.compiler.set_stance("default" if tokens == 30 else "fail_on_recompile"):
            got = gradients(args, go)
        assert_same_gradients(got, gradients(args, run))


@pytest.mark.parametrize("backend", backends())
def test_a_state_is_carried_from_call_to_call(backend: str) -> None:
    args = inputs(backend, Case(tokens=60, window=5, delay=7, kv_heads=3))
    cuts = [9, 40]
    go = compiled(partial(call, backend=backend), args)
    assert_same(in_pieces(args, cuts, go), in_pieces(args, cuts, partial(call, backend=backend)))


def test_autocast_changes_nothing() -> None:
    args = make(CASES["plain"], torch.float32)
    go = compiled(partial(call, backend="auto"), args)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = go(args)
    assert_same(got, call(args, "auto"))


def test_without_a_gradient_none_is_promised() -> None:
    """The graph of a call under no_grad may take an implementation that has no gradient."""
    args, _ = leaves(make(CASES["plain"], torch.float32))
    go = compiled(partial(call, backend="auto"), args)
    with torch.no_grad():
        got = go(args)
        assert_same(got, call(args, "auto"))
    assert not got.o.requires_grad


def test_an_unsupported_call_says_why() -> None:
    args = make(CASES["plain"], torch.float64)
    with pytest.raises(UnsupportedCall, match=r"^backend='flash' cannot serve this call: "):
        compiled(partial(call, backend="flash"), args)(args)


def test_a_bad_argument_is_named() -> None:
    args = make(CASES["plain"])
    args["k"] = args["k"][:, 1:]
    with pytest.raises(Exception, match=r"\bk\b.{,40}: expected .*\[B, T, H, D\] with B, T and D of q"):
        compiled(partial(call, backend="auto"), args)(args)


def test_a_second_derivative_is_refused() -> None:
    args, found = leaves(make(CASES["plain"]))
    # Without AOTAutograd, which refuses in words of its own.
    run = torch.compile(partial(native_hybrid_attention, **args), fullgraph=True, backend="eager")
    o, _ = run()
    with pytest.raises(RuntimeError, match=r"differentiable once.*create_graph"):
        torch.autograd.grad(o.square().sum(), [found["q"]], create_graph=True)


# ---- Decoding ----


def test_decoding_compiles_once() -> None:
    """The state, updated in place, is an argument like any other; more sequences are served by the same graph."""
    step = torch.compile(nha_decode_step, fullgraph=True, dynamic=True, backend="aot_eager")
    case = Case(tokens=12, window=4, delay=6, kv_heads=3, rope=True, mask=True)
    for sequences in (5, 7):
        args = make(replace(case, batch=sequences), torch.float32)
        with torch.compiler.set_stance("default" if sequences == 5 else "fail_on_recompile"):
            got = decode(args, step)
        assert_same(got, decode(args))


# ---- CUDA graphs ----


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("name", ["plain", "state", "rope", "packed"])
@pytest.mark.parametrize("backend", backends(without=["naive"]))
def test_a_captured_call_can_be_replayed(backend: str, name: str) -> None:
    if name == "packed" and backend != "triton":
        pytest.skip(f"{backend} reads cu_seqlens on the host")
    args = inputs(backend, CASES[name])
    buffers = clone(args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(buffers, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(buffers, backend)
    other = make(replace(CASES[name], seed=1), args["q"].dtype)
    for tensor in TOKEN_ARGUMENTS:
        if args.get(tensor) is not None:
            buffers[tensor].copy_(other[tensor])
    graph.replay()
    assert_same(got, call(buffers, backend))
