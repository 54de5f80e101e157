"""HiGHS through PuLP, and what may be trusted of its answer.

PuLP's status says "Optimal" for any incumbent that a time limit left behind, so it is not read. Whether an answer is
proven, and its bound, come from HiGHS' own model status and dual bound. One thread and a fixed seed: equal programs
have equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import highspy
import pulp

ROUNDING = 1e-6
"""Relative amount below which a shortage is rounding: HiGHS keeps rows to 1e-7 and integers to 1e-6."""
_SMALL_BELOW_COLUMNS = 2000
"""Programs of fewer columns are solved with `_SMALL_PROGRAM`."""
_SMALL_PROGRAM = {
    "presolve": "off",
    "mip_heuristic_effort": 0.01,
    "mip_detect_symmetry": False,
    "mip_allow_restart": False,
    "mip_heuristic_run_feasibility_jump": False,
    "mip_heuristic_run_rins": False,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_root_reduced_cost": False,
}
"""HiGHS options for one service's program. Presolve was seen to hang on some of a few dozen rows, whatever the time
limit; its heuristics take several times as long as branching does."""


@dataclass
class Deadline:
    """A point in time after which no further solve is started, and what is left of it."""

    clock: Callable[[], float]
    ends_at: float
    hit: bool = False
    """Whether a solve was cut short or left out."""

    @property
    def remaining(self) -> float:
        """Seconds left, at least zero."""
        return max(0.0, self.ends_at - self.clock())


@dataclass
class Answer:
    """What one run of HiGHS said."""

    feasible: bool
    infeasible: bool
    proven: bool
    bound: float | None


class _Solver(pulp.HiGHS):  # type: ignore[misc]
    """HiGHS through PuLP, with a starting point."""

    def callSolver(self, lp: Any) -> None:
        start = [variable.varValue for variable in lp.variables()]
        if all(value is not None for value in start):
            point = highspy.HighsSolution()
            point.col_value = start
            lp.solverModel.setSolution(point)
        lp.solverModel.run()


def minimise(
    problem: pulp.LpProblem, *, gap: float = 0.0, deadline: Deadline | None = None, share: float = 1.0
) -> Answer:
    """Runs HiGHS once on one thread with a fixed seed, for at most `share` of what the deadline leaves.

    The variables' present values, if all are set, are the starting point. On a feasible answer they are replaced.
    Without a deadline it runs to its end, which is meant for small linear programs.
    """
    before = [variable.varValue for variable in problem.variables()]
    limit: float | None = None
    if deadline is not None:
        limit = deadline.remaining * share
        if limit <= 0:
            deadline.hit = True
            return Answer(False, False, False, None)
    options = _SMALL_PROGRAM if problem.numVariables() < _SMALL_BELOW_COLUMNS else {}
    solver = _Solver(msg=False, gapRel=gap, threads=1, timeLimit=limit, random_seed=0, **options)
    problem.solve(solver)
    model = problem.solverModel
    status = model.getModelStatus()
    info = model.getInfo()
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    proven = status == highspy.HighsModelStatus.kOptimal
    infeasible = status in (
        highspy.HighsModelStatus.kInfeasible,
        highspy.HighsModelStatus.kUnboundedOrInfeasible,
    )
    bound: float | None = info.mip_dual_bound if problem.isMIP() else info.objective_function_value
    if not feasible or bound is None or not math.isfinite(bound) or (not problem.isMIP() and not proven):
        bound = None
    if deadline is not None and not proven and not infeasible:
        deadline.hit = True
    if not feasible:
        for variable, value in zip(problem.variables(), before, strict=True):
            variable.varValue = value
    return Answer(feasible, infeasible, proven and feasible, bound)
