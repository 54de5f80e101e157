"""Rates from cumulative counts: restarts, silence, waking, decay, and the split over output buckets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.api import Buckets, DemandReport, LLMService, ServiceDemand, ServicePlan
from llmfleet.operator.demand import DemandEstimator

WINDOW_S = 60.0
EDGES = Buckets(input_tokens=[512, 4096], output_tokens=[128, 1024])
KEY = "ns/chat"


def llm_service(**traffic: Any) -> LLMService:
    spec = {
        "model": {"name": "org/model", "contextLength": 8192},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        "traffic": traffic,
    }
    return LLMService.parse({"metadata": {"name": "chat", "namespace": "ns"}, "spec": spec})


def service_plan(demand: list[float], edges: Buckets = EDGES) -> ServicePlan:
    return ServicePlan(
        namespace="ns",
        service="chat",
        buckets=edges,
        variants=[],
        routes=[],
        demand=demand,
        unserved_rps=0,
        cost_per_hour=0,
    )


def report(
    arrived: list[int],
    completed: list[int] | None = None,
    instance: str = "i",
    waiting: int = 0,
    running: int = 0,
    edges: Buckets = EDGES,
    uptime_s: float | None = None,
) -> DemandReport:
    counts = ServiceDemand(
        namespace="ns",
        service="chat",
        buckets=edges,
        arrived=arrived,
        completed=completed or [0] * edges.count,
        waiting=waiting,
        running=running,
    )
    return DemandReport(instance_id=instance, uptime_seconds=uptime_s, services=[counts])


def rates(
    estimator: DemandEstimator, service: LLMService | None = None, plan: ServicePlan | None = None
) -> list[float] | None:
    plans = {KEY: plan} if plan is not None else {}
    return estimator.estimate([service or llm_service()], {KEY: EDGES}, plans).get(KEY)


def total(estimator: DemandEstimator, **kwargs: Any) -> float:
    measured = rates(estimator, **kwargs)
    assert measured is not None
    return sum(measured)


def steady(estimator: DemandEstimator, per_s: float, until_s: float, start_s: float = 0.0) -> None:
    """One gateway, a request every 1/per_s seconds of the first input bucket, polled every five seconds."""
    at = start_s
    while at <= until_s:
        estimator.record({"gw": report([int(at * per_s), 0])}, at)
        at += 5


@given(st.floats(1, 50), st.integers(2, 30), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_a_steady_rate_is_measured_however_irregular_the_polls_are(
    per_s: float, polls: int, rng: random.Random
) -> None:
    estimator = DemandEstimator(WINDOW_S)
    times = [0.0, *sorted(rng.uniform(0, 600) for _ in range(polls)), 600.0, 660.0]
    for at in times:
        estimator.record({"gw": report([round(at * per_s), 0])}, at)
    assert total(estimator) == pytest.approx(per_s, rel=0.02, abs=0.02)


def test_reports_of_all_gateways_add_up() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 121, 10):
        estimator.record({"one": report([at, 0], instance="1"), "two": report([0, 2 * at], instance="2")}, at)
    measured = rates(estimator)
    assert measured is not None
    assert sum(measured[:2]) == pytest.approx(1.0)
    assert sum(measured[2:]) == pytest.approx(2.0)


def test_a_repeated_report_counts_nothing_twice() -> None:
    once, twice = DemandEstimator(WINDOW_S), DemandEstimator(WINDOW_S)
    for at in range(0, 121, 10):
        once.record({"gw": report([at, 0])}, at)
        for _ in range(3):
            twice.record({"gw": report([at, 0])}, at)
    assert rates(once) == rates(twice)


def test_a_gateway_restart_keeps_the_rate() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 301, 5):
        fresh = at > 200
        age_s = at - 200 if fresh else at
        counts = report([10 * age_s, 0], instance="new" if fresh else "old", uptime_s=age_s)
        estimator.record({"gw": counts}, at)
        if at > WINDOW_S:
            assert total(estimator) == pytest.approx(10, rel=0.15)


def test_a_rolling_replacement_of_gateways_keeps_the_rate() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 301, 5):
        name = "gw-old" if at <= 200 else "gw-new"
        age_s = at if at <= 200 else at - 200
        estimator.record({name: report([10 * age_s, 0], instance=name, uptime_s=age_s)}, at)
        if at > WINDOW_S:
            assert total(estimator) == pytest.approx(10, rel=0.15)


def test_while_no_gateway_answers_the_estimate_stays_as_it_is() -> None:
    estimator = DemandEstimator(WINDOW_S)
    steady(estimator, per_s=4, until_s=300)
    before = rates(estimator)
    for at in range(305, 30_000, 100):
        estimator.record({"gw": None}, at)
        estimator.record({}, at + 1)
    assert rates(estimator) == before
    assert total(estimator) == pytest.approx(4, rel=0.05)


def test_a_silent_gateway_keeps_its_rate_while_others_answer_until_it_is_no_longer_asked() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 121, 5):
        estimator.record({"one": report([at, 0], instance="1"), "two": report([3 * at, 0], instance="2")}, at)
    for at in range(125, 5000, 5):
        estimator.record({"one": report([at, 0], instance="1"), "two": None}, at)
        assert total(estimator) == pytest.approx(4, rel=0.05)
    for at in range(5000, 5100, 5):
        estimator.record({"one": report([at, 0], instance="1")}, at)
    assert total(estimator) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("away_s", [5, 30, 300])
def test_a_gateway_that_was_not_ready_for_a_moment_brings_no_spike_when_it_is_back(away_s: int) -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 10_000, 5):
        away = 5000 <= at < 5000 + away_s
        both = {"gw": report([at, 0], instance="1"), "idle": report([0, 0], instance="2")}
        estimator.record({name: counts for name, counts in both.items() if not (away and name == "gw")}, at)
        if at > WINDOW_S:
            assert total(estimator) <= 1.1
    assert total(estimator) == pytest.approx(1, rel=0.05)


def test_one_gateway_under_two_names_counts_once() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 121, 5):
        names = ["by-name", "by-address"] if at % 3 else ["by-address"]
        estimator.record({name: report([at, 0]) for name in names}, at)
    assert total(estimator) == pytest.approx(1, rel=0.05)
    for at in range(125, 300, 5):
        estimator.record({"by-name": None, "by-address": report([at, 0])}, at)
    assert total(estimator) == pytest.approx(1, rel=0.05)


def test_nothing_is_lost_when_a_silent_gateway_answers_again() -> None:
    estimator = DemandEstimator(WINDOW_S)
    steady(estimator, per_s=2, until_s=120)
    for at in range(125, 200, 5):
        estimator.record({"gw": None, "idle": report([0, 0], instance="2")}, at)
    estimator.record({"gw": report([400, 0]), "idle": report([0, 0], instance="2")}, 200)
    assert total(estimator) == pytest.approx(2, rel=0.05)


def test_a_long_silent_gateway_that_is_first_heard_of_brings_no_spike() -> None:
    """Its counts began long before; only what comes on top is a rate."""
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 100, 5):
        estimator.record({"idle": report([0, 0], instance="2"), "gw": None}, at)
    estimator.record({"idle": report([0, 0], instance="2"), "gw": report([1_000_000, 0])}, 100)
    assert total(estimator) == 0
    estimator.record({"idle": report([0, 0], instance="2"), "gw": report([1_000_060, 0])}, 105)
    assert total(estimator) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("uptime_s", [100_000, WINDOW_S + 1, None])
def test_an_old_gateway_that_appears_with_its_counts_brings_no_spike(uptime_s: float | None) -> None:
    """It was not Ready when the operator began to ask, so its address was not among those of the Service."""
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 100, 5):
        estimator.record({"idle": report([0, 0], instance="2", uptime_s=at)}, at)
    for at in range(100, 200, 5):
        late = report([1_000_000 + at - 100, 0], uptime_s=None if uptime_s is None else uptime_s + at - 100)
        estimator.record({"idle": report([0, 0], instance="2", uptime_s=at), "late": late}, at)
        assert total(estimator) <= 1.1
    assert total(estimator) == pytest.approx(1, rel=0.05)


def test_what_a_gateway_counted_since_it_started_within_the_window_is_demand() -> None:
    estimator = DemandEstimator(WINDOW_S)
    estimator.record({"gw": report([1200, 0], uptime_s=30)}, 1000)
    assert total(estimator) == pytest.approx(1200 / WINDOW_S)


def test_what_a_gateway_counted_while_none_was_asked_is_its_mean_rate_since_it_started() -> None:
    """Ten minutes without a round, in which the gateway was replaced: its rate is known, and so not read as zero."""
    estimator = DemandEstimator(WINDOW_S)
    estimator.record({"gw": report([0, 0], instance="old", uptime_s=500)}, 0)
    estimator.record({"gw": report([900, 0], instance="new", uptime_s=300)}, 600)
    assert total(estimator) == pytest.approx(3)


@given(st.integers(0, 2**32), st.integers(2, 4))
@settings(deadline=None)
def test_gateways_that_answer_in_turns_at_one_address_are_named_and_never_inflate_demand(
    seed: int, gateways: int
) -> None:
    """A Service with one IP: each question reaches any of them. Each gets a request a second."""
    rng = random.Random(seed)
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 600, 2):
        answering = rng.randrange(gateways)
        counts = report([at + 10_000 * answering, 0], instance=str(answering), uptime_s=at + 10_000 * answering)
        estimator.record({"vip": counts}, at)
        assert total(estimator) <= 1.1 * gateways
    assert estimator.shared == {"vip"}
    assert total(estimator) >= 0.5 * gateways
    estimator.record({"other": report([0, 0], instance="other", uptime_s=0)}, 600)
    assert estimator.shared == frozenset()


def test_a_long_request_at_a_gateway_that_answers_in_turns_holds_its_service_up() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 300, 2):
        busy = at % 4 == 0
        counts = report([1, 0], running=1, instance="busy") if busy else report([0, 0], instance="idle")
        estimator.record({"vip": counts}, at)
        if at > WINDOW_S:
            assert total(estimator) == pytest.approx(1 / WINDOW_S)


def test_a_gateway_that_restarts_at_its_address_shares_it_with_nobody() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 600, 5):
        estimator.record({"gw": report([at % 100, 0], instance=str(at // 100), uptime_s=at % 100)}, at)
        assert estimator.shared == frozenset()


def test_without_traffic_the_rate_decays_to_exactly_zero_within_a_window() -> None:
    estimator = DemandEstimator(WINDOW_S)
    steady(estimator, per_s=5, until_s=300)
    levels = []
    for at in range(305, 371, 5):
        estimator.record({"gw": report([1500, 0])}, at)
        levels.append(total(estimator))
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 0
    assert levels[-1] == 0


def test_the_first_waiting_request_wakes_a_service_and_holds_it_up() -> None:
    estimator = DemandEstimator(WINDOW_S)
    estimator.record({"gw": DemandReport(instance_id="i")}, 0)
    estimator.record({"gw": DemandReport(instance_id="i")}, 100)
    assert total(estimator) == 0
    for at in (105, 110, 400, 800):
        estimator.record({"gw": report([0, 1], waiting=1)}, at)
        measured = rates(estimator)
        assert measured is not None
        assert sum(measured[2:]) == pytest.approx(1 / WINDOW_S)
        assert sum(measured[:2]) == 0


def test_a_request_longer_than_the_window_keeps_its_service_up() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 1000, 5):
        estimator.record({"gw": report([1, 0], running=1)}, at)
    assert total(estimator) == pytest.approx(1 / WINDOW_S)
    estimator.record({"gw": report([1, 0], [1, 0, 0, 0])}, 1000)
    assert total(estimator) == 0


def test_after_a_restart_the_plan_stands_in_until_a_window_is_complete() -> None:
    estimator = DemandEstimator(WINDOW_S)
    plan = service_plan([3, 0, 0, 1])
    assert rates(estimator, plan=plan) == [3, 0, 0, 1]
    for at in (0, 30, 59):
        estimator.record({"gw": report([at, 0])}, at)
        assert rates(estimator, plan=plan) == [3, 0, 0, 1]
    estimator.record({"gw": report([60, 0])}, 60)
    assert total(estimator, plan=plan) == pytest.approx(1)


def test_more_load_than_the_plan_stood_in_for_is_believed_at_once() -> None:
    estimator = DemandEstimator(WINDOW_S)
    estimator.record({"gw": report([0, 0])}, 0)
    estimator.record({"gw": report([6000, 0])}, 20)
    assert total(estimator, plan=service_plan([3, 0, 0, 1])) == pytest.approx(100)


def test_the_traffic_specification_counts_until_a_window_was_measured() -> None:
    estimator = DemandEstimator(WINDOW_S)
    service = llm_service(requestsPerSecond=5, sizes=[{"inputTokens": 10, "outputTokens": 10}])
    estimator.record({"gw": DemandReport(instance_id="i")}, 0)
    estimator.record({"gw": DemandReport(instance_id="i")}, 100)
    assert rates(estimator, service=service) is None
    for at in range(105, 161, 5):
        estimator.record({"gw": report([at - 100, 0])}, at)
        assert rates(estimator, service=service) is None
    for at in range(165, 200, 5):
        estimator.record({"gw": report([at - 100, 0])}, at)
    assert total(estimator, service=service) == pytest.approx(1, rel=0.05)


def test_arrivals_are_split_over_output_buckets_as_requests_completed() -> None:
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 121, 10):
        estimator.record({"gw": report([4 * at, at], [3 * at, at, 0, at])}, at)
    measured = rates(estimator)
    assert measured == pytest.approx([3, 1, 0, 1], rel=0.01)


def test_without_completions_the_split_comes_from_the_plan_then_from_the_sizes_then_evenly() -> None:
    estimator = DemandEstimator(WINDOW_S)
    steady(estimator, per_s=4, until_s=200)
    service = llm_service(requestsPerSecond=1, sizes=[{"inputTokens": 10, "outputTokens": 1000}])
    assert rates(estimator, service, service_plan([3, 1, 0, 0])) == pytest.approx([3, 1, 0, 0])
    assert rates(estimator, service) == pytest.approx([0, 4, 0, 0])
    assert rates(estimator) == pytest.approx([2, 2, 0, 0])


def test_counts_of_other_edges_are_dropped_and_the_plan_is_carried_over() -> None:
    old = Buckets(input_tokens=[256], output_tokens=[128])
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 121, 10):
        estimator.record({"gw": report([at * 9], edges=old)}, at)
    assert total(estimator) == 0
    young = DemandEstimator(WINDOW_S)
    assert rates(young, plan=service_plan([7.0], old)) == [7, 0, 0, 0]


def test_malformed_counts_are_ignored() -> None:
    estimator = DemandEstimator(WINDOW_S)
    estimator.record({"gw": report([0, 0])}, 0)
    estimator.record({"gw": report([1, 2, 3])}, 70)
    assert total(estimator) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=40))
@settings(deadline=None)
def test_rates_are_never_negative_and_never_exceed_what_arrived(steps: list[tuple[bool, int, int]]) -> None:
    estimator = DemandEstimator(WINDOW_S)
    count, instance, started_s = 0, 0, -3.0
    for index, (answers, more, restart) in enumerate(steps):
        at = index * 7.0
        if restart == 3:
            instance, count, started_s = instance + 1, 0, at - 3
        count += more
        counts = report([count, 0], instance=str(instance), uptime_s=at - started_s)
        estimator.record({"gw": counts if answers else None}, at)
        measured = rates(estimator)
        assert measured is not None
        assert min(measured) >= 0
        assert sum(measured) <= sum(step[1] for step in steps[: index + 1]) / WINDOW_S + 1e-9


def test_the_split_over_output_buckets_follows_what_completed_lately() -> None:
    """Three thousand short answers last hour weigh less than sixty long ones since."""
    estimator = DemandEstimator(WINDOW_S)
    for at in range(0, 6000, 5):
        short, long = min(at, 3000), max(0, at - 3000) // 5
        estimator.record({"gw": report([at, 0], [short, long, 0, 0])}, at)
    measured = rates(estimator)
    assert measured is not None
    assert measured[1] > 0.95 * sum(measured)


def test_what_first_engines_are_started_for_stays_while_they_start() -> None:
    estimator = DemandEstimator(WINDOW_S)
    chat, plans = llm_service(mode="observe"), {KEY: service_plan([0.5, 0, 0, 0])}
    for now_s in (0.0, WINDOW_S, 2 * WINDOW_S):
        estimator.record({"g": report([0, 0])}, now_s)
    assert estimator.estimate([chat], {KEY: EDGES}, plans, {KEY}) == {KEY: [0.5, 0, 0, 0]}
    assert estimator.estimate([chat], {KEY: EDGES}, plans) == {KEY: [0, 0, 0, 0]}
