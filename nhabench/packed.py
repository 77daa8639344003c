"""Contenders that are for packed sequences alone: full attention by torch, and NHA by kernels that want a batch.

Shapes as in nhabench.baselines. Of N packed sequences, L tokens is the longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import util
from typing import Any

import torch

from nhabench.baselines import masked_softmax
from nhabench.contender import Call, Contender
from nhabench.floors import full_floor, nha_floor
from nhabench.implementations import attend, missing_backend
from nhabench.inputs import Inputs
from nhabench.workloads import Case

VARLEN = "torch.nn.attention.varlen"
BATCH = "It is for packed sequences, and those of this case are a batch."


def causal_varlen() -> Callable[..., torch.Tensor]:
    """torch's attention for packed sequences, as this version of torch calls it, causal and with grouped heads.

    Takes (q [T,HQ,D], k and v [T,H,D], cu_seqlens twice, the longest length twice).
    """
    from torch.nn.attention.varlen import varlen_attn

    # A window without an end to the left. Where grouped heads need not be asked for, they are taken as they are.
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    attention: Any = varlen_attn
    return partial(attention, **options)


def _torch_varlen() -> Contender:
    def missing(device: torch.device) -> str | None:
        if util.find_spec(VARLEN) is None:
            return f"torch {torch.__version__} has no {VARLEN}."
        return None if device.type == "cuda" else f"{VARLEN} needs a CUDA GPU, not {device.type}."

    def cannot(case: Case, device: torch.device) -> str | None:
        if not case.sequences:
            return BATCH
        return f"{VARLEN} takes 16-bit inputs, not float32." if case.dtype == "float32" else None

    def bind(inputs: Inputs) -> Call:
        attention, cu, longest = causal_varlen(), inputs.cu_seqlens, max(inputs.case.lengths)
        x = inputs
        return lambda: attention(x.q[0], x.k[0], x.v[0], cu, cu, longest, longest).unsqueeze(0)

    return Contender(
        "torch-varlen", "full: torch varlen", "full", full_floor, bind, missing, cannot, True,
        lambda x: masked_softmax(x, x.q.shape[1]),
    )  # fmt: skip


def padding(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(of N*L places in a padded batch, which packed token each holds; of T packed tokens, the place of each).

    Behind its end a sequence repeats its last token: what is causal before does not see it.
    """
    size = torch.tensor(lengths, device=device)
    step = torch.arange(max(lengths), device=device)
    token = (size.cumsum(0) - size)[:, None] + step.minimum(size[:, None] - 1)  # [N, L]
    return token.flatten(), (step < size[:, None]).flatten().nonzero().flatten()


def _padded(backend: str) -> Contender:
    """A backend on the batch that one gets by padding every sequence to the longest."""

    def bind(inputs: Inputs) -> Call:
        lengths = inputs.case.lengths
        token, place = padding(lengths, inputs.q.device)
        case = Case(inputs.case.workload, len(lengths), max(lengths), inputs.case.dtype)

        def batch(x: torch.Tensor) -> torch.Tensor:  # [1, T, ...] -> [N, L, ...]
            return x[0].index_select(0, token).unflatten(0, (case.batch, case.seq_len))

        def call() -> torch.Tensor:
            q, k, v, g = map(batch, (inputs.q, inputs.k, inputs.v, inputs.g))
            o = attend(Inputs(case, q, k, v, g), backend)
            return o.flatten(0, 1).index_select(0, place).unsqueeze(0)

        return call

    return Contender(
        name=f"{backend}-padded",
        label=f"NHA {backend}, padded",
        family="nha",
        floor=nha_floor,
        bind=bind,
        missing=lambda device: missing_backend(backend, device),
        cannot=lambda case, device: None if case.sequences else BATCH,
        remark="Pads every sequence to the longest, and takes the padding out again, inside the timed call.",
    )


def for_packed() -> list[Contender]:
    """Every one of them, in the order of tables."""
    return [_padded("triton"), _torch_varlen()]
