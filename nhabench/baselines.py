"""What native hybrid attention is raced against: full, window-only and linear attention, one small record each.

Sizes as in nhabench.floors; G = HQ / H query heads share a kv head. A contender takes q [B,T,HQ,D], k and v [B,T,H,D]
and returns o [B,T,HQ,D]. Of a workload with a rotary embedding, softmax attention is given q and k that are rotated
before the timed call, and linear attention those that are not.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nhabench.contender import Call, Contender, Unsupported
from nhabench.floors import (
    FloorFunction,
    delta_rule_floor,
    full_floor,
    gla_floor,
    gsa_floor,
    linear_floor,
    simple_gla_floor,
    window_floor,
)
from nhabench.inputs import Inputs, offsets
from nhabench.outputs import Step
from nhabench.training import leaf, step
from nhabench.workloads import Case

if TYPE_CHECKING:
    from nha_kernels.flash_window import Packing, WindowKernel

PACKED = "It takes no packed sequences: it would attend across their boundaries."
MATH_BYTES = 4 * 2**30  # what the T x T matrices of the math backend may take


def installed(*distributions: str) -> bool:
    """Whether one of the distributions is installed. Nothing is imported: an import could start a GPU toolchain."""
    for name in distributions:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


def repeat_heads(x: torch.Tensor, q_heads: int) -> torch.Tensor:
    """[B,T,H,...] -> [B,T,HQ,...]: each kv head once for each of its query heads."""
    return x.repeat_interleave(q_heads // x.shape[2], dim=2)


# Definitions at small T, in the dtype of the inputs -------------------------------------------------------------------


def masked_softmax(inputs: Inputs, window: int) -> torch.Tensor:
    """Softmax attention straight from its definition: query t sees the keys t - window < j <= t."""
    heads, inputs = inputs.q.shape[2], inputs.rotated
    q, k, v = (repeat_heads(x, heads).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    t = torch.arange(q.shape[2], device=q.device)
    distance = t[:, None] - t  # [T, T]
    visible = (distance >= 0) & (distance < window)
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def linear_direct(inputs: Inputs) -> torch.Tensor:
    """o_t = D**-0.5 * sum over j <= t of (q_t . k_j) v_j, with the T x T matrix."""
    heads = inputs.q.shape[2]
    q, k, v = (repeat_heads(x, heads).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    return ((q @ k.mT).tril() * q.shape[-1] ** -0.5 @ v).transpose(1, 2)


# Full attention -------------------------------------------------------------------------------------------------------

_SDPA: dict[str, tuple[SDPBackend, str, str]] = {
    "sdpa-flash": (SDPBackend.FLASH_ATTENTION, "full: SDPA flash", ""),
    "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, "full: cuDNN", ""),
    "sdpa-efficient": (
        SDPBackend.EFFICIENT_ATTENTION,
        "full: SDPA mem-efficient",
        "Takes no grouped heads: k and v are repeated inside the timed call.",
    ),
    "sdpa-math": (SDPBackend.MATH, "full: SDPA math", ""),
}


def _run_sdpa(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [B,HQ,T,D], k and v [B,H,T,D] -> [B,HQ,T,D]."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and backend is SDPBackend.EFFICIENT_ATTENTION:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)


def _refusal(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, error: Exception) -> Unsupported:
    """Ask once more, to collect the reasons that torch gives as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(RuntimeError):
            _run_sdpa(backend, q, k, v)
    # "... (Triggered internally at file:line)" is for the developers of torch.
    reasons = {str(warning.message).split(" (Triggered")[0].strip() for warning in caught}
    known = sorted(reason for reason in reasons if "not used because" not in reason)
    return Unsupported(f"torch has no such kernel for this case: {' '.join(known) or error}")


