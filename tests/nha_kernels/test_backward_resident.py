"""Gradients by the kernels for Hopper: on such a GPU, and on the CPU as their Python is, layouts left aside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nha_kernels import explain
from nha_kernels.fused import limits

from .helpers import ON_GPU, Arguments, Case, assert_gradients, cast, error, everything, gradients, inputs_of, make
from .test_resident import OTHERS, SERVED, hopper

pytestmark = pytest.mark.skipif(
    limits.why_unavailable("cuda" if ON_GPU else "cpu") is not None,
    reason="Triton has neither a GPU nor its interpreter",
)
emulated = pytest.mark.skipif(ON_GPU, reason="with a GPU the kernels themselves are tested")

GROUPS = Case(tokens=150, window=64, kv_heads=1, group=4, head_dim=64, slots=64, gates_like_q=True)
CASES: dict[str, Case] = {
    "a group of 4": replace(GROUPS, head_dim=128),
    "a batch, a group of 7, few slots": replace(GROUPS, batch=2, tokens=90, group=7, window=16, slots=40, mask=True),
    "a group of 2, fp32 gates": replace(GROUPS, tokens=100, group=2, window=48, gates_like_q=False, gates="mixed"),
    "strong gates": replace(GROUPS, window=32, gates="strong", kv_heads=2),
    "gates of -60": replace(GROUPS, tokens=70, window=16, gates="-60"),
    "spikes": replace(GROUPS, window=16, gates="spikes", gates_like_q=False),
    "rope": replace(GROUPS, rope=True, head_dim=128, tokens=180),
    "rope, a batch, a group of 7": replace(
        GROUPS, rope=True, batch=2, tokens=90, group=7, window=16, slots=40, mask=True
    ),
    "rope, fp32 gates": replace(GROUPS, rope=True, tokens=200, gates_like_q=False, gates="mixed", kv_heads=2),
    "rope, shorter than the window": replace(GROUPS, rope=True, tokens=20),
    "several segments": replace(GROUPS, tokens=330, window=16, group=2, kv_heads=2),
    "several segments, a group of 5": replace(
        GROUPS, tokens=300, batch=2, window=48, group=5, slots=40, gates_like_q=False
    ),
    "several segments, rope": replace(GROUPS, tokens=410, window=32, rope=True, mask=True),
    "several segments, strong gates": replace(GROUPS, tokens=290, window=32, gates="strong"),
    "as long as the window": replace(GROUPS, tokens=64),
    "one token more": replace(GROUPS, tokens=65, mask=True),
    "shorter than the window": replace(GROUPS, tokens=20),
    "one token": replace(GROUPS, tokens=1),
}
LARGE = replace(GROUPS, tokens=413, batch=2, kv_heads=2, head_dim=128)
ON_HOPPER: dict[str, Case] = CASES | {
    "one sequence": replace(LARGE, batch=1, tokens=1500),
    "a large batch": LARGE,
    "heads of 64": replace(LARGE, head_dim=64, window=32, slots=16),
    "a group of 8": replace(LARGE, group=8),
    "a group of 5, masked": replace(LARGE, group=5, kv_heads=1, mask=True),
    "large fp32 gates": replace(LARGE, gates_like_q=False),
    "large, spikes": replace(LARGE, gates="spikes", gates_like_q=False),
    "large, strong": replace(LARGE, gates="strong"),
    "large, rope": replace(LARGE, rope=True),
    "large, rope, a group of 7": replace(LARGE, rope=True, group=7, mask=True, slots=40),
    "large, rope, fp32 gates": replace(LARGE, rope=True, gates_like_q=False, gates="mixed"),
    "large, rope, heads of 64": replace(LARGE, rope=True, head_dim=64, window=48, group=8),
    "rope, one sequence": replace(LARGE, rope=True, batch=1, tokens=1500),
    "Llama-3-8B": Case(
        tokens=2000, window=64, kv_heads=8, group=4, head_dim=128, slots=64, gates_like_q=True
    ),
}  # fmt: skip


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[Arguments], tuple[Tensor, ...]]]:
    """A run for `gradients`, of o, the final slots and lse, by these kernels in segments of so many tiles."""
    from nha_kernels.fused import backward, forward
    from nha_kernels.fused.backward_rows_resident import ResidentRowsConfig
    from nha_kernels.fused.primitives import Launch
    from nha_kernels.fused.resident import ResidentConfig

    def by(tiles: int = 4, *, only_o: bool = False, **how: Any) -> Callable[[Arguments], tuple[Tensor, ...]]:
        monkeypatch.setattr(backward, "choose", lambda problem, processors: ResidentRowsConfig(tiles))
        if not ON_GPU:
            from .emulator import run

            monkeypatch.setattr(Launch, "__call__", lambda launch: run(launch, **how))

        def served(args: Arguments) -> tuple[Tensor, ...]:
            problem = explain(**args, output_final_state=True, return_lse=True).problem
            result = forward.run(problem, inputs_of(args), ResidentConfig(tiles))
            if only_o:
                return (result.o,)
            assert result.lse is not None
            assert result.slot_k is not None
            assert result.slot_v is not None
            return result.o, result.slot_k, result.slot_v, result.lse

        return served

    return by


@emulated
@pytest.mark.parametrize("name", ["a batch, a group of 7, few slots", "rope", "several segments"])
def test_of_o_alone(name: str, served: Any) -> None:
    """Then nothing comes from behind the last segment, or from behind a single one."""
    args = make(CASES[name], torch.bfloat16)

    def naive(args: Arguments) -> tuple[Tensor, ...]:
        return everything("naive")(args)[:1]

    reference = gradients(cast(args, torch.float64), naive)
    assert_gradients(gradients(args, served(only_o=True)), reference, gradients(args, naive), torch.bfloat16)


@emulated
def test_tables_of_any_stride(served: Any) -> None:
    args = make(CASES["rope"], torch.bfloat16)

    def grad(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        q, k = (args[name].clone().requires_grad_() for name in "qk")
        (o,) = served(only_o=True)({**args, "q": q, "k": k, "rope": rope})
        return torch.autograd.grad(o.float().square().sum(), (q, k))

    cos, sin = args["rope"]
    half = cos.shape[1]
    strided = grad((cos.repeat(1, 2)[:, :half], sin.repeat(1, 2)[:, :half]))
    assert all(torch.equal(x, y) for x, y in zip(strided, grad((cos, sin)), strict=True))


@pytest.mark.parametrize("name", ["rope", "several segments, rope"])
def test_tables_that_also_scale(name: str, served: Any) -> None:
    """As some extensions of the context do: the inverse of what they do is not what their angles' is."""
    if ON_GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel with the slots on the chip needs Hopper")
    args = make(CASES[name], torch.bfloat16)
    args["rope"] = tuple(table * 1.25 for table in args["rope"])
    assert_within_budget(args, gradients(args, served()))


