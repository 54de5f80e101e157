"""What one service gets and is told: replicas, routes, costs, what binds and what would help."""

from __future__ import annotations

import pytest

from llmfleet.api import Plan
from llmfleet.placement import plan
from placement_testing.fleets import (
    MIXED_RATES,
    MIXED_TYPES,
    fleet,
    gpu_type,
    mixed_traffic,
    rates_profile,
    replicas,
    service,
)


def test_without_demand_the_fewest_replicas_are_the_cheapest_ones() -> None:
    ample = {"l4": 9, "a100": 9, "h100": 9}
    idle, _ = plan(fleet([service()], [MIXED_RATES], MIXED_TYPES, inventory=ample), None)
    assert replicas(idle, "s") == {}
    assert idle.status == "optimal"
    assert idle.services[0].cost_per_million_tokens is None
    kept, _ = plan(fleet([service(replicas={"min": 2})], [MIXED_RATES], MIXED_TYPES, inventory=ample), None)
    assert replicas(kept, "s") == {"l4": 2}
    assert {(r.bucket, r.variant) for r in kept.services[0].routes} == {(0, "l4")}


def test_replicas_min_is_not_filled_up_with_variants_that_are_too_slow() -> None:
    slow_and_cheap = rates_profile({"l4": [0, 0], "h100": [4, 1]})
    for demand in ({}, {"s": [2, 0]}):
        inputs = fleet(
            [service(replicas={"min": 3})], [slow_and_cheap], MIXED_TYPES, inventory={"l4": 9, "h100": 9}, demand=demand
        )
        decided, _ = plan(inputs, None)
        assert replicas(decided, "s") == {"h100": 3}
        assert decided.services[0].next_best is None


@pytest.mark.parametrize("price", [0.0, 2.0])
def test_of_devices_that_cost_nothing_no_more_are_taken_than_needed(price: float) -> None:
    types = [gpu_type("l4", 0.0), gpu_type("h100", price)]
    profile = rates_profile({"l4": [4, 1], "h100": [4, 1]})
    for demand, bounds, count in (({"s": [5.0, 0.0]}, {}, 2), ({}, {"min": 1}, 1)):
        inputs = fleet([service(replicas=bounds)], [profile], types, inventory={"l4": 9, "h100": 9}, demand=demand)
        decided, _ = plan(inputs, None)
        assert sum(replicas(decided, "s").values()) == count
        assert decided.cost_per_hour == 0


@pytest.mark.parametrize("rate", [1e-300, 1e-9, 1e-6])
def test_the_rarest_requests_get_a_replica(rate: float) -> None:
    profile = rates_profile({"l4": [4, 1], "h100": [4, 1]})
    inputs = fleet([service()], [profile], MIXED_TYPES, inventory={"l4": 9, "h100": 9}, demand={"s": [rate, 0]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"l4": 1}
    assert decided.status == "optimal"


def test_expected_traffic_counts_over_what_was_observed_and_a_guess_does_not() -> None:
    ample = {"l4": 9, "a100": 9, "h100": 9}
    insists = fleet(
        [service(traffic=mixed_traffic(4))], [MIXED_RATES], MIXED_TYPES, inventory=ample, demand={"s": [1, 0]}
    )
    guesses = fleet(
        [service(traffic=mixed_traffic(4) | {"mode": "observe"})],
        [MIXED_RATES],
        MIXED_TYPES,
        inventory=ample,
        demand={"s": [1, 0]},
    )
    assert plan(insists, None)[0].services[0].demand == pytest.approx([3.2, 0.8])
    assert plan(guesses, None)[0].services[0].demand == [1, 0]


def test_a_limit_binds_where_it_is_wanted_and_its_name_is_said() -> None:
    types = [gpu_type("l4", 1.0, limit=1), *MIXED_TYPES[1:]]
    inputs = fleet([service()], [MIXED_RATES], types, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 0]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1}
    assert decided.services[0].binding == ["limit of GPUType l4"]
    above = [gpu_type("l4", 1.0, limit=5), *MIXED_TYPES[1:]]
    fewer = fleet([service()], [MIXED_RATES], above, inventory={"l4": 1, "a100": 9, "h100": 9}, demand={"s": [8, 0]})
    assert plan(fewer, None)[0].services[0].binding == ["inventory of GPUType l4"]
    unlimited = fleet(
        [service()], [MIXED_RATES], MIXED_TYPES, inventory={"l4": 2, "a100": 9, "h100": 9}, demand={"s": [8, 0]}
    )
    assert plan(unlimited, None)[0].services[0].binding == []


