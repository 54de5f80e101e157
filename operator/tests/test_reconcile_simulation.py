"""Reconcile against a simulated cluster: Deployment controller, scheduler and kubelet move at random between rounds.

The simulation keeps the rules that matter: rolling updates with surge and unavailability, the ReplicaSet's order of
deletion, devices that a terminating pod holds to its end, pods without room that stay Pending. Everything that the
operator knows goes through `parse`, as in a real cluster.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.api import (
    FleetPolicySpec,
    GPUType,
    GPUTypeStatus,
    LLMService,
    PlannedVariant,
    Refusal,
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
Seeds = st.integers(min_value=0, max_value=2**32 - 1).map(random.Random)
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""A seed does not shrink to anything simpler; a failure is reported as it was found."""
SLOW = settings(max_examples=15, deadline=None, phases=PHASES, suppress_health_check=list(HealthCheck))


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


def plans(most: int = 4) -> st.SearchStrategy[dict[str, int]]:
    return st.fixed_dictionaries({kind: st.integers(0, most) for kind in TYPES})


def roomy(rng: random.Random) -> Cluster:
    return Cluster(dict.fromkeys(TYPES, 40), rng)


@SLOW
@given(Seeds, st.lists(plans(), min_size=1, max_size=4))
def test_a_fleet_left_alone_converges_to_its_plan(rng: random.Random, sequence: list[dict[str, int]]) -> None:
    cluster = Cluster(dict.fromkeys(TYPES, 4), rng)
    cluster.add(sequence[0])
    for replicas in sequence:
        cluster.plan(replicas)
        for _ in range(rng.randint(0, 25)):
            cluster.reconcile()
            cluster.tick()
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, plans(), plans())
def test_with_room_serving_replicas_never_fall_below_old_and_new(
    rng: random.Random, old: dict[str, int], new: dict[str, int]
) -> None:
    cluster = roomy(rng)
    cluster.add(old)
    cluster.settle()
    cluster.plan(new)
    floor = min(sum(old.values()), sum(new.values()))
    for _ in range(80):
        cluster.reconcile()
        assert cluster.serving() >= floor
        cluster.tick()
        assert cluster.serving() >= floor
        assert cluster.condition("NoSurgeCapacity")[0] == "absent"
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds)
def test_a_change_from_one_type_to_another_leaves_no_hole(rng: random.Random) -> None:
    """The transition of AIBrix #637: an engine of `a` does the work of three of `b`, and none may leave before all that
    takes its work over serves."""
    cluster = roomy(rng)
    cluster.add({"a": 4})
    cluster.settle()
    cluster.plan({"a": 1, "b": 9})
    for _ in range(80):
        cluster.reconcile()
        cluster.tick()
        serving = cluster.serving_by_variant()
        assert 3 * serving.get("a", 0) + serving.get("b", 0) >= 12
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, st.integers(1, 4))
def test_without_room_one_replica_at_a_time_makes_way(rng: random.Random, count: int) -> None:
    """Two variants on the same devices, all of them in use: the old leaves one by one, drained first."""
    cluster = Cluster({"a": count, "b": 40}, rng)
    cluster.add({"a": count}, "other")
    cluster.settle()
    cluster.add({"b": count}, "chat")
    cluster.settle()
    cluster.plan({"b": count}, "other")
    cluster.plan({"a": count}, "chat")
    for _ in range(200):
        for name in rng.sample(["other", "chat"], 2):
            cluster.reconcile(name)
        assert cluster.serving("chat") >= count - 1
        assert cluster.serving("other") >= count
        cluster.tick()
        if cluster.serving_by_variant("chat") == {"a": count}:
            break
    cluster.settle()
    cluster.assert_follows_plan("chat")
    cluster.assert_follows_plan("other")


