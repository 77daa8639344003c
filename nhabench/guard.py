"""What was timed must be what was checked.

A call could be right when it is compared with the reference and then, while it is timed, return what it remembers, do
nothing, or write into its inputs, which others read too. So each contender is asked again after the race: are the
inputs as they were, is the output that of the check, and does it change when the inputs do? On a GPU also: is the work
done in its turn, between what was queued before the call and what is queued behind it? Only there do events see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F

from nhabench.contender import Call
from nhabench.inputs import Inputs, make_inputs
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

# As they are now: a contender could put others in their place.
_spin, _synchronize = torch.cuda._sleep, torch.cuda.synchronize
_record, _query = torch.cuda.Event.record, torch.cuda.Event.query


@dataclass(frozen=True)
class Marks:
    """An output in short: its norm, and for each sequence and block of tokens projections on a few random vectors."""

    norm: float
    projections: torch.Tensor  # [blocks, B, VECTORS]

    def distance(self, other: Marks) -> float:
        """How far apart two outputs are, relative to the first; NaN where one of them holds NaN."""
        difference = float((self.projections - other.projections).norm())
        return difference / self.norm if self.norm else difference


def marks(o: torch.Tensor) -> Marks:
    """Of an output [B, T, HQ, D], of which no more is copied at once than ROOM numbers, or a block."""
    generator = torch.Generator(o.device).manual_seed(11)
    size = BLOCK * o.shape[2] * o.shape[3]
    vectors = torch.randn(size, VECTORS, generator=generator, device=o.device).div_(VECTORS**0.5)
    norms, projections = [], []
    for part in o.split(BLOCK * max(1, ROOM // (o.shape[0] * size)), dim=1):
        filled = F.pad(part, (0, 0, 0, 0, 0, -part.shape[1] % BLOCK))
        blocks = filled.unflatten(1, (-1, BLOCK)).flatten(2).float()  # [B, some, size]
        norms.append(blocks.norm())
        projections.append((blocks @ vectors).transpose(0, 1))
    return Marks(float(torch.stack(norms).norm()), torch.cat(projections).cpu())


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


def plain(o: object) -> TypeGuard[torch.Tensor]:
    """Whether an output is a tensor and nothing that only looks like one."""
    return type(o) is torch.Tensor


def shares_memory(o: torch.Tensor, inputs: Inputs) -> bool:
    """Whether an output lies where one of the inputs does."""
    return o.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in inputs.tensors()}


def refill(inputs: Inputs, seed: int) -> None:
    """Other values in the same tensors."""
    inputs.copy_(make_inputs(inputs.case, inputs.q.device, seed))


def spoil(o: torch.Tensor) -> None:
    """Overwrite the first tokens of an output that was timed: none may be the next one's, who gets its memory."""
    o[:, : -(-o.shape[1] // SPOILT_PART)].zero_()


def out_of_turn(call: Call, v: torch.Tensor, known: Marks) -> bool:
    """Whether a call's work on a GPU is done at another time than between what was queued before and behind it.

    v: the values that it reads; known: marks of its output. While the device sleeps in front of the call, v holds NaN:
    work that is done ahead, by a stream that does not wait for the one of the call, shows NaN. So does what is queued
    behind the call, if it does not wait for the work. Contenders that read a copy of v, made when they were bound, can
    only be told to work too late.
    """
    begin = host_clock()
    o = call()
    _synchronize()
    seconds = host_clock() - begin
    values = v.clone()
    try:
        for look in range(LOOKS):
            o.fill_(torch.nan)  # the next call, which asks for memory as this one did, gets this memory
            del o
            v.fill_(torch.nan)
            _synchronize()
            _spin(int((1.5 * seconds + 0.006 * 4**look) * CYCLES_PER_S))
            awake = torch.cuda.Event()
            _record(awake)
            v.copy_(values)
            o = call()
            behind = o.clone()
            in_time = not _query(awake)
            _synchronize()
            if not known.distance(marks(behind)) <= SAME:
                return True
            behind.fill_(torch.nan)
            if in_time:
                break  # else the host was held up, or the call waits for the device; which, a longer sleep shows
    finally:
        v.copy_(values)
    return False
