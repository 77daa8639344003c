"""Which implementation serves a call: what is chosen, and the sentence that says why each other one is not."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest
import torch

from nha_kernels import (
    BACKENDS,
    Explanation,
    UnsupportedCall,
    available_backends,
    explain,
    flash_window,
    native_hybrid_attention,
)
from nha_kernels.dispatch import CPU_ORDER, ORDER, choose, explain_problem
from nha_kernels.registry import IMPLEMENTATIONS

from .helpers import DEVICE, ON_GPU, Case, call, describe, judge, make, skip_unserved

ON_HOPPER = dict(device="cuda", capability=(9, 0))


# ---- explain ----


@pytest.mark.parametrize(
    "case", [Case(tokens=20), Case(tokens=20, window=0), Case(tokens=20, strength=True, past=(3,))]
)
def test_on_the_cpu_chunked_is_chosen(case: Case) -> None:
    answer = explain(**make(case, torch.float32, device="cpu"))
    assert answer.chosen == "chunked"
    assert set(answer.passed_over) == set(BACKENDS) - {"chunked"}
    assert "CUDA" in answer.passed_over["flash"]
    assert "cpu" in answer.passed_over["flash"]
    assert answer.passed_over["triton"]
    assert "chunked" in answer.passed_over["naive"]


def test_it_reads_well() -> None:
    text = str(explain(**make(Case(tokens=20), torch.float32, device="cpu")))
    lines = text.splitlines()
    assert lines[0] == "chunked: chosen"
    assert len(lines) == len(BACKENDS)
    for name in set(BACKENDS) - {"chunked"}:
        assert re.search(rf"^{name}: \w.{{20,}}", text, flags=re.MULTILINE), name


def test_it_takes_the_arguments_of_the_call() -> None:
    of_call = inspect.signature(native_hybrid_attention).parameters
    of_explain = inspect.signature(explain).parameters
    assert {name: p.default for name, p in of_explain.items()} == {
        name: p.default for name, p in of_call.items() if name != "backend"
    }


def test_it_describes_the_call() -> None:
    args = make(Case(tokens=12, lengths=(5, 7), past=(2, 3), window=4, delay=6, rope=True, strength=True, mask=True))
    problem = explain(**args, return_lse=True, output_final_state=True).problem
    size = args["q"].shape[-1]
    assert (problem.batch, problem.tokens, problem.sequences) == (1, 12, 2)
    assert (problem.q_heads, problem.kv_heads, problem.group) == (4, 2, 2)
    assert (problem.head_dim, problem.value_dim, problem.slots) == (size, size, 16)
    assert (problem.window, problem.delay, problem.history) == (4, 6, 6)
    assert (problem.dtype, problem.gate_dtype, problem.device) == (torch.float64, torch.float64, DEVICE)
    assert (problem.capability is None) == (not ON_GPU)
    assert (problem.packed, problem.positions, problem.explicit_strength) == (True, "rope", True)
    assert (problem.mask_empty_slots, problem.has_state, problem.needs_grad) == (True, True, False)
    assert (problem.output_final_state, problem.return_lse) == (True, True)
    assert {problem: 1}[problem] == 1  # a key
    assert explain(**make(Case(tokens=12, given=True))).problem.positions == "given"
    assert explain(**make(Case(tokens=12, window=9, delay=0))).problem.history == 8


@pytest.mark.parametrize("name", ["q", "v", "g", "s", "q_window", "k_window"])
def test_it_sees_that_a_gradient_is_needed(name: str) -> None:
    args = make(Case(tokens=5, strength=True, given=True))
    args[name].requires_grad_()
    assert explain(**args).problem.needs_grad
    with torch.no_grad():
        assert not explain(**args).problem.needs_grad


def test_it_sees_that_a_state_needs_a_gradient() -> None:
    args = make(Case(tokens=5, past=(4,)))
    args["initial_state"].slot_k.requires_grad_()
    assert explain(**args).problem.needs_grad


def test_it_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> None:
        pytest.fail("explain ran an implementation")

    args = make(Case(tokens=5))
    for name, made in IMPLEMENTATIONS.items():
        monkeypatch.setitem(IMPLEMENTATIONS, name, type(made)(name, made.why_not, made.why_unavailable, run))
    assert isinstance(explain(**args), Explanation)


@pytest.mark.skipif(not ON_GPU, reason="what is chosen on a GPU is asked on a GPU")
def test_on_a_gpu_a_kernel_is_chosen() -> None:
    args = make(Case(tokens=100, head_dim=128, window=64), torch.bfloat16)
    assert explain(**args).chosen in ("triton", "flash")
    args["q"].requires_grad_()
    assert explain(**args).chosen in ("triton", "flash", "chunked")
    assert explain(**make(Case(tokens=100))).chosen == "chunked"  # float64


# ---- What is there ----


def test_naive_and_chunked_are_everywhere() -> None:
    for device in ("cpu", "cuda", "mps", "meta"):
        assert {"naive", "chunked"} <= set(available_backends(device)), device


def test_flash_is_not_on_the_cpu() -> None:
    assert "flash" not in available_backends("cpu")
    assert available_backends(torch.device("cpu")) == available_backends("cpu")


def test_the_default_device_is_the_one_there_is() -> None:
    assert available_backends() == available_backends(DEVICE)


def test_every_backend_has_a_place_in_the_order() -> None:
    assert sorted(ORDER) == sorted(CPU_ORDER) == sorted(BACKENDS)
    assert ORDER[-1] == "naive"


@pytest.mark.parametrize("window", [0, 64, 4096])
def test_on_a_gpu_the_most_fused_that_can_is_chosen(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, made in list(IMPLEMENTATIONS.items()):
        monkeypatch.setitem(IMPLEMENTATIONS, name, type(made)(name, made.why_not, lambda device: None, made.run))
    problem = describe(**ON_HOPPER, window=window)
    assert choose(problem, "auto").name == "triton"
    assert choose(replace(problem, needs_grad=True), "auto").name == "triton"
    wide = replace(problem, head_dim=512, needs_grad=True)
    assert choose(wide, "auto").name == "chunked"
    assert choose(replace(problem, dtype=torch.float64), "auto").name == "chunked"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_named_is_used_or_says_why_not(backend: str) -> None:
    args = make(Case(tokens=20), torch.float32, device="cpu")
    reason = {**explain(**args).passed_over}.get(backend, "")
    if backend in available_backends("cpu"):
        o, _ = native_hybrid_attention(**args, backend=backend)
        assert o.isfinite().all()
    else:
        with pytest.raises(UnsupportedCall, match=re.escape(reason)) as caught:
            native_hybrid_attention(**args, backend=backend)
        assert f"backend={backend!r}" in str(caught.value)
        assert isinstance(caught.value, NotImplementedError)


def test_naming_a_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is named runs, and no other."""
    ran = []
    args = make(Case(tokens=5), torch.float32, device="cpu")
    for name, made in list(IMPLEMENTATIONS.items()):

        def run(problem: Any, inputs: Any, name: str = name, made: Any = made) -> Any:
            ran.append(name)
            return made.run(problem, inputs)

        monkeypatch.setitem(IMPLEMENTATIONS, name, type(made)(name, made.why_not, made.why_unavailable, run))
    for name in ("naive", "chunked"):
        ran.clear()
        native_hybrid_attention(**args, backend=name)
        assert ran == [name]
    ran.clear()
    native_hybrid_attention(**args)
    assert ran == [explain(**args).chosen]


