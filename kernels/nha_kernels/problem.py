"""What a call is: its sizes (`Problem`), its tensors (`Inputs`) and what comes back (`Result`).

Sizes, here and in every module of the package:
    B batch, T tokens, N sequences (B, or those packed by cu_seqlens), H kv heads, NG query heads a kv head,
    HQ = NG * H query heads, D head size of q and k, Dv head size of v, M slots a kv head, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .state import NHAState

Positions = Literal["none", "rope", "given"]


class UnsupportedCall(NotImplementedError):
    """A valid call that the chosen backend cannot serve; the message is the sentence that says why."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A frozen description of one call, without its data: what dispatch and tuning are keyed by.

    `positions` says where the window's q and k come from: they are q and k ("none"), rotated inside ("rope") or
    ready-made ("given"). `capability` is the CUDA compute capability, None on other devices.
    """

    batch: int
    tokens: int
    sequences: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    slots: int
    window: int
    delay: int
    dtype: torch.dtype
    gate_dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None = None
    packed: bool = False
    positions: Positions = "none"
    explicit_strength: bool = False
    mask_empty_slots: bool = False
    has_state: bool = False
    output_final_state: bool = False
    return_lse: bool = False
    needs_grad: bool = False

    @classmethod
    def of(
        cls, inputs: Inputs, window: int, delay: int, *, mask_empty_slots: bool, output_final_state: bool,
        return_lse: bool, needs_grad: bool,
    ) -> Problem:  # fmt: skip
        """Describe a checked call."""
        batch, tokens, q_heads, head_dim = inputs.q.shape
        positions: Positions = "none"
        if inputs.rope is not None:
            positions = "rope"
        elif inputs.q_window is not None or inputs.k_window is not None:
            positions = "given"
        return cls(
            batch=batch,
            tokens=tokens,
            sequences=batch if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1,
            q_heads=q_heads,
            kv_heads=inputs.k.shape[2],
            head_dim=head_dim,
            value_dim=inputs.v.shape[3],
            slots=inputs.g.shape[3],
            window=window,
            delay=delay,
            dtype=inputs.q.dtype,
            gate_dtype=inputs.g.dtype,
            device=inputs.q.device.type,
            capability=_capability(inputs.q.device),
            packed=inputs.cu_seqlens is not None,
            positions=positions,
            explicit_strength=inputs.s is not None,
            mask_empty_slots=mask_empty_slots,
            has_state=inputs.state is not None,
            output_final_state=output_final_state,
            return_lse=return_lse,
            needs_grad=needs_grad,
        )

    @property
    def group(self) -> int:
        """Query heads that share a kv head, NG."""
        return self.q_heads // self.kv_heads

    @property
    def history(self) -> int:
        """Tokens before a call that its rows can still see or that still wait to enter the slots."""
        return history_length(self.window, self.delay)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of one checked call, under the names and shapes of `native_hybrid_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    s: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    q_window: Tensor | None
    k_window: Tensor | None
    scale: float
    cu_seqlens: Tensor | None
    state: NHAState | None


class Result(NamedTuple):
    """What an implementation gives back: o [B, T, HQ, Dv], lse [B, T, HQ], slots [N, H, M, D] and [N, H, M, Dv].

    `lse` may be None where the problem does not ask for it, the slots where it does not ask for the final state.
    """

    o: Tensor
    lse: Tensor | None
    slot_k: Tensor | None
    slot_v: Tensor | None


def _capability(device: torch.device) -> tuple[int, int] | None:
    # torch.compile cannot trace the question. Nothing in a graph needs the answer: the operator in it asks for itself.
    if device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return torch.cuda.get_device_capability(device)


def history_length(window: int, delay: int) -> int:
    """Tokens that a next segment needs: `window - 1` to be seen again, `delay` still to enter the slots."""
    return max(delay, window - 1, 0)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of slots, softmax and log-sum-exp: fp32, or float64 where the inputs are float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
