"""A replica more where rounds have ended and a pool is still short: devices that are there leave nobody unserved.

    services as routed, outcome, limits --topped_up--> the same with more replicas

The program's lines are right where the pools are that they were drawn for, and a solve may end with others (`rounds`).
Pools that then miss the objective get replicas one by one, as many as it takes, out of what is left of devices and of
all that is shared; strictly by priority. Their routes stay. What that costs is in the outcome's objective, so that the
gap says it: nobody has shown that a cheaper mix would not do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmfleet.placement.fleet import Outcome
from llmfleet.placement.margins import Judged, fewest, judged
from llmfleet.placement.service_program import Replicas

if TYPE_CHECKING:
    from llmfleet.placement.rounds import Routed


def topped_up(
    services: Sequence[Routed], outcome: Outcome, limits: Mapping[str, float]
) -> tuple[list[Routed], Outcome]:
    """`limits`: what there is of devices and of rows, for all of these services together. Services that have to survive
    losses stay as they are: more replicas of a pool that may go are no remedy."""
    left = dict(limits)
    for service in services:
        for name, amount in service.item.program.takes(service.replicas).items():
            left[name] -= amount
    found, objective, replicas = list(services), outcome.objective, dict(outcome.replicas)
    for i in sorted(range(len(services)), key=lambda i: (-services[i].item.program.priority, i)):
        program, before = services[i].item.program, services[i].replicas
        for pool in () if program.losses else services[i].pools:
            count = _enough(found[i], pool, left) if pool.short else None
            if count is None:
                continue
            after = _with(found[i].replicas, pool.variant, count)
            taken, now = program.takes(found[i].replicas), program.takes(after)
            for name, amount in now.items():
                left[name] -= amount - taken.get(name, 0.0)
            found[i] = replace(found[i], replicas=after)
        if found[i].replicas != before:
            item, more = found[i].item, found[i].replicas
            pools = tuple(judged(item.prepared, item.margins, found[i].x, more))
            found[i] = replace(found[i], pools=pools)
            objective += program.objective(more) - program.objective(before)
            replicas[program.key] = more
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
