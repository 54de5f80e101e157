"""The whole fleet: taking apart, joint solves, time limits, stability, reasons."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmfleet.api import Plan
from llmfleet.placement import Demand, PlanInputs, plan, routes, violations
from llmfleet.placement.fleet import FleetSolver, Outcome, components, greedy
from llmfleet.placement.highs import Deadline
from llmfleet.placement.program import FleetProgram
from llmfleet.placement.rounds import reduce
from llmfleet.placement.service_program import ServiceProgram
from llmfleet.placement.solver import Pricer
from llmfleet.placement.solver.two_phase import Lexicographic
from placement_testing.fleets import (
    decisions,
    fleet,
    gpu_type,
    point,
    prepared,
    profile,
    rates_profile,
    replicas,
    service,
    unserved_at,
    used_devices,
)

TYPES = [gpu_type("l4", 1.0), gpu_type("a100", 3.0), gpu_type("h100", 5.5)]
MIXED = rates_profile({"l4": [4, 0], "a100": [10, 3], "h100": [20, 8]})


def expected(rps: float) -> dict[str, object]:
    sizes = [
        {"inputTokens": inputs, "outputTokens": 100, "share": share} for inputs, share in ((400, 4.0), (3000, 1.0))
    ]
    return {"mode": "expected", "requestsPerSecond": rps, "sizes": sizes}


def steps(*, after: int) -> Callable[[], float]:
    """A clock that stands still for some readings and is then far in the future."""
    readings = itertools.count()
    return lambda: 0.0 if next(readings) < after else 1e9


def no_program(*_: object, **__: object) -> None:
    raise AssertionError("a program was built where a division does")


def test_a_thousand_services_with_one_type_each_need_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FleetProgram, "__init__", no_program)
    monkeypatch.setattr(Pricer, "__init__", no_program)
    rng = random.Random(7)
    rates = {f"s{i:04}": [rng.uniform(0, 20), rng.uniform(0, 5)] for i in range(1000)}
    inputs = fleet(
        [service(name, gpuTypes=["a100"]) for name in rates],
        [MIXED],
        TYPES,
        inventory={"a100": 10_000},
        demand=rates,
        utilization_target=0.8,
    )
    decided, _ = plan(inputs, None)
    assert decided.status == "optimal"
    assert decided.gap_cost == 0
    for name, (short, long) in rates.items():
        assert replicas(decided, name) == {"a100": int(np.ceil((short / 10 + long / 3) / 0.8))}


def test_services_that_share_no_scarce_type_are_solved_apart() -> None:
    pinned = [service("a", gpuTypes=["l4", "a100"]), service("b", gpuTypes=["a100"]), service("c", gpuTypes=["h100"])]
    demand = {"a": [10, 0], "b": [10, 3], "c": [1, 1]}

    def sets(**inventory: int) -> list[set[str]]:
        inputs = fleet(pinned, [MIXED], TYPES, inventory=inventory, demand=demand)
        programs = [reduce(one, inputs.policy, None).program for one in prepared(inputs).values()]
        devices = {"l4": 0, "a100": 0, "h100": 0} | inventory
        return [{program.key[-1] for program in group} for group in components(programs, devices)]

    assert sets(l4=9, a100=9, h100=9) == [{"a"}, {"b"}, {"c"}]
    assert sets(l4=9, a100=2, h100=9) == [{"a", "b"}, {"c"}]
    assert sets(l4=1, a100=9, h100=1) == [{"a"}, {"b"}, {"c"}]


def test_the_cheapest_mix_uses_cheap_devices_for_what_they_can_do() -> None:
    inputs = fleet([service()], [MIXED], TYPES, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 3]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1, "l4": 2}
    assert {(r.bucket, r.variant, round(r.fraction, 6)) for r in decided.services[0].routes} == {
        (0, "l4", 1.0),
        (1, "a100", 1.0),
    }


def test_scarce_devices_go_where_they_save_most() -> None:
    """`b` would need a device twice as dear for want of an l4, `a` one three times as dear."""
    types = [gpu_type("l4", 1.0), gpu_type("a100", 3.0), gpu_type("h100", 2.0)]
    a = rates_profile({"l4": [4, 4], "a100": [4, 4]}, name="pa")
    b = rates_profile({"l4": [4, 4], "h100": [4, 4]}, name="pb")
    inputs = fleet(
        [service("a", profile="pa"), service("b", profile="pb")],
        [a, b],
        types,
        inventory={"l4": 1, "a100": 5, "h100": 5},
        demand={"a": [3, 0], "b": [3, 0]},
    )
    decided, _ = plan(inputs, None)
    assert replicas(decided, "a") == {"l4": 1}
    assert replicas(decided, "b") == {"h100": 1}
    assert decided.service("team/b").binding == ["inventory of GPUType l4"]  # type: ignore[union-attr]
    assert decided.service("team/a").binding == []  # type: ignore[union-attr]


def crowded(seed: int = 3, *, gap: float = 0.01, inventory: dict[str, int] | None = None) -> PlanInputs:
    rng = random.Random(seed)
    names = [f"s{i:02}" for i in range(30)]
    return fleet(
        [service(name, profile=f"p{i % 3}", priority=rng.choice([50, 100, 200])) for i, name in enumerate(names)],
        [
            rates_profile({"l4": [4, 0], "a100": [10, 3], "h100": [20, 8]}, name="p0"),
            rates_profile({"l4": [6, 1], "a100": [9, 4], "h100": [22, 7]}, name="p1"),
            rates_profile({"l4": [3, 1], "l4-tp2": [7, 3], "h100": [15, 9]}, name="p2"),
        ],
        TYPES,
        inventory=inventory or {"l4": 40, "a100": 14, "h100": 12},
        demand={name: [rng.uniform(0, 30), rng.uniform(0, 4)] for name in names},
        optimality_gap=gap,
        utilization_target=0.8,
    )


def test_thirty_services_short_of_devices_are_solved_jointly_within_the_asked_gap() -> None:
    inputs = crowded()
    decided, _ = plan(inputs, None)
    assert any("inventory of GPUType l4" in s.binding for s in decided.services)
    assert decided.stopped_by == "gap"
    assert decided.gap_cost is not None
    assert decided.gap_cost <= 0.01
    used = used_devices(decided)
    assert all(used[name] <= count for name, count in inputs.inventory.items())
    exact, _ = plan(crowded(gap=0.0), None)
    assert [round(s.unserved_rps, 3) for s in exact.services if s.unserved_rps] == [
        round(s.unserved_rps, 3) for s in decided.services if s.unserved_rps
    ]
    assert exact.cost_per_hour <= decided.cost_per_hour <= exact.cost_per_hour / 0.99 + 1e-6


def test_a_joint_solve_is_deterministic_and_keeps_its_own_plan() -> None:
    inputs = crowded()
    first, warm = plan(inputs, None)
    assert decisions(plan(inputs, None)[0]) == decisions(first)
    assert plan(inputs, first, warm)[0].plan_id == first.plan_id
    assert plan(inputs, first)[0].plan_id == first.plan_id


def test_a_service_that_changes_is_put_into_the_solved_fleet_and_the_plan_is_as_good_as_one_from_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = crowded(inventory={"l4": 40, "a100": 60, "h100": 60})
    in_force, warm = plan(inputs, None)
    for _ in range(2):
        in_force, warm = plan(inputs, in_force, warm)
    changed = inputs.model_copy(
        update={"demand": {**inputs.demand, "team/s05": Demand(rps=[2 * r for r in inputs.demand["team/s05"].rps])}}
    )
    cold, _ = plan(changed, in_force)
    monkeypatch.setattr(Lexicographic, "solve", no_program)
    warmed, _ = plan(changed, in_force, warm)
    assert replicas(warmed, "s05") != replicas(in_force, "s05")
    assert warmed.status == cold.status == "optimal"
    assert warmed.bound is not None
    assert cold.bound is not None
    assert max(warmed.bound, cold.bound) <= min(warmed.cost_per_hour, cold.cost_per_hour) * 1.02
    assert violations(changed, warmed, in_force) == []


def test_services_of_which_nothing_is_asked_anew_are_not_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = crowded(inventory={"l4": 40, "a100": 60, "h100": 60})
    in_force, warm = plan(inputs, None)
    for _ in range(4):
        in_force, warm = plan(inputs, in_force, warm)
    more = Demand(rps=[1.05 * rate for rate in inputs.demand["team/s05"].rps])
    priced: set[str] = set()
    price = Pricer.price

    def counted(self: Pricer, *arguments: Any, **options: Any) -> float:
        priced.add(self.service.key)
        return price(self, *arguments, **options)

    monkeypatch.setattr(Pricer, "price", counted)
    plan(inputs.model_copy(update={"demand": {**inputs.demand, "team/s05": more}}), in_force, warm)
    assert priced == {"team/s05"}


def test_a_warm_state_that_was_used_before_costs_only_time() -> None:
    inputs = crowded(inventory={"l4": 40, "a100": 30, "h100": 20})
    in_force, warm = plan(inputs, None)
    once, _ = plan(inputs, in_force, warm)
    twice, _ = plan(inputs, in_force, warm)
    assert once.plan_id == twice.plan_id == in_force.plan_id


def test_without_time_the_plan_in_force_stays_if_it_still_serves() -> None:
    inputs = crowded(inventory={"l4": 60, "a100": 30, "h100": 20})
    in_force, _ = plan(inputs, None)
    rushed, _ = plan(inputs, in_force, clock=steps(after=1))
    assert [s.replicas for s in rushed.services] == [s.replicas for s in in_force.services]
    assert rushed.stopped_by == "time_limit"
    assert rushed.status == "feasible"
    assert rushed.gap_cost is None


def test_without_time_and_without_a_plan_in_force_there_is_still_a_plan_that_fits() -> None:
    inputs = crowded(inventory={"l4": 60, "a100": 30, "h100": 20})
    rushed, _ = plan(inputs, None, clock=steps(after=1))
    best, _ = plan(inputs, None)
    assert rushed.stopped_by == "time_limit"
    used = used_devices(rushed)
    assert all(used[name] <= count for name, count in inputs.inventory.items())
    assert sum(s.unserved_rps for s in rushed.services) <= 0.2 * sum(s.demand_rps for s in rushed.services)
    assert best.cost_per_hour > 0


@pytest.mark.parametrize("after", [3, 40, 100, 200])
def test_a_solve_that_is_cut_short_is_never_worse_than_the_plan_in_force(after: int) -> None:
    inputs = crowded()
    in_force, _ = plan(crowded(seed=4), None)
    rushed, _ = plan(inputs, in_force, clock=steps(after=after))
    assert unserved_by_priority(rushed, inputs) <= unserved_by_priority(in_force, inputs)


def unserved_by_priority(decided: Plan, inputs: PlanInputs) -> list[float]:
    """Requests per second that a plan's replicas leave unserved at the demand of the inputs, highest first."""
    by_level: dict[int, float] = {}
    for key, one in prepared(inputs).items():
        planned = decided.service(key)
        assert planned is not None
        counts = [planned.replicas.get(variant.name, 0) for variant in one.variants]
        level = one.service.spec.priority
        unserved = unserved_at(reduce(one, inputs.policy, None).program, counts)
        by_level[level] = by_level.get(level, 0.0) + unserved
    return [round(by_level[level], 3) for level in sorted(by_level, reverse=True)]


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


