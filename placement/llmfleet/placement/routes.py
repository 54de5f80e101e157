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
from llmfleet.placement.solver.stages import WHOLE, Stage, in_step, rows_of, served_share

LEAST_FRACTION = 1e-6
"""A route below this share is rounding."""


def assign(program: ServiceProgram, replicas: Replicas) -> tuple[FloatArray, FloatArray]:
    """(x, u) for given replicas: shares by (bucket, variant) and unserved shares by bucket."""
    capacity = program.capacity(replicas)
    active = np.flatnonzero(capacity > 0).tolist()
    x = np.zeros_like(program.throughput)
    if len(active) <= 1:
        if active and (program.stage is None or program.stage[active[0]] == WHOLE):
            x[:, active[0]] = _fill(program.rates, program.throughput[:, active[0]], capacity[active[0]])
        return x, 1.0 - x.sum(axis=1)
    table = _balanced(program, capacity, active)
    if table is None:
        table = _most(program, capacity, active)
    if table is None and program.stage is not None:
        return x, np.ones(len(program.rates))
    if table is None:
        table = _greedy(program, capacity, active)
    x[:, active] = table
    x = in_step(x, program.stage)
    return x, np.clip(1.0 - program.served(x), 0.0, 1.0)


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
    covers = rows_of(program.stage, len(program.types))[:, active]
    for b, rate in enumerate(program.rates.tolist()):
        lacking = []
        if not serve_all:
            u = problem.add_variable(f"u_{b:03}", 0, 1)
            lacking.append((u, 1.0))
            unserved.append((u, rate))
        for covered in covers:
            terms = [(one, 1.0) for (bucket, column), one in x.items() if bucket == b and covered[column]]
            expression = pulp.LpAffineExpression(terms + lacking)
            problem.addConstraint(pulp.LpConstraint(expression, pulp.LpConstraintEQ, rhs=1.0))
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
    possible = program.throughput[:, active] > 0
    if not all(
        possible[:, covered].any(axis=1).all() for covered in rows_of(program.stage, len(program.types))[:, active]
    ):
        return None
    problem, x = _linear_program(program, capacity, active, serve_all=True)
    answer = minimise(problem)
    if not answer.proven or answer.bound is None or answer.bound > 1 + ROUNDING:
        return None
    table = _table(program, active, x)
    table[table < LEAST_FRACTION] = 0.0
    stage = None if program.stage is None else program.stage[active]
    normalised: FloatArray = table / served_share(table, stage)[:, None]
    return normalised


def _most(program: ServiceProgram, capacity: FloatArray, active: list[int]) -> FloatArray | None:
    problem, x = _linear_program(program, capacity, active, serve_all=False)
    answer = minimise(problem)
    if not answer.proven:
        return None
    table = _table(program, active, x)
    table[table < LEAST_FRACTION] = 0.0
    return table


def routes_of(
    names: Sequence[str],
    throughput: FloatArray,
    replicas: Replicas,
    shares: FloatArray,
    stage: Stage | None = None,
) -> list[Route]:
    """The table as routes, by bucket and variant.

    `names`, `throughput` (buckets, variants), `replicas` and `stage` are of all variants; `shares` (buckets, variants)
    is x, NaN in buckets without demand.
    """
    counts = np.array(replicas, dtype=np.float64)
    routes = []
    for b in range(len(throughput)):
        row = shares[b]
        if np.isnan(row).any():
            row = _by_capacity(counts * throughput[b], stage)
        routes += [
            Route(bucket=b, variant=names[v], fraction=min(1.0, float(row[v])))
            for v in range(len(names))
            if row[v] >= LEAST_FRACTION
        ]
    return routes


def _by_capacity(capacity: FloatArray, stage: Stage | None) -> FloatArray:
    """Shares of a bucket without demand, by what the replicas of each variant can do of it, and of both stages no more
    than the lesser. Shape (variants,)."""
    even = in_step(capacity, stage)
    total = served_share(even, stage)
    return np.asarray(even / total if total > 0 else even)


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
    covers = rows_of(program.stage, len(names))
    if any((np.abs(x[:, covered].sum(axis=1) - 1.0) > ROUNDING).any() for covered in covers):
        return None
    if ((x > 0) & (program.throughput <= 0)).any():
        return None
    load = np.divide(
        program.rates[:, None] * x, program.throughput, out=np.zeros_like(x), where=program.throughput > 0
    ).sum(axis=0)
    return x if (load <= program.capacity(replicas) * (1 + ROUNDING)).all() else None
