"""Conditions name the cause and the remedy, keep their transition times, and never claim what is not so."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmfleet.api import (
    Condition,
    FleetPolicySpec,
    GPUType,
    LatencyCoefficients,
    LLMService,
    LLMServiceStatus,
    PlannedVariant,
    Refusal,
    ServicePlan,
)
from llmfleet.api.plan import PoolLoss
from llmfleet.operator.model import (
    Action,
    ApplyConfigMap,
    ApplyDeployment,
    Desired,
    EmitEvent,
    Observed,
    ObservedPod,
    PlannedService,
    WriteStatus,
)
from llmfleet.operator.parse import configmap_from_object, deployment_from_object
from llmfleet.operator.reconcile import reconcile
from llmfleet.operator.status import download_failure

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATENCY = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=1, tpot_base_ms=1, tpot_ms_per_running=1)
L4 = GPUType.parse(
    {
        "metadata": {"name": "l4"},
        "spec": {"resourceName": "nvidia.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": 1}},
    }
)


def llm_service(generation: int = 1, **spec: Any) -> LLMService:
    body = {
        "model": {"name": "org/model", "contextLength": 4096},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        **spec,
    }
    metadata = {"name": "chat", "namespace": "ns", "uid": "u", "generation": generation}
    return LLMService.parse({"metadata": metadata, "spec": body})


def plan(replicas: int = 2, generation: int = 0, **fields: Any) -> PlannedService:
    variant = PlannedVariant(
        name="l4", gpu_type="l4", tensor_parallel=1, replicas=replicas, cost_per_replica_hour=1, latency=LATENCY
    )
    service = ServicePlan(
        namespace="ns",
        service="chat",
        buckets={"inputTokens": [1], "outputTokens": [1]},
        variants=[variant] if replicas else [],
        routes=[],
        demand=[1],
        **{"unserved_rps": 0, "cost_per_hour": replicas, **fields},
    )
    return PlannedService(plan_id="p1", plan=service, generation=generation)


def observed(service: LLMService | None = None, **fields: Any) -> Observed:
    defaults: dict[str, Any] = {
        "deployments": (),
        "pods": (),
        "routing": None,
        "gpu_types": {"l4": L4},
        "free_devices": {"l4": 8},
        "unfit_nodes": frozenset(),
        "policy": FleetPolicySpec(),
        "now": NOW,
    }
    return Observed(service=service or llm_service(), **{**defaults, **fields})


def carried_out(desired: Desired, before: Observed) -> tuple[Observed, list[Action]]:
    """The state after one round, as far as this service's own objects go."""
    actions = list(reconcile(desired, before))
    after = before
    for action in actions:
        match action:
            case ApplyDeployment(manifest):
                status = {"observedGeneration": 0, "replicas": 2, "updatedReplicas": 2}
                seen = deployment_from_object({**manifest, "status": status})
                after = replace(after, deployments=(seen,))
            case ApplyConfigMap(manifest):
                after = replace(after, routing=configmap_from_object(manifest))
            case WriteStatus(_, _, status):
                after = replace(after, service=after.service.model_copy(update={"status": status}))
    return after, actions


def running(pods: list[dict[str, Any]], desired: Desired = None, service: LLMService | None = None) -> LLMServiceStatus:
    """The status once the plan is applied and these pods of it are there."""
    state, _ = carried_out(desired or plan(), observed(service))
    state = replace(state, pods=[pod(state, f"p{i}", **fields) for i, fields in enumerate(pods)])
    state, _ = carried_out(desired or plan(), state)
    return state.service.status


def pod(state: Observed, name: str, **fields: Any) -> ObservedPod:
    defaults: dict[str, Any] = {
        "template_hash": state.deployments[0].input_hash,
        "scheduled": True,
        "ready": False,
        "phase": "Running",
        "created_at": NOW,
        "devices": 1,
    }
    return ObservedPod(
        namespace="ns", name=name, uid=name, service="chat", variant="l4", gpu_type="l4", **{**defaults, **fields}
    )


def condition(status: LLMServiceStatus, kind: str) -> Condition:
    return next(c for c in status.conditions if c.type == kind)


def summary(status: LLMServiceStatus) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in status.conditions}


