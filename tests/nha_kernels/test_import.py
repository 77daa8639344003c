"""Importing nha_kernels is cheap and has no effect; and a context around a call changes nothing in it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from .helpers import (
    DEVICE,
    Case,
    assert_same_gradients,
    backends,
    call,
    decode,
    dtypes,
    everything,
    leaves,
    make,
    precise,
    short,
    skip_unserved,
)

# What nhabench may use and a model does not need, and what the package may only use when it is asked to.
HEAVY = (
    "pandas", "matplotlib", "scipy", "sklearn", "rich", "typer", "transformers", "kernels", "nhabench", "fla",
    "flash_attn", "flash_attn_interface", "pynvml", "IPython",
)  # fmt: skip

# A finder sees every attempt to import, also of what is not installed.
WATCHED = """
import json, os, sys, threading, time
import torch
heavy, before = json.loads(sys.argv[1]), set(sys.modules)

class Watch:
    tried = []
    def find_spec(self, name, path=None, target=None):
        self.tried.append(name)
        return None

sys.meta_path.insert(0, Watch())
threads = threading.active_count()
start = time.perf_counter()
import nha_kernels
seconds = time.perf_counter() - start
print(json.dumps({
    "seconds": seconds,
    "heavy": sorted({name for name in Watch.tried if name.partition(".")[0] in heavy}),
    "cuda": torch.cuda.is_initialized(),
    "threads": threading.active_count() - threads,
    "file": nha_kernels.__file__,
}))
"""


def imported() -> dict[str, Any]:
    """What an import of nha_kernels does in a process of its own, and the seconds it takes beyond `import torch`."""
    command = [sys.executable, "-c", WATCHED, json.dumps(HEAVY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_it_imports_nothing_heavy_and_starts_nothing() -> None:
    found = imported()
    assert found["heavy"] == []
    assert found["cuda"] is False
    assert found["threads"] == 0


def test_it_takes_a_fraction_of_a_second() -> None:
    """The fastest of several processes: what the import costs, and not what else a machine does at the time."""
    assert min(imported()["seconds"] for _ in range(4)) <= 0.3


def test_all_public_names_are_there() -> None:
    import nha_kernels

    assert all(hasattr(nha_kernels, name) for name in nha_kernels.__all__)
    assert nha_kernels.__all__ == sorted(nha_kernels.__all__)


# ---- Contexts around a call ----


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=short)
@pytest.mark.parametrize("backend", backends())
def test_autocast_changes_nothing(backend: str, autocast: torch.dtype) -> None:
    """The dtypes of the inputs are the caller's choice."""
    dtype = torch.float32 if torch.float32 in dtypes(backend) else precise(backend)
    args = make(Case(tokens=20, past=(9,), rope=True, kv_heads=1), dtype)
    skip_unserved(backend, args)
    expected = call(args, backend)
    with torch.autocast(DEVICE, autocast):
        got = call(args, backend)
    assert got.o.dtype == dtype
    assert torch.equal(got.o, expected.o)
    assert torch.equal(got.lse, expected.lse)
    assert torch.equal(got.state.slot_k, expected.state.slot_k)


@pytest.mark.parametrize("inside", ["forward", "backward", "both"])
@pytest.mark.parametrize("backend", backends(without=["naive"], needs_grad=True))
def test_autocast_changes_no_gradient(backend: str, inside: str) -> None:
    """Around the forward pass, as it is meant to be used, or around the backward pass too: what that computes anew must
    be what was computed. (naive leaves its backward pass to autograd, and so to what is around it.)"""
    served = dtypes(backend, needs_grad=True)
    dtype = torch.float32 if torch.float32 in served else served[0]
    args, found = leaves(make(Case(tokens=80, rope=True), dtype))
    run, names = everything(backend, lse=False), list(found)

    def grads(forward: bool, backward: bool) -> dict[str, torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=forward):
            o, slot_k, slot_v = run(args)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=backward):
            got = torch.autograd.grad(o.double().sum() + slot_k.sum() + slot_v.sum(), list(found.values()))
        return dict(zip(names, got, strict=True))

    expected = grads(False, False)
    assert_same_gradients(grads(inside != "backward", inside != "forward"), expected)


def test_autocast_changes_no_decoding_step() -> None:
    args = make(Case(tokens=5, batch=2, past=(3, 9), rope=True), torch.float32)
    expected = decode(args)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = decode(args)
    assert torch.equal(got.o, expected.o)
    assert torch.equal(got.state.slot_k, expected.state.slot_k)


def test_the_default_dtype_changes_nothing() -> None:
    args = make(Case(tokens=20, past=(9,), rope=True), torch.float32)
    expected = call(args, "chunked")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        got = call(args, "chunked")
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(got.o, expected.o)
    assert got.lse.dtype == torch.float32
