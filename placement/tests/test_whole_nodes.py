"""Pools whose cloud bills whole nodes, as plans show them."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.api import GPUType, Plan
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.explain import explain
from llmfleet.placement.worth import worth_of_more
from placement_testing.fleets import fleet, gpu_type, rates_profile, replicas, service, small_fleets

costly = settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


def by_node(name: str, price: float, size: int, **spec: Any) -> GPUType:
    return gpu_type(name, price, devicesPerNode=size, billing="node", **spec)


def planned(inputs: PlanInputs, previous: Plan | None = None) -> Plan:
    decided, _ = plan(inputs, previous)
    assert violations(inputs, decided, previous) == []
    return decided


def node_bill(inputs: PlanInputs, decided: Plan) -> float:
    """Node by node, counted by hand: the sizes here divide each other."""
    prices = {one.metadata.name: one.spec for one in inputs.gpu_types}
    used: Counter[str] = Counter()
    for part in decided.services:
        for variant in part.variants:
            used[variant.gpu_type] += variant.replicas * variant.devices
    total = 0.0
    for name, devices in used.items():
        size = prices[name].devices_per_node if prices[name].billing == "node" else 1
        assert size is not None
        total += math.ceil(devices / size) * size * prices[name].device_price_per_hour
    return total


def test_a_node_of_eight_is_paid_for_whole_and_a_dearer_device_that_is_billed_alone_is_cheaper() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0], "a100": [3.0, 3.0]})]
    demand = {"s": [3.0, 0.0]}
    inventory = {"h100": 8, "a100": 8}
    alone = fleet(
        [service()], profiles, [gpu_type("h100", 7.0), gpu_type("a100", 8.0)], inventory=inventory, demand=demand
    )
    assert replicas(planned(alone), "s") == {"h100": 1}
    whole = fleet(
        [service()], profiles, [by_node("h100", 7.0, 8), gpu_type("a100", 8.0)], inventory=inventory, demand=demand
    )
    decided = planned(whole)
    assert replicas(decided, "s") == {"a100": 1}
    assert (decided.cost_per_hour, decided.status) == (8.0, "optimal")
    assert decided.bound == pytest.approx(8.0)
    assert decided.nodes is None


def test_the_bill_counts_idle_devices_and_is_proven() -> None:
    inputs = fleet(
        [service()],
        [rates_profile({"h100": [4.0, 4.0]})],
        [by_node("h100", 7.0, 8)],
        inventory={"h100": 16},
        demand={"s": [10.0, 0.0]},
    )
    decided = planned(inputs)
    assert replicas(decided, "s") == {"h100": 3}
    assert decided.cost_per_hour == pytest.approx(56.0)
    assert decided.status == "optimal"
    assert decided.nodes is not None
    (nodes,) = decided.nodes
    assert (nodes.nodes, nodes.idle_devices, nodes.idle_cost_per_hour) == (1, 5, 35.0)
    assert decided.services[0].idle_cost_per_hour == pytest.approx(35.0)


def test_two_services_share_a_node_and_its_bill_in_proportion_to_their_devices() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0]}), rates_profile({"h100": [4.0, 4.0]}, name="q")]
    inputs = fleet(
        [service("a"), service("b", profile="q")],
        profiles,
        [by_node("h100", 6.0, 8)],
        inventory={"h100": 16},
        demand={"a": [10.0, 0.0], "b": [3.0, 0.0]},
    )
    decided = planned(inputs)
    a, b = decided.services
    assert (replicas(decided, "a"), replicas(decided, "b")) == ({"h100": 3}, {"h100": 1})
    assert decided.cost_per_hour == pytest.approx(48.0)
    assert a.cost_per_hour == pytest.approx(36.0)
    assert b.cost_per_hour == pytest.approx(12.0)


def test_what_a_node_has_left_is_free_for_the_next_service() -> None:
    """By the device an l4 is cheaper; beside seven devices of a node that is paid for anyway, the eighth is."""
    profiles = [rates_profile({"h100": [4.0, 4.0]}), rates_profile({"h100": [4.0, 4.0], "l4": [4.0, 4.0]}, name="q")]
    types = [by_node("h100", 6.0, 8), gpu_type("l4", 1.0)]
    inventory = {"h100": 8, "l4": 8}
    beside = fleet(
        [service("a"), service("b", profile="q")],
        profiles,
        types,
        inventory=inventory,
        demand={"a": [28.0, 0.0], "b": [3.0, 0.0]},
    )
    decided = planned(beside)
    assert (replicas(decided, "a"), replicas(decided, "b")) == ({"h100": 7}, {"h100": 1})
    assert decided.cost_per_hour == pytest.approx(48.0)
    full = fleet(
        [service("a"), service("b", profile="q")],
        profiles,
        types,
        inventory=inventory,
        demand={"a": [32.0, 0.0], "b": [3.0, 0.0]},
    )
    assert replicas(planned(full), "b") == {"l4": 1}


def test_a_gap_beside_a_plan_that_stays_in_force_costs_nothing() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0]}), rates_profile({"h100": [4.0, 4.0], "l4": [4.0, 4.0]}, name="q")]
    types = [by_node("h100", 6.0, 8), gpu_type("l4", 1.0)]
    both = [service("a"), service("b", profile="q")]
    demand = {"a": [10.0, 0.0], "b": [3.0, 0.0]}
    first = planned(fleet(both[:1], profiles, types, inventory={"h100": 8, "l4": 8}, demand={"a": [10.0, 0.0]}))
    inputs = fleet(both[1:], profiles, types, inventory={"h100": 8, "l4": 8}, demand={"b": demand["b"]})
    decided = planned(inputs.model_copy(update={"unreadable": ["team/a"]}), first)
    assert replicas(decided, "b") == {"h100": 1}
    assert decided.cost_per_hour == pytest.approx(0.0)
    assert decided.nodes is not None
    assert (decided.nodes[0].nodes, decided.nodes[0].idle_devices) == (1, 4)


def test_a_budget_counts_whole_nodes() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0], "l4": [1.0, 1.0]})]
    types = [by_node("h100", 6.0, 8), gpu_type("l4", 4.0)]
    inputs = fleet(
        [service()], profiles, types, inventory={"h100": 8, "l4": 16}, demand={"s": [13.0, 0.0]}, budget_per_hour=40.0
    )
    decided = planned(inputs)
    # One node costs 48: what 40 buy are ten l4.
    assert replicas(decided, "s") == {"l4": 10}
    assert decided.services[0].unserved_rps == pytest.approx(3.0, abs=1e-3)
    richer = inputs.model_copy(update={"policy": inputs.policy.model_copy(update={"budget_per_hour": 48.0})})
    assert replicas(planned(richer), "s") == {"h100": 4}


def test_one_more_device_of_a_node_that_is_paid_for_is_worth_what_it_saves() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0], "l4": [1.0, 1.0]})]
    types = [by_node("h100", 2.0, 4, limit=2), gpu_type("l4", 3.0)]
    inputs = fleet([service()], profiles, types, inventory={"h100": 8, "l4": 16}, demand={"s": [12.0, 0.0]})
    decided = planned(inputs)
    assert replicas(decided, "s") == {"h100": 2, "l4": 4}
    assert decided.cost_per_hour == pytest.approx(20.0)
    (worth,) = [one for one in worth_of_more(inputs, decided, "team/s") if "device" in one.relaxed]
    assert worth.relaxed == "1 more device of GPUType h100"
    assert worth.cost_per_hour == pytest.approx(-12.0)


def test_other_ways_are_compared_by_what_they_change_of_the_bill() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0]}), rates_profile({"h100": [4.0, 4.0], "l4": [4.0, 4.0]}, name="q")]
    inputs = fleet(
        [service("a"), service("b", profile="q")],
        profiles,
        [by_node("h100", 6.0, 8), gpu_type("l4", 1.0)],
        inventory={"h100": 8, "l4": 8},
        demand={"a": [28.0, 0.0], "b": [3.0, 0.0]},
    )
    decided = planned(inputs)
    b = decided.service("team/b")
    assert b is not None
    assert b.next_best is not None
    assert b.next_best.replicas == {"l4": 1}
    # Without its replica the node costs as much, so one on an l4 adds its own price.
    assert b.next_best.cost_per_hour == pytest.approx(b.cost_per_hour + 1.0)
    said = explain(decided, inputs, "team/b")
    (chosen,) = said.chosen
    assert chosen.cost_per_hour_without == pytest.approx(b.cost_per_hour + 1.0)
    assert [one.gpu_type for one in said.nodes] == ["h100"]


def test_the_checker_counts_nodes_by_itself() -> None:
    inputs = fleet(
        [service()],
        [rates_profile({"h100-tp2": [4.0, 4.0]})],
        [by_node("h100", 7.0, 8)],
        inventory={"h100": 16},
        demand={"s": [10.0, 0.0]},
    )
    decided = planned(inputs)
    assert decided.nodes is not None
    (one,) = decided.nodes
    assert (one.nodes, one.idle_devices) == (1, 2)
    fewer = one.model_copy(update={"nodes": 0, "idle_devices": 0})
    for wrong in (None, [fewer], [one, one.model_copy(update={"gpu_type": "l4"})]):
        found = violations(inputs, decided.model_copy(update={"nodes": wrong}))
        assert "nodes" in {violation.constraint for violation in found}
    (part,) = decided.services
    unshared = part.model_copy(update={"idle_cost_per_hour": None, "cost_per_hour": 42.0})
    cheaper = decided.model_copy(update={"services": [unshared], "cost_per_hour": 42.0})
    assert "cost of idle devices of all services: 0, allowed is 14" in map(str, violations(inputs, cheaper))


def test_after_a_service_has_changed_the_warm_plan_has_the_same_bill() -> None:
    profiles = [rates_profile({"h100": [4.0, 4.0], "l4": [1.0, 1.0]}, name=name) for name in ("p", "q", "r")]
    types = [by_node("h100", 6.0, 4), gpu_type("l4", 2.5)]
    services = [service(name, profile=profile) for name, profile in zip("abc", "pqr", strict=True)]

    def inputs(last: float) -> PlanInputs:
        demand = {"a": [13.0, 2.0], "b": [6.0, 0.0], "c": [last, 0.0]}
        return fleet(
            services,
            profiles,
            types,
            inventory={"h100": 12, "l4": 12},
            demand=demand,
            switching_cost_fraction=0.0,
        )

    first, warm = plan(inputs(3.0), None)
    for last in (7.0, 11.0, 3.0):
        again, warm = plan(inputs(last), first, warm)
        assert violations(inputs(last), again, first) == []
        assert again.cost_per_hour == pytest.approx(planned(inputs(last)).cost_per_hour)
        first = again


def test_a_type_that_is_billed_by_the_node_says_how_large_its_nodes_are() -> None:
    with pytest.raises(ValueError, match="devicesPerNode is required where billing is node"):
        gpu_type("h100", 7.0, billing="node")


@st.composite
def fleets_by_node(draw: st.DrawFn) -> PlanInputs:
    """Small fleets of which a type or both are billed by the node."""
    inputs = draw(small_fleets(most_services=2))
    whole = draw(st.sampled_from([("small",), ("big",), ("small", "big")]))
    types = [
        one.model_copy(
            update={
                "spec": one.spec.model_copy(
                    update={"billing": "node", "devices_per_node": draw(st.sampled_from([2, 4]))}
                )
            }
        )
        if one.metadata.name in whole
        else one
        for one in inputs.gpu_types
    ]
    return inputs.model_copy(update={"gpu_types": types})


@costly
@given(fleets_by_node())
def test_the_bill_is_that_of_whole_nodes_and_never_below_that_of_devices(inputs: PlanInputs) -> None:
    decided = planned(inputs)
    assert decided.cost_per_hour == pytest.approx(node_bill(inputs, decided))
    types = [
        one.model_copy(update={"spec": one.spec.model_copy(update={"billing": "device"})}) for one in inputs.gpu_types
    ]
    by_device = planned(inputs.model_copy(update={"gpu_types": types}))
    if sum(part.unserved_rps for part in decided.services) == sum(part.unserved_rps for part in by_device.services):
        assert decided.cost_per_hour >= by_device.cost_per_hour - 1e-6
    if inputs.policy.budget_per_hour is not None:
        assert decided.cost_per_hour <= inputs.policy.budget_per_hour + 1e-6
    assert decided.bound is not None
    assert decided.bound <= decided.cost_per_hour + 1e-3


@costly
@given(fleets_by_node())
def test_a_plan_in_force_stays(inputs: PlanInputs) -> None:
    first = planned(inputs)
    again = planned(inputs, first)
    assert [part.replicas for part in again.services] == [part.replicas for part in first.services]