UP = {"ready": True}
CRASHED = {"waiting_reason": "CrashLoopBackOff", "restarts": 3}


def test_ready_needs_every_planned_replica_on_the_current_template() -> None:
    status = running([UP, UP])
    assert summary(status) == {
        "Planned": ("True", "PlanFound"),
        "EnginesReady": ("True", "EnginesReady"),
        "Ready": ("True", "Ready"),
    }
    assert status.replicas == "l4 2/2"
    assert (status.cost_per_hour, status.plan_id) == (2, "p1")


@pytest.mark.parametrize(
    ("second", "reason", "words"),
    [
        ({}, "EnginesStarting", "1 of 2 ready"),
        ({"scheduled": False, "phase": "Pending", "message": "0/3 nodes are available"}, "EnginePending", "0/3 nodes"),
        ({"waiting_reason": "ImagePullBackOff", "message": "no such image"}, "ImagePullFailed", "no such image"),
        ({"waiting_reason": "CreateContainerConfigError", "message": "secret hf"}, "EngineConfigFailed", "secret hf"),
        ({**CRASHED, "message": "ValueError: bad backend"}, "EngineCrashLooping", "ValueError: bad backend"),
        ({**CRASHED, "message": "GatedRepoError: 401 Client Error"}, "ModelDownloadFailed", "tokenSecret"),
        ({**UP, "template_hash": "older"}, "RollingOut", "previous template"),
        ({**UP, "terminating": True}, "EnginesStarting", "1 of 2 ready"),
    ],
)
def test_each_way_of_not_being_ready_has_its_reason(second: dict[str, Any], reason: str, words: str) -> None:
    status = running([UP, second])
    assert condition(status, "EnginesReady").status == "False"
    assert condition(status, "EnginesReady").reason == reason
    assert words in condition(status, "EnginesReady").message
    assert summary(status)["Ready"] == ("False", reason)
    assert status.replicas == "l4 1/2"


def test_pods_that_may_not_be_made_say_why() -> None:
    state, _ = carried_out(plan(), observed())
    refused = replace(state.deployments[0], failure="violates PodSecurity restricted")
    state, _ = carried_out(plan(), replace(state, deployments=(refused,)))
    assert condition(state.service.status, "Ready").reason == "PodsRefused"
    assert "PodSecurity" in condition(state.service.status, "Ready").message


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error", "tokenSecret"),
        ("RepositoryNotFoundError: 404 Client Error", "spec.model.name"),
        ("OSError: [Errno 28] No space left on device", "larger claim"),
        ("requests.exceptions.HTTPError: 429 Client Error: Too Many Requests", "cache the weights"),
        ("OSError: We couldn't connect to 'https://huggingface.co'", "network"),
    ],
)
def test_failed_downloads_are_recognised_with_a_remedy(words: str, remedy: str) -> None:
    assert remedy in (download_failure(words) or "")


def test_other_crashes_are_no_failed_downloads() -> None:
    assert download_failure("torch.OutOfMemoryError: CUDA out of memory") is None
    assert download_failure("ValueError: No available memory for the cache blocks") is None


def test_a_shortfall_is_not_planned_and_says_who_is_short() -> None:
    short = plan(shortfall="short by 3 requests per second: raise limit of GPUType l4", unserved_rps=3)
    status = running([UP, UP], short)
    assert summary(status)["Planned"] == ("False", "InsufficientCapacity")
    assert "raise limit" in condition(status, "Ready").message
    assert summary(status)["EnginesReady"] == ("True", "EnginesReady")
    assert status.unserved_requests_per_second == 3


def test_a_shortfall_names_the_limits_in_conflict() -> None:
    short = plan(unserved_rps=1, shortfall="ns/chat is short", conflict=["limit 2 of GPUType l4", "spec.gpuTypes l4"])
    state, _ = carried_out(short, observed())
    assert condition(state.service.status, "Planned").message == (
        "ns/chat is short; limits that cannot all hold while all is served: limit 2 of GPUType l4, spec.gpuTypes l4"
    )


