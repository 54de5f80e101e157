"""Devices are counted once, for the fleet only where it may use them, and not where pods wait in vain."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, GPUType, GPUTypeStatus, LatencyCoefficients, PlannedVariant, ServicePlan
from llmfleet.operator.inventory import Inventory, free_devices, observe_inventory, wanted_devices
from llmfleet.operator.model import ForeignUse, ObservedDeployment, ObservedNode, ObservedPod

NOW = datetime(2026, 1, 1, tzinfo=UTC)
POLICY = FleetPolicySpec()
GPU = "nvidia.com/gpu"


def gpu_type(name: str, status: GPUTypeStatus | None = None, **spec: Any) -> GPUType:
    body = {"resourceName": GPU, "memoryGib": 80, "pricePerHour": {"onDemand": 1}, **spec}
    parsed = GPUType.parse({"metadata": {"name": name, "generation": 3}, "spec": body})
    return parsed.model_copy(update={"status": status}) if status is not None else parsed


def node(name: str, devices: int = 8, resource: str = GPU, **fields: Any) -> ObservedNode:
    defaults: dict[str, Any] = {"ready": True, "schedulable": True, "allocatable": {resource: devices}}
    return ObservedNode(name=name, **{**defaults, **fields})


def pod(name: str, *, scheduled: bool = True, age_s: float = 0, kind: str = "l4", **fields: Any) -> ObservedPod:
    defaults: dict[str, Any] = {"devices": 1, "phase": "Running" if scheduled else "Pending"}
    return ObservedPod(
        namespace="ns",
        name=name,
        uid=name,
        service="chat",
        variant=kind,
        gpu_type=kind,
        template_hash="h",
        created_at=NOW - timedelta(seconds=age_s),
        scheduled=scheduled,
        ready=scheduled,
        **{**defaults, **fields},
    )


def deployment(replicas: int, kind: str = "l4", tensor_parallel: int = 1, service: str = "chat") -> ObservedDeployment:
    return ObservedDeployment(
        namespace="ns",
        name=f"{service}-{kind}",
        uid="u",
        service=service,
        variant=kind,
        gpu_type=kind,
        tensor_parallel=tensor_parallel,
        replicas=replicas,
        template={},
        input_hash="h",
    )


def observe(
    *types: GPUType,
    nodes: list[ObservedNode],
    foreign: tuple[ForeignUse, ...] = (),
    pods: tuple[ObservedPod, ...] = (),
    now: datetime = NOW,
) -> Inventory:
    return observe_inventory({t.metadata.name: t for t in types}, nodes, foreign, pods, POLICY, now)


def test_only_ready_schedulable_nodes_with_the_selector_count() -> None:
    labels = {"accelerator": "l4"}
    nodes = [
        node("good", labels=labels),
        node("not-ready", labels=labels, ready=False),
        node("cordoned", labels=labels, schedulable=False),
        node("other"),
        node("other-resource", labels=labels, resource="amd.com/gpu"),
    ]
    seen = observe(gpu_type("l4", nodeSelector=labels), nodes=nodes)
    assert seen.devices == {"l4": 8}
    assert seen.statuses["l4"].allocatable_devices == 8
    assert seen.statuses["l4"].observed_generation == 3


def test_requests_of_others_are_taken_off_but_never_more_than_a_node_has() -> None:
    foreign = (ForeignUse(node="n1", requests={GPU: 3}), ForeignUse(node="n1", requests={GPU: 2}))
    over = ForeignUse(node="n2", requests={GPU: 20})
    seen = observe(gpu_type("l4"), nodes=[node("n1"), node("n2")], foreign=(*foreign, over))
    assert seen.statuses["l4"].foreign_devices == 13
    assert seen.devices["l4"] == 3


def test_a_tainted_node_counts_only_for_types_that_tolerate_it() -> None:
    taint = {"key": "gpu", "value": "l4", "effect": "NoSchedule"}
    soft = {"key": "x", "effect": "PreferNoSchedule"}
    nodes = [node("n", taints=(taint, soft))]
    assert observe(gpu_type("l4"), nodes=nodes).devices["l4"] == 0
    for toleration in (
        {"key": "gpu", "value": "l4"},
        {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"operator": "Exists"},
    ):
        assert observe(gpu_type("l4", tolerations=[toleration]), nodes=nodes).devices["l4"] == 8
    assert observe(gpu_type("l4", podOverlay={"tolerations": [{"operator": "Exists"}]}), nodes=nodes).devices["l4"] == 8
    for toleration in ({"key": "gpu", "value": "h100"}, {"key": "gpu", "value": "l4", "effect": "NoExecute"}):
        assert observe(gpu_type("l4", tolerations=[toleration]), nodes=nodes).devices["l4"] == 0


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=5), st.lists(st.sets(st.sampled_from("abc"))))
def test_no_device_is_counted_for_two_types(selectors: list[set[str]], labelled: list[set[str]]) -> None:
    types = [gpu_type(f"t{i}", nodeSelector=dict.fromkeys(labels, "yes")) for i, labels in enumerate(selectors)]
    nodes = [node(f"n{i}", labels=dict.fromkeys(labels, "yes")) for i, labels in enumerate(labelled)]
    seen = observe(*types, nodes=nodes)
    claimed = [n for n in labelled if any(s <= n for s in selectors)]
    assert sum(seen.devices.values()) == 8 * len(claimed)


def test_the_narrower_type_gets_the_node() -> None:
    broad, narrow = gpu_type("any"), gpu_type("l4", nodeSelector={"accelerator": "l4"})
    seen = observe(broad, narrow, nodes=[node("n1", labels={"accelerator": "l4"}), node("n2", devices=2)])
    assert seen.devices == {"any": 2, "l4": 8}


def test_provisionable_devices_count_and_the_limit_bounds_only_the_status() -> None:
    seen = observe(gpu_type("l4", provisionable={"devices": 4}, limit=10), nodes=[node("n")])
    assert seen.devices["l4"] == 12
    assert seen.statuses["l4"].available_devices == 10


def test_a_pod_pending_beyond_its_deadline_makes_the_capacity_unavailable_for_a_while() -> None:
    kind = gpu_type("l4")
    running = pod("up")
    waiting = pod("waits", scheduled=False, age_s=POLICY.pending_deadline_seconds + 1)
    young = pod("young", scheduled=False, age_s=POLICY.pending_deadline_seconds - 1)
    assert observe(kind, nodes=[node("n")], pods=(running, young)).devices["l4"] == 8

    seen = observe(kind, nodes=[node("n")], pods=(running, waiting))
    until = NOW + timedelta(seconds=POLICY.unavailable_seconds)
    assert seen.devices["l4"] == 1
    assert seen.statuses["l4"].unavailable_until == until
    assert seen.statuses["l4"].available_devices == 1
    assert seen.statuses["l4"].fleet_devices == 2

    after_restart = gpu_type("l4", status=seen.statuses["l4"])
    later = observe(after_restart, nodes=[node("n")], pods=(running,), now=until - timedelta(seconds=1))
    assert later.devices["l4"] == 1
    assert later.statuses["l4"].unavailable_until == until
    over = observe(after_restart, nodes=[node("n")], pods=(running,), now=until)
    assert over.devices["l4"] == 8
    assert over.statuses["l4"].unavailable_until is None


def test_an_autoscaler_gets_its_start_up_time() -> None:
    kind = gpu_type("l4", provisionable={"devices": 4, "startupSeconds": 300})
    for age_s, available in ((POLICY.pending_deadline_seconds + 299, 4), (POLICY.pending_deadline_seconds + 301, 0)):
        assert observe(kind, nodes=[], pods=(pod("p", scheduled=False, age_s=age_s),)).devices["l4"] == available


def test_pods_that_wait_for_a_draining_engine_are_no_evidence() -> None:
    waiting = pod("waits", scheduled=False, age_s=1e6)
    seen = observe(gpu_type("l4"), nodes=[node("n", 1)], pods=(waiting, pod("leaves", terminating=True)))
    assert seen.statuses["l4"].unavailable_until is None


@pytest.mark.parametrize(
    ("message", "evidence"),
    [
        ('0/3 nodes are available: persistentvolumeclaim "typo" not found', False),
        ("0/3 nodes are available: pod has unbound immediate PersistentVolumeClaims", False),
        ("0/1 nodes are available: 1 node(s) had volume node affinity conflict", False),
        ("0/2 nodes: 1 Insufficient nvidia.com/gpu, 1 node(s) had volume node affinity conflict", True),
        ("0/3 nodes are available: 3 Insufficient cpu", True),
        ("", True),
    ],
)
def test_one_services_missing_volume_does_not_close_the_type_to_all(message: str, evidence: bool) -> None:
    waiting = pod("waits", scheduled=False, age_s=1e6, message=message)
    seen = observe(gpu_type("l4"), nodes=[node("n")], pods=(waiting,))
    assert (seen.statuses["l4"].unavailable_until is not None) is evidence


def test_free_devices_count_promises_and_terminating_pods() -> None:
    statuses = {"l4": GPUTypeStatus(available_devices=8), "h100": GPUTypeStatus(available_devices=8)}
    pods = [pod("a"), pod("b", terminating=True), pod("gone", phase="Failed")]
    free = free_devices(statuses, [deployment(1), deployment(3, "h100", 2)], pods)
    assert free == {"l4": 6, "h100": 2}


def test_what_plans_want_beyond_free_and_held_is_wanted() -> None:
    latency = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=1, tpot_base_ms=1, tpot_ms_per_running=1)
    variant = PlannedVariant(
        name="l4", gpu_type="l4", tensor_parallel=2, replicas=3, cost_per_replica_hour=1, latency=latency
    )
    plan = ServicePlan(
        namespace="ns",
        service="chat",
        buckets={"inputTokens": [1], "outputTokens": [1]},
        variants=[variant],
        routes=[],
        demand=[0],
        unserved_rps=0,
        cost_per_hour=1,
    )
    assert wanted_devices([plan], [deployment(1, tensor_parallel=2)], {"l4": 1}) == {"l4": 3}
    assert wanted_devices([plan], [deployment(1, tensor_parallel=2)], {"l4": -2}) == {"l4": 4}
    assert wanted_devices([plan], [deployment(3, tensor_parallel=2)], {}) == {}


def available(seen: Inventory) -> tuple[str, str]:
    (condition,) = seen.statuses["l4"].conditions
    return condition.status, condition.reason


def test_a_type_says_whether_engines_may_be_planned_on_it_and_why_not() -> None:
    late = pod("p", scheduled=False, age_s=3600)
    assert available(observe(gpu_type("l4"), nodes=[node("n")])) == ("True", "DevicesAvailable")
    assert available(observe(gpu_type("l4"), nodes=[])) == ("False", "NoDevices")
    assert available(observe(gpu_type("l4", limit=0), nodes=[node("n")])) == ("False", "NoDevices")
    assert available(observe(gpu_type("l4"), nodes=[node("n")], pods=(late,))) == ("False", "CapacityUnavailable")


def test_a_status_is_the_same_while_nothing_changes_and_keeps_conditions_of_others_in_their_place() -> None:
    first = observe(gpu_type("l4"), nodes=[node("n")]).statuses["l4"]
    accepted = first.conditions[0].model_copy(update={"type": "Accepted", "reason": "Accepted"})
    for conditions in ([*first.conditions, accepted], [accepted, *first.conditions]):
        status = first.model_copy(update={"conditions": conditions})
        known = gpu_type("l4").model_copy(update={"status": status})
        later = NOW + timedelta(hours=1)
        assert observe(known, nodes=[node("n")], now=later).statuses["l4"] == status
        gone = observe(known, nodes=[], now=later).statuses["l4"].conditions
        assert [c.type for c in gone] == [c.type for c in conditions]
        assert next(c for c in gone if c.type == "Available").last_transition_time == later