def test_replica_bounds_bind_in_words() -> None:
    ample = {"l4": 9, "a100": 9, "h100": 9}
    few, _ = plan(
        fleet([service(replicas={"max": 1})], [MIXED_RATES], MIXED_TYPES, inventory=ample, demand={"s": [14, 0]}), None
    )
    assert replicas(few, "s") == {"h100": 1}
    assert few.services[0].binding == ["replicas.max"]
    many, _ = plan(
        fleet([service(replicas={"min": 3})], [MIXED_RATES], MIXED_TYPES, inventory=ample, demand={"s": [4, 0]}), None
    )
    assert replicas(many, "s") == {"l4": 3}
    assert many.services[0].binding == ["replicas.min"]


@pytest.mark.parametrize("kind", ["inventory", "limit", "replicas.max"])
def test_what_a_shortfall_says_would_help_does_help(kind: str) -> None:
    def decided(l4: int, most: int | None, limit: int | None = None) -> Plan:
        bounds = {} if most is None else {"max": most}
        types = [gpu_type("l4", 1.0, limit=limit)]
        asked = service(gpuTypes=["l4"], replicas=bounds)
        profile = rates_profile({"l4": [4, 1]})
        return plan(fleet([asked], [profile], types, inventory={"l4": l4}, demand={"s": [10, 2]}), None)[0]

    short = {"inventory": decided(2, None), "limit": decided(4, None, 2), "replicas.max": decided(9, 2)}[kind]
    (said,) = short.services
    assert short.status == "partial"
    # Two replicas serve 8 of the cheap requests; 2 of them (half a replica) and 2 dear ones (two replicas) are left.
    assert said.unserved_rps == pytest.approx(4)
    assert said.shortfall is not None
    assert "short of 4 of 12 requests per second (priority 100)" in said.shortfall
    if kind == "inventory":
        assert "held by inventory of GPUType l4; would help: 3 more devices of GPUType l4" in said.shortfall
        assert decided(4, None).services[0].unserved_rps > 0
        assert decided(5, None).status == "optimal"
    elif kind == "limit":
        assert "held by limit of GPUType l4; would help: spec.limit of GPUType l4 of 5 instead of 2" in said.shortfall
        assert "and 1 more device of GPUType l4" in said.shortfall
        assert decided(4, None, 5).services[0].unserved_rps > 0
        assert decided(5, None, 5).status == "optimal"
    else:
        assert "held by replicas.max; would help: replicas.max of 5 instead of 2" in said.shortfall
        assert decided(9, 4).services[0].unserved_rps > 0
        assert decided(9, 5).status == "optimal"


def test_a_shortage_hits_the_lowest_priority_and_names_it() -> None:
    inputs = fleet(
        [service("a", priority=1), service("b", priority=2), service("c", priority=3)],
        [rates_profile({"l4": [4, 1]})],
        MIXED_TYPES,
        inventory={"l4": 5},
        demand={"a": [8, 0], "b": [8, 0], "c": [8, 0]},
    )
    decided, _ = plan(inputs, None)
    assert [(s.key, s.unserved_rps) for s in decided.services] == [
        ("team/a", pytest.approx(4)),
        ("team/b", 0),
        ("team/c", 0),
    ]
    assert decided.services[0].shortfall is not None
    assert "team/a is short of 4 of 8" in decided.services[0].shortfall


@pytest.mark.parametrize("times", [1e3, 1e5])
def test_devices_serve_as_much_of_a_demand_beyond_all_measure_as_of_one_just_beyond(times: float) -> None:
    """Somebody types a rate with some zeros too many: what runs goes on to serve, and no lower priority gets it."""

    def planned(rps: float) -> Plan:
        return plan(
            fleet(
                [service("a", priority=2), service("b", priority=1)],
                [MIXED_RATES],
                MIXED_TYPES,
                inventory={"l4": 2, "h100": 2},
                demand={"a": [rps, 0], "b": [3, 0]},
                optimality_gap=0.01,
            ),
            None,
        )[0]

    near, far = (planned(rps).services[0] for rps in (60.0, 60.0 * times))
    assert near.replicas == far.replicas == {"l4": 2, "h100": 2}
    assert far.unserved_rps == pytest.approx(60 * times - (60 - near.unserved_rps))


