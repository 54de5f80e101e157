"""A cluster with objects that do not parse is read as the operator reads it, and says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from e2e.operator.objects import gpu_type, policy, profile, service
from llmfleet.api import FleetPolicy, GPUType, LLMService, ModelProfile, PowerDomain
from llmfleet.api.meta import PLAN_KEY, Resource
from llmfleet.cli.cluster import fleet_in
from llmfleet.operator.last_good import remember
from llmfleet.placement import Demand, PlanInputs, plan

NOW = datetime(2026, 1, 1, tzinfo=UTC)
Json = dict[str, Any]


def stored(*objects: Json) -> dict[type[Resource], list[Json]]:
    """The objects as the API server lists them: by kind, each with its uid and version, but not its kind."""
    kinds = {kind.KIND: kind for kind in (FleetPolicy, GPUType, LLMService, ModelProfile, PowerDomain)}
    found: dict[type[Resource], list[Json]] = {kind: [] for kind in kinds.values()}
    for obj in objects:
        kind = kinds[obj["kind"]]
        meta = {**obj["metadata"], "uid": obj["metadata"]["name"], "resourceVersion": "7", "generation": 2}
        found[kind].append({**obj, "kind": "", "metadata": meta})
    return found


def after_a_good_one(kind: type[Resource], good: Json, now: Json) -> Json:
    """`now`, with what the operator has kept of `good`."""
    before = kind.parse(good | {"metadata": {**good["metadata"], "generation": 1}})
    return now | {"status": {"lastAccepted": remember(before, None)}}


def tables(inputs: Mapping[type[Resource], list[Json]]) -> list[Json]:
    """The routing ConfigMaps of a fleet whose objects all parse."""
    read = fleet_in(inputs, [], NOW).inputs
    devices = PlanInputs(
        services=read.services,
        profiles=read.profiles,
        gpu_types=read.gpu_types,
        inventory={"l4": 8},
        demand={one.key: Demand(rps=[1.0, 0, 0, 0, 0, 0]) for one in read.services},
    )
    decided, _ = plan(devices, None)
    return [{"metadata": {}, "data": {PLAN_KEY: json.dumps(one.to_wire())}} for one in decided.services]


def test_what_stopped_parsing_counts_by_its_last_version_and_a_note_says_which() -> None:
    l4, limits = gpu_type("l4", "example.com/l4", 1.0), policy(budgetPerHour=5)
    live = fleet_in(
        stored(
            after_a_good_one(GPUType, l4, gpu_type("l4", "example.com/l4", -1.0)),
            after_a_good_one(FleetPolicy, limits, policy(budgetPerHour=-5)),
            service("team", "chat", 1.0),
        ),
        [],
        NOW,
    )
    assert [one.spec.device_price_per_hour for one in live.inputs.gpu_types] == [1.0]
    assert live.inputs.policy.budget_per_hour == 5
    assert [note.split(":")[0] for note in live.notes] == ["FleetPolicy default", "GPUType l4"]
    assert all("generation 1, the last that did, stays in force" in note for note in live.notes)


def test_a_service_that_does_not_parse_keeps_its_plan_and_the_others_are_read() -> None:
    common = (gpu_type("l4", "example.com/l4", 1.0), profile("team", {"l4": 10.0}))
    chat = service("team", "chat", 1.0)
    in_force = tables(stored(*common, chat, service("team", "bad", 1.0)))
    live = fleet_in(stored(*common, chat, service("team", "bad", 1.0, priority=5000)), in_force, NOW)
    assert [one.key for one in live.inputs.services] == ["team/chat"]
    assert live.inputs.unreadable == ["team/bad"]
    assert [one.key for one in live.plan.services] == ["team/chat"]
    assert [one.key for one in live.plan.kept] == ["team/bad"]
    assert live.notes[0].startswith("LLMService team/bad: LLMService.spec.priority")


def test_the_nodes_that_a_fleet_takes_are_counted_for_its_explanation() -> None:
    l4 = gpu_type("l4", "example.com/l4", 1.0)
    l4["spec"] |= {"devicesPerNode": 4, "billing": "node"}
    objects = (l4, profile("team", {"l4": 10.0}), service("team", "chat", 1.0), service("team", "more", 1.0))
    live = fleet_in(stored(*objects), tables(stored(*objects)), NOW)
    assert live.plan.nodes is not None
    (one,) = live.plan.nodes
    used = sum(variant.replicas for part in live.plan.services for variant in part.variants)
    assert (one.gpu_type, one.nodes, one.idle_devices) == ("l4", 1, 4 - used)
    assert one.idle_devices > 0
