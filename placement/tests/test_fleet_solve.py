"""The whole fleet: taking apart, joint solves, time limits, warm states."""

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
from llmfleet.placement.components import components, greedy
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import Deadline
from llmfleet.placement.program import FleetProgram
from llmfleet.placement.rounds import reduce
from llmfleet.placement.service_program import ServiceProgram
from llmfleet.placement.solver import Pricer
from llmfleet.placement.solver.two_phase import Lexicographic
from llmfleet.placement.warm_state import Outcome
from placement_testing.fleets import (
    MIXED_RATES,
    MIXED_TYPES,
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
        [MIXED_RATES],
        MIXED_TYPES,
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
        inputs = fleet(pinned, [MIXED_RATES], MIXED_TYPES, inventory=inventory, demand=demand)
        programs = [reduce(one, inputs.policy, None).program for one in prepared(inputs).values()]
        devices = {"l4": 0, "a100": 0, "h100": 0} | inventory
        return [{program.key[-1] for program in group} for group in components(programs, devices)]

    assert sets(l4=9, a100=9, h100=9) == [{"a"}, {"b"}, {"c"}]
    assert sets(l4=9, a100=2, h100=9) == [{"a", "b"}, {"c"}]
    assert sets(l4=1, a100=9, h100=1) == [{"a"}, {"b"}, {"c"}]


def test_the_cheapest_mix_uses_cheap_devices_for_what_they_can_do() -> None:
    inputs = fleet(
        [service()], [MIXED_RATES], MIXED_TYPES, inventory={"l4": 9, "a100": 9, "h100": 9}, demand={"s": [8, 3]}
    )
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
        MIXED_TYPES,
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


def test_a_warm_state_answers_without_solving_again_and_gives_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = fleet(
        [service("a"), service("b")],
        [MIXED_RATES],
        MIXED_TYPES,
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
        return fleet([service(name) for name in demand], [MIXED_RATES], MIXED_TYPES, inventory=devices, demand=demand)

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
