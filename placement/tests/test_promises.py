"""What a plan promises it keeps, by the model: small pools, bursts, mixes, predictions, and a load that wavers."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfleet.api import Correction, CorrectionBin, ModelProfile, Plan, SeenRange
from llmfleet.placement import Demand, PlanInputs, plan, violations
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.roofline import Roofline
from llmfleet.placement.workload import TraceSizes
from placement_testing.fleets import Point, corners, fleet, gpu_type, profile, replicas, service
from placement_testing.shapes import LLAMA_8B

SHAPE = architecture_of(LLAMA_8B)
INPUTS, OUTPUTS = (512, 4096), (64, 256)
L4, A100 = "l4", "a100-sxm-80gb"
TYPES = [gpu_type(L4, 0.7, memory_gib=24), gpu_type(A100, 2.4, memory_gib=80)]
OBJECTIVE = {"ttft": {"milliseconds": 3000}, "tpot": {"milliseconds": 80}}


def measured(name: str) -> list[Point]:
    """Runs as the roofline of the type would have them, with a little scatter."""
    roofline = Roofline(SHAPE, CATALOGUE[name])
    points = []
    for inputs, outputs in corners(INPUTS, OUTPUTS):
        for concurrency in (1, 4, 16, 64):
            seen = roofline.predict(inputs, outputs, concurrency)
            ttft_ms, tpot_ms = float(seen.ttft_ms), float(seen.tpot_ms)
            points.append(
                {
                    "inputTokens": inputs,
                    "outputTokens": outputs,
                    "concurrency": concurrency,
                    "requests": 200,
                    "requestsPerSecond": 1e3 * concurrency / (ttft_ms + (outputs - 1) * tpot_ms),
                    "ttftMs": {"p50": ttft_ms, **dict.fromkeys(("p90", "p95", "p99", "max"), 1.4 * ttft_ms)},
                    "tpotMs": {"p50": tpot_ms, **dict.fromkeys(("p90", "p95", "p99", "max"), 1.1 * tpot_ms)},
                }
            )
    return points


PROFILE = profile({name: measured(name) for name in (L4, A100)}, inputs=INPUTS, outputs=OUTPUTS)


def inputs_of(
    demand: Sequence[float], *, burstiness: float = 1.0, objective: dict[str, Any] = OBJECTIVE, **policy: Any
) -> PlanInputs:
    """`demand`: by bucket; (512, 64), (512, 256), (4096, 64), (4096, 256)."""
    return fleet(
        [service(objective=objective, burstiness=burstiness)],
        [PROFILE],
        TYPES,
        inventory={L4: 400, A100: 400},
        demand={"s": demand},
        **policy,
    )


def decided(inputs: PlanInputs, previous: Plan | None = None) -> Plan:
    found, _ = plan(inputs, previous)
    assert violations(inputs, found, previous) == []
    return found


rate = st.sampled_from([0.0, 0.02, 0.4, 3.0, 11.0])
modest = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


STRICT = {"ttft": {"milliseconds": 3000, "percentile": 99}, "tpot": {"milliseconds": 60, "percentile": 99}}


@modest
@given(
    st.tuples(rate, rate, rate, rate),
    st.sampled_from([0.0, 1.0, 6.0]),
    st.sampled_from([0.8, 1.0]),
    st.sampled_from([OBJECTIVE, STRICT]),
)
def test_every_pool_of_every_plan_keeps_the_objective_by_the_model(
    demand: tuple[float, ...], burstiness: float, target: float, objective: dict[str, Any]
) -> None:
    found = decided(inputs_of(demand, burstiness=burstiness, objective=objective, utilization_target=target))
    (one,) = found.services
    if objective is STRICT:  # then no pool may keep long prompts beside short answers
        assert (one.unserved_rps > 0) == (one.shortfall is not None)
    else:
        assert one.unserved_rps == 0
    percentile = objective["tpot"].get("percentile", 95) / 100
    for variant in one.variants:
        assert variant.predicted is not None
        assert min(variant.predicted.ttft_attainment, variant.predicted.tpot_attainment) >= percentile - 1e-5
        assert variant.predicted.ttft_ms <= objective["ttft"]["milliseconds"] * 1.01
        assert variant.predicted.tpot_ms <= objective["tpot"]["milliseconds"] * 1.01
    assert (one.predicted is None) == (not any(demand))


def test_a_pool_of_one_is_not_promised_what_each_of_twenty_holds() -> None:
    def held(scale: float, burstiness: float = 1.0) -> float:
        """Requests per second for each replica of one type."""
        inputs = inputs_of([scale, 0, 0, 0], burstiness=burstiness, utilization_target=1.0)
        only = inputs.services[0].spec.model_copy(update={"gpu_types": [A100]})
        narrowed = inputs.model_copy(update={"services": [inputs.services[0].model_copy(update={"spec": only})]})
        return scale / replicas(decided(narrowed), "s")[A100]

    def best_of_one(burstiness: float) -> float:
        rates = [0.2 * step for step in range(1, 150)]
        return max(scale for scale in rates if held(scale, burstiness) == scale)

    many = held(400.0)
    assert best_of_one(1.0) < many
    assert best_of_one(6.0) < 0.95 * best_of_one(1.0)


def test_burstier_traffic_never_costs_less() -> None:
    costs = [decided(inputs_of([3, 1, 1, 0.5], burstiness=cv2)).cost_per_hour for cv2 in (0.0, 1.0, 4.0, 16.0)]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]
    beyond = decided(inputs_of([3, 1, 1, 0.5], burstiness=100.0))
    assert beyond.cost_per_hour == decided(inputs_of([3, 1, 1, 0.5], burstiness=10.0)).cost_per_hour
    assert any("burstiness 100 is planned as 10" in warning for warning in beyond.services[0].warnings)


def test_without_further_rounds_or_devices_what_a_pool_does_not_hold_is_unserved_and_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixed = inputs_of([20, 0.1, 1.0, 0.1], burstiness=6.0, utilization_target=1.0)
    assert decided(mixed).status == "optimal"
    monkeypatch.setattr("llmfleet.placement.rounds.ROUNDS", 1)
    hurried = decided(mixed.model_copy(update={"inventory": {A100: replicas(decided(mixed), "s")[A100] - 1}}))
    assert hurried.status == "partial"
    assert hurried.services[0].shortfall is not None
    assert hurried.services[0].unserved_rps > 0


def test_sizes_that_waver_move_no_more_than_the_first_step() -> None:
    chance, buckets = random.Random(7), PROFILE.spec.buckets
    plans: list[Plan] = []
    for _ in range(15):
        counts = Counter(
            (min(4096, int(chance.lognormvariate(6.8, 1.0)) + 1), min(256, int(chance.lognormvariate(4.6, 0.7)) + 1))
            for _ in range(1000)
        )
        sizes = TraceSizes(counts, 1.0).by_bucket(buckets)
        rps = [31.0 * chance.uniform(0.955, 1.045) * one.requests / 1000 for one in sizes]
        inputs = inputs_of(rps, utilization_target=0.9, optimality_gap=0.01, switching_cost_fraction=0.02)
        inputs = inputs.model_copy(update={"demand": {"team/s": Demand(rps=rps, sizes=sizes)}})
        plans.append(decided(inputs, plans[-1] if plans else None))
    assert sum(a.services[0].replicas != b.services[0].replicas for a, b in itertools.pairwise(plans)) <= 1


def test_a_load_that_wavers_within_the_headroom_moves_nothing() -> None:
    """50 windows within 4.5 % of a load, around many loads: at most the one step down to a fleet that has headroom."""
    chance = random.Random(5)
    moved = []
    for base in (1.0, 2.7, 9.0, 31.0):
        plans: list[Plan] = []
        for _ in range(50):
            demand = [base * share * chance.uniform(0.955, 1.045) for share in (3, 1, 1, 0.5)]
            inputs = inputs_of(demand, utilization_target=0.9, optimality_gap=0.01, switching_cost_fraction=0.02)
            plans.append(decided(inputs, plans[-1] if plans else None))
        moved.append(sum(a.services[0].replicas != b.services[0].replicas for a, b in itertools.pairwise(plans)))
    assert max(moved) <= 1


def one_type(rps: float, previous: Plan | None, target: float = 0.9) -> Plan:
    inputs = inputs_of([rps, 0, 0, 0], utilization_target=target)
    only = inputs.services[0].spec.model_copy(update={"gpu_types": [L4]})
    return decided(
        inputs.model_copy(update={"services": [inputs.services[0].model_copy(update={"spec": only})]}), previous
    )


@modest
@given(st.floats(0.5, 60), st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_within_a_tenth_replicas_change_at_most_once_and_downwards(base: float, wavering: list[float]) -> None:
    """All demands lie between base and base / 0.9."""
    plans = [one_type(base / (1 - 0.099 * where), None) for where in wavering[:1]]
    for where in wavering[1:]:
        plans.append(one_type(base / (1 - 0.099 * where), plans[-1]))
    counts = [replicas(one, "s")[L4] for one in plans]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) <= 2


def test_the_plan_in_force_stays_up_to_all_that_it_holds_and_then_gets_its_headroom_back() -> None:
    small = one_type(20.0, None)
    count = replicas(small, "s")[L4]
    fewer = [rps for rps in (18.6, 18.8, 19.0, 19.2, 19.4) if replicas(one_type(rps, None), "s")[L4] < count]
    assert fewer
    assert replicas(one_type(max(fewer), small), "s")[L4] == count
    assert replicas(one_type(14.0, small), "s") == replicas(one_type(14.0, None), "s")
    most = max(
        rps for rps in [20 + 0.1 * step for step in range(80)] if replicas(one_type(rps, small), "s")[L4] == count
    )
    beyond = one_type(most + 0.1, small)
    assert replicas(beyond, "s")[L4] > count
    assert replicas(one_type(most, None), "s")[L4] > count


def test_a_type_that_was_never_measured_is_planned_on_a_prediction_and_says_so() -> None:
    known = PROFILE.model_copy(
        update={
            "spec": PROFILE.spec.model_copy(
                update={
                    "architecture": SHAPE,
                    "measurements": [one for one in PROFILE.spec.measurements if one.gpu_type == A100],
                }
            )
        }
    )
    loose = {"ttft": {"milliseconds": 10_000}, "tpot": {"milliseconds": 200}}
    inputs = inputs_of([3, 1, 0, 0], objective=loose).model_copy(update={"profiles": [known]})
    cheap = decided(inputs).services[0]
    (variant,) = cheap.variants
    assert variant.gpu_type == L4
    assert variant.predicted is not None
    assert variant.predicted.source == "roofline"
    assert cheap.predicted is not None
    assert cheap.predicted.source == "roofline"
    assert any("l4 was not measured" in warning for warning in cheap.warnings)
    counted = replicas(decided(inputs_of([3, 1, 0, 0], objective=loose)), "s")
    assert variant.replicas >= counted.get(L4, 0)
    without = known.model_copy(update={"spec": known.spec.model_copy(update={"architecture": None})})
    assert list(replicas(decided(inputs.model_copy(update={"profiles": [without]})), "s")) == [A100]


def corrected(log_ratio: float) -> ModelProfile:
    bins = [CorrectionBin(concurrency=n, log_ratio=log_ratio, deviation=0.0, weight=1000, at=0.0) for n in (1, 8, 64)]
    learned = [
        Correction(
            gpu_type=name,
            tensor_parallel=1,
            pipeline_parallel=1,
            configuration="default",
            input_tokens=SeenRange(least=64, most=4096),
            output_tokens=SeenRange(least=16, most=256),
            ttft=bins,
            tpot=bins,
        )
        for name in (L4, A100)
    ]
    return PROFILE.model_copy(update={"status": PROFILE.status.model_copy(update={"corrections": learned})})


def test_engines_that_were_seen_to_be_slower_are_given_less_until_it_is_long_ago() -> None:
    inputs = inputs_of([30, 5, 1, 1])
    slower = inputs.model_copy(update={"profiles": [corrected(0.3)]})
    before, after = decided(inputs).cost_per_hour, decided(slower).cost_per_hour
    assert after > 1.1 * before
    forgotten = decided(slower.model_copy(update={"at": 60 * 86_400.0})).cost_per_hour
    assert forgotten == pytest.approx(before, rel=0.05)
