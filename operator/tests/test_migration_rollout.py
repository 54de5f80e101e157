"""New pods get the plug-in at once, existing ones with the next change that reaches them, none by surprise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from llmfleet.api import (
    Buckets,
    FleetPolicySpec,
    GPUType,
    LatencyCoefficients,
    LLMService,
    PlannedVariant,
    Route,
    RoutingTable,
    ServicePlan,
)
from llmfleet.api.meta import ROUTING_KEY
from llmfleet.operator.migration import is_equipped, peer_key_secret
from llmfleet.operator.model import (
    Action,
    ApplyConfigMap,
    ApplyDeployment,
    Finding,
    Observed,
    PlannedService,
    PluginPackage,
    ProvideMigration,
    WriteStatus,
)
from llmfleet.operator.parse import configmap_from_object, deployment_from_object
from llmfleet.operator.reconcile import reconcile

Json = dict[str, Any]
PACKAGE = PluginPackage("llmfleet-engine-0123", b"")
LATENCY = LatencyCoefficients(ttft_base_ms=1, ttft_ms_per_input_token=0.1, tpot_base_ms=1, tpot_ms_per_running=0.1)
PLAN = PlannedService(
    plan_id="plan",
    plan=ServicePlan(
        namespace="ns",
        service="chat",
        buckets=Buckets(input_tokens=[4096], output_tokens=[512]),
        variants=[
            PlannedVariant(
                name="slow", gpu_type="slow", tensor_parallel=1, replicas=2, cost_per_replica_hour=1.0, latency=LATENCY
            )
        ],
        routes=[Route(bucket=0, variant="slow", fraction=1.0)],
        demand=[1.0],
        unserved_rps=0,
        cost_per_hour=2.0,
    ),
)


def llm_service(**engine: Any) -> LLMService:
    spec = {
        "model": {"name": "org/model", "contextLength": 4096},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        "engine": engine,
    }
    return LLMService.parse({"metadata": {"name": "chat", "namespace": "ns", "uid": "0123456789"}, "spec": spec})


def observed(live: Json | None = None, *, plugin: PluginPackage | Finding | None = PACKAGE, **engine: Any) -> Observed:
    kind = {"resourceName": "example.com/slow", "memoryGib": 24, "pricePerHour": {"onDemand": 1}}
    return Observed(
        service=llm_service(**engine),
        deployments=[deployment_from_object(live)] if live is not None else [],
        pods=[],
        routing=None,
        gpu_types={"slow": GPUType.parse({"metadata": {"name": "slow"}, "spec": kind})},
        free_devices={"slow": 8},
        unfit_nodes=frozenset(),
        policy=FleetPolicySpec(),
        now=datetime(2026, 1, 1, tzinfo=UTC),
        plugin=plugin,
    )


def applied(actions: Sequence[Action]) -> Json | None:
    return next((action.manifest for action in actions if isinstance(action, ApplyDeployment)), None)


def named_secret(actions: Sequence[Action]) -> str | None:
    (manifest,) = [action.manifest for action in actions if isinstance(action, ApplyConfigMap)]
    return RoutingTable.model_validate_json(manifest["data"][ROUTING_KEY]).peer_key_secret


def no_migration(actions: Sequence[Action]) -> tuple[str, str] | None:
    (status,) = [action.status for action in actions if isinstance(action, WriteStatus)]
    return next(((c.reason, c.message) for c in status.conditions if c.type == "NoMigration"), None)


def as_served(manifest: Json) -> Json:
    live = copy.deepcopy(manifest)
    live["metadata"]["uid"] = "d"
    return live


@pytest.fixture
def made_before() -> Json:
    """A Deployment by an operator that knew no plug-in."""
    manifest = applied(reconcile(PLAN, observed(plugin=None)))
    assert manifest is not None
    assert not is_equipped(manifest["spec"]["template"])
    return as_served(manifest)


def test_a_new_services_pods_find_what_they_mount_and_gateways_are_told_of_the_key() -> None:
    actions = reconcile(PLAN, observed())
    assert actions[0] == ProvideMigration(peer_key_secret(llm_service()), PACKAGE)
    manifest = applied(actions)
    assert manifest is not None
    assert is_equipped(manifest["spec"]["template"])
    assert named_secret(actions) == peer_key_secret(llm_service())
    assert no_migration(actions) is None


def test_what_was_provided_is_provided_again_only_after_a_while() -> None:
    manifest = applied(reconcile(PLAN, observed()))
    assert manifest is not None
    seen = observed(as_served(manifest))
    assert any(isinstance(action, ProvideMigration) for action in reconcile(PLAN, seen))
    assert not any(isinstance(a, ProvideMigration) for a in reconcile(PLAN, replace(seen, migration_provided=True)))


def test_an_operator_that_learns_of_the_plug_in_restarts_no_pod_and_says_so(made_before: Json) -> None:
    actions = reconcile(PLAN, observed(made_before))
    assert applied(actions) is None
    assert not any(isinstance(action, ProvideMigration) for action in actions)
    assert named_secret(actions) is None
    reason, message = no_migration(actions) or ("", "")
    assert reason == "TemplateKept"
    assert "slow" in message


def test_the_next_change_of_an_existing_service_brings_it(made_before: Json) -> None:
    actions = reconcile(PLAN, observed(made_before, args=["--seed=1"]))
    manifest = applied(actions)
    assert manifest is not None
    assert is_equipped(manifest["spec"]["template"])
    assert no_migration(actions) is None


def test_off_takes_it_away_again_and_nothing_is_said() -> None:
    manifest = applied(reconcile(PLAN, observed()))
    assert manifest is not None
    actions = reconcile(PLAN, observed(as_served(manifest), migration="off"))
    without = applied(actions)
    assert without is not None
    assert not is_equipped(without["spec"]["template"])
    assert named_secret(actions) is None
    assert no_migration(actions) is None


def test_a_cluster_that_refuses_the_secret_gets_engines_without_it_and_the_reason() -> None:
    actions = reconcile(PLAN, observed(plugin=("NotProvided", "Secret ns/x was refused")))
    manifest = applied(actions)
    assert manifest is not None
    assert not is_equipped(manifest["spec"]["template"])
    assert no_migration(actions) == ("NotProvided", "Secret ns/x was refused")


def test_a_table_that_names_the_key_is_read_back_as_it_is() -> None:
    (manifest,) = [a.manifest for a in reconcile(PLAN, observed()) if isinstance(a, ApplyConfigMap)]
    live = replace(observed(), routing=configmap_from_object(manifest))
    assert not any(isinstance(action, ApplyConfigMap) for action in reconcile(PLAN, live))
