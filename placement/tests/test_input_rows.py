"""Nobody knows how long an answer will be when its request comes: plans route prompts, not sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import BucketSizes, Plan, Route
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.rounds import reduce
from llmfleet.placement.workload import TraceSizes
from placement_testing.fleets import corners, fleet, gpu_type, point, prepared, profile, replicas, service

INPUTS, OUTPUTS = (512, 4096), (64, 256)
modest = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
rate = st.sampled_from([0.0, 0.001, 0.4, 3.0, 11.0])
does = st.sampled_from([0.0, 0.5, 2.0, 6.0])


def two_types(small: list[float], big: list[float], demand: list[float]) -> PlanInputs:
    """Requests per second of one replica by bucket, (512, 64), (512, 256), (4096, 64), (4096, 256); 0 misses."""
    table = profile(
        {
            name: [
                point(corner, rps or 1.0, ttft_ms=100.0 if rps else 2e3)
                for corner, rps in zip(corners(INPUTS, OUTPUTS), rates, strict=True)
            ]
            for name, rates in (("small", small), ("big", big))
        },
        inputs=INPUTS,
        outputs=OUTPUTS,
    )
    return fleet(
        [service()],
        [table],
        [gpu_type("small", 1.0), gpu_type("big", 2.5)],
        inventory={"small": 30, "big": 30},
        demand={"s": demand},
    )


def shares(decided: Plan, bucket: int) -> dict[str, float]:
    (one,) = decided.services
    return {route.variant: route.fraction for route in one.routes if route.bucket == bucket}


@modest
@given(*(st.tuples(does, does, does, does).map(list) for _ in range(2)), st.tuples(rate, rate, rate, rate).map(list))
def test_routes_of_an_input_bucket_do_not_depend_on_the_answer(
    small: list[float], big: list[float], demand: list[float]
) -> None:
    inputs = two_types(small, big, demand)
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    for one in decided.services:
        for row in (0, 2):
            served = [shares(decided, row + o) for o in (0, 1) if one.demand[row + o] > 0]
            served = [found for found in served if found]
            assert all(found == pytest.approx(served[0]) for found in served)


@modest
@given(st.tuples(rate, rate, rate, rate).filter(any), st.floats(0.0, 1.0))
def test_the_program_loads_a_replica_as_what_arrives_does(demand: tuple[float, ...], share: float) -> None:
    inputs = two_types([4.0, 2.0, 1.0, 0.5], [9.0, 6.0, 3.0, 2.0], list(demand))
    (one,) = prepared(inputs).values()
    item = reduce(one, inputs.policy, None)
    assert item.program.rates.sum() == pytest.approx(sum(demand))
    for v in range(2):
        arriving = np.divide(demand, one.throughput[:, v]).sum()
        assert share * (item.program.rates / item.program.throughput[:, v]).sum() == pytest.approx(share * arriving)


def test_a_type_that_misses_many_answers_of_an_input_bucket_gets_none_of_it() -> None:
    decided, _ = plan(two_types([6.0, 0.0, 6.0, 6.0], [6.0, 6.0, 6.0, 6.0], [5.0, 5.0, 5.0, 5.0]), None)
    assert shares(decided, 0) == shares(decided, 1) == {"big": 1.0}
    assert shares(decided, 2) == shares(decided, 3) == {"small": 1.0}


def test_a_rare_few_go_along_and_count_as_missed() -> None:
    inputs = two_types([6.0, 0.0, 6.0, 6.0], [6.0, 6.0, 6.0, 6.0], [2.0, 0.02, 0.0, 0.0])
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert replicas(decided, "s") == {"small": 1}
    (one,) = decided.services
    assert one.predicted is not None
    assert one.predicted.ttft_attainment == pytest.approx(2.0 / 2.02, abs=1e-4)
    often, _ = plan(two_types([6.0, 0.0, 6.0, 6.0], [6.0, 6.0, 6.0, 6.0], [2.0, 0.08, 0.0, 0.0]), None)
    assert replicas(often, "s") == {"big": 1}


def test_a_rare_few_that_nobody_keeps_the_objective_for_are_served_as_well_and_count_as_missed() -> None:
    inputs = two_types([6.0, 0.0, 6.0, 6.0], [6.0, 0.0, 6.0, 6.0], [2.0, 0.02, 0.0, 0.0])
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    (one,) = decided.services
    assert one.unserved_rps == 0
    assert one.predicted is not None
    assert one.predicted.ttft_attainment == pytest.approx(2.0 / 2.02, abs=1e-4)
    often, _ = plan(two_types([6.0, 0.0, 6.0, 6.0], [6.0, 0.0, 6.0, 6.0], [2.0, 0.2, 0.0, 0.0]), None)
    assert often.services[0].unserved_rps == pytest.approx(0.2)


def test_a_rare_few_prompts_that_nobody_keeps_the_objective_for_do_not_make_a_plan_partial() -> None:
    inputs = two_types([6.0, 6.0, 0.0, 0.0], [6.0, 6.0, 0.0, 0.0], [2.0, 1.0, 0.04, 0.02])
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    (one,) = decided.services
    assert one.unserved_rps == 0
    assert decided.status == "optimal"
    assert one.predicted is not None
    assert one.predicted.ttft_attainment == pytest.approx(3.0 / 3.06, abs=1e-4)
    often, _ = plan(two_types([6.0, 6.0, 0.0, 0.0], [6.0, 6.0, 0.0, 0.0], [2.0, 1.0, 0.08, 0.02]), None)
    assert often.services[0].unserved_rps == pytest.approx(0.1)
    assert often.status == "partial"


def test_the_rarest_prompts_go_along_and_the_others_are_said_to_be_unserved() -> None:
    table = [6.0, 0.0, 0.0, 0.0]
    inputs = two_types(table, table, [3.0, 0.4, 0.03, 0.01])
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert decided.services[0].unserved_rps == pytest.approx(0.4)


def test_where_nobody_keeps_all_answers_most_are_served_and_the_others_said_to_be_unserved() -> None:
    inputs = two_types([6.0, 0.0, 6.0, 6.0], [0.0, 6.0, 6.0, 6.0], [5.0, 1.0, 0.0, 0.0])
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    (one,) = decided.services
    assert one.unserved_rps == pytest.approx(1.0)
    assert one.shortfall is not None
    assert "1 requests per second are of sizes that no variant serves" in one.shortfall
    assert shares(decided, 0) == {"small": 1.0}


def test_a_plan_that_tells_answers_apart_is_no_sound_one() -> None:
    inputs = two_types([6.0, 5.0, 3.0, 3.0], [9.0, 9.0, 9.0, 9.0], [5.0, 5.0, 5.0, 5.0])
    decided, _ = plan(inputs, None)
    (one,) = decided.services
    names = list(one.replicas)
    routes = [Route(bucket=b, variant=names[0], fraction=1.0) for b in (0, 2, 3)]
    routes += [Route(bucket=1, variant=names[0], fraction=0.5)]
    uneven = decided.model_copy(update={"services": [one.model_copy(update={"routes": routes})]})
    found = [one for one in violations(inputs, uneven) if one.constraint == "shares"]
    assert [violation.where for violation in found] == [f"team/s bucket 1 to {names[0]}"]


@modest
@given(
    st.dictionaries(st.tuples(st.integers(1, 4096), st.integers(1, 256)), st.integers(1, 400), min_size=1, max_size=8),
    st.sampled_from([0.3, 4.0, 20.0]),
)
def test_known_sizes_make_plans_cheaper_or_leave_them_and_both_are_sound(
    counts: dict[tuple[int, int], int], rps: float
) -> None:
    inputs = two_types([4.0, 2.0, 1.0, 0.5], [9.0, 6.0, 3.0, 2.0], [1.0] * 4)
    (one,) = inputs.profiles
    sizes = TraceSizes(counts, 1.0).by_bucket(one.spec.buckets)
    rates = [rps * part.requests / sum(counts.values()) for part in sizes]
    (demand,) = inputs.demand.values()
    costs = []
    for known in (None, sizes):
        asked = inputs.model_copy(
            update={"demand": {"team/s": demand.model_copy(update={"rps": rates, "sizes": known})}}
        )
        decided, _ = plan(asked, None)
        assert violations(asked, decided) == []
        costs.append(decided.cost_per_hour)
        assert decided.services[0].sizes == known
        other = decided.services[0].model_copy(update={"sizes": [BucketSizes()] * 4})
        found = violations(asked, decided.model_copy(update={"services": [other]}))
        assert ("demand", "team/s") in {(one.constraint, one.where) for one in found}
    assert costs[1] <= costs[0] * (1 + 1e-9)
