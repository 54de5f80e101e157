"""Fewer variants where they cost no more than the asked gap: of plans that are as good, the one that is simpler to run.

    Solved, plans in force --with_fewer_variants--> the same, single variants left out where others can do their part

A program that minimises cost buys a second kind of replica for the last thousandth. Each kind is one more Deployment to
roll out, one more pool that keeps a reserve of its own, and often a replica that nobody can stand in for. By how much a
plan may be dearer than what is proven to be possible, `optimalityGap` says. What the search for the plan has left of it
is spent here: a variant hands all that it does to another one, or one takes over everything, where the model says
that its pool then keeps the objective with its headroom, and where the plan stays within the gap of its bound. No
service spends more than the gap of its own cost. What is in force stays: nothing moves for tidiness alone.

Step by step, the cheapest of the ways with fewest variants is taken; so with a gap of zero only what costs the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from llmfleet.api import ServicePlan
from llmfleet.placement.highs import ROUNDING
from llmfleet.placement.margins import Judged, fewest
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.ranks import decided, shortage
from llmfleet.placement.rounds import Routed, Solved, routed_by
from llmfleet.placement.service_program import Replicas

_Rank = tuple[int, float, Replicas]
"""Of a way: how many variants, by how much it is dearer, and what makes the choice the same every time."""
_LEAST_OF_PRICE = 0.1
_MOST = 1000


def with_fewer_variants(solved: Solved, before: Mapping[str, ServicePlan], gap: float) -> Solved:
    """The fleet with as few variants as cost no more than `gap`, relative. `before`: the plans in force by key."""
    solver, services = solved.solver, list(solved.services)
    bound = solved.outcome.bound
    most = solved.outcome.objective if bound is None else max(solved.outcome.objective, bound / (1 - gap))
    objective = solved.outcome.objective
    for i, service in enumerate(solved.services):
        program = service.item.program
        if solver.deadline.hit:
            break
        if program.key in before and service.replicas == program.previous:
            continue
        own = program.objective(service.replicas) * gap / (1 - gap)
        simpler = _Simpler(solved, services, i)
        while (found := simpler.best(min(own, most - objective))) is not None:
            rise, services[i] = found
            objective += rise
            # What lines had kept from the program, and the model allows, is saved and not spent.
            own, most = own - max(rise, 0.0), most + min(rise, 0.0)
    if all(one is other for one, other in zip(services, solved.services, strict=True)):
        return solved
    objective = solver.objective(*decided(services))
    bound = None if bound is None else min(bound, objective)
    outcome = replace(solved.outcome, replicas=decided(services)[1], objective=objective, bound=bound)
    return replace(solved, services=services, outcome=outcome)


class _Simpler:
    """Ways to serve one service of a fleet by fewer variants."""

    def __init__(self, solved: Solved, services: list[Routed], i: int) -> None:
        """`services` are those of the fleet as they are by now, of which this is number `i`."""
        self._solver, self._services, self._i = solved.solver, services, i

    def best(self, slack: float) -> tuple[float, Routed] | None:
        """The way with the fewest variants, the cheapest of those, and by how much it is dearer: at most `slack`."""
        service = self._services[self._i]
        found: tuple[_Rank, Routed] | None = None
        for x, v in self._merged(service):
            way = self._way(service, x, v, slack, None if found is None else found[0])
            if way is not None:
                found = way
        return None if found is None else (found[0][1], found[1])

    def _merged(self, service: Routed) -> Iterator[tuple[FloatArray, int]]:
        """Routes in which one variant's part, or all, has gone to another; and which that is."""
        prepared, table = service.item.prepared, service.item.throughput
        used = np.flatnonzero(service.replicas).tolist()
        if len(used) < 2:
            return
        shares = np.nan_to_num(service.x)
        for v, variant in enumerate(prepared.variants):
            for gone in [[other] for other in used if other != v] if v in used else [used]:
                if any(prepared.variants[other].role != variant.role for other in gone):
                    continue
                taken = shares[:, gone].sum(axis=1)
                if not (table[taken > 0, v] > 0).all():
                    continue
                x = service.x.copy()
                x[:, v] += taken
                x[:, gone] -= shares[:, gone]
                yield x, v

    def _way(
        self, service: Routed, x: FloatArray, v: int, slack: float, than: _Rank | None
    ) -> tuple[_Rank, Routed] | None:
        """The service by these routes, with as many replicas of variant `v` as they take; None where that does not fit,
        costs more than `slack`, serves less, or is no better than `than`."""
        item, solver = service.item, self._solver
        program, prepared = item.program, item.prepared
        rest = tuple(count if u != v and np.nansum(x[:, u]) > 0 else 0 for u, count in enumerate(service.replicas))
        afford = program.objective(service.replicas) + slack - program.objective(rest)
        # A replica that is in force costs its price of change to take away.
        each = float(program.charged[v]) * max(1.0 - program.switching, _LEAST_OF_PRICE)
        most = min(int(afford / each * (1 + ROUNDING)), _MOST)
        rps = prepared.demand.rps * np.nan_to_num(x[:, v]) / item.margins.utilization
        count = (
            fewest(prepared, Judged(v, rps, 0, short=True, tight=True, lavish=False), rps, most) if most > 0 else None
        )
        if count is None:
            return None
        replicas = (*rest[:v], count, *rest[v + 1 :])
        programs, now = decided(self._services)
        then = {**now, program.key: replicas}
        rise = program.objective(replicas) - program.objective(service.replicas)
        if solver.nodes:
            rise += solver.idle(programs, then) - solver.idle(programs, now)
        rank = (sum(count > 0 for count in replicas), rise, replicas)
        if rise > slack + ROUNDING or (than is not None and rank >= than):
            return None
        if not program.allows(replicas) or not solver.fits(programs, then):
            return None
        found = routed_by(item, replicas, x, solver)
        after = (pool for fallback in found.fallbacks for pool in fallback.pools)
        if any(pool.tight for pool in found.pools) or any(pool.short for pool in after):
            return None
        if shortage(found) > shortage(service) + ROUNDING:
            return None
        return rank, found
