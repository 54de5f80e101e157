"""How many devices of each GPUType there are for the fleet: observed, never written by hand.

    inventory = allocatable of Ready, schedulable nodes - requests of pods of others + provisionable

A node counts for a type when it carries the type's selector labels and the type (with its overlay) tolerates its
taints. Two types may claim the same resource on the same node, for instance a broad one and a narrow one; each
(node, resource) belongs to exactly one type, the one with the most selector labels, by name where they are equal, so
no device is counted twice.

An engine pod that stays Pending beyond its deadline is evidence that the capacity is not really there (an autoscaler
that has run dry, CPU or memory short beside the devices). The type then counts as unavailable for a while: the
inventory is what scheduled engines use, no more. A pod that only waits for a volume of its own is no evidence: one
service's misspelt claim must not close the type to all. The end of that time lives in the GPUType's status, so that a
restart does not forget it. When it is over, the capacity is tried again.

A type whose object does not parse keeps its devices: no other type counts them. A type whose power budget is not
understood has no more than the plans in force have of it (`invalid`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from llmfleet.api import Condition, FleetPolicySpec, GPUType, GPUTypeStatus, ServicePlan
from llmfleet.api.gputype import CONDITION_AVAILABLE, GPUTypeSpec
from llmfleet.api.pod import Toleration
from llmfleet.operator.model import ForeignUse, ObservedDeployment, ObservedNode, ObservedPod

REASON_LIMIT_UNKNOWN = "LimitUnknown"
"""What limits the type does not parse."""
REASON_NO_DEVICES = "NoDevices"
REASON_CAPACITY_UNAVAILABLE = "CapacityUnavailable"


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is, by GPUType name."""

    statuses: Mapping[str, GPUTypeStatus]
    """New status of every type."""
    devices: Mapping[str, int]
    """Devices that the fleet may use, before `limit`: `PlanInputs.inventory`."""


@dataclass(frozen=True, slots=True)
class DeviceClaim:
    """Which nodes' devices are a type's."""

    gpu_type: str
    resource_name: str
    node_selector: Mapping[str, Any]
    """Labels that the node has; one that is not text is on no node."""
    tolerations: Sequence[Toleration] | None
    """Of its engines; None: it is not known, so no taint keeps them away."""

    @classmethod
    def of(cls, name: str, spec: GPUTypeSpec) -> DeviceClaim:
        """The claim of a type that is known."""
        overlay = spec.pod_overlay.tolerations if spec.pod_overlay is not None else []
        return cls(name, spec.resource_name, spec.node_selector, (*spec.tolerations, *overlay))

    def holds(self, node: ObservedNode) -> bool:
        """Whether engines of the type may run on the node."""
        return all(node.labels.get(key) == value for key, value in self.node_selector.items()) and (
            self.tolerations is None or _tolerated(node, self.tolerations)
        )


def observe_inventory(
    gpu_types: Mapping[str, GPUType],
    nodes: Iterable[ObservedNode],
    foreign: Iterable[ForeignUse],
    pods: Sequence[ObservedPod],
    policy: FleetPolicySpec,
    now: datetime,
    *,
    claims: Sequence[DeviceClaim] = (),
    bounds: Mapping[str, tuple[int, str]] | None = None,
) -> Inventory:
    """Counts the devices of every type. `pods` are the engine pods of the whole fleet. `claims` are those of types that
    do not parse, which keep their devices from others; `bounds` the most devices by type, and why."""
    bounds = bounds or {}
    used_by_others: dict[tuple[str, str], int] = {}
    for use in foreign:
        for resource, amount in use.requests.items():
            used_by_others[use.node, resource] = used_by_others.get((use.node, resource), 0) + amount

    allocatable = dict.fromkeys(gpu_types, 0)
    held_by_others = dict.fromkeys(gpu_types, 0)
    by_resource = _by_resource([*claims, *(DeviceClaim.of(name, one.spec) for name, one in gpu_types.items())])
    for node in nodes:
        if not (node.ready and node.schedulable):
            continue
        for resource, amount in node.allocatable.items():
            owner = _owner(by_resource.get(resource, ()), node)
            if owner in allocatable:
                allocatable[owner] += amount
                held_by_others[owner] += min(amount, used_by_others.get((node.name, resource), 0))

    statuses, devices = {}, {}
    for name, gpu_type in sorted(gpu_types.items()):
        own = [pod for pod in pods if pod.gpu_type == name and not pod.finished]
        scheduled = sum(pod.devices for pod in own if pod.scheduled)
        there = allocatable[name] - held_by_others[name]
        if gpu_type.spec.provisionable is not None:
            there += gpu_type.spec.provisionable.devices
        until = _unavailable_until(gpu_type, own, policy, now)
        if until is not None:
            there = min(there, scheduled)
        most, why = bounds.get(name, (there, ""))
        there = min(there, most)
        devices[name] = there
        limit = gpu_type.spec.limit
        statuses[name] = GPUTypeStatus(
            observed_generation=gpu_type.metadata.generation,
            conditions=_conditions(gpu_type, there if limit is None else min(there, limit), until, why, now),
            last_accepted=gpu_type.status.last_accepted,
            allocatable_devices=allocatable[name],
            foreign_devices=held_by_others[name],
            fleet_devices=sum(pod.devices for pod in own),
            available_devices=there if limit is None else min(there, limit),
            unavailable_until=until,
        )
    return Inventory(statuses=statuses, devices=devices)