def test_a_refusal_is_told_in_its_own_words() -> None:
    refusal = Refusal(namespace="ns", service="chat", reason="ProfileNotFound", message="ModelProfile p does not exist")
    state, actions = carried_out(refusal, observed())
    assert summary(state.service.status)["Planned"] == ("False", "ProfileNotFound")
    assert summary(state.service.status)["Ready"] == ("False", "ProfileNotFound")
    assert any(isinstance(a, EmitEvent) and (a.type, a.reason) == ("Warning", "ProfileNotFound") for a in actions)
    assert not any(isinstance(a, ApplyDeployment) for a in actions)


def test_an_invalid_overlay_makes_no_deployment_and_touches_no_running_one() -> None:
    broken: dict[str, Any] = {"podOverlay": {"env": [{"name": "VLLM_API_KEY", "value": "k"}]}}
    state, actions = carried_out(plan(), observed(llm_service(**broken)))
    assert summary(state.service.status)["Planned"] == ("False", "InvalidOverlay")
    assert (
        "spec.podOverlay.env[0].name: 'VLLM_API_KEY' is refused" in condition(state.service.status, "Planned").message
    )
    assert not any(isinstance(a, ApplyDeployment) for a in actions)

    good, _ = carried_out(plan(), observed())
    good = replace(good, pods=[pod(good, "p0", **UP), pod(good, "p1", **UP)])
    edited = replace(good, service=llm_service(generation=2, **broken))
    _, actions = carried_out(plan(), edited)
    assert not any(isinstance(a, ApplyDeployment) for a in actions)


def test_invalid_engine_arguments_are_told() -> None:
    state, _ = carried_out(plan(), observed(llm_service(engine={"args": ["--port=1"]})))
    assert summary(state.service.status)["Planned"] == ("False", "InvalidEngineArgs")


def test_before_the_first_plan_conditions_say_so_and_after_a_restart_they_stay() -> None:
    fresh, _ = carried_out(None, observed())
    assert summary(fresh.service.status)["Planned"] == ("False", "Planning")
    state, _ = carried_out(plan(), observed())
    state = replace(state, pods=[pod(state, "p0", **UP), pod(state, "p1", **UP)])
    state, _ = carried_out(plan(), state)
    assert reconcile(None, state) == ()


def test_a_plan_for_an_older_spec_does_not_speak_of_the_newer() -> None:
    status = running([UP, UP], plan(generation=4), llm_service(generation=5))
    assert summary(status)["Ready"] == ("True", "Ready")
    assert {c.type: c.observed_generation for c in status.conditions} == {"Planned": 4, "EnginesReady": 4, "Ready": 4}
    assert status.observed_generation == 4


def test_a_refusal_of_an_older_spec_does_not_speak_of_the_newer() -> None:
    refusal = Refusal(namespace="ns", service="chat", reason="ProfileNotFound", message="no profile", generation=4)
    state, _ = carried_out(refusal, observed(llm_service(generation=5)))
    status = state.service.status
    assert {c.type: c.observed_generation for c in status.conditions} == {"Planned": 4, "EnginesReady": 4, "Ready": 4}
    assert status.observed_generation == 4
    state, _ = carried_out(refusal.model_copy(update={"generation": 5}), state)
    assert {c.observed_generation for c in state.service.status.conditions} == {5}


def test_without_demand_and_engines_a_service_is_ready_to_wake() -> None:
    status = running([], plan(replicas=0))
    assert summary(status)["Ready"] == ("True", "ScaledToZero")


def test_a_service_that_no_request_will_wake_says_what_would() -> None:
    sizes = [{"inputTokens": 1, "outputTokens": 1}]
    expected = llm_service(traffic={"mode": "expected", "requestsPerSecond": 0, "sizes": sizes})
    assert "requestsPerSecond is 0" in condition(running([], plan(replicas=0), expected), "Ready").message
    closed = llm_service(replicas={"max": 0})
    assert "replicas.max is 0" in condition(running([], plan(replicas=0), closed), "Ready").message


def test_without_engines_nothing_is_said_to_be_fine_while_demand_goes_unserved() -> None:
    status = running([], plan(replicas=0, shortfall="the limit is 0", unserved_rps=3))
    assert summary(status)["EnginesReady"] == ("False", "NothingPlanned")
    assert summary(status)["Ready"] == ("False", "InsufficientCapacity")