@SLOW
@given(Seeds, st.integers(1, 3))
def test_two_services_that_swap_types_without_any_room_do_not_wait_for_each_other(rng: random.Random, n: int) -> None:
    cluster = Cluster({"a": n, "b": n}, rng)
    cluster.add({"a": n}, "one")
    cluster.add({"b": n}, "two")
    cluster.settle()
    cluster.plan({"b": n}, "one")
    cluster.plan({"a": n}, "two")
    blocked = False
    for _ in range(300):
        for name in rng.sample(["one", "two"], 2):
            cluster.reconcile(name)
            blocked |= cluster.condition("NoSurgeCapacity", name)[0] == "True"
            assert cluster.serving(name) >= n - 1
        cluster.tick()
        if cluster.serving_by_variant("one") == {"b": n} and cluster.serving_by_variant("two") == {"a": n}:
            break
    assert blocked
    cluster.settle()
    cluster.assert_follows_plan("one")
    cluster.assert_follows_plan("two")


@SLOW
@given(Seeds, plans(3), st.booleans())
def test_a_template_change_rolls_one_variant_at_a_time_and_keeps_serving(
    rng: random.Random, replicas: dict[str, int], room: bool
) -> None:
    cluster = roomy(rng) if room else Cluster({k: max(1, n) for k, n in replicas.items()}, rng)
    cluster.add(replicas)
    cluster.settle()
    cluster.edit("chat", args=["--enforce-eager"])
    total = sum(replicas.values())
    floor = total if room else total - POLICY.max_unavailable_engines
    for _ in range(100):
        cluster.reconcile()
        cluster.tick()
        assert cluster.serving() >= min(floor, total)
        mixed = [
            obj["metadata"]["name"]
            for obj in cluster.deployments.values()
            if len({pod["metadata"]["annotations"][ANNOTATION_INPUTS] for pod in cluster._pods_of(obj)}) > 1
        ]
        assert len(mixed) <= 1
    cluster.settle()
    cluster.assert_follows_plan()
    assert all("--enforce-eager" in pod["spec"]["containers"][0]["args"] for pod in cluster.pods.values())


def test_without_room_as_many_engines_at_once_are_replaced_as_the_policy_says() -> None:
    cluster = Cluster({"a": 4}, random.Random(0))
    cluster.add({"a": 4})
    cluster.settle()
    cluster.edit("chat", args=["--enforce-eager"])
    observed = replace(cluster.observe(), policy=FleetPolicySpec(max_unavailable_engines=3))
    applied = [a.manifest for a in reconcile(cluster.desired["chat"], observed) if isinstance(a, ApplyDeployment)]
    strategies = [manifest["spec"]["strategy"]["rollingUpdate"] for manifest in applied]
    assert strategies == [{"maxSurge": 0, "maxUnavailable": 3}]


@SLOW
@given(Seeds, st.integers(1, 3), st.integers(1, 3))
def test_a_template_that_never_comes_up_leaves_the_old_engines_serving_and_can_be_undone(
    rng: random.Random, a: int, b: int
) -> None:
    cluster = roomy(rng)
    cluster.add({"a": a, "b": b})
    cluster.settle()
    good = {pod.template_hash for pod in cluster.observe().pods}
    cluster.edit("chat", args=["--attention-backend", "NONE"])
    for _ in range(80):
        cluster.reconcile()
        cluster.broken |= {pod.template_hash for pod in cluster.observe().pods} - good
        cluster.tick()
        assert cluster.serving() >= a + b
    assert cluster.broken
    assert cluster.condition("Ready") == ("False", "EngineCrashLooping")
    cluster.edit("chat", args=[])
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, st.lists(plans(3), min_size=2, max_size=4))
def test_faults_restarts_and_refusals_on_the_way_do_not_change_where_it_ends(
    rng: random.Random, sequence: list[dict[str, int]]
) -> None:
    cluster = Cluster(dict.fromkeys(TYPES, 4), rng)
    cluster.add(sequence[0])
    refusal = Refusal(namespace="ns", service="chat", reason="ProfileNotFound", message="no profile")
    for replicas in sequence:
        cluster.plan(replicas)
        for _ in range(rng.randint(5, 30)):
            if rng.random() < 0.1:
                cluster.lose_a_pod()
            choice = rng.random()
            if choice < 0.2:
                cluster.reconcile(desired=None)
            elif choice < 0.3:
                cluster.reconcile(desired=refusal)
            elif choice < 0.9:
                cluster.reconcile()
            else:
                _interrupted(cluster)
            if rng.random() < 0.1:
                cluster.edit("chat", args=[f"--seed={rng.randint(0, 3)}"])
            cluster.tick()
    cluster.settle()
    cluster.assert_follows_plan()