# ---- Limits ----

FLASH_LIMITS = {
    "float32": (dict(dtype=torch.float32), r"float16 or bfloat16, not float32"),
    "float64": (dict(dtype=torch.float64), r"float16 or bfloat16, not float64"),
    "an old GPU": (dict(capability=(7, 5)), r"compute capability 8\.0, this GPU has \(7, 5\)"),
    "other value size": (dict(value_dim=128), r"D = Dv, not 64 and 128"),
    "a head size above 256": (dict(head_dim=264, value_dim=264), r"multiples of 8 up to 256.*not 264"),
    "an odd head size": (dict(head_dim=60, value_dim=60), r"multiples of 8 up to 256.*not 60"),
    "no window": (dict(window=0), r"window_size = 0"),
    "gradient of the lse": (dict(return_lse=True, needs_grad=True), r"no gradient for the log-sum-exp"),
}
TRITON_LIMITS = {
    "the gradient of a wide head": (dict(needs_grad=True, value_dim=272), r"backward.*up to 256, not Dv = 272"),
    "float64": (dict(dtype=torch.float64), r"not float64"),
    "a head size above 512": (dict(head_dim=528), r"up to 512 as head size, not D = 528"),
    "a value size above 512": (dict(value_dim=528), r"up to 512 as head size, not Dv = 528"),
    "too many slots": (dict(slots=257), r"up to 256 slots, not 257"),
}


