"""The kernels with the slots on the chip: what they take, how they are launched, and on Hopper that they are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nha_kernels import explain, native_hybrid_attention
from nha_kernels.fused import limits
from nha_kernels.problem import Problem
from nha_kernels.state import advance

from .helpers import (
    ON_GPU,
    Arguments,
    Case,
    Output,
    describe,
    error,
    inputs_of,
    judge,
    make,
    parts,
)

pytestmark = pytest.mark.skipif(
    limits.why_unavailable("cuda" if ON_GPU else "cpu") is not None,
    reason="Triton has neither a GPU nor its interpreter",
)
hopper = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability()[0] != 9,
    reason="the kernel with the slots on the chip needs Hopper",
)

# A call that the kernel takes, and what it does not.
SERVED = dict(
    dtype=torch.bfloat16, gate_dtype=torch.bfloat16, head_dim=128, value_dim=128, slots=64, window=64, delay=64,
    q_heads=32, kv_heads=8, device="cuda", capability=(9, 0), tokens=16384,
)  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "another GPU": {"capability": (8, 0)},
    "fp16": {"dtype": torch.float16},
    "a large head, with a group": {"head_dim": 256, "value_dim": 256},
    "values of another size": {"value_dim": 64},
    "many slots": {"slots": 128},
    "gates that are not aligned": {"slots": 20},
    "a wide window": {"window": 128, "delay": 128},
    "a window that tiles do not divide": {"window": 40, "delay": 40},
    "overlapping slots": {"delay": 0},
    "a large group": {"q_heads": 72},
    "queries and keys of the window's own": {"positions": "given"},
    "explicit strengths": {"explicit_strength": True},
    "packed sequences": {"packed": True},
    "a state": {"has_state": True},
}


# The same of the kernel for one query head a kv head.
SINGLE = {**SERVED, "q_heads": 8}
LARGE = {**SINGLE, "head_dim": 256, "value_dim": 256}
OTHERS_SINGLE: dict[str, dict[str, Any]] = {
    "larger heads": {"head_dim": 512, "value_dim": 512},
    "a narrow window": {"window": 15, "delay": 15},
    "a wide window": {"window": 65, "delay": 65},
    "fp32 gates with heads of 256": {"head_dim": 256, "value_dim": 256, "gate_dtype": torch.float32},
    "a rotary embedding": {"positions": "rope"},
    **{
        name: OTHERS[name]
        for name in (
            "another GPU", "fp16", "values of another size", "many slots", "gates that are not aligned",
            "overlapping slots", "queries and keys of the window's own", "explicit strengths", "packed sequences",
            "a state",
        )
    },
}  # fmt: skip


def test_they_are_chosen_where_they_serve() -> None:
    from nha_kernels.fused.forward import ForwardConfig, choose
    from nha_kernels.fused.resident import ResidentConfig, why_not_resident
    from nha_kernels.fused.resident_single import SingleConfig, why_not_single

    kernels = (
        (SERVED, OTHERS, why_not_resident, ResidentConfig),
        (SINGLE, OTHERS_SINGLE, why_not_single, SingleConfig),
    )
    for served, others, why_not, config in kernels:
        assert why_not(describe(**served)) is None
        assert type(choose(describe(**served), 132)) is config
        for name, sizes in others.items():
            problem = describe(**{**served, **sizes})
            assert why_not(problem), name
            assert isinstance(choose(problem, 132), ForwardConfig), name
    for head_dim in (64, 128, 256):
        for window in (16, 40, 64):
            sizes = dict(head_dim=head_dim, value_dim=head_dim, window=window, delay=window)
            assert isinstance(choose(describe(**{**SINGLE, **sizes}), 132), SingleConfig)


@pytest.mark.parametrize("served", [SERVED, SINGLE, LARGE], ids=["groups", "single", "large"])
@pytest.mark.parametrize("batch", [1, 2, 32, 300])
@pytest.mark.parametrize("tokens", [1, 512, 16384, 131072])
def test_segments_leave_few_processors_idle(batch: int, tokens: int, served: dict[str, Any]) -> None:
    from nha_kernels.fused.forward import choose
    from nha_kernels.fused.resident import ResidentConfig

    problem = describe(**{**served, "batch": batch, "sequences": batch, "tokens": tokens})
    config = choose(problem, 132)
    assert isinstance(config, ResidentConfig)
    tiles = config.tiles
    assert tiles % 4 == 0
    segments = -(-tokens // (16 * tiles))
    walks = batch * problem.kv_heads * (2 if served is LARGE else 1)  # of a whole sequence
    waves = -(-walks * segments // 132)
    work = walks * -(-tokens // 16)
    # Up to a wave that is not full, and what is too short to be cut.
    assert waves * tiles <= 1.25 * work / 132 + 2 * tiles or tiles == 4


def test_segments_are_made_of_steps() -> None:
    from nha_kernels.fused.resident import ResidentConfig

    for tiles in (0, 2, 6):
        with pytest.raises(ValueError, match=f"^tiles: expected a positive multiple of 4, got {tiles}$"):
            ResidentConfig(tiles)


def strided(shape: tuple[int, ...], stride: tuple[int, ...], first: int = 0) -> torch.Tensor:
    return torch.arange(1 << 13, dtype=torch.bfloat16).as_strided(shape, stride, first)


ODD: dict[str, torch.Tensor] = {
    "a size of 1": strided((1, 5, 2, 64), (777, 128, 64, 1)),
    "sizes of 1": strided((1, 5, 1, 64), (777, 64, 3, 1)),
    "one row": strided((1, 1, 1, 64), (3, 5, 7, 1)),
    "a size of 1, spread": strided((1, 5, 1, 64), (0, 64, 0, 1)),
    "another order": strided((2, 5, 2, 64), (640, 64, 320, 1)),
    "every other token": strided((2, 5, 2, 64), (1280, 256, 64, 1)),
    "every other column": strided((2, 5, 2, 64), (1280, 256, 128, 2)),
    "one row for all": strided((2, 5, 2, 64), (0, 0, 64, 1)),
    "an odd address": strided((2, 5, 2, 64), (640, 128, 64, 1), 3),
    "an odd address, a size of 1": strided((1, 5, 2, 64), (777, 128, 64, 1), 4),
}


@pytest.mark.parametrize("name", ODD)
def test_the_copy_engine_takes_what_is_aligned(name: str) -> None:
    from nha_kernels.fused.hopper import aligned, descriptor

    x = ODD[name]
    for shape in ((), (*x.shape[:2], 1, *x.shape[2:])):
        got = aligned(x, *shape)
        assert got.stride() == torch.empty(shape or x.shape).stride()
        assert got.data_ptr() % 16 == 0
        assert torch.equal(got, x.reshape(shape or x.shape))
        descriptor(got, [1] * (got.ndim - 1) + [64])


def test_what_is_aligned_is_not_copied() -> None:
    from nha_kernels.fused.hopper import aligned

    for x in (strided((2, 5, 2, 64), (640, 128, 64, 1)), strided((1, 5, 2, 64), (777, 128, 64, 1), 8)):
        for shape in ((), (*x.shape[:2], 1, *x.shape[2:])):
            assert aligned(x, *shape).data_ptr() == x.data_ptr()


def test_a_descriptor_has_the_layout_of_its_tile() -> None:
    from nha_kernels.fused.hopper import descriptor, tile_layout

    for dtype, bits in ((torch.bfloat16, 16), (torch.float32, 32)):
        for shape in ((4, 64), (2, 4, 64), (1, 2, 4, 64), (1, 2, 2, 2, 64)):
            box = [1] * (len(shape) - 1) + [64]
            assert descriptor(torch.empty(shape, dtype=dtype), box).layout == tile_layout(len(shape), bits)


@pytest.mark.parametrize("tokens", [1, 130])
def test_a_size_of_one_may_have_any_stride(tokens: int) -> None:
    """It is contiguous whatever its stride, which the copy engine would not take."""
    from nha_kernels.fused.resident import ResidentConfig, resident_launches

    def cut(size: int) -> torch.Tensor:
        """[1, tokens, 1, size], from a batch whose rows are an element longer."""
        return torch.zeros(2, tokens * size + 1, dtype=torch.bfloat16)[:, :-1].unflatten(1, (tokens, 1, size))[:1]

    q, k, v, g = cut(128), cut(128), cut(128), cut(64)
    assert k.is_contiguous()
    assert k.stride(0) % 8
    problem = explain(q, k, v, g, 64, output_final_state=True).problem
    launches, *_ = resident_launches(problem, inputs_of(dict(q=q, k=k, v=v, g=g)), ResidentConfig(4))
    assert len(launches) == (1 if tokens <= 64 else 3)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("tokens", [64, 65, 1000])
def test_a_call_starts_behind_what_came_before_it(tokens: int, final: bool, group: int) -> None:
    """Its first launch waits for all that came before, and so do those that follow it, through it."""
    from nha_kernels.fused import forward
    from nha_kernels.fused.resident import ResidentConfig
    from nha_kernels.fused.resident_single import SingleConfig

    q = torch.zeros(2, tokens, group, 128, dtype=torch.bfloat16)
    k, v, g = (torch.zeros(2, tokens, 1, size, dtype=torch.bfloat16) for size in (128, 128, 64))
    problem = explain(q, k, v, g, 16, output_final_state=final).problem
    config = SingleConfig(4) if group == 1 else ResidentConfig(4)
    launches, *_ = forward.describe(problem, inputs_of(dict(q=q, k=k, v=v, g=g)), config)
    assert len(launches) == (1 if tokens <= 64 and not final else 3)
    assert [launch.options.get("launch_pdl", False) for launch in launches] == [i > 0 for i in range(len(launches))]
    assert (launches[-1].arguments["p_before"] is not None) == (len(launches) > 1)  # only then does it wait


def serve(args: Arguments, tiles: int | None = None) -> Output:
    """The call by the kernel with the slots on the chip that serves it, in segments of `tiles`, into memory that held
    NaN."""
    from nha_kernels.fused.forward import choose, run
    from nha_kernels.fused.resident import ResidentConfig

    problem: Problem = explain(**args, output_final_state=True, return_lse=True).problem
    inputs = inputs_of(args)
    config = choose(problem, 132)
    assert isinstance(config, ResidentConfig)
    if tiles is not None:
        config = replace(config, tiles=tiles)
    poison = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(4)]
    del poison
    result = run(problem, inputs, config)
    assert result.lse is not None
    return Output(result.o, advance(problem, inputs, result), result.lse)


WIDE = Case(tokens=413, batch=2, window=64, kv_heads=2, group=4, head_dim=128, slots=64, gates_like_q=True)
SINGLE_HEADS = replace(WIDE, window=32, kv_heads=3, group=1, head_dim=64)
SINGLE_CASES: dict[str, dict[str, Any]] = {
    "one sequence": dict(batch=1, tokens=1500),
    "a batch": {},
    "fp32 gates": dict(gates_like_q=False),
    "a window of 64": dict(window=64),
    "a window of 40": dict(window=40, slots=40, mask=True),
    "a window of 63": dict(window=63, batch=1, tokens=1500),
    "a window of 16": dict(window=16),
    "few slots": dict(window=21, slots=40, mask=True, scale=0.2),
    "shorter than the window": dict(tokens=20),
    "strong gates": dict(gates="strong"),
    "gates of 0 and -inf": dict(gates="mixed"),
    "spikes": dict(gates="spikes", batch=1, tokens=1500),
    "spikes in fp32": dict(gates="spikes", gates_like_q=False),
    "strong gates in fp32": dict(gates="strong", gates_like_q=False),
    "few slots in fp32": dict(window=21, slots=20, gates_like_q=False, mask=True),
}
BY_KERNEL = pytest.mark.parametrize(
    "case",
    [
        pytest.param(WIDE, id="groups"),
        pytest.param(replace(WIDE, rope=True), id="groups, rope"),
        *(pytest.param(replace(SINGLE_HEADS, head_dim=d), id=f"single-{d}") for d in (64, 128, 256)),
    ],
)
CASES: dict[str, Case] = {
    "one sequence": replace(WIDE, batch=1, tokens=1500),
    "a batch": WIDE,
    "shorter than the window": replace(WIDE, tokens=40),
    "one token": replace(WIDE, tokens=1),
    "fp32 gates": replace(WIDE, gates_like_q=False),
    "strong gates": replace(WIDE, gates="strong"),
    "gates of 0 and -inf": replace(WIDE, gates="mixed"),
    "spikes": replace(WIDE, gates="spikes", gates_like_q=False),
    "a group of 7": replace(WIDE, group=7, mask=True),
    "a group of 8": replace(WIDE, group=8),
    "a group of 5": replace(WIDE, group=5, kv_heads=1),
    "a group of 2": replace(WIDE, group=2, kv_heads=1),
    "small heads": replace(WIDE, head_dim=64, window=32, slots=16),
    "a window of 16, few slots": replace(WIDE, window=16, slots=40, mask=True),
    "a window of 48": replace(WIDE, window=48, group=3, scale=0.2),
    "few slots in fp32": replace(WIDE, slots=20, gates_like_q=False, mask=True),
    "four slots in fp32": replace(WIDE, slots=4, gates_like_q=False),
    "rope": replace(WIDE, rope=True, batch=1, tokens=1500),
    "rope, shorter than the window": replace(WIDE, rope=True, tokens=40, mask=True),
    "rope, one token": replace(WIDE, rope=True, tokens=1),
    "rope, fp32 gates": replace(WIDE, rope=True, gates="mixed", gates_like_q=False),
    "rope, a group of 7": replace(WIDE, rope=True, group=7, mask=True, slots=40),
    "rope, a group of 2": replace(WIDE, rope=True, group=2, kv_heads=1, window=48),
    "rope, a window of 16": replace(WIDE, rope=True, window=16, gates="strong"),
    "rope, fp32 gates, a group of 8": replace(WIDE, rope=True, group=8, gates_like_q=False),
    "rope, a window of 32": replace(WIDE, rope=True, window=32, gates_like_q=False),
    "rope, small heads": replace(WIDE, rope=True, head_dim=64, window=32, slots=16),
    "rope, small heads, a group of 8": replace(WIDE, rope=True, head_dim=64, group=8, gates_like_q=False),
}


@hopper
@pytest.mark.parametrize("tiles", [4, 8, 128, None])
@pytest.mark.parametrize("name", CASES)
def test_it_is_as_exact_as_bf16_allows(name: str, tiles: int | None) -> None:
    args = make(CASES[name], torch.bfloat16)
    judge(args).accept(serve(args, tiles), what=name)


@hopper
@pytest.mark.parametrize("tiles", [4, 8, 128, None])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", SINGLE_CASES)
def test_single_heads_are_as_exact_as_bf16_allows(name: str, head_dim: int, tiles: int | None) -> None:
    case = replace(SINGLE_HEADS, head_dim=head_dim, **SINGLE_CASES[name])
    if head_dim == 256 and not case.gates_like_q:
        pytest.skip("the kernel takes gates of 16 bits with heads of 256")
    args = make(case, torch.bfloat16)
    judge(args).accept(serve(args, tiles))


def strong_in_places(case: Case) -> Arguments:
    """Tiles that are taken in by several steps, of one part or of more, among tiles that are taken in at once."""
    args = make(replace(case, tokens=900), torch.bfloat16)
    args["g"][0, 200:230, 1] = -60.0
    args["g"][:, 500, :, ::2] = -torch.inf
    args["g"][1, 700:860, 2, 5] = -4.0
    args["g"][1, 64:128, 0, 7] = -2.5
    return args


@hopper
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("gates_like_q", [True, False])
def test_gates_that_are_strong_in_places(head_dim: int, gates_like_q: bool) -> None:
    if head_dim == 256 and not gates_like_q:
        pytest.skip("the kernel takes gates of 16 bits with heads of 256")
    args = strong_in_places(replace(SINGLE_HEADS, head_dim=head_dim, gates_like_q=gates_like_q))
    for tiles in (4, 16, None):
        judge(args).accept(serve(args, tiles))
    first = parts(serve(args, 16))
    for _ in range(40):
        assert all(torch.equal(x, first[key]) for key, x in parts(serve(args, 16)).items())


@hopper
@pytest.mark.parametrize(("head_dim", "gates_like_q"), [(64, True), (64, False), (128, True), (256, True)])
@pytest.mark.parametrize("window", [16, 32, 64])
def test_strong_gates_to_come_change_no_bit(window: int, head_dim: int, gates_like_q: bool) -> None:
    """How a tile is taken in hangs on its gates, some of which are of tokens later than its first rows."""
    args = strong_in_places(replace(SINGLE_HEADS, window=window, head_dim=head_dim, gates_like_q=gates_like_q))
    expected = serve(args, 16)
    for at in range(320, 450, 3):
        changed = {**args, "g": args["g"].clone()}
        changed["g"][:, at : at + 20] = -60.0
        after = serve(changed, 16)
        assert torch.equal(after.o[:, :at], expected.o[:, :at])
        assert torch.equal(after.lse[:, :at], expected.lse[:, :at])


@hopper
@BY_KERNEL
@pytest.mark.parametrize("tokens", [40, 413])
def test_rows_whose_logits_are_all_far_below_0(tokens: int, case: Case) -> None:
    """With `mask_empty_slots` nothing but the window stands against what comes before a sequence."""
    args = make(replace(case, tokens=tokens, mask=True), torch.bfloat16)
    random = torch.Generator("cuda").manual_seed(0)
    direction = torch.randn(case.head_dim, device="cuda", generator=random)
    direction = (3 * case.head_dim**0.25 / direction.norm() * direction).bfloat16()  # logits around -16 * 9
    args["q"], args["k"] = args["q"] + 4 * direction, args["k"] - 4 * direction
    if case.rope:  # angles so small that the logits stay what they are
        args["rope"] = (torch.ones_like(args["rope"][0]), 1e-3 * args["rope"][1])
    right = judge(args)
    assert right.answer.lse[:, :30].max() < -88
    right.accept(serve(args))


@hopper
@pytest.mark.parametrize(
    "case",
    [
        *(
            pytest.param(CASES[name], id=name)
            for name in ("one sequence", "a group of 7", "small heads", "a window of 48", "fp32 gates",
                         "a window of 16, few slots", "rope", "rope, a group of 7", "rope, small heads",
                         "rope, fp32 gates")
        ),
        *(
            pytest.param(replace(SINGLE_HEADS, head_dim=d, window=window), id=f"single-{d}, a window of {window}")
            for d in (64, 128, 256) for window in (32, 64)
        ),
        pytest.param(replace(SINGLE_HEADS, gates_like_q=False), id="single-64, fp32 gates"),
    ],
)  # fmt: skip
def test_the_same_bits_every_time(case: Case) -> None:
    """Its warps hand their work on through shared memory: a race would show as bits that change."""
    args = make(replace(case, tokens=16384, batch=1, kv_heads=4), torch.bfloat16)
    for tiles in (8, 64):
        first = parts(serve(args, tiles))
        for _ in range(40):
            again = parts(serve(args, tiles))
            assert all(torch.equal(x, first[key]) for key, x in again.items())


@hopper
@BY_KERNEL
@pytest.mark.parametrize("gates", ["mild", "strong"])
def test_a_token_changes_no_bit_of_the_rows_before_it(gates: str, case: Case) -> None:
    args = make(replace(case, tokens=300, batch=1, gates=gates), torch.bfloat16)
    before = serve(args, 4)
    for at in (17, 130, 299):
        changed = {name: args[name].clone() for name in ("q", "k", "v", "g")}
        for name, x in changed.items():
            x[:, at] = -3.0 if name == "g" else 2.0
        after = serve({**args, **changed}, 4)
        assert torch.equal(after.o[:, :at], before.o[:, :at])
        assert torch.equal(after.lse[:, :at], before.lse[:, :at])
        assert not torch.equal(after.o[:, at:], before.o[:, at:])


@hopper
@BY_KERNEL
def test_a_state_made_by_it_goes_on_elsewhere(case: Case) -> None:
    """A call that brings a state is for the general kernels: both must mean the same by it."""
    args = make(replace(case, batch=1, tokens=1000), torch.bfloat16)
    right = judge(args)
    cut = 500
    pieces, state = [], None
    for part in (slice(0, cut), slice(cut, None)):
        piece = {**args, **{name: args[name][:, part] for name in ("q", "k", "v", "g")}}
        o, state, lse = native_hybrid_attention(
            **piece, initial_state=state, output_final_state=True, return_lse=True, backend="triton"
        )
        pieces.append((o, lse))
    o, lse = (torch.cat(x, dim=1) for x in zip(*pieces, strict=True))
    assert state is not None
    right.accept(Output(o, state, lse))


@hopper
@BY_KERNEL
def test_inputs_that_lie_badly(case: Case) -> None:
    args = make(case, torch.bfloat16)
    expected = serve(args).o
    odd = {name: torch.cat((args[name].flatten()[:1], args[name].flatten()))[1:] for name in ("q", "k", "v", "g")}
    odd = {name: x.view(args[name].shape) for name, x in odd.items()}
    assert all(x.data_ptr() % 16 for x in odd.values())
    assert error(serve({**args, **odd}).o, expected) == 0
    strided = {name: torch.stack((args[name], args[name] + 1), dim=-1)[..., 0] for name in ("q", "k", "v", "g")}
    assert error(serve({**args, **strided}).o, expected) == 0


@hopper
def test_rotary_tables_of_any_dtype_and_length() -> None:
    args = make(replace(WIDE, rope=True), torch.bfloat16)
    short = tuple(x.bfloat16() for x in args["rope"])
    longer = tuple(torch.cat((x.double(), torch.full_like(x, torch.nan).double())) for x in short)
    expected = serve({**args, "rope": short}).o
    assert torch.equal(serve({**args, "rope": longer}).o, expected)
    strided = tuple(torch.stack((x, x + 1), dim=-1)[..., 0] for x in short)
    assert not strided[0].is_contiguous()
    assert torch.equal(serve({**args, "rope": strided}).o, expected)


@hopper
@BY_KERNEL
def test_a_captured_call_takes_new_inputs(case: Case) -> None:
    args = make(replace(case, batch=1, tokens=700), torch.bfloat16)
    other = make(replace(case, batch=1, tokens=700, seed=1), torch.bfloat16)
    expected = serve({**args, **{name: other[name] for name in ("q", "k", "v", "g")}}).o
    native_hybrid_attention(**args, backend="triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = native_hybrid_attention(**args, backend="triton")
    for name in ("q", "k", "v", "g"):
        args[name].copy_(other[name])
    graph.replay()
    assert error(o, expected) == 0


@hopper
@BY_KERNEL
def test_calls_that_follow_one_another(case: Case) -> None:
    """A call's launches overlap; none may read what is still to be written, or write what is still to be read."""
    cases = [make(replace(case, batch=1, tokens=700, seed=seed), torch.bfloat16) for seed in range(4)]
    cases = [{**cases[0], **{name: args[name] for name in ("q", "k", "v", "g")}} for args in cases]
    expected = [serve(args).o for args in cases]
    large = torch.empty(1 << 27, device="cuda")
    args = {**cases[0], **{name: cases[0][name].clone() for name in ("q", "k", "v", "g")}}
    results = []
    for i in range(200):
        large.fill_(i)  # the host gets ahead of the device
        for name in ("q", "k", "v", "g"):
            args[name].copy_(cases[i % 4][name])
        o, _ = native_hybrid_attention(**args, backend="triton")
        results.append(o.clone())
        o.fill_(torch.nan)
    for i, o in enumerate(results):
        assert torch.equal(o, expected[i % 4])


@hopper
def test_more_than_2_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    random = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(8, 2**17, *sizes, generator=random, device="cuda", dtype=torch.bfloat16)

    q, k, v, g = normal(32, 128), normal(8, 128), normal(8, 128), normal(8, 64).abs_().neg_()
    assert q.numel() > 2**31
    o, _ = native_hybrid_attention(q, k, v, g, 64, backend="triton")
    alone, _ = native_hybrid_attention(q[-1:], k[-1:], v[-1:], g[-1:], 64, backend="triton")
    assert error(o[-1:, -4096:], alone[:, -4096:]) < torch.finfo(torch.bfloat16).eps
