"""A replica more where rounds have ended and a pool is still short: devices that are there leave nobody unserved.

    services as routed, outcome, the solver with its limits --topped_up--> the same with more replicas

The program's lines are right where the pools are that they were drawn for, and a solve may end with others (`rounds`).
Pools that then miss the objective get replicas one by one, as many as it takes, out of what is left of devices and of
all that is shared; strictly by priority. Their routes stay. What that costs is in the outcome's objective, so that the
gap says it: nobody has shown that a cheaper mix would not do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.margins import Judged, fewest, judged
from llmfleet.placement.service_program import Replicas
from llmfleet.placement.warm_state import Outcome

if TYPE_CHECKING:
    from llmfleet.placement.rounds import Routed


def topped_up(services: Sequence[Routed], outcome: Outcome, solver: FleetSolver) -> tuple[list[Routed], Outcome]:
    """`solver` knows what there is of devices and of rows, for all of these services together. Services that have to
    survive losses stay as they are: more replicas of a pool that may go are no remedy."""
    programs = [service.item.program for service in services]
    found, objective, replicas = list(services), outcome.objective, dict(outcome.replicas)
    left = solver.left(programs, replicas)
    for i in sorted(range(len(services)), key=lambda i: (-services[i].item.program.priority, i)):
        program, before = services[i].item.program, services[i].replicas
        for pool in () if program.losses else services[i].pools:
            count = _enough(found[i], pool, left) if pool.short else None
            if count is None:
                continue
            after = _with(found[i].replicas, pool.variant, count)
            if not solver.fits(programs, {**replicas, program.key: after}):
                continue  # for its devices there is money, for their nodes there is not
            replicas[program.key] = after
            left = solver.left(programs, replicas)
            found[i] = replace(found[i], replicas=after)
        if found[i].replicas != before:
            item, more = found[i].item, found[i].replicas
            pools = tuple(judged(item.prepared, item.margins, found[i].x, more))
            found[i] = replace(found[i], pools=pools)
    if replicas != outcome.replicas:
        objective += solver.objective(programs, replicas) - solver.objective(programs, outcome.replicas)
    return found, replace(outcome, replicas=replicas, objective=objective)


def _with(replicas: Replicas, variant: int, count: int) -> Replicas:
    return (*replicas[:variant], count, *replicas[variant + 1 :])


def _enough(service: Routed, pool: Judged, left: Mapping[str, float]) -> int | None:
    """The fewest replicas with which a short pool keeps the objective; None where there is no room for as many."""
    item, v = service.item, pool.variant
    program, prepared = item.program, item.prepared
    room = program.room(v, left)
    if program.maximum is not None:
        room = min(room, program.maximum - sum(service.replicas))
    return fewest(prepared, pool, pool.rps, pool.replicas + room)