def test_routes_are_kept_while_they_fit_and_replaced_when_they_do_not() -> None:
    def decided(rates: list[float], in_force: Plan | None) -> Plan:
        ample = {"l4": 9, "a100": 9, "h100": 9}
        return plan(fleet([service()], [MIXED_RATES], MIXED_TYPES, inventory=ample, demand={"s": rates}), in_force)[0]

    first = decided([9.5, 2], None)
    assert replicas(first, "s") == {"a100": 1, "l4": 2}
    nearby = decided([9.4, 2.01], first)
    assert nearby.services[0].routes == first.services[0].routes
    assert nearby.plan_id == first.plan_id
    shifted = decided([8.1, 2.9], first)
    assert replicas(shifted, "s") == {"a100": 1, "l4": 2}
    assert shifted.services[0].routes != first.services[0].routes
    assert shifted.plan_id != first.plan_id


def test_headroom_is_spread_evenly_over_the_variants() -> None:
    inputs = fleet(
        [service()],
        [MIXED_RATES],
        MIXED_TYPES,
        inventory={"l4": 9, "a100": 9, "h100": 9},
        demand={"s": [9.5, 2]},
    )
    routes = {(r.bucket, r.variant): r.fraction for r in plan(inputs, None)[0].services[0].routes}
    l4 = 9.5 * routes[0, "l4"] / 4 / 2
    a100 = 9.5 * routes[0, "a100"] / 10 + 2 * routes[1, "a100"] / 3
    assert l4 == pytest.approx(a100, rel=1e-4)


def test_a_bucket_without_demand_is_routed_to_variants_that_meet_its_objective() -> None:
    inputs = fleet(
        [service(replicas={"min": 3})],
        [MIXED_RATES],
        MIXED_TYPES,
        inventory={"l4": 2, "a100": 1},
        demand={"s": [9, 0]},
    )
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1, "l4": 2}
    assert [(r.variant, r.fraction) for r in decided.services[0].routes if r.bucket == 1] == [("a100", 1.0)]


def test_cost_per_million_tokens_follows_from_cost_rate_and_sizes() -> None:
    inputs = fleet(
        [service(traffic=mixed_traffic(5))], [MIXED_RATES], MIXED_TYPES, inventory={"l4": 9, "a100": 9, "h100": 9}
    )
    (one,) = plan(inputs, None)[0].services
    tokens_per_hour = 3600 * (4 * 500 + 1 * 3100)
    assert one.cost_per_million_tokens == pytest.approx(1e6 * one.cost_per_hour / tokens_per_hour)


def test_watts_are_the_peak_of_the_planned_replicas_of_known_types() -> None:
    types = [gpu_type("l4", 1.0, watts={"idle": 10, "peak": 72}), *MIXED_TYPES[1:]]
    inputs = fleet([service()], [MIXED_RATES], types, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 3]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1, "l4": 2}
    assert decided.watts == 144


def test_next_best_is_what_another_set_of_types_would_cost() -> None:
    inputs = fleet(
        [service()], [MIXED_RATES], MIXED_TYPES, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 0]}
    )
    (one,) = plan(inputs, None)[0].services
    assert one.replicas == {"l4": 2}
    assert one.next_best is not None
    assert one.next_best.replicas == {"a100": 1}
    assert one.next_best.cost_per_hour == 3.0


def test_the_same_replicas_with_an_idle_one_added_are_no_alternative() -> None:
    types = [*MIXED_TYPES, gpu_type("old", 0.1)]
    profile = rates_profile({"l4": [4, 0], "a100": [10, 3], "old": [0.01, 0]})
    inputs = fleet([service()], [profile], types, inventory={"l4": 9, "a100": 9, "old": 9}, demand={"s": [8, 0]})
    (one,) = plan(inputs, None)[0].services
    assert one.replicas == {"l4": 2}
    assert one.next_best is not None
    assert one.next_best.replicas == {"a100": 1}
