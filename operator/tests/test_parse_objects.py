"""Kubernetes JSON as the API server gives it, whole or with parts missing."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import pytest

from llmfleet.operator.parse import (
    EPOCH,
    configmap_from_object,
    deployment_from_object,
    foreign_use_from_object,
    is_engine,
    node_from_object,
    pod_from_object,
    timestamp,
)
from llmfleet.operator.quantity import quantity

LABELS = {
    "llmfleet.io/component": "engine",
    "llmfleet.io/service": "chat",
    "llmfleet.io/variant": "l4-tp2",
    "llmfleet.io/gpu-type": "l4",
    "llmfleet.io/tensor-parallel": "2",
}


def pod(status: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "p",
            "namespace": "ns",
            "uid": "u",
            "labels": LABELS,
            "creationTimestamp": "2026-01-01T00:00:00Z",
            **metadata,
        },
        "spec": {
            "nodeName": "n1",
            "containers": [
                {"name": "sidecar"},
                {"name": "engine", "resources": {"limits": {"cpu": "4", "nvidia.com/gpu": "2"}}},
            ],
        },
        "status": status or {},
    }


def container(state: dict[str, Any], last: dict[str, Any] | None = None, restarts: int = 0) -> dict[str, Any]:
    engine = {"name": "engine", "state": state, "lastState": last or {}, "restartCount": restarts}
    return {"phase": "Running", "containerStatuses": [{"name": "sidecar"}, engine]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", Fraction(4)),
        (4, Fraction(4)),
        ("500m", Fraction(1, 2)),
        ("1.5", Fraction(3, 2)),
        ("2Gi", Fraction(2 * 1024**3)),
        ("2G", Fraction(2 * 1000**3)),
        ("1e3", Fraction(1000)),
        ("1E", Fraction(1000**6)),
        ("12Ki", Fraction(12 * 1024)),
    ],
)
def test_quantities_are_read_as_kubernetes_means_them(text: str | int, value: Fraction) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "lots", "1 Gi", "1gi", "Gi", "1e", "--1"])
def test_what_is_no_quantity_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity; accepted are for example 500m"):
        quantity(text)


def test_times_are_aware_and_fall_back_to_the_epoch() -> None:
    assert timestamp("2026-01-01T02:00:00+02:00") == datetime(2026, 1, 1, tzinfo=UTC)
    assert timestamp("2026-01-01T00:00:00Z").tzinfo is UTC
    assert timestamp(None) == timestamp("yesterday") == EPOCH


def test_a_serving_pod() -> None:
    seen = pod_from_object(pod({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}))
    assert (seen.key, seen.variant, seen.gpu_type) == ("ns/chat", "l4-tp2", "l4")
    assert (seen.resource_name, seen.devices) == ("nvidia.com/gpu", 2)
    assert seen.scheduled
    assert seen.serving
    assert not seen.finished


def test_a_pod_that_drains_or_terminates_does_not_serve() -> None:
    ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
    marks = {"llmfleet.io/draining": "true", "controller.kubernetes.io/pod-deletion-cost": "-1000"}
    draining = pod_from_object(pod(ready, annotations=marks))
    assert draining.draining
    assert draining.deletion_cost == -1000
    assert not draining.serving
    assert not pod_from_object(pod(ready, deletionTimestamp="2026-01-01T00:00:00Z")).serving


def test_a_crashing_engine_is_known_by_its_last_words() -> None:
    waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}}
    last = {"terminated": {"exitCode": 1, "reason": "Error", "message": "x" * 5000 + "OSError: gated repo\n"}}
    seen = pod_from_object(pod(container(waiting, last, restarts=4)))
    assert seen.waiting_reason == "CrashLoopBackOff"
    assert seen.restarts == 4
    assert seen.message.endswith("OSError: gated repo")
    assert len(seen.message) <= 1500


def test_a_pod_whose_image_is_missing_says_so_even_after_a_crash() -> None:
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "not found: vllm:nope"}}
    seen = pod_from_object(pod(container(waiting, {"terminated": {"message": "older trouble"}})))
    assert seen.message == "not found: vllm:nope"


def test_an_unscheduled_pod_says_why() -> None:
    obj = pod({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}]})
    del obj["spec"]["nodeName"]
    seen = pod_from_object(obj)
    assert not seen.scheduled
    assert seen.message == "0/3 nodes"


def test_objects_with_nothing_but_a_name_are_read() -> None:
    bare = {"metadata": {"name": "x", "namespace": "ns"}}
    assert not pod_from_object(bare).ready
    assert pod_from_object(bare).created_at == EPOCH
    assert deployment_from_object(bare).replicas == 1
    assert configmap_from_object(bare).data == {}
    assert not node_from_object({"metadata": {"name": "n"}}).ready
    assert not is_engine(bare)


def test_a_deployments_strategy_failure_and_progress_are_read() -> None:
    obj = {
        "metadata": {"name": "d", "namespace": "ns", "labels": LABELS, "generation": 3},
        "spec": {"replicas": 0, "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}},
        "status": {
            "observedGeneration": 2,
            "conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}],
        },
    }
    seen = deployment_from_object(obj)
    assert seen.replicas == 0
    assert seen.tensor_parallel == 2
    assert not seen.surge
    assert seen.failure == "exceeded quota"
    assert seen.rolling, "the controller has not seen the newest generation"


def test_a_nodes_extended_resources_are_whole_and_its_own_resources_are_left_out() -> None:
    seen = node_from_object(
        {
            "metadata": {"name": "n", "labels": {"a": "b"}},
            "spec": {"unschedulable": True, "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {
                "conditions": [{"type": "Ready", "status": "True"}],
                "allocatable": {"cpu": "4", "memory": "8Gi", "nvidia.com/gpu": "8", "example.com/odd": "what"},
            },
        }
    )
    assert seen.ready
    assert not seen.schedulable
    assert seen.allocatable == {"nvidia.com/gpu": 8}


def test_what_others_hold_is_counted_as_the_scheduler_does() -> None:
    def uses(amount: int, **fields: Any) -> dict[str, Any]:
        return {"resources": {"requests": {"nvidia.com/gpu": str(amount), "cpu": "1"}}, **fields}

    foreign = {
        "metadata": {"name": "train", "namespace": "ml"},
        "spec": {
            "nodeName": "n1",
            "containers": [uses(1), uses(2)],
            "initContainers": [uses(1, restartPolicy="Always"), uses(5)],
        },
        "status": {"phase": "Running"},
    }
    seen = foreign_use_from_object(foreign)
    assert seen is not None
    assert (seen.node, seen.requests) == ("n1", {"nvidia.com/gpu": 5})
    foreign["spec"]["initContainers"].pop()  # type: ignore[index]
    seen = foreign_use_from_object(foreign)
    assert seen is not None
    assert seen.requests == {"nvidia.com/gpu": 4}
    assert foreign_use_from_object({**foreign, "status": {"phase": "Succeeded"}}) is None
    assert foreign_use_from_object({**foreign, "spec": {**foreign["spec"], "nodeName": ""}}) is None  # type: ignore[dict-item]
    assert foreign_use_from_object(pod({"phase": "Running"})) is None
