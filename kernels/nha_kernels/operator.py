"""native_hybrid_attention and nha_decode_step: check the call, choose an implementation, run it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import dispatch, library
from .checks import check_call
from .decode import decode_step
from .dispatch import Explanation, explain_problem
from .problem import Inputs, Problem
from .registry import BACKENDS
from .state import NHAState, advance

Output = tuple[Tensor, NHAState | None]
OutputWithLse = tuple[Tensor, NHAState | None, Tensor]


class _DecodeOptions(TypedDict, total=False):
    """The optional arguments, for the signatures below that differ in what they return."""

    s: Tensor | None
    rope: tuple[Tensor, Tensor] | None
    q_window: Tensor | None
    k_window: Tensor | None
    scale: float | None
    slot_delay: int | None
    mask_empty_slots: bool


class _Options(_DecodeOptions, total=False):
    cu_seqlens: Tensor | None
    initial_state: NHAState | None
    output_final_state: bool
    backend: str


@overload
def native_hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, window_size: int, *, return_lse: Literal[False] = False,
    **options: Unpack[_Options],
) -> Output: ...  # fmt: skip
@overload
def native_hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, window_size: int, *, return_lse: Literal[True],
    **options: Unpack[_Options],
) -> OutputWithLse: ...  # fmt: skip
@overload
def native_hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, window_size: int, *, return_lse: bool, **options: Unpack[_Options]
) -> Output | OutputWithLse: ...
def native_hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    window_size: int,
    *,
    s: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    q_window: Tensor | None = None,
    k_window: Tensor | None = None,
    scale: float | None = None,
    slot_delay: int | None = None,
    mask_empty_slots: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: NHAState | None = None,
    output_final_state: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Output | OutputWithLse:
    """Native Hybrid Attention (Du et al., arXiv 2510.07019): one softmax over M recurrent slots and the last W tokens.

    For one sequence and kv head, with alpha_t = exp(g_t) and s_t = 1 - alpha_t unless `s` is given::

        K~_t = diag(alpha_t) K~_{t-1} + s_t k_t^T        V~_t = diag(alpha_t) V~_{t-1} + s_t v_t^T
        o_t  = softmax(scale * [q_t K~_{t-delay}^T ; qw_t kw_j^T for t - W < j <= t]) [V~_{t-delay} ; v_j]

    Args:
        q: [B, T, HQ, D]; HQ is a multiple of H, and NG = HQ / H query heads share a kv head.
        k: [B, T, H, D].
        v: [B, T, H, Dv].
        g: [B, T, H, M], log forget gates <= 0 (natural log, -inf allowed), fp32 or the dtype of q.
        window_size: W >= 0, counting the token itself. W = 0 is gated slot attention, W >= T full attention.
        s: [B, T, H, M], the write strength in place of 1 - exp(g).
        rope: (cos, sin), tables [P, D/2], non-interleaved halves as in Llama. Rotates q and k for the window only. A
            token's position is its index in its sequence plus the tokens that `initial_state` has seen.
        q_window, k_window: shapes of q and k; the window's queries and keys, ready-made.
        scale: factor of all logits, > 0; D ** -0.5 by default.
        slot_delay: tokens that a token waits before it enters the slots; `window_size` by default, so that slots and
            window never see the same token.
        mask_empty_slots: leave the slots out for rows before any token (of this call or the state's) has entered them.
            Without it an empty slot takes part with logit 0, as in the paper.
        cu_seqlens: [N + 1] int32 offsets of N packed sequences; then B = 1 and nothing crosses a boundary.
        initial_state: where the sequences go on from; not modified.
        output_final_state: also return the state after the last token.
        return_lse: also return the log-sum-exp of the scaled logits.
        backend: "auto" for the fastest implementation that serves the call, or one of `BACKENDS`.

    Returns:
        (o, final_state), or (o, final_state, lse) with `return_lse`. o: [B, T, HQ, Dv] in the dtype of q. final_state:
        an NHAState, None unless asked for. lse: [B, T, HQ], natural log, fp32 (float64 for float64 inputs). A row with
        nothing to attend to (W = 0 and masked slots) has o = 0 and lse = -inf.

    Raises:
        ValueError, TypeError: an argument is not as described; the message names it, what was expected and what came.
            What would wait for a GPU (g <= 0, the contents of cu_seqlens) is checked there only with
            NHA_CHECK_VALUES=1 in the environment.
        UnsupportedCall: the named backend cannot serve this call; the message says why. "auto" never raises it.
    """
    _check_backend(backend)
    inputs, problem = _describe(
        q, k, v, g, window_size, s=s, rope=rope, q_window=q_window, k_window=k_window, scale=scale,
        slot_delay=slot_delay, mask_empty_slots=mask_empty_slots, cu_seqlens=cu_seqlens, initial_state=initial_state,
        output_final_state=output_final_state, return_lse=return_lse,
    )  # fmt: skip
    serve = library.run if torch.compiler.is_compiling() else dispatch.run
    result = serve(problem, inputs, backend)
    state = advance(problem, inputs, result) if output_final_state else None
    if not return_lse:
        return result.o, state
    assert result.lse is not None
    return result.o, state, result.lse


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    window_size: int,
    *,
    s: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    q_window: Tensor | None = None,
    k_window: Tensor | None = None,
    scale: float | None = None,
    slot_delay: int | None = None,
    mask_empty_slots: bool = False,
    cu_seqlens: Tensor | None = None,
    initial_state: NHAState | None = None,
    output_final_state: bool = False,
    return_lse: bool = False,
) -> Explanation:
    """Which implementation `native_hybrid_attention` would choose for these arguments, and why not each other one.

    Takes the arguments of that function, checks them the same way and runs nothing. `print()` of the answer reads well.
    """
    _, problem = _describe(
        q, k, v, g, window_size, s=s, rope=rope, q_window=q_window, k_window=k_window, scale=scale,
        slot_delay=slot_delay, mask_empty_slots=mask_empty_slots, cu_seqlens=cu_seqlens, initial_state=initial_state,
        output_final_state=output_final_state, return_lse=return_lse,
    )  # fmt: skip
    return explain_problem(problem)


@overload
def nha_decode_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: NHAState, window_size: int, *,
    return_lse: Literal[False] = False, **options: Unpack[_DecodeOptions],
) -> Tensor: ...  # fmt: skip
@overload
def nha_decode_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: NHAState, window_size: int, *, return_lse: Literal[True],
    **options: Unpack[_DecodeOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def nha_decode_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: NHAState, window_size: int, *, return_lse: bool,
    **options: Unpack[_DecodeOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def nha_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: NHAState,
    window_size: int,
    *,
    s: Tensor | None = None,
    rope: tuple[Tensor, Tensor] | None = None,
    q_window: Tensor | None = None,
    k_window: Tensor | None = None,
    scale: float | None = None,
    slot_delay: int | None = None,
    mask_empty_slots: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One token for each of N sequences: o [N, 1, HQ, Dv], with the state updated in place.

    Arguments as in `native_hybrid_attention` with B = N and T = 1. It launches the same work whatever the state holds
    and never waits for the device, so it can be captured in a CUDA graph and replayed.

    Args:
        state: with room for every recent token: from `NHAState.zeros`, or `with_full_capacity()` of any other.

    Returns:
        o, or (o, lse) with `return_lse`; lse [N, 1, HQ] as in `native_hybrid_attention`.

    Raises:
        ValueError, TypeError: as `native_hybrid_attention`; also where T is not 1, the state has too little room, or a
            gradient would be needed (an update in place has none: use `native_hybrid_attention`).
    """
    inputs, problem = _describe(
        q, k, v, g, window_size, s=s, rope=rope, q_window=q_window, k_window=k_window, scale=scale,
        slot_delay=slot_delay, mask_empty_slots=mask_empty_slots, cu_seqlens=None, initial_state=state,
        output_final_state=False, return_lse=return_lse, state_name="state",
    )  # fmt: skip
    with torch.autocast(problem.device, enabled=False):
        o, lse = decode_step(problem, inputs)
    return (o, lse) if return_lse else o


def _check_backend(backend: object) -> None:
    names = ("auto", *BACKENDS)
    if not isinstance(backend, str):
        raise TypeError(f"backend: expected one of {names}; got {type(backend).__name__}")
    if backend not in names:
        raise ValueError(f"backend: expected one of {names}; got {backend!r}")


def _describe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    window_size: int,
    *,
    s: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    q_window: Tensor | None,
    k_window: Tensor | None,
    scale: float | None,
    slot_delay: int | None,
    mask_empty_slots: bool,
    cu_seqlens: Tensor | None,
    initial_state: NHAState | None,
    output_final_state: bool,
    return_lse: bool,
    state_name: str = "initial_state",
) -> tuple[Inputs, Problem]:
    if scale is None:
        # A q that is no tensor, or has no last size, is named by the checks.
        scale = q.shape[-1] ** -0.5 if isinstance(q, Tensor) and q.ndim and q.shape[-1] else 1.0
    inputs = Inputs(q, k, v, g, s, rope, q_window, k_window, scale, cu_seqlens, initial_state)
    problem = check_call(inputs, window_size, slot_delay, mask_empty_slots, output_final_state, return_lse, state_name)
    if cu_seqlens is not None:
        inputs = replace(inputs, cu_seqlens=cu_seqlens.contiguous())
    return inputs, problem