def _interrupted(cluster: Cluster) -> None:
    """The operator dies after some of its actions."""
    actions = reconcile(cluster.desired["chat"], cluster.observe())
    for action in actions[: cluster.rng.randint(0, len(actions))]:
        cluster.carry_out(action)


@SLOW
@given(Seeds, plans(3), plans(3))
def test_reconciling_its_own_result_comes_to_rest(rng: random.Random, old: dict[str, int], new: dict[str, int]) -> None:
    """With the cluster frozen at a random moment: mark, shrink, nothing."""
    cluster = Cluster(dict.fromkeys(TYPES, 4), rng)
    cluster.add(old)
    cluster.settle()
    cluster.plan(new)
    for _ in range(rng.randint(0, 15)):
        cluster.reconcile()
        cluster.tick()
    rounds = [cluster.reconcile() for _ in range(4)]
    assert rounds[-1] == ()


@SLOW
@given(Seeds, plans(3), plans(3))
def test_a_refusal_never_removes_a_running_engine(rng: random.Random, old: dict[str, int], new: dict[str, int]) -> None:
    cluster = roomy(rng)
    cluster.add(old)
    cluster.settle()
    refusal = Refusal(namespace="ns", service="chat", reason="UnknownGPUType", message="GPUType x does not exist")
    cluster.desired["chat"] = refusal
    for _ in range(40):
        cluster.reconcile()
        cluster.tick()
    assert cluster.serving() == sum(old.values())
    assert cluster.condition("Planned") == ("False", "UnknownGPUType")
    assert cluster.condition("Ready") == ("False", "UnknownGPUType")
    cluster.plan(new)
    cluster.settle()
    cluster.assert_follows_plan()


@SLOW
@given(Seeds, st.integers(2, 5), st.data())
def test_the_pods_that_leave_are_the_ones_that_were_marked(rng: random.Random, old: int, data: st.DataObject) -> None:
    new = data.draw(st.integers(1, old - 1))
    cluster = roomy(rng)
    cluster.add({"a": old})
    cluster.settle()
    before = set(cluster.pods)
    cluster.plan({"a": new})
    marked: set[str] = set()
    for _ in range(60):
        actions = cluster.reconcile()
        shrinks = any(isinstance(a, ApplyDeployment) and a.manifest["spec"]["replicas"] == new for a in actions)
        assert not (shrinks and any(isinstance(a, AnnotatePod) for a in actions)), "marks must be seen first"
        marked |= {n for n, pod in cluster.pods.items() if ANNOTATION_DRAINING in pod["metadata"]["annotations"]}
        assert before - set(cluster.pods) <= marked
        leaving = {n for n, pod in cluster.pods.items() if "deletionTimestamp" in pod["metadata"]}
        assert leaving <= marked, "a pod is deleted that still gets requests"
        cluster.tick()
    assert before - set(cluster.pods) == marked
    assert len(cluster.pods) == new


def test_a_shrinking_variant_gives_up_the_engines_on_cordoned_nodes() -> None:
    cluster = roomy(random.Random(1))
    cluster.add({"a": 4})
    cluster.settle()
    cluster.plan({"a": 2})
    for number, pod in enumerate(cluster.pods.values()):
        pod["spec"]["nodeName"] = f"node-{number}"
    unfit = frozenset({"node-0", "node-2"})
    marks = [
        action
        for action in reconcile(cluster.desired["chat"], replace(cluster.observe(), unfit_nodes=unfit))
        if isinstance(action, AnnotatePod)
    ]
    assert {cluster.pods[mark.name]["spec"]["nodeName"] for mark in marks} == unfit


