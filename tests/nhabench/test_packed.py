"""Packed sequences: how they are cut, what is counted for them, and that nothing crosses from one to another."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nha_kernels import flash_window, native_hybrid_attention
from nhabench import baselines as baselines_module
from nhabench import floors, guard, packed, reference
from nhabench.baselines import PACKED, blocked_window, linear_direct, masked_softmax
from nhabench.bench import all_contenders
from nhabench.check import check_against, check_baseline
from nhabench.contender import Contender
from nhabench.environment import read_environment
from nhabench.floors import Ceilings
from nhabench.gpu import GpuWatch
from nhabench.implementations import attend
from nhabench.inputs import Inputs, bytes_needed, make_inputs
from nhabench.lab import Lab
from nhabench.measure import measure_case
from nhabench.packed import causal_varlen, padding
from nhabench.reference import Judge, small_inputs
from nhabench.results import Row
from nhabench.rows import earlier_rows
from nhabench.timing import WallClock
from nhabench.workloads import Case, Workload, uneven

CPU = torch.device("cpu")


def named(name: str) -> Contender:
    (one,) = all_contenders([name])
    return one


def inputs_of(workload: Workload, length: int, sequences: int, dtype: str = "float32") -> Inputs:
    return make_inputs(Case(workload, 1, length, dtype, sequences), CPU)


@st.composite
def packings(draw: st.DrawFn, most: int = 3000) -> tuple[int, int]:
    """(tokens, sequences)."""
    tokens = draw(st.integers(1, most))
    return tokens, draw(st.integers(1, tokens))


# Cases and inputs -----------------------------------------------------------------------------------------------------


@given(packings())
def test_lengths_are_one_at_least_and_make_up_the_tokens(packing: tuple[int, int]) -> None:
    tokens, sequences = packing
    lengths = uneven(tokens, sequences)
    assert len(lengths) == sequences
    assert min(lengths) >= 1
    assert sum(lengths) == tokens
    assert uneven(tokens, sequences) == lengths


def test_lengths_are_uneven_and_the_same_on_every_machine() -> None:
    assert uneven(512, 4) == (198, 191, 44, 79)
    assert uneven(7, 7) == (1,) * 7
    lengths = uneven(16384, 256)  # of a mean of 64
    assert max(lengths) > 4 * 64
    assert sorted(lengths)[128] < 64


def test_a_batch_is_sequences_of_one_length(tiny: Workload) -> None:
    assert Case(tiny, 3, 8, "float32").lengths == (8, 8, 8)
    assert Case(tiny, 1, 8, "float32", 1).lengths == (8,)


@pytest.mark.parametrize(
    ("batch", "sequences", "rope", "words"),
    [
        (1, 9, False, r"sequences: expected an integer in 0\.\.seq_len=8, got 9"),
        (1, -1, False, r"sequences: expected an integer in 0\.\.seq_len=8, got -1"),
        (2, 3, False, "batch: expected 1 with packed sequences, got 2"),
        (1, 3, True, "sequences: expected 0 with rope, got 3"),
    ],
)
def test_what_cannot_be_packed_is_refused(batch: int, sequences: int, rope: bool, words: str, tiny: Workload) -> None:
    with pytest.raises(ValueError, match=words):
        Case(tiny.changed(rope=rope), batch, 8, "float32", sequences)


def test_a_packed_case_has_a_name_and_its_bytes(tiny: Workload) -> None:
    case = Case(tiny, 1, 40, "bfloat16", 3)
    assert str(case) == "tiny 3 packed in 40 bfloat16"
    inputs = make_inputs(case, CPU)
    assert case.input_bytes == sum(x.nbytes for x in inputs.tensors())
    assert bytes_needed(case, sets=2) - bytes_needed(case) == case.input_bytes


def test_offsets_are_inputs(tiny: Workload) -> None:
    inputs = inputs_of(tiny, 40, 3)
    cu = inputs.cu_seqlens
    assert cu is not None
    assert cu.dtype == torch.int32
    assert (cu[0], cu[-1]) == (0, 40)
    assert tuple(cu.diff().tolist()) == inputs.case.lengths
    before = guard.fingerprint(inputs)
    cu[1] += 1
    assert guard.fingerprint(inputs) != before
    guard.refill(inputs, 0)
    assert guard.fingerprint(inputs) == before
    assert inputs.to(torch.float64).cu_seqlens is cu


@pytest.mark.parametrize(("batch", "sequences"), [(3, 0), (1, 4)])
def test_sequences_apart_are_views_of_all_of_the_inputs(batch: int, sequences: int, tiny: Workload) -> None:
    inputs = make_inputs(Case(tiny, batch, 24, "float32", sequences), CPU)
    apart = list(inputs.apart())
    assert tuple(one.case.seq_len for one in apart) == inputs.case.lengths
    for name in "qkvg":
        whole = getattr(inputs, name)
        parts = [getattr(one, name) for one in apart]
        assert torch.equal(torch.cat(parts, 1 if sequences else 0), whole)
        assert {part.untyped_storage().data_ptr() for part in parts} == {whole.untyped_storage().data_ptr()}
    for one in apart:
        assert one.cu_seqlens is None
        assert one.q.shape == (1, one.case.seq_len, 4, 16)


# Floors ---------------------------------------------------------------------------------------------------------------


@given(packing=packings(40), window=st.integers(0, 50), heads=st.sampled_from([(2, 1), (6, 2)]))
def test_flops_count_the_pairs_within_each_sequence(
    packing: tuple[int, int], window: int, heads: tuple[int, int]
) -> None:
    tokens, sequences = packing
    case = Case(Workload("w", *heads, head_dim=8, window=window), 1, tokens, "float32", sequences)
    owner = [number for number, length in enumerate(case.lengths) for _ in range(length)]
    visible = [(t, j) for t in range(tokens) for j in range(t + 1) if owner[t] == owner[j]]
    assert floors.full_floor(case).flops == heads[0] * len(visible) * 4 * 8
    near = sum(t - j < window for t, j in visible)
    assert floors.window_floor(case).flops == heads[0] * near * 4 * 8


def test_bytes_are_those_of_the_tokens_and_the_offsets(tiny: Workload) -> None:
    plain, cut = Case(tiny, 1, 40, "bfloat16"), Case(tiny, 1, 40, "bfloat16", 5)
    for floor in (floors.nha_floor, floors.full_floor, floors.simple_gla_floor):
        assert floor(cut).bytes - floor(plain).bytes == 6 * 4
    assert floors.simple_gla_floor(cut).flops == floors.simple_gla_floor(plain).flops


def test_the_state_is_that_of_every_sequence(tiny: Workload) -> None:
    inputs = inputs_of(tiny, 60, 7)
    assert min(inputs.case.lengths) < tiny.window < max(inputs.case.lengths)
    kept = 0
    for one in inputs.apart():
        _, state = native_hybrid_attention(one.q, one.k, one.v, one.g, tiny.window, output_final_state=True)
        assert state is not None
        kept += sum(x.nbytes for name, x in state.tensors().items() if name != "seen")
    assert floors.nha_floor(inputs.case).state_bytes == kept
    assert floors.full_floor(inputs.case).state_bytes == inputs.k.nbytes + inputs.v.nbytes


# Right, and within the boundaries -------------------------------------------------------------------------------------


def padded_chunked() -> Contender:
    """What triton-padded does, by a backend that runs here."""
    return packed._padded("chunked")


SERVING: dict[str, Callable[[], Contender]] = {
    "chunked": lambda: named("chunked"),
    "naive": lambda: named("naive"),
    "chunked-padded": padded_chunked,
    "window": lambda: named("window"),
}


@pytest.mark.parametrize("name", SERVING)
def test_a_change_in_one_sequence_changes_no_bit_of_another(name: str, tiny: Workload) -> None:
    inputs = inputs_of(tiny, 60, 5)
    before = SERVING[name]().bind(inputs)()
    changed = list(inputs.apart())[2]
    for x in (changed.q, changed.k, changed.v, changed.g):
        x.mul_(3)
    after = SERVING[name]().bind(inputs)()
    same = [torch.equal(a, b) for a, b in zip(inputs.parts(before), inputs.parts(after), strict=True)]
    assert same == [True, True, False, True, True]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["chunked", "naive", "chunked-padded"])
def test_the_reference_is_made_of_sequences_apart(
    name: str, large: bool, tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "SMALL_LENGTH", 96)
    judge = Judge(tiny, "float32", CPU)
    if large:
        monkeypatch.setattr(reference, "NAIVE_LENGTH", 50)
    inputs = inputs_of(tiny, 200, 6)
    truth, by = judge.reference(inputs)
    assert by == ("chunked float64" if large else "naive float64")
    assert check_against(SERVING[name]().bind(inputs)(), truth, by, judge.tolerance).correct
    crossing = attend(dataclasses.replace(inputs, cu_seqlens=None), "chunked")
    assert not check_against(crossing, truth, by, judge.tolerance).correct


@settings(max_examples=40, deadline=None)
@given(packing=packings(70), window=st.integers(1, 80), heads=st.sampled_from([(1, 1), (4, 2), (7, 1)]))
def test_blocks_are_the_window_of_every_sequence(packing: tuple[int, int], window: int, heads: tuple[int, int]) -> None:
    x = inputs_of(Workload("w", *heads, head_dim=8), *packing).to(torch.float64)
    expected = torch.cat([masked_softmax(one, window) for one in x.apart()], 1)
    torch.testing.assert_close(blocked_window(x.q, x.k, x.v, window, x.cu_seqlens), expected)


@given(packings(200))
def test_padding_repeats_the_last_token_and_is_found_again(packing: tuple[int, int]) -> None:
    lengths = uneven(*packing)
    token, place = padding(lengths, CPU)
    rows = token.view(len(lengths), max(lengths)).tolist()
    start = 0
    for row, length in zip(rows, lengths, strict=True):
        last = start + length - 1
        assert row == [*range(start, last), *[last] * (max(lengths) - length + 1)]
        start += length
    assert torch.equal(token[place], torch.arange(packing[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_window_alone_is_right(dtype: str, tiny: Workload) -> None:
    verdict = check_baseline(named("window"), small_inputs(tiny, dtype, CPU, 5))
    assert verdict is not None
    assert verdict.correct, verdict.sentence
    assert verdict.reference == "its definition in float64 at T=320 (5 packed sequences)"


def test_baselines_that_attend_across_boundaries_are_incorrect(tiny: Workload) -> None:
    window, linear, small = named("window"), named("linear"), small_inputs(tiny, "float32", CPU, 5)
    crossing = dataclasses.replace(
        window, bind=lambda inputs: window.bind(dataclasses.replace(inputs, cu_seqlens=None))
    )
    for contender in (crossing, linear):
        verdict = check_baseline(contender, small)
        assert verdict is not None
        assert not verdict.correct
    torch.testing.assert_close(linear.bind(small)(), linear_direct(small), atol=1e-3, rtol=1e-3)  # of one sequence


# Who can, and how they are called -------------------------------------------------------------------------------------


def test_whoever_takes_no_packed_sequences_says_so(tiny: Workload) -> None:
    case = Case(tiny, 1, 40, "bfloat16", 3)
    told = {one.name: one.cannot(case, CPU) for one in all_contenders()}
    assert {name for name, reason in told.items() if reason == PACKED} == {
        "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "linear",
    }  # fmt: skip
    assert {reason for reason in told.values() if reason != PACKED} == {None}


def test_contenders_for_packed_sequences_take_part_where_they_are_named(tiny: Workload) -> None:
    names = ["torch-varlen", "triton-padded"]
    assert not {one.name for one in all_contenders()} & set(names)
    for one in all_contenders(names):
        assert one.cannot(Case(tiny, 2, 40, "bfloat16"), CPU) == packed.BATCH
        assert one.cannot(Case(tiny, 1, 40, "bfloat16", 3), CPU) is None
    assert named("torch-varlen").missing(CPU) == "torch.nn.attention.varlen needs a CUDA GPU, not cpu."
    told = named("torch-varlen").cannot(Case(tiny, 1, 40, "float32", 3), CPU)
    assert told == "torch.nn.attention.varlen takes 16-bit inputs, not float32."


def test_torch_without_varlen_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "VARLEN", "torch.nn.attention.none_such")
    told = named("torch-varlen").missing(torch.device("cuda"))
    assert told == f"torch {torch.__version__} has no torch.nn.attention.none_such."


def with_gqa(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Any:  # fmt: skip
    assert enable_gqa
    return without_gqa(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)


def without_gqa(
    query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    assert window_size == (-1, 0)
    assert [tuple(x.shape) for x in (query, key, value)] == [(40, 4, 16), (40, 2, 16), (40, 2, 16)]
    assert cu_seq_q is cu_seq_k
    assert max_q == max_k == max(cu_seq_q.diff())
    return query * 2


@pytest.mark.parametrize("varlen", [with_gqa, without_gqa], ids=lambda one: one.__name__)
def test_torch_is_called_as_each_version_wants_it(varlen: Any, tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("torch.nn.attention.varlen")
    fake.varlen_attn = varlen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    x = inputs_of(tiny, 40, 3, "bfloat16")
    assert torch.equal(named("torch-varlen").bind(x)(), x.q * 2)


def test_this_torch_takes_that_call(tiny: Workload) -> None:
    """Up to the kernel, which is for GPUs: its fake says what it would return."""
    x = inputs_of(tiny, 40, 3, "bfloat16")
    assert x.cu_seqlens is not None
    q, k, v, cu = (t.to("meta") for t in (x.q[0], x.k[0], x.v[0], x.cu_seqlens))
    assert causal_varlen()(q, k, v, cu, cu, 30, 30).shape == (40, 4, 16)


@pytest.mark.parametrize(("name", "module"), [("flash-attn-2", "flash_attn"), ("flash-attn-3", "flash_attn_interface")])
def test_flash_attn_gets_the_offsets(name: str, module: str, tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        causal: bool = False,
    ) -> Any:  # fmt: skip
        assert causal
        return without_gqa(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size=(-1, 0)), None

    fake = types.ModuleType(module)
    fake.flash_attn_varlen_func = attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, fake)
    x = inputs_of(tiny, 40, 3, "bfloat16")
    assert torch.equal(named(name).bind(x)(), x.q * 2)


def test_the_flash_kernel_of_the_window_gets_the_offsets(tiny: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[flash_window.Packing] = []

    class Kernel:
        def forward(self, q: Any, k: Any, v: Any, packing: flash_window.Packing) -> Any:
            seen.append(packing)
            assert [tuple(x.shape) for x in (q, k, v)] == [(40, 4, 16), (40, 2, 16), (40, 2, 16)]
            return q * 2, None, ()

    monkeypatch.setattr(baselines_module, "_flash_window", lambda case, device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_window, "window_kernel", lambda capability: Kernel())
    x = inputs_of(tiny, 40, 3, "bfloat16")
    assert torch.equal(named("window").bind(x)(), x.q * 2)
    (packing,) = seen
    assert packing.cu_q is packing.cu_k is x.cu_seqlens
    assert (packing.max_q, packing.window, packing.scale) == (max(x.case.lengths), tiny.window, 0.25)


@pytest.mark.parametrize("sequences", [0, 3])
def test_flash_linear_attention_gets_the_offsets(
    sequences: int, tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, torch.Tensor] = {}

    def kernel(*operands: torch.Tensor, **options: torch.Tensor) -> tuple[torch.Tensor, None]:
        given.update(options)
        return operands[0], None

    fake = types.ModuleType("fla.ops.simple_gla")
    fake.chunk_simple_gla = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    x = inputs_of(tiny, 40, sequences, "bfloat16")
    named("simple-gla").bind(x)()
    if x.cu_seqlens is None:
        assert given == {}
    else:
        assert given["cu_seqlens"].dtype == torch.int64
        assert torch.equal(given["cu_seqlens"], x.cu_seqlens.long())


# Measured -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("NHABENCH_GIT_SHA", "a" * 40)
    monkeypatch.setattr(reference, "SMALL_LENGTH", 64)
    watch = GpuWatch(CPU)
    return Lab(CPU, WallClock(), watch, read_environment(CPU, watch, ""), Ceilings(1, 1), seconds=0.02)


def measured(lab: Lab, case: Case, *contenders: Contender) -> dict[str, Row]:
    with torch.no_grad():
        return {row.implementation: row for row in measure_case(lab, case, contenders, lambda step: None)}


def test_a_packed_case_is_checked_and_timed(lab: Lab, tiny: Workload) -> None:
    case = Case(tiny, 1, 60, "float32", 4)
    contenders = [named("chunked"), padded_chunked(), named("window"), named("sdpa-flash"), named("torch-varlen")]
    rows = measured(lab, case, *contenders)
    statuses = {name: row.status for name, row in rows.items()}
    assert statuses == {
        "chunked": "ok", "chunked-padded": "ok", "window": "ok", "sdpa-flash": "unsupported",
        "torch-varlen": "unavailable",
    }  # fmt: skip
    assert {(row.batch, row.seq_len, row.sequences) for row in rows.values()} == {(1, 60, 4)}
    assert rows["window"].reference == "its definition in float64 at T=64 (2 packed sequences)"
    assert rows["chunked"].reference == "naive float64"
    assert rows["chunked-padded"].note.startswith("Pads every sequence")
    assert rows["chunked"].state_bytes == floors.nha_floor(case).state_bytes


def test_a_baseline_is_checked_for_packed_sequences_though_it_was_right_without(lab: Lab, tiny: Workload) -> None:
    wrong = dataclasses.replace(named("linear"), cannot=lambda case, device: None)
    assert measured(lab, Case(tiny, 1, 60, "float32"), wrong)["linear"].status == "ok"
    row = measured(lab, Case(tiny, 1, 60, "float32", 4), wrong)["linear"]
    assert (row.status, row.median_ms) == ("incorrect", None)


def test_who_writes_into_the_offsets_is_caught(lab: Lab, tiny: Workload, contenders: Any) -> None:
    def flips(inputs: Inputs) -> torch.Tensor:
        offsets = inputs.cu_seqlens
        assert offsets is not None
        o = attend(inputs, "chunked")
        offsets.copy_(offsets.flip(0))
        return o

    rows = measured(lab, Case(tiny, 1, 60, "float32", 4), contenders.nha("cheat", flips), named("chunked"))
    assert (rows["cheat"].status, rows["cheat"].note) == ("incorrect", guard.WROTE)
    assert rows["chunked"].status == "ok"


def test_rows_of_another_packing_are_not_those_of_a_case(lab: Lab, tiny: Workload) -> None:
    case, other = Case(tiny, 1, 60, "float32", 4), Case(tiny, 1, 60, "float32", 5)
    contender = named("chunked")
    rows = list(measured(lab, case, contender).values())
    assert earlier_rows(lab, case, [contender], rows) == rows
    assert earlier_rows(lab, other, [contender], rows) is None
    assert earlier_rows(lab, Case(tiny, 1, 60, "float32"), [contender], rows) is None


def test_full_attention_is_predicted_from_the_squares_of_the_lengths(lab: Lab, tiny: Workload) -> None:
    full, nha = named("torch-varlen"), named("chunked")
    before, after = Case(tiny, 1, 64, "float32", 64), Case(tiny, 1, 64, "float32", 1)
    for contender in (full, nha):
        lab.last[contender.name, *before.kind] = (before, 0.5)
    assert lab.predicted_s(nha, after) == 0.5
    assert lab.predicted_s(full, after) == 0.5 * 64 * 64 / 64
