"""Limits in conflict: what is named cannot hold while the demand is served, and nothing named is superfluous."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings

from llmfleet.api import Plan
from llmfleet.api.fleetpolicy import NamespaceLimit
from llmfleet.placement import PlanInputs, plan
from llmfleet.placement.conflicts import MOST_SERVICES, TIME_S, with_conflicts
from llmfleet.placement.whatif import edited
from placement_testing.fleets import fleet, gpu_type, power_domain, rates_profile, service, small_fleets

RATES = {"l4": [4, 0], "a100": [10, 3]}


def short(
    inventory: dict[str, int], *, limit: int | None = None, budget: float | None = None, **spec: Any
) -> PlanInputs:
    small = {} if limit is None else {"limit": limit}
    types = [
        gpu_type("l4", 1.0, watts={"idle": 20, "peak": 100}, **small),
        gpu_type("a100", 3.0, watts={"idle": 50, "peak": 400}),
    ]
    policy = {} if budget is None else {"budget_per_hour": budget}
    return fleet([service(**spec)], [rates_profile(RATES)], types, inventory=inventory, demand={"s": [20, 0]}, **policy)


def conflict(inputs: PlanInputs, key: str = "team/s") -> list[str]:
    decided, _ = plan(inputs, None)
    planned = with_conflicts(inputs, decided).service(key)
    return [] if planned is None else planned.conflict


def powered(inputs: PlanInputs, watts: float, *gpu_types: str) -> PlanInputs:
    return inputs.model_copy(update={"power_domains": [power_domain(watts, *gpu_types)]})


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (short({"l4": 2, "a100": 1}), ["inventory 1 of GPUType a100", "inventory 2 of GPUType l4"]),
        (short({"l4": 9, "a100": 1}, limit=2), ["inventory 1 of GPUType a100", "limit 2 of GPUType l4"]),
        (short({"l4": 9, "a100": 9}, replicas={"max": 1}), ["spec.replicas.max 1"]),
        (short({"l4": 9, "a100": 9}, budget=2.5), ["budgetPerHour 2.5 of FleetPolicy default"]),
        (short({"l4": 2, "a100": 9}, gpuTypes=["l4"]), ["inventory 2 of GPUType l4", "spec.gpuTypes l4"]),
        # The budget forbids what the devices would allow, and the devices are then no part of it.
        (short({"l4": 2, "a100": 1}, budget=2.5), ["budgetPerHour 2.5 of FleetPolicy default"]),
        # One replica is not enough of l4, and the budget pays for no other.
        (
            short({"l4": 9, "a100": 9}, budget=5.0, replicas={"max": 2}),
            ["budgetPerHour 5 of FleetPolicy default", "spec.replicas.max 2"],
        ),
        (powered(short({"l4": 9, "a100": 9}), 300, "l4", "a100"), ["budgetWatts 300 of PowerDomain rack"]),
        # Either type is enough by itself: the domain forbids one, the list of types the other.
        (
            powered(short({"l4": 9, "a100": 9}, gpuTypes=["l4"]), 300, "l4"),
            ["budgetWatts 300 of PowerDomain rack", "spec.gpuTypes l4"],
        ),
        (
            short({"l4": 4, "a100": 1}, replicas={"maxVariants": 1}),
            ["inventory 1 of GPUType a100", "inventory 4 of GPUType l4", "spec.replicas.maxVariants 1"],
        ),
        (short({"l4": 9, "a100": 9}), []),
    ],
)
def test_the_set_names_what_stands_in_the_way_and_nothing_else(inputs: PlanInputs, named: list[str]) -> None:
    assert conflict(inputs) == named


def test_what_the_others_have_is_said_where_it_counts() -> None:
    inputs = fleet(
        [service("s"), service("first", priority=900, gpuTypes=["l4"])],
        [rates_profile({"l4": [4, 0]})],
        [gpu_type("l4", 1.0)],
        inventory={"l4": 4},
        demand={"s": [8, 0], "first": [12, 0]},
    )
    assert conflict(inputs) == ["inventory 4 of GPUType l4, of which other services have 3"]


def test_replicas_that_are_missing_to_the_minimum_are_a_shortage_too() -> None:
    inputs = short({"l4": 3, "a100": 3}, gpuTypes=["l4"], replicas={"min": 4}).model_copy(update={"demand": {}})
    assert conflict(inputs) == ["inventory 3 of GPUType l4", "spec.gpuTypes l4"]


def test_a_limit_that_leaves_no_replica_at_all_is_named_even_without_demand() -> None:
    inputs = short({"l4": 3, "a100": 1}, limit=0, gpuTypes=["l4"]).model_copy(update={"demand": {}})
    assert conflict(inputs) == ["limit 0 of GPUType l4", "spec.gpuTypes l4"]
    # To allow a type of which there is no device would change nothing.
    assert conflict(edited(inputs, ["inventory:a100=0"])) == ["limit 0 of GPUType l4"]


def test_sizes_that_nothing_serves_are_in_conflict_with_no_limit() -> None:
    inputs = fleet(
        [service()], [rates_profile({"l4": [4, 0]})], [gpu_type("l4", 1.0)], inventory={"l4": 9}, demand={"s": [4, 1]}
    )
    decided, _ = plan(inputs, None)
    assert decided.services[0].shortfall is not None
    assert conflict(inputs) == []


def test_a_plan_carries_the_conflicts_of_its_short_services_and_is_the_same_plan() -> None:
    inputs = short({"l4": 2, "a100": 1})
    decided, _ = plan(inputs, None)
    found = with_conflicts(inputs, decided)
    assert found.services[0].conflict == ["inventory 1 of GPUType a100", "inventory 2 of GPUType l4"]
    assert Plan.model_validate_json(found.model_dump_json(by_alias=True)) == found
    assert found.plan_id == decided.plan_id


class Clock:
    """Stands still for some readings, then is past every deadline."""

    def __init__(self, readings: float = float("inf")) -> None:
        self.readings = readings
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return 0.0 if self.asked <= self.readings else TIME_S + 1


def test_a_set_that_time_cuts_short_is_not_named_wherever_it_is_cut() -> None:
    inputs = short({"l4": 9, "a100": 9}, budget=5.0, replicas={"max": 2})
    decided, _ = plan(inputs, None)
    whole = Clock()
    named = with_conflicts(inputs, decided, clock=whole).services[0].conflict
    assert len(named) == 2
    for readings in range(1, whole.asked):
        cut = with_conflicts(inputs, decided, clock=Clock(readings)).services[0].conflict
        assert cut in ([], named)
    assert with_conflicts(inputs, decided, clock=Clock(1)).services[0].conflict == []


def test_what_is_known_is_not_sought_again_until_something_changed() -> None:
    inputs = short({"l4": 2, "a100": 1})
    decided, _ = plan(inputs, None)
    found = with_conflicts(inputs, decided)
    late = Clock(1)
    assert with_conflicts(inputs, decided, found.services, clock=late) == found
    fewer = edited(inputs, ["inventory:l4=1"])
    changed, _ = plan(fewer, found)
    again = with_conflicts(fewer, changed, found.services).services[0].conflict
    assert again == ["inventory 1 of GPUType a100", "inventory 1 of GPUType l4"]


def test_services_that_no_limit_leaves_short_take_no_turn_from_others() -> None:
    names = [f"vain{i}" for i in range(MOST_SERVICES)]
    inputs = fleet(
        [*(service(name, priority=900) for name in names), service("s")],
        [rates_profile({"l4": [4, 0]})],
        [gpu_type("l4", 1.0)],
        inventory={"l4": MOST_SERVICES},
        demand={"s": [4, 0], **{name: [1, 1] for name in names}},
    )
    decided, _ = plan(inputs, None)
    found = with_conflicts(inputs, decided)
    assert sum(one.shortfall is not None for one in decided.services) == MOST_SERVICES + 1
    assert {one.key: one.conflict for one in found.services if one.conflict} == {
        "team/s": ["inventory 10 of GPUType l4, of which other services have 10"]
    }


CANDIDATES = {
    "small": "GPUType small",
    "big": "GPUType big",
    "budget": "budgetPerHour ",
    "max": "spec.replicas.max ",
    "max_variants": "spec.replicas.maxVariants ",
    "power": "PowerDomain rack",
    "namespace_cost": "namespaceLimits[team].costPerHour ",
    "namespace_small": "namespaceLimits[team].devices.small ",
    "namespace_big": "namespaceLimits[team].devices.big ",
}
"""Limits that the random fleets can have, by the words that name them."""


def of_namespace(limit: NamespaceLimit, lifted: str) -> NamespaceLimit:
    """A namespace's limit without its cost, or without that of a GPU type."""
    if lifted == "cost":
        return limit.model_copy(update={"cost_per_hour": None})
    return limit.model_copy(update={"devices": {k: n for k, n in (limit.devices or {}).items() if k != lifted}})


