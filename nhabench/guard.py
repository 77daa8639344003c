"""What was timed must be what was checked.

A call could be right when it is compared with the reference and then, while it is timed, return what it remembers, do
nothing, or write into its inputs, which others read too. So each contender is asked again after the race: are the
inputs as they were, is the output that of the check, and does it change when the inputs do? On a GPU also: is the work
done in its turn, between what was queued before the call and what is queued behind it? Only there do events see it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F

from nhabench.inputs import Inputs, make_inputs
from nhabench.outputs import Output, Step, fill, tensors_of
from nhabench.timing import host_clock

BLOCK = 64  # tokens
VECTORS = 16
ROOM = 2**26  # numbers
PIECE = 2**22  # elements
SPOILT_PART = 16  # one token of so many: far more than SAME, and little to write between two timed calls
CYCLES_PER_S = 3e9  # no GPU's clock is faster: a sleep of so many cycles lasts a second at least
LOOKS = 3  # the host may be held up while the device sleeps
SAME, OTHER = 0.05, 0.2  # relative: two runs of a call differ by rounding at most, outputs of other inputs by much more

WROTE = "It wrote into its inputs."
SPOILT = "Somebody wrote into the inputs while they were timed."
UNCHECKED = "After it was timed it did not return what it had returned when it was checked."
REMEMBERED = "Its output does not follow its inputs: with new values in the same tensors it returned the old output."
OUT_OF_TURN = "Its work is not done between what is queued before the call and what is queued behind it."
AN_INPUT = "Its output is memory of its inputs, which an output overwrites."
NO_TENSOR = "Its output is not a plain tensor, so the work may begin only when somebody reads it."
NO_GRADIENTS = "It did not return gradients as plain tensors, so the work may begin only when somebody reads them."

# As they are now: a contender could put others in their place.
_spin, _synchronize = torch.cuda._sleep, torch.cuda.synchronize
_record, _query = torch.cuda.Event.record, torch.cuda.Event.query


@dataclass(frozen=True)
class Mark:
    """A tensor in short: its norm, and for each sequence and block of tokens projections on a few random vectors."""

    norm: float
    projections: torch.Tensor  # [blocks, B, VECTORS]

    def distance(self, other: Mark) -> float:
        """How far apart two tensors are, relative to the first; NaN where one of them holds NaN."""
        if self.projections.shape != other.projections.shape:
            return math.inf
        difference = float((self.projections - other.projections).norm())
        return difference / self.norm if self.norm else difference


@dataclass(frozen=True)
class Marks:
    """An output in short: each of its tensors."""

    parts: tuple[Mark, ...]

    def distance(self, other: Marks) -> float:
        """How far apart the two outputs are in the tensor in which they are farthest; NaN where any holds NaN."""
        return float(self._distances(other).max())

    def change(self, other: Marks) -> float:
        """The same in the tensor in which they are nearest. What is 0 in both does not count: gradients of gates are,
        where nothing enters the slots."""
        apart = self._distances(other)
        counts = torch.tensor([part.norm > 0 for part in self.parts]) | (apart != 0)
        return float(apart[counts].min()) if counts.any() else 0.0

    def _distances(self, other: Marks) -> torch.Tensor:
        if len(self.parts) != len(other.parts):
            return torch.full((len(self.parts),), math.inf)
        return torch.tensor([one.distance(new) for one, new in zip(self.parts, other.parts, strict=True)])


def marks(o: Output) -> Marks:
    """Of an output."""
    return Marks(tuple(mark(x) for x in tensors_of(o)))


def mark(o: torch.Tensor) -> Mark:
    """Of a tensor [B, T, ...], of which no more is copied at once than ROOM numbers, or a block."""
    generator = torch.Generator(o.device).manual_seed(11)
    size = BLOCK * o[0, 0].numel()
    vectors = torch.randn(size, VECTORS, generator=generator, device=o.device).div_(VECTORS**0.5)
    norms, projections = [], []
    for part in o.split(BLOCK * max(1, ROOM // (o.shape[0] * size)), dim=1):
        filled = F.pad(part.flatten(2), (0, 0, 0, -part.shape[1] % BLOCK))
        blocks = filled.unflatten(1, (-1, BLOCK)).flatten(2).float()  # [B, some, size]
        norms.append(blocks.norm())
        projections.append((blocks @ vectors).transpose(0, 1))
    return Mark(float(torch.stack(norms).norm()), torch.cat(projections).cpu())


def fingerprint(inputs: Inputs) -> tuple[int, ...]:
    """Of all inputs: sums over their bits, each weighed by where it lies, so that a permutation shows too."""
    return tuple(_sum_of_bits(x) for x in inputs.tensors())


def _sum_of_bits(x: torch.Tensor) -> int:
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    bits = x.flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    weights = torch.arange(min(PIECE, bits.numel()), dtype=torch.int64, device=x.device).mul_(2).add_(1)
    for number, piece in enumerate(bits.split(PIECE)):  # in pieces: int64 takes several times the memory
        total += (piece * weights[: len(piece)]).sum() * (2 * number + 1)
    return int(total)


@dataclass(frozen=True)
class Sets:
    """Input sets to rotate, from the seeds 0, 1, ..., and their fingerprints: none may change them."""

    inputs: list[Inputs]
    prints: list[tuple[int, ...]]

    def restore(self) -> bool:
        """Give sets that are not as they were their values back; returns whether there were any."""
        changed = [seed for seed, one in enumerate(self.inputs) if fingerprint(one) != self.prints[seed]]
        for seed in changed:
            refill(self.inputs[seed], seed)
        return bool(changed)


def guarded(inputs: list[Inputs]) -> Sets:
    """Input sets as they are now."""
    return Sets(inputs, [fingerprint(one) for one in inputs])


def plain(o: object) -> TypeGuard[Output]:
    """Whether an output is a tensor, or a tuple of them, and nothing that only looks like one."""
    return type(o) is torch.Tensor or (type(o) is tuple and len(o) > 0 and all(type(x) is torch.Tensor for x in o))


def shares_memory(o: Output, inputs: Inputs) -> bool:
    """Whether an output, or a part of it, lies where one of the inputs does."""
    taken = {x.untyped_storage().data_ptr() for x in inputs.tensors()}
    return any(x.untyped_storage().data_ptr() in taken for x in tensors_of(o))


def same_place(o: Output, other: Output) -> bool:
    """Whether two outputs, or parts of them, are the same memory."""
    return any(x.data_ptr() == y.data_ptr() for x, y in zip(tensors_of(o), tensors_of(other), strict=False))


def refill(inputs: Inputs, seed: int) -> None:
    """Other values in the same tensors."""
    inputs.copy_(make_inputs(inputs.case, inputs.q.device, seed))


def spoil(o: Output) -> None:
    """Overwrite the first tokens of an output that was timed: none may be the next one's, who gets its memory."""
    for x in tensors_of(o):
        x[:, : -(-x.shape[1] // SPOILT_PART)].zero_()


def out_of_turn(call: Step, sources: Output, known: Marks) -> bool:
    """Whether a call's work on a GPU is done at another time than between what was queued before and behind it.

    sources: the values that it reads, in training those and do; known: marks of its output. While the device sleeps in
    front of the call, they hold NaN: work that is done ahead, by a stream that does not wait for the one of the call,
    shows NaN. So does what is queued behind the call, if it does not wait for the work. Contenders that read copies,
    made when they were bound, can only be told to work too late.
    """
    begin = host_clock()
    o = call()
    _synchronize()
    seconds = host_clock() - begin
    values = [x.clone() for x in tensors_of(sources)]
    try:
        for look in range(LOOKS):
            fill(o, torch.nan)  # the next call, which asks for memory as this one did, gets this memory
            del o
            fill(sources, torch.nan)
            _synchronize()
            _spin(int((1.5 * seconds + 0.006 * 4**look) * CYCLES_PER_S))
            awake = torch.cuda.Event()
            _record(awake)
            _put_back(sources, values)
            o = call()
            behind = tuple(x.clone() for x in tensors_of(o))
            in_time = not _query(awake)
            _synchronize()
            if not known.distance(marks(behind)) <= SAME:
                return True
            fill(behind, torch.nan)
            if in_time:
                break  # else the host was held up, or the call waits for the device; which, a longer sleep shows
    finally:
        _put_back(sources, values)
    return False


def _put_back(sources: Output, values: Sequence[torch.Tensor]) -> None:
    for x, value in zip(tensors_of(sources), values, strict=True):
        x.copy_(value)
