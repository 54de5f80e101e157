"""The alternatives of a plan: what a service would cost otherwise, and why that was not chosen.

    Plan --with_alternatives--> the same plan, `alternatives` of the services that cost most filled in

The next best set is the plan's own; what a single GPU type would take is solved here, a few tenths of a second for each
service, and so is what it would cost with prefill and decode together, or apart. So nothing that has to be quick calls
this.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llmfleet.api import Alternative, NextBest, Plan, ServicePlan
from llmfleet.placement.alone import laboratory
from llmfleet.placement.explain import SingleType, single_types
from llmfleet.placement.highs import ROUNDING
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.rows import rows_of
from llmfleet.placement.whole_nodes import idle_cost_of, node_types

MOST_SERVICES = 10


def with_alternatives(inputs: PlanInputs, decided: Plan, *, clock: Callable[[], float] = time.monotonic) -> Plan:
    """The plan with the alternatives of the `MOST_SERVICES` services that cost most. `inputs` are those it was made
    from; `clock` gives seconds."""
    dearest = sorted(decided.services, key=lambda service: (-service.cost_per_hour, service.key))[:MOST_SERVICES]
    chosen = {service.key for service in dearest if service.variants}
    services = [
        service.model_copy(
            update={
                "alternatives": _alternatives(
                    service,
                    single_types(decided, inputs, service.key, clock=clock),
                    otherwise_staged(inputs, decided, service.key),
                )
            }
        )
        if service.key in chosen
        else service
        for service in decided.services
    ]
    return decided.model_copy(update={"services": services})


def otherwise_staged(inputs: PlanInputs, decided: Plan, key: str) -> Alternative | None:
    """What a service would cost with whole replicas only, where it has others; or with others, where it allows them and
    engines cannot hand over. None where that would be the plan itself, or serve less."""
    planned, lab = decided.service(key), laboratory(inputs, decided, key)
    if planned is None or not lab.service.spec.engine.disaggregated:
        return None
    apart = any(variant.role is not None for variant in planned.variants)
    if apart != inputs.can_hand_over:
        return None
    other = lab.solved(lab.inputs.model_copy(update={"can_hand_over": not apart}))
    if other is None or other.replicas == planned.replicas or other.unserved_rps > planned.unserved_rps + ROUNDING:
        return None
    # Both beside the others: what a plan says is its share of what stands idle on nodes.
    nodes = node_types(inputs.gpu_types, rows_of(inputs), lab.others)
    idle = idle_cost_of(planned, nodes) - (planned.idle_cost_per_hour or 0.0)
    cost = other.cost_per_hour - idle
    less = planned.cost_per_hour - cost
    could = f"engines hand no KV cache over yet; it would cost {less:.3g} per hour less"
    return Alternative(
        kind="unified" if apart else "disaggregated",
        replicas=other.replicas,
        cost_per_hour=cost,
        reason=_dearer(planned, cost) if apart or less <= 0 else could,
    )


def _alternatives(service: ServicePlan, singles: list[SingleType], staged: Alternative | None) -> list[Alternative]:
    """The next best set, each single type and the other way to serve stages, cheapest first, without what the plan
    itself is."""
    found = [] if service.next_best is None else [_next_best(service, service.next_best)]
    found += [_single(service, single) for single in singles if single.replicas != service.replicas]
    found += [] if staged is None else [staged]
    return sorted(found, key=lambda one: (one.cost_per_hour, one.kind, sorted(one.replicas)))


def _next_best(service: ServicePlan, other: NextBest) -> Alternative:
    return Alternative(
        kind="nextBest",
        replicas=other.replicas,
        cost_per_hour=other.cost_per_hour,
        reason=_dearer(service, other.cost_per_hour),
    )


def _single(service: ServicePlan, single: SingleType) -> Alternative:
    missing = f"takes {single.devices_missing} devices of GPUType {single.gpu_type} beyond what the others leave"
    reasons = [missing] if single.devices_missing else []
    if single.cost_per_hour >= service.cost_per_hour or not reasons:
        reasons.append(_dearer(service, single.cost_per_hour))
    return Alternative(
        kind="singleType",
        replicas=single.replicas,
        cost_per_hour=single.cost_per_hour,
        devices_missing=single.devices_missing,
        reason="; ".join(reasons),
    )


def _dearer(service: ServicePlan, cost_per_hour: float) -> str:
    more = cost_per_hour - service.cost_per_hour
    if more < 0:
        worth_it = "no more than the asked gap, fewer variants, less change or a limit makes up for"
        return f"costs {-more:.3g} per hour less, {worth_it}"
    share = f" ({more / service.cost_per_hour:+.0%})" if service.cost_per_hour > 0 else ""
    return f"costs {more:.3g} per hour more{share}"