def test_a_broken_overlay_is_told_before_the_first_request_needs_an_engine() -> None:
    broken: dict[str, Any] = {"podOverlay": {"env": [{"name": "VLLM_API_KEY", "value": "k"}]}}
    for spec, reason in (({"engine": {"args": ["--port=1"]}}, "InvalidEngineArgs"), (broken, "InvalidOverlay")):
        status = running([], plan(replicas=0), llm_service(**spec))
        assert summary(status)["Ready"] == ("False", reason)


def test_transition_times_move_only_with_the_status() -> None:
    state, _ = carried_out(plan(), observed())
    before = condition(state.service.status, "EnginesReady")
    assert (before.status, before.last_transition_time) == ("False", NOW)

    state = replace(state, now=NOW + timedelta(minutes=1), pods=[pod(state, "p0", **CRASHED), pod(state, "p1", **UP)])
    state, _ = carried_out(plan(), state)
    crashing = condition(state.service.status, "EnginesReady")
    assert crashing.reason == "EngineCrashLooping"
    assert crashing.last_transition_time == NOW

    state = replace(state, now=NOW + timedelta(minutes=2), pods=[pod(state, "p0", **UP), pod(state, "p1", **UP)])
    state, actions = carried_out(plan(), state)
    assert condition(state.service.status, "EnginesReady").last_transition_time == NOW + timedelta(minutes=2)
    assert [(a.type, a.reason) for a in actions if isinstance(a, EmitEvent)] == [("Normal", "EnginesReady")]
    assert reconcile(plan(), replace(state, now=NOW + timedelta(minutes=3))) == ()


def test_no_surge_capacity_is_told_only_while_it_matters() -> None:
    state, _ = carried_out(plan(), observed(free_devices={"l4": 0}))
    assert summary(state.service.status)["NoSurgeCapacity"] == ("True", "NoFreeDevices")
    state, _ = carried_out(plan(), replace(state, free_devices={"l4": 2}))
    assert "NoSurgeCapacity" not in summary(state.service.status)


@pytest.mark.parametrize("message", ["Insufficient nvidia.com/gpu", 'persistentvolumeclaim "typo" not found'])
def test_a_pod_that_lacks_only_its_volume_asks_for_nobodys_room(message: str) -> None:
    state, _ = carried_out(plan(), observed())
    pending = {"scheduled": False, "phase": "Pending", "message": message, "created_at": NOW - timedelta(hours=1)}
    state = replace(state, pods=[pod(state, "p0", **UP), pod(state, "p1", **pending)])
    state, _ = carried_out(plan(), state)
    assert summary(state.service.status)["Ready"] == ("False", "EnginePending")
    assert ("NoSurgeCapacity" in summary(state.service.status)) is ("Insufficient" in message)


def test_a_status_stays_within_what_the_api_server_accepts() -> None:
    """A refused status would leave the old one standing, whatever it says."""
    many = [f"limit of GPUType l{number}" for number in range(100)]
    status = running([UP, UP], plan(binding=many, shortfall="short " * 5000, unserved_rps=1))
    assert len(status.binding) == 32
    assert len(condition(status, "Planned").message) == 4096
    assert condition(status, "Planned").message.endswith("...")
    assert LLMServiceStatus.model_validate(status.to_wire()) == status


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, ("True", "DemandAtRisk")),
        ({"unserved_rps": 1}, ("False", "InsufficientCapacity")),
        ({"replicas": 0}, ("False", "InsufficientCapacity")),
    ],
)
def test_demand_that_a_loss_would_leave_unserved_is_planned_and_said_to_be_at_risk(
    fields: dict[str, Any], told: tuple[str, str]
) -> None:
    loss = PoolLoss(gpu_types=["l4-spot"], share=1, routes=[], unserved_rps=2)
    at_risk = plan(**{"losses": [loss], "shortfall": "ns/chat would be short of 2 after the loss of l4-spot", **fields})
    state, _ = carried_out(at_risk, observed(llm_service(replicas={"min": 1})))
    assert summary(state.service.status)["Planned"] == told
    assert "the loss of l4-spot" in condition(state.service.status, "Planned").message
