"""The closing step: all services' programs and the shared rows as one integer program, without x.

The rounds leave a duality gap: their bound is that of mixtures of columns. It is small beside many services and large
beside few. For those, one program over all (y, |y - previous|, f, m), with every cut found so far and what the pricing
proved, has few columns and a bound of its own, which holds since all its rows do. Nodes that are paid for whole are
columns of it, too. Its answer is judged by the true f, which gives new cuts and columns; the neighbourhood of the
answer is offered to the master program as well. Repeated, this is Benders' decomposition: it ends at the optimum, if
the work allowed does not end first.

Of a shortage among many services a joint program proves little more, in minutes. What is missing there is a plan: whole
replicas that fill scarce rows to the last device. Those are near the best plan so far (`improve`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmfleet.placement.solver import engine
from llmfleet.placement.solver.decomposition import Found, Rounds
from llmfleet.placement.solver.nodes import clean
from llmfleet.placement.solver.problem import Array

_SECONDS = 120.0


def close_gap(rounds: Rounds) -> Found:
    """Joint programs until the gap of the phase is closed, or the work allowed is done."""
    best, limits, phase = rounds.best, rounds.limits, rounds.phase
    small = len(phase.pricers) <= limits.closing_services
    times, nodes = limits.closing_rounds, limits.closing_nodes
    if not small:
        # What a short look does not prove of a shortage takes minutes.
        times, nodes = (1, nodes // 10) if phase.absolute > 0 else (times // 4, nodes)
    for _ in range(times):
        if rounds.done or rounds.deadline.hit:
            break
        highs, firsts = _joint(rounds)
        highs.setOptionValue("mip_max_nodes", nodes)
        highs.setOptionValue("mip_rel_gap", 0.5 * limits.gap)
        highs.setOptionValue("mip_abs_gap", max(0.3 * phase.absolute, 1e-9))
        if best.columns:
            point = np.concatenate([p.point(c) for p, c in zip(phase.pricers, best.columns, strict=True)])
            engine.start(highs, np.concatenate([point, _nodes_of_best(rounds)]))
        engine.run(highs, rounds.deadline, at_most_s=_SECONDS)
        if engine.is_infeasible(highs):
            # With a plan at hand that is rounding, of rows that an earlier phase holds to its last digits.
            if best.replicas is None:
                best.fits = False
                best.bound = float("inf")
            break
        bound = float(highs.getInfo().mip_dual_bound) - _bill_before(rounds)
        if np.isfinite(bound):
            best.bound = max(best.bound, bound - 1e-9 * abs(bound))
        if rounds.done or not engine.has_solution(highs):
            break
        before = sum(len(p.cut_prices) + len(p.replicas) for p in phase.pricers)
        values = np.array(highs.getSolution().col_value)
        for pricer, share, first in zip(phase.pricers, phase.shares, firsts, strict=True):
            y = np.round(values[first : first + pricer.service.variants])
            pricer.add_near(y, share.priced(best.prices))
            pricer.add_neighbours(y)
        _choose(rounds)
        if before == sum(len(p.cut_prices) + len(p.replicas) for p in phase.pricers):
            break
    return best


def improve(rounds: Rounds) -> Found:
    """A better plan, not a better bound: the master program chooses among all vectors that are one replica away from
    the best plan's, again and again, until nothing is better or the work allowed is done."""
    best, phase = rounds.best, rounds.phase
    for _ in range(rounds.limits.improving_rounds):
        if rounds.done or rounds.deadline.hit or best.replicas is None:
            break
        before = best.value
        for pricer, share, replicas in zip(phase.pricers, phase.shares, best.replicas, strict=True):
            terms = share.priced(best.prices)
            for v in range(len(replicas)):
                for step in (1, -1):
                    y = np.array(replicas, dtype=np.float64)
                    y[v] += step
                    pricer.add_near(y, terms)
        _choose(rounds)
        if best.value >= before:
            break
    return best