@pytest.mark.parametrize("name", FLASH_LIMITS)
def test_flash_names_its_limits(name: str) -> None:
    sizes, message = FLASH_LIMITS[name]
    reason = IMPLEMENTATIONS["flash"].why_not(describe(**{**ON_HOPPER, **sizes}))
    assert reason is not None
    assert re.search(message, reason)


@pytest.mark.parametrize("name", TRITON_LIMITS)
def test_triton_names_its_limits(name: str) -> None:
    sizes, message = TRITON_LIMITS[name]
    reason = IMPLEMENTATIONS["triton"].why_not(describe(**{**ON_HOPPER, **sizes}))
    assert reason is not None
    assert re.search(message, reason)


@pytest.mark.parametrize("backend", ["flash", "triton"])
@pytest.mark.parametrize("sizes", [
    dict(), dict(dtype=torch.bfloat16), dict(head_dim=128, value_dim=128), dict(head_dim=256, value_dim=256),
    dict(q_heads=28, kv_heads=4), dict(q_heads=1, kv_heads=1), dict(tokens=1), dict(window=1), dict(window=10**6),
    dict(delay=0), dict(delay=1000), dict(slots=1), dict(slots=256), dict(packed=True, sequences=7),
    dict(positions="rope"), dict(positions="given"), dict(explicit_strength=True), dict(mask_empty_slots=True),
    dict(has_state=True), dict(output_final_state=True), dict(return_lse=True), dict(gate_dtype=torch.float16),
    dict(capability=(8, 0)), dict(capability=(10, 0)),
], ids=str)  # fmt: skip
def test_kernels_serve_what_they_are_for(backend: str, sizes: dict[str, Any]) -> None:
    assert IMPLEMENTATIONS[backend].why_not(describe(**{**ON_HOPPER, **sizes})) is None


@pytest.mark.parametrize("sizes", [dict(head_dim=512), dict(value_dim=512), dict(head_dim=272, value_dim=320)], ids=str)
def test_triton_serves_wide_heads(sizes: dict[str, Any]) -> None:
    assert IMPLEMENTATIONS["triton"].why_not(describe(**{**ON_HOPPER, **sizes})) is None


@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_kernels_serve_gradients(backend: str) -> None:
    assert IMPLEMENTATIONS[backend].why_not(describe(**ON_HOPPER, needs_grad=True)) is None


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize(
    "sizes", [{}, *(sizes for sizes, _ in (*FLASH_LIMITS.values(), *TRITON_LIMITS.values()))], ids=str
)
def test_the_others_have_no_limits(backend: str, sizes: dict[str, Any]) -> None:
    problem = describe(**{**ON_HOPPER, **sizes})
    assert IMPLEMENTATIONS[backend].why_not(problem) is None
    assert choose(problem, "auto").name in BACKENDS
    assert explain_problem(problem).chosen == choose(problem, "auto").name


