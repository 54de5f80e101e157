"""Spot capacity: who gets it, what survives its loss, and what is said where nothing can."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.api import GPUType, Plan, ServicePlan
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.conflicts import with_conflicts
from placement_testing.fleets import brute_force, fleet, gpu_type, rates_profile, replicas, service

MANY = {"od": 50, "spot-a": 50, "spot-b": 50, "spot-c": 50}


def spot(name: str, price: float, **spec: Any) -> GPUType:
    prices = {"onDemand": 10.0, "spot": price}
    return gpu_type(name, 10.0, capacityClass="spot", pricePerHour=prices, sameHardwareAs="od", **spec)


def pools(
    policy: dict[str, Any] | None,
    *,
    rps: float = 12.0,
    inventory: dict[str, int] | None = None,
    names: str = "abc",
    utilization: float = 1.0,
    **spec: Any,
) -> PlanInputs:
    """A service that is measured on demand only (one request per second and replica), and pools of its hardware."""
    spec |= {} if policy is None else {"spot": policy}
    types = [gpu_type("od", 10.0), *(spot(f"spot-{name}", 3.0) for name in names)]
    return fleet(
        [service(**spec)],
        [rates_profile({"od": [1.0, 1.0]})],
        types,
        inventory=MANY if inventory is None else inventory,
        demand={"s": [rps, 0.0]},
        utilization_target=utilization,
    )


def planned(inputs: PlanInputs, previous: Plan | None = None) -> ServicePlan:
    decided, _ = plan(inputs, previous)
    assert violations(inputs, decided, previous) == []
    assert decided.refusals == []
    return decided.services[0]


def test_spot_is_not_used_by_a_service_that_does_not_say_how() -> None:
    assert planned(pools(None)).replicas == {"od": 12}
    named = planned(pools(None, gpuTypes=["od", "spot-a"]))
    assert named.replicas == {"od": 12}
    assert any("spec.spot of team/s is to say how it may be used" in warning for warning in named.warnings)


def test_a_service_that_could_only_use_spot_and_does_not_allow_it_is_refused_with_what_to_write() -> None:
    (refused,) = plan(pools(None, gpuTypes=["spot-a"]), None)[0].refusals
    assert refused.reason == "SpotNotAllowed"
    assert "Accepted: spec.spot" in refused.message


def test_where_a_loss_may_do_anything_the_cheapest_pool_serves_all() -> None:
    found = planned(pools({"surviveLossOf": "none"}, names="a"))
    assert found.replicas == {"spot-a": 12}
    assert found.losses == []


def test_beside_one_pool_all_demand_is_served_on_demand_as_well_so_it_is_not_worth_having() -> None:
    assert planned(pools({}, names="a")).replicas == {"od": 12}


def test_headroom_may_be_used_up_after_a_loss_so_spot_is_where_the_headroom_is() -> None:
    found = planned(pools({}, names="a", utilization=0.8))
    assert found.replicas == {"od": 12, "spot-a": 3}
    (loss,) = found.losses
    assert (loss.gpu_types, loss.unserved_rps) == (["spot-a"], 0)
    assert {route.variant for route in loss.routes} == {"od"}


def test_pools_stand_in_for_each_other_and_the_more_there_are_the_less_it_costs() -> None:
    two, three = planned(pools({}, names="ab")), planned(pools({}))
    assert two.replicas == {"spot-a": 12, "spot-b": 12}
    assert three.replicas == {"spot-a": 6, "spot-b": 6, "spot-c": 6}
    assert all(loss.unserved_rps == 0 for loss in three.losses)
    assert [loss.gpu_types for loss in three.losses] == [["spot-a"], ["spot-b"], ["spot-c"]]


def test_a_share_of_the_demand_may_rest_on_spot_altogether() -> None:
    found = planned(pools({"maxShare": 0.25})).replicas
    assert found.pop("od") == 9
    assert sorted(found.values()) == [1, 2, 2]
    assert planned(pools({"maxShare": 0.25, "surviveLossOf": "none"}, names="a")).replicas == {"od": 9, "spot-a": 3}
    assert planned(pools({"maxShare": 0})).replicas == {"od": 12}


def test_a_plan_in_force_that_would_not_survive_is_no_reason_to_keep_it() -> None:
    first, warm = plan(pools({"surviveLossOf": "none"}), None)
    inputs = pools({})
    second, _ = plan(inputs, first, warm)
    assert violations(inputs, second, first) == []
    assert replicas(second, "s") == {"spot-a": 6, "spot-b": 6, "spot-c": 6}


def test_what_is_left_serves_while_the_plan_moves_on() -> None:
    inputs = pools({})
    first, warm = plan(inputs, None)
    gone = inputs.model_copy(update={"inventory": {**MANY, "spot-b": 0}})
    left = {name: count for name, count in first.services[0].replicas.items() if name != "spot-b"}
    only = planned(inputs.model_copy(update={"inventory": left}), first)
    assert only.unserved_rps == 0
    second, _ = plan(gone, first, warm)
    assert violations(gone, second, first) == []
    assert replicas(second, "s") == {"spot-a": 12, "spot-c": 12}


def test_a_plan_in_steps_never_puts_more_at_risk_on_its_way_and_arrives() -> None:
    inputs = pools({"maxShare": 0.5}, utilization=0.8)
    inputs = inputs.model_copy(update={"policy": inputs.policy.model_copy(update={"max_starts_per_plan": 2})})
    before, warm = plan(pools({"maxShare": 0.5}, names="a", utilization=0.8), None)
    arrived, _ = plan(pools({"maxShare": 0.5}, utilization=0.8), None)
    assert arrived.cost_per_hour < before.cost_per_hour
    for _ in range(9):
        after, warm = plan(inputs, before, warm)
        assert violations(inputs, after, before) == []
        assert after.services[0].shortfall is None
        if after.plan_id == before.plan_id:
            break
        before = after
    assert before.cost_per_hour == pytest.approx(arrived.cost_per_hour)


def test_protection_that_is_asked_for_later_comes_in_steps_too_and_what_is_at_risk_until_then_is_said() -> None:
    before, warm = plan(pools({"surviveLossOf": "none"}, utilization=0.8), None)
    assert replicas(before, "s") == {"spot-a": 15}
    inputs = pools({}, utilization=0.8)
    inputs = inputs.model_copy(update={"policy": inputs.policy.model_copy(update={"max_starts_per_plan": 2})})
    at_risk = []
    for _ in range(4):
        after, warm = plan(inputs, before, warm)
        assert violations(inputs, after, before) == []
        at_risk.append(after.services[0].losses[0].unserved_rps)
        before = after
    assert at_risk == pytest.approx([8.0, 4.0, 0.0, 0.0])


def test_what_cannot_be_protected_is_served_nevertheless_and_said_with_the_limits_in_conflict() -> None:
    inputs = pools({}, names="a", inventory={"od": 7, "spot-a": 50})
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    found = decided.services[0]
    assert found.unserved_rps == 0
    assert found.replicas == {"od": 7, "spot-a": 5}
    assert found.losses[0].unserved_rps == pytest.approx(5.0)
    assert "would be short of 5 requests per second after the loss of spot-a (spec.spot.surviveLossOf)" in str(
        found.shortfall
    )
    (service_plan,) = with_conflicts(inputs, decided).services
    assert service_plan.conflict == ["inventory 7 of GPUType od", "spec.spot.surviveLossOf anyPool"]


def test_the_policy_is_named_where_it_keeps_the_plan_from_being_cheaper() -> None:
    assert "spec.spot.surviveLossOf" in planned(pools({})).binding
    assert "spec.spot.surviveLossOf" not in planned(pools({"surviveLossOf": "none"})).binding


def test_the_next_best_set_survives_as_well() -> None:
    found = planned(pools({}))
    assert found.next_best is not None
    counts = found.next_best.replicas
    assert counts.keys() != found.replicas.keys()
    assert sum(counts.values()) - max(count for name, count in counts.items() if name != "od") >= 12


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"losses": []}, "not planned for"),
        ({"unserved_rps": 3.0}, "as routed"),
        ({"routes": []}, "as routed"),
        ({"variant": "spot-a"}, "no route of spot-a"),
        ({"replicas": 6}, "% of the requests within"),
    ],
)
def test_the_checker_names_what_a_plan_claims_of_a_loss_and_does_not_keep(broken: dict[str, Any], said: str) -> None:
    inputs = pools({}, names="ab")
    decided, _ = plan(inputs, None)
    (part,) = decided.services
    first, second = part.losses
    changed: dict[str, Any] = {"losses": [first.model_copy(update=broken), second]}
    if "losses" in broken:
        changed = broken
    elif "variant" in broken:
        route = first.routes[0].model_copy(update=broken)
        changed = {"losses": [first.model_copy(update={"routes": [route]}), second]}
    elif "replicas" in broken:
        changed = {"variants": [variant.model_copy(update=broken) for variant in part.variants]}
    told = decided.model_copy(update={"services": [part.model_copy(update=changed)]})
    assert any(found.constraint == "losses" and said in str(found) for found in violations(inputs, told))


@st.composite
def small_pools(draw: st.DrawFn) -> PlanInputs:
    count = st.integers(0, 4)
    policy = {
        "surviveLossOf": draw(st.sampled_from(["anyPool", "anyPool", "none"])),
        "maxShare": draw(st.sampled_from([1.0, 0.5, 0.0])),
    }
    inputs = pools(
        policy,
        names="ab",
        rps=draw(st.sampled_from([0.5, 1.9, 3.0])),
        inventory={"od": draw(count), "spot-a": draw(count), "spot-b": draw(count)},
        utilization=draw(st.sampled_from([0.8, 1.0])),
        replicas={"min": draw(st.integers(0, 1)), **draw(st.sampled_from([{}, {"max": 4}]))},
    )
    other = service("other", priority=200, spot={})
    both = [*inputs.services, other] if draw(st.booleans()) else inputs.services
    demand = {**inputs.demand, "team/other": inputs.demand["team/s"].model_copy(update={"rps": [0.0, 1.5]})}
    return inputs.model_copy(update={"services": both, "demand": demand})


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_pools())
def test_whatever_is_planned_keeps_what_it_says_of_losses_at_the_least_cost(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    if len(inputs.services) == 1:
        best = brute_force(inputs)
        assert (best is None) == (not decided.services)
        for part in decided.services:
            at_risk = max((loss.unserved_rps / loss.share for loss in part.losses), default=0.0)
            missing = max(0, inputs.services[0].spec.replicas.min - sum(part.replicas.values()))
            rank = (part.unserved_rps + 0.1 * at_risk, missing, part.cost_per_hour)
            assert rank == pytest.approx(best, abs=2e-4)
    for part in decided.services:
        spec = next(one.spec for one in inputs.services if one.key == part.key)
        assert spec.spot is not None
        demand, counts = part.demand_rps, part.replicas
        on_demand = counts.get("od", 0)
        for name in ("spot-a", "spot-b"):
            left = sum(counts.values()) - counts.get(name, 0)
            if spec.spot.survive_loss_of == "anyPool" and part.shortfall is None:
                assert left >= demand * (1 - 1e-6)
        if part.shortfall is None:
            assert on_demand >= (1 - spec.spot.max_share) * demand * (1 - 1e-6)
