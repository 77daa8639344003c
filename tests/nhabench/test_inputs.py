"""Random inputs: what they are, and how many sets it takes."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nhabench.inputs import COLD_FACTOR, MAX_SETS, bytes_needed, cache_state, free_bytes, make_inputs, set_count
from nhabench.workloads import Case, Workload

CPU = torch.device("cpu")


def test_shapes_dtype_and_gates(tiny: Workload) -> None:
    inputs = make_inputs(Case(tiny, 2, 12, "bfloat16"), CPU)
    assert inputs.q.shape == (2, 12, 4, 16)
    assert inputs.k.shape == inputs.v.shape == (2, 12, 2, 16)
    assert inputs.g.shape == (2, 12, 2, 8)
    assert {x.dtype for x in (inputs.q, inputs.k, inputs.v, inputs.g)} == {torch.bfloat16}
    assert bool((inputs.g <= 0).all())


def test_slots_remember_from_one_token_to_thousands() -> None:
    inputs = make_inputs(Case(Workload("w", 4, 2, 16, slots=64), 1, 512, "float32"), CPU)
    memory = -1 / inputs.g.mean(dim=(0, 1, 2))  # in tokens, [M]
    assert 4500 < memory[0] < 5500
    assert 1 < memory[-1] < 1.5
    steps = memory.log().diff()
    assert float(steps.mean()) == pytest.approx(-math.log(4000) / 63, rel=0.02)  # evenly on a log scale
    assert make_inputs(Case(Workload("w", 4, 2, 16, slots=1), 1, 512, "float32"), CPU).g.mean() > -1e-3


def test_a_seed_is_the_same_inputs_and_another_seed_is_not(tiny: Workload) -> None:
    case = Case(tiny, 1, 8, "float32")
    first, again, other = (make_inputs(case, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.q, other.q)
    assert not torch.equal(first.k, first.v)


def test_the_case_knows_its_bytes(tiny: Workload) -> None:
    case = Case(tiny, 2, 12, "float32")
    inputs = make_inputs(case, CPU)
    assert case.input_bytes == sum(x.nbytes for x in (inputs.q, inputs.k, inputs.v, inputs.g))
    assert case.output_bytes == inputs.q.nbytes
    assert (
        bytes_needed(case, sets=2) - bytes_needed(case) == case.input_bytes == sum(x.nbytes for x in inputs.tensors())
    )
    rotary = Case(tiny.changed(rope=True), 2, 12, "bfloat16")
    made = make_inputs(rotary, CPU)
    assert made.rope is not None
    assert rotary.input_bytes == sum(x.nbytes for x in (made.q, made.k, made.v, made.g, *made.rope))
    assert made.rotated is made.rotated  # one for all contenders
    assert bytes_needed(rotary, sets=2) - bytes_needed(rotary) == sum(x.nbytes for x in made.tensors())


def test_inputs_take_over_the_values_of_others(tiny: Workload) -> None:
    case = Case(tiny.changed(rope=True), 2, 12, "float32")
    mine, other = make_inputs(case, CPU, 1), make_inputs(case, CPU, 2)
    before, q = mine.rotated.q.clone(), mine.q
    mine.copy_(other)
    assert mine.q is q
    for x, y in zip(mine.tensors(), other.tensors(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(mine.rotated.q, before)


def test_rotated_logits_depend_on_the_distance_alone(tiny: Workload) -> None:
    inputs = make_inputs(Case(tiny.changed(rope=True), 1, 12, "float32"), CPU).to(torch.float64)
    same = dataclasses.replace(inputs, q=inputs.q[:, :1].expand_as(inputs.q), k=inputs.k[:, :1].expand_as(inputs.k))
    x = same.rotated
    assert x.rope is None
    logits = x.q[0, :, 0] @ x.k[0, :, 0].mT  # [T, T]
    for offset in range(-11, 12):
        diagonal = logits.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert float(logits[0].std()) > 0.1


def test_a_rotation_is_a_product_of_complex_numbers(tiny: Workload) -> None:
    """Of halves, the first real and the second imaginary, by an angle that grows with the position."""
    inputs = make_inputs(Case(tiny.changed(rope=True), 2, 12, "float32"), CPU).to(torch.float64)
    size = inputs.k.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turn = torch.polar(torch.ones(12, size // 2, dtype=torch.float64), torch.arange(12)[:, None] * frequency)
    for x, rotated in ((inputs.q, inputs.rotated.q), (inputs.k, inputs.rotated.k)):
        expected = torch.complex(*x.chunk(2, dim=-1)) * turn[:, None]
        torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), -1), rtol=1e-6, atol=1e-6)


def test_without_an_embedding_nothing_is_rotated(tiny: Workload) -> None:
    assert make_inputs(Case(tiny, 1, 12, "float32"), CPU).rotated.rope is None


@given(length=st.integers(1, 10**6), l2=st.integers(0, 10**8))
def test_sets_are_cold_unless_that_takes_too_many(length: int, l2: int) -> None:
    case = Case(Workload("w", 4, 2, 16), 1, length, "float32")
    sets = set_count(case, l2)
    assert 1 <= sets <= MAX_SETS
    if sets < MAX_SETS:
        assert sets * case.input_bytes >= COLD_FACTOR * l2
    if sets > 1:
        assert (sets - 1) * case.input_bytes < COLD_FACTOR * l2


def test_the_cache_is_named_as_it_is(tiny: Workload) -> None:
    case = Case(tiny, 1, 8, "float32")
    assert cache_state(case, 1, 0) == "uncontrolled"
    assert cache_state(case, 1, case.input_bytes) == "warm"
    assert cache_state(case, COLD_FACTOR, case.input_bytes) == "cold"


def test_free_memory_is_more_than_a_page_and_less_than_an_exabyte() -> None:
    assert 4096 < free_bytes(CPU) < 2**60
