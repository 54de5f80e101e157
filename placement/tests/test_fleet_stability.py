"""Plans in force: what noise, the price of change and the asked gap keep."""

from __future__ import annotations

import itertools
import random

from llmfleet.api import Plan
from llmfleet.placement import plan
from placement_testing.fleets import (
    fleet,
    gpu_type,
    rates_profile,
    replicas,
    service,
)


def noisy_plans(base: list[float], a100: list[float], a100_price: float, switching: float) -> list[Plan]:
    """Forty plans, each from the last one, while demand stays within 3 % of `base`."""
    rng = random.Random(1)
    plans: list[Plan] = []
    for _ in range(40):
        inputs = fleet(
            [service()],
            [rates_profile({"l4": [4, 1], "a100": a100})],
            [gpu_type("l4", 1.0), gpu_type("a100", a100_price)],
            inventory={"l4": 40, "a100": 40},
            demand={"s": [rate * rng.uniform(0.97, 1.03) for rate in base]},
            switching_cost_fraction=switching,
        )
        plans.append(plan(inputs, plans[-1] if plans else None)[0])
        assert plans[-1].status == "optimal"
    return plans


def changes(plans: list[Plan]) -> int:
    return sum(before.services[0].replicas != after.services[0].replicas for before, after in itertools.pairwise(plans))


def test_noise_of_three_percent_keeps_replicas_and_routes() -> None:
    plans = noisy_plans([9.3, 2.0], [10, 3], 2.9, switching=0.02)
    assert plans[0].services[0].replicas == {"a100": 1, "l4": 2}
    assert {one.plan_id for one in plans} == {plans[0].plan_id}


def test_two_mixes_of_nearly_equal_cost_do_not_take_turns() -> None:
    """Two a100 cost 5.9 and serve 23 per second, six l4 cost 6 and serve 24; demand wavers around 23."""
    assert changes(noisy_plans([22.9, 0], [11.5, 3], 2.95, switching=0.0)) >= 8
    assert changes(noisy_plans([22.9, 0], [11.5, 3], 2.95, switching=0.02)) <= 2


def test_a_change_that_saves_more_than_switching_costs_is_made() -> None:
    def decided(price: float, in_force: Plan | None) -> Plan:
        types = [gpu_type("l4", price), gpu_type("a100", 3.0)]
        profile = rates_profile({"l4": [4, 4], "a100": [12, 12]})
        inputs = fleet([service()], [profile], types, inventory={"l4": 20, "a100": 20}, demand={"s": [11, 0]})
        return plan(inputs, in_force)[0]

    in_force = decided(0.9, None)
    assert replicas(in_force, "s") == {"l4": 3}
    assert replicas(decided(1.01, None), "s") == {"a100": 1}
    assert replicas(decided(1.01, in_force), "s") == {"l4": 3}
    assert replicas(decided(1.2, in_force), "s") == {"a100": 1}


def test_a_plan_in_force_within_the_asked_gap_of_the_proven_bound_is_kept() -> None:
    def decided(a100_price: float, gap: float, in_force: Plan | None) -> Plan:
        types = [gpu_type("l4", 1.0), gpu_type("a100", a100_price)]
        inputs = fleet(
            [service()],
            [rates_profile({"l4": [4, 4], "a100": [12, 12]})],
            types,
            inventory={"l4": 20, "a100": 20},
            demand={"s": [11, 0]},
            switching_cost_fraction=0.0,
            optimality_gap=gap,
        )
        return plan(inputs, in_force)[0]

    in_force = decided(4.0, 0.0, None)
    assert replicas(in_force, "s") == {"l4": 3}
    assert replicas(decided(2.8, 0.1, in_force), "s") == {"l4": 3}
    assert replicas(decided(2.8, 0.01, in_force), "s") == {"a100": 1}
