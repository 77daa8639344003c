"""Where a row comes from: code, device, software, command. Nothing that names a machine, a user or a path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from nhabench.gpu import GpuWatch

GIT_SHA_VARIABLE = "NHABENCH_GIT_SHA"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Provenance, the same for all rows of a run. Empty text or None where something is not known or does not apply."""

    date: str
    command: str
    git_sha: str
    git_dirty: bool | None
    device: str
    device_type: str
    power_cap_w: float | None
    max_sm_clock_mhz: int | None
    driver: str
    cuda: str
    cudnn: str
    torch: str
    triton: str
    ptxas: str
    python: str
    cpu: str
    cores: int


def cpu_model() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of a GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def device_slug(device: torch.device) -> str:
    """A folder name for a device: 'nvidia-h200', 'cpu-amd-epyc'."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return slug if device.type == "cuda" else f"cpu-{slug}"


def _git(*arguments: str) -> str | None:
    """Output of a git command on the checkout this package is in; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def checkout() -> Path | None:
    """The checkout of the project that this package is in; None where it is installed, or git is missing."""
    root, here = _git("rev-parse", "--show-toplevel"), Path(__file__).resolve()
    return Path(root) if root and here.is_relative_to(Path(root).resolve() / "nhabench") else None


def differs(ref: str, folder: str) -> bool:
    """Whether a folder of the checkout, what git does not track yet included, is another than in a commit."""
    tracked = _git("diff", "--name-only", ref, "--", f":/{folder}")
    return bool(tracked is None or tracked or _git("ls-files", "--others", "--exclude-standard", "--", f":/{folder}"))


def named_commit() -> tuple[str, bool] | None:
    """What NHABENCH_GIT_SHA says, a commit or "<commit>+dirty". Raises ValueError where it says anything else."""
    told = os.environ.get(GIT_SHA_VARIABLE, "").strip()
    if not told:
        return None
    named = re.fullmatch(r"([0-9a-f]{7,64})(\+dirty)?", told)
    if named is None:
        raise ValueError(f"{GIT_SHA_VARIABLE}: expected a commit's sha, or a sha and '+dirty', got {told!r}")
    return named.group(1), named.group(2) is not None


def git_state() -> tuple[str, bool | None]:
    """(commit, whether the work tree differs from it). What a bench itself writes, results/, does not count.

    The commit that the environment names comes before git's: it is named for a copy whose git knows nothing, or another
    commit. Raises ValueError where what it names is none.
    """
    named = named_commit()
    if named is not None:
        return named
    sha = _git("rev-parse", "HEAD")
    if sha is None:
        return "", None
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)results")
    return sha, None if changes is None else bool(changes)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def ptxas_version() -> str:
    """The release of the ptxas that triton calls, empty where there is none."""
    override = os.environ.get("TRITON_PTXAS_PATH")
    try:
        spec = metadata.distribution("triton")
    except metadata.PackageNotFoundError:
        return ""
    path = Path(override) if override else Path(str(spec.locate_file("triton/backends/nvidia/bin/ptxas")))
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.search(r"V(\d+(?:\.\d+)+)", done.stdout)
    return found.group(1) if found else ""


def read_environment(device: torch.device, watch: GpuWatch, command: str) -> Environment:
    """Look everything up once, at the start of a run. `command`: what a reader can type to repeat it."""
    sha, dirty = git_state()
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        git_sha=sha,
        git_dirty=dirty,
        device=device_name(device),
        device_type=device.type,
        power_cap_w=watch.power_cap_w(),
        max_sm_clock_mhz=watch.max_sm_mhz(),
        driver=watch.driver(),
        cuda=torch.version.cuda or "",
        cudnn="" if cudnn is None else str(cudnn),
        torch=torch.__version__,
        triton=_version("triton"),
        ptxas=ptxas_version(),
        python=platform.python_version(),
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )
