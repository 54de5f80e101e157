"""The service's ConfigMap: the routing table for gateways, and the operator's own memory of the plan in force.

    ServicePlan + engines that serve now --routing_table--> RoutingTable --config_map--> manifest
    ConfigMap --stored_plan--> PlannedService        after a restart, and while a new plan is not to be had

The table is the solver's x once all planned replicas serve. Before that, while replicas of the old plan still serve
beyond the new one, each variant gets its planned share of a bucket in proportion to how many of its replicas are
there, and the surplus takes the rest. So nothing is ever routed to capacity that does not exist yet, load moves
replica by replica, and no history is needed: the table depends on the plan and on what is Ready now.

Measured demand is never twice the same, and a solve ends every few seconds. `settle` keeps the stored plan where the
new one decides the same for nearly the same demand; otherwise every service's ConfigMap would be written, and every
gateway would read it, after every solve.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from llmfleet.api import LLMService, Plan, Route, RoutedVariant, RoutingTable, ServicePlan
from llmfleet.api.meta import (
    ANNOTATION_PLAN_ID,
    COMPONENT_ROUTING,
    LABEL_COMPONENT,
    LABEL_SERVICE,
    PLAN_KEY,
    ROUTING_KEY,
    ApiModel,
)
from llmfleet.operator.model import ANNOTATION_CONTENT, Manifest, ObservedConfigMap, PlannedService
from llmfleet.operator.render import PORT, digest_of, engine_labels, owner_reference

SAME_SHARE = 0.01
"""Two routing fractions that differ by less are the same decision."""
SAME_DEMAND = 0.2
"""Demand, and what follows from it (cost per token, unserved rate, the next best plan's cost), counts as unchanged
within this ratio."""


def config_map_name(service: str) -> str:
    """Name of a service's routing ConfigMap."""
    return f"{service}-routing"


def routing_table(
    service: LLMService,
    planned: PlannedService,
    serving: Mapping[str, int],
    live: RoutingTable | None,
    peer_key_secret: str | None = None,
) -> RoutingTable:
    """The table for the engines that serve now. `serving` counts Ready, not draining replicas by variant;
    `peer_key_secret` is the Secret of engines that can hand requests over, None where none can."""
    plan = planned.plan
    wanted = plan.replicas
    here = {name: min(1.0, serving.get(name, 0) / count) for name, count in wanted.items() if count > 0}
    live_variants = {variant.name: variant for variant in live.variants} if live is not None else {}
    known = {*wanted, *live_variants}
    surplus = {name: count - wanted.get(name, 0) for name, count in serving.items() if name in known}
    surplus = {name: count for name, count in sorted(surplus.items()) if count > 0}
    moving = bool(surplus) and any(share < 1.0 for share in here.values())

    namespace, name = plan.namespace, plan.service
    variants = [
        RoutedVariant(
            name=variant.name,
            replicas=variant.replicas,
            selector=engine_labels(name, variant.name),
            port=PORT,
            latency=variant.latency,
        )
        for variant in plan.variants
    ]
    routes = plan.routes
    if moving:
        old = [
            live_variants[key].model_copy(update={"replicas": count})
            for key, count in surplus.items()
            if key not in wanted
        ]
        # A gateway weighs shares by Ready over `replicas`; these shares are already those of what is there.
        there = [v.model_copy(update={"replicas": min(v.replicas, serving.get(v.name, 0))}) for v in variants]
        variants = sorted((*there, *old), key=lambda variant: variant.name)
        routes = _blend(plan.routes, here, surplus)
    return RoutingTable(
        plan_id=planned.plan_id,
        namespace=namespace,
        service=name,
        served_name=service.served_name,
        api_keys_secret=service.spec.api_keys_secret,
        peer_key_secret=peer_key_secret,
        context_length=service.spec.model.context_length,
        objective=service.spec.objective,
        buckets=plan.buckets,
        variants=variants,
        routes=routes,
    )


def config_map(service: LLMService, table: RoutingTable, plan: ServicePlan) -> Manifest:
    """The ConfigMap, byte for byte the same for the same table and plan."""
    manifest: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(service.metadata.name),
            "namespace": service.metadata.namespace,
            "labels": {LABEL_COMPONENT: COMPONENT_ROUTING, LABEL_SERVICE: service.metadata.name},
            "annotations": {ANNOTATION_PLAN_ID: table.plan_id},
            "ownerReferences": [owner_reference(service)],
        },
        "data": {ROUTING_KEY: _text(table), PLAN_KEY: _text(plan)},
    }
    manifest["metadata"]["annotations"][ANNOTATION_CONTENT] = digest_of(manifest)
    return manifest


def stored_table(config_map: ObservedConfigMap | None) -> RoutingTable | None:
    """The live routing table; None where there is none that this version understands."""
    text = config_map.data.get(ROUTING_KEY) if config_map is not None else None
    try:
        return RoutingTable.model_validate_json(text) if text is not None else None
    except ValidationError:
        return None


