"""A plan reached in steps: no more than so many new replicas of a variant of a service at a time.

In flow the plan in force, the fleet as solved, and `maxStartsPerPlan`; out flows the fleet that is planned now. A
service that would replace more replicas by more new ones of a variant is put part of the way between what it has and
what was solved, so that a wrong measurement or a price of a day does not end all of its engines at once; the next plans
go on from there. A service that only grows or only shrinks replaces nothing.

A step must keep all that is promised: all demand served, every pool within what it holds, the service's own bounds and
everything shared kept, no more demand at risk than at its start or its end. Where no step does (the load has grown,
there is no room for both, `maxVariants` allows only one side), the service goes all the way, since a limit on change is
no reason to leave a request unserved. So the limit never takes anything from another service: what was solved is known
to fit, and a step is taken out of what that leaves. What was proven is proven of the fleet as solved; of a fleet with a
step in it nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmfleet.api import ServicePlan
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import ROUNDING
from llmfleet.placement.losses import losses_of
from llmfleet.placement.rounds import Routed, Solved, routed_at
from llmfleet.placement.service_program import Replicas


def step(before: Replicas, target: Replicas, most: int) -> Replicas:
    """Replicas part of the way: the variant that grows most gets `most` more than before, the others in proportion,
    and what shrinks is rounded up."""
    widest = max((after - count for count, after in zip(before, target, strict=True)), default=0)
    if widest <= most:
        return target
    return tuple(count + int((after - count) * most / widest) for count, after in zip(before, target, strict=True))


def in_steps(solved: Solved, plans: Mapping[str, ServicePlan], most: int) -> Solved:
    """The solved fleet with the services that are held back, highest priority first. `plans` are those in force by
    key."""
    services = list(solved.services)
    bound = solved.outcome.bound
    programs = [service.item.program for service in services]
    replicas = {service.item.program.key: service.replicas for service in services}
    left = solved.solver.left(programs, replicas)
    order = sorted(range(len(services)), key=lambda i: (-services[i].item.program.priority, i))
    for i in order:
        held = _held_back(services[i], plans.get(services[i].item.program.key), most, left, solved.solver)
        if held is None:
            continue
        after = {**replicas, held.item.program.key: held.replicas}
        if solved.solver.fits(programs, after):
            services[i], replicas, bound = held, after, None
            left = solved.solver.left(programs, replicas)
    objective = solved.solver.objective(programs, replicas)
    outcome = replace(solved.outcome, replicas=replicas, objective=objective, bound=bound)
    return replace(solved, services=services, outcome=outcome)


def _held_back(
    service: Routed, planned: ServicePlan | None, most: int, left: Mapping[str, float], solver: FleetSolver
) -> Routed | None:
    """The service one step on; None where it need not be held back, or cannot."""
    item, program = service.item, service.item.program
    if program.previous is None or service.unserved.sum() > ROUNDING * program.rates.sum():
        return None
    if all(after >= before for before, after in zip(program.previous, service.replicas, strict=True)):
        return None
    counts = step(program.previous, service.replicas, most)
    if counts == service.replicas or not program.allows(counts):
        return None
    more, taken = program.takes(counts), program.takes(service.replicas)
    if any(more[name] - taken[name] > left[name] * (1 + 1e-9) + 1e-9 for name in more):
        return None
    # As for a plan in force, what replicas hold counts, and the headroom of new plans does not.
    whole = replace(
        program,
        throughput=program.throughput / item.margins.utilization,
        losses=losses_of(item.prepared.service, item.prepared.variants, 1.0),
    )
    found = routed_at(
        replace(item, program=whole, margins=replace(item.margins, utilization=1.0)), counts, solver, planned
    )
    if found.unserved.sum() > ROUNDING * program.rates.sum() or any(pool.short for pool in found.pools):
        return None
    if any(pool.short for after in found.fallbacks for pool in after.pools):
        return None
    most_at_risk = max(solver.at_risk(whole, replicas) for replicas in (program.previous, service.replicas))
    if solver.at_risk(whole, counts) > most_at_risk + ROUNDING:
        return None
    return replace(found, item=item, held_back=True)