@emulated
def test_tables_that_want_gradients_get_them(served: Any) -> None:
    """From the other kernels."""
    args = make(CASES["rope"], torch.bfloat16)
    cos, sin = (table.clone().requires_grad_() for table in args["rope"])
    (o,) = served(only_o=True)({**args, "rope": (cos, sin)})
    assert all(x.any() for x in torch.autograd.grad(o.float().square().sum(), (cos, sin)))


def assert_within_budget(args: Arguments, got: dict[str, Tensor]) -> None:
    reference = gradients(cast(args, torch.float64), everything("naive"))
    assert_gradients(got, reference, gradients(args, everything("naive")), args["q"].dtype)


@emulated
@pytest.mark.parametrize("name", CASES)
def test_in_bf16_on_the_cpu(name: str, served: Any) -> None:
    args = make(CASES[name], torch.bfloat16)
    assert_within_budget(args, gradients(args, served()))


@emulated
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["a batch, a group of 7, few slots", "one token more", "rope, fp32 gates"])
def test_the_order_in_which_partitions_run_changes_no_bit(name: str, seed: int, served: Any) -> None:
    args = make(CASES[name], torch.bfloat16)
    expected = gradients(args, served())
    got = gradients(args, served(seed=seed + 1))
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


@emulated
@pytest.mark.parametrize("name", ["a group of 4", "a batch, a group of 7, few slots", "one token more", "rope"])
def test_the_mathematics_in_fp32(name: str, served: Any) -> None:
    args = make(CASES[name], torch.float32)
    assert_within_budget(args, gradients(args, served(exact=True)))


