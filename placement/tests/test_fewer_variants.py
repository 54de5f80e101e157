"""Of plans within the asked gap of what is proven, the one with fewer variants is chosen, and nothing else is lost."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from llmfleet.placement import PlanInputs, plan, restarts, violations
from placement_testing.fleets import fleet, gpu_type, rates_profile, replicas, service, small_fleets

TYPES = [gpu_type("l4", 1.0), gpu_type("a100", 3.0), gpu_type("h100", 7.0)]
RATES = {"l4": [4, 0], "a100": [8, 2], "h100": [20, 5]}
TWO_VARIANTS, ONE_VARIANT = {"l4": 4, "a100": 1}, {"a100": 3}
"""Seven and nine per hour."""


def mixed(gap: float, inventory: dict[str, int] | None = None, rates: tuple[float, float] = (16, 2)) -> PlanInputs:
    """Short requests are cheapest on l4, long ones need a100 or h100."""
    return fleet(
        [service()],
        [rates_profile(RATES)],
        TYPES,
        inventory=inventory or {"l4": 9, "a100": 9, "h100": 9},
        demand={"s": list(rates)},
        optimality_gap=gap,
        switching_cost_fraction=0.0,
    )


@pytest.mark.parametrize(("gap", "planned"), [(0.0, TWO_VARIANTS), (0.2, TWO_VARIANTS), (0.25, ONE_VARIANT)])
def test_one_variant_serves_what_two_would_where_it_costs_no_more_than_the_gap(
    gap: float, planned: dict[str, int]
) -> None:
    decided, _ = plan(mixed(gap), None)
    assert replicas(decided, "s") == planned
    assert decided.status == "optimal"
    assert decided.bound == pytest.approx(7.0)
    assert decided.gap_cost == pytest.approx(1 - 7.0 / decided.cost_per_hour)
    assert violations(mixed(gap), decided) == []


def test_without_the_devices_for_one_variant_there_are_two() -> None:
    decided, _ = plan(mixed(0.25, {"l4": 9, "a100": 2, "h100": 0}), None)
    assert replicas(decided, "s") == TWO_VARIANTS


def test_of_two_types_that_do_the_same_for_the_same_price_one_serves_all() -> None:
    alike = fleet(
        [service()],
        [rates_profile({"l4": [4, 2], "a10g": [4, 2]})],
        [gpu_type("l4", 1.0), gpu_type("a10g", 1.0)],
        inventory={"l4": 9, "a10g": 9},
        demand={"s": [16, 2]},
    )
    decided, _ = plan(alike, None)
    assert list(replicas(decided, "s").values()) == [5]


def test_a_plan_in_force_with_two_variants_stays_though_one_would_do() -> None:
    before, _ = plan(mixed(0.0), None)
    assert replicas(plan(mixed(0.25), before)[0], "s") == TWO_VARIANTS


def test_a_plan_in_force_with_one_variant_stays_within_the_gap() -> None:
    before, warm = plan(mixed(0.25), None)
    again, warm = plan(mixed(0.25), before, warm)
    assert replicas(again, "s") == ONE_VARIANT
    assert again.plan_id == before.plan_id


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(small_fleets())
def test_fewer_variants_cost_no_more_than_the_gap_and_serve_no_less(inputs: PlanInputs) -> None:
    policy = inputs.policy.model_copy(update={"optimality_gap": 0.2, "solve_time_limit_seconds": 60})
    inputs = inputs.model_copy(update={"policy": policy})
    simple, _ = plan(inputs, None)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(restarts, "with_fewer_variants", lambda solved, *_: solved)
        found, _ = plan(inputs, None)
    assert violations(inputs, simple) == []
    for mine, theirs in zip(simple.services, found.services, strict=True):
        assert len(mine.variants) <= len(theirs.variants)
        assert mine.unserved_rps <= theirs.unserved_rps + 1e-6
        assert mine.cost_per_hour <= theirs.cost_per_hour / 0.8 + 1e-6
    if found.gap_cost is not None and found.gap_cost <= 0.2:
        assert simple.gap_cost is not None
        assert simple.gap_cost <= 0.2 + 1e-6
