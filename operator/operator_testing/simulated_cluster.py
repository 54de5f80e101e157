"""A simulated cluster: Deployment controller, scheduler and kubelet move at random between rounds of reconcile.

    Cluster(capacity, rng).add(replicas) ... reconcile() ... tick() ... settle(), assert_follows_plan()

The simulation keeps the rules that matter: rolling updates with surge and unavailability, the ReplicaSet's order of
deletion, devices that a terminating pod holds to its end, pods without room that stay Pending. Everything that the
operator knows goes through `parse`, as in a real cluster. What must never happen is checked at every step.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmfleet.api import (
    FleetPolicySpec,
    GPUType,
    GPUTypeStatus,
    LLMService,
    PlannedVariant,
    Route,
    RoutingTable,
    ServicePlan,
)
from llmfleet.api.meta import ANNOTATION_DRAINING, LABEL_SERVICE, LABEL_VARIANT, ROUTING_KEY
from llmfleet.operator.inventory import free_devices, wanted_devices
from llmfleet.operator.model import (
    ANNOTATION_DELETION_COST,
    ANNOTATION_INPUTS,
    Action,
    AnnotatePod,
    ApplyConfigMap,
    ApplyDeployment,
    DeleteDeployment,
    Desired,
    EmitEvent,
    Observed,
    ObservedPod,
    PlannedService,
    WriteStatus,
)
from llmfleet.operator.parse import configmap_from_object, deployment_from_object, pod_from_object
from llmfleet.operator.reconcile import reconcile

START = datetime(2026, 1, 1, tzinfo=UTC)
BUCKETS = {"inputTokens": [512], "outputTokens": [128]}
LATENCY = {"ttftBaseMs": 1, "ttftMsPerInputToken": 0.1, "tpotBaseMs": 1, "tpotMsPerRunning": 0.1}
TYPES = ("a", "b", "c")
POLICY = FleetPolicySpec()


def gpu_type(name: str) -> GPUType:
    spec = {"resourceName": f"example.com/{name}", "memoryGib": 80, "pricePerHour": {"onDemand": 1}}
    return GPUType.parse({"metadata": {"name": name}, "spec": spec})


def llm_service(name: str = "chat") -> LLMService:
    spec = {
        "model": {"name": "org/model", "contextLength": 4096},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
    }
    return LLMService.parse({"metadata": {"name": name, "namespace": "ns", "uid": name, "generation": 1}, "spec": spec})


def service_plan(
    service: str, replicas: Mapping[str, int], tensor_parallel: Mapping[str, int] | None = None
) -> ServicePlan:
    wanted = {name: count for name, count in sorted(replicas.items()) if count}
    variants = [
        PlannedVariant(
            name=name,
            gpu_type=name,
            tensor_parallel=(tensor_parallel or {}).get(name, 1),
            replicas=count,
            cost_per_replica_hour=1.0,
            latency=LATENCY,
        )
        for name, count in wanted.items()
    ]
    total = sum(wanted.values())
    return ServicePlan(
        namespace="ns",
        service=service,
        buckets=BUCKETS,
        variants=variants,
        routes=[Route(bucket=0, variant=name, fraction=count / total) for name, count in wanted.items()],
        demand=[1.0],
        unserved_rps=0,
        cost_per_hour=float(total),
    )


def planned(service: str, replicas: Mapping[str, int]) -> PlannedService:
    plan = service_plan(service, replicas)
    return PlannedService(plan_id=f"plan-{sorted(replicas.items())}", plan=plan)


@dataclass
class Cluster:
    """Objects as the API server holds them, and controllers that act when told."""

    capacity: dict[str, int]
    rng: random.Random
    services: dict[str, LLMService] = field(default_factory=dict)
    desired: dict[str, Desired] = field(default_factory=dict)
    deployments: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    config_maps: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[EmitEvent] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    """Inputs hashes whose engines never come up."""
    now: datetime = START
    serial: int = 0

    def add(self, replicas: Mapping[str, int], name: str = "chat") -> None:
        self.services[name] = llm_service(name)
        self.desired[name] = planned(name, replicas)

    def plan(self, replicas: Mapping[str, int], name: str = "chat") -> None:
        self.desired[name] = planned(name, replicas)

    def edit(self, name: str, **engine: Any) -> None:
        service = self.services[name]
        spec = service.spec.model_copy(update={"engine": service.spec.engine.model_copy(update=engine)})
        metadata = service.metadata.model_copy(update={"generation": service.metadata.generation + 1})
        self.services[name] = service.model_copy(update={"spec": spec, "metadata": metadata})

    def observe(self, name: str = "chat") -> Observed:
        deployments = [deployment_from_object(obj) for obj in self.deployments.values()]
        pods = [pod_from_object(obj) for obj in self.pods.values()]
        statuses = {kind: GPUTypeStatus(available_devices=count) for kind, count in self.capacity.items()}
        free = free_devices(statuses, deployments, pods)
        plans = [desired.plan for desired in self.desired.values() if isinstance(desired, PlannedService)]
        routing = self.config_maps.get(f"{name}-routing")
        return Observed(
            service=self.services[name],
            deployments=[d for d in deployments if d.service == name],
            pods=[pod for pod in pods if pod.service == name],
            routing=configmap_from_object(routing) if routing else None,
            gpu_types={kind: gpu_type(kind) for kind in self.capacity},
            free_devices=free,
            unfit_nodes=frozenset(),
            policy=POLICY,
            now=self.now,
            wanted_devices=wanted_devices(plans, deployments, free),
        )

    def reconcile(self, name: str = "chat", desired: Desired | str = "own") -> tuple[Action, ...]:
        """One round of one service, carried out; checks what must hold after any round."""
        observed = self.observe(name)
        chosen = self.desired[name] if isinstance(desired, str) else desired
        actions = reconcile(chosen, observed)
        if self.rng.random() < 0.1:
            pods, deployments = list(observed.pods), list(observed.deployments)
            self.rng.shuffle(pods)
            self.rng.shuffle(deployments)
            again = reconcile(chosen, replace(observed, pods=pods, deployments=deployments))
            assert again == actions, "the order in which objects are listed must not matter"
        before = {obj["metadata"]["name"]: obj["spec"]["replicas"] for obj in self.deployments.values()}
        for action in actions:
            self.carry_out(action)
        self._check_promises(before)
        self._check_routes(name)
        self._check_ready(name)
        return actions

    def carry_out(self, action: Action) -> None:
        match action:
            case ApplyDeployment(manifest):
                self._apply_deployment(manifest)
            case ApplyConfigMap(manifest):
                self.config_maps[manifest["metadata"]["name"]] = copy.deepcopy(manifest)
            case AnnotatePod(_, name, annotations):
                metadata = self.pods[name]["metadata"]
                merged = {**metadata["annotations"], **annotations}
                metadata["annotations"] = {key: value for key, value in merged.items() if value is not None}
            case DeleteDeployment(_, name, uid):
                assert self.deployments[name]["metadata"]["uid"] == uid
                assert not self._pods_of(self.deployments[name], terminating=True), "deleted under its pods"
                del self.deployments[name]
            case WriteStatus(_, name, status):
                self.services[name] = self.services[name].model_copy(update={"status": status})
            case EmitEvent():
                self.events.append(action)

    def _apply_deployment(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        live = self.deployments.get(name)
        new = copy.deepcopy(manifest)
        new["spec"]["template"]["spec"].setdefault("dnsPolicy", "ClusterFirst")
        new["metadata"]["uid"] = live["metadata"]["uid"] if live else f"uid-{name}-{self._next()}"
        new["metadata"]["generation"] = (live["metadata"]["generation"] if live else 0) + 1
        new["status"] = live["status"] if live else {}
        if live:
            old_hash = live["spec"]["template"]["metadata"]["annotations"][ANNOTATION_INPUTS]
            if old_hash == new["spec"]["template"]["metadata"]["annotations"][ANNOTATION_INPUTS]:
                assert new["spec"]["template"] == live["spec"]["template"], "a template changed without its inputs"
        self.deployments[name] = new

    def _next(self) -> int:
        self.serial += 1
        return self.serial

    # What the cluster does by itself.

    def tick(self, patience: float = 0.7) -> None:
        """A second passes; each controller gets to each object with probability `patience`."""
        self.now += timedelta(seconds=1)
        for deployment in list(self.deployments.values()):
            if self.rng.random() < patience:
                self._control(deployment)
        for pod in self.rng.sample(list(self.pods.values()), len(self.pods)):
            if self.rng.random() < patience:
                self._run(pod)
        for deployment in self.deployments.values():
            self._report(deployment)

    def _pods_of(self, deployment: dict[str, Any], terminating: bool = False) -> list[dict[str, Any]]:
        labels = deployment["spec"]["selector"]["matchLabels"]
        return [
            pod
            for pod in self.pods.values()
            if labels.items() <= pod["metadata"]["labels"].items()
            and (terminating or "deletionTimestamp" not in pod["metadata"])
        ]

    def _control(self, deployment: dict[str, Any]) -> None:
        """One step of the Deployment controller and its ReplicaSets."""
        spec = deployment["spec"]
        wanted, rolling = spec["replicas"], spec["strategy"]["rollingUpdate"]
        current = spec["template"]["metadata"]["annotations"][ANNOTATION_INPUTS]
        pods = self._pods_of(deployment)
        new = [pod for pod in pods if pod["metadata"]["annotations"][ANNOTATION_INPUTS] == current]
        old = [pod for pod in pods if pod not in new]
        for _ in range(min(wanted - len(new), wanted + rolling["maxSurge"] - len(pods)) if old else wanted - len(new)):
            self._create(deployment)
        if old:
            ready = sum(_is_ready(pod) for pod in pods)
            floor = max(0, wanted - rolling["maxUnavailable"])
            spare = max(0, len(pods) - floor - sum(not _is_ready(pod) for pod in new))
            unhealthy = [pod for pod in old if not _is_ready(pod)][:spare]
            healthy = _by_deletion_order([pod for pod in old if _is_ready(pod)])[: max(0, ready - floor)]
            for pod in [*unhealthy, *healthy][: max(0, spare)]:
                self._delete(pod)
        elif len(new) > wanted:
            for pod in _by_deletion_order(new)[: len(new) - wanted]:
                self._delete(pod)
        deployment["status"]["observedGeneration"] = deployment["metadata"]["generation"]
        self._report(deployment)

    def _report(self, deployment: dict[str, Any]) -> None:
        pods = self._pods_of(deployment)
        current = deployment["spec"]["template"]["metadata"]["annotations"][ANNOTATION_INPUTS]
        deployment["status"] |= {
            "replicas": len(pods),
            "updatedReplicas": sum(p["metadata"]["annotations"][ANNOTATION_INPUTS] == current for p in pods),
            "readyReplicas": sum(map(_is_ready, pods)),
        }

    def _create(self, deployment: dict[str, Any]) -> None:
        template = copy.deepcopy(deployment["spec"]["template"])
        name = f"{deployment['metadata']['name']}-{self._next():04d}"
        self.pods[name] = {
            "metadata": {
                **template["metadata"],
                "name": name,
                "namespace": "ns",
                "uid": name,
                "creationTimestamp": self.now.isoformat(),
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", "conditions": []},
        }

    def _delete(self, pod: dict[str, Any]) -> None:
        if pod["spec"].get("nodeName"):
            pod["metadata"]["deletionTimestamp"] = self.now.isoformat()
        else:
            del self.pods[pod["metadata"]["name"]]

    def _run(self, pod: dict[str, Any]) -> None:
        """One step of scheduler or kubelet for one pod."""
        name, status = pod["metadata"]["name"], pod["status"]
        if name not in self.pods:
            return
        if "deletionTimestamp" in pod["metadata"]:
            del self.pods[name]
        elif not pod["spec"].get("nodeName"):
            seen = pod_from_object(pod)
            others = (pod_from_object(other) for other in self.pods.values())
            used = sum(other.devices for other in others if other.scheduled and other.gpu_type == seen.gpu_type)
            if used + seen.devices <= self.capacity[seen.gpu_type]:
                pod["spec"]["nodeName"] = "node"
            else:
                status["conditions"] = [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes available"}]
        elif status["phase"] == "Pending":
            status["phase"] = "Running"
        elif pod["metadata"]["annotations"][ANNOTATION_INPUTS] in self.broken:
            waiting = {"reason": "CrashLoopBackOff", "message": "back-off 10s"}
            last = {"terminated": {"message": "ValueError: no such attention backend"}}
            status["containerStatuses"] = [
                {"name": "engine", "restartCount": 3, "state": {"waiting": waiting}, "lastState": last}
            ]
        else:
            status["conditions"] = [{"type": "Ready", "status": "True"}]

    def lose_a_pod(self) -> None:
        if self.pods:
            del self.pods[self.rng.choice(sorted(self.pods))]

    # What must hold at any time.

    def serving(self, name: str = "chat") -> int:
        return sum(self.serving_by_variant(name).values())

    def serving_by_variant(self, name: str = "chat") -> dict[str, int]:
        counts: dict[str, int] = {}
        for pod in self.pods.values():
            metadata = pod["metadata"]
            if metadata["labels"][LABEL_SERVICE] == name:
                marked = ANNOTATION_DRAINING in metadata["annotations"] or "deletionTimestamp" in metadata
                variant = metadata["labels"][LABEL_VARIANT]
                counts[variant] = counts.get(variant, 0) + (_is_ready(pod) and not marked)
        return counts

    def table(self, name: str = "chat") -> RoutingTable:
        return RoutingTable.model_validate_json(self.config_maps[f"{name}-routing"]["data"][ROUTING_KEY])

    def condition(self, kind: str, name: str = "chat") -> tuple[str, str]:
        conditions = {c.type: (c.status, c.reason) for c in self.services[name].status.conditions}
        return conditions.get(kind, ("absent", ""))

    def _check_promises(self, before: Mapping[str, int]) -> None:
        """No Deployment grows beyond the devices that exist."""
        deployments = [deployment_from_object(obj) for obj in self.deployments.values()]
        grown = {d.gpu_type for d in deployments if d.replicas > before.get(d.name, 0)}
        promised = {
            kind: sum(d.replicas * d.tensor_parallel for d in deployments if d.gpu_type == kind) for kind in grown
        }
        for kind, amount in promised.items():
            assert amount <= self.capacity[kind], f"{amount} of {self.capacity[kind]} {kind} promised"

    def _check_routes(self, name: str) -> None:
        """Shares are whole, and never all with variants that do not serve while another of the table does."""
        if f"{name}-routing" not in self.config_maps:
            return
        table, serving = self.table(name), self.serving_by_variant(name)
        listed = {variant.name for variant in table.variants}
        assert {route.variant for route in table.routes} <= listed
        for bucket in {route.bucket for route in table.routes}:
            shares = {route.variant: route.fraction for route in table.routes if route.bucket == bucket}
            assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
            if any(serving.get(variant, 0) for variant in listed):
                assert any(serving.get(variant, 0) for variant in shares), "all is routed to what does not serve"

    def _check_ready(self, name: str) -> None:
        service = self.services[name]
        ready = next((c for c in service.status.conditions if c.type == "Ready"), None)
        if ready is None or ready.status != "True":
            return
        serving = self.serving_by_variant(name)
        for variant in service.status.variants:
            assert serving.get(variant.name, 0) >= variant.desired, "Ready while a planned replica does not serve"

    def is_quiet(self, name: str = "chat") -> bool:
        return self.reconcile(name) == ()

    def settle(self, rounds: int = 400) -> None:
        """Lets all services reconcile without disturbance until none has anything to do."""
        quiet = 0
        for _ in range(rounds):
            acted = [name for name in self.services if not self.is_quiet(name)]
            quiet = 0 if acted else quiet + 1
            if quiet > 12:
                return
            self.tick()
        state = [
            (d.name, d.replicas, d.status_replicas) for name in self.services for d in self.observe(name).deployments
        ]
        raise AssertionError(f"not settled after {rounds} rounds: {state}, {self.services}")

    def assert_follows_plan(self, name: str = "chat") -> None:
        desired = self.desired[name]
        assert isinstance(desired, PlannedService)
        observed = self.observe(name)
        assert {d.variant: d.replicas for d in observed.deployments} == desired.plan.replicas
        assert self.serving_by_variant(name) == desired.plan.replicas
        assert self.table(name).routes == desired.plan.routes
        assert {variant.name: variant.replicas for variant in self.table(name).variants} == desired.plan.replicas
        assert self.condition("Ready", name)[0] == "True"
        assert self.condition("NoSurgeCapacity", name)[0] == "absent"


def _is_ready(pod: dict[str, Any]) -> bool:
    return {"type": "Ready", "status": "True"} in pod["status"]["conditions"]


def _by_deletion_order(pods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As the ReplicaSet controller ranks them."""

    def rank(pod: dict[str, Any]) -> tuple[Any, ...]:
        seen: ObservedPod = pod_from_object(pod)
        cost = int(pod["metadata"]["annotations"].get(ANNOTATION_DELETION_COST, 0))
        return seen.scheduled, seen.phase == "Running", seen.ready, cost, -seen.created_at.timestamp()

    return sorted(pods, key=rank)


def roomy(rng: random.Random) -> Cluster:
    return Cluster(dict.fromkeys(TYPES, 40), rng)
