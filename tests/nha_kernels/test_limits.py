"""What the operator must be in its limits, each a test of the definition's consequences rather than of a formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from .helpers import (
    DEVICE,
    FLOAT64,
    ON_GPU,
    TOKEN_ARGUMENTS,
    Arguments,
    Case,
    Output,
    assert_gradients,
    assert_same_recent,
    backends,
    backends_and,
    call,
    cast,
    clone,
    decode,
    error,
    gradients,
    in_pieces,
    judge,
    make,
    one_block_a_segment,
    one_by_one,
    part,
    precise,
    skip_unserved,
    slow,
)


def inputs(case: Case, backend: str) -> Arguments:
    """A case in the most precise dtype of a backend; skips where the backend cannot serve it."""
    args = make(case, precise(backend))
    skip_unserved(backend, args)
    return args


# ---- W = 0 and W >= T ----


def gated_slot_attention(args: Arguments) -> Output:
    """Gated slot attention (arXiv 2409.07146) in its parallel form: two passes of gated linear attention, one softmax.

    The decay from token j to row t is exp(G_t - G_j), with G the running sum of the log gates.
    """
    q, k, v, g = (args[name].double() for name in "qkvg")
    group = q.shape[2] // k.shape[2]
    total = g.cumsum(1)
    past = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()[None, :, :, None, None]
    decay = (total[:, :, None] - total[:, None]).masked_fill(~past, float("-inf")).exp()  # [B, t, j, H, M]
    weight = decay * (1 - g.exp())[:, None]
    slot_k = torch.einsum("btjhm,bjhd->bthmd", weight, k).repeat_interleave(group, dim=2)
    slot_v = torch.einsum("btjhm,bjhd->bthmd", weight, v).repeat_interleave(group, dim=2)
    logits = torch.einsum("bthd,bthmd->bthm", q, slot_k) * q.shape[-1] ** -0.5
    o = torch.einsum("bthm,bthmd->bthd", logits.softmax(-1), slot_v)
    state = call(cast(args, torch.float64), "naive").state
    state = replace(state, slot_k=slot_k[:, -1, ::group], slot_v=slot_v[:, -1, ::group])
    return Output(o, state, logits.logsumexp(-1))


@pytest.mark.parametrize("backend", backends())
def test_no_window_is_gated_slot_attention(backend: str) -> None:
    args = inputs(Case(tokens=50, window=0), backend)
    judge(args, gated_slot_attention(args)).accept(call(args, backend))


@pytest.mark.parametrize("tokens", [1, 40, 75])
@pytest.mark.parametrize("backend", backends())
def test_window_over_everything_is_causal_softmax_attention(backend: str, tokens: int) -> None:
    """For any delay >= T: with masked slots nothing is left of them."""
    args = inputs(Case(tokens=tokens, window=75, group=2, mask=True), backend)
    wide = cast(args, torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(wide[name].transpose(1, 2) for name in "qkv"), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    answer = call(wide, "naive")
    judge(args, answer._replace(o=expected)).accept(call(args, backend))


# ---- The state carries everything ----

STATE_CASES = {
    "plain": Case(tokens=50),
    "no window": Case(tokens=50, window=0),
    "only itself": Case(tokens=50, window=1),
    "no delay": Case(tokens=50, delay=0),
    "no delay, no window": Case(tokens=50, delay=0, window=0),
    "delay above the window": Case(tokens=50, window=3, delay=13),
    "window above the delay": Case(tokens=50, window=13, delay=3),
    "window over everything": Case(tokens=50, window=64),
    "masked": Case(tokens=50, window=4, delay=20, mask=True),
    "everything": Case(tokens=50, batch=2, past=(3, 30), strength=True, given=True, mask=True, scale=0.3),
    "rope": Case(tokens=50, rope=True, strength=True),
    "packed": Case(tokens=50, lengths=(1, 0, 31, 18), past=(4, 0, 2, 9), rope=True),
}
# Cuts inside the window, at single tokens, and far apart.
CUTS = ((1,), (25,), (1, 2, 3, 20), (7, 14, 21, 28, 35, 42, 49))


@pytest.mark.parametrize(("backend", "name"), backends_and(STATE_CASES, few=["everything", "packed"]))
def test_one_call_is_any_split(backend: str, name: str) -> None:
    args = inputs(STATE_CASES[name], backend)
    judged = judge(args)
    for cuts in CUTS:
        judged.accept(in_pieces(args, cuts, lambda piece: call(piece, backend)), what=f"cut at {cuts}")


@pytest.mark.parametrize("name", [name for name, case in STATE_CASES.items() if case.lengths is None])
def test_one_call_is_token_by_token_decoding(name: str) -> None:
    args = make(STATE_CASES[name])
    judge(args).accept(decode(args))


@pytest.mark.parametrize("backend", backends())
def test_decoding_goes_on_from_any_call(backend: str) -> None:
    args = inputs(Case(tokens=40, batch=2, past=(0, 5), window=5, delay=9, rope=True), backend)
    first = call(part(args, [(0, 30)]), backend)
    rest = decode(dict(part(args, [(30, 40)]), initial_state=first.state))
    o = torch.cat((first.o, rest.o), dim=1)
    judge(args).accept(Output(o, rest.state, torch.cat((first.lse, rest.lse), dim=1)))


@pytest.mark.parametrize("name", STATE_CASES)
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_gradients_of_one_call_are_those_of_any_split(backend: str, name: str) -> None:
    """Through o, lse and the final slots, for every input and the initial slots."""
    args = make(STATE_CASES[name])

    def whole(args: Arguments) -> tuple[Tensor, ...]:
        o, state, lse = call(args, backend)
        return o, lse, state.slot_k, state.slot_v

    expected = gradients(args, whole)
    for cuts in CUTS[1:3]:

        def split(args: Arguments, cuts: tuple[int, ...] = cuts) -> tuple[Tensor, ...]:
            o, state, lse = in_pieces(args, cuts, lambda piece: call(piece, backend))
            return o, lse, state.slot_k, state.slot_v

        assert_gradients(gradients(args, split), expected, expected, torch.float64)


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_gradients_flow_through_the_remembered_tokens(backend: str) -> None:
    """A loss of the second piece alone reaches k, v, g of the first, through its ring and its slots."""
    args = make(Case(tokens=30, window=6, delay=9))

    def second(args: Arguments) -> tuple[Tensor, ...]:
        _, state, _ = call(part(args, [(0, 20)]), backend)
        o, _, lse = call(dict(part(args, [(20, 30)]), initial_state=state), backend)
        return o, lse

    def whole(args: Arguments) -> tuple[Tensor, ...]:
        o, _, lse = call(args, "naive")
        return o[:, 20:], lse[:, 20:]

    expected = gradients(args, whole)
    for name in "kvg":
        assert expected[name][:, :20].abs().amax() > 0
    assert_gradients(gradients(args, second), expected, expected, torch.float64)


# ---- Sequences know nothing of each other ----


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("past", [None, (5, 0, 30, 1, 2)], ids=["no state", "state"])
def test_packed_sequences_are_the_same_one_by_one(backend: str, past: tuple[int, ...] | None) -> None:
    args = inputs(Case(tokens=70, lengths=(1, 0, 40, 3, 26), past=past, rope=True, window=5), backend)
    packed = call(args, backend)
    alone = [call(one, backend) for one in one_by_one(args)]
    judged = judge(args)
    judged.accept(packed)
    # Lengths of 0 have no call of their own: their state is the one they came with.
    slots = {name: getattr(packed.state, name).clone() for name in ("slot_k", "slot_v")}
    for n, output in zip((0, 2, 3, 4), alone, strict=True):
        for name, x in slots.items():
            x[n] = getattr(output.state, name)[0]
        one = {name: x[n : n + 1] for name, x in packed.state.tensors().items()}
        assert_same_recent(replace(packed.state, **one), output.state)
    o, lse = (torch.cat([getattr(output, name) for output in alone], dim=1) for name in ("o", "lse"))
    judged.accept(Output(o, replace(packed.state, **slots), lse))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_gradients_of_packed_sequences_are_the_same_one_by_one(backend: str) -> None:
    args = make(Case(tokens=70, lengths=(1, 0, 40, 3, 26), past=(5, 0, 30, 1, 2), strength=True, given=True))

    def packed(args: Arguments) -> tuple[Tensor, ...]:
        o, state, lse = call(args, backend)
        return o, lse, state.slot_k[[0, 2, 3, 4]]

    def alone(args: Arguments) -> tuple[Tensor, ...]:
        outputs = [call(one, backend) for one in one_by_one(args)]
        o, lse = (torch.cat([getattr(output, name) for output in outputs], dim=1) for name in ("o", "lse"))
        return o, lse, torch.cat([output.state.slot_k for output in outputs])

    expected = gradients(args, alone)
    assert_gradients(gradients(args, packed), expected, expected, torch.float64)


# ---- Invariances ----


@pytest.mark.parametrize("backend", backends())
def test_the_order_of_the_slots_does_not_matter(backend: str) -> None:
    args = inputs(Case(tokens=40, strength=True, past=(20,)), backend)
    order = torch.randperm(args["g"].shape[-1], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    state = args["initial_state"]
    ring = {"slot_k": state.slot_k[:, :, order], "slot_v": state.slot_v[:, :, order]}
    ring |= {"g": state.g[..., order], "s": state.s[..., order]}
    shuffled = dict(args, g=args["g"][..., order], s=args["s"][..., order], initial_state=replace(state, **ring))
    answer = call(cast(args, torch.float64), "naive")
    final = {name: getattr(answer.state, name)[:, :, order] for name in ("slot_k", "slot_v")}
    final |= {name: getattr(answer.state, name)[..., order] for name in ("g", "s")}
    judge(shuffled, answer._replace(state=replace(answer.state, **final))).accept(call(shuffled, backend))


@pytest.mark.parametrize("backend", backends())
def test_a_constant_on_all_logits_of_a_row_shifts_only_the_lse(backend: str) -> None:
    """The last coordinate of every key is 1. With s = 1 - alpha and slots that begin at 1 there, that of a slot
    stays 1 too, so the last coordinate of q adds the same to every logit of its row."""
    args = inputs(Case(tokens=40, past=(20,), scale=0.25), backend)
    state = args["initial_state"]
    for x in (args["k"], state.k, state.slot_k):
        x[..., -1] = 1
    args["q"][..., -1] = 0
    # Exact in every dtype, and the same order of magnitude as the logits.
    constant = torch.randint(-8, 9, args["q"].shape[:3], generator=torch.Generator().manual_seed(2)).to(DEVICE)
    shifted = dict(args, q=args["q"].clone())
    shifted["q"][..., -1] = constant
    answer = call(cast(args, torch.float64), "naive")
    judged = judge(shifted, answer._replace(lse=answer.lse + 0.25 * constant))
    judged.accept(call(shifted, backend))


# ---- Causality, to the bit ----


def changed(args: Arguments, tokens: slice, how: str) -> Arguments:
    """The same call with other tokens there: other numbers in every input, or other gates alone."""
    args = clone(args)
    random = torch.Generator().manual_seed(3)
    for name in ("g",) if how != "everything" else TOKEN_ARGUMENTS:
        if args.get(name) is None:
            continue
        there = args[name][:, tokens]
        if name == "g":
            there.copy_(
                {"everything": -3.0, "forget": -60.0, "forget all": -torch.inf, "keep": 0.0}[how] * torch.ones(1)
            )
        else:
            there.copy_(10 * torch.randn(there.shape, generator=random))
    return args


@pytest.mark.parametrize("gates", ["mild", "mixed"])
@pytest.mark.parametrize("backend", backends())
def test_a_token_changes_no_bit_of_the_rows_before_it(backend: str, gates: str) -> None:
    tokens = 48 if slow(backend) else 90
    case = Case(tokens=tokens, window=5, delay=3, strength=not slow(backend), gates=gates, kv_heads=1)
    args = inputs(case, backend)
    before = call(args, backend)
    every = range(1, tokens)
    # In the emulator: both sides of the boundaries of blocks.
    for j in (16, 31) if slow(backend) else every[:: 1 if not ON_GPU else 5]:
        for how in ("forget",) if slow(backend) else ("everything", "forget", "forget all", "keep"):
            after = call(changed(args, slice(j, j + 1), how), backend)
            assert torch.equal(after.o[:, :j], before.o[:, :j]), (how, j)
            assert torch.equal(after.lse[:, :j], before.lse[:, :j]), (how, j)
            if how == "everything":
                assert not torch.equal(after.o[:, j], before.o[:, j])


@pytest.mark.parametrize("backend", backends())
def test_all_later_tokens_together_change_no_bit(backend: str) -> None:
    """With rope, a state, and a window and a delay of their own."""
    case = Case(tokens=40 if slow(backend) else 200, window=17, delay=20, past=(9,), rope=True)
    args = inputs(case, backend)
    before = call(args, backend)
    for j in (21,) if slow(backend) else (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 199):
        after = call(changed(args, slice(j, None), "everything"), backend)
        assert torch.equal(after.o[:, :j], before.o[:, :j]), j
        assert torch.equal(after.lse[:, :j], before.lse[:, :j]), j


def test_causality_across_segments() -> None:
    args = make(Case(tokens=200, window=9), torch.float32)
    with one_block_a_segment():
        before = call(args, "chunked")
        for j in (63, 64, 65, 128, 150):
            after = call(changed(args, slice(j, None), "everything"), "chunked")
            assert torch.equal(after.o[:, :j], before.o[:, :j]), j


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_no_gradient_flows_back_from_earlier_rows(backend: str) -> None:
    args = make(Case(tokens=40, window=5))

    def early(args: Arguments) -> tuple[Tensor, ...]:
        o, _, lse = call(args, backend)
        return o[:, :25], lse[:, :25]

    for name, grad in gradients(args, early).items():
        assert torch.count_nonzero(grad[:, 25:]) == 0, name


# ---- What a window and a delay mean ----


@pytest.mark.parametrize("backend", backends())
def test_slots_and_window_never_see_the_same_token(backend: str) -> None:
    """With the default delay and gates that forget nothing once written, every token counts exactly once: s picks one
    slot for each token, so slots and window together are plain attention over all tokens."""
    window, tokens = 6, 22
    args = inputs(Case(tokens=tokens, window=window, kv_heads=1, slots=16), backend)
    # Token j is written to slot j with strength 1; gates of 0 keep it there.
    args["g"] = torch.zeros_like(args["g"])
    args["s"] = torch.zeros_like(args["g"])
    for j in range(16):
        args["s"][:, j, :, j] = 1
    wide = cast(args, torch.float64)
    q, k, v = (wide[name] for name in "qkv")
    logits = torch.einsum("bthd,bjd->bthj", q, k[:, :, 0]) * q.shape[-1] ** -0.5
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE).tril()
    # Slots that hold nothing yet take part with logit 0 and value 0.
    empty = (torch.arange(16)[None, :] > torch.arange(tokens)[:, None] - window).sum(1).to(DEVICE)
    weights = logits.masked_fill(~visible[:, None], float("-inf")).exp()
    total = weights.sum(-1) + empty[:, None]
    o = torch.einsum("bthj,bjd->bthd", weights / total[..., None], v[:, :, 0])
    answer = call(wide, "naive")
    judge(args, answer._replace(o=o, lse=total.log())).accept(call(args, backend))


@pytest.mark.parametrize("backend", backends())
def test_an_empty_row_gives_zero(backend: str) -> None:
    """No window, masked slots: before anything was absorbed there is nothing to attend to."""
    args = inputs(Case(tokens=20, window=0, delay=7, mask=True), backend)
    o, _, lse = call(args, backend)
    assert torch.count_nonzero(o[:, :7]) == 0
    assert torch.equal(lse[:, :7], torch.full_like(lse[:, :7], float("-inf")))
    assert lse[:, 7:].isfinite().all()


def test_the_reference_of_gated_slot_attention_is_right_about_its_own_recurrence() -> None:
    """The parallel form above against its recurrence, so that the limit does not rest on one formula."""
    args = make(Case(tokens=9, window=0, kv_heads=1, group=1, slots=3, head_dim=4))
    q, k, v, g = (args[name][0, :, 0] for name in "qkvg")
    slot_k, slot_v, rows = torch.zeros(3, 4).to(q), torch.zeros(3, 4).to(q), []
    for t in range(9):
        alpha = g[t].exp()[:, None]
        slot_k, slot_v = alpha * slot_k + (1 - alpha) * k[t], alpha * slot_v + (1 - alpha) * v[t]
        rows.append((q[t] @ slot_k.T / 2).softmax(-1) @ slot_v)
    assert error(gated_slot_attention(args).o[0, :, 0], torch.stack(rows)) <= FLOAT64
