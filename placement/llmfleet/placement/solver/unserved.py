"""The service function f(y): the demand that given replicas leave unserved at best, and what capacity is worth.

    f(C) = min sum_b weight[b] u[b]
           sum_v x[b,v] + u[b] = 1,   sum_b load[b,v] x[b,v] <= C[v],   x, u >= 0

One linear program per service, kept alive: only the right-hand sides C change, and the next answer is a few pivots
away. Its dual gives, for *any* prices w >= 0 of capacity, a bound in closed form,

    f(C) + sum_v w[v] C[v]  >=  D(w) = sum_b min(weight[b], min_v w[v] load[b,v])

so a cut is computed from w alone, and the linear program's tolerances never touch its validity: w only says where the
bound is tight. Where all demand must be served (u = 0) the first term of the min goes: a stronger bound. Where variants
serve stages, a bucket has two rows, and the min is over ways (`stages`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmfleet.placement.solver import engine
from llmfleet.placement.solver.problem import Array
from llmfleet.placement.solver.stages import Stage, cheapest_way, rows_of

SLACK = 1e-9
"""Relative amount by which bounds are relaxed against floating point: 3.0000000001 replicas are three."""


def bounds(load: Array, weight: Array | None, prices: Array, stage: Stage | None = None) -> Array:
    """D(w) for prices of shape (n, variants), shape (n,); `weight` None where all demand must be served.

    Infinite loads (a variant never serves the bucket) are no way to serve it at any price.
    """
    with np.errstate(invalid="ignore"):
        each = prices[:, None, :] * load[None, :, :]
    each = np.where(np.isinf(load)[None, :, :], np.inf, each)
    cheapest = cheapest_way(each, stage)
    if weight is not None:
        cheapest = np.minimum(cheapest, weight[None, :])
    total: Array = cheapest.sum(axis=1) * (1 - SLACK)
    return total


class Unserved:
    """f of one service."""

    def __init__(self, load: Array, weight: Array, prices: Array, stage: Stage | None = None) -> None:
        """`load` (buckets, variants), infinite where impossible; `weight` (buckets,); `prices` (variants,): what
        capacity may be worth, at a guess, for the first answer to start from."""
        self.buckets, self.variants = load.shape
        self._covers = rows_of(stage, self.variants)
        possible = np.argwhere(np.isfinite(load))
        self._buckets_of_x, self._variants_of_x = possible[:, 0], possible[:, 1]
        self._highs: Any = None
        self._inverse = 1.0 / load
        if not len(possible):
            self._total = float(weight.sum())
            return
        count = len(possible)
        # Rows are scaled by the whole load of the variant: capacities then are shares of it.
        finite = np.where(np.isfinite(load), load, 0.0)
        self._scale = np.maximum(finite.sum(axis=0), 1e-300)
        rows = self._matrix(finite / self._scale)
        of_buckets = len(self._covers) * self.buckets
        costs = np.concatenate([np.zeros(count), weight])
        # No upper bounds: the rows imply them, and a bound would take its part of the rows' duals.
        lower, upper = np.zeros(count + self.buckets), np.full(count + self.buckets, engine.INFINITY)
        self._highs = engine.model(costs, lower, upper, rows)
        self._rows = np.arange(of_buckets, of_buckets + self.variants, dtype=np.int32)
        self._low = np.full(self.variants, -engine.INFINITY)
        self._columns_of = [np.flatnonzero(self._variants_of_x == v).astype(np.int32) for v in range(self.variants)]
        self._open = np.ones(self.variants, dtype=bool)
        if stage is not None:
            return
        # Every bucket at its cheapest variant, or unserved where there is none: few pivots from any answer.
        with np.errstate(invalid="ignore"):
            each = np.where(np.isfinite(load), np.maximum(prices, 1e-12)[None, :] * load, np.inf)
        within = np.full((self.buckets, self.variants), -1)
        within[self._buckets_of_x, self._variants_of_x] = np.arange(count)
        chosen = within[np.arange(self.buckets), each.argmin(axis=1)]
        basic = np.where(chosen >= 0, chosen, count + np.arange(self.buckets))
        engine.start_basis(self._highs, basic.tolist(), range(self.buckets, self.buckets + self.variants))

    def _matrix(self, shares: Array) -> engine.Matrix:
        """For each stage a row for each bucket (all is served, or counted as unserved), then one for each variant."""
        every = np.arange(self.buckets)
        columns, counts = [], []
        for covered in self._covers:
            inside = np.flatnonzero(covered[self._variants_of_x])
            of_bucket = np.append(self._buckets_of_x[inside], every)
            order = np.argsort(of_bucket, kind="stable")
            columns.append(np.append(inside, len(self._buckets_of_x) + every)[order])
            counts.append(np.bincount(of_bucket, minlength=self.buckets))
        served = sum(map(len, columns))
        of_variant = np.argsort(self._variants_of_x, kind="stable")
        used = shares[self._buckets_of_x[of_variant], self._variants_of_x[of_variant]]
        columns.append(of_variant)
        counts.append(np.bincount(self._variants_of_x, minlength=self.variants))
        of_buckets = len(self._covers) * self.buckets
        return engine.Matrix(
            lower=[1.0] * of_buckets + [-engine.INFINITY] * self.variants,
            upper=[1.0] * of_buckets + [0.0] * self.variants,
            starts=[0, *np.cumsum(np.concatenate(counts)).tolist()],
            columns=np.concatenate(columns).tolist(),
            values=[1.0] * served + used.tolist(),
        )

    def __call__(self, capacity: Array) -> tuple[float, Array]:
        """(f, w): least unserved weight at this capacity (variants,), and the price of a variant's capacity."""
        if self._highs is None:
            return self._total, np.zeros(self.variants)
        shares = np.minimum(np.maximum(capacity, 0.0) * (1 + SLACK) / self._scale, 2.0)
        self._highs.changeRowsBounds(len(self._rows), self._rows, self._low, shares)
        self._close(capacity > 0)
        self._highs.run()
        if not engine.is_optimal(self._highs):
            self._highs.clearSolver()
            self._highs.run()
        if not engine.is_optimal(self._highs):
            raise RuntimeError("the service's transport program, which always has a solution, was not solved")
        duals = np.array(self._highs.getSolution().row_dual)
        value = float(self._highs.getInfo().objective_function_value)
        prices: Array = np.maximum(-duals[self._rows], 0.0) / self._scale
        if not self._open.all():
            # What is closed has no dual: the lowest price at which the bound is as tight, its most helpful bucket's.
            closed = ~self._open
            of_rows = duals[: len(self._covers) * self.buckets].reshape(len(self._covers), self.buckets)
            served = of_rows[0][:, None] if len(of_rows) == 1 else of_rows.T @ self._covers[:, closed].astype(float)
            worth = np.maximum(served, 0.0) * self._inverse[:, closed]
            prices[closed] = worth.max(axis=0)
        return max(0.0, value), prices

    def _close(self, opened: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        """Without capacity nothing is served, however small its load: a row's tolerance would let it pass."""
        for v in np.flatnonzero(opened != self._open).tolist():
            columns = self._columns_of[v]
            upper = np.full(len(columns), engine.INFINITY if opened[v] else 0.0)
            self._highs.changeColsBounds(len(columns), columns, np.zeros(len(columns)), upper)
        self._open = opened
