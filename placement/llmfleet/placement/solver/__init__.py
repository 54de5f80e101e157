"""The fleet solver: numbers in, replicas and proven bounds out. It knows nothing of names, units or Kubernetes.

    solve(problem, limits, deadline) -> Solution            once
    Solver(limits).solve(problem, deadline) -> Solution     again and again, as services change

`problem` says what is solved, `two_phase` in which order, `decomposition` how one phase takes services apart by prices
on what they share, `pricing` how one service is solved with proof, `closing` how the last percent is closed in small
fleets, `warm` what need not be solved again, `limits` what ends a solve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.decomposition import PROVEN
from llmfleet.placement.solver.limits import Limits, StoppedBy
from llmfleet.placement.solver.pricing import Pricer, Terms
from llmfleet.placement.solver.problem import Problem, Replicas, Service
from llmfleet.placement.solver.two_phase import Level, Lexicographic, Solution
from llmfleet.placement.solver.warm import Solver

__all__ = [
    "PROVEN",
    "Level",
    "Limits",
    "Pricer",
    "Problem",
    "Replicas",
    "Service",
    "Solution",
    "Solver",
    "StoppedBy",
    "Terms",
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
    return Lexicographic(problem, limits, deadline, pool).solve(start)