def _sdpa_contender(name: str) -> Contender:
    backend, label, remark = _SDPA[name]

    def bind(inputs: Inputs) -> Call:
        x = inputs.rotated

        def call() -> torch.Tensor:
            q, k, v = x.q.transpose(1, 2), x.k.transpose(1, 2), x.v.transpose(1, 2)
            try:
                return _run_sdpa(backend, q, k, v).transpose(1, 2)
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise _refusal(backend, q, k, v, error) from error

        return call

    def missing(device: torch.device) -> str | None:
        if device.type != "cuda" and backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            return f"This backend of scaled_dot_product_attention needs a CUDA GPU, not {device.type}."
        if backend is SDPBackend.CUDNN_ATTENTION and not torch.backends.cudnn.is_available():
            return "This installation of torch has no cuDNN."
        return None

    def cannot(case: Case, device: torch.device) -> str | None:
        if case.sequences:
            return PACKED
        # Logits and probabilities in fp32, whatever the dtype.
        needed = case.batch * case.workload.q_heads * case.seq_len**2 * 8
        if backend is SDPBackend.MATH and needed > MATH_BYTES:
            return (
                f"Its T x T matrices take {needed / 2**30:.0f} GiB, over the limit of {MATH_BYTES >> 30} GiB set here."
            )
        return None

    return Contender(
        name, label, "full", full_floor, bind, missing, cannot, True, lambda x: masked_softmax(x, x.q.shape[1]), remark
    )


def _flash_attn_contender(name: str, label: str, module: str, distributions: tuple[str, ...]) -> Contender:
    """Causal attention of the flash-attn package, version 2 or 3."""

    def missing(device: torch.device) -> str | None:
        if not installed(*distributions):
            return f"{distributions[0]} is not installed."
        return None if device.type == "cuda" else f"{distributions[0]} needs a CUDA GPU, not {device.type}."

    def cannot(case: Case, device: torch.device) -> str | None:
        return f"{distributions[0]} takes 16-bit inputs, not float32." if case.dtype == "float32" else None

    def bind(inputs: Inputs) -> Call:
        package, x = importlib.import_module(module), inputs.rotated
        if x.cu_seqlens is None:
            attend = partial(package.flash_attn_func, causal=True)
        else:
            cu, longest = x.cu_seqlens, max(x.case.lengths)
            attend = partial(
                package.flash_attn_varlen_func, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest,
                max_seqlen_k=longest, causal=True,
            )  # fmt: skip

        def call() -> torch.Tensor:
            q, k, v = (x.q, x.k, x.v) if x.cu_seqlens is None else (x.q[0], x.k[0], x.v[0])
            out: Any = attend(q, k, v)
            result: torch.Tensor = out[0] if isinstance(out, tuple) else out  # early FA3 adds the log-sum-exp
            return result.view_as(x.q)

        return call

    return Contender(
        name, label, "full", full_floor, bind, missing, cannot, True, lambda x: masked_softmax(x, x.q.shape[1])
    )


# Window-only attention ------------------------------------------------------------------------------------------------