def free_devices(
    statuses: Mapping[str, GPUTypeStatus],
    deployments: Iterable[ObservedDeployment],
    pods: Iterable[ObservedPod],
) -> dict[str, int]:
    """Devices by GPUType that no engine holds or is promised; negative where the fleet holds more than there is.

    A variant is counted with what its Deployment asks for or what its pods hold (terminating ones included, which
    keep their devices to the end), whichever is more. So room that was just promised to one service is not
    promised again to the next before its pods exist.
    """
    held: dict[tuple[str, str, str], int] = {}
    for pod in pods:
        if not pod.finished:
            variant = (pod.gpu_type, pod.key, pod.variant)
            held[variant] = held.get(variant, 0) + pod.devices
    for deployment in deployments:
        variant = (deployment.gpu_type, deployment.key, deployment.variant)
        held[variant] = max(held.get(variant, 0), deployment.replicas * deployment.devices)
    free = {name: status.available_devices for name, status in statuses.items()}
    for (gpu_type, _, _), amount in held.items():
        if gpu_type in free:
            free[gpu_type] -= amount
    return free


def wanted_devices(
    plans: Iterable[ServicePlan], deployments: Iterable[ObservedDeployment], free: Mapping[str, int]
) -> dict[str, int]:
    """Devices by GPUType that the plans ask for beyond what Deployments hold and what is free.

    Where this is positive, somebody's new capacity waits for somebody's old: the old must go first.
    """
    held = {(d.key, d.variant): d.replicas for d in deployments}
    asked: dict[str, int] = {}
    for plan in plans:
        for variant in plan.variants:
            missing = variant.replicas - held.get((plan.key, variant.name), 0)
            if missing > 0:
                asked[variant.gpu_type] = asked.get(variant.gpu_type, 0) + missing * variant.devices
    wanted = {gpu_type: amount - max(0, free.get(gpu_type, 0)) for gpu_type, amount in asked.items()}
    return {gpu_type: amount for gpu_type, amount in wanted.items() if amount > 0}


def pending_deadline_s(gpu_type: GPUType | None, policy: FleetPolicySpec) -> float:
    """How long a pod of this type may stay Pending without a node, in seconds, an autoscaler's start included."""
    provisionable = gpu_type.spec.provisionable if gpu_type is not None else None
    return policy.pending_deadline_seconds + (provisionable.startup_seconds if provisionable is not None else 0)


def _unavailable_until(
    gpu_type: GPUType, pods: Sequence[ObservedPod], policy: FleetPolicySpec, now: datetime
) -> datetime | None:
    """End of the time in which this type's capacity counts as unavailable; None while it is available."""
    current = gpu_type.status.unavailable_until
    if current is not None and current > now:
        return current
    if any(pod.terminating for pod in pods):
        return None  # what is still leaving, for as long as its grace period, may be just what the others wait for
    oldest_allowed = now - timedelta(seconds=pending_deadline_s(gpu_type, policy))
    if any(pod.lacks_room and pod.created_at < oldest_allowed for pod in pods):
        return now + timedelta(seconds=policy.unavailable_seconds)
    return None


def _conditions(gpu_type: GPUType, available: int, until: datetime | None, why: str, now: datetime) -> list[Condition]:
    """The type's conditions with a new `Available`. Its words hold no count, which would be written at each change."""
    status, reason, message = "True", "DevicesAvailable", "engines may be planned on it"
    if until is not None:
        status, reason = "False", REASON_CAPACITY_UNAVAILABLE
        message = f"a pod stayed Pending too long: no more devices than now in use are planned until {until:%FT%TZ}"
    elif why:
        status, reason, message = "False", REASON_LIMIT_UNKNOWN, f"{why}: services get no more devices than they have"
    elif available <= 0:
        status, reason = "False", REASON_NO_DEVICES
        message = (
            "no device on a Ready, schedulable node that spec.nodeSelector and tolerations match is left by pods of "
            "others and spec.limit, and spec.provisionable adds none"
        )
    before = next((c for c in gpu_type.status.conditions if c.type == CONDITION_AVAILABLE), None)
    since = before.last_transition_time if before is not None and before.status == status else now
    condition = {"type": CONDITION_AVAILABLE, "status": status, "reason": reason, "message": message}
    of = {"observed_generation": gpu_type.metadata.generation, "last_transition_time": since.replace(microsecond=0)}
    conditions = {c.type: c for c in gpu_type.status.conditions}
    return list((conditions | {CONDITION_AVAILABLE: Condition.model_validate(condition | of)}).values())


def _by_resource(claims: Iterable[DeviceClaim]) -> dict[str, list[DeviceClaim]]:
    """The claims on each resource, the most particular selector first."""
    groups: dict[str, list[DeviceClaim]] = {}
    for claim in sorted(claims, key=lambda one: (-len(one.node_selector), one.gpu_type)):
        groups.setdefault(claim.resource_name, []).append(claim)
    return groups


def _owner(claims: Iterable[DeviceClaim], node: ObservedNode) -> str | None:
    """The one type that counts this node's devices."""
    return next((claim.gpu_type for claim in claims if claim.holds(node)), None)


def _tolerated(node: ObservedNode, tolerations: Sequence[Toleration]) -> bool:
    """Whether a pod with these tolerations may be placed on the node."""
    return all(
        taint.get("effect") == "PreferNoSchedule" or any(_matches(toleration, taint) for toleration in tolerations)
        for taint in node.taints
    )


def _matches(toleration: Toleration, taint: Mapping[str, str]) -> bool:
    if toleration.effect is not None and toleration.effect != taint.get("effect"):
        return False
    if toleration.key is None:
        return toleration.operator == "Exists"
    if toleration.key != taint.get("key"):
        return False
    return toleration.operator == "Exists" or (toleration.value or "") == (taint.get("value") or "")