def test_load_moves_to_new_replicas_as_they_become_ready() -> None:
    cluster = roomy(random.Random(1))
    cluster.add({"a": 4})
    cluster.settle()
    cluster.plan({"b": 4})
    cluster.reconcile()
    assert {route.variant: route.fraction for route in cluster.table().routes} == {"a": 1.0}
    seen = set()
    for _ in range(60):
        cluster.tick(patience=0.3)
        cluster.reconcile()
        shares = {route.variant: route.fraction for route in cluster.table().routes}
        ready = cluster.serving_by_variant().get("b", 0)
        if cluster.serving_by_variant().get("a", 0):
            assert shares.get("b", 0.0) == pytest.approx(ready / 4)
        seen.add(ready)
    assert seen == {0, 1, 2, 3, 4}
    assert {variant.name for variant in cluster.table().variants} == {"b"}


def test_a_lowered_limit_takes_surplus_away_only_after_the_new_capacity_serves() -> None:
    """The limit of `a` falls below what is in use: two engines of it serve until two of `b` do."""
    cluster = Cluster({"a": 2, "b": 2}, random.Random(2))
    cluster.add({"a": 2})
    cluster.settle()
    cluster.capacity["a"] = 1
    cluster.plan({"a": 1, "b": 1})
    for _ in range(60):
        cluster.reconcile()
        assert cluster.serving() >= 2
        cluster.tick(patience=0.4)
        cluster.capacity["a"] = 1
    cluster.settle()
    cluster.assert_follows_plan()


def test_pods_that_cannot_be_placed_are_replaced_by_the_old_making_room() -> None:
    """Free devices by count, but fragmented: the new pod stays Pending, so one surplus replica makes way."""
    cluster = Cluster({"a": 2, "b": 0}, random.Random(3))
    cluster.add({"a": 2})
    cluster.settle()
    cluster.services["chat"] = cluster.services["chat"]
    cluster.desired["chat"] = PlannedService(
        plan_id="tp", plan=service_plan("chat", {"a-tp2": 1}, {"a-tp2": 2}).model_copy(update={"variants": _tp2()})
    )
    for _ in range(200):
        cluster.reconcile()
        cluster.tick()
    assert cluster.serving_by_variant() == {"a-tp2": 1}
    assert cluster.condition("Ready")[0] == "True"


def _tp2() -> list[PlannedVariant]:
    return [
        PlannedVariant(
            name="a-tp2", gpu_type="a", tensor_parallel=2, replicas=1, cost_per_replica_hour=2.0, latency=LATENCY
        )
    ]


def test_events_are_emitted_only_on_transitions() -> None:
    cluster = roomy(random.Random(4))
    cluster.add({"a": 2})
    cluster.settle()
    reasons = [event.reason for event in cluster.events]
    assert reasons[0] == "PlanFound"
    assert reasons[-1] == "EnginesReady"
    assert len(reasons) == len([r for i, r in enumerate(reasons) if i == 0 or reasons[i - 1] != r])
    count = len(cluster.events)
    for _ in range(10):
        cluster.tick()
        cluster.reconcile()
    assert len(cluster.events) == count


def test_a_service_under_deletion_is_left_to_garbage_collection() -> None:
    cluster = roomy(random.Random(5))
    cluster.add({"a": 1})
    metadata = cluster.services["chat"].metadata.model_copy(update={"deletion_timestamp": START})
    cluster.services["chat"] = cluster.services["chat"].model_copy(update={"metadata": metadata})
    assert cluster.reconcile() == ()


def test_variants_are_told_apart_by_their_labels() -> None:
    cluster = roomy(random.Random(6))
    cluster.add({"a": 1, "b": 1})
    cluster.settle()
    for variant in cluster.table().variants:
        assert variant.selector[LABEL_VARIANT] == variant.name
        matching = [p for p in cluster.pods.values() if variant.selector.items() <= p["metadata"]["labels"].items()]
        assert len(matching) == 1
