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

from nhabench.contender import Call
from nhabench.inputs import Inputs, make_inputs
from nhabench.timing import host_clock

BLOCK = 64  # tokens
VECTORS = 16
PIECE = 2**22  # elements
CYCLES_PER_S = 3e9  # no GPU's clock is faster: a sleep of so many cycles lasts a second at least
LOOKS = 3  # the host may be held up while the device sleeps
SAME, OTHER = 0.05, 0.2  # relative: two runs of a call differ by rounding at most, outputs of other inputs by much more

WROTE = "It wrote into its inputs."
SPOILT = "Somebody wrote into the inputs while they were timed."
UNCHECKED = "After it was timed it did not return what it had returned when it was checked."
REMEMBERED = "Its output does not follow its inputs: with new values in the same tensors it returned the old output."
AHEAD = "Its work was done before its turn: the output was there while the device still slept in front of the call."
BEHIND = "Its work was not done in its turn: what was queued behind the call found no output yet."
UNSEEN = "Whether its work is done in its turn was not seen: the call waits for the device."
NO_TENSOR = "Its output is not a plain tensor, so the work may begin only when somebody reads it."


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
    """Of an output [B, T, HQ, D]. No copy of it is made but of a block."""
    generator = torch.Generator(o.device).manual_seed(11)
    size = BLOCK * o.shape[2] * o.shape[3]
    vectors = torch.randn(size, VECTORS, generator=generator, device=o.device).div_(VECTORS**0.5)
    norms, projections = [], []
    for part in o.split(BLOCK, dim=1):
        block = part.flatten(1).float()
        norms.append(block.norm())
        projections.append(block @ vectors[: block.shape[1]])
    return Marks(float(torch.stack(norms).norm()), torch.stack(projections).cpu())


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


def plain(o: object) -> TypeGuard[torch.Tensor]:
    """Whether an output is a tensor and nothing that only looks like one."""
    return type(o) is torch.Tensor


def refill(inputs: Inputs, seed: int) -> None:
    """Other values in the same tensors."""
    inputs.copy_(make_inputs(inputs.case, inputs.q.device, seed))


def out_of_turn(call: Call, known: Marks) -> str:
    """What is wrong with when a call's work is done on a GPU: AHEAD, BEHIND, UNSEEN, or "" for nothing.

    known: marks of its output. The call is queued behind a long sleep. Until that ends there must be no output, seen
    from another stream; whatever is queued behind the call must find it.
    """
    begin = host_clock()
    o = call()
    torch.cuda.synchronize()
    seconds = host_clock() - begin
    aside = torch.cuda.Stream()
    for look in range(LOOKS):
        o.fill_(torch.nan)  # the next call, after the same calls for memory, gets this memory
        del o
        torch.cuda._sleep(int((2.5 * seconds + 0.006 * 4**look) * CYCLES_PER_S))
        awake = torch.cuda.Event()
        awake.record()
        begin = host_clock()
        o = call()
        behind = o.clone()
        while host_clock() - begin < 1.25 * seconds + 0.001:
            pass  # who works ahead is done by then
        with torch.cuda.stream(aside):
            early = o.clone()
        aside.synchronize()
        asleep = not awake.query()
        torch.cuda.synchronize()
        if asleep and known.distance(marks(early)) <= SAME:
            return AHEAD
        if not known.distance(marks(behind)) <= SAME:
            return BEHIND
        if asleep:
            return ""
    return UNSEEN
