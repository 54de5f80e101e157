"""What a solved fleet, and each of its services, is judged by once the model has looked at its pools.

    Solved --is_better--> whether it serves more of what matters most, or as much at less cost

Programs judge by lines (`fleet`). Here what requests will get counts: a pool that is short serves less than it was
given, and one without its headroom counts as a replica more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.rounds import Routed, Solved
from llmfleet.placement.service_program import Replicas, ServiceProgram
from llmfleet.placement.solver import AT_RISK
from llmfleet.placement.solver.stages import served_share

LEAST_SAVING = 1e-3
"""Share of the cost below which other replicas are no better."""


def is_better(found: Solved, best: Solved) -> bool:
    """Whether `found` serves more of the highest priority in which they differ; or as much of all, cheaper."""
    new, old = _rank(found), _rank(best)
    return new[:-1] < old[:-1] or (new[:-1] == old[:-1] and new[-1] < old[-1] * (1 - LEAST_SAVING))


def _rank(solved: Solved) -> tuple[float, ...]:
    """What a fleet is judged by: by priority, highest first, the requests per second that are short; then its cost."""
    rank = []
    for priority in sorted({one.item.program.priority for one in solved.services}, reverse=True):
        level = [one for one in solved.services if one.item.program.priority == priority]
        rps = sum(float(one.item.prepared.demand.rps.sum()) for one in level)
        short = sum(shortage(one) * float(one.item.prepared.demand.rps.sum()) for one in level)
        rank.append(round(short / rps, 5) if rps else 0.0)
        rank.append(sum(one.item.program.missing(one.replicas) for one in level))
    return (*rank, sum(map(charged_cost, solved.services)) + idle_cost(solved.solver, solved.services))


def shortage(service: Routed) -> float:
    """Share of the demand that is not served, what the worst loss would leave unserved counted in part."""
    prepared = service.item.prepared
    rps = prepared.demand.rps
    total = float(rps.sum())
    if total <= 0:
        return 0.0
    served = float((rps * served_share(np.nan_to_num(service.x), prepared.stage)).sum())
    at_risk = max((float(after.unserved(prepared).sum()) / after.loss.keep for after in service.fallbacks), default=0.0)
    return 1 - (served - AT_RISK * at_risk) / total


def charged_cost(service: Routed) -> float:
    """Cost per hour with the price of switching; a pool without its headroom counts as one replica more."""
    program = service.item.program
    lacking = sum(float(program.charged[pool.variant]) for pool in service.pools if pool.tight)
    return program.objective(service.replicas) + lacking


def idle_cost(solver: FleetSolver, services: Sequence[Routed]) -> float:
    """What stands idle on nodes that are billed whole counts for."""
    return solver.idle(*decided(services)) if solver.nodes else 0.0


def decided(services: Sequence[Routed]) -> tuple[list[ServiceProgram], dict[str, Replicas]]:
    """What is decided for services, as a `FleetSolver` takes it."""
    programs = [service.item.program for service in services]
    return programs, {service.item.program.key: service.replicas for service in services}