def test_without_demand_the_fewest_replicas_are_the_cheapest_ones() -> None:
    ample = {"l4": 9, "a100": 9, "h100": 9}
    idle, _ = plan(fleet([service()], [MIXED], TYPES, inventory=ample), None)
    assert replicas(idle, "s") == {}
    assert idle.status == "optimal"
    assert idle.services[0].cost_per_million_tokens is None
    kept, _ = plan(fleet([service(replicas={"min": 2})], [MIXED], TYPES, inventory=ample), None)
    assert replicas(kept, "s") == {"l4": 2}
    assert {(r.bucket, r.variant) for r in kept.services[0].routes} == {(0, "l4")}


def test_replicas_min_is_not_filled_up_with_variants_that_are_too_slow() -> None:
    slow_and_cheap = rates_profile({"l4": [0, 0], "h100": [4, 1]})
    for demand in ({}, {"s": [2, 0]}):
        inputs = fleet(
            [service(replicas={"min": 3})], [slow_and_cheap], TYPES, inventory={"l4": 9, "h100": 9}, demand=demand
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
    inputs = fleet([service()], [profile], TYPES, inventory={"l4": 9, "h100": 9}, demand={"s": [rate, 0]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"l4": 1}
    assert decided.status == "optimal"


def test_expected_traffic_counts_over_what_was_observed_and_a_guess_does_not() -> None:
    ample = {"l4": 9, "a100": 9, "h100": 9}
    insists = fleet([service(traffic=expected(4))], [MIXED], TYPES, inventory=ample, demand={"s": [1, 0]})
    guesses = fleet(
        [service(traffic=expected(4) | {"mode": "observe"})], [MIXED], TYPES, inventory=ample, demand={"s": [1, 0]}
    )
    assert plan(insists, None)[0].services[0].demand == pytest.approx([3.2, 0.8])
    assert plan(guesses, None)[0].services[0].demand == [1, 0]


def test_a_limit_binds_where_it_is_wanted_and_its_name_is_said() -> None:
    types = [gpu_type("l4", 1.0, limit=1), *TYPES[1:]]
    inputs = fleet([service()], [MIXED], types, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 0]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1}
    assert decided.services[0].binding == ["limit of GPUType l4"]
    above = [gpu_type("l4", 1.0, limit=5), *TYPES[1:]]
    fewer = fleet([service()], [MIXED], above, inventory={"l4": 1, "a100": 9, "h100": 9}, demand={"s": [8, 0]})
    assert plan(fewer, None)[0].services[0].binding == ["inventory of GPUType l4"]
    unlimited = fleet([service()], [MIXED], TYPES, inventory={"l4": 2, "a100": 9, "h100": 9}, demand={"s": [8, 0]})
    assert plan(unlimited, None)[0].services[0].binding == []


def test_replica_bounds_bind_in_words() -> None:
    ample = {"l4": 9, "a100": 9, "h100": 9}
    few, _ = plan(fleet([service(replicas={"max": 1})], [MIXED], TYPES, inventory=ample, demand={"s": [14, 0]}), None)
    assert replicas(few, "s") == {"h100": 1}
    assert few.services[0].binding == ["replicas.max"]
    many, _ = plan(fleet([service(replicas={"min": 3})], [MIXED], TYPES, inventory=ample, demand={"s": [4, 0]}), None)
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
        TYPES,
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
                [MIXED],
                TYPES,
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
        return plan(fleet([service()], [MIXED], TYPES, inventory=ample, demand={"s": rates}), in_force)[0]

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
        [MIXED],
        TYPES,
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
        [MIXED],
        TYPES,
        inventory={"l4": 2, "a100": 1},
        demand={"s": [9, 0]},
    )
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1, "l4": 2}
    assert [(r.variant, r.fraction) for r in decided.services[0].routes if r.bucket == 1] == [("a100", 1.0)]


