"""Two versions of the kernels: their processes, what is compared, and what the outcome means to a shell."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import nha_kernels
from nhabench import cli, environment, verdicts
from nhabench.compare import Ratio
from nhabench.regress import ANSWER_S, Comparison, Prepared, Side, SideError, as_it_is, compare_versions, version
from nhabench.workloads import Case, Workload

CPU = torch.device("cpu")
CASE = Case(Workload("tiny", q_heads=4, kv_heads=2, head_dim=16, slots=8, window=8, tokens=1), 1, 48, "float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A version of its own: a copy of the package."""
    here = Path(nha_kernels.__file__).parent
    shutil.copytree(here, tmp_path / "kernels" / "nha_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kernels"


def change(folder: Path, result: str) -> None:
    """What the chunked implementation of a version gives, in terms of `o`, its output."""
    with (folder / "nha_kernels" / "__init__.py").open("a") as package:
        package.write(
            "\n_right = native_hybrid_attention\n\n\n"
            "def native_hybrid_attention(*arguments, backend='auto', **named):\n"
            "    o, state = _right(*arguments, backend=backend, **named)\n"
            f"    return (({result}) if backend == 'chunked' else o), state\n"
        )


def test_a_side_checks_and_times_its_own_version(folder: Path, tmp_path: Path) -> None:
    change(folder, "print('said by the version') or o")
    with closing(Side(folder, CPU, tmp_path / "log")) as side:
        ready = side.prepare(CASE, "chunked")
        assert (ready.status, ready.note, len(ready.o) > 0) == ("ok", "", True)
        assert [side.time() > 0 for _ in range(3)] == [True] * 3
        assert side.prepare(CASE, "flash").status == "unsupported"
        assert side.prepare(CASE, "new").note == "This version has no implementation 'new'."
        assert side.prepare(CASE, "chunked") == ready
    assert "said by the version" in (tmp_path / "log").read_text()


def test_a_wrong_version_is_told_and_one_that_fails_too(folder: Path, tmp_path: Path) -> None:
    change(folder, "o * 1.01 if o.shape[1] != 47 else 1 / 0")
    with closing(Side(folder, CPU, tmp_path / "log")) as side:
        wrong = side.prepare(CASE, "chunked")
        assert (wrong.status, wrong.note[:14]) == ("incorrect", "Relative error")
        failed = side.prepare(Case(CASE.workload, 1, 47, "float32"), "chunked")
        assert failed == Prepared("failed", "ZeroDivisionError: division by zero")


def test_a_process_that_ends_is_an_error_with_its_last_words(folder: Path, tmp_path: Path) -> None:
    change(folder, "__import__('os')._exit(7)")
    with closing(Side(folder, CPU, tmp_path / "log")) as side, pytest.raises(SideError, match=r"^exit code 7: "):
        side.prepare(CASE, "chunked")
    with pytest.raises(SideError, match=r"expected nha_kernels of .*elsewhere, got that of"):
        Side(tmp_path / "elsewhere", CPU, tmp_path / "log")


def test_a_slower_version_is_caught(folder: Path) -> None:
    change(folder, "__import__('time').sleep(0.05) or o")
    installed = Path(nha_kernels.__file__).parent.parent
    (one,) = compare_versions(installed, folder, [CASE], ["chunked"], CPU, 1.2, limit=0.1)
    assert one.verdict == "regress"
    assert one.ratio is not None
    assert one.ratio.low > 1.5


class Fake:
    """A side whose calls take what the plan says."""

    started = 0

    def __init__(self, folder: Path, device: torch.device, log: Path) -> None:
        type(self).started += 1
        self.slow = 1.5 if folder.name == "slow" else 1.0
        self.late = self.taken = 0

    def prepare(self, case: Case, implementation: str) -> Prepared:
        if implementation == f"wrong in {self.slow}":
            return Prepared("incorrect", "It is off.")
        if implementation == f"not in {self.slow}" or implementation == "nowhere":
            return Prepared("unsupported", "It cannot.")
        if implementation == f"large in {self.slow}":
            return Prepared("out of memory", "Too large.")
        if implementation == f"broken in {self.slow}":
            return Prepared("failed", "It raised.")
        if implementation == f"deadly in {self.slow}":
            raise SideError("exit code -11: it said nothing")
        self.waits = implementation == "host-bound"
        return Prepared("ok", "", [self.slow if implementation == "redefined" else 1.0, 2.0])

    def time(self) -> float:
        self.taken, self.late = self.taken + 1, self.late + self.waits
        return self.slow

    def close(self) -> None:
        pass


def fakes(base: str, new: str, *implementations: str) -> list[Comparison]:
    Fake.started = 0
    return compare_versions(
        Path(base), Path(new), [CASE], implementations, CPU, 0.0, limit=0.01, start=Fake  # type: ignore[arg-type]
    )  # fmt: skip


def test_every_round_has_new_processes_and_gives_one_ratio() -> None:
    (one,) = fakes("fast", "slow", "chunked")
    assert (one.verdict, one.ratio) == ("regress", Ratio(1.5, 1.5, 1.5, 6))
    assert Fake.started == 12
    (one,) = fakes("slow", "fast", "chunked")
    assert one.verdict == "pass"


VERDICTS = {
    "wrong in 1.5": "incorrect",
    "wrong in 1.0": "pass",  # mended
    "not in 1.5": "regress",
    "not in 1.0": "pass",  # new
    "nowhere": "pass",
    "broken in 1.5": "regress",
    "broken in 1.0": "inconclusive",
    "large in 1.5": "inconclusive",
    "large in 1.0": "inconclusive",
    "redefined": "incorrect",
}


def test_what_cannot_be_timed_has_a_verdict_too() -> None:
    found = fakes("fast", "slow", *VERDICTS)
    assert {one.implementation: one.verdict for one in found} == VERDICTS
    assert all(one.note for one in found)
    assert Fake.started == 2  # nothing was left for a second round


def test_a_process_that_dies_ends_its_comparison_only() -> None:
    found = fakes("fast", "slow", "deadly in 1.5", "chunked", "deadly in 1.0")
    assert [one.verdict for one in found] == ["regress", "regress", "inconclusive"]
    assert [one.ratio is None for one in found] == [True, False, True]
    assert "exit code -11" in found[0].note
    assert Fake.started == 2 * (2 + 5)  # new ones for what followed; the last round of the third had nothing to follow


def test_host_time_is_told() -> None:
    (one,) = fakes("fast", "fast", "host-bound")
    assert one.note == "Host time may be part of it: the device waited for the host."


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one of each, got 1 and 0"):
        fakes("fast", "slow")


def test_a_side_that_does_not_answer_is_ended(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(folder, "__import__('time').sleep(60)")
    with closing(Side(folder, CPU, tmp_path / "log")) as side:
        monkeypatch.setitem(ANSWER_S, "prepare", 0.5)
        with pytest.raises(SideError, match="no answer within"):
            side.prepare(CASE, "chunked")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "kernels" / "nha_kernels").mkdir(parents=True)
    (root / "kernels" / "nha_kernels" / "__init__.py").write_text("old = True\n")
    name = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(root), *command], check=True)
    (root / "kernels" / "nha_kernels" / "__init__.py").write_text("old = False\n")
    return root


