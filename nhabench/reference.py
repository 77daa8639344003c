"""The judge: float64 references of NHA, the distance of an output from them, and how much distance is allowed.

Two distances, both relative (||o - r|| / ||r||): over the whole output, and the worst of all blocks of 64 tokens, which
one wrong row cannot hide in. What is allowed is derived, never guessed: twice the distance that the definition itself
(naive) has when it is computed in the case's dtype, plus what another order of the fp32 sums may cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nha_kernels import native_hybrid_attention
from nhabench.implementations import NAIVE_LENGTH, attend
from nhabench.inputs import LARGE_REFERENCE, Inputs, make_inputs
from nhabench.workloads import Case, Workload

BLOCK = 64  # tokens
PIECE = 2**17  # tokens
ROOM = 2**25  # numbers in float64 at once
SMALL_LENGTH = 320  # where naive judges: past the window, and so long that chunked's scan has more than one level


@dataclass(frozen=True)
class Distance:
    """Relative distance of an output from its reference: of the whole, and of its worst block of BLOCK tokens."""

    total: float
    worst: float

    def within(self, allowed: Distance) -> bool:
        """Whether both parts are within `allowed`; NaN never is."""
        return self.total <= allowed.total and self.worst <= allowed.worst


def distance(o: torch.Tensor, reference: torch.Tensor) -> Distance:
    """How far o [B,T,HQ,D] is from its float64 reference. Computed in slices of T: no float64 copy of o is made."""
    if o.shape != reference.shape:
        raise ValueError(f"o: expected shape {tuple(reference.shape)}, got {tuple(o.shape)}")
    wrong, norm = [], []
    length = BLOCK * max(1, ROOM // (BLOCK * o[:, :1].numel()))
    for part, some in zip(o.split(length, dim=1), reference.split(length, dim=1), strict=True):
        truth = some.to(part.device)  # a large one lies in host memory
        wrong.append(_by_blocks(part.double() - truth))
        norm.append(_by_blocks(truth))
    wrong_sq, norm_sq = torch.cat(wrong, 1), torch.cat(norm, 1)  # [B, blocks]
    worst = (wrong_sq / norm_sq).max() if not wrong_sq.isnan().any() else wrong_sq.new_tensor(torch.nan)
    return Distance(float((wrong_sq.sum() / norm_sq.sum()).sqrt()), float(worst.sqrt()))


def _by_blocks(x: torch.Tensor) -> torch.Tensor:
    """[B, T, HQ, D] -> [B, blocks]: the sum of squares of each block of BLOCK tokens."""
    by_token = x.square().sum(dim=(2, 3))
    return F.pad(by_token, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)


def slack(workload: Workload) -> float:
    """What the order of the sums may cost: n * eps(fp32) bounds the error of a sum of n terms, here of the longest,
    a logit over D and a softmax over M + W. All implementations sum in fp32, whatever the dtype."""
    terms = workload.head_dim + workload.slots + workload.window
    return terms * torch.finfo(torch.float32).eps


def allowed(measured: Distance, workload: Workload) -> Distance:
    """Twice the distance that the plain definition has in the same precision, plus the slack of the sums."""
    extra = slack(workload)
    return Distance(2 * measured.total + extra, 2 * measured.worst + extra)


def small_inputs(workload: Workload, dtype: str, device: torch.device, sequences: int = 0) -> Inputs:
    """Inputs of one short sequence of a workload, long enough to fill its window, short enough for naive; or of as many
    tokens with `sequences` packed in them."""
    length = min(max(SMALL_LENGTH, 2 * workload.window), NAIVE_LENGTH)
    return make_inputs(Case(workload, 1, length, dtype, sequences), device, seed=7)


def each_apart(inputs: Inputs, run: Callable[[Inputs], Iterable[torch.Tensor]]) -> torch.Tensor:
    """o [B,T,HQ,D] in float64, of every sequence by itself: what is not there cannot cross a boundary.

    run: the pieces of a sequence's output, in their order; one at a time bounds the float64 intermediates. In host
    memory, if it takes much.
    """
    large = inputs.case.reference_bytes > LARGE_REFERENCE
    o = torch.empty(inputs.q.shape, dtype=torch.float64, device="cpu" if large else inputs.q.device)
    for part, one in zip(inputs.parts(o), inputs.apart(), strict=True):
        start = 0
        for piece in run(one):
            part[:, start : start + piece.shape[1]] = piece
            start += piece.shape[1]
    return o


def in_pieces(inputs: Inputs, backend: str, size: int) -> Iterator[torch.Tensor]:
    """o of one sequence in float64, `size` tokens at a time; what each piece leaves behind is where the next begins."""
    state = None
    for q, k, v, g in zip(*(x.split(size, dim=1) for x in (inputs.q, inputs.k, inputs.v, inputs.g)), strict=True):
        o, state = native_hybrid_attention(
            q.double(), k.double(), v.double(), g.double(), inputs.case.workload.window, rope=inputs.rope,
            initial_state=state, output_final_state=True, backend=backend,
        )  # fmt: skip
        yield o


class Judge:
    """References and tolerances of one workload in one dtype on one device. Made once, at a small size."""

    def __init__(self, workload: Workload, dtype: str, device: torch.device) -> None:
        inputs = small_inputs(workload, dtype, device)
        exact = inputs.to(torch.float64)
        truth = attend(exact, "naive")
        self.tolerance = allowed(distance(attend(inputs, "naive"), truth), workload)
        # chunked in float64 stands in for naive at large T: held to float64's own rounding of the same sums.
        terms = slack(workload) / torch.finfo(torch.float32).eps
        self.chunked_error = distance(attend(exact, "chunked"), truth).worst
        self.chunked_is_exact = self.chunked_error <= 2 * terms * torch.finfo(torch.float64).eps

    def reference(self, inputs: Inputs) -> tuple[torch.Tensor, str]:
        """(o in float64, the name of what computed it). Raises ArithmeticError when chunked cannot be trusted."""
        if inputs.case.tokens <= NAIVE_LENGTH:
            return each_apart(inputs, lambda one: in_pieces(one, "naive", PIECE)), "naive float64"
        if not self.chunked_is_exact:
            raise ArithmeticError(
                f"chunked in float64 is {self.chunked_error:.1e} away from naive in float64 at a small size, "
                "so it cannot be the reference"
            )
        return each_apart(inputs, lambda one: in_pieces(one, "chunked", PIECE)), "chunked float64"