def blocked_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal attention over the last `window` tokens in O(T): each block of W queries sees its own and the last block.

    q [B,T,HQ,D], k and v [B,T,H,D] -> o [B,T,HQ,D]; plain PyTorch, any device and dtype. cu_seqlens: of packed
    sequences, with B = 1.
    """
    batch, length, heads, size = q.shape
    window = min(window, length)
    blocks = -(-length // window)
    fill = blocks * window - length

    def fold(x: torch.Tensor) -> torch.Tensor:  # [B, T, h, D] -> [B, blocks, W, h, D]
        return F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (blocks, window))

    def with_previous(x: torch.Tensor) -> torch.Tensor:  # [B, T, h, D] -> [B*blocks, h, 2W, D]
        folded = fold(x)
        previous = F.pad(folded, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat((previous, folded), 2).flatten(0, 1).transpose(1, 2)

    t = torch.arange(window, device=q.device)
    distance = t[:, None] + window - torch.arange(2 * window, device=q.device)  # [W, 2W]
    band = ((distance >= 0) & (distance < window)).repeat(blocks, 1, 1)  # [blocks, W, 2W]
    band[0, :, :window] = False  # the first block has no previous one
    if cu_seqlens is not None:
        owner = torch.arange(len(cu_seqlens) - 1, device=q.device).repeat_interleave(
            cu_seqlens.diff(), output_size=length
        )
        owner = F.pad(owner, (window, fill)).unfold(0, 2 * window, window)  # [blocks, 2W]: whose a token is
        band &= owner[:, window:, None] == owner[:, None]
    mask = band.repeat(batch, 1, 1).unsqueeze(1)  # [B*blocks, 1, W, 2W]
    o = F.scaled_dot_product_attention(
        fold(q).flatten(0, 1).transpose(1, 2),
        with_previous(k),
        with_previous(v),
        attn_mask=mask,
        enable_gqa=heads != k.shape[2],
    )
    return o.transpose(1, 2).reshape(batch, blocks * window, heads, size)[:, :length]


class _WindowKernel(torch.autograd.Function):
    """(kernel, packing, q [B*T,HQ,D], k and v [B*T,H,D]) -> o [B*T,HQ,D], with the kernel's own backward pass."""

    @staticmethod
    def forward(ctx: Any, kernel: WindowKernel, packing: Packing, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv
        o, lse, ctx.saved = kernel.forward(q, k, v, packing)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.kernel, ctx.packing = kernel, packing
        return o

    @staticmethod
    def backward(ctx: Any, do: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.kernel.backward(do, *ctx.saved_tensors, ctx.packing, ctx.saved)


def _window_contender() -> Contender:
    """The window alone: a flash kernel where there is one (CUDA, 16 bit), blocks through SDPA elsewhere."""

    def bind(inputs: Inputs) -> Call:
        window, x = inputs.case.workload.window, inputs.rotated
        if not _flash_window(inputs.case, inputs.q.device):
            return lambda: blocked_window(x.q, x.k, x.v, window, x.cu_seqlens)
        from nha_kernels.flash_window import Packing, window_attention, window_kernel

        scale = inputs.q.shape[-1] ** -0.5
        if x.cu_seqlens is None and not x.case.training:
            return lambda: window_attention(x.q, x.k, x.v, window, scale)
        kernel = window_kernel(torch.cuda.get_device_capability(x.q.device))
        longest = max(x.case.lengths)
        cu = offsets(x.case, x.q.device) if x.cu_seqlens is None else x.cu_seqlens
        packing = Packing(cu, cu, longest, longest, window, scale)
        if x.case.training:
            qkv = x.q, x.k, x.v
            return lambda: _WindowKernel.apply(kernel, packing, *(y.flatten(0, 1) for y in qkv)).view_as(x.q)
        return lambda: kernel.forward(x.q[0], x.k[0], x.v[0], packing)[0].view_as(x.q)

    def cannot(case: Case, device: torch.device) -> str | None:
        if case.workload.window == 0:
            return "The window is 0: there is nothing to attend to."
        if _flash_window(case, device):
            from nha_kernels.flash_window import why_unavailable

            reason = why_unavailable()
            return None if reason is None else f"{reason[0].upper()}{reason[1:]}."
        return None

    return Contender(
        name="window",
        label="window alone",
        family="window",
        floor=window_floor,
        bind=bind,
        cannot=cannot,
        exact=lambda inputs: masked_softmax(inputs, inputs.case.workload.window),
    )


def _flash_window(case: Case, device: torch.device) -> bool:
    return device.type == "cuda" and case.dtype != "float32"


# Linear attention -----------------------------------------------------------------------------------------------------


def chunked_linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """Linear attention without gates, in chunks: the state of all earlier chunks, and the own chunk directly.

    q [B,T,HQ,D], k and v [B,T,H,D] -> o [B,T,HQ,D]. States are summed in fp32; plain PyTorch, any device and dtype.
    """
    batch, length, heads, size = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    fill = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, chunk)) for x in (q, k, v))
    q = q.unflatten(3, (kv_heads, group)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)  # [B, N, H, G*C, D]
    k, v = k.transpose(2, 3), v.transpose(2, 3)  # [B, N, H, C, D]
    states = (k.mT @ v).float()  # [B, N, H, D, D]
    before = (states.cumsum(1) - states).to(q.dtype)
    scores = (q @ k.mT).unflatten(3, (group, chunk)).tril().flatten(3, 4)  # [B, N, H, G*C, C]
    o = torch.baddbmm((scores @ v).flatten(0, 2), q.flatten(0, 2), before.flatten(0, 2))
    o = o.mul_(size**-0.5).view(batch, -1, kv_heads, group, chunk, size).permute(0, 1, 4, 2, 3, 5)
    return o.reshape(batch, -1, heads, size)[:, :length]