def test_a_version_is_what_was_committed(repository: Path) -> None:
    with version("HEAD", repository) as folder:
        assert (folder / "nha_kernels" / "__init__.py").read_text() == "old = True\n"
    assert not folder.exists()
    with as_it_is(repository) as folder:
        (repository / "kernels" / "nha_kernels" / "__init__.py").write_text("edited = True\n")
        assert (folder / "nha_kernels" / "__init__.py").read_text() == "old = False\n"
    assert not folder.exists()
    expected = "base: expected a commit of this repository that has kernels/, got 'nowhere'"
    with pytest.raises(ValueError, match=expected), version("nowhere", repository):
        pass


@pytest.mark.parametrize(
    ("verdict", "code"), [("pass", 0), ("regress", 1), ("inconclusive", 3), ("incorrect", 4), (None, 70)]
)
def test_the_shell_is_told(
    verdict: Any, code: int, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compared(*arguments: object, **named: object) -> list[Comparison]:
        if verdict is None:
            raise SideError("exit code -9: [/tmp/x] it said nothing")
        return [Comparison(CASE, "chunked", verdict, Ratio(1.2, 1.1, 1.3, 6))]

    @contextmanager
    def at(ref: str, root: Path) -> Iterator[Path]:
        assert ref == "v1"
        yield root

    monkeypatch.setattr(verdicts, "compare_versions", compared)
    monkeypatch.setattr(verdicts, "version", at)
    monkeypatch.setattr(verdicts, "checkout", lambda: repository)
    monkeypatch.setattr(verdicts, "differs", lambda ref, folder: True)
    out = repository / "regress.json"
    done = CliRunner().invoke(cli.app, ["regress", "v1", "--device", "cpu", "--json", "--output", str(out)])
    assert done.exit_code == code
    assert out.exists() is (verdict is not None)
    if verdict is not None:
        told = json.loads(done.stdout)
        assert told == json.loads(out.read_text())
        assert told["environment"]["command"].startswith("python -m nhabench regress v1 --device cpu ")
        assert (told["verdict"], told["comparisons"][0]["ratio"]["high"]) == (verdict, 1.3)
    done = CliRunner().invoke(cli.app, ["regress", "v1", "--device", "cpu"])
    if verdict is not None:
        assert "1.2000 of the base's time (1.1000 to 1.3000)" in done.stdout


def test_the_same_code_is_not_compared(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "checkout", lambda: repository)
    monkeypatch.setattr(verdicts, "differs", lambda ref, folder: False)
    done = CliRunner().invoke(cli.app, ["regress", "HEAD", "--device", "cpu"])
    assert (done.exit_code, "the same code as HEAD" in done.stdout) == (0, True)


def test_what_differs_is_the_folder_and_not_the_rest(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", str(repository / "nhabench" / "environment.py"))
    (repository / "nhabench").mkdir()
    assert environment.differs("HEAD", "kernels")
    (repository / "kernels" / "nha_kernels" / "__init__.py").write_text("old = True\n")
    (repository / "README.md").write_text("new\n")
    assert not environment.differs("HEAD", "kernels")
    (repository / "kernels" / "nha_kernels" / "more.py").write_text("new = True\n")
    assert environment.differs("HEAD", "kernels")
    assert environment.checkout() == repository


def test_bad_flags_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, text in (
        (["--only", "nothing"], "--only"),
        (["--limit", "-1"], "--limit"),
        (["--seq-len", "0"], "--seq-len"),
    ):
        done = CliRunner().invoke(cli.app, ["regress", *flags])
        assert done.exit_code == 2
        assert text in done.output
    monkeypatch.setattr(verdicts, "checkout", lambda: None)
    done = CliRunner().invoke(cli.app, ["regress"])
    assert done.exit_code == 2
    assert "checkout" in done.output
