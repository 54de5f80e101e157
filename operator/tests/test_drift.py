"""What others change of a Deployment is told apart from what they add and from what the API server fills in."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, GPUType, LLMService, PlannedVariant, Route, ServicePlan
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.drift import drifts, writers
from llmfleet.operator.model import ApplyDeployment, EmitEvent, Observed, PlannedService
from llmfleet.operator.parse import deployment_from_object
from llmfleet.operator.reconcile import CORRECTION_PAUSE, reconcile

Json = dict[str, Any]
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEYED = {"containers", "env", "ports", "topologySpreadConstraints", "volumeMounts", "volumes"}
GPU = GPUType.parse(
    {
        "metadata": {"name": "l4"},
        "spec": {"resourceName": "nvidia.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": 1}},
    }
)
SERVICE = LLMService.parse(
    {
        "metadata": {"name": "chat", "namespace": "ns", "uid": "s", "generation": 1},
        "spec": {
            "model": {"name": "org/model", "contextLength": 4096},
            "profile": "p",
            "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
            "podOverlay": {
                "env": [{"name": "LOG", "value": "info"}],
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "resources": {"requests": {"memory": "1024Mi"}},
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            },
        },
    }
)
PLAN = PlannedService(
    plan_id="p",
    plan=ServicePlan(
        namespace="ns",
        service="chat",
        buckets={"inputTokens": [512], "outputTokens": [128]},
        variants=[
            PlannedVariant(
                name="l4",
                gpu_type="l4",
                tensor_parallel=1,
                replicas=2,
                cost_per_replica_hour=1.0,
                latency={"ttftBaseMs": 1, "ttftMsPerInputToken": 0.1, "tpotBaseMs": 1, "tpotMsPerRunning": 0.1},
            )
        ],
        routes=[Route(bucket=0, variant="l4", fraction=1.0)],
        demand=[1.0],
        unserved_rps=0,
        cost_per_hour=2.0,
    ),
)


def round_(live: Json | None, now: datetime = NOW) -> tuple[list[Json], list[EmitEvent]]:
    """Manifests and Events of one round of the service whose Deployment is `live`."""
    observed = Observed(
        service=SERVICE,
        deployments=[deployment_from_object(live)] if live is not None else [],
        pods=[],
        routing=None,
        gpu_types={"l4": GPU},
        free_devices={"l4": 8},
        unfit_nodes=frozenset(),
        policy=FleetPolicySpec(),
        now=now,
    )
    actions = reconcile(PLAN, observed)
    events = [action for action in actions if isinstance(action, EmitEvent) and action.reason == "DriftCorrected"]
    return [action.manifest for action in actions if isinstance(action, ApplyDeployment)], events


def as_served(manifest: Json) -> Json:
    """A manifest as the API server has it after an apply a minute ago: with defaults, and canonical quantities."""
    live: Json = copy.deepcopy(manifest)
    live["metadata"] |= {
        "uid": "d",
        "resourceVersion": "5",
        "managedFields": [
            {"manager": "llmfleet-operator", "operation": "Apply", "time": "2026-01-01T11:59:00Z"},
            {"manager": "kube-controller-manager", "operation": "Update", "fieldsV1": {"f:status": {}}},
        ],
    }
    pod = live["spec"]["template"]["spec"]
    pod |= {"dnsPolicy": "ClusterFirst", "restartPolicy": "Always"}
    pod["containers"][0]["terminationMessagePath"] = "/dev/termination-log"
    pod["containers"][0]["resources"]["requests"]["memory"] = "1Gi"
    return live


@pytest.fixture
def live() -> Json:
    ((manifest,), _) = round_(None)
    return as_served(manifest)


def edited(live: Json, manager: str = "kubectl-edit") -> Json:
    fields: Json = {"f:spec": {"f:template": {}}}
    entry = {"manager": manager, "operation": "Update", "time": "2026-01-01T11:59:30Z", "fieldsV1": fields}
    live["metadata"]["managedFields"].append(entry)
    return live


def engine(obj: Json) -> Any:
    (container,) = [part for part in obj["spec"]["template"]["spec"]["containers"] if part["name"] == "engine"]
    return container


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if children is None:
        yield path
    else:
        for name, child in children:
            yield from leaves(child, (*path, name))


def test_what_is_live_as_it_was_applied_needs_nothing(live: Json) -> None:
    assert deployment_from_object(live).drift == ()
    assert round_(live) == ([], [])


def test_a_change_of_any_applied_field_is_seen(live: Json) -> None:
    spec = deployment_from_object(live)
    assert spec.recorded
    applied = {**live["spec"], "template": spec.template}
    seen = 0
    for path in leaves(applied):
        if path == ("replicas",):
            continue
        changed: Any = copy.deepcopy(live["spec"])
        at = changed
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = "changed"
        assert len(drifts(applied, changed)) == 1, path
        del at[path[-1]]
        assert drifts(applied, changed), path
        seen += 1
    assert seen > 60


@given(st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_what_others_add_is_theirs(rng: random.Random) -> None:
    ((manifest,), _) = round_(None)

    def add_to(node: Any, field: str) -> None:
        if isinstance(node, dict):
            for name, child in node.items():
                add_to(child, name)
            if rng.random() < 0.5:
                node["added"] = rng.choice(["x", {"y": 1}])
        elif isinstance(node, list):
            for child in node:
                add_to(child, "")
            if field in KEYED and rng.random() < 0.5:
                node.insert(rng.randint(0, len(node)), {"name": "added", "containerPort": 1, "mountPath": "/added"})

    spec = copy.deepcopy(manifest["spec"])
    add_to(spec, "spec")
    assert drifts(manifest["spec"], spec) == ()


def test_an_edited_field_is_set_back_and_an_event_names_it_and_who_did_it(live: Json) -> None:
    before = copy.deepcopy(engine(live))
    engine(live)["image"] = "somebody/else:1"
    engine(live)["args"] = [*engine(live)["args"], "--seed=1"]
    live["spec"]["template"]["spec"]["containers"].append({"name": "sidecar", "image": "proxy"})
    ((manifest,), (event,)) = round_(edited(live))
    assert (engine(manifest)["image"], engine(manifest)["args"]) == (before["image"], before["args"])
    assert [part["name"] for part in manifest["spec"]["template"]["spec"]["containers"]] == ["engine"]
    assert event.type == "Warning"
    assert event.message == (
        "Deployment chat-l4: spec.template.spec.containers[engine].args, spec.template.spec.containers[engine].image "
        "changed by kubectl-edit; set back to what is planned"
    )
    assert round_(as_served(manifest)) == ([], [])


def test_a_field_around_the_template_is_set_back_too(live: Json) -> None:
    live["spec"]["minReadySeconds"] = 900
    ((manifest,), (event,)) = round_(edited(live))
    assert manifest["spec"]["minReadySeconds"] < 900
    assert "spec.minReadySeconds changed" in event.message


def test_somebody_who_changes_it_over_and_over_is_answered_now_and_then(live: Json) -> None:
    engine(live)["image"] = "somebody/else:1"
    applied_at = NOW - timedelta(minutes=1)
    assert round_(live, applied_at + CORRECTION_PAUSE / 2) == ([], [])
    assert round_(live, applied_at + CORRECTION_PAUSE)[0]
    assert round_(live, applied_at - timedelta(minutes=5))[0], "its clock and ours may differ"


def test_replicas_that_somebody_set_go_back_to_the_plan_and_are_told(live: Json) -> None:
    live["spec"]["replicas"] = 1
    ((manifest,), (event,)) = round_(edited(live, "kubectl"))
    assert manifest["spec"]["replicas"] == 2
    assert event.message == "Deployment chat-l4: spec.replicas changed by kubectl; set back to what is planned"


def test_a_deployment_that_does_not_say_what_was_applied_is_applied_once_as_it_is(live: Json) -> None:
    del live["metadata"]["annotations"]["llmfleet.io/applied"]
    engine(live)["image"] = "an/earlier-version:1"
    ((manifest,), events) = round_(live)
    assert engine(manifest)["image"] == "an/earlier-version:1"
    assert events == []
    assert round_(as_served(manifest)) == ([], [])


def test_two_spellings_of_a_quantity_are_one_value_only_where_quantities_are(live: Json) -> None:
    applied = {"resources": {"limits": {"cpu": "0.5"}}, "args": ["0.5"]}
    assert drifts(applied, {"resources": {"limits": {"cpu": "500m"}}, "args": ["0.5"]}) == ()
    assert [d.path for d in drifts(applied, {"resources": {"limits": {"cpu": "501m"}}, "args": ["0.5"]})] == [
        "spec.resources.limits.cpu"
    ]
    assert [d.path for d in drifts(applied, {"resources": {"limits": {"cpu": "0.5"}}, "args": ["500m"]})] == [
        "spec.args"
    ]


def test_what_the_answer_to_an_apply_holds_otherwise_is_no_drift_until_it_changes(live: Json) -> None:
    """A webhook rewrites images, as a registry mirror does."""
    cache = Cache()

    def see(image: str, version: int, *, own: bool = False) -> int:
        engine(live)["image"] = image
        live["metadata"]["resourceVersion"] = str(version)
        cache.apply(observe("Deployment", live, own=own))
        return len(cache.deployments["ns/chat"]["chat-l4"].drift)

    assert see("mirror/engine:1", 5) == 1
    assert see("mirror/engine:1", 6, own=True) == 0
    assert see("mirror/engine:1", 7) == 0
    assert see("somebody/else:1", 8) == 1


def test_an_apply_that_changes_nothing_is_learnt_from_although_its_answer_has_no_newer_version(live: Json) -> None:
    engine(live)["image"] = "mirror/engine:1"
    live["metadata"]["resourceVersion"] = "5"
    cache = Cache()
    changes: list[str] = []
    cache.on_change = lambda observation, _: changes.append(observation.key)
    for own in (False, True, True, False):
        cache.apply(observe("Deployment", live, own=own))
    assert cache.deployments["ns/chat"]["chat-l4"].drift == ()
    assert len(changes) == 2, "what was seen, and that its drift is none"
    live["metadata"]["resourceVersion"] = "4"
    assert not cache.apply(observe("Deployment", live, own=True))


def test_a_difference_that_nobody_made_is_set_right_in_silence_and_a_removal_is_told(live: Json) -> None:
    engine(live)["image"] = "mirror/engine:1"
    manifests, events = round_(live)
    assert manifests
    assert events == []
    del engine(live)["lifecycle"]
    (event,) = round_(live)[1]
    assert event.message.startswith("Deployment chat-l4: spec.template.spec.containers[engine].lifecycle changed; set")


def test_who_wrote_is_read_newest_first_and_status_writers_are_nobody() -> None:
    def entry(manager: str, minute: int, field: str = "f:spec", operation: str = "Update") -> Json:
        return {
            "manager": manager,
            "operation": operation,
            "time": f"2026-01-01T00:{minute:02}:00Z",
            "fieldsV1": {field: {}},
        }

    ours = entry("llmfleet-operator", 3, operation="Apply")
    before = entry("kubectl-patch", 2)
    others = [before, entry("kubectl-edit", 4), entry("kubectl-set", 5), entry("kube-controller", 9, "f:status")]
    assert writers([ours, *others]) == ("2026-01-01T00:03:00Z", ("kubectl-set", "kubectl-edit"))
    assert writers([]) == (None, ())
