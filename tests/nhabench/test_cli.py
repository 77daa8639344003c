"""The command line, as a user types it."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from nhabench.cli import app
from nhabench.options import console, device_of, dtype_of
from nhabench.results import Row, load_rows, to_csv

RUNNER = CliRunner()


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.toml"
    path.write_text("[small]\nq_heads = 2\nkv_heads = 1\nhead_dim = 16\nslots = 8\nwindow = 8\n")
    return path


def test_a_tiny_bench_from_end_to_end(shapes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["bench", "--workload", "small", "--workloads-file", str(shapes), "--seq-len", "32", "--seq-len", "64"]
    ran = ("naive", "chunked", "sdpa-flash", "sdpa-math", "window", "linear")
    for name in (*ran, "sdpa-cudnn"):
        arguments += ["--only", name]
    done = RUNNER.invoke(app, [*arguments, "--device", "cpu", "--seconds-per-case", "0.02", "--output", str(out)])
    assert done.exit_code == 0, done.output
    rows = load_rows(out / "forward.csv")
    assert {row.implementation for row in rows if row.timed} == set(ran)
    assert {row.status for row in rows if row.implementation == "sdpa-cudnn"} == {"unavailable"}
    assert {(row.workload, row.batch, row.dtype) for row in rows} == {("small", 1, "float32")}
    assert rows[0].command.startswith(
        "python -m nhabench bench --workload small --workloads-file shapes.toml --seq-len 32 --seq-len 64 --only naive "
    )
    assert rows[0].command.endswith("--only sdpa-cudnn --device cpu --output out --seconds-per-case 0.02")
    assert str(tmp_path) not in (out / "forward.csv").read_text()
    assert (out / "forward-small-latency.png").exists()
    assert "NHA chunked" in done.stdout
    assert "forward.csv" in done.stdout


def test_output_that_is_no_terminals_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console(file=io.StringIO()).width == 200
    assert console(file=io.StringIO(), force_terminal=True, width=90).width == 90
    monkeypatch.setenv("COLUMNS", "120")
    assert console(file=io.StringIO()).width == 120


def test_json_is_all_that_is_printed(shapes: Path, tmp_path: Path) -> None:
    arguments = ["bench", "--workload", "small", "--workloads-file", str(shapes), "--seq-len", "16", "--device", "cpu"]
    more = ["--only", "chunked", "--only", "linear", "--window", "4", "--slots", "2", "--tokens", "32"]
    done = RUNNER.invoke(
        app, [*arguments, *more, "--seconds-per-case", "0.01", "--output", str(tmp_path / "o"), "--json"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["exit_code"] == 0
    assert [row["implementation"] for row in told["rows"]] == ["chunked", "linear"]
    assert {(row["workload"], row["window"], row["slots"], row["batch"]) for row in told["rows"]} == {
        ("small-w4-m2-n32", 4, 2, 2)
    }
    assert Path(told["csv"]).exists()


def test_rope_needs_an_even_head_size(tmp_path: Path) -> None:
    (tmp_path / "odd.toml").write_text("[odd]\nq_heads=2\nkv_heads=1\nhead_dim=7\n")
    done = RUNNER.invoke(
        app,
        ["bench", "--workloads-file", str(tmp_path / "odd.toml"), "--workload", "odd", "--rope"],
        env={"COLUMNS": "300"},
    )
    assert done.exit_code == 2
    assert "--rope" in done.output
    assert "even number with rope, got 7" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workload", "gpt"], ["--workload", "llama-3-8b", "'gpt'"]),
        (["--only", "fast"], ["--only", "chunked", "'fast'"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16", "'int8'"]),
        (["--device", "tpu9"], ["--device", "'tpu9'"]),
        (["--device", "cuda:99"], ["--device", "'cuda:99'", "CUDA device"]),
        (["--workloads-file", "absent.toml"], ["--workloads-file", "absent.toml"]),
        (["--seq-len", "512", "--seq-len", "0"], ["--seq-len", ">= 1", "got 0"]),
        (["--window", "-1"], ["--window", ">= 0", "got -1"]),
        (["--seconds-per-case", "-0.5"], ["--seconds-per-case", ">= 0", "got -0.5"]),
    ],
)
def test_bad_arguments_name_the_flag_and_what_came(arguments: list[str], words: list[str]) -> None:
    done = RUNNER.invoke(app, ["bench", *arguments], env={"COLUMNS": "300"})
    assert done.exit_code == 2
    for word in words:
        assert word in done.stderr


def test_a_foreign_csv_is_not_overwritten(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "forward.csv").write_text("a,b\n1,2\n")
    done = RUNNER.invoke(app, ["bench", "--seq-len", "16", "--device", "cpu", "--output", str(tmp_path)])
    assert done.exit_code == 2
    assert (tmp_path / "forward.csv").read_text() == "a,b\n1,2\n"


def test_plot_draws_a_csv_again(tmp_path: Path, row: Callable[..., Row]) -> None:
    csv = tmp_path / "forward.csv"
    csv.write_text(to_csv([row()]))
    done = RUNNER.invoke(app, ["plot", str(csv), "--output", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / "forward-tiny-latency.png").exists()
    csv.write_text("nonsense")
    assert RUNNER.invoke(app, ["plot", str(csv)]).exit_code == 2


def test_workloads_prints_the_table_with_a_files_additions(shapes: Path) -> None:
    done = RUNNER.invoke(app, ["workloads", "--workloads-file", str(shapes)])
    assert done.exit_code == 0
    assert "llama-3-8b" in done.stdout
    assert "small" in done.stdout


def test_a_gpu_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name) for name in (None, "cuda", "cuda:1")] == [torch.device("cuda", n) for n in (0, 0, 1)]
    assert [dtype_of(None, torch.device(kind)) for kind in ("cuda", "cpu")] == ["bfloat16", "float32"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of(None) == torch.device("cpu")


def test_a_commit_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NHABENCH_GIT_SHA", "main")
    result = RUNNER.invoke(app, ["bench", "--output", str(tmp_path / "results")])
    assert result.exit_code == 2
    assert "NHABENCH_GIT_SHA" in result.output
    assert not (tmp_path / "results").exists()


def test_the_doctor_says_what_runs_and_what_does_not() -> None:
    done = RUNNER.invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert told["found"]["torch"] == torch.__version__
    reasons = {one["name"]: one["why_not"] for one in told["contenders"]}
    assert (reasons["chunked"], reasons["naive"]) == (None, None)
    assert "CUDA" in reasons["flash"]
    done = RUNNER.invoke(app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 0
    assert "chunked" in done.stdout
    assert "why not" in done.stdout


COMMANDS = vars(typer.main.get_command(app))["commands"]


def test_every_command_can_print_json() -> None:
    assert {"bench", "regress", "selftest", "repeat", "doctor", "plot", "report", "workloads"} <= set(COMMANDS)
    without = [
        name for name, command in COMMANDS.items() if not any("--json" in option.opts for option in command.params)
    ]
    assert without == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_it_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = COMMANDS[name]
    head, _, line = command.epilog.partition(": ")
    words = shlex.split(line)
    assert (head, words[:4]) == ("Example", ["python", "-m", "nhabench", name])
    monkeypatch.chdir(Path(__file__).parents[2])  # the files of an example are those of the project
    command.make_context(name, words[4:])
    assert "Example" in RUNNER.invoke(app, [name, "--help"]).stdout


def test_json_is_one_document(tmp_path: Path, row: Callable[..., Row]) -> None:
    csv = tmp_path / "forward.csv"
    csv.write_text(to_csv([row()]))
    told = {}
    for arguments in (["workloads"], ["plot", str(csv)], ["report", str(tmp_path)], ["doctor", "--device", "cpu"]):
        done = RUNNER.invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        told[arguments[0]] = json.loads(done.stdout)
    assert told["workloads"]["workloads"][0]["name"] == "llama-3-8b"
    assert told["plot"]["plots"][0] == str(tmp_path / "forward-tiny-latency.png")
    assert Path(told["plot"]["plots"][0]).exists()
    assert told["report"]["report"] == str(tmp_path / "report.html")
