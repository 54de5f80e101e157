"""One service's program, and the cuts that hold its unserved demand up.

    CutProgram(service, limits, whole) --cut(prices of capacity)--> the same, tighter; costs(terms) --> its objective

The program has a handful of columns (y, |y - previous|, f, m), no x: unserved demand f(y) is under-estimated by cuts
(`unserved.bounds`), which hold at any price and so are kept for ever. It is there twice, as a linear program and as the
integer program, and every cut is a row of both. Cuts are of one scenario: 0 is that nothing is lost, k that the k-th
loss happened.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmfleet.placement.solver import engine
from llmfleet.placement.solver.problem import AT_RISK, Array, Service
from llmfleet.placement.solver.stages import cheapest_way
from llmfleet.placement.solver.unserved import Unserved, bounds

WHOLE = 1e-6
"""Share of the demand below which what is unserved is rounding: HiGHS keeps rows to 1e-7."""
_LEAST_WEIGHT = 1e-3
"""Weight of a bucket, at least, where all demand must be served: rare requests must be served as well."""
TOLERANCE = 1e-7
"""Relative amount by which what HiGHS proves is relaxed."""


@dataclass(frozen=True)
class Terms:
    """What one unit of each of a service's quantities costs, shadow prices of rows included."""

    cost: Array
    """Per replica, shape (variants,)."""
    change: Array
    """Per replica more or less than before, shape (variants,)."""
    unserved: float
    """Per share of the service's demand that is not served."""
    missing: float
    """Per replica missing to the minimum."""


