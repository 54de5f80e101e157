"""What services share beside devices: no plan goes over it, who goes short is decided by priority, and it is said."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, Plan
from llmfleet.placement import PlanInputs, plan, violations
from placement_testing.fleets import fleet, gpu_type, rates_profile, replicas, service, small_fleets

pure = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def with_policy(inputs: PlanInputs, **changes: Any) -> PlanInputs:
    return inputs.model_copy(update={"policy": FleetPolicySpec.model_validate({**dict(inputs.policy), **changes})})


def two_priorities(**policy: Any) -> PlanInputs:
    """Each service needs two small replicas of 1 per hour; `big` does twice as much for 3."""
    return fleet(
        [service("gold", priority=200), service("basic", priority=50)],
        [rates_profile({"small": [1, 1], "big": [2, 2]})],
        [gpu_type("small", 1.0), gpu_type("big", 3.0)],
        inventory={"small": 9, "big": 9},
        demand={"gold": [2, 0], "basic": [2, 0]},
        **policy,
    )


def shortage(inputs: PlanInputs, decided: Plan) -> list[float]:
    """By priority, highest first: unserved requests per second, and replicas missing to the minimum."""
    services = {one.key: one for one in inputs.services}
    rank: list[float] = []
    for level in sorted({one.spec.priority for one in inputs.services}, reverse=True):
        members = [one for one in decided.services if services[one.key].spec.priority == level]
        rank.append(round(sum(one.unserved_rps for one in members), 3))
        least = [services[one.key].spec.replicas.min - sum(one.replicas.values()) for one in members]
        rank.append(sum(max(0, missing) for missing in least))
    return rank


def test_a_lowered_budget_shrinks_the_fleet_by_priority_lowest_first() -> None:
    ample, warm = plan(two_priorities(), None)
    assert ample.cost_per_hour == 4
    found = []
    for budget in (4.0, 3.9, 2.0, 1.5, 0.5):
        decided, warm = plan(two_priorities(budget_per_hour=budget), ample, warm)
        found.append([sum(replicas(decided, name).values()) for name in ("gold", "basic")])
        assert decided.cost_per_hour <= budget
    assert found == [[2, 2], [2, 1], [2, 0], [1, 0], [0, 0]]


def test_a_plan_over_the_budget_is_found_by_the_check() -> None:
    decided, _ = plan(two_priorities(), None)
    (broken,) = violations(two_priorities(budget_per_hour=3.0), decided)
    assert str(broken) == "budget of fleet: 4, allowed is at most 3 beside 0 kept"


def test_what_a_refused_service_goes_on_costing_is_taken_off_the_budget() -> None:
    inputs = two_priorities(budget_per_hour=4.0)
    first, _ = plan(inputs, None)
    gone = inputs.model_copy(update={"services": [inputs.services[1]], "unreadable": ["team/gold"]})
    second, _ = plan(with_policy(gone, budget_per_hour=3.0), first)
    assert replicas(second, "basic") == {"small": 1}
    third, _ = plan(with_policy(gone, budget_per_hour=1.0), second)
    assert replicas(third, "basic") == {}
    assert third.kept == first.services[1:]
    assert violations(with_policy(gone, budget_per_hour=1.0), third, second) == []


def test_a_shortage_names_the_budget_and_the_budget_that_would_help_does() -> None:
    decided, _ = plan(two_priorities(budget_per_hour=3.0), None)
    short = decided.service("team/basic")
    assert short is not None
    assert short.binding == ["budgetPerHour of FleetPolicy default"]
    assert short.shortfall is not None
    helps = re.search(r"budgetPerHour of FleetPolicy default of (\S+) instead of 3\b", short.shortfall)
    assert helps is not None, short.shortfall
    helped, _ = plan(two_priorities(budget_per_hour=float(helps[1])), None)
    assert helped.status == "optimal"
    assert [one.shortfall for one in helped.services] == [None, None]


def test_devices_that_cost_nothing_take_nothing_of_a_budget() -> None:
    inputs = two_priorities(budget_per_hour=0.5)
    free = inputs.model_copy(update={"gpu_types": [gpu_type("small", 0.0), gpu_type("big", 3.0)]})
    decided, _ = plan(free, None)
    assert decided.cost_per_hour == 0
    assert decided.status == "optimal"


@pure
@given(small_fleets(), st.sampled_from([0.5, 2.0, 6.0]), st.sampled_from([0.5, 3.0]))
def test_more_budget_never_leaves_more_demand_unserved_by_priority(
    inputs: PlanInputs, budget: float, more: float
) -> None:
    before, _ = plan(with_policy(inputs, budget_per_hour=budget), None)
    after, _ = plan(with_policy(inputs, budget_per_hour=budget + more), None)
    assert before.stopped_by == after.stopped_by == "gap"
    assert before.cost_per_hour <= budget * (1 + 1e-6)
    assert shortage(inputs, after) <= shortage(inputs, before)


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_no_amount_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"budget_?[pP]er_?[hH]our"):
        FleetPolicySpec.model_validate({"budget_per_hour": budget})
