"""The judge: float64 references of NHA, the distance of an output from them, and how much distance is allowed.

Two distances, both relative (||o - r|| / ||r||): over the whole output, and the worst of all blocks of 64 tokens, which
one wrong row cannot hide in. What is allowed is derived, never guessed: twice the distance that the definition itself
(naive) has when it is computed in the case's dtype, plus what another order of the fp32 sums may cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from nha_kernels import native_hybrid_attention
from nhabench.implementations import NAIVE_LENGTH, attend
from nhabench.inputs import LARGE_REFERENCE, Inputs, make_inputs
from nhabench.outputs import Output, tensors_of
from nhabench.training import NHA, gradients, gradients_apart
from nhabench.workloads import Case, Workload

BLOCK = 64  # tokens
PIECE = 2**17  # tokens
ROOM = 2**25  # numbers in float64 at once
LONGEST_TRAINED = 2**15  # tokens of a sequence: of longer ones there is no reference for gradients
STAND_IN = 2048  # tokens, for those
SMALL_LENGTH = 320  # where naive judges: past the window, and so long that chunked's scan has more than one level


@dataclass(frozen=True)
class Distance:
    """Relative distance of an output from its reference: of the whole, and of its worst block of BLOCK tokens."""

    total: float
    worst: float

    def within(self, allowed: Distance) -> bool:
        """Whether both parts are within `allowed`; NaN never is."""
        return self.total <= allowed.total and self.worst <= allowed.worst

    def over(self, allowed: Distance) -> float:
        """The larger part in units of the allowed one: above 1 exactly where it is not within; infinite for NaN."""
        parts = self.total / allowed.total, self.worst / allowed.worst
        return math.inf if any(map(math.isnan, parts)) else max(parts)


def distance(o: torch.Tensor, reference: torch.Tensor) -> Distance:
    """How far o [B,T,HQ,D] is from its float64 reference. Computed in slices of T: no float64 copy of o is made.

    A block whose reference is 0, as are the last tokens' gradients of gates, is held against the mean block.
    """
    if o.shape != reference.shape:
        raise ValueError(f"o: expected shape {tuple(reference.shape)}, got {tuple(o.shape)}")
    wrong, norm = [], []
    length = BLOCK * max(1, ROOM // (BLOCK * o[:, :1].numel()))
    for part, some in zip(o.split(length, dim=1), reference.split(length, dim=1), strict=True):
        truth = some.to(part.device)  # a large one lies in host memory
        wrong.append(_by_blocks(part.double() - truth))
        norm.append(_by_blocks(truth))
    wrong_sq, norm_sq = torch.cat(wrong, 1), torch.cat(norm, 1)  # [B, blocks]
    by_block = _ratio(wrong_sq, torch.where(norm_sq == 0, norm_sq.mean(), norm_sq))
    worst = by_block.max() if not wrong_sq.isnan().any() else wrong_sq.new_tensor(torch.nan)
    return Distance(float(_ratio(wrong_sq.sum(), norm_sq.sum()).sqrt()), float(worst.sqrt()))


def _ratio(wrong: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    # 0 where both are: all gradients of gates are, where no token leaves the window.
    return torch.where((wrong == 0) & (norm == 0), 0.0, wrong / norm)


def distances(o: Output, reference: Output) -> list[Distance]:
    """The distance of each tensor of an output from its own reference."""
    found, truth = tensors_of(o), tensors_of(reference)
    if len(found) != len(truth):
        raise ValueError(f"output: expected {len(truth)} tensors, got {len(found)}")
    return [distance(*both) for both in zip(found, truth, strict=True)]


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


def small_inputs(
    workload: Workload, dtype: str, device: torch.device, sequences: int = 0, direction: str = "forward"
) -> Inputs:
    """Inputs of one short sequence of a workload, long enough to fill its window, short enough for naive; or of as many
    tokens with `sequences` packed in them."""
    length = min(max(SMALL_LENGTH, 2 * workload.window), NAIVE_LENGTH)
    return make_inputs(Case(workload, 1, length, dtype, sequences, direction), device, seed=7)


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


def computed(inputs: Inputs, backend: str) -> Output:
    """o of a backend, in training with its gradients."""
    if inputs.case.training:
        return gradients(partial(attend, backend=backend), inputs, NHA)
    return attend(inputs, backend)


def checked_at(case: Case) -> Case:
    """The case at which NHA is checked: itself, but where a gradient of its sequences would take too much, since it is
    computed of each in one piece, one of STAND_IN tokens."""
    if case.training and max(case.lengths) > LONGEST_TRAINED:
        return Case(case.workload, 1, STAND_IN, case.dtype, direction=case.direction)
    return case


class Judge:
    """References and tolerances of one workload in one dtype and direction on one device. Made once, at a small size.

    tolerance: of each tensor of an output.
    """

    def __init__(self, workload: Workload, dtype: str, device: torch.device, direction: str = "forward") -> None:
        inputs = small_inputs(workload, dtype, device, direction=direction)
        exact = inputs.to(torch.float64)
        truth = computed(exact, "naive")
        self.tolerance = [allowed(one, workload) for one in distances(computed(inputs, "naive"), truth)]
        # chunked in float64 stands in for naive at large T: held to float64's own rounding of the same sums.
        terms = slack(workload) / torch.finfo(torch.float32).eps
        self.chunked_error = max(one.worst for one in distances(computed(exact, "chunked"), truth))
        self.chunked_is_exact = self.chunked_error <= 2 * terms * torch.finfo(torch.float64).eps

    def reference(self, inputs: Inputs) -> tuple[Output, str]:
        """(o in float64, in training with gradients, and the name of what computed it). Raises ArithmeticError when
        chunked cannot be trusted."""
        if inputs.case.tokens <= NAIVE_LENGTH:
            return self._apart(inputs, "naive"), "naive float64"
        if not self.chunked_is_exact:
            raise ArithmeticError(
                f"chunked in float64 is {self.chunked_error:.1e} away from naive in float64 at a small size, "
                "so it cannot be the reference"
            )
        return self._apart(inputs, "chunked"), "chunked float64"

    def _apart(self, inputs: Inputs, backend: str) -> Output:
        if inputs.case.training:
            return gradients_apart(partial(attend, backend=backend), inputs, NHA, torch.float64)
        return each_apart(inputs, lambda one: in_pieces(one, backend, PIECE))