def _linear_contender() -> Contender:
    return Contender(
        name="linear",
        label="linear, no gate (plain PyTorch)",
        family="linear",
        floor=linear_floor,
        bind=lambda inputs: lambda: chunked_linear(inputs.q, inputs.k, inputs.v),
        cannot=lambda case, device: PACKED if case.sequences else None,
        exact=linear_direct,
    )


def _fla_operands(name: str, x: Inputs) -> tuple[torch.Tensor, ...]:
    """The tensors of a flash-linear-attention kernel, every one at HQ heads, as these kernels are timed elsewhere."""
    heads, size = x.q.shape[2], x.q.shape[3]
    k, v = repeat_heads(x.k, heads), repeat_heads(x.v, heads)
    if name == "gla":
        return x.q, k, v, F.logsigmoid(x.randn(heads, size)).div_(8).to(x.q.dtype)
    if name == "gsa":
        g = repeat_heads(x.g, heads)
        return x.q, k, v, (1 - g.float().exp()).to(g.dtype), g
    gate = F.logsigmoid(x.randn(heads)).div_(8)  # [B, T, HQ]
    if name == "simple-gla":
        return x.q, k, v, gate
    # The delta rule diverges unless its keys have length 1.
    return x.q, F.normalize(k.float(), dim=-1).to(k.dtype), v, gate, x.randn(heads, seed=1).sigmoid().to(k.dtype)


def _fla_contender(name: str, label: str, path: str, floor: FloorFunction) -> Contender:
    module, function = path.rsplit(".", 1)

    def missing(device: torch.device) -> str | None:
        if not installed("flash-linear-attention", "fla-core"):
            return "flash-linear-attention is not installed."
        return None if device.type == "cuda" else f"flash-linear-attention needs a GPU, not {device.type}."

    def cannot(case: Case, device: torch.device) -> str | None:
        refuses = name == "gated-delta-rule" and case.dtype == "float32"
        return "Its chunk kernel takes 16-bit inputs, not float32." if refuses else None

    def on(operands: Sequence[torch.Tensor], cu: torch.Tensor | None) -> Call:
        operation = getattr(importlib.import_module(module), function)
        packed = {} if cu is None else {"cu_seqlens": cu.long()}

        def call() -> torch.Tensor:
            result: torch.Tensor = operation(*operands, **packed)[0]
            return result

        return call

    def train(inputs: Inputs) -> Step:
        leaves = [leaf(x) for x in _fla_operands(name, inputs)]
        call = step(on(leaves, inputs.cu_seqlens), leaves, inputs)

        def or_refuse() -> tuple[torch.Tensor, ...]:
            try:
                return call()
            except RuntimeError as error:
                if "Triton" in str(error) and "Hopper" in str(error):  # of whose gradients it knows that they are wrong
                    raise Unsupported(" ".join(str(error).split())) from error
                raise

        return or_refuse

    remark = "Keys, values and gates are repeated to all query heads before the timed call."
    return Contender(
        name, label, "linear", floor, lambda x: on(_fla_operands(name, x), x.cu_seqlens), missing, cannot,
        remark=remark, train=train,
    )  # fmt: skip


def baselines() -> list[Contender]:
    """Every baseline, in the order of tables."""
    return [
        *(_sdpa_contender(name) for name in _SDPA),
        _flash_attn_contender("flash-attn-2", "full: flash-attn 2", "flash_attn", ("flash-attn",)),
        _flash_attn_contender("flash-attn-3", "full: flash-attn 3", "flash_attn_interface", ("flash-attn-3",)),
        _window_contender(),
        _linear_contender(),
        _fla_contender("gla", "linear: GLA", "fla.ops.gla.chunk_gla", gla_floor),
        _fla_contender("gsa", "linear: gated slots (GSA)", "fla.ops.gsa.chunk_gsa", gsa_floor),
        _fla_contender("simple-gla", "linear: simple GLA", "fla.ops.simple_gla.chunk_simple_gla", simple_gla_floor),
        _fla_contender(
            "gated-delta-rule",
            "linear: gated delta rule",
            "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
            delta_rule_floor,
        ),
    ]
