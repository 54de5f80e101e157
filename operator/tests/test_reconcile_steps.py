"""Single steps of reconcile in a simulated cluster: which engines leave, when load moves, what is said."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from llmfleet.api import FleetPolicySpec, PlannedVariant
from llmfleet.api.meta import LABEL_VARIANT
from llmfleet.operator.model import AnnotatePod, ApplyDeployment, PlannedService
from llmfleet.operator.reconcile import reconcile
from operator_testing.simulated_cluster import LATENCY, START, Cluster, roomy, service_plan


def test_without_room_as_many_engines_at_once_are_replaced_as_the_policy_says() -> None:
    cluster = Cluster({"a": 4}, random.Random(0))
    cluster.add({"a": 4})
    cluster.settle()
    cluster.edit("chat", args=["--enforce-eager"])
    observed = replace(cluster.observe(), policy=FleetPolicySpec(max_unavailable_engines=3))
    applied = [a.manifest for a in reconcile(cluster.desired["chat"], observed) if isinstance(a, ApplyDeployment)]
    strategies = [manifest["spec"]["strategy"]["rollingUpdate"] for manifest in applied]
    assert strategies == [{"maxSurge": 0, "maxUnavailable": 3}]


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