def stored_plan(config_map: ObservedConfigMap | None) -> PlannedService | None:
    """The plan in force as the ConfigMap remembers it; None where there is none that this version understands."""
    text = config_map.data.get(PLAN_KEY) if config_map is not None else None
    table = stored_table(config_map)
    try:
        plan = ServicePlan.model_validate_json(text) if text is not None else None
    except ValidationError:
        return None
    return PlannedService(plan_id=table.plan_id if table is not None else "", plan=plan) if plan is not None else None


def restore_plan(config_maps: Iterable[ObservedConfigMap]) -> Plan | None:
    """The fleet's plan as the ConfigMaps remember it, for the first solve after a restart to start from."""
    services = [stored.plan for config_map in config_maps if (stored := stored_plan(config_map)) is not None]
    if not services:
        return None
    services.sort(key=lambda service: service.key)
    known_watts = [v.watts_per_replica * v.replicas for s in services for v in s.variants if v.watts_per_replica]
    return Plan(
        plan_id=digest_of([service.to_wire() for service in services]),
        status="partial" if any(service.unserved_rps > 0 for service in services) else "feasible",
        gap_cost=None,
        stopped_by="gap",
        solve_seconds=0.0,
        cost_per_hour=sum(service.cost_per_hour for service in services),
        watts=sum(known_watts) if known_watts else None,
        services=services,
    )


def settle(new: PlannedService, stored: PlannedService | None) -> PlannedService:
    """The stored plan where the new one decides the same for nearly the same demand, else the new one."""
    if stored is None or not _alike(new.plan.to_wire(), stored.plan.to_wire()):
        return new
    return PlannedService(plan_id=stored.plan_id, plan=stored.plan, generation=new.generation)


def _blend(routes: Iterable[Route], here: Mapping[str, float], surplus: Mapping[str, int]) -> list[Route]:
    """Planned shares as far as replicas are there; what is left of each bucket goes to the surplus replicas."""
    shares: dict[tuple[int, str], float] = {}
    left: dict[int, float] = {}
    for route in routes:
        present = route.fraction * here.get(route.variant, 0.0)
        shares[route.bucket, route.variant] = shares.get((route.bucket, route.variant), 0.0) + present
        left[route.bucket] = left.get(route.bucket, 0.0) + route.fraction - present
    total = sum(surplus.values())
    for bucket, rest in left.items():
        for variant, count in surplus.items():
            shares[bucket, variant] = shares.get((bucket, variant), 0.0) + rest * count / total
    return [
        Route(bucket=bucket, variant=variant, fraction=min(1.0, round(share, 9)))
        for (bucket, variant), share in sorted(shares.items())
        if share > 0
    ]


def _text(document: ApiModel) -> str:
    return json.dumps(document.to_wire(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


_NUMBER = re.compile(r"(?<![\w.-])[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?(?![\w-])")
_EXACT = frozenset({"costPerReplicaHour", "wattsPerReplica"})
"""Figures that people write; any change counts."""


def _survived(losses: list[dict[str, Any]]) -> list[tuple[list[str], float, bool]]:
    return [(loss["gpuTypes"], loss["share"], loss["unservedRps"] > 0) for loss in losses]


def _alike(new: Any, stored: Any, field: str = "") -> bool:
    """Whether two plans (as JSON) decide the same for nearly the same demand."""
    if field == "shortfall":
        # Its figures follow the demand; another cause or another remedy is news.
        return _NUMBER.sub("#", new or "") == _NUMBER.sub("#", stored or "")
    if field == "losses":
        # Where requests would go follows the demand; what must be survived, and whether it is, is news.
        return _survived(new or []) == _survived(stored or [])
    if field == "nextBest":
        # How many replicas of what follows the demand; what it costs is what people compare with.
        return bool(new) == bool(stored) and (not new or _alike(new["costPerHour"], stored["costPerHour"]))
    if field == "sizes":
        # Where they are enough to change what is decided, the rest of the plan says so.
        return bool(new) == bool(stored)
    if field == "demand":
        return math.isclose(sum(new), sum(stored), rel_tol=SAME_DEMAND, abs_tol=1e-6)
    if isinstance(new, dict) and isinstance(stored, dict):
        return all(_alike(new.get(key), stored.get(key), key) for key in {*new, *stored})
    if isinstance(new, list) and isinstance(stored, list):
        return len(new) == len(stored) and all(_alike(a, b, field) for a, b in zip(new, stored, strict=True))
    if isinstance(new, float) and isinstance(stored, float) and field not in _EXACT:
        if field == "fraction":
            return abs(new - stored) < SAME_SHARE
        return math.isclose(new, stored, rel_tol=SAME_DEMAND, abs_tol=1e-6)
    return bool(new == stored)
