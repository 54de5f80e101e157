"""What holds for every plan, on random small fleets."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from llmfleet.api import Plan
from llmfleet.placement import PlanInputs, plan
from llmfleet.placement.checks import Catalogue, Prepared
from llmfleet.placement.rounds import reduce
from placement_testing.fleets import (
    brute_force,
    decisions,
    prepared,
    service,
    small_fleets,
    unserved_at,
    used_devices,
)

# To shrink a fleet takes longer than a test may: the time-out would hide what failed.
UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]
pure = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow], phases=UNSHRUNK)
costly = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow], phases=UNSHRUNK)


def counts_of(decided: Plan, one: Prepared) -> list[int]:
    planned = decided.service(one.key)
    assert planned is not None
    return [planned.replicas.get(variant.name, 0) for variant in one.variants]


@pure
@given(small_fleets())
def test_a_plan_never_uses_more_devices_than_inventory_and_limit_allow(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    limits = {t.metadata.name: t.spec.limit for t in inputs.gpu_types}
    for name, used in used_devices(decided).items():
        limit = limits[name]
        assert used <= inputs.inventory.get(name, 0)
        assert limit is None or used <= limit


@pure
@given(small_fleets())
def test_replica_bounds_hold_and_a_missing_minimum_is_reported(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    for key, one in prepared(inputs).items():
        planned = decided.service(key)
        assert planned is not None
        bounds = one.service.spec.replicas
        total = sum(planned.replicas.values())
        assert bounds.max is None or total <= bounds.max
        if total < bounds.min:
            assert planned.shortfall is not None
            assert f"short of {bounds.min - total} of replicas.min {bounds.min}" in planned.shortfall


@pure
@given(small_fleets())
def test_demand_is_covered_or_its_shortfall_is_reported_exactly(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    for key, one in prepared(inputs).items():
        planned = decided.service(key)
        assert planned is not None
        program = reduce(one, inputs.policy, None).program
        unreachable = sum(planned.demand) - float(program.rates.sum())
        least = unserved_at(program, counts_of(decided, one)) + unreachable
        assert abs(planned.unserved_rps - least) <= 1e-4
        routed = sum(route.fraction * planned.demand[route.bucket] for route in planned.routes)
        assert abs(sum(planned.demand) - routed - planned.unserved_rps) <= 1e-4
        assert (planned.shortfall is not None) == (
            planned.unserved_rps > 0
            or program.missing(tuple(counts_of(decided, one))) > 0
            or one.forbidden is not None  # said before there is any demand
        )
    assert (decided.status == "partial") == any(s.unserved_rps > 0 for s in decided.services)


@pure
@given(small_fleets())
def test_no_variant_is_routed_more_than_the_utilization_target_of_its_measured_capacity(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    for key, one in prepared(inputs).items():
        planned = decided.service(key)
        assert planned is not None
        for v, variant in enumerate(one.variants):
            load = 0.0
            for route in planned.routes:
                if route.variant == variant.name and planned.demand[route.bucket] > 0:
                    assert one.throughput[route.bucket, v] > 0
                    load += route.fraction * planned.demand[route.bucket] / one.throughput[route.bucket, v]
            capacity = inputs.policy.utilization_target * planned.replicas.get(variant.name, 0)
            assert load <= capacity * (1 + 1e-5)


@costly
@given(small_fleets(most_services=2))
def test_shortage_by_priority_and_cost_equal_brute_force(inputs: PlanInputs) -> None:
    best = brute_force(inputs)
    assume(best is not None)
    assert best is not None
    decided, _ = plan(inputs, None)
    parts = prepared(inputs)
    programs = {key: reduce(one, inputs.policy, None).program for key, one in parts.items()}
    rank: list[float] = []
    for level in sorted({program.priority for program in programs.values()}, reverse=True):
        members = [key for key, program in programs.items() if program.priority == level]
        counts = {key: counts_of(decided, parts[key]) for key in members}
        rank.append(round(sum(unserved_at(programs[key], counts[key]) for key in members), 4))
        rank.append(sum(programs[key].missing(tuple(counts[key])) for key in members))
    rank.append(round(decided.cost_per_hour, 6))
    np.testing.assert_allclose(rank, best, atol=2e-4)
    assert decided.gap_cost is not None
    assert decided.gap_cost <= 1e-6


@pure
@given(small_fleets(), st.sampled_from(["small", "big"]), st.integers(1, 3))
def test_at_a_proven_optimum_more_inventory_never_leaves_more_demand_unserved_by_priority(
    inputs: PlanInputs, name: str, more: int
) -> None:
    richer = inputs.model_copy(update={"inventory": {**inputs.inventory, name: inputs.inventory[name] + more}})
    before, after = plan(inputs, None)[0], plan(richer, None)[0]
    refused = {refusal.key for refusal in before.refusals}
    assume(not refused)
    assert before.stopped_by == after.stopped_by == "gap"
    priorities = {s.key: s.spec.priority for s in inputs.services}

    def shortage(decided: Plan) -> list[float]:
        rank: list[float] = []
        for level in sorted(set(priorities.values()), reverse=True):
            members = [s for s in decided.services if priorities[s.key] == level]
            rank.append(round(sum(s.unserved_rps for s in members), 3))
            rank.append(
                sum(
                    max(0, s.spec.replicas.min - sum(m.replicas.values()))
                    for s in inputs.services
                    for m in members
                    if m.key == s.key
                )
            )
        return rank

    assert shortage(after) <= shortage(before)


@pure
@given(small_fleets())
def test_a_higher_priority_gets_as_much_as_if_the_lower_ones_did_not_exist(inputs: PlanInputs) -> None:
    highest = max(s.spec.priority for s in inputs.services)
    alone = inputs.model_copy(update={"services": [s for s in inputs.services if s.spec.priority == highest]})
    together, apart = plan(inputs, None)[0], plan(alone, None)[0]
    keys = {s.key for s in apart.services}
    assert sum(s.unserved_rps for s in together.services if s.key in keys) <= (
        sum(s.unserved_rps for s in apart.services) + 1e-4
    )


@pure
@given(small_fleets(optimality_gap=0.01))
def test_equal_inputs_give_equal_plans_that_survive_json(inputs: PlanInputs) -> None:
    first, warm = plan(inputs, None)
    again, _ = plan(inputs.model_copy(update={"services": inputs.services[::-1]}), None)
    warmed, _ = plan(inputs, None, warm)
    assert decisions(first) == decisions(again) == decisions(warmed)
    assert Plan.model_validate_json(first.model_dump_json(by_alias=True)) == first


@pure
@given(small_fleets(optimality_gap=0.01))
def test_a_plan_is_kept_when_nothing_has_changed(inputs: PlanInputs) -> None:
    first, warm = plan(inputs, None)
    second, _ = plan(inputs, first, warm)
    third, _ = plan(inputs, second)
    assert first.plan_id == second.plan_id == third.plan_id
    assert [s.replicas for s in first.services] == [s.replicas for s in third.services]


@pure
@given(small_fleets(), st.sampled_from(["nowhere", "p0"]))
def test_a_refused_service_changes_nothing_for_the_others(inputs: PlanInputs, profile: str) -> None:
    unplannable = service("refused", profile=profile, priority=1000, gpu_types=["moon"], replicas={"min": 5})
    with_it = inputs.model_copy(update={"services": [unplannable, *inputs.services]})
    decided, without = plan(with_it, None)[0], plan(inputs, None)[0]
    assert "team/refused" in {refusal.key for refusal in decided.refusals}
    assert decided.services == without.services
    assert decided.plan_id == without.plan_id


@pure
@given(small_fleets())
def test_next_best_is_another_set_that_costs_no_less_and_serves_no_less(inputs: PlanInputs) -> None:
    decided, _ = plan(inputs, None)
    devices = Catalogue(inputs).devices
    used = used_devices(decided)
    for key, one in prepared(inputs).items():
        planned = decided.service(key)
        assert planned is not None
        if planned.next_best is None:
            continue
        other = planned.next_best.replicas
        assert set(other) != set(planned.replicas)
        program = reduce(one, inputs.policy, None).program
        counts = tuple(other.get(variant.name, 0) for variant in one.variants)
        unserved = unserved_at(program, counts) + sum(planned.demand) - float(program.rates.sum())
        assert unserved <= planned.unserved_rps + 1e-4
        for name, count in program.use(counts).items():
            own = program.use(tuple(counts_of(decided, one)))[name]
            assert count <= devices[name] - used.get(name, 0) + own
        if len(inputs.services) == 1:
            assert planned.next_best.cost_per_hour >= planned.cost_per_hour - 1e-6
