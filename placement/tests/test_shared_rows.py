"""What services share beside devices: no plan goes over it, who goes short is decided by priority, and it is said."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, Plan, PowerDomain
from llmfleet.placement import PlanInputs, plan, violations
from placement_testing.fleets import fleet, gpu_type, power_domain, rates_profile, replicas, service, small_fleets

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


def racks(*domains: PowerDomain, watts_of_big: float | None = 300.0) -> PlanInputs:
    """`two_priorities` with 100 W for a small device."""
    inputs = two_priorities()
    big: dict[str, Any] = {} if watts_of_big is None else {"watts": {"idle": 50.0, "peak": watts_of_big}}
    types = [gpu_type("small", 1.0, watts={"idle": 10.0, "peak": 100.0}), gpu_type("big", 3.0, **big)]
    return inputs.model_copy(update={"gpu_types": types, "power_domains": list(domains)})


def test_a_power_domain_moves_load_to_types_outside_of_it_and_binds_the_types_inside() -> None:
    assert plan(racks(), None)[0].cost_per_hour == 4
    moved, _ = plan(racks(power_domain(399, "small")), None)
    assert sorted(sum(replicas(moved, name).values()) for name in ("gold", "basic")) == [1, 2]
    assert moved.cost_per_hour == 5
    both, _ = plan(racks(power_domain(399, "small", "big")), None)
    assert replicas(both, "gold") == {"small": 2}
    assert replicas(both, "basic") == {"small": 1}
    short = both.service("team/basic")
    assert short is not None
    assert short.binding == ["budgetWatts of PowerDomain rack"]
    assert "budgetWatts of PowerDomain rack of 400 instead of 399" in (short.shortfall or "")


def test_of_a_rack_and_its_room_both_hold() -> None:
    decided, _ = plan(racks(power_domain(200, "small"), power_domain(500, "small", "big", name="room")), None)
    assert sum(replicas(decided, name).get("small", 0) for name in ("gold", "basic")) == 2
    assert sum(replicas(decided, name).get("big", 0) for name in ("gold", "basic")) == 1
    assert decided.watts == 500


def test_a_plan_over_a_power_domain_is_found_by_the_check() -> None:
    decided, _ = plan(racks(), None)
    (broken,) = violations(racks(power_domain(399, "small")), decided)
    assert str(broken) == "power of PowerDomain rack: 400, allowed is at most 399 beside 0 kept"


def test_engines_of_a_deleted_type_go_on_drawing_the_power_that_their_plan_recorded() -> None:
    first, _ = plan(racks(), None)
    inputs = racks(power_domain(600, "small", "big"))
    gone = inputs.model_copy(
        update={"services": [inputs.services[1]], "unreadable": ["team/gold"], "gpu_types": [inputs.gpu_types[1]]}
    )
    second, _ = plan(gone, first)
    assert replicas(second, "basic") == {"big": 1}
    tighter = gone.model_copy(update={"power_domains": [power_domain(499, "small", "big")]})
    third, _ = plan(tighter, first)
    assert replicas(third, "basic") == {}
    assert violations(tighter, third, first) == []


def test_a_type_of_unknown_power_counts_as_nothing_and_the_plan_says_so() -> None:
    decided, _ = plan(racks(power_domain(100, "small", "big"), watts_of_big=None), None)
    assert decided.status == "optimal"
    assert sum(replicas(decided, name).get("big", 0) for name in ("gold", "basic")) == 2
    said = [warning for one in decided.services for warning in one.warnings]
    assert said == ["GPUType big has no spec.watts: budgetWatts of PowerDomain rack counts big as nothing"] * 2


@pure
@given(small_fleets(), st.sampled_from([100.0, 300.0, 700.0]), st.sampled_from([50.0, 350.0]))
def test_more_power_never_leaves_more_demand_unserved_by_priority(
    inputs: PlanInputs, watts: float, more: float
) -> None:
    tight, wide = (
        inputs.model_copy(update={"power_domains": [power_domain(budget, "small", "big")]})
        for budget in (watts, watts + more)
    )
    before, after = plan(tight, None)[0], plan(wide, None)[0]
    assert before.stopped_by == after.stopped_by == "gap"
    assert (before.watts or 0.0) <= watts
    assert shortage(inputs, after) <= shortage(inputs, before)