@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_a_limit_is_in_the_error(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As raised by a call, where the machine has the backend and the call is what it cannot serve."""
    made = IMPLEMENTATIONS[backend]
    monkeypatch.setitem(IMPLEMENTATIONS, backend, type(made)(backend, made.why_not, lambda device: None, made.run))
    with pytest.raises(UnsupportedCall, match=rf"^backend='{backend}' cannot serve this call: .*not float64"):
        native_hybrid_attention(**make(Case(tokens=5)), backend=backend)


# ---- Which flash-attention kernel ----


@pytest.fixture
def fresh() -> Iterator[None]:
    """flash_window remembers what it found; not across these tests."""
    flash_window._select.cache_clear()
    yield
    flash_window._select.cache_clear()


def flash_attn_2(max_seqlen_k: int, softmax_scale: float, window_size_left: int, window_size_right: int) -> None:
    """Stands for the private functions of flash-attn: their parameters count."""


def flash_attn_3(cu_seqlens_k: int, max_seqlen_k: int, window_size_left: int, window_size_right: int) -> None:
    """Stands for the private functions of flash-attn-3."""


def install(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    capability: tuple[int, int] = (9, 0),
    torch_version: str = "2.13.0+cu130",
) -> None:
    """A machine with such a GPU, these distributions and no others of theirs."""
    real = metadata.version

    def version(name: str) -> str:
        if not name.startswith("flash"):
            return real(name)
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    modules = {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {
            "_flash_attn_varlen_forward": flash_attn_2,
            "_flash_attn_varlen_backward": flash_attn_2,
        },
        "flash_attn_interface": {"_flash_attn_forward": flash_attn_3, "_flash_attn_backward": flash_attn_3},
    }
    for name, functions in modules.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


TORCH = "FlashAttention-2 of torch 2.13.0+cu130"
KERNELS = {
    "nothing installed": ({}, (9, 0), TORCH),
    "flash-attn": ({"flash-attn": "2.8.3"}, (9, 0), "flash-attn 2.8.3"),
    "flash-attn, the oldest": ({"flash-attn": "2.7.0.post2"}, (8, 0), "flash-attn 2.7.0.post2"),
    "flash-attn-3": ({"flash-attn-3": "3.0.0b1"}, (9, 0), "flash-attn-3 3.0.0b1"),
    "flash-attn-3 on another GPU": ({"flash-attn-3": "3.0.0"}, (8, 0), TORCH),
    "both on Hopper": ({"flash-attn-3": "3.0.0", "flash-attn": "2.8.3"}, (9, 0), "flash-attn-3 3.0.0"),
    "both on Ampere": ({"flash-attn-3": "3.0.0", "flash-attn": "2.8.3"}, (8, 0), "flash-attn 2.8.3"),
}
UNUSABLE = {
    "too old": ({"flash-attn": "2.6.3"}, r"flash-attn 2\.6\.3 .*outside 2\.7 <= version < 3\.0", TORCH),
    "too new": ({"flash-attn": "3.0.0"}, r"flash-attn 3\.0\.0 .*outside 2\.7 <= version < 3\.0", TORCH),
    "no version": ({"flash-attn": "unknown"}, r"flash-attn unknown .*outside", TORCH),
    "3, too new": ({"flash-attn-3": "4.0.0"}, r"flash-attn-3 4\.0\.0 .*outside 3\.0 <= version < 4\.0", TORCH),
    "3, too new, beside a good one": (
        {"flash-attn-3": "4.0.0", "flash-attn": "2.8.3"}, r"flash-attn-3 4\.0\.0 .*outside", "flash-attn 2.8.3",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_the_newest_that_is_known_to_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, capability, expected = KERNELS[name]
    install(monkeypatch, versions, capability)
    assert flash_window.why_unavailable() is None
    assert flash_window.window_kernel(capability).name == expected


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_package_that_is_not_used_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, message, expected = UNUSABLE[name]
    install(monkeypatch, versions)
    with pytest.warns(UserWarning, match=message):
        assert flash_window.window_kernel((9, 0)).name == expected


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("module", ["flash_attn.flash_attn_interface", "flash_attn_interface"])
@pytest.mark.parametrize("what", ["no module", "no function", "other parameters"])
def test_a_package_that_has_changed_inside_is_not_used(module: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its private functions are called, so they are looked at first."""
    distribution, version = ("flash-attn", "2.8.3") if "." in module else ("flash-attn-3", "3.0.0")
    install(monkeypatch, {distribution: version})
    if what == "no module":
        monkeypatch.setitem(sys.modules, module, None)
    for name in [name for name in vars(sys.modules[module] or object) if name.startswith("_flash_attn")]:
        if what == "no function":
            monkeypatch.delattr(sys.modules[module], name)
        elif what == "other parameters":
            monkeypatch.setattr(sys.modules[module], name, lambda q, k, v: None)
    with pytest.warns(UserWarning, match=rf"{distribution} .*is installed but not used"):
        assert flash_window.window_kernel((9, 0)).name == TORCH


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("version", "known"), [
    ("2.10.1", False), ("2.11.0", True), ("2.13.0+cu130", True), ("2.15.3", True), ("2.16.0", False),
    ("3.0.0a0", False),
])  # fmt: skip
def test_torch_outside_the_known_versions_is_not_trusted(
    version: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, {}, torch_version=version)
    reason = flash_window.why_unavailable()
    assert (reason is None) == known
    if reason is not None:
        assert version in reason
        assert re.search(r"2\.11 <= \w+ < 2\.16", reason)


