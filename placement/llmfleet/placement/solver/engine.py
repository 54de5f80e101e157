"""HiGHS without a modelling layer: programs are arrays, kept alive, and solved again after small changes.

One thread and a fixed seed each, so that equal programs have equal answers. Presolve is off: on programs of a few
dozen rows it was seen never to return, whatever the limits. What ends a run is a count of nodes; time is a brake only,
and whoever pulls it says so (`Brake.pulled`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.problem import Array

INFINITY = highspy.kHighsInf
Indices = npt.NDArray[np.int32]

_ALWAYS: dict[str, Any] = {"output_flag": False, "threads": 1, "random_seed": 0, "presolve": "off"}
_MIP: dict[str, Any] = {
    "mip_heuristic_effort": 0.01,
    "mip_detect_symmetry": False,
    "mip_allow_restart": False,
    "mip_heuristic_run_feasibility_jump": False,
    "mip_heuristic_run_rins": False,
    "mip_heuristic_run_rens": False,
    "mip_heuristic_run_root_reduced_cost": False,
}


@dataclass
class Matrix:
    """Rows of a program under construction."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def row(self, lower: float, upper: float, columns: list[int], values: list[float]) -> None:
        """Adds lower <= values . columns <= upper."""
        self.lower.append(lower)
        self.upper.append(upper)
        self.columns += columns
        self.values += values
        self.starts.append(len(self.columns))


def model(
    costs: Array,
    lower: Array,
    upper: Array,
    rows: Matrix,
    *,
    integer: npt.NDArray[np.bool_] | None = None,
    **options: Any,
) -> Any:
    """A HiGHS instance that holds this program."""
    highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    for name, value in {**_ALWAYS, **({} if integer is None else _MIP), **options}.items():
        highs.setOptionValue(name, value)
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(costs), len(rows.lower)
    program.col_cost_, program.col_lower_, program.col_upper_ = costs, lower, upper
    program.row_lower_, program.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = np.array(rows.starts, dtype=np.int32)
    program.a_matrix_.index_ = np.array(rows.columns, dtype=np.int32)
    program.a_matrix_.value_ = np.array(rows.values, dtype=np.float64)
    if integer is not None:
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        program.integrality_ = [kinds[int(flag)] for flag in integer]
    highs.passModel(program)
    return highs


def run(highs: Any, deadline: Deadline, *, at_most_s: float) -> bool:
    """Solves; False if time, and nothing else, ended it.

    HiGHS counts time over all runs of an instance, hence the sum.
    """
    remaining = min(deadline.remaining, at_most_s)
    if remaining <= 0:
        deadline.hit = True
        return False
    highs.setOptionValue("time_limit", highs.getRunTime() + remaining)
    highs.run()
    if highs.getModelStatus() == highspy.HighsModelStatus.kTimeLimit:
        deadline.hit = True
        return False
    return True


def is_optimal(highs: Any) -> bool:
    """Whether the last run ended at a proven optimum (within the asked gap)."""
    return bool(highs.getModelStatus() == highspy.HighsModelStatus.kOptimal)


def is_infeasible(highs: Any) -> bool:
    """Whether the last run proved that there is no solution."""
    return highs.getModelStatus() in (
        highspy.HighsModelStatus.kInfeasible,
        highspy.HighsModelStatus.kUnboundedOrInfeasible,
    )


def is_out_of_nodes(highs: Any) -> bool:
    """Whether the last run ended at the most nodes that it was allowed."""
    return bool(highs.getModelStatus() == highspy.HighsModelStatus.kSolutionLimit)


def has_solution(highs: Any) -> bool:
    """Whether the last run left a feasible point."""
    return bool(highs.getInfo().primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible)


def start(highs: Any, point: Array) -> None:
    """Gives an integer program a feasible point to start from."""
    solution = highspy.HighsSolution()
    solution.col_value = point.tolist()
    highs.setSolution(solution)


def start_basis(highs: Any, columns: Iterable[int], rows: Iterable[int]) -> None:
    """Lets a linear program start from the basis of these columns and rows; all others are at their lower bounds."""
    basis = highspy.HighsBasis()
    at_lower, basic = highspy.HighsBasisStatus.kLower, highspy.HighsBasisStatus.kBasic
    column_status = [at_lower] * highs.getNumCol()
    row_status = [at_lower] * highs.getNumRow()
    for column in columns:
        column_status[column] = basic
    for row in rows:
        row_status[row] = basic
    basis.col_status, basis.row_status, basis.valid = column_status, row_status, True
    highs.setBasis(basis)