def test_cost_per_million_tokens_follows_from_cost_rate_and_sizes() -> None:
    inputs = fleet([service(traffic=expected(5))], [MIXED], TYPES, inventory={"l4": 9, "a100": 9, "h100": 9})
    (one,) = plan(inputs, None)[0].services
    tokens_per_hour = 3600 * (4 * 500 + 1 * 3100)
    assert one.cost_per_million_tokens == pytest.approx(1e6 * one.cost_per_hour / tokens_per_hour)


def test_watts_are_the_peak_of_the_planned_replicas_of_known_types() -> None:
    types = [gpu_type("l4", 1.0, watts={"idle": 10, "peak": 72}), *TYPES[1:]]
    inputs = fleet([service()], [MIXED], types, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 3]})
    decided, _ = plan(inputs, None)
    assert replicas(decided, "s") == {"a100": 1, "l4": 2}
    assert decided.watts == 144


def test_next_best_is_what_another_set_of_types_would_cost() -> None:
    inputs = fleet([service()], [MIXED], TYPES, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 0]})
    (one,) = plan(inputs, None)[0].services
    assert one.replicas == {"l4": 2}
    assert one.next_best is not None
    assert one.next_best.replicas == {"a100": 1}
    assert one.next_best.cost_per_hour == 3.0


