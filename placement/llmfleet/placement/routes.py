"""The routing table x of one service, once its replicas are known.

The program's own x is one of many with the same cost, and which one the solver happens to return says nothing. Here
x is chosen, in this order:

1. the table in force, if the new demand still fits: routes that need not change do not change;
2. else, if all demand can be served, the one with the smallest highest utilisation over the variants: the headroom is
   spread evenly, so the table stands the next fluctuation (a small linear program; closed form for one variant);
3. else the one that serves the most requests per second. A request is a request here: long ones, of which a replica
   does fewer, go short first.

Buckets without demand get routes as well, to those variants that meet the objective there, by what their replicas
can do: the first request of a kind must not go to an engine that is too slow for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pulp

from llmfleet.api import Route, ServicePlan
from llmfleet.placement.highs import ROUNDING, minimise
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.service_program import Replicas, ServiceProgram

LEAST_FRACTION = 1e-6
"""A route below this share is rounding."""


def assign(program: ServiceProgram, replicas: Replicas) -> tuple[FloatArray, FloatArray]:
    """(x, u) for given replicas: shares by (bucket, variant) and unserved shares by bucket."""
    capacity = program.capacity(replicas)
    active = np.flatnonzero(capacity > 0).tolist()
    x = np.zeros_like(program.throughput)
    if len(active) <= 1:
        if active:
            x[:, active[0]] = _fill(program.rates, program.throughput[:, active[0]], capacity[active[0]])
        return x, 1.0 - x.sum(axis=1)
    table = _balanced(program, capacity, active)
    if table is None:
        table = _most(program, capacity, active)
    if table is None:
        table = _greedy(program, capacity, active)
    x[:, active] = table
    return x, np.clip(1.0 - x.sum(axis=1), 0.0, 1.0)


def _fill(rates: FloatArray, throughput: FloatArray, capacity: float) -> FloatArray:
    """Shares that this capacity of one variant, in replicas, serves, cheapest requests first: the most in total."""
    shares = np.zeros(len(rates))
    left = float(capacity)
    for b in np.argsort(-throughput, kind="stable").tolist():
        if throughput[b] <= 0:
            break
        load = rates[b] / throughput[b]
        shares[b] = 1.0 if load <= left * (1 + ROUNDING) else left / load
        left = max(0.0, left - load)
    return shares


def _greedy(program: ServiceProgram, capacity: FloatArray, active: list[int]) -> FloatArray:
    """Variant after variant; only for numbers on which HiGHS gives no answer."""
    table = np.zeros((len(program.rates), len(active)))
    for column, v in enumerate(active):
        left = program.rates * (1.0 - table.sum(axis=1))
        shares = _fill(np.maximum(left, 1e-300), program.throughput[:, v], float(capacity[v]))
        table[:, column] = shares * left / program.rates
    return table


def _linear_program(
    program: ServiceProgram, capacity: FloatArray, active: list[int], *, serve_all: bool
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable]]:
    problem = pulp.LpProblem("routes", pulp.LpMinimize)
    x = {
        (b, column): problem.add_variable(f"x_{b:03}_{column:03}", 0, 1)
        for b in range(len(program.rates))
        for column, v in enumerate(active)
        if program.throughput[b, v] > 0
    }
    highest = problem.add_variable("highest", 0, None if serve_all else 1)
    unserved = []
    for b, rate in enumerate(program.rates.tolist()):
        terms = [(variable, 1.0) for (bucket, _), variable in x.items() if bucket == b]
        if not serve_all:
            u = problem.add_variable(f"u_{b:03}", 0, 1)
            terms.append((u, 1.0))
            unserved.append((u, rate))
        problem.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintEQ, rhs=1.0))
    for column, v in enumerate(active):
        terms = [
            (variable, float(program.rates[b] / program.throughput[b, v]))
            for (b, other), variable in x.items()
            if other == column
        ]
        terms.append((highest, -float(capacity[v])))
        problem.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=0.0))
    problem.setObjective(pulp.LpAffineExpression([(highest, 1.0)] if serve_all else unserved))
    return problem, x


def _table(program: ServiceProgram, active: list[int], x: dict[tuple[int, int], pulp.LpVariable]) -> FloatArray:
    table = np.zeros((len(program.rates), len(active)))
    for (b, column), variable in x.items():
        table[b, column] = min(1.0, max(0.0, variable.varValue))
    return table


def _balanced(program: ServiceProgram, capacity: FloatArray, active: list[int]) -> FloatArray | None:
    if not (program.throughput[:, active] > 0).any(axis=1).all():
        return None
    problem, x = _linear_program(program, capacity, active, serve_all=True)
    answer = minimise(problem)
    if not answer.proven or answer.bound is None or answer.bound > 1 + ROUNDING:
        return None
    table = _table(program, active, x)
    table[table < LEAST_FRACTION] = 0.0
    normalised: FloatArray = table / table.sum(axis=1, keepdims=True)
    return normalised


def _most(program: ServiceProgram, capacity: FloatArray, active: list[int]) -> FloatArray | None:
    problem, x = _linear_program(program, capacity, active, serve_all=False)
    answer = minimise(problem)
    if not answer.proven:
        return None
    table = _table(program, active, x)
    table[table < LEAST_FRACTION] = 0.0
    return table


def routes_of(names: Sequence[str], throughput: FloatArray, replicas: Replicas, shares: FloatArray) -> list[Route]:
    """The table as routes, by bucket and variant.

    `names`, `throughput` (buckets, variants) and `replicas` are of all variants; `shares` (buckets, variants) is x,
    NaN in buckets without demand.
    """
    counts = np.array(replicas, dtype=np.float64)
    routes = []
    for b in range(len(throughput)):
        row = shares[b]
        if np.isnan(row).any():
            capacity = counts * throughput[b]
            row = capacity / capacity.sum() if capacity.sum() > 0 else capacity
        routes += [
            Route(bucket=b, variant=names[v], fraction=min(1.0, float(row[v])))
            for v in range(len(names))
            if row[v] >= LEAST_FRACTION
        ]
    return routes


def kept_shares(
    previous: ServicePlan, names: Sequence[str], program: ServiceProgram, buckets: Sequence[int], replicas: Replicas
) -> FloatArray | None:
    """The previous table's x on the program's buckets, if it serves all of the new demand with these replicas.

    `buckets` are the profile's indices of the program's buckets. None if it does not fit (any more).
    """
    column = {name: v for v, name in enumerate(names)}
    row = {bucket: b for b, bucket in enumerate(buckets)}
    x = np.zeros_like(program.throughput)
    for route in previous.routes:
        if route.bucket in row:
            if route.variant not in column:
                return None
            x[row[route.bucket], column[route.variant]] = route.fraction
    if (np.abs(x.sum(axis=1) - 1.0) > ROUNDING).any() or ((x > 0) & (program.throughput <= 0)).any():
        return None
    load = np.divide(
        program.rates[:, None] * x, program.throughput, out=np.zeros_like(x), where=program.throughput > 0
    ).sum(axis=0)
    return x if (load <= program.capacity(replicas) * (1 + ROUNDING)).all() else None