@pytest.mark.usefixtures("fresh")
def test_flash_attn_makes_up_for_an_unknown_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"flash-attn": "2.8.3"}, (8, 0), torch_version="2.20.0")
    assert flash_window.why_unavailable() is None
    assert flash_window.window_kernel((8, 0)).name == "flash-attn 2.8.3"


@pytest.mark.usefixtures("fresh")
def test_what_is_said_to_be_available_has_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-3 is for Hopper: on another GPU it does not make up for an unknown torch."""
    install(monkeypatch, {"flash-attn-3": "3.0.0"}, (8, 0), torch_version="2.20.0")
    assert "torch 2.20.0" in str(flash_window.why_unavailable())
    with pytest.raises(RuntimeError, match=r"torch 2\.20\.0"):
        flash_window.window_kernel((8, 0))


@pytest.mark.usefixtures("fresh")
def test_no_gpu_rocm_and_a_torch_without_the_kernel_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {})
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "built without FlashAttention-2" in str(flash_window.why_unavailable())
    flash_window._select.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(flash_window.why_unavailable())
    with pytest.raises(RuntimeError, match="ROCm"):
        flash_window.window_kernel((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA GPU" in str(flash_window.why_unavailable())


def test_looking_for_a_distribution_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.3" if name == "flash-attn" else real(name))
    before = set(sys.modules)
    assert flash_window.installed_version("flash-attn") == "2.8.3"
    assert flash_window.installed_version("no-such-distribution") is None
    assert not {name for name in set(sys.modules) - before if name.startswith("flash")}


FLASH_ATTN = [flash_window.installed_version(name) for name in ("flash-attn-3", "flash-attn")]


@pytest.mark.skipif(not any(FLASH_ATTN), reason="the flash-attn package is not installed")
@pytest.mark.skipif(not ON_GPU, reason="flash-attention kernels need a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_with_the_flash_attn_package(dtype: torch.dtype) -> None:
    """The other tests of flash run with whatever kernel is chosen; this one says that it is the package's."""
    kernel = flash_window.window_kernel(torch.cuda.get_device_capability())
    assert any(version and version in kernel.name for version in FLASH_ATTN)
    args = make(Case(tokens=150, lengths=(90, 1, 59), past=(9, 0, 30), window=20, head_dim=64), dtype)
    skip_unserved("flash", args)
    judge(args).accept(call(args, "flash"))