def test_the_same_replicas_with_an_idle_one_added_are_no_alternative() -> None:
    types = [*TYPES, gpu_type("old", 0.1)]
    profile = rates_profile({"l4": [4, 0], "a100": [10, 3], "old": [0.01, 0]})
    inputs = fleet([service()], [profile], types, inventory={"l4": 9, "a100": 9, "old": 9}, demand={"s": [8, 0]})
    (one,) = plan(inputs, None)[0].services
    assert one.replicas == {"l4": 2}
    assert one.next_best is not None
    assert one.next_best.replicas == {"a100": 1}


def test_a_warm_state_answers_without_solving_again_and_gives_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = fleet(
        [service("a"), service("b")],
        [MIXED],
        TYPES,
        inventory={"l4": 90, "a100": 90, "h100": 90},
        demand={"a": [9, 3], "b": [30, 1]},
    )
    cold, warm = plan(inputs, None)
    monkeypatch.setattr(FleetProgram, "__init__", no_program)
    monkeypatch.setattr(FleetSolver, "_solve_alone", no_program)
    warmed, _ = plan(inputs, None, warm)
    assert decisions(warmed) == decisions(cold)
    with pytest.raises(AssertionError):
        plan(inputs, None)


def test_a_fleet_that_stays_as_it_is_asks_no_solver_and_one_changed_service_only_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def demanding(a: float) -> PlanInputs:
        devices = {"l4": 90, "a100": 90, "h100": 90}
        demand = {"a": [a, 3.0], "b": [30.0, 1.0], "c": [2.0, 0.0]}
        return fleet([service(name) for name in demand], [MIXED], TYPES, inventory=devices, demand=demand)

    first, warm = plan(demanding(9), None)
    second, warm = plan(demanding(9), first, warm)
    asked: list[str] = []
    solve_alone = FleetSolver._solve_alone

    def counted(self: FleetSolver, program: ServiceProgram, devices: Mapping[str, float]) -> Outcome:
        asked.append(program.key)
        return solve_alone(self, program, devices)

    monkeypatch.setattr(FleetSolver, "_solve_alone", counted)
    with monkeypatch.context() as still:
        still.setattr(routes, "minimise", no_program)
        third, warm = plan(demanding(9), second, warm)
    assert third.plan_id == first.plan_id
    assert asked == []
    fourth, _ = plan(demanding(50), third, warm)
    assert replicas(fourth, "a") != replicas(first, "a")
    assert set(asked) == {"team/a"}


