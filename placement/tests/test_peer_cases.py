"""Cases in which other planners were reported to be wrong, each reproduced and right here.

AIBrix #637 (github.com/vllm-project/aibrix/issues/637), on A10 and L20, a mix of two kinds of requests: the output
fluctuates under a stable load ("4 L20 to 5 A10"); it asks for two L20 where there is one, instead of {7 A10, 1 L20}; a
scale-down that ends before the scale-up leaves a hole. WVA #1251 (github.com/llm-d/llm-d-autoscaling/issues/1251): a
greedy choice by cost per capacity pays 10 where 6 would do.

The figures of throughput and price are made up so that the issue's outcomes come about; the issues give none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from llmfleet.placement import PlanInputs, plan, violations
from placement_testing.fleets import fleet, gpu_type, rates_profile, replicas, service

A10, L20 = "a10", "l20"


def two_types(
    rates: dict[str, list[float]], l20_price: float, demand: Sequence[float], *, l20: int = 10, **policy: float
) -> PlanInputs:
    return fleet(
        [service()],
        [rates_profile(rates)],
        [gpu_type(A10, 1.0, memory_gib=24), gpu_type(L20, l20_price, memory_gib=48)],
        inventory={A10: 20, L20: l20},
        demand={"s": demand},
        **policy,
    )


def noisy_windows(count: int) -> list[list[float]]:
    """Requests per second of short chats and of long ones, counted over four minutes of Poisson arrivals."""
    rng = np.random.default_rng(1)
    return [[rng.poisson(7 * 240) / 240, rng.poisson(4 * 240) / 240] for _ in range(count)]


def test_noise_on_a_stable_load_of_two_kinds_does_not_move_the_plan_that_serves_it() -> None:
    def inputs(window: Sequence[float]) -> PlanInputs:
        rates = {A10: [2.9, 0.8], L20: [4.4, 1.8]}
        return two_types(rates, 1.87, window, utilization_target=0.8, optimality_gap=0.01, switching_cost_fraction=0.02)

    windows = noisy_windows(50)
    forgetful = [replicas(plan(inputs(window), None)[0], "s") for window in windows]
    changes = sum(before != after for before, after in itertools.pairwise(forgetful))
    assert changes >= 10, "without the plan in force as an input, the mix is seen to oscillate"

    in_force, warm = plan(inputs(windows[0]), None)
    first = replicas(in_force, "s")
    for window in windows[1:]:
        in_force, warm = plan(inputs(window), in_force, warm)
        assert in_force.services[0].unserved_rps == 0
        assert replicas(in_force, "s") == first


SHARES = {A10: [1.0, 1.0], L20: [1.0, 3.0]}
"""Long requests suit the L20, short ones are as fast on the A10."""


@pytest.mark.parametrize(("l20", "expected"), [(2, {A10: 4, L20: 2}), (1, {A10: 7, L20: 1}), (0, {A10: 10})])
def test_no_more_devices_are_planned_than_exist(l20: int, expected: dict[str, int]) -> None:
    inputs = two_types(SHARES, 2.2, [4.0, 6.0], l20=l20)
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == expected
    assert decided.status == "optimal"
    assert violations(inputs, decided) == []


def test_what_cannot_be_had_is_named_with_what_would_help() -> None:
    inputs = two_types(SHARES, 2.2, [4.0, 6.0], l20=1)
    assert plan(inputs, None)[0].services[0].binding == ["inventory of GPUType l20"]
    few = inputs.model_copy(update={"inventory": {A10: 5, L20: 1}})
    decided, _ = plan(few, None)
    assert decided.status == "partial"
    assert decided.services[0].unserved_rps == pytest.approx(2.0)
    assert decided.services[0].shortfall is not None
    assert "2 more devices of GPUType a10" in decided.services[0].shortfall
    assert violations(few, decided) == []


def test_a_change_of_types_leaves_room_for_the_old_engines_until_the_new_ones_serve() -> None:
    """The plan's part in closing the hole: old and new together stay within the devices, since they are different
    ones. The operator's part is that nothing leaves before its replacement is Ready: see
    `test_with_room_serving_replicas_never_fall_below_old_and_new` of its simulation."""
    before, warm = plan(two_types(SHARES, 2.2, [4.0, 6.0], l20=2), None)
    dearer = two_types(SHARES, 3.3, [4.0, 6.0], l20=2)
    after, _ = plan(dearer, before, warm)
    assert (replicas(before, "s"), replicas(after, "s")) == ({A10: 4, L20: 2}, {A10: 10})
    for name, exist in dearer.inventory.items():
        assert max(replicas(before, "s").get(name, 0), replicas(after, "s").get(name, 0)) <= exist


def greedy_by_efficiency(needed: float, variants: dict[str, tuple[float, float]]) -> float:
    """What WVA #1251 describes: whole replicas of the variant with the lowest cost per capacity."""
    cost, capacity = min(variants.values(), key=lambda variant: variant[0] / variant[1])
    return cost * float(np.ceil(needed / capacity))


def test_the_cheaper_variant_is_taken_where_it_suffices_although_its_capacity_costs_more() -> None:
    variants = {"efficient": (10.0, 20.0), "cheap": (6.0, 10.0)}
    inputs = fleet(
        [service()],
        [rates_profile({name: [capacity, capacity] for name, (_, capacity) in variants.items()})],
        [gpu_type(name, cost) for name, (cost, _) in variants.items()],
        inventory=dict.fromkeys(variants, 100),
        demand={"s": [10.0, 0.0]},
    )
    decided, _ = plan(inputs, None)
    assert decided.status == "optimal"
    assert replicas(decided, "s") == {"cheap": 1}
    greedy = greedy_by_efficiency(10.0, variants)
    assert greedy / decided.cost_per_hour == pytest.approx(1.67, abs=0.01)


@pytest.mark.parametrize(
    ("needed", "expected"),
    [(10.01, {"efficient": 1}), (30.0, {"efficient": 1, "cheap": 1}), (40.0, {"efficient": 2}), (5.0, {"cheap": 1})],
)
def test_only_the_last_replica_is_exchanged_for_a_cheaper_one(needed: float, expected: dict[str, int]) -> None:
    inputs = fleet(
        [service()],
        [rates_profile({"efficient": [20.0, 20.0], "cheap": [10.0, 10.0]})],
        [gpu_type("efficient", 10.0), gpu_type("cheap", 6.0)],
        inventory={"efficient": 100, "cheap": 100},
        demand={"s": [needed, 0.0]},
    )
    assert replicas(plan(inputs, None)[0], "s") == expected
