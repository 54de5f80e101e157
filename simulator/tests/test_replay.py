"""Arrivals through the gateway's policy into modelled engines."""

from __future__ import annotations

import sys
from collections import Counter
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.api import Buckets, LatencyCoefficients, Plan, PlannedVariant, Route, RoutingTable, ServicePlan
from llmfleet.gateway.policy import Router, Ticket, Usage
from llmfleet.gateway.policy.state import PRESSED_UNSTARTED
from llmfleet.simulator import Arrival, EngineSpec, StepTime, replay, routing_table
from llmfleet.simulator.arrivals import renewal

FAST = EngineSpec(step=StepTime(overhead_ms=4, token_ms=0.05, context_token_ms=1e-5), kv_blocks=2000)
SLOW = EngineSpec(step=StepTime(overhead_ms=12, token_ms=0.2, context_token_ms=1e-4), kv_blocks=500)
LATENCY = LatencyCoefficients(ttft_base_ms=5, ttft_ms_per_input_token=0.1, tpot_base_ms=5, tpot_ms_per_running=0.1)
SIZES = [(30, 20), (200, 80), (700, 5), (90, 1)]


def planned(replicas: dict[str, int], shares: dict[int, dict[str, float]]) -> Plan:
    """A plan of one service with buckets by input length up to 100 and 1000 tokens."""
    service = ServicePlan(
        namespace="team",
        service="chat",
        buckets=Buckets(input_tokens=[100, 1000], output_tokens=[100]),
        variants=[
            PlannedVariant(
                name=n, gpu_type=n, tensor_parallel=1, replicas=r, cost_per_replica_hour=1.0, latency=LATENCY
            )
            for n, r in replicas.items()
        ],
        routes=[
            Route(bucket=bucket, variant=name, fraction=fraction)
            for bucket, by_name in shares.items()
            for name, fraction in by_name.items()
        ],
        demand=[1.0, 1.0],
        unserved_rps=0.0,
        cost_per_hour=1.0,
    )
    return Plan(
        plan_id="p",
        status="optimal",
        stopped_by="gap",
        solve_seconds=0.0,
        cost_per_hour=1.0,
        services=[service],
    )


def table(replicas: dict[str, int], shares: dict[int, dict[str, float]]) -> RoutingTable:
    return routing_table(planned(replicas, shares), "team/chat", context_length=4096)


def test_each_bucket_goes_where_the_plan_sends_it() -> None:
    routes = table({"fast": 1, "slow": 2}, {0: {"slow": 1.0}, 1: {"fast": 0.75, "slow": 0.25}})
    arrivals = renewal([(50, 10), (500, 10)], 2.0, 800, seed=1)
    served = replay(routes, {"fast": FAST, "slow": SLOW}, arrivals)
    short = Counter(one.variant for one in served if one.input_tokens == 50)
    long = Counter(one.variant for one in served if one.input_tokens == 500)
    assert set(short) == {"slow"}
    assert long["fast"] / long.total() == pytest.approx(0.75, abs=0.01)
    both = Counter(one.engine for one in served if one.variant == "slow")
    assert both["slow-0"] == pytest.approx(both["slow-1"], rel=0.1)


def test_the_policy_hears_of_first_tokens_and_does_not_take_long_answers_for_a_queue() -> None:
    slow = SLOW.model_copy(update={"kv_blocks": 4000})
    arrivals = renewal([(20, 500)], 6.0, 600, seed=2)
    served = replay(
        table({"fast": 1, "slow": 1}, {0: {"fast": 0.5, "slow": 0.5}}), {"fast": FAST, "slow": slow}, arrivals
    )
    ends = [one.at_s + (one.ttft_ms + 499 * (one.tpot_ms or 0)) / 1000 for one in served]
    at_once = sum(one.variant == "slow" and one.at_s < 50 < end for one, end in zip(served, ends, strict=True))
    assert at_once > 2 * PRESSED_UNSTARTED
    assert Counter(one.variant for one in served)["slow"] == pytest.approx(300, abs=2)


