"""The fleet solver: numbers in, replicas and proven bounds out. It knows nothing of names, units or Kubernetes.

    solve(problem, limits, deadline) -> Solution            once
    Solver(limits).solve(problem, deadline) -> Solution     again and again, as services change

`problem` says what is solved, `enumeration` how one service alone is, `two_phase` in which order a fleet is,
`decomposition` how one phase takes services apart by prices on what they share, `pricing` how one service is solved
with proof, `nodes` what whole nodes cost, `closing` how the last percent is closed in small fleets, `warm` what need
not be solved again, `limits` what ends a solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.cut_program import Terms
from llmfleet.placement.solver.decomposition import PROVEN
from llmfleet.placement.solver.enumeration import Proven, cheapest
from llmfleet.placement.solver.limits import Limits, StoppedBy
from llmfleet.placement.solver.nodes import idle_devices, nodes_for
from llmfleet.placement.solver.pricing import Pricer
from llmfleet.placement.solver.problem import AT_RISK, Loss, Problem, Replicas, Service, WholeNodes
from llmfleet.placement.solver.two_phase import Level, Lexicographic, Solution
from llmfleet.placement.solver.warm import Solver

__all__ = [
    "AT_RISK",
    "PROVEN",
    "Level",
    "Limits",
    "Loss",
    "Pricer",
    "Problem",
    "Proven",
    "Replicas",
    "Service",
    "Solution",
    "Solver",
    "StoppedBy",
    "Terms",
    "WholeNodes",
    "cheapest",
    "idle_devices",
    "nodes_for",
    "solve",
]


def solve(
    problem: Problem,
    limits: Limits,
    deadline: Deadline,
    *,
    start: Sequence[Replicas] | None = None,
    pool: Callable[[Service, bool], Pricer] | None = None,
) -> Solution:
    """Solves a fleet; `start` is a plan that may be good, such as the one in force. `pool` gives the program of a
    service in a mode (whole or not), where the caller keeps such."""
    if len(problem.services) == 1 and not problem.nodes and deadline.remaining > 0:
        (service,) = problem.services
        alone = cheapest(service, problem.limits, gap=limits.gap)
        if alone is not None:
            none = np.zeros(len(problem.limits))
            return Solution((alone.replicas,), (0.0,), alone.cost, alone.bound, (), "gap", 0, none)
    return Lexicographic(problem, limits, deadline, pool).solve(start)