def without(inputs: PlanInputs, lifted: set[str]) -> PlanInputs:
    """The inputs without these limits."""
    types = lifted & {"small", "big"}
    found = edited(inputs, [edit for name in types for edit in (f"inventory:{name}=1000", f"limit:{name}=none")])
    if "budget" in lifted:
        found = found.model_copy(update={"policy": found.policy.model_copy(update={"budget_per_hour": None})})
    for name in ("cost", "small", "big"):
        if f"namespace_{name}" in lifted:
            limits = [of_namespace(limit, name) for limit in found.policy.namespace_limits]
            found = found.model_copy(update={"policy": found.policy.model_copy(update={"namespace_limits": limits})})
    if "power" in lifted:
        found = found.model_copy(update={"power_domains": []})
    if lifted & {"max", "max_variants"}:
        (only,) = found.services
        bounds = only.spec.replicas.model_copy(update=dict.fromkeys(lifted & {"max", "max_variants"}))
        spec = only.spec.model_copy(update={"replicas": bounds})
        found = found.model_copy(update={"services": [only.model_copy(update={"spec": spec})]})
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(inputs=small_fleets(most_services=1))
def test_with_only_the_named_limits_it_stays_short_and_with_any_one_of_them_lifted_it_does_not(
    inputs: PlanInputs,
) -> None:
    named = conflict(inputs, "team/s0")
    assume(named)

    def served(lifted: set[str]) -> tuple[float, bool]:
        found = plan(without(inputs, lifted), None)[0].services[0]
        return -round(found.unserved_rps, 3), found.shortfall is None

    best = served({*CANDIDATES})
    in_conflict = {limit for limit, words in CANDIDATES.items() if any(words in one for one in named)}
    assert len(in_conflict) == len(named)
    others = {*CANDIDATES} - in_conflict
    assert served(others) < best
    for limit in in_conflict:
        assert served(others | {limit}) == best
