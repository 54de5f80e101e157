"""`FleetPolicy.spec.maxStartsPerPlan`: a fleet is replaced in steps, each of them a sound plan."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, Plan
from llmfleet.api.fleetpolicy import HELD_BACK
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.steps import step
from llmfleet.placement.whatif import edited
from placement_testing.fleets import fleet, gpu_type, rates_profile, replicas, service, small_fleets

vectors = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4)


@given(vectors, st.integers(1, 10))
def test_a_step_starts_no_more_than_allowed_and_ends_no_more_than_were_solved_to_go(
    counts: list[tuple[int, int]], most: int
) -> None:
    before, target = (tuple(side) for side in zip(*counts, strict=True))
    found = step(before, target, most)
    for now, then, wanted in zip(found, before, target, strict=True):
        assert now - then <= most
        assert min(then, wanted) <= now <= max(then, wanted)


@given(vectors, st.integers(1, 10))
def test_steps_reach_the_target_as_soon_as_they_can(counts: list[tuple[int, int]], most: int) -> None:
    now, target = (tuple(side) for side in zip(*counts, strict=True))
    widest = max(after - count for count, after in zip(now, target, strict=True))
    for _ in range(max(1, -(-widest // most))):
        now = step(now, target, most)
    assert now == target


def two_types(most: int | None, **policy: Any) -> PlanInputs:
    """40 requests per second: ten l4, or ten a100 which at first cost more."""
    return fleet(
        [service()],
        [rates_profile({"l4": [4, 4], "a100": [4, 4]})],
        [gpu_type("l4", 1.0), gpu_type("a100", 1.5)],
        inventory={"l4": 30, "a100": 30},
        demand={"s": [40, 0]},
        max_starts_per_plan=most,
        **policy,
    )


def followed(inputs: PlanInputs, previous: Plan, plans: int) -> list[dict[str, int]]:
    found, warm = [], None
    for _ in range(plans):
        decided, warm = plan(inputs, previous, warm)
        assert violations(inputs, decided, previous) == []
        assert decided.services[0].unserved_rps == 0
        found.append(replicas(decided, "s"))
        previous = decided
    return found


def test_a_cheaper_type_takes_over_in_steps_and_all_is_served_all_the_way() -> None:
    first, _ = plan(two_types(4), None)
    assert replicas(first, "s") == {"l4": 10}
    cheaper = edited(two_types(4), ["price:a100=0.5"])
    way = followed(cheaper, first, 4)
    assert way == [{"a100": 4, "l4": 6}, {"a100": 8, "l4": 2}, {"a100": 10}, {"a100": 10}]


def test_a_plan_that_is_held_back_says_so_and_claims_no_proof() -> None:
    first, _ = plan(two_types(4), None)
    cheaper = edited(two_types(4), ["price:a100=0.5"])
    held, _ = plan(cheaper, first)
    assert held.services[0].binding == [HELD_BACK]
    assert (held.status, held.bound, held.gap_cost) == ("feasible", None, None)
    arrived, _ = plan(edited(two_types(None), ["price:a100=0.5"]), held)
    assert (arrived.status, arrived.services[0].binding) == ("optimal", [])


def test_a_fleet_that_only_grows_is_not_held_back() -> None:
    first, _ = plan(two_types(1), None)
    assert replicas(first, "s") == {"l4": 10}
    double = edited(two_types(1), ["rate:s=x2"])
    assert followed(double, first, 1) == [{"l4": 20}]


def test_where_no_step_would_do_the_way_is_gone_at_once() -> None:
    # Seven devices of the old type are gone, or only one variant is allowed, or the load has grown beyond a step.
    grown = edited(two_types(4), ["price:a100=0.5", "rate:s=x2"])
    first, _ = plan(two_types(4), None)
    assert followed(grown, first, 1) == [{"a100": 20}]
    bounds = service(replicas={"maxVariants": 1})
    single = two_types(4).model_copy(update={"services": [bounds]})
    assert followed(edited(single, ["price:a100=0.5"]), first, 1) == [{"a100": 10}]
    gone = edited(two_types(4), ["price:a100=0.5", "inventory:l4=3"])
    assert followed(gone, first, 1) == [{"a100": 10}]


def test_a_fleet_that_only_shrinks_is_not_held_back() -> None:
    first, _ = plan(two_types(1), None)
    assert followed(edited(two_types(1), ["rate:s=x0.2"]), first, 1) == [{"l4": 2}]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(small_fleets(), st.sampled_from([0.3, 3.0]), st.integers(1, 2))
def test_the_limit_never_leaves_more_unserved_and_never_breaks_another(
    inputs: PlanInputs, price: float, most: int
) -> None:
    first, _ = plan(inputs, None)
    dearer = edited(inputs, [f"price:big={price}"])
    free, _ = plan(dearer, first)
    policy = dearer.policy.model_copy(update={"max_starts_per_plan": most})
    held_inputs = dearer.model_copy(update={"policy": policy})
    held, _ = plan(held_inputs, first)
    assert violations(held_inputs, held, first) == []
    for one, other in zip(held.services, free.services, strict=True):
        assert one.unserved_rps == pytest.approx(other.unserved_rps, abs=1e-6)
        if HELD_BACK in one.binding:
            before = first.service(one.key)
            assert before is not None
            assert all(count - before.replicas.get(name, 0) <= most for name, count in one.replicas.items())
        else:
            assert one.replicas == other.replicas


def test_a_number_of_starts_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_?[sS]tarts_?[pP]er_?[pP]lan"):
        FleetPolicySpec.model_validate({"max_starts_per_plan": 0})
