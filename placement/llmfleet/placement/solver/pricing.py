"""One service alone at given prices: its cheapest replica vectors, and a proven bound of all of them.

    price(terms) -> least of  cost y + change |y - y_previous| + unserved f(y) + missing m

over the integer vectors y that the service's own limits allow. The program and its cuts are those of `cut_program`: in
its linear form new cuts are sought first (most calls after the first end there), and the dual bound of its integer form
is the proof. What was proven is then added to the linear program as a row of its own (a Lagrangian cut): it holds at
all prices, too.

Every vector met on the way, with its true f, is a *column* for the master program.

A service is priced in one of two modes. **whole**: all demand must be served and no replica may be missing; f and m do
not exist. **partial**: they do.

A service that has to survive losses has, beside f, one such function for each loss, of what is left of y: in whole mode
each must be zero; in partial mode a further column r is no less than any of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import engine
from llmfleet.placement.solver.cut_program import TOLERANCE, WHOLE, CutProgram, Terms
from llmfleet.placement.solver.problem import AT_RISK, Array, Replicas, Service

_NOISE = (0.1,) * 8 + (0.3,) * 8
_SECONDS = 120.0
_NODES = 300
_MOST_NODES = 64 * _NODES


class Pricer(CutProgram):
    """One service's program in one mode, and the columns found so far."""

    def __init__(self, service: Service, limits: Array, *, whole: bool) -> None:
        super().__init__(service, limits, whole=whole)
        self.replicas: list[Replicas] = []
        self.unserved: list[float] = []
        """Shortage of each column, as a share of the demand."""
        self._known: dict[Replicas, int | None] = {}
        self._vectors = np.zeros((0, service.variants))
        self._changes = np.zeros((0, service.variants))
        self._shortage = np.zeros((0, 2))
        self._parts = np.zeros((0, 2))
        self._seeded = False
        self._nodes = _NODES
        self.cut_short = 0.0
        """What the last pricing left open between the best column and what it proved, for want of nodes."""

    def rebased(self, service: Service) -> Pricer:
        """The program of a service that differs in its replicas in force only, with the cuts and columns of this one.
        Cuts are about what is served, so they hold whatever is in force."""
        other = Pricer(service, self.limits, whole=self.whole)
        other._seeded = self._seeded
        for w, bound, scenario in zip(self.cut_prices, self._cut_bounds, self.cut_scenarios, strict=True):
            other._add_cut(w, bound, scenario)
        for replicas, (share, missing), parts in zip(
            self.replicas, self._shortage.tolist(), self._parts.tolist(), strict=True
        ):
            other._add_column(replicas, share, missing, parts)
        return other

    # Columns

    def add(self, replicas: Replicas) -> int | None:
        """Adds a column, with the cut that holds its f up; its index, or None where it is not allowed."""
        if replicas in self._known:
            return self._known[replicas]
        index: int | None = None
        within = all(0 <= count <= most for count, most in zip(replicas, self.most, strict=True))
        if within and self.service.allows(replicas, self.limits):
            judged = self._judge(np.array(replicas, dtype=np.float64))
            self._learn(judged)
            missing = self.service.missing(replicas)
            parts = [judged[0][0], max((share for share, _ in judged[1:]), default=0.0)]
            parts = [0.0 if part <= WHOLE else part for part in parts]
            share = parts[0] + AT_RISK * parts[1]
            if not self.whole or (share == 0.0 and missing == 0):
                index = self._add_column(replicas, share, missing, parts)
        self._known[replicas] = index
        return index

    def _add_column(self, replicas: Replicas, share: float, missing: float, parts: Sequence[float]) -> int:
        index = self._known[replicas] = len(self.replicas)
        self.replicas.append(replicas)
        self.unserved.append(share)
        vector = np.array(replicas, dtype=np.float64)
        before = vector if self.service.previous is None else np.array(self.service.previous)
        self._vectors = np.vstack([self._vectors, vector])
        self._changes = np.vstack([self._changes, np.abs(vector - before)])
        self._shortage = np.vstack([self._shortage, [share, missing]])
        self._parts = np.vstack([self._parts, parts])
        return index

    def values(self, terms: Terms) -> Array:
        """What every column costs, shape (columns,)."""
        if not len(self.replicas):
            return np.zeros(0)
        value: Array = (
            self._vectors @ terms.cost
            + (self._changes @ terms.change if self._has_change else 0.0)
            + terms.unserved * self._shortage[:, 0]
            + terms.missing * self._shortage[:, 1]
        )
        return value

    def uses(self, use: Array) -> Array:
        """`use` (rows, variants) of every column, shape (columns, rows)."""
        product: Array = self._vectors @ use.T
        return product

    @property
    def shortage(self) -> Array:
        """Of every column the shortage and the missing replicas, shape (columns, 2)."""
        return self._shortage

    # Pricing

    def price(self, terms: Terms, *, relative: float, absolute: float, deadline: Deadline, passes: int = 3) -> float:
        """A proven lower bound; infinite where no vector is allowed. Columns are added on the way.

        Ends when the best column is within `relative` of it, or `absolute`, or the work allowed is done.
        """
        if not self.feasible:
            return float("inf")
        costs = self.costs(terms)
        for highs in (self._linear, self._integer):
            highs.changeColsCost(len(self._columns), self._columns, costs)
        self._seed(terms)
        best, self.cut_short = self.best(terms), 0.0
        proven, best = self._linear_passes(terms, best, relative, absolute, deadline, passes)
        if np.isfinite(proven) and not _close(best, proven, relative, absolute):
            proven = self._integer_passes(terms, proven, best, relative, absolute, deadline)
        if np.isfinite(proven) and proven > 0:
            self._hold(costs, proven)
        return max(proven, 0.0)

    def search_more(self) -> None:
        """Lets the next pricing search four times as many nodes, up to 64 times as many as the first."""
        self._nodes = min(_MOST_NODES, 4 * self._nodes)

    def _seed(self, terms: Terms) -> None:
        prices = terms.cost if self.whole else terms.cost / max(terms.unserved, 1e-30)
        start = prices[None, :]
        if not self._seeded:
            self._seeded = True
            chance = np.random.default_rng(zlib.crc32(self.service.key.encode()))
            noise = np.exp(chance.normal(size=(len(_NOISE), self.service.variants)) * np.array(_NOISE)[:, None])
            start = np.vstack([start, start * noise])
        for scenario in range(len(self._loads)):
            self.cut(start, scenario)

    def best(self, terms: Terms) -> float:
        """What the best column costs; infinite without one."""
        return float(self.values(terms).min()) if len(self.replicas) else float("inf")

    def _linear_passes(
        self, terms: Terms, best: float, relative: float, absolute: float, deadline: Deadline, passes: int
    ) -> tuple[float, float]:
        proven, n = 0.0, self.service.variants
        for _ in range(passes if self.replicas else 15):
            if not engine.run(self._linear, deadline, at_most_s=_SECONDS) or not engine.is_optimal(self._linear):
                return (float("inf"), best) if engine.is_infeasible(self._linear) else (proven, best)
            value = float(self._linear.getInfo().objective_function_value)
            proven = max(proven, value - TOLERANCE * abs(value))
            if _close(best, proven, relative, absolute):
                break
            point = np.array(self._linear.getSolution().col_value)
            y = np.maximum(point[:n], 0.0)
            before = len(self._cuts)
            for shift in (0.35, 0.0):
                self.add_near(np.ceil(y - shift - 1e-6), terms)
            best = self.best(terms)
            capacity = np.maximum(y - self.service.held_back * point[self._z :], 0.0) if self._has_use else y
            if len(self.service.rates):
                self._learn(self._judge_capacity(capacity))
            if len(self._cuts) == before:
                break
        return proven, best

    def _integer_passes(
        self, terms: Terms, proven: float, best: float, relative: float, absolute: float, deadline: Deadline
    ) -> float:
        highs, n = self._integer, self.service.variants
        for _ in range(6):
            highs.setOptionValue("mip_max_nodes", self._nodes)
            highs.setOptionValue("mip_rel_gap", relative)
            highs.setOptionValue("mip_abs_gap", max(absolute, 1e-9))
            if self.replicas:
                engine.start(highs, self.point(int(self.values(terms).argmin())))
            if not engine.run(highs, deadline, at_most_s=_SECONDS) and deadline.remaining <= 0:
                return proven
            if engine.is_infeasible(highs):
                return float("inf")
            bound = float(highs.getInfo().mip_dual_bound)
            if np.isfinite(bound):
                proven = max(proven, bound - TOLERANCE * abs(bound))
            if _close(best, proven, relative, absolute) or not engine.has_solution(highs):
                break
            y = np.round(np.array(highs.getSolution().col_value)[:n])
            before = (len(self._cuts), len(self.replicas))
            self.add_near(y, terms)
            best_index = int(self.values(terms).argmin()) if self.replicas else None
            if best_index is not None:
                best = self.best(terms)
                middle = (y + self._vectors[best_index]) / 2
                self._learn(self._judge(middle))
            if before == (len(self._cuts), len(self.replicas)):
                if engine.is_out_of_nodes(highs):
                    self.cut_short = best - proven
                break
        return proven

    def point(self, index: int) -> Array:
        """A column as a point of the program."""
        point = np.zeros(len(self._columns))
        n = self.service.variants
        point[:n] = self._vectors[index]
        if self._has_change:
            point[self._d : self._d + n] = self._changes[index]
        if self._has_unserved:
            point[self._f] = min(1.0, self._parts[index, 0] + TOLERANCE)
        if self._has_risk:
            point[self._r] = min(1.0, self._parts[index, 1] + TOLERANCE)
        if self._has_missing:
            point[self._m] = self._shortage[index, 1]
        if self._has_use:
            point[self._z :] = self._vectors[index] > 0
        return point

    def add_near(self, y: Array, terms: Terms) -> None:
        """Adds a vector; where all demand must be served and it does not do so, the nearest above it that does."""
        y = np.minimum(y, self.most)
        self.add(tuple(int(count) for count in y))
        if not self.whole:
            return
        for _ in range(12):
            share, prices = max(self._judge(y), key=lambda one: one[0])
            lacking = self.service.minimum - y.sum()
            if share > WHOLE:
                steps = np.ceil(share / np.maximum(prices, 1e-12) - 1e-6)
            elif lacking > 0:
                steps, prices = np.full(len(y), lacking), np.ones(len(y))
            else:
                break
            steps = np.minimum(steps, np.array(self.most) - y)
            price = np.where((prices > 0) & (steps > 0), terms.cost * steps, np.inf)
            if np.isinf(price.min()):
                return
            y = y.copy()
            y[int(price.argmin())] += steps[int(price.argmin())]
        self.add(tuple(int(count) for count in y))

    def add_neighbours(self, y: Array) -> None:
        """Adds the vectors with one replica more, where this one leaves demand unserved."""
        if max(share for share, _ in self._judge(y)) <= WHOLE:
            return
        for v in range(len(y)):
            more = y.copy()
            more[v] += 1
            self.add(tuple(int(count) for count in more))


def _close(best: float, proven: float, relative: float, absolute: float) -> bool:
    return bool(np.isfinite(best)) and best - proven <= max(relative * abs(best), absolute)
