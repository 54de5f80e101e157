"""A running fleet as an operator left it: objects, inventory and the plan in force, read once.

Nothing is guessed: the inventory is what the operator wrote into the GPUTypes' status, the demand and the replicas are
those of the service plans that it keeps in the routing ConfigMaps. So what is explained is the plan that serves, not
one that was solved anew and may differ. An object that does not parse counts as it does for the operator: by its last
version that did, or not at all; that is a note, and no reason to say nothing of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import httpx2
from lightkube import Client
from lightkube.core.exceptions import ApiError, ConfigError, LoadResourceError
from pydantic import ValidationError

from llmfleet.api import (
    CONDITION_PLANNED,
    FleetPolicy,
    FleetPolicySpec,
    GPUType,
    LLMService,
    ModelProfile,
    Plan,
    PowerDomain,
    Refusal,
    ServicePlan,
)
from llmfleet.api.meta import ANNOTATION_PLAN_ID, COMPONENT_ROUTING, LABEL_COMPONENT, PLAN_KEY, Resource
from llmfleet.cli.devices import observed_devices
from llmfleet.cli.refused import RefusedError
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.kinds import CONFIG_MAPS, FLEET_POLICIES, GPU_TYPES, LLM_SERVICES, MODEL_PROFILES, POWER_DOMAINS
from llmfleet.placement import Demand, PlanInputs
from llmfleet.placement.whole_nodes import node_types, planned_nodes

_TIMEOUT_S = 20.0

_ADDRESSES: dict[type[Resource], Any] = {
    LLMService: LLM_SERVICES,
    ModelProfile: MODEL_PROFILES,
    GPUType: GPU_TYPES,
    FleetPolicy: FLEET_POLICIES,
    PowerDomain: POWER_DOMAINS,
}


@dataclass(frozen=True)
class Fleet:
    """What is in force in a cluster."""

    inputs: PlanInputs
    plan: Plan
    notes: tuple[str, ...] = ()
    """What does not parse, and what counts instead."""


def read_fleet() -> Fleet:
    """Reads the cluster that `KUBECONFIG` or the default kubeconfig names.

    Raises RefusedError where there is no such cluster, or it does not answer, or llmfleet is not installed in it.
    """
    try:
        with closing(Client(timeout=httpx2.Timeout(_TIMEOUT_S))) as client:
            objects = {kind: _objects(client, address, kind) for kind, address in _ADDRESSES.items()}
            tables = _listed(client.list(CONFIG_MAPS, namespace="*", labels={LABEL_COMPONENT: COMPONENT_ROUTING}))
    except (ConfigError, LoadResourceError) as error:
        raise RefusedError(f"no cluster: {error}; set KUBECONFIG, or explain files with -f") from error
    except ApiError as error:
        hint = "; are the CRDs of llmfleet installed?" if error.status.code == 404 else ""
        raise RefusedError(f"the API server refused: {error.status.message}{hint}") from error
    except httpx2.HTTPError as error:
        raise RefusedError(f"the API server does not answer: {error}") from error
    return fleet_in(objects, tables, datetime.now(UTC))


def fleet_in(
    objects: Mapping[type[Resource], Iterable[dict[str, Any]]], tables: list[dict[str, Any]], now: datetime
) -> Fleet:
    """What raw objects, by kind, and routing ConfigMaps make of a fleet, as the operator reads them."""
    cache = Cache()
    for kind, raws in objects.items():
        for raw in raws:
            cache.apply(observe(kind.KIND, raw))
    fleet = fleet_of(
        list(cache.services.values()),
        list(cache.profiles.values()),
        list(cache.gpu_types.values()),
        cache.policy,
        tables,
        now,
        list(cache.power_domains.values()),
        sorted(key for kind, key in cache.invalid if kind == LLMService.KIND),
    )
    notes = (f"{kind} {key}: {invalid.message}" for (kind, key), invalid in sorted(cache.invalid.items()))
    return replace(fleet, notes=tuple(notes))


def fleet_of(
    services: list[LLMService],
    profiles: list[ModelProfile],
    gpu_types: list[GPUType],
    policy: FleetPolicySpec,
    tables: list[dict[str, Any]],
    now: datetime,
    power_domains: Sequence[PowerDomain] = (),
    unreadable: Sequence[str] = (),
) -> Fleet:
    """Puts inputs and the plan in force together. `tables` are the routing ConfigMaps, `unreadable` the keys of
    services that do not parse."""
    plans = {plan.key: plan for plan in filter(None, map(_service_plan, tables))}
    live = {service.key for service in services}
    in_force = [plans[key] for key in sorted(plans) if key in live]
    kept = [plans[key] for key in unreadable if key in plans]
    ids = sorted({table["metadata"].get("annotations", {}).get(ANNOTATION_PLAN_ID, "") for table in tables})
    return Fleet(
        inputs=PlanInputs(
            services=services,
            profiles=profiles,
            gpu_types=gpu_types,
            power_domains=list(power_domains),
            inventory={gpu_type.metadata.name: observed_devices(gpu_type, now) for gpu_type in gpu_types},
            demand={plan.key: Demand(rps=plan.demand, sizes=plan.sizes) for plan in in_force},
            policy=policy,
            unreadable=list(unreadable),
            at=now.timestamp(),
        ),
        plan=Plan(
            plan_id=",".join(filter(None, ids)),
            status="partial" if any(plan.unserved_rps > 0 for plan in in_force) else "feasible",
            gap_cost=None,
            stopped_by="gap",
            solve_seconds=0,
            cost_per_hour=sum(plan.cost_per_hour for plan in in_force),
            services=in_force,
            nodes=planned_nodes(node_types(gpu_types, (), [*in_force, *kept])) or None,
            kept=kept,
            refusals=[refusal for service in services if (refusal := _refusal(service, plans)) is not None],
        ),
    )


def _refusal(service: LLMService, plans: dict[str, ServicePlan]) -> Refusal | None:
    """Why a service has no plan, as its Planned condition says it."""
    if service.key in plans:
        return None
    planned = next((c for c in service.status.conditions if c.type == CONDITION_PLANNED), None)
    reason = planned.reason if planned is not None else "NotPlanned"
    message = planned.message if planned is not None else "no operator has planned this service yet"
    return Refusal(
        namespace=service.metadata.namespace or "", service=service.metadata.name, reason=reason, message=message
    )


def _service_plan(table: dict[str, Any]) -> ServicePlan | None:
    text = (table.get("data") or {}).get(PLAN_KEY)
    try:
        return ServicePlan.model_validate_json(text) if text else None
    except ValidationError:
        return None  # another version wrote it; its service then counts as not planned


def _objects(client: Client, address: Any, kind: type[Resource]) -> list[dict[str, Any]]:
    return _listed(client.list(address, namespace="*") if kind.NAMESPACED else client.list(address))


def _listed(listing: Iterable[Any]) -> list[dict[str, Any]]:
    """Plain objects; lightkube's generic resources are dictionaries whose metadata may be a struct."""
    return [item.to_dict() for item in listing]
