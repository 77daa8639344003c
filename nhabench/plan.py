"""Which cases a machine can afford when nobody asked for particular ones."""

from __future__ import annotations

from collections.abc import Sequence

from nhabench.floors import Ceilings, full_floor, linear_floor, nha_floor, window_floor
from nhabench.workloads import Case

CPU_SECONDS = 140.0  # that a whole run on a CPU is planned to take
CPU_LIMIT = 165.0  # that it may take: no case is begun that would end later, at the pace of those before it
CPU_CASE_SECONDS = 20.0  # the longest case of such a run
EFFICIENCY = 0.35  # plain PyTorch reaches about this fraction of a matrix product's rate
CALLS = 10  # a check, LEAST_SAMPLES, of which the pilot of a slow call is the first, and three after them
REFERENCE_CALLS = 3  # what the float64 reference costs, in calls of NHA


def estimated_seconds(case: Case, ceilings: Ceilings, seconds: float) -> float:
    """How long a case will take, roughly: each family's work at this device's rate, or the time it is given."""
    families = [nha_floor(case), full_floor(case), window_floor(case), linear_floor(case)]
    call_s = [floor.milliseconds(ceilings) / 1e3 / EFFICIENCY for floor in families]
    return max(seconds, CALLS * sum(call_s)) + REFERENCE_CALLS * call_s[0]


def affordable(cases: Sequence[Case], ceilings: Ceilings, seconds: float) -> list[Case]:
    """The cases, in their order, that are short enough and fit into CPU_SECONDS together; at least the first one."""
    chosen: list[Case] = []
    spent = 0.0
    for case in cases:
        needed = estimated_seconds(case, ceilings, seconds)
        if chosen and (needed > CPU_CASE_SECONDS or spent + needed > CPU_SECONDS):
            continue
        chosen.append(case)
        spent += needed
    return chosen