def program(rates: list[float], throughput: list[list[float]], **bounds: int | None) -> ServiceProgram:
    variants = len(throughput[0])
    return ServiceProgram(
        key="team/s",
        priority=100,
        rates=np.array(rates),
        throughput=np.array(throughput),
        cost=np.arange(1.0, variants + 1),
        devices=(1,) * variants,
        types=tuple("abc"[:variants]),
        minimum=bounds.get("minimum") or 0,
        maximum=bounds.get("maximum"),
    )


def test_the_joint_program_itself_serves_the_higher_priority_first() -> None:
    low = replace(program([8.0], [[4.0]]), key="team/low", priority=1)
    high = replace(program([8.0], [[4.0]]), key="team/high", priority=2)
    deadline = Deadline(lambda: 0.0, 60.0)
    for order in ([low, high], [high, low]):
        solution = FleetProgram(order, {"a": 3}).lexicographic(gap=0.0, deadline=deadline)
        assert solution is not None
        assert solution.replicas == {"team/low": (1,), "team/high": (2,)}
        assert solution.bound == pytest.approx(3.0)


def test_greedy_serves_all_within_devices_and_bounds_without_a_solver() -> None:
    two = program([6.0, 2.0], [[4, 8], [0, 2]])
    assert greedy(two, {"a": 9, "b": 9}) == (2, 1)
    assert greedy(two, {"a": 1, "b": 9}) == (1, 2)
    assert greedy(program([1.0], [[1, 1]], minimum=3), {"a": 2, "b": 9}) == (2, 1)
    assert sum(greedy(program([9.0], [[1, 1]], maximum=3), {"a": 9, "b": 9})) == 3


def test_the_largest_and_smallest_figures_that_are_accepted_make_a_finite_plan() -> None:
    """One service's absurd figures must not cost the others their plan."""
    tokens, most, least = 16_777_216, 1e6, 1e-6
    corner = (tokens, tokens)
    absurd = profile(
        {"l4": [point(corner, least)], "h100": [point(corner, most, concurrency=1)]},
        inputs=[tokens],
        outputs=[tokens],
        weightsGib=1e-300,
        kvKibPerToken=least,
        parametersBillion=1e-300,
    )
    watts = {"idle": 0, "peak": most}
    types = [gpu_type("l4", most, memory_gib=1e6, watts=watts), gpu_type("h100", 1e-300, memory_gib=1e6, watts=watts)]
    sizes = [{"inputTokens": 1, "outputTokens": 1, "share": share} for share in (most, 1e-300)]
    for rate in (most, 1e-300, 0.0):
        traffic = {"mode": "expected", "requestsPerSecond": rate, "sizes": sizes}
        inputs = fleet(
            [service("absurd", traffic=traffic), service("sound", profile="sound")],
            [absurd, rates_profile({"l4": [4, 1]}, name="sound")],
            types,
            inventory={"l4": 1_000_000, "h100": 2},
            demand={"sound": [1, 0]},
            utilization_target=0.01,
        )
        decided, _ = plan(inputs, None)
        assert replicas(decided, "sound") == {"l4": 25}
        assert decided.service("team/absurd") is not None
