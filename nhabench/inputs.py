"""Random inputs of a case, and how many sets of them it takes to find the caches cold."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nha_kernels.rope import rotate
from nhabench.workloads import Case

MAX_SETS = 8
LARGE_REFERENCE = 8 * 2**30  # bytes: what takes more lies in host memory, not in the GPU's
SLOWEST_GATE = 2.5e-4  # times the fastest slot's log-gates, whose mean is -0.8: slots remember 1 to 5000 tokens
COLD_FACTOR = 4  # the sets together are this many times the L2, so none of a set survives until its next turn


@dataclass(frozen=True)
class Inputs:
    """q [B,T,HQ,D], k and v [B,T,H,D], and the log forget gates g [B,T,H,M] <= 0, all in the case's dtype.

    rope: of a workload with a rotary embedding, its tables (cos, sin) [T, D/2] in fp32. cu_seqlens: of N packed
    sequences, where they begin and the last one ends, [N + 1] in int32. do: in training, the gradient that arrives at
    the output, [B,T,HQ,D].
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    cu_seqlens: torch.Tensor | None = None
    do: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another dtype (float64 for a reference)."""
        return self._map(lambda x: x.to(dtype))

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tensor [B, T, ...] by sequences, those of the batch or those packed: views [1, its length, ...]."""
        return x.split(1) if self.cu_seqlens is None else x.split(self.case.lengths, dim=1)

    def apart(self) -> Iterator[Inputs]:
        """Every sequence by itself, as views."""
        parts = {name: self.parts(x) for name, x in self._by_token.items()}
        for number, length in enumerate(self.case.lengths):
            case = dataclasses.replace(self.case, batch=1, seq_len=length, sequences=0)
            own: dict[str, Any] = {name: some[number] for name, some in parts.items()}
            yield dataclasses.replace(self, case=case, cu_seqlens=None, **own)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        changed: dict[str, Any] = {name: change(x) for name, x in self._by_token.items()}
        return dataclasses.replace(self, **changed)

    @property
    def _by_token(self) -> dict[str, torch.Tensor]:
        every = {"q": self.q, "k": self.k, "v": self.v, "g": self.g, "do": self.do}
        return {name: x for name, x in every.items() if x is not None}

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        """q, k, v and g, of which training has the gradients."""
        return self.q, self.k, self.v, self.g

    @property
    def results(self) -> tuple[torch.Tensor, ...]:
        """Tensors of the sizes that what is computed from them has: o, and in training the gradients."""
        return (self.q, *self.operands) if self.case.training else (self.q,)

    @cached_property
    def rotated(self) -> Inputs:
        """With q and k as attention by positions wants them: rotated, where the workload has a rotary embedding."""
        if self.rope is None:
            return self
        position = torch.arange(self.q.shape[1], device=self.q.device)
        q, k = (rotate(x, *self.rope, position) for x in (self.q, self.k))
        return dataclasses.replace(self, q=q, k=k, rope=None)

    def tensors(self) -> list[torch.Tensor]:
        """All of them, those that are made of them included."""
        made = [] if self.rope is None else [*self.rope, self.rotated.q, self.rotated.k]
        offsets = [] if self.cu_seqlens is None else [self.cu_seqlens]
        return [*self._by_token.values(), *made, *offsets]

    def copy_(self, other: Inputs) -> None:
        """Take over the values of inputs of the same case, into the same tensors."""
        for mine, new in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(new)

    def randn(self, *sizes: int, seed: int = 0) -> torch.Tensor:
        """Further fp32 inputs [B, T, *sizes] for contenders that need other gates than NHA's."""
        generator = torch.Generator(self.q.device).manual_seed(1_000_003 + seed)
        return torch.randn(*self.q.shape[:2], *sizes, generator=generator, device=self.q.device)


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs of a case from a seed: standard normal q, k, v (and do), and gates whose slots forget at very different
    rates.

    Their time constants are spread evenly on a log scale, the first slot's the longest. So an output depends on what
    was just written and on what was carried from far back: a check sees an error in either.
    """
    w = case.workload
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, size: int) -> torch.Tensor:
        # Drawn in the case's own dtype: an fp32 draw first would need twice the memory at the largest sizes.
        shape = (case.batch, case.seq_len, heads, size)
        return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

    q, k, v = normal(w.q_heads, w.head_dim), normal(w.kv_heads, w.head_dim), normal(w.kv_heads, w.head_dim)
    rates = torch.logspace(math.log10(SLOWEST_GATE), 0, w.slots, device=device, dtype=case.torch_dtype)
    g = F.logsigmoid(normal(w.kv_heads, w.slots)).mul_(rates)
    rope = rotary_tables(case.seq_len, w.head_dim, device) if w.rope else None
    do = normal(w.q_heads, w.head_dim) if case.training else None
    return Inputs(case, q, k, v, g, rope, offsets(case, device) if case.sequences else None, do)


def offsets(case: Case, device: torch.device) -> torch.Tensor:
    """cu_seqlens [N + 1] in int32: where the packed sequences of a case begin, and the last one ends."""
    return torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)


def rotary_tables(length: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, head_dim/2] in fp32, of the angles of Su et al., arXiv 2104.09864."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def cache_bytes(device: torch.device) -> int:
    """The size of the device's L2 cache in bytes; 0 where it is not known (CPU)."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def set_count(case: Case, l2_bytes: int) -> int:
    """How many input sets to rotate: enough to exceed the L2 COLD_FACTOR times, at most MAX_SETS."""
    return max(1, min(MAX_SETS, -(-COLD_FACTOR * l2_bytes // case.input_bytes)))


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """The sets to rotate, from the seeds 0, 1, ..."""
    return [make_inputs(case, device, seed) for seed in range(set_count(case, cache_bytes(device)))]


def cache_state(case: Case, sets: int, l2_bytes: int) -> str:
    """'cold' when the rotated sets exceed the L2 as intended, 'warm' when they cannot, 'uncontrolled' on a CPU."""
    if not l2_bytes:
        return "uncontrolled"
    return "cold" if sets * case.input_bytes >= COLD_FACTOR * l2_bytes else "warm"


def bytes_needed(case: Case, sets: int = 1, device_type: str = "cpu") -> int:
    """A lower estimate of the device memory a case takes: its input sets, the outputs, and their float64 reference."""
    per_set = case.input_bytes + case.rotated_bytes
    elsewhere = device_type == "cuda" and case.reference_bytes > LARGE_REFERENCE
    reference = 0 if elsewhere else case.reference_bytes
    return sets * per_set + case.output_bytes + reference


def free_bytes(device: torch.device) -> int:
    """Free memory of the device in bytes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch's allocator holds without using it is free for us as well.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # elsewhere only the total can be asked for
