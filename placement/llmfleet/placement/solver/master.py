"""The restricted master program: one column per service out of those found, within the shared rows.

    min sum value[t] theta[t],  sum_t(s) theta[t] = 1 for every service s,  sum use[t] theta[t] <= limits

As a linear program its duals are the prices of the rows for the next round of pricing; as an integer program it is
the plan. While the columns found do not fit the rows yet, an overflow column per row, at a price of its own, keeps
the linear program solvable and its duals within a box: without one they jump about and the rounds do not converge. A
service of which no column is known yet has a blank one instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import engine
from llmfleet.placement.solver.nodes import Packing, clean
from llmfleet.placement.solver.problem import Array

_SECONDS = 120.0
_MOST_RETIRED = 2000


@dataclass(frozen=True)
class Priced:
    """The linear program's answer."""

    value: float
    """Without what overflow costs."""
    prices: Array
    """Of the rows, shape (rows,)."""
    overflow: Array
    """By row."""
    blank: bool
    """Whether a service is without a column."""
    reduced: Array
    """Reduced cost of every column, shape (columns,)."""


class Master:
    """Columns of all services, in the order in which they were added."""

    def __init__(self, services: int, limits: Array, packing: Packing | None = None) -> None:
        """`packing`: devices that are paid for by the node; the linear program does without, the integer one does
        not."""
        self._services, self._limits = services, limits
        self._packing = packing or None
        self._nodes = np.zeros((0, len(packing.of) if packing else 0))
        self._scale = np.where(limits > 0, limits, 1.0)
        self._owner = np.zeros(0, dtype=np.int64)
        self._index = np.zeros(0, dtype=np.int64)
        self._value = np.zeros(0)
        self._use = np.zeros((0, len(limits)))
        self._live = np.zeros(0, dtype=bool)
        rows = engine.Matrix()
        for s in range(services):
            rows.row(1.0, 1.0, [len(limits) + s], [1.0])
        for k, limit in enumerate((limits / self._scale).tolist()):
            rows.row(-engine.INFINITY, limit, [k], [-1.0])
        count = len(limits) + services
        self._first = count
        self._artificial = np.arange(count, dtype=np.int32)
        self._highs = engine.model(np.ones(count), np.zeros(count), np.full(count, engine.INFINITY), rows)

    @property
    def columns(self) -> int:
        """Number of columns."""
        return len(self._value)

    @property
    def mostly_retired(self) -> bool:
        """Whether more columns are out of use than in it, so that it is time for a new master program."""
        return len(self._live) > _MOST_RETIRED and 2 * int(self._live.sum()) < len(self._live)

    def add(self, owner: int, first: int, values: Array, use: Array, nodes: Array | None = None) -> None:
        """Adds columns of one service; `first` is the number of the first, `use` has shape (columns, rows), `nodes`,
        what they take of nodes, (columns, measures)."""
        count = len(values)
        if not count:
            return
        scaled = use / self._scale
        starts: list[int] = []
        indices: list[int] = []
        entries: list[float] = []
        for row in scaled:
            starts.append(len(indices))
            indices.append(owner)
            entries.append(1.0)
            for k in np.flatnonzero(row > 1e-12).tolist():
                indices.append(self._services + k)
                entries.append(float(row[k]))
        self._highs.addCols(
            count,
            values,
            np.zeros(count),
            np.full(count, engine.INFINITY),
            len(indices),
            np.array(starts, dtype=np.int32),
            np.array(indices, dtype=np.int32),
            np.array(entries),
        )
        self._owner = np.append(self._owner, np.full(count, owner))
        self._index = np.append(self._index, np.arange(first, first + count))
        self._value = np.append(self._value, values)
        self._use = np.vstack([self._use, use])
        if nodes is not None:
            self._nodes = np.vstack([self._nodes, nodes])
        self._live = np.append(self._live, np.ones(count, dtype=bool))

    def retire(self, owner: int) -> None:
        """Takes all columns of a service out of use."""
        mine = np.flatnonzero((self._owner == owner) & self._live)
        self._live[mine] = False
        columns = (mine + self._first).astype(np.int32)
        self._highs.changeColsBounds(len(columns), columns, np.zeros(len(columns)), np.zeros(len(columns)))

    def solve(self, box: Array, deadline: Deadline) -> Priced | None:
        """The linear program with overflow at these prices; None if there was no time."""
        # Dearer than any column and what it does not find room for: a blank stands for want of columns only.
        dear = 10.0 * max(1.0, float(np.abs(self._value).sum()), float((self._use @ box).max(initial=0.0)))
        costs = np.concatenate([box * self._scale, np.full(self._services, dear)])
        self._highs.changeColsCost(len(costs), self._artificial, costs)
        if not engine.run(self._highs, deadline, at_most_s=_SECONDS) or not engine.is_optimal(self._highs):
            return None
        solution = self._highs.getSolution()
        point = np.array(solution.col_value)
        rows = len(self._limits)
        return Priced(
            value=float(self._value @ point[self._first :]),
            prices=np.maximum(-np.array(solution.row_dual)[self._services :] / self._scale, 0.0),
            overflow=point[:rows] * self._scale,
            blank=bool((point[rows : self._first] > 1e-6).any()),
            reduced=np.array(solution.col_dual)[self._first :],
        )

    def choose(
        self,
        priced: Priced,
        incumbent: list[int] | None,
        *,
        slack: float,
        relative: float,
        absolute: float = 0.0,
        deadline: Deadline,
        nodes: int,
        idle: float = 0.0,
    ) -> list[int] | None:
        """The integer program over the columns whose reduced cost is at most `slack`: for every service the number of
        the column chosen, within one of these gaps of the best choice. None if no choice within the rows was found.
        `idle`: what the price of an idle device counts for."""
        kept = (priced.reduced <= slack) & self._live
        now = np.zeros(len(kept), dtype=bool)
        if incumbent is not None:
            now = (np.array(incumbent)[self._owner] == self._index) & self._live
            kept = kept | now
        chosen = np.flatnonzero(kept)
        if len(np.unique(self._owner[chosen])) < self._services:
            return None
        rows = engine.Matrix()
        order = chosen[np.argsort(self._owner[chosen], kind="stable")]
        owner = self._owner[order]
        for s in range(self._services):
            mine = np.flatnonzero(owner == s).tolist()
            rows.row(1.0, 1.0, mine, [1.0] * len(mine))
        count, packing = len(order), self._packing
        value, use, limits, whole = self._value[order], self._use[order], self._limits, 0
        point = now[order].astype(np.float64)
        if packing is not None:
            # A device is paid for with its node: columns for nodes, and what is in use costs nothing beside them.
            whole = len(packing.nodes)
            devices = use[:, [one.row for one in packing.nodes]]
            value = np.concatenate([value - idle * (devices @ packing.price), idle * packing.price * packing.size])
            limits = limits + packing.held @ packing.takes
            use = np.vstack([clean(use - devices @ packing.takes), packing.takes * packing.size[:, None]])
            for m, g in enumerate(packing.of):
                taken = self._nodes[order, m]
                held, filled = float(packing.held_nodes[m]), np.flatnonzero(taken > 0)
                rows.row(-engine.INFINITY, -held, [*filled.tolist(), count + g], [*taken[filled].tolist(), -1.0])
            point = np.concatenate([point, packing.whole(point @ self._nodes[order])])
        for k, limit in enumerate((limits / self._scale).tolist()):
            entries = use[:, k] / self._scale[k]
            used = np.flatnonzero(np.abs(entries) > 1e-12)
            rows.row(-engine.INFINITY, limit, used.tolist(), entries[used].tolist())
        highs = engine.model(
            value,
            np.zeros(count + whole),
            np.concatenate([np.ones(count), np.full(whole, engine.INFINITY)]),
            rows,
            integer=np.ones(count + whole, dtype=bool),
            mip_max_nodes=nodes,
            mip_rel_gap=relative,
            mip_abs_gap=max(absolute, 1e-9),
            mip_heuristic_effort=0.1,
            mip_heuristic_run_rins=True,
            mip_heuristic_run_rens=True,
        )
        if incumbent is not None:
            engine.start(highs, point)
        engine.run(highs, deadline, at_most_s=_SECONDS)
        if not engine.has_solution(highs):
            return None
        point = np.array(highs.getSolution().col_value)[:count]
        answer = [-1] * self._services
        for t in np.flatnonzero(point > 0.5).tolist():
            answer[int(owner[t])] = int(self._index[order[t]])
        return answer if min(answer) >= 0 else None
