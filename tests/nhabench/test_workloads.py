"""The table of workloads: what it holds, how it is extended, what its errors say."""

from pathlib import Path

import pytest

from nhabench.workloads import SEQ_LENS, Case, Workload, cases, load_workloads, parse_workloads, select


def test_the_table_holds_the_shapes_of_the_models() -> None:
    shapes = {name: (w.q_heads, w.kv_heads, w.head_dim, w.slots, w.window) for name, w in load_workloads().items()}
    assert shapes == {
        "llama-3-8b": (32, 8, 128, 64, 64),
        "nha-340m": (4, 4, 256, 64, 32),
        "pythia-410m": (16, 16, 64, 64, 32),
        "llama-3.2-1b": (32, 8, 64, 64, 64),
        "qwen2.5-7b": (28, 4, 128, 64, 64),
        "qwen3-30b-a3b": (32, 4, 128, 64, 64),
    }


def test_lengths_double_from_512_to_131072() -> None:
    assert SEQ_LENS == (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


def test_tokens_are_held_until_one_sequence_has_more() -> None:
    workload = load_workloads()["llama-3-8b"]
    batches = [workload.case(length, "bfloat16").batch for length in SEQ_LENS]
    assert batches == [32, 16, 8, 4, 2, 1, 1, 1, 1]


def test_a_file_adds_and_replaces(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[mine]\nq_heads=6\nkv_heads=2\nhead_dim=80\n['llama-3-8b']\nq_heads=2\nkv_heads=1\nhead_dim=64\n")
    workloads = load_workloads(file)
    assert workloads["mine"] == Workload("mine", 6, 2, 80)
    assert workloads["llama-3-8b"].q_heads == 2
    assert "qwen2.5-7b" in workloads


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("q_heads=4\nhead_dim=8", ["'mine'", "kv_heads", "nothing"]),
        ("q_heads=4\nkv_heads=3\nhead_dim=8", ["'mine'", "kv_heads", "divisor of q_heads=4", "got 3"]),
        ("q_heads='4'\nkv_heads=2\nhead_dim=8", ["'mine'", "q_heads", "integer >= 1", "'4'"]),
        ("q_heads=4\nkv_heads=2\nhead_dim=8\nslots=0", ["slots", "integer >= 1", "got 0"]),
        ("q_heads=4\nkv_heads=2\nhead_dim=8\nwindow=-1", ["window", "integer >= 0", "got -1"]),
        ("q_heads=4\nkv_heads=2\nhead_dim=8\ntokens=true", ["tokens", "True"]),
        ("q_heads=4\nkv_heads=2\nhead_dim=8\nlayers=3", ["layers", "expected one of q_heads"]),
    ],
)
def test_an_error_names_the_file_the_field_and_what_came(body: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"mine\.toml") as error:
        parse_workloads(f"[mine]\n{body}\n", "mine.toml")
    for word in words:
        assert word in str(error.value)


def test_other_bad_files_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.toml: expected TOML"):
        parse_workloads("= 3", "a.toml")
    with pytest.raises(ValueError, match=r"x: expected a table"):
        parse_workloads("x = 3", "a.toml")
    with pytest.raises(ValueError, match="readable TOML file"):
        load_workloads(tmp_path / "absent.toml")


def test_a_window_of_zero_is_a_workload() -> None:
    assert Workload("pure", 2, 1, 8, window=0).window == 0


def test_a_changed_shape_has_another_name(tiny: Workload) -> None:
    changed = tiny.changed(window=16, slots=4)
    assert (changed.name, changed.window, changed.slots) == ("tiny-w16-m4", 16, 4)
    assert tiny.changed(window=tiny.window) == tiny
    rotated = tiny.changed(slots=4, rope=True)
    assert (rotated.name, rotated.rope) == ("tiny-m4-rope", True)
    assert rotated.changed(rope=True) == rotated == rotated.changed()


def test_a_rotary_embedding_needs_an_even_head_size() -> None:
    with pytest.raises(ValueError, match="head_dim: expected an even number with rope, got 7"):
        Workload("odd", 2, 1, 7, rope=True)
    with pytest.raises(ValueError, match="rope: expected true or false, got 1"):
        parse_workloads("[x]\nq_heads=2\nkv_heads=1\nhead_dim=8\nrope=1", "a.toml")


def test_select_keeps_the_asked_order_and_names_what_is_unknown() -> None:
    table = load_workloads()
    assert [w.name for w in select(table, ["nha-340m", "llama-3-8b", "nha-340m"])] == ["nha-340m", "llama-3-8b"]
    with pytest.raises(ValueError, match=r"workload: expected one of llama-3-8b.*got 'gpt'"):
        select(table, ["gpt"])


def test_cases_come_short_lengths_first(tiny: Workload) -> None:
    assert [case.seq_len for case in cases([tiny], [64, 16, 16], "float32")] == [16, 64]


def test_a_case_refuses_what_it_cannot_be(tiny: Workload) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of bfloat16.*'int8'"):
        Case(tiny, 1, 8, "int8")
    with pytest.raises(ValueError, match="seq_len: expected an integer >= 1, got 0"):
        Case(tiny, 1, 0, "float32")