def test_the_policy_hears_everything_in_the_order_in_which_it_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []

    class Listening(Router):
        def started(self, ticket: Ticket) -> None:
            heard.append(self._clock())
            super().started(ticket)

        def completed(self, ticket: Ticket, usage: Usage | None, *, timed: bool = False) -> None:
            heard.append(self._clock())
            super().completed(ticket, usage, timed=timed)

    monkeypatch.setattr(sys.modules[replay.__module__], "Router", Listening)
    routes = table({"fast": 2, "slow": 2}, {0: {"fast": 0.5, "slow": 0.5}, 1: {"fast": 0.5, "slow": 0.5}})
    replay(routes, {"fast": FAST, "slow": SLOW}, renewal(SIZES, 10.0, 200, seed=8))
    assert len(heard) == 400
    assert heard == sorted(heard)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.5, 40), st.sampled_from([0.0, 1.0, 6.0]))
def test_every_arrival_is_answered_once_and_in_its_place(seed: int, rps: float, cv2: float) -> None:
    routes = table({"fast": 2, "slow": 1}, {0: {"fast": 0.5, "slow": 0.5}, 1: {"fast": 1.0}})
    arrivals = renewal(SIZES, rps, 120, seed=seed, cv2=cv2)
    served = replay(routes, {"fast": FAST, "slow": SLOW}, arrivals)
    assert [(one.at_s, one.input_tokens, one.output_tokens) for one in served] == [
        (one.at_s, one.input_tokens, one.output_tokens) for one in arrivals
    ]
    for one in served:
        assert one.ttft_ms > 0
        assert (one.tpot_ms is None) == (one.output_tokens == 1)
        assert one.tpot_ms is None or one.tpot_ms >= 4


def test_equal_arrivals_are_answered_equally() -> None:
    routes = table({"fast": 2, "slow": 1}, {0: {"fast": 0.5, "slow": 0.5}, 1: {"fast": 1.0}})
    arrivals = renewal(SIZES, 20.0, 300, seed=3, cv2=3.0)
    engines = {"fast": FAST, "slow": SLOW}
    assert replay(routes, engines, arrivals) == replay(routes, engines, arrivals)


def test_slower_engines_never_answer_sooner_on_average() -> None:
    routes = table({"fast": 2}, {0: {"fast": 1.0}, 1: {"fast": 1.0}})
    arrivals = renewal(SIZES, 10.0, 300, seed=4)
    means = []
    for factor in (1.0, 1.5, 2.5):
        slower = FAST.model_copy(update={"step": FAST.step.scaled(factor)})
        served = replay(routes, {"fast": slower}, arrivals)
        means.append((fmean(one.ttft_ms for one in served), fmean(one.tpot_ms or 0 for one in served)))
    assert means == sorted(means)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_at_a_time_with_equal_work_waits_as_m_d_1(load: float) -> None:
    """Pollaczek and Khinchine for constant service: the mean wait is load / (2 (1 - load)) services."""
    service_ms = 20.0
    one_at_a_time = EngineSpec(step=StepTime(overhead_ms=service_ms), kv_blocks=10, max_num_seqs=1)
    arrivals = renewal([(10, 1)], load * 1000 / service_ms, 20_000, seed=5)
    served = replay(table({"fast": 1}, {0: {"fast": 1.0}, 1: {"fast": 1.0}}), {"fast": one_at_a_time}, arrivals)
    wait_ms = fmean(one.ttft_ms for one in served) - service_ms
    assert wait_ms == pytest.approx(service_ms * load / (2 * (1 - load)), rel=0.1)


def test_what_is_missing_is_named() -> None:
    routes = table({"fast": 1, "slow": 1}, {0: {"slow": 1.0}})
    with pytest.raises(ValueError, match="engines: no model of variant slow; got fast"):
        replay(routes, {"fast": FAST}, [])
    with pytest.raises(ValueError, match="chat has no replicas"):
        replay(table({"fast": 0}, {}), {"fast": FAST}, [])
    with pytest.raises(ValueError, match=r"arrivals\[1\].at_s: got 1"):
        replay(routes, {"fast": FAST, "slow": SLOW}, [Arrival(2.0, 5, 5), Arrival(1.0, 5, 5)])
    with pytest.raises(ValueError, match="got 'team/x'; the plan has team/chat"):
        routing_table(planned({"fast": 1}, {}), "team/x", context_length=10)
