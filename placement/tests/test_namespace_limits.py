"""`FleetPolicy.spec.namespaceLimits`: what the services of a namespace take together, in money and in devices."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, LLMService, ModelProfile, Plan
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.conflicts import with_conflicts
from llmfleet.placement.worth import worth_of_more
from placement_testing.fleets import fleet, gpu_type, power_domain, rates_profile, service, small_fleets

pure = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
Limit = dict[str, Any]


def limited(inputs: PlanInputs, *limits: Limit) -> PlanInputs:
    policy = FleetPolicySpec.model_validate({**dict(inputs.policy), "namespace_limits": list(limits)})
    return inputs.model_copy(update={"policy": policy})


def two_namespaces(*limits: Limit) -> PlanInputs:
    """`team` has a high and a low priority, `other` one service; each needs two small replicas of 1 per hour, and `big`
    does twice as much for 3."""

    def elsewhere(one: LLMService | ModelProfile) -> Any:
        return one.model_copy(update={"metadata": one.metadata.model_copy(update={"namespace": "other"})})

    profile = rates_profile({"small": [1, 1], "big": [2, 2]})
    inputs = fleet(
        [service("gold", priority=200), service("basic", priority=50), elsewhere(service("basic", priority=1))],
        [profile, elsewhere(profile)],
        [gpu_type("small", 1.0), gpu_type("big", 3.0)],
        inventory={"small": 9, "big": 9},
        demand={"gold": [2, 0], "basic": [2, 0]},
    )
    demand = {**inputs.demand, "other/basic": inputs.demand["team/basic"]}
    return limited(inputs.model_copy(update={"demand": demand}), *limits)


def counts(decided: Plan) -> dict[str, dict[str, int]]:
    return {one.key: one.replicas for one in decided.services}


def test_a_cost_limit_shrinks_its_namespace_by_priority_and_no_other() -> None:
    found = []
    previous, warm = plan(two_namespaces(), None)
    for cost in (4.0, 3.9, 2.0, 0.0):
        inputs = two_namespaces({"namespace": "team", "costPerHour": cost})
        decided, warm = plan(inputs, previous, warm)
        assert violations(inputs, decided, previous) == []
        sums = {key: sum(of.values()) for key, of in counts(decided).items()}
        found.append((sums["team/gold"], sums["team/basic"], sums["other/basic"]))
        previous = decided
    assert found == [(2, 2, 2), (2, 1, 2), (2, 0, 2), (0, 0, 2)]


def test_a_device_limit_moves_its_namespace_to_other_types() -> None:
    inputs = two_namespaces({"namespace": "team", "devices": {"small": 2, "big": 1}})
    decided, _ = plan(inputs, None)
    assert decided.status == "optimal"
    team = [counts(decided)[key] for key in ("team/basic", "team/gold")]
    assert sorted(team, key=str) == [{"big": 1}, {"small": 2}]
    assert counts(decided)["other/basic"] == {"small": 2}


def test_devices_of_wide_replicas_count_each() -> None:
    inputs = fleet(
        [service()],
        [rates_profile({"small-tp2": [1, 1]})],
        [gpu_type("small", 1.0)],
        inventory={"small": 9},
        demand={"s": [3, 0]},
    )
    decided, _ = plan(limited(inputs, {"namespace": "team", "devices": {"small": 5}}), None)
    assert counts(decided)["team/s"] == {"small-tp2": 2}


def test_a_plan_over_a_limit_is_found_by_the_check() -> None:
    decided, _ = plan(two_namespaces(), None)
    over = two_namespaces({"namespace": "team", "costPerHour": 3, "devices": {"small": 3, "big": 0}})
    assert [str(one) for one in violations(over, decided)] == [
        "namespace of cost of namespace team: 4, allowed is at most 3 beside 0 kept",
        "namespace of GPUType small of namespace team: 4, allowed is at most 3 beside 0 kept",
    ]


@pytest.mark.parametrize(
    ("limit", "field", "of"),
    [
        ({"costPerHour": 3}, r"namespaceLimits\[team\]\.costPerHour", "costPerHour"),
        ({"devices": {"small": 3, "big": 0}}, r"namespaceLimits\[team\]\.devices\.small", "devices"),
    ],
)
def test_a_shortage_names_the_limit_and_the_limit_that_would_help_does(limit: Limit, field: str, of: str) -> None:
    inputs = two_namespaces({"namespace": "team", **limit})
    decided, _ = plan(inputs, None)
    short = with_conflicts(inputs, decided).service("team/basic")
    assert short is not None
    assert re.fullmatch(f"{field} of FleetPolicy default", short.binding[-1])
    helps = re.search(rf"{field} of FleetPolicy default of (\d+) instead of 3\b", short.shortfall or "")
    assert helps is not None, short.shortfall
    assert re.fullmatch(f"{field} 3 of FleetPolicy default, of which other services take 2", short.conflict[-1])
    # No device of the other type is allowed either, and one would do.
    other = ["namespaceLimits[team].devices.big 0 of FleetPolicy default"] if of == "devices" else []
    assert short.conflict[:-1] == other
    wider = {"costPerHour": float(helps[1])} if of == "costPerHour" else {"devices": {"small": int(helps[1]), "big": 0}}
    assert plan(two_namespaces({"namespace": "team", **wider}), None)[0].status == "optimal"


def test_what_a_refused_service_goes_on_taking_is_taken_off_its_namespace() -> None:
    first, _ = plan(two_namespaces(), None)
    inputs = two_namespaces({"namespace": "team", "costPerHour": 3})
    gone = inputs.model_copy(update={"services": inputs.services[1:], "unreadable": ["team/gold"]})
    second, _ = plan(gone, first)
    assert counts(second) == {"team/basic": {"small": 1}, "other/basic": {"small": 2}}
    assert violations(gone, second, first) == []


def test_a_step_of_a_limit_that_binds_has_a_worth() -> None:
    for limit, step in (
        ({"costPerHour": 3}, "1 more of spec.namespaceLimits[team].costPerHour of FleetPolicy default"),
        (
            {"devices": {"small": 3, "big": 0}},
            "1 more of spec.namespaceLimits[team].devices.small of FleetPolicy default",
        ),
    ):
        inputs = two_namespaces({"namespace": "team", **limit})
        decided, _ = plan(inputs, None)
        (more,) = [one for one in worth_of_more(inputs, decided, "team/basic") if one.relaxed == step]
        assert (more.cost_per_hour, more.replicas) == (1.0, {"small": 2})
        assert more.unserved_rps == pytest.approx(-1)


def test_a_step_of_power_that_binds_is_what_another_replica_draws() -> None:
    inputs = two_namespaces()
    types = [gpu_type("small", 1.0, watts={"idle": 10, "peak": 100}), gpu_type("big", 3.0, limit=0)]
    scarce = inputs.model_copy(update={"gpu_types": types, "power_domains": [power_domain(350, "small")]})
    decided, _ = plan(scarce, None)
    short = next(one for one in decided.services if one.unserved_rps > 0)
    (more,) = [one for one in worth_of_more(scarce, decided, short.key) if "budgetWatts" in one.relaxed]
    assert more.relaxed == "50 more of spec.budgetWatts of PowerDomain rack"
    assert more.unserved_rps == pytest.approx(-1)


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


@pure
@given(small_fleets(), st.sampled_from([0.0, 2.5, 6.0]), st.integers(0, 4), st.sampled_from(["cost", "small"]))
def test_more_of_a_limit_never_leaves_more_demand_unserved_by_priority(
    inputs: PlanInputs, cost: float, small: int, more: str
) -> None:
    def solved(cost: float, small: int) -> Plan:
        asked = limited(inputs, {"namespace": "team", "costPerHour": cost, "devices": {"small": small}})
        decided, _ = plan(asked, None)
        assert violations(asked, decided) == []
        assert decided.cost_per_hour <= cost * (1 + 1e-6)
        used = [v.replicas * v.devices for one in decided.services for v in one.variants if v.gpu_type == "small"]
        assert sum(used) <= small
        return decided

    before = solved(cost, small)
    after = solved(cost + 1.5, small) if more == "cost" else solved(cost, small + 1)
    assert shortage(inputs, after) <= shortage(inputs, before)


@pytest.mark.parametrize(
    "limit",
    [
        {"namespace": "team"},
        {"namespace": "team", "costPerHour": -1},
        {"namespace": "team", "costPerHour": float("nan")},
        {"namespace": "team", "devices": {}},
        {"namespace": "team", "devices": {"small": -1}},
        {"namespace": "Team", "costPerHour": 1},
    ],
)
def test_a_limit_that_is_none_is_refused(limit: Limit) -> None:
    with pytest.raises(ValueError, match=r"namespace_?[lL]imits"):
        limited(two_namespaces(), limit)


def test_a_namespace_has_one_limit() -> None:
    with pytest.raises(ValueError, match="duplicate namespace: team"):
        two_namespaces({"namespace": "team", "costPerHour": 1}, {"namespace": "team", "costPerHour": 2})
