"""Explanations: every figure is that of an alternative that could be had."""

from __future__ import annotations

from typing import Any

import pytest

from llmfleet.placement import Explanation, explain, plan
from placement_testing.fleets import fleet, gpu_type, rates_profile, service

TYPES = [
    gpu_type("l4", 1.0),
    gpu_type("a100", 3.0),
    gpu_type("h100", 5.0),
    gpu_type("slow", 0.1),
    gpu_type("tiny", 0.1, memory_gib=8),
    gpu_type("gone", 0.5),
    gpu_type("new", 0.5),
]
RATES = {"l4": [4, 0], "a100": [10, 3], "h100": [20, 8], "slow": [0, 0], "tiny": [1, 1], "gone": [9, 9]}
AMPLE = {"l4": 9, "a100": 9, "h100": 9, "slow": 9, "tiny": 9, "new": 9}


def explained(rates: list[float], inventory: dict[str, int] = AMPLE, **spec: Any) -> Explanation:
    inputs = fleet([service(**spec)], [rates_profile(RATES)], TYPES, inventory=inventory, demand={"s": rates})
    decided, _ = plan(inputs, None)
    return explain(decided, inputs, "team/s")


def test_each_chosen_variant_says_what_it_serves_and_what_its_absence_would_cost() -> None:
    l4 = explained([4, 3]).chosen[1]
    assert (l4.name, l4.replicas, l4.cost_per_hour) == ("l4", 1, 1.0)
    assert l4.served_rps == pytest.approx(4)
    assert l4.utilization == pytest.approx(1.0)
    assert l4.cost_per_hour_without == 5.0
    a100 = explained([8, 3], {"l4": 9, "a100": 9}).chosen[0]
    assert a100.name == "a100"
    assert a100.cost_per_hour_without is None


def test_single_types_are_priced_as_if_devices_were_no_object() -> None:
    found = explained([8, 3], {"l4": 2, "a100": 1, "h100": 0}).single_types
    assert [(s.gpu_type, s.cost_per_hour, s.devices_missing) for s in found] == [
        ("gone", 1.0, 2),
        ("h100", 5.0, 1),
        ("a100", 6.0, 1),
    ]


def test_every_type_that_is_not_used_has_its_reason() -> None:
    found = {rejected.name: rejected for rejected in explained([8, 0]).rejected}
    assert {name: rejected.reason for name, rejected in found.items()} == {
        "a100": "price",
        "gone": "inventory",
        "h100": "price",
        "new": "not_measured",
        "slow": "objective",
        "tiny": "does_not_fit",
    }
    assert found["a100"].cost_per_hour_with == 3.0
    assert found["h100"].cost_per_hour_with == 5.0
    assert "costs 3 per hour, +1 (+50%)" in found["a100"].message
    only = {r.name: r.reason for r in explained([8, 0], gpuTypes=["l4", "moon"]).rejected}
    assert only["a100"] == "not_allowed"
    assert only["moon"] == "unknown"


def test_binding_and_next_best_are_those_of_the_plan() -> None:
    found = explained([8, 0], {"l4": 1, "a100": 1, "h100": 1})
    assert "inventory of GPUType gone" in found.binding
    assert [chosen.name for chosen in found.chosen] == ["a100"]
    assert found.next_best is not None
    assert found.next_best.replicas == {"h100": 1}


def test_a_refused_service_is_explained_by_its_refusal_and_an_unknown_one_is_an_error() -> None:
    inputs = fleet([service(profile="nope")], [rates_profile(RATES)], TYPES, inventory=AMPLE)
    decided, _ = plan(inputs, None)
    found = explain(decided, inputs, "team/s")
    assert found.refusal is not None
    assert found.refusal.reason == "ProfileNotFound"
    with pytest.raises(KeyError, match=r"team/t.*team/s"):
        explain(decided, inputs, "team/t")


def test_an_explanation_of_a_service_without_demand_needs_none() -> None:
    found = explained([0, 0])
    assert found.chosen == []
    assert found.demand_rps == 0
    assert {r.name: r.reason for r in found.rejected}["slow"] == "objective"
    assert Explanation.model_validate_json(found.model_dump_json()) == found