@emulated
@pytest.mark.parametrize("name", ["strong gates", "spikes", "gates of -60"])
def test_the_anchor_loses_no_more_than_its_cut(name: str, served: Any) -> None:
    """As in test_fused_backward, where the limit is explained."""
    args = make(CASES[name], torch.float32)
    reference = gradients(cast(args, torch.float64), everything("naive"))
    got = gradients(args, served(exact=True))
    errors = {name: error(x, reference[name]) for name, x in got.items()}
    assert max(errors.values()) <= 2**-12, errors


@hopper
@pytest.mark.parametrize("tiles", [4, 16, 128])
@pytest.mark.parametrize("name", ON_HOPPER)
def test_in_bf16_on_hopper(name: str, tiles: int, served: Any) -> None:
    args = make(ON_HOPPER[name], torch.bfloat16)
    poison = [torch.full((1 << 24,), torch.nan, device="cuda") for _ in range(8)]
    del poison
    assert_within_budget(args, gradients(args, served(tiles)))


@hopper
@pytest.mark.parametrize("name", ["a large batch", "a group of 8", "large, spikes", "Llama-3-8B"])
def test_the_same_bits_every_time(name: str, served: Any) -> None:
    args = make(ON_HOPPER[name], torch.bfloat16)
    expected = gradients(args, served(16))
    for _ in range(20):
        got = gradients(args, served(16))
        assert all(torch.equal(x, expected[name]) for name, x in got.items())


@hopper
@pytest.mark.parametrize("name", ["large, spikes", "large, rope, fp32 gates", "several segments", "a group of 8"])
def test_small_gradients_keep_their_digits(name: str, served: Any) -> None:
    """Those of a mean over many tokens, say. All is linear, and a power of two changes no digit, until sums with the
    stored slots, which are 2^-96 of themselves, are subnormal: that begins about here."""
    args = make(ON_HOPPER[name], torch.bfloat16)
    run = served(16)
    expected = gradients(args, run)
    small = gradients(args, lambda args: tuple(x * 2.0**-40 for x in run(args)))
    errors = {name: error(x.float() * 2.0**40, expected[name]) for name, x in small.items()}
    assert max(errors.values()) <= 2**-10, errors


@pytest.mark.parametrize("change", [*OTHERS.values(), {"slots": 20, "gate_dtype": torch.float32}, {"q_heads": 8}])
def test_what_they_do_not_take(change: dict[str, Any]) -> None:
    from nha_kernels.fused.backward import BackwardConfig, choose
    from nha_kernels.fused.backward_rows_resident import why_not_resident

    from .helpers import describe

    problem = describe(**{**SERVED, **change})
    assert why_not_resident(problem) is not None
    assert isinstance(choose(problem, 132), BackwardConfig)


def test_they_are_chosen_for_what_they_take() -> None:
    from nha_kernels.fused.backward import choose
    from nha_kernels.fused.backward_rows_resident import ResidentRowsConfig, why_not_resident

    from .helpers import describe

    problem = describe(**SERVED)
    assert why_not_resident(problem) is None
    assert isinstance(choose(problem, 132), ResidentRowsConfig)
