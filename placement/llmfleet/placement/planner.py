"""`plan`: the inputs of one solve in, the plan of the whole fleet out.

    PlanInputs --checks--> Prepared ... --rounds--> replicas, x, what requests will see --> Plan
                  |
                  +--> Refusal

Pure: the clock is an argument, time only ends a solve early. Equal inputs give equal decisions: services in order of
key, variants in order of name, one solver thread, a fixed seed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmfleet.api import NextBest, Plan, PlannedVariant, Refusal, Route, ServicePlan
from llmfleet.api.fleetpolicy import HELD_BACK
from llmfleet.api.plan import PoolLoss, Predicted
from llmfleet.placement.checks import Catalogue, Prepared
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import ROUNDING, Deadline
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.losses import Fallback, protected_by
from llmfleet.placement.margins import Judged
from llmfleet.placement.next_best import NextBestSets
from llmfleet.placement.preparations import Preparations
from llmfleet.placement.reasons import Situation, binding, cost_per_million_tokens, shortfall
from llmfleet.placement.restarts import solved_fleet
from llmfleet.placement.rounds import Routed
from llmfleet.placement.routes import LEAST_FRACTION, routes_of
from llmfleet.placement.rows import SharedRow, left_by
from llmfleet.placement.steps import in_steps
from llmfleet.placement.transition import without_room
from llmfleet.placement.warm_state import WarmState
from llmfleet.placement.whole_nodes import Bill, node_types, without_held_idle
from llmfleet.placement.workload import settled_demand

_SOLVING_SHARE = 0.7
"""Share of the time limit that solving may take."""
_ALL_SHARE = 0.9
"""Share of the time limit after which no alternative is computed any more; the caller may end us at 1."""


def plan(
    inputs: PlanInputs,
    previous: Plan | None,
    warm: WarmState | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Plan, WarmState]:
    """Plans the whole fleet.

    `previous` is the plan in force: changing it has a price (`switchingCostFraction`), and it is kept where nothing
    better is proven; a service that is refused or unreadable keeps its part of it, and its devices. `warm` is what the
    last call returned; it may be dropped at any time. `clock` gives seconds.
    Raises nothing for what users can get wrong: that becomes refusals, shortfalls and warnings of single services.
    HiGHS has been seen to ignore its time limit: a caller that cannot wait runs this in a process that it can end.
    """
    started = clock()
    before = None if previous is None else in_force(previous)
    inputs = settled_demand(inputs, before or {})
    policy = inputs.policy
    catalogue = Catalogue(inputs)
    warm = warm or WarmState()
    preparations = Preparations(inputs, catalogue, warm.made)
    refusals: list[Refusal] = []
    prepared: list[Prepared] = []
    for service in sorted(inputs.services, key=lambda service: service.key):
        checked = preparations.of(service)
        if isinstance(checked, Refusal):
            refusals.append(checked)
        else:
            prepared.append(checked)

    not_planned = [*(refusal.key for refusal in refusals), *inputs.unreadable]
    kept = still_in_force(not_planned, before or {})
    nodes = node_types(inputs.gpu_types, catalogue.rows, kept)
    limits = without_held_idle(left_by(kept, catalogue.devices, catalogue.rows), nodes)

    deadline = Deadline(clock, started + _SOLVING_SHARE * policy.solve_time_limit_seconds)
    solved = solved_fleet(prepared, policy, before, catalogue.rows, limits, warm, deadline, nodes)
    if policy.max_starts_per_plan is not None:
        solved = in_steps(solved, before or {}, policy.max_starts_per_plan)
    solver, outcome = solved.solver, solved.outcome
    stopped_by = "time_limit" if deadline.hit else outcome.stopped_by
    deadline.ends_at = started + _ALL_SHARE * policy.solve_time_limit_seconds

    programs = [routed.item.program for routed in solved.services]
    replicas = {routed.item.program.key: routed.replicas for routed in solved.services}
    bill = Bill(nodes, [(program, replicas[program.key]) for program in programs])
    left = solver.left(programs, replicas)
    fleet = _Fleet(solver, left, catalogue.rows, inputs, NextBestSets(solver, catalogue.rows, policy), bill)
    solved.used.made = preparations.made
    solved.used.written = {
        routed.item.prepared.key: _written(routed, fleet, warm.written.get(routed.item.prepared.key))
        for routed in solved.services
    }
    services = [written.plan for written in solved.used.written.values()]
    solved.used.next_best.update(solver.used.next_best)
    solved.used.alone.update(solver.used.alone)
    gaps = without_room(before or {}, services, left_by(kept, catalogue.devices, ()))
    services = [
        service.model_copy(update={"warnings": [*service.warnings, gaps[service.key]]})
        if service.key in gaps
        else service
        for service in services
    ]

    gap: float | None = None
    if outcome.bound is not None:
        gap = max(0.0, outcome.objective - outcome.bound) / outcome.objective if outcome.objective > 0 else 0.0
    watts = [
        variant.replicas * variant.watts_per_replica
        for service in services
        for variant in service.variants
        if variant.watts_per_replica is not None
    ]
    if any(service.unserved_rps > 0 for service in services):
        status = "partial"
    elif gap is not None and gap <= policy.optimality_gap + 1e-9:
        status = "optimal"
    else:
        status = "feasible"
    decided = Plan.model_validate(
        {
            "plan_id": plan_id(services),
            "status": status,
            "gap_cost": gap,
            "gap_unserved": outcome.gap_unserved,
            "bound": outcome.bound,
            "stopped_by": stopped_by,
            "solve_seconds": max(0.0, clock() - started),
            "cost_per_hour": sum(service.cost_per_hour for service in services),
            "watts": sum(watts) if watts else None,
            "nodes": bill.planned() or None,
            "services": services,
            "refusals": refusals,
            "kept": kept,
        }
    )
    return decided, solved.used


def still_in_force(not_planned: Iterable[str], before: Mapping[str, ServicePlan]) -> list[ServicePlan]:
    """The plans by which services go on running that cannot be planned, by key: a refusal takes no engine away."""
    return [before[key] for key in sorted(set(not_planned)) if key in before]


def in_force(previous: Plan) -> dict[str, ServicePlan]:
    """The plans that services run by, by service key: planned last time, or kept from before."""
    return {service.key: service for service in (*previous.kept, *previous.services)}


def plan_id(services: list[ServicePlan]) -> str:
    """Short hash of replicas, how they are run, and routes (fractions to four decimals): equal decisions have equal
    ids."""
    decided = [
        [
            service.key,
            [
                [variant.name, variant.replicas, *([variant.configuration.to_wire()] if variant.configuration else [])]
                for variant in service.variants
            ],
            [[route.bucket, route.variant, round(route.fraction, 4)] for route in service.routes],
        ]
        for service in services
    ]
    return hashlib.sha256(json.dumps(decided, separators=(",", ":")).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class _Fleet:
    """The fleet once solved: what the plan of a single service is written with."""

    solver: FleetSolver
    left: Mapping[str, float]
    """What nobody uses of each row."""
    rows: tuple[SharedRow, ...]
    inputs: PlanInputs
    next_best: NextBestSets
    bill: Bill


def _situation(routed: Routed, fleet: _Fleet) -> Situation:
    """What one service got, and what nobody uses."""
    program, prepared = routed.item.program, routed.item.prepared
    unreachable = float(prepared.demand.rps.sum()) - float(program.rates.sum())
    if unreachable <= 1e-12 * float(prepared.demand.rps.sum()):
        unreachable = 0.0
    unserved = routed.unserved
    if float(unserved.sum()) <= ROUNDING * float(program.rates.sum()):
        unserved = np.zeros_like(unserved)
    rows = tuple(row for row in fleet.rows if row.concerns(prepared.service.metadata.namespace))
    after = ((fallback.loss, float(fallback.unserved(prepared).sum())) for fallback in routed.fallbacks)
    least = ROUNDING * float(program.rates.sum())
    at_risk = tuple((loss, rps) for loss, rps in after if rps > least)
    return Situation(
        prepared, program, routed.replicas, unserved, unreachable, fleet.left, fleet.inputs.inventory, rows, at_risk
    )


@dataclass(frozen=True)
class Written:
    """The plan of a service, and what all of it but what others leave follows from."""

    routed: Routed
    rows: tuple[SharedRow, ...]
    plan: ServicePlan


def _written(routed: Routed, fleet: _Fleet, last: Written | None) -> Written:
    """The plan of one service; as it was written last where the service got the same, but for what others leave."""
    program, situation = routed.item.program, _situation(routed, fleet)
    bound_by = [*binding(situation, fleet.solver.relaxed(program)), *([HELD_BACK] if routed.held_back else [])]
    bound_by += protected_by(program, fleet.solver)
    beside_others = {
        "binding": bound_by,
        "shortfall": shortfall(situation, bound_by),
        "next_best": _next_best(routed, situation, fleet),
        **_with_idle_devices(routed, fleet),
    }
    if last is None or last.routed is not routed or last.rows != fleet.rows:
        return Written(routed, fleet.rows, _service_plan(routed, situation, fleet).model_copy(update=beside_others))
    if all(getattr(last.plan, name) == value for name, value in beside_others.items()):
        return last
    return Written(routed, fleet.rows, last.plan.model_copy(update=beside_others))


def _service_plan(routed: Routed, situation: Situation, fleet: _Fleet) -> ServicePlan:
    """What a service got, in words and figures that do not depend on what others leave."""
    item, replicas = routed.item, routed.replicas
    prepared, program = item.prepared, item.program
    names = [variant.name for variant in prepared.variants]
    predicted = {names[pool.variant]: _predicted(prepared, pool) for pool in routed.pools}

    uncounted = [
        f"GPUType {variant.type_name} has no spec.watts: {row.name} counts {variant.name} as nothing"
        for variant, count in zip(prepared.variants, replicas, strict=True)
        for row in fleet.rows
        if count > 0 and row.uncounted(variant.type_name)
    ]
    unmeasured = [
        f"{name} was not measured at all sizes that it gets: it is planned on {_SOURCES[one.source]}, less their error"
        for name, one in predicted.items()
        if one.source != "measured"
    ]
    cost = program.cost_of(replicas)
    return ServicePlan(
        namespace=prepared.service.metadata.namespace or "",
        service=prepared.service.metadata.name,
        buckets=prepared.buckets,
        variants=[
            PlannedVariant(
                name=variant.name,
                gpu_type=variant.type_name,
                tensor_parallel=variant.key.tensor_parallel,
                pipeline_parallel=variant.key.pipeline_parallel,
                configuration=variant.configuration,
                role=variant.role,
                kv_transfer_gb_per_second=(
                    None if variant.figures.handover is None else variant.figures.handover.gb_per_second
                ),
                replicas=count,
                cost_per_replica_hour=variant.cost_per_replica_hour,
                watts_per_replica=variant.watts_per_replica,
                latency=variant.latency,
                predicted=predicted.get(variant.name),
            )
            for variant, count in zip(prepared.variants, replicas, strict=True)
            if count > 0
        ],
        routes=routes_of(names, item.throughput, replicas, routed.x, prepared.stage),
        demand=prepared.demand.rps.tolist(),
        sizes=prepared.demand.seen,
        forecast=prepared.demand.forecast,
        unserved_rps=situation.unserved_rps,
        losses=[_loss(fallback, prepared, names, situation) for fallback in routed.fallbacks],
        predicted=_worst([*_of_stages(prepared, predicted)]),
        cost_per_hour=cost,
        cost_per_million_tokens=cost_per_million_tokens(
            cost, prepared, program.served(np.nan_to_num(routed.x)) * prepared.demand.rps
        ),
        warnings=[*prepared.warnings, *uncounted, *unmeasured],
    )


def _with_idle_devices(routed: Routed, fleet: _Fleet) -> dict[str, float | None]:
    """The figures of cost of a service that shares in the bill for whole nodes; empty where it has none of them."""
    prepared, idle = routed.item.prepared, fleet.bill.share(routed.item.program)
    if idle is None:
        return {}
    cost = max(0.0, routed.item.program.cost_of(routed.replicas) + idle)
    served_rps = np.nan_to_num(routed.x).sum(axis=1) * prepared.demand.rps
    return {
        "cost_per_hour": cost,
        "idle_cost_per_hour": idle,
        "cost_per_million_tokens": cost_per_million_tokens(cost, prepared, served_rps),
    }


def _loss(fallback: Fallback, prepared: Prepared, names: list[str], situation: Situation) -> PoolLoss:
    loss, demanded = fallback.loss, prepared.demand.rps > 0
    routes = [
        Route(bucket=b, variant=names[v], fraction=min(1.0, float(fallback.x[b, v])))
        for b, v in np.argwhere((fallback.x > LEAST_FRACTION) & demanded[:, None]).tolist()
    ]
    return PoolLoss(
        gpu_types=sorted(loss.types),
        share=loss.keep,
        routes=routes,
        unserved_rps=dict(situation.at_risk).get(loss, 0.0),
    )


_SOURCES = {"prior": "measured kernels", "roofline": "published figures of the device"}


def _predicted(prepared: Prepared, pool: Judged) -> Predicted:
    figures = prepared.variants[pool.variant].figures
    source = figures.source(pool.rps > 0)
    seen = figures.outlook(prepared.objective, pool.rps, replicas=pool.replicas, arrivals_cv2=prepared.arrivals_cv2)
    return Predicted(
        source="roofline" if source == "none" else source,
        ttft_ms=seen.ttft_ms,
        tpot_ms=seen.tpot_ms,
        ttft_attainment=seen.ttft_attainment,
        tpot_attainment=seen.tpot_attainment,
    )


def _of_stages(prepared: Prepared, predicted: Mapping[str, Predicted]) -> Iterator[Predicted]:
    """What is predicted of each variant that serves whole requests, and of the worst of each stage together."""
    roles = {variant.name: variant.role for variant in prepared.variants}
    yield from (one for name, one in predicted.items() if roles[name] is None)
    first, second = (
        _worst([one for name, one in predicted.items() if roles[name] == role]) for role in ("prefill", "decode")
    )
    if first is not None and second is not None:
        both = _worst([first, second])
        assert both is not None
        yield both.model_copy(
            update={
                "ttft_ms": first.ttft_ms + second.ttft_ms,
                "ttft_attainment": max(0.0, first.ttft_attainment + second.ttft_attainment - 1),
            }
        )


def _worst(parts: list[Predicted]) -> Predicted | None:
    if not parts:
        return None
    sources: tuple[Literal["roofline", "prior", "measured"], ...] = ("roofline", "prior", "measured")
    return Predicted(
        source=min((one.source for one in parts), key=sources.index),
        ttft_ms=max(one.ttft_ms for one in parts),
        tpot_ms=max(one.tpot_ms for one in parts),
        ttft_attainment=min(one.ttft_attainment for one in parts),
        tpot_attainment=min(one.tpot_attainment for one in parts),
    )


def _next_best(routed: Routed, situation: Situation, fleet: _Fleet) -> NextBest | None:
    """The cheapest replicas with another set of variants that serve no less, out of what the others leave."""
    program = routed.item.program
    room = {name: amount + situation.left[name] for name, amount in program.takes(routed.replicas).items()}
    served_rps = float(program.rates.sum() - situation.unserved.sum())
    found = fleet.next_best.of(routed, served_rps, fleet.bill.room(program, room), fleet.bill.beside(program))
    if found is None:
        return None
    variants = routed.item.prepared.variants
    return NextBest(
        replicas={variant.name: count for variant, count in zip(variants, found, strict=True) if count > 0},
        cost_per_hour=fleet.bill.cost_with(program, found),
    )
