"""What selftest and repeat found, in sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nhabench.trust import percent, read_figures, repeat_sentences, selftest_sentences

Figures = dict[str, dict[str, Any]]


def test_selftest_in_sentences(figures: Figures) -> None:
    told = figures["selftest.json"]
    assert selftest_sentences(told) == [
        "Of 200 comparisons of a call with itself, 1 said that it became slower by more than 1 %.",
        "Of calls that were slowed down, it said so of 12 of 50 by 1 %, 198 of 200 by 2 %.",
        "Of 2 ways to cheat, 2 were caught or of no use.",
    ]
    told["cheats"][1]["caught"] = False
    assert selftest_sentences(told)[-1] == "Of 2 ways to cheat, 1 were caught or of no use; not so: it lies."


def test_two_timers_in_a_sentence(figures: Figures) -> None:
    told = figures["selftest.json"]
    pairs = (("a copy", 0.998), ("NHA", 1.011))
    told["timers"] = [{"call": name, "ratio": ratio, "note": ""} for name, ratio in pairs]
    sentence = "Of 2 calls, events around them and around their CUDA graphs differ by 1.1 % at most (NHA)."
    assert selftest_sentences(told)[3:] == [sentence]
    failed = {"call": "cuDNN", "ratio": None, "note": "refused"}
    told["timers"].append(failed)
    assert selftest_sentences(told)[3:] == [f"{sentence} Not timed: cuDNN (refused)."]
    told["timers"] = [failed]
    assert selftest_sentences(told)[3:] == ["Not timed: cuDNN (refused)."]


def test_repeat_in_sentences(figures: Figures) -> None:
    told = figures["repeat.json"]
    middle = "The medians of 3 fresh processes differ by 0.5 % in the median of 1 rows (limit: 1 %), "
    worst = "by 0.5 % in the worst row of 50 µs or more, NHA chunked at tiny 1 x 512 float32 (limit: 2 %)."
    assert repeat_sentences(told) == [middle + worst]
    assert repeat_sentences({**told, "worst": None, "troubles": ["It died."]}) == [
        middle + "and no row takes 50 µs.",
        "It died.",
    ]
    untimed = {**told, "rows": [], "median": None, "worst": None, "troubles": ["It died."]}
    assert repeat_sentences(untimed) == ["No row was timed by every process.", "It died."]


def test_the_source_of_figures_is_that_of_their_file(figures: Figures, tmp_path: Path) -> None:
    assert read_figures(tmp_path, []) == []
    told = figures["selftest.json"]
    told["environment"] |= {"git_sha": "abc", "git_dirty": True, "date": "2026-01-02", "device": "A GPU", "driver": "5"}
    told["environment"] |= {"torch": "2.13.0", "triton": "3.7.1"}
    (tmp_path / "selftest.json").write_text(json.dumps(told))
    (elsewhere,) = read_figures(tmp_path, ["Another GPU"])
    assert elsewhere.sentences[-1] == "Measured elsewhere, on A GPU."
    (one,) = read_figures(tmp_path, ["A GPU"])
    assert one.sentences == elsewhere.sentences[:-1]
    assert (one.file, one.passed) == ("selftest.json", True)
    assert one.source == (
        "python -m nhabench selftest: 2026-01-02, A GPU, torch 2.13.0, triton 3.7.1, driver 5, commit abc (changed)"
    )


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0 %"), (0.00312, "0.312 %"), (0.02, "2 %"), (0.0201, "2.01 %"), (12.344, "1234 %")]
)
def test_percent(fraction: float, text: str) -> None:
    assert percent(fraction) == text
