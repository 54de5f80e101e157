"""What a step of a constraint is worth, and why a plan changed: tried by solving again, the others as planned."""

from __future__ import annotations

from typing import Any

import pytest

from llmfleet.api import Plan
from llmfleet.placement import PlanInputs, plan
from llmfleet.placement.changes import Changes, changes_since
from llmfleet.placement.whatif import edited
from llmfleet.placement.worth import Worth, worth_of_more
from placement_testing.fleets import corners, fleet, gpu_type, point, profile, rates_profile, service

RATES = {"l4": [4, 0], "a100": [10, 3]}
TYPES = [gpu_type("l4", 1.0), gpu_type("a100", 3.0)]


def inputs_of(inventory: dict[str, int], rates: dict[str, list[float]], **spec: Any) -> PlanInputs:
    services = [service(name, **(spec if name == "s" else {"priority": 900, "gpuTypes": ["l4"]})) for name in rates]
    return fleet(services, [rates_profile(RATES)], TYPES, inventory=inventory, demand=rates)


def worth(inputs: PlanInputs) -> dict[str, Worth]:
    decided, _ = plan(inputs, None)
    return {found.relaxed: found for found in worth_of_more(inputs, decided, "team/s")}


def test_one_more_device_of_the_cheaper_type_saves_what_it_replaces() -> None:
    found = worth(inputs_of({"l4": 1, "a100": 4}, {"s": [8, 0]}))
    more = found["1 more device of GPUType l4"]
    assert (more.cost_per_hour, more.unserved_rps, more.replicas) == (-1.0, 0.0, {"l4": 2})
    assert more.helps


def test_one_more_device_serves_what_is_short_and_costs_its_price() -> None:
    more = worth(inputs_of({"l4": 1, "a100": 0}, {"s": [8, 0]}))["1 more device of GPUType l4"]
    assert (more.cost_per_hour, more.replicas) == (1.0, {"l4": 2})
    assert more.unserved_rps == pytest.approx(-4)
    assert more.helps


def test_what_the_others_have_stays_theirs() -> None:
    # The other service comes first and takes three of four; the fourth is the service's own.
    found = worth(inputs_of({"l4": 4, "a100": 0}, {"s": [8, 0], "first": [12, 0]}))
    assert found["1 more device of GPUType l4"].replicas == {"l4": 2}


def test_the_step_of_a_wide_variant_is_what_makes_one_more_replica_fit() -> None:
    wide = rates_profile({"l4-tp4": [4, 4]})
    inputs = fleet([service()], [wide], [gpu_type("l4", 1.0)], inventory={"l4": 6}, demand={"s": [8, 0]})
    found = worth(inputs)
    assert found["2 more devices of GPUType l4"].replicas == {"l4-tp4": 2}


def test_ten_milliseconds_are_worth_what_they_let_in() -> None:
    def measured(tpot_ms: float, rps: float) -> list[dict[str, Any]]:
        return [point(corner, rps, tpot_ms=tpot_ms) for corner in corners((512, 4096), (128,))]

    slow_but_wide = profile({"l4": [p | {"concurrency": 8} for p in measured(49, 1.2)] + measured(58, 8)})
    inputs = fleet([service()], [slow_but_wide], [gpu_type("l4", 1.0)], inventory={"l4": 9}, demand={"s": [8, 0]})
    found = worth(inputs)
    assert found["10 ms more of spec.objective.tpot"].cost_per_hour == -6.0
    assert not found["10 ms more of spec.objective.ttft"].helps
    assert next(iter(found)) == "10 ms more of spec.objective.tpot"


def test_bounds_on_replicas_that_bind_have_a_worth_too() -> None:
    found = worth(inputs_of({"l4": 9, "a100": 0}, {"s": [8, 0]}, replicas={"max": 1}))
    assert found["spec.replicas.max of 2"].unserved_rps == pytest.approx(-4)
    found = worth(inputs_of({"l4": 9, "a100": 0}, {"s": [8, 0]}, replicas={"min": 4}))
    assert found["spec.replicas.min of 3"].cost_per_hour == -1.0


def test_one_more_of_the_budget_is_worth_what_it_buys_and_the_others_keep_what_they_spend() -> None:
    inputs = inputs_of({"l4": 9, "a100": 9}, {"s": [8, 0], "first": [12, 0]})
    scarce = inputs.model_copy(update={"policy": inputs.policy.model_copy(update={"budget_per_hour": 4.0})})
    more = worth(scarce)["1 more of spec.budgetPerHour of FleetPolicy default"]
    assert (more.cost_per_hour, more.replicas) == (1.0, {"l4": 2})
    assert more.unserved_rps == pytest.approx(-4)


def test_a_refused_service_has_no_worth_of_anything() -> None:
    assert worth(inputs_of({"l4": 9}, {"s": [8, 0]}, profile="absent")) == {}


def changed(before: PlanInputs, *edits: str, inputs: PlanInputs | None = None) -> Changes:
    first, _ = plan(before, None)
    later = edited(inputs or before, edits)
    second, _ = plan(later, first)
    return changes_since(first, second, later, "team/s")


BASE = inputs_of({"l4": 9, "a100": 9}, {"s": [8, 0]})


def test_more_demand_is_the_cause_of_more_replicas() -> None:
    found = changed(BASE, "rate:s=x2")
    assert found.moved
    assert [(c.message, c.decisive) for c in found.causes] == [("demand went from 8 to 16 requests per second", True)]


def test_a_price_is_the_cause_where_undoing_it_brings_the_old_replicas_back() -> None:
    # The demand moved too, but not by enough to need another replica.
    found = changed(BASE, "price:l4=4", "rate:s=x0.99")
    assert [(c.message, c.decisive) for c in found.causes] == [
        ("a device of GPUType l4 went from 1 to 4 per hour", True),
        ("demand went from 8 to 7.92 requests per second", False),
    ]


def test_devices_that_are_gone_are_a_cause_and_the_constraint_that_binds_is_named() -> None:
    found = changed(BASE, "limit:l4=1")
    assert found.causes[0].decisive
    assert "take 2 devices of GPUType l4, and 1 are left" in found.causes[0].message
    assert "limit of GPUType l4 binds now" in [cause.message for cause in found.causes]


def test_devices_that_another_service_took_are_a_cause() -> None:
    before = inputs_of({"l4": 3, "a100": 9}, {"s": [8, 0]})
    found = changed(before, inputs=inputs_of({"l4": 3, "a100": 9}, {"s": [8, 0], "first": [12, 0]}))
    assert found.difference.after is not None
    assert found.difference.after.replicas == {"a100": 1}
    assert "take 2 devices of GPUType l4, and 0 are left" in found.causes[0].message


def test_a_change_that_nothing_in_the_plans_explains_says_so() -> None:
    looser = inputs_of({"l4": 9, "a100": 9}, {"s": [8, 0]}, gpuTypes=["a100"])
    (cause,) = changed(BASE, inputs=looser).causes
    assert not cause.decisive
    assert cause.message.startswith("none of this alone explains it")


def test_without_a_move_nothing_needs_a_cause() -> None:
    found = changed(BASE, "rate:s=x0.99")
    assert (found.moved, found.causes) == (False, [])


def test_a_service_that_the_earlier_plan_did_not_have_is_new() -> None:
    decided, _ = plan(BASE, None)
    nothing = Plan(plan_id="", status="feasible", stopped_by="gap", solve_seconds=0, cost_per_hour=0)
    found = changes_since(nothing, decided, BASE, "team/s")
    assert found.difference.before is None
    assert found.moved
    assert found.causes == []
