"""The cache: what overtakes what, and what is kept of an object."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, LLMService
from llmfleet.operator.cache import Cache, Value, observe
from llmfleet.operator.invalid import InvalidObject

Json = dict[str, Any]
ENGINE_LABELS = {
    "llmfleet.io/component": "engine",
    "llmfleet.io/service": "chat",
    "llmfleet.io/variant": "l4",
    "llmfleet.io/gpu-type": "l4",
}


def pod(name: str, uid: str, version: int, *, node: str = "n", devices: int = 1, ours: bool = True) -> Json:
    limits = {"example.com/gpu": str(devices)} if devices else {}
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": uid,
            "resourceVersion": str(version),
            "labels": ENGINE_LABELS if ours else {},
        },
        "spec": {"nodeName": node, "containers": [{"name": "engine", "resources": {"limits": limits}}]},
        "status": {"phase": "Running"},
    }


def llm_service(version: int = 1, *, generation: int = 1, **changes: Any) -> Json:
    return {
        "apiVersion": "llmfleet.io/v1alpha1",
        "kind": "LLMService",
        "metadata": {
            "name": "chat",
            "namespace": "team",
            "uid": "u",
            "resourceVersion": str(version),
            "generation": generation,
        },
        "spec": {
            "model": {"name": "org/model", "contextLength": 4096},
            "profile": "tiny",
            "objective": {"ttft": {"milliseconds": 1000}, "tpot": {"milliseconds": 50}},
            **changes,
        },
    }


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_an_engine_pod_is_found_under_its_service(cache: Cache) -> None:
    assert cache.apply(observe("Pod", pod("p", "u", 5)))
    assert cache.pods["team/chat"]["p"].devices == 1
    assert cache.knows("Pod", "team/p", "u", 5)


def test_an_older_observation_changes_nothing(cache: Cache) -> None:
    cache.apply(observe("Pod", pod("p", "u", 7, node="new")))
    assert not cache.apply(observe("Pod", pod("p", "u", 5, node="old")))
    assert cache.pods["team/chat"]["p"].node == "new"


def test_a_deletion_counts_only_for_the_object_that_it_names(cache: Cache) -> None:
    cache.apply(observe("Pod", pod("p", "second", 9)))
    assert not cache.apply(observe("Pod", pod("p", "first", 8), deleted=True))
    assert "p" in cache.pods["team/chat"]
    assert cache.apply(observe("Pod", pod("p", "second", 10), deleted=True))
    assert "team/chat" not in cache.pods


def test_a_deleted_object_does_not_come_back_from_a_list_that_was_read_before(cache: Cache) -> None:
    cache.apply(observe("Pod", pod("p", "u", 5)))
    cache.apply(observe("Pod", pod("p", "u", 6), deleted=True))
    assert not cache.apply(observe("Pod", pod("p", "u", 5)))
    assert not cache.pods


def test_what_a_list_does_not_hold_is_dropped_unless_it_came_since(cache: Cache) -> None:
    cache.apply(observe("Pod", pod("vanished", "v", 1)))
    cache.apply(observe("Pod", pod("stays", "s", 2)))
    before = cache.snapshot("Pod")
    cache.apply(observe("Pod", pod("newcomer", "n", 3)))

    assert cache.retain("Pod", before, ["s"]) == 1
    assert set(cache.pods["team/chat"]) == {"stays", "newcomer"}


def test_of_a_pod_of_others_only_its_devices_are_kept(cache: Cache) -> None:
    assert not cache.apply(observe("Pod", pod("web", "w", 1, devices=0, ours=False)))
    assert cache.snapshot("Pod") == {}
    cache.apply(observe("Pod", pod("training", "t", 2, devices=3, ours=False)))
    assert cache.foreign["team/training"].requests == {"example.com/gpu": 3}
    assert cache.newest("Pod") == 2


def test_a_pod_of_others_that_finishes_frees_its_devices_and_a_stale_list_does_not_take_them_again(
    cache: Cache,
) -> None:
    running = pod("training", "t", 2, ours=False)
    finished = pod("training", "t", 3, ours=False) | {"status": {"phase": "Succeeded"}}
    cache.apply(observe("Pod", running))
    assert cache.apply(observe("Pod", finished))
    assert not cache.apply(observe("Pod", running))
    assert not cache.foreign


def test_a_pod_that_is_relabelled_leaves_its_old_service(cache: Cache) -> None:
    moved = pod("p", "u", 6)
    moved["metadata"]["labels"] = ENGINE_LABELS | {"llmfleet.io/service": "other"}
    cache.apply(observe("Pod", pod("p", "u", 5)))
    cache.apply(observe("Pod", moved))
    assert "team/chat" not in cache.pods
    assert "p" in cache.pods["team/other"]


def test_an_object_that_does_not_parse_is_kept_apart_and_says_what_is_wrong(cache: Cache) -> None:
    cache.apply(observe("LLMService", llm_service(1)))
    cache.apply(observe("LLMService", llm_service(2, priority=5000)))
    assert not cache.services
    invalid = cache.invalid["LLMService", "team/chat"]
    assert "LLMService.spec.priority" in invalid.message
    assert "5000" in invalid.message

    cache.apply(observe("LLMService", llm_service(3, priority=500)))
    assert cache.services["team/chat"].spec.priority == 500
    assert not cache.invalid


def test_a_status_of_another_version_is_no_reason_to_refuse_a_spec() -> None:
    raw = llm_service() | {"status": {"conditions": "what is this"}}
    assert isinstance(observe("LLMService", raw).value, LLMService)


def test_an_invalid_object_whose_status_says_so_already_counts_as_reported() -> None:
    raw = llm_service(1, generation=4, priority=5000)
    first = observe("LLMService", raw).value
    assert isinstance(first, InvalidObject)
    assert not first.reported
    said = {"type": "Planned", "status": "False", "reason": "InvalidSpec", "message": first.message}
    again = observe("LLMService", raw | {"status": {"conditions": [said | {"observedGeneration": 4}]}}).value
    assert isinstance(again, InvalidObject)
    assert again.reported
    older = observe("LLMService", raw | {"status": {"conditions": [said | {"observedGeneration": 3}]}}).value
    assert isinstance(older, InvalidObject)
    assert not older.reported


def gpu_type(version: int, *, generation: int = 1, uid: str = "u", cost: float = 1.0, **metadata: Any) -> Json:
    meta = {"name": "l4", "uid": uid, "resourceVersion": str(version), "generation": generation, **metadata}
    spec = {"resourceName": "nvidia.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": cost}}
    return {"apiVersion": "llmfleet.io/v1alpha1", "kind": "GPUType", "metadata": meta, "spec": spec}


def test_a_type_that_stops_parsing_stays_in_force_by_its_last_version(cache: Cache) -> None:
    cache.apply(observe("GPUType", gpu_type(1)))
    before = cache.gpu_types["l4"]
    cache.apply(observe("GPUType", gpu_type(2, generation=2, cost=-1.0)))
    assert cache.gpu_types["l4"] == before
    said = cache.invalid["GPUType", "l4"].message
    assert "GPUType.spec.pricePerHour.onDemand" in said
    assert said.endswith("until it parses generation 1, the last that did, stays in force")

    cache.apply(observe("GPUType", gpu_type(3, generation=3, cost=-2.0)))
    assert cache.gpu_types["l4"] == before
    cache.apply(observe("GPUType", gpu_type(4, generation=4, cost=2.0)))
    assert cache.gpu_types["l4"].metadata.generation == 4
    assert not cache.invalid


def test_what_stays_in_force_of_a_type_has_the_status_that_was_written_since(cache: Cache) -> None:
    cache.apply(observe("GPUType", gpu_type(1)))
    broken = gpu_type(2, generation=2, cost=-1.0) | {"status": {"allocatableDevices": 7}}
    cache.apply(observe("GPUType", broken))
    assert cache.gpu_types["l4"].status.allocatable_devices == 7


def test_a_type_that_does_not_parse_is_gone_when_it_is_deleted_or_another_has_its_name(cache: Cache) -> None:
    cache.apply(observe("GPUType", gpu_type(1)))
    cache.apply(observe("GPUType", gpu_type(2, generation=2, cost=-1.0, deletionTimestamp="2026-01-01T00:00:00Z")))
    assert not cache.gpu_types
    cache.apply(observe("GPUType", gpu_type(3), deleted=True))
    cache.apply(observe("GPUType", gpu_type(4, uid="second")))
    cache.apply(observe("GPUType", gpu_type(5, uid="third", cost=-1.0)))
    assert not cache.gpu_types
    assert "it counts as absent" in cache.invalid["GPUType", "l4"].message


def test_a_policy_that_stops_parsing_keeps_its_last_limits_and_may_only_turn_to_shadow(cache: Cache) -> None:
    def policy(version: int, **spec: Any) -> Json:
        meta = {"name": "default", "uid": "u", "resourceVersion": str(version), "generation": version}
        return {"kind": "FleetPolicy", "metadata": meta, "spec": spec}

    cache.apply(observe("FleetPolicy", policy(1, budgetPerHour=30)))
    cache.apply(observe("FleetPolicy", policy(2, budgetPerHour=-30)))
    assert (cache.policy.budget_per_hour, cache.policy.mode) == (30, "apply")
    cache.apply(observe("FleetPolicy", policy(3, budgetPerHour=-30, mode="shadow")))
    assert (cache.policy.budget_per_hour, cache.policy.mode) == (30, "shadow")
    cache.apply(observe("FleetPolicy", policy(4, budgetPerHour=-30)))
    assert (cache.policy.budget_per_hour, cache.policy.mode) == (30, "apply")
    cache.apply(observe("FleetPolicy", policy(4), deleted=True))
    assert (cache.policy.budget_per_hour, cache.policy.mode) == (None, "apply")


def test_only_the_policy_named_default_counts(cache: Cache) -> None:
    def policy(name: str, version: int) -> Json:
        meta = {"name": name, "uid": name, "resourceVersion": str(version)}
        return {"kind": "FleetPolicy", "metadata": meta, "spec": {"utilizationTarget": 0.5}}

    cache.apply(observe("FleetPolicy", policy("another", 1)))
    assert cache.policy == FleetPolicySpec()
    cache.apply(observe("FleetPolicy", policy("default", 2)))
    assert cache.policy.utilization_target == 0.5
    cache.apply(observe("FleetPolicy", policy("default", 3), deleted=True))
    assert cache.policy == FleetPolicySpec()


def test_a_change_is_told_once_with_the_value_before_it(cache: Cache) -> None:
    told: list[tuple[str, Value | None]] = []
    cache.on_change = lambda observation, before: told.append((observation.key, before))
    cache.apply(observe("Pod", pod("p", "u", 5)))
    first = cache.pods["team/chat"]["p"]
    cache.apply(observe("Pod", pod("p", "u", 6)))
    cache.apply(observe("Pod", pod("p", "u", 7, node="other")))
    assert told == [("team/p", None), ("team/p", first)]


def test_nodes_that_are_cordoned_or_not_ready_are_known_as_unfit_while_they_are(cache: Cache) -> None:
    def node(version: int, ready: str = "True", **spec: Any) -> Json:
        meta = {"name": "n", "uid": "n", "resourceVersion": str(version)}
        return {"metadata": meta, "spec": spec, "status": {"conditions": [{"type": "Ready", "status": ready}]}}

    unfit = []
    for raw in (node(1), node(2, unschedulable=True), node(3), node(4, ready="Unknown")):
        cache.apply(observe("Node", raw))
        unfit.append(set(cache.unfit_nodes))
    assert unfit == [set(), {"n"}, set(), {"n"}]
    cache.apply(observe("Node", node(5, ready="Unknown"), deleted=True))
    assert cache.unfit_nodes == set()


@given(st.permutations([("a", 1), ("a", 2), ("a", 4), ("b", 5), ("b", 7)]))
def test_observations_in_any_order_end_in_the_newest_state(order: list[tuple[str, int]]) -> None:
    """Object `a` lives from version 1 and is deleted at 4; `b`, of the same name, lives from 5 on."""
    cache = Cache()
    for uid, version in order:
        deleted = (uid, version) == ("a", 4)
        cache.apply(observe("Pod", pod("p", uid, version, node=f"at-{version}"), deleted=deleted))
    assert cache.pods["team/chat"]["p"].node == "at-7"