def _choose(rounds: Rounds) -> None:
    rounds.collect()
    box = 3.0 * rounds.best.prices + 2.0 * rounds.phase.unit
    priced = rounds.master.solve(box, rounds.deadline)
    if priced is None:
        return
    chosen = rounds.master.choose(
        priced,
        rounds.best.columns or None,
        # What costs more than mixtures of columns by this much is in no better plan.
        slack=rounds.best.value
        - (priced.value - rounds.phase.before)
        + rounds.phase.idle * rounds.phase.packing.dearest,
        relative=0.2 * rounds.limits.gap,
        absolute=0.2 * rounds.phase.absolute,
        deadline=rounds.deadline,
        nodes=rounds.limits.master_nodes,
        idle=rounds.phase.idle,
    )
    if chosen is not None:
        rounds.take(chosen)


def _nodes_of_best(rounds: Rounds) -> Array:
    """The nodes of the best plan, as columns of the joint program."""
    phase, columns = rounds.phase, rounds.best.columns
    packing = phase.packing
    if not packing:
        return np.zeros(0)
    parts = zip(phase.pricers, phase.shares, columns, strict=True)
    taken = sum((packing.weights(s.use) @ np.array(p.replicas[c]) for p, s, c in parts), np.zeros(len(packing.of)))
    return packing.whole(taken)


def _bill_before(rounds: Rounds) -> float:
    """What the objective of the joint program counts beside what is planned: all of the nodes that are held."""
    phase = rounds.phase
    return phase.idle * float(phase.packing.price @ phase.packing.held) + phase.before if phase.packing else 0.0


def _joint(rounds: Rounds) -> tuple[Any, list[int]]:
    """The joint program, and by service the number of its first column."""
    phase, packing = rounds.phase, rounds.phase.packing
    firsts, count = [], 0
    costs: list[Array] = []
    lower: list[Array] = []
    upper: list[Array] = []
    integer = []
    rows = engine.Matrix()
    shared: list[tuple[list[int], list[float]]] = [([], []) for _ in phase.limits]
    packed: list[tuple[list[int], list[float]]] = [([], []) for _ in packing.of]
    for pricer, share in zip(phase.pricers, phase.shares, strict=True):
        _, low, high, whole, own = pricer.program
        firsts.append(count)
        cost, use = pricer.costs(share.terms), share.use
        if packing:
            # A device is paid for with its node.
            devices, n = packing.devices(share.use), pricer.service.variants
            cost[:n] -= phase.idle * (packing.price @ devices)
            use = clean(share.use - packing.takes.T @ devices)
            for (columns, values), weights in zip(packed, packing.weights(share.use), strict=True):
                used = np.flatnonzero(weights > 0)
                columns += (count + used).tolist()
                values += weights[used].tolist()
        costs.append(cost)
        lower.append(low)
        upper.append(high)
        integer.append(whole)
        for r in range(len(own.lower)):
            entries = slice(own.starts[r], own.starts[r + 1])
            rows.row(own.lower[r], own.upper[r], [count + c for c in own.columns[entries]], own.values[entries])
        for k, (columns, values) in enumerate(shared):
            for c, value in pricer.row(use[k], float(share.unserved_use[k]), float(share.missing_use[k])):
                columns.append(count + c)
                values.append(value)
        count += len(low)
    if packing:
        costs.append(phase.idle * packing.price * packing.size)
        lower.append(np.zeros(len(packing.nodes)))
        upper.append(np.full(len(packing.nodes), engine.INFINITY))
        integer.append(np.ones(len(packing.nodes), dtype=bool))
        for g, held, (columns, values) in zip(packing.of, packing.held_nodes.tolist(), packed, strict=True):
            rows.row(-engine.INFINITY, -held, [*columns, count + g], [*values, -1.0])
        for k, (columns, values) in enumerate(shared):
            for g in np.flatnonzero(packing.takes[:, k] > 0).tolist():
                columns.append(count + g)
                values.append(float(packing.takes[g, k] * packing.size[g]))
    limits = phase.limits + packing.held @ packing.takes if packing else phase.limits
    for limit, (columns, values) in zip(limits.tolist(), shared, strict=True):
        scale = limit if limit > 0 else 1.0
        rows.row(-engine.INFINITY, limit / scale, columns, [value / scale for value in values])
    highs = engine.model(
        np.concatenate(costs),
        np.concatenate(lower),
        np.concatenate(upper),
        rows,
        integer=np.concatenate(integer),
        mip_heuristic_effort=0.05,
        mip_feasibility_tolerance=1e-7,  # with the default a replica less a millionth is one: a gap that never closes
    )
    return highs, firsts
