"""Floors against numbers worked out by hand and against counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nha_kernels import native_hybrid_attention
from nhabench import floors
from nhabench.floors import Ceilings, Floor
from nhabench.plan import CPU_SECONDS, affordable, estimated_seconds
from nhabench.workloads import Case, Workload, cases, load_workloads


def test_nha_moves_21504_bytes_a_token_at_the_llama_shape() -> None:
    case = load_workloads()["llama-3-8b"].case(16384, "bfloat16")
    assert floors.nha_floor(case).bytes == 21_504 * 16384
    assert case.input_bytes + case.output_bytes == 21_504 * 16384


def test_a_million_llama_tokens_take_five_milliseconds_at_4_3_tb_per_s() -> None:
    case = Case(load_workloads()["llama-3-8b"], 1, 1_000_000, "bfloat16")
    assert floors.nha_floor(case).milliseconds(Ceilings(4.3, 790)) == pytest.approx(5.0, rel=0.01)


@given(length=st.integers(1, 40), window=st.integers(0, 50), heads=st.sampled_from([(2, 1), (6, 2)]))
def test_softmax_flops_count_the_visible_pairs(length: int, window: int, heads: tuple[int, int]) -> None:
    workload = Workload("w", *heads, head_dim=8, window=window)
    case = Case(workload, 3, length, "float32")
    pairs = sum(1 for t in range(length) for j in range(length) if t - window < j <= t)
    assert floors.window_floor(case).flops == 3 * heads[0] * pairs * 4 * 8
    everything = length * (length + 1) // 2
    assert floors.full_floor(case).flops == 3 * heads[0] * everything * 4 * 8


def test_slots_add_their_reads_and_updates() -> None:
    case = Case(Workload("w", 4, 2, 16, slots=8, window=0), 1, 10, "float32")
    # A token: 4 heads read 8 slots (2*16 for logit and value each); 2 heads update 2*8*16 numbers, 3 FLOPs each.
    assert floors.nha_floor(case).flops == 10 * (4 * 8 * 64 + 2 * 2 * 8 * 16 * 3)
    assert floors.gsa_floor(case).flops == floors.nha_floor(case).flops


def test_a_rotary_embedding_adds_its_tables_and_six_operations_a_pair() -> None:
    workload = Workload("w", 4, 2, 16, slots=8)
    plain, rotated = (floors.nha_floor(Case(x, 3, 10, "bfloat16")) for x in (workload, workload.changed(rope=True)))
    assert rotated.bytes - plain.bytes == 2 * 10 * 8 * 4  # cos and sin, shared by all sequences
    assert rotated.flops - plain.flops == 3 * 10 * (4 + 2) * 8 * 6


@pytest.mark.parametrize("length", [3, 40])
def test_the_state_is_what_the_operator_keeps_and_full_attention_keeps_everything(length: int) -> None:
    workload = Workload("w", 4, 2, 16, slots=8, window=8)
    case = Case(workload, 3, length, "float32")
    q, k, v = (torch.randn(3, length, heads, 16) for heads in (4, 2, 2))
    g = -torch.rand(3, length, 2, 8)
    _, state = native_hybrid_attention(q, k, v, g, 8, output_final_state=True)
    assert state is not None
    kept = sum(x.nbytes for name, x in state.tensors().items() if name != "seen")
    assert floors.nha_floor(case).state_bytes == kept
    assert floors.full_floor(case).state_bytes == k.nbytes + v.nbytes
    assert floors.window_floor(case).state_bytes == (k[:, -7:].nbytes + v[:, -7:].nbytes)
    assert floors.simple_gla_floor(case).state_bytes == 3 * 2 * 16 * 16 * 4


def test_at_128k_tokens_the_cache_of_full_attention_is_hundreds_of_times_the_state() -> None:
    case = load_workloads()["llama-3-8b"].case(131072, "bfloat16")
    ratio = floors.full_floor(case).state_bytes / floors.nha_floor(case).state_bytes
    assert ratio == pytest.approx(2 * 131072 * 128 * 2 / (2 * 64 * 128 * 4 + 64 * (2 * 128 + 64) * 2))
    assert ratio > 600


def test_gates_are_all_that_the_linear_floors_differ_in_bytes() -> None:
    case = Case(Workload("w", 4, 2, 16, slots=8), 1, 10, "float32")
    plain = floors.linear_floor(case).bytes
    assert plain == 10 * (2 * 4 * 16 + 2 * 2 * 16) * 4
    per_gate = 10 * 2 * 4
    assert floors.gla_floor(case).bytes == plain + 16 * per_gate
    assert floors.simple_gla_floor(case).bytes == plain + per_gate
    assert floors.delta_rule_floor(case).bytes == plain + 2 * per_gate
    assert floors.gsa_floor(case).bytes == plain + 16 * per_gate


def test_the_larger_term_is_the_floor() -> None:
    assert Floor(2 * 10**9, 1, 0).milliseconds(Ceilings(1.0, 1.0)) == pytest.approx(2.0)
    assert Floor(1, 3 * 10**9, 0).milliseconds(Ceilings(1.0, 1.0)) == pytest.approx(3.0)


def test_a_slow_machine_affords_fewer_cases_but_always_one() -> None:
    table = [w.changed(tokens=1) for w in load_workloads().values()]
    every = cases(table, (512, 1024, 2048, 4096, 8192), "float32")
    fast, slow = Ceilings(0.02, 0.3), Ceilings(0.002, 0.01)
    chosen = affordable(every, fast, 2.0)
    assert sum(estimated_seconds(case, fast, 2.0) for case in chosen) <= CPU_SECONDS
    assert {case.workload.name for case in chosen} >= {"llama-3-8b-n1", "nha-340m-n1"}
    assert len(affordable(every, slow, 2.0)) < len(chosen)
    assert affordable(every[4:5], slow, 2.0) == every[4:5]