class CutProgram:
    """One service's program in one mode, without prices."""

    def __init__(self, service: Service, limits: Array, *, whole: bool) -> None:
        self.service, self.limits, self.whole = service, limits, whole
        share = service.rates / service.demand if len(service.rates) else service.rates
        weight = np.maximum(share, _LEAST_WEIGHT) if whole else share
        self.most = service.most(limits)
        usable = np.array(self.most) >= np.array(service.least)
        self.load = np.where(usable[None, :], service.load, np.inf)
        unreachable = np.isinf(cheapest_way(self.load, service.stage))
        self._unreachable = float(share[unreachable].sum())
        after = [np.where(usable[None, :], service.load_without(loss), np.inf) for loss in service.losses]
        lost_for_good = [float(share[np.isinf(cheapest_way(load, service.stage))].sum()) for load in after]
        self._unreachable_at_worst = max(lost_for_good, default=0.0)
        self.feasible = not (whole and (bool(unreachable.any()) or self._unreachable_at_worst > 0))
        self._loads = [self.load, *after]
        self._functions = [Unserved(load, weight, service.cost, service.stage) for load in self._loads]
        self._weight = None if whole else weight
        self._cuts: set[bytes] = set()
        self.cut_prices: list[Array] = []
        self.cut_scenarios: list[int] = []
        self._cut_bounds: list[float] = []
        self._build()

    def _build(self) -> None:
        service, n = self.service, self.service.variants
        self._has_change = service.previous is not None and bool((service.change > 0).any())
        self._has_missing = not self.whole and service.minimum > 0
        self._has_unserved = not self.whole and len(service.rates) > 0
        self._has_risk = self._has_unserved and bool(service.losses)
        self._has_use = bool((service.held_back > 0).any()) or service.distinct is not None
        self._d = n
        self._f = self._d + (n if self._has_change else 0)
        self._r = self._f + int(self._has_unserved)
        self._m = self._r + int(self._has_risk)
        self._z = self._m + int(self._has_missing)
        count = self._z + (n if self._has_use else 0)
        lower, upper = np.zeros(count), np.full(count, engine.INFINITY)
        upper[:n] = self.most
        integer = np.zeros(count, dtype=bool)
        integer[:n] = True
        if self._has_unserved:
            lower[self._f], upper[self._f] = self._unreachable * (1 - WHOLE), 1.0
        if self._has_risk:
            lower[self._r], upper[self._r] = self._unreachable_at_worst * (1 - WHOLE), 1.0
        if self._has_missing:
            upper[self._m] = service.minimum
        if self._has_use:
            upper[self._z :] = 1.0
            integer[self._z :] = True
        rows, every = engine.Matrix(), list(range(n))
        if self._has_change:
            assert service.previous is not None
            for v, before in enumerate(service.previous):
                rows.row(-before, engine.INFINITY, [self._d + v, v], [1.0, -1.0])
                rows.row(before, engine.INFINITY, [self._d + v, v], [1.0, 1.0])
        if service.minimum > 0:
            missing = [self._m] if self._has_missing else []
            rows.row(service.minimum, engine.INFINITY, every + missing, [1.0] * (n + len(missing)))
        if service.maximum is not None:
            rows.row(-engine.INFINITY, service.maximum, every, [1.0] * n)
        for use, limit in zip(service.use, self.limits.tolist(), strict=True):
            if float(use @ np.array(self.most)) > limit * (1 + 1e-9):
                used = np.flatnonzero(use > 0).tolist()
                rows.row(-engine.INFINITY, 1.0, used, (use[used] / limit).tolist() if limit > 0 else [1.0] * len(used))
        if self._has_use:
            for v, least in enumerate(service.least):
                rows.row(0.0, engine.INFINITY, [v, self._z + v], [1.0, -float(least)])
                rows.row(-engine.INFINITY, 0.0, [v, self._z + v], [1.0, -float(max(self.most[v], least))])
            if service.distinct is not None:
                rows.row(-engine.INFINITY, service.distinct, list(range(self._z, count)), [1.0] * n)
        costs = np.zeros(count)
        self._columns = np.arange(count, dtype=np.int32)
        self._linear = engine.model(costs, lower, upper, rows)
        self._integer = engine.model(costs, lower, upper, rows, integer=integer)
        self.program = (costs, lower, upper, integer, rows)

    def costs(self, terms: Terms) -> Array:
        """Objective of the program's columns."""
        costs = np.zeros(len(self._columns))
        costs[: self.service.variants] = terms.cost
        if self._has_change:
            costs[self._d : self._d + self.service.variants] = terms.change
        if self._has_unserved:
            costs[self._f] = terms.unserved
        if self._has_risk:
            costs[self._r] = AT_RISK * terms.unserved
        if self._has_missing:
            costs[self._m] = terms.missing
        return costs

    def row(self, use: Array, unserved_use: float, missing_use: float) -> list[tuple[int, float]]:
        """Entries of a shared row in the program's columns."""
        entries = [(v, float(use[v])) for v in np.flatnonzero(use).tolist()]
        if self._has_unserved and unserved_use > 0:
            entries.append((self._f, unserved_use))
            if self._has_risk:
                entries.append((self._r, AT_RISK * unserved_use))
        if self._has_missing and missing_use > 0:
            entries.append((self._m, missing_use))
        return entries

    def cut(self, prices: Array, scenario: int = 0) -> None:
        """Adds a scenario's cuts of these capacity prices, shape (n, variants), where new and saying something."""
        if not len(self.service.rates):
            return
        load = self._loads[scenario]
        if scenario:
            prices = np.where(self.service.losses[scenario - 1].lost, 0.0, prices)
        prices = prices[prices.max(axis=1) > 0]
        if not len(prices):
            return
        if self._weight is None:
            prices = prices / prices.max(axis=1, keepdims=True)
        else:
            # Dearer than unserved demand says no more; rows are scaled, and HiGHS refuses coefficients of 1e15.
            prices = np.minimum(prices, (self._weight[:, None] / load).max(axis=0))
        for w, bound in zip(prices, bounds(load, self._weight, prices, self.service.stage).tolist(), strict=True):
            if bound <= (0.0 if self.whole else TOLERANCE) or not np.isfinite(bound):
                continue
            self._add_cut(w, bound, scenario)

    def _add_cut(self, w: Array, bound: float, scenario: int) -> None:
        scale = 1.0 / bound
        # Replicas are whole, and the fewest that are of use may be enough: a higher price says no more.
        first = np.array(self.service.least) - self.service.held_back
        w = np.minimum(w, np.where(first > 1e-6, bound / np.maximum(first, 1e-6), np.inf))
        entries = w * scale if self.whole else np.append(w * scale, scale)
        mark = np.round(np.log(np.maximum(entries, 1e-12)), 7).tobytes() + scenario.to_bytes(2)
        if mark in self._cuts:
            return
        self._cuts.add(mark)
        self.cut_prices.append(w)
        self.cut_scenarios.append(scenario)
        self._cut_bounds.append(bound)
        columns = np.flatnonzero(w * scale > 1e-9).astype(np.int32)
        values = w[columns] * scale
        if self._has_unserved:
            columns = np.append(columns, np.int32(self._r if scenario else self._f))
            values = np.append(values, scale)
        if self._has_use:
            held = np.flatnonzero(w * self.service.held_back * scale > 1e-9)
            columns = np.append(columns, (self._z + held).astype(np.int32))
            values = np.append(values, -(w * self.service.held_back * scale)[held])
        order = np.argsort(columns)
        for highs in (self._linear, self._integer):
            highs.addRow(1.0, engine.INFINITY, len(columns), columns[order], values[order])
        self.program[4].row(1.0, engine.INFINITY, columns[order].tolist(), values[order].tolist())

    def _judge(self, vector: Array) -> list[tuple[float, Array]]:
        """By scenario the share that is unserved, and the prices of capacity."""
        if not len(self.service.rates):
            return [(0.0, np.zeros(self.service.variants))]
        return self._judge_capacity(self.service.capacity(vector))

    def _judge_capacity(self, capacity: Array) -> list[tuple[float, Array]]:
        return [function(capacity) for function in self._functions]

    def _learn(self, judged: list[tuple[float, Array]]) -> None:
        for scenario, (_, prices) in enumerate(judged):
            self.cut(prices[None, :], scenario)

    def linear_bound(self, terms: Terms) -> float:
        """A weak bound without any program: the price of capacity is that of the replicas."""
        if not len(self.service.rates):
            return 0.0
        weight = None if self._weight is None else self._weight * terms.unserved
        return float(bounds(self.load, weight, terms.cost[None, :], self.service.stage)[0])

    def _hold(self, costs: Array, proven: float) -> None:
        """Adds what was proven to the linear program: it holds whatever the prices are."""
        if proven <= TOLERANCE * float(np.abs(costs).max()):
            return  # rounding, and as a row of coefficients of 1e15 it makes HiGHS refuse the whole program
        scale = 1.0 / proven
        columns = np.flatnonzero(np.abs(costs * scale) > 1e-9).astype(np.int32)
        if len(columns):
            self._linear.addRow(1.0 - TOLERANCE, engine.INFINITY, len(columns), columns, costs[columns] * scale)
            self.program[4].row(1.0 - TOLERANCE, engine.INFINITY, columns.tolist(), (costs[columns] * scale).tolist())
