"""Provenance: complete, and without anything that names a machine or a person."""

from __future__ import annotations

import dataclasses
import getpass
import platform
from pathlib import Path

import pytest
import torch

from nhabench import environment
from nhabench.environment import device_slug, git_state, read_environment
from nhabench.gpu import GpuWatch
from nhabench.options import command_of

CPU = torch.device("cpu")


def test_it_says_what_ran() -> None:
    made = read_environment(CPU, GpuWatch(CPU), "python -m nhabench bench")
    assert made.torch == torch.__version__
    assert made.python == platform.python_version()
    assert made.device_type == "cpu"
    assert made.device == made.cpu != ""
    assert made.cores >= 1
    assert made.date.endswith("+00:00")
    assert (made.power_cap_w, made.driver) == (None, "")


def test_it_names_no_machine_and_no_folder() -> None:
    made = read_environment(CPU, GpuWatch(CPU), "python -m nhabench bench")
    text = " ".join(str(value) for value in dataclasses.astuple(made))
    assert str(Path(__file__).parents[2]) not in text
    assert str(Path.home()) + "/" not in text
    node = platform.node()
    assert node in ("", "localhost", "linux") or node not in text.split()
    assert getpass.getuser() not in text.split()


def test_the_command_repeats_the_run_without_paths_of_this_machine() -> None:
    flags = {
        "workload": ["a", "b"],
        "window": 3,
        "slots": None,
        "rope": True,
        "resume": False,
        "output": Path("/srv/me/out"),
        "workloads-file": Path("x/y.toml"),
    }
    assert (
        command_of("bench", flags)
        == "python -m nhabench bench --workload a --workload b --window 3 --rope --output out --workloads-file x/y.toml"
    )


@pytest.mark.parametrize(
    ("name", "kind", "slug"),
    [("NVIDIA H200", "cuda", "nvidia-h200"), ("AMD EPYC 9B14 96-Core", "cpu", "cpu-amd-epyc-9b14-96-core"),
     ("Intel(R) Xeon(R) CPU", "cpu", "cpu-intel-r-xeon-r-cpu")],
)  # fmt: skip
def test_slugs(name: str, kind: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "device_name", lambda device: name)
    assert device_slug(torch.device(kind)) == slug


def test_without_a_checkout_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.delenv("NHABENCH_GIT_SHA", raising=False)
    assert git_state() == ("", None)


def test_the_environment_may_name_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    sha = "0123456789abcdef" * 2 + "01234567"
    for told, state in (
        (sha, (sha, False)),
        (f"{sha}+dirty\n", (sha, True)),
        ("", ("", None)),
    ):
        monkeypatch.setenv("NHABENCH_GIT_SHA", told)
        monkeypatch.setattr(environment, "_git", lambda *arguments: None)
        assert git_state() == state
        monkeypatch.setattr(environment, "_git", lambda *arguments: "abc" if arguments[0] == "rev-parse" else "")
        # A copy may have a git that knows another commit.
        assert git_state() == (state if state[0] else ("abc", False))
    for told in ("main", f"{sha}+changed", "abc"):
        monkeypatch.setenv("NHABENCH_GIT_SHA", told)
        with pytest.raises(ValueError, match=r"^NHABENCH_GIT_SHA: expected a commit's sha, or .*, got '"):
            git_state()


def test_dirty_is_what_git_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NHABENCH_GIT_SHA", raising=False)
    for listed, dirty in (("", False), (" M nhabench/cli.py", True)):
        answers = {"rev-parse": "abc", "status": listed}
        monkeypatch.setattr(environment, "_git", lambda *arguments, answers=answers: answers[arguments[0]])
        assert git_state() == ("abc", dirty)
