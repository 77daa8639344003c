"""One side of a comparison: a process that times calls of the nha_kernels it was started with, one at a time.

Run by `nhabench.regress` as `python -m nhabench.side FOLDER DEVICE`. It imports nha_kernels from FOLDER, and ends where
it finds another. Then it answers a line of JSON with a line of JSON:

    {"case": {...}, "implementation": "chunked"}  inputs, check, warm-up: {"status": "ok", "note": "", "o": [...]}
    "time"                                        one call, with the next inputs: {"ms": 1.25, "late": false}

Its first line, once it is ready, is {"ready": true}. A status other than 'ok' is 'unsupported', 'incorrect', 'out of
memory' or 'failed', with the reason as note. o: the output in short (`nhabench.guard.marks`), so that the versions can
be compared with one another. late: host time may be part of it.

What the code under test prints goes to stderr, so that nothing mixes with the answers.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import nha_kernels
from nhabench.ceilings import open_device
from nhabench.check import check_against, first_output, release
from nhabench.contender import Contender, Unsupported
from nhabench.errors import first_line, is_out_of_memory
from nhabench.guard import marks
from nhabench.implementations import implementations
from nhabench.inputs import Inputs, input_sets
from nhabench.outputs import Step
from nhabench.reference import Judge
from nhabench.timing import WARM_ROUNDS, Sample
from nhabench.training import bound
from nhabench.workloads import Case, Workload

TRIES = 5  # for a sample during which the device does not wait for the host


class Wrong(Exception):
    """The output is not what it should be; str() says how far off."""


def case_of(fields: dict[str, Any]) -> Case:
    """A case from its JSON form, `dataclasses.asdict(case)`."""
    return Case(**{**fields, "workload": Workload(**fields["workload"])})


class Bench:
    """Checks and times one implementation at one case, then at the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.timer = open_device(device)
        self.turns: Iterator[Sample] = iter(())

    def prepare(self, case: Case, implementation: str) -> list[float]:
        """The output in short. Raises Unsupported, Wrong, or what the implementation raises."""
        self.turns = iter(())
        release(self.device)
        contender = next((one for one in implementations() if one.name == implementation), None)
        if contender is None:
            raise Unsupported(f"This version has no implementation {implementation!r}.")
        reason = contender.missing(self.device) or contender.cannot(case, self.device)
        if reason:
            raise Unsupported(reason)
        inputs = input_sets(case, self.device)
        short = _check(contender, inputs[0])
        release(self.device)  # the reference was larger than all else: the other side needs memory too
        self.turns = self._turns([bound(contender, one) for one in inputs])
        for _ in range(WARM_ROUNDS):
            next(self.turns)
        return short

    def _turns(self, calls: Sequence[Step]) -> Iterator[Sample]:
        stopwatch, rotated = self.timer.stopwatch(), itertools.cycle(calls)
        while True:
            for call in itertools.islice(rotated, TRIES):
                sample = stopwatch(call)
                if not sample.late:
                    break
            yield sample


def _check(contender: Contender, inputs: Inputs) -> list[float]:
    judge = Judge(inputs.case.workload, inputs.case.dtype, inputs.q.device, inputs.case.direction)
    truth, name = judge.reference(inputs)
    o, _ = first_output(bound(contender, inputs), inputs)
    verdict = check_against(o, truth, name, judge.tolerance)
    if not verdict.correct:
        raise Wrong(verdict.sentence)
    return [number for part in marks(o).parts for number in part.projections.flatten().tolist()]


def answer(bench: Bench, question: Any) -> dict[str, Any]:
    """The answer to one line."""
    if question == "time":
        sample = next(bench.turns)
        return {"ms": sample.ms, "late": sample.late}
    try:
        short = bench.prepare(case_of(question["case"]), question["implementation"])
    except Unsupported as error:
        return {"status": "unsupported", "note": str(error)}
    except Wrong as error:
        return {"status": "incorrect", "note": str(error)}
    except Exception as error:
        if bench.device.type == "cuda":
            torch.cuda.synchronize()  # an illegal access took the device along: then this process ends
        status = "out of memory" if is_out_of_memory(error) else "failed"
        return {"status": status, "note": f"{type(error).__name__}: {first_line(error)}"}
    return {"status": "ok", "note": "", "o": short}


def main(folder: str, device: str) -> None:
    """Answer until there are no more questions."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    found = Path(nha_kernels.__file__).resolve().parent.parent
    if found != Path(folder).resolve():
        raise SystemExit(f"expected nha_kernels of {folder}, got that of {found}")
    with torch.no_grad(), contextlib.suppress(BrokenPipeError):
        bench = Bench(torch.device(device))
        print(json.dumps({"ready": True}), file=answers)
        for line in sys.stdin:
            print(json.dumps(answer(bench, json.loads(line))), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
