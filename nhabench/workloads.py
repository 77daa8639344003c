"""What is measured: the attention shapes of models (workloads) at one batch, length and dtype (cases)."""

from __future__ import annotations

import dataclasses
import itertools
import random
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

SEQ_LENS: tuple[int, ...] = tuple(2**n for n in range(9, 18))  # 512 .. 131072
DTYPES: tuple[str, ...] = ("bfloat16", "float16", "float32")
DIRECTIONS: tuple[str, ...] = ("forward", "training")


@dataclass(frozen=True)
class Workload:
    """The attention layer of a model.

    q_heads (HQ), kv_heads (H, divides HQ) and head_dim (D, for keys and values alike) are the model's; slots (M >= 1)
    and window (W >= 0, in tokens, the token itself counted) are NHA's; tokens is B*T, held while T grows. rope: q and k
    come without their rotary embedding, which NHA gives them itself, for its window.
    Raises ValueError that names the field, what was expected and what came.
    """

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    slots: int = 64
    window: int = 64
    tokens: int = 16384
    rope: bool = False

    def __post_init__(self) -> None:
        if not self.name or any(c not in "abcdefghijklmnopqrstuvwxyz0123456789.-_" for c in self.name):
            raise ValueError(f"name: expected lower-case letters, digits and '.-_', got {self.name!r}")
        for size in ("q_heads", "kv_heads", "head_dim", "slots", "window", "tokens"):
            value, least = getattr(self, size), 0 if size == "window" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"workload {self.name!r}: {size}: expected an integer >= {least}, got {value!r}")
        if not isinstance(self.rope, bool):
            raise ValueError(f"workload {self.name!r}: rope: expected true or false, got {self.rope!r}")
        if self.rope and self.head_dim % 2:
            raise ValueError(
                f"workload {self.name!r}: head_dim: expected an even number with rope, got {self.head_dim}"
            )
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"workload {self.name!r}: kv_heads: expected a divisor of q_heads={self.q_heads}, got {self.kv_heads}"
            )

    def changed(
        self, window: int | None = None, slots: int | None = None, tokens: int | None = None, rope: bool = False
    ) -> Workload:
        """This workload with some sizes replaced, or with a rotary embedding.

        The name tells which, so that a name always means one shape.
        """
        name, sizes = self.name, dataclasses.asdict(self)
        for field, letter, value in (("window", "w", window), ("slots", "m", slots), ("tokens", "n", tokens)):
            if value is not None and value != sizes[field]:
                name, sizes[field] = f"{name}-{letter}{value}", value
        if rope and not self.rope:
            name, sizes["rope"] = f"{name}-rope", True
        return Workload(**{**sizes, "name": name})

    def case(self, seq_len: int, dtype: str, direction: str = "forward") -> Case:
        """The case of this workload at one length: as many sequences as the tokens allow, at least one."""
        return Case(self, max(1, self.tokens // seq_len), seq_len, dtype, direction=direction)


@dataclass(frozen=True)
class Case:
    """A workload at batch B, length T and dtype: one column of a table, one x of a plot.

    sequences: 0, or how many sequences of uneven lengths are packed one after the other into the T tokens; then B = 1.
    direction: "forward", or "training" for the forward pass and the gradients of q, k, v and g.
    Raises ValueError that names the argument, what was expected and what came.
    """

    workload: Workload
    batch: int
    seq_len: int
    dtype: str
    sequences: int = 0
    direction: str = "forward"

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("seq_len", self.seq_len)):
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 <= self.sequences <= self.seq_len:
            raise ValueError(f"sequences: expected an integer in 0..seq_len={self.seq_len}, got {self.sequences}")
        if self.sequences and self.batch != 1:
            raise ValueError(f"batch: expected 1 with packed sequences, got {self.batch}")
        if self.sequences and self.workload.rope:
            # The tables hold one position for each row of a batch; here positions would start anew in every sequence.
            raise ValueError(f"sequences: expected 0 with rope, got {self.sequences}")
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {self.direction!r}")
        if self.training and self.workload.rope:
            # Softmax attention is given q and k that were rotated before: there are no gradients through that.
            raise ValueError(f"direction: expected 'forward' with rope, got {self.direction!r}")

    @property
    def training(self) -> bool:
        """Whether gradients are part of it."""
        return self.direction == "training"

    @property
    def kind(self) -> tuple[Workload, str, str]:
        """What cases of other sizes have in common with this one."""
        return self.workload, self.dtype, self.direction

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return torch_dtype(self.dtype)

    @property
    def tokens(self) -> int:
        """B*T."""
        return self.batch * self.seq_len

    @property
    def lengths(self) -> tuple[int, ...]:
        """The length of every sequence, in tokens: of the batch, or of those packed."""
        return uneven(self.seq_len, self.sequences) if self.sequences else (self.seq_len,) * self.batch

    @property
    def input_bytes(self) -> int:
        """Bytes of q [B,T,HQ,D], k and v [B,T,H,D] and g [B,T,H,M], of the tables of a rotary embedding, of the
        offsets of packed sequences, and in training of do [B,T,HQ,D]."""
        upstream = self._row_bytes if self.training else 0
        return self._operand_bytes + upstream + self.table_bytes + self.offset_bytes

    @property
    def _operand_bytes(self) -> int:
        w = self.workload
        per_token = w.q_heads * w.head_dim + w.kv_heads * (2 * w.head_dim + w.slots)
        return self.tokens * per_token * self.torch_dtype.itemsize

    @property
    def _row_bytes(self) -> int:
        return self.tokens * self.workload.q_heads * self.workload.head_dim * self.torch_dtype.itemsize

    @property
    def offset_bytes(self) -> int:
        """Bytes of cu_seqlens [N + 1] in int32, where N sequences are packed."""
        return (self.sequences + 1) * 4 if self.sequences else 0

    @property
    def table_bytes(self) -> int:
        """Bytes of cos and sin [T, D/2] in fp32, where there is a rotary embedding."""
        return self.seq_len * self.workload.head_dim * 4 if self.workload.rope else 0

    @property
    def rotated_bytes(self) -> int:
        """Bytes of rotated q and k, which softmax attention is given where there is a rotary embedding."""
        w = self.workload
        return self.tokens * (w.q_heads + w.kv_heads) * w.head_dim * self.torch_dtype.itemsize if w.rope else 0

    @property
    def output_bytes(self) -> int:
        """Bytes of o [B,T,HQ,D], and in training of the gradients of q, k, v and g."""
        return self._row_bytes + (self._operand_bytes if self.training else 0)

    @property
    def reference_bytes(self) -> int:
        """Bytes of o in float64, and of the gradients."""
        return self.output_bytes // self.torch_dtype.itemsize * 8

    def __str__(self) -> str:
        shape = f"{self.sequences} packed in {self.seq_len}" if self.sequences else f"{self.batch} x {self.seq_len}"
        return f"{self.workload.name} {shape} {self.dtype}{' training' if self.training else ''}"


def uneven(tokens: int, sequences: int) -> tuple[int, ...]:
    """The lengths of `sequences` sequences, each >= 1, that have `tokens` together; the same at every call.

    They lie between cuts at places of which none is likelier than another, so there are many short ones and a few that
    are several times the mean, as among documents.
    """
    cuts = random.Random(0).sample(range(1, tokens), sequences - 1)
    return tuple(end - start for start, end in itertools.pairwise((0, *sorted(cuts), tokens)))


def torch_dtype(name: str) -> torch.dtype:
    """One of DTYPES as torch names it."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def parse_workloads(text: str, source: str) -> dict[str, Workload]:
    """Workloads of a TOML document, one table each, in its order.

    Raises ValueError that names the source, the workload, the field, what was expected and what came.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{source}: expected TOML, got: {error}") from error
    return {name: _from_table(name, table, source) for name, table in tables.items()}


def _from_table(name: str, table: object, source: str) -> Workload:
    known = [field.name for field in dataclasses.fields(Workload)][1:]
    if not isinstance(table, Mapping):
        raise ValueError(f"{source}: {name}: expected a table [{name}], got {table!r}")
    for field in table:
        if field not in known:
            raise ValueError(f"{source}: workload {name!r}: {field}: expected one of {', '.join(known)}, got {field!r}")
    for field in ("q_heads", "kv_heads", "head_dim"):
        if field not in table:
            raise ValueError(f"{source}: workload {name!r}: {field}: expected an integer >= 1, got nothing")
    try:
        return Workload(name, **table)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def load_workloads(extra: Path | None = None) -> dict[str, Workload]:
    """The packaged table, with the workloads of the file `extra` added (or replaced, where the name is known)."""
    packaged = resources.files("nhabench").joinpath("workloads.toml").read_text(encoding="utf-8")
    workloads = parse_workloads(packaged, "workloads.toml")
    if extra is not None:
        try:
            text = extra.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"workloads file: expected a readable TOML file, got {extra.name}: {error}") from error
        workloads.update(parse_workloads(text, extra.name))
    return workloads


def select(workloads: Mapping[str, Workload], names: Sequence[str]) -> list[Workload]:
    """The named workloads in the asked order, or all. Raises ValueError for a name that is not in the table."""
    for name in names:
        if name not in workloads:
            raise ValueError(f"workload: expected one of {', '.join(workloads)}, got {name!r}")
    return [workloads[name] for name in dict.fromkeys(names)] if names else list(workloads.values())


def cases(workloads: Iterable[Workload], seq_lens: Iterable[int], dtype: str, direction: str = "forward") -> list[Case]:
    """Every workload at every length, short ones first: a length is predicted from the one before it."""
    lengths = sorted(set(seq_lens))
    return [workload.case(seq_len, dtype, direction) for workload in workloads for seq_len in lengths]
