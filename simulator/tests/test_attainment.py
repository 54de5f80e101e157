"""Whether a promise was kept, and how sure a finite run can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.simulator import Served, attainment
from llmfleet.simulator.attainment import Attainment, wilson

OBJECTIVE = Objective(ttft=LatencyTarget(milliseconds=100), tpot=LatencyTarget(milliseconds=10, percentile=90))


def served(ttft_ms: float, tpot_ms: float | None) -> Served:
    return Served(0.0, 1, 1, "v", "v-0", ttft_ms, tpot_ms, 0)


def test_wilson_agrees_with_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263, 15/148, 0/20 and 1/29 at 95 %, two-sided.
    for within, requests, lower, upper in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(within, requests, z=1.959964) == pytest.approx((lower, upper), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_seen_and_stays_a_share(run: tuple[int, int]) -> None:
    within, requests = run
    lower, upper = wilson(within, requests)
    assert 0.0 <= lower <= within / requests + 1e-12
    assert within / requests - 1e-12 <= upper <= 1.0


def test_more_requests_prove_more() -> None:
    target = LatencyTarget(milliseconds=1, percentile=95)
    assert [Attainment(target, within, n).verdict() for within, n in ((19, 20), (950, 1000), (9500, 10_000))] == [
        "undecided",
        "undecided",
        "kept",
    ]
    assert Attainment(target, 0, 0).verdict() == "undecided"
    assert Attainment(target, 900, 1000).verdict() == "broken"
    assert Attainment(target, 900, 1000).verdict(slack_points=10) == "kept"


def test_each_target_counts_at_its_own_percentile() -> None:
    found = attainment([served(50, 5)] * 9000 + [served(50, 50)] * 900 + [served(500, None)] * 100, OBJECTIVE)
    assert (found.ttft.percent, found.tpot.percent) == (99.0, 91.0)
    assert found.verdict() == "kept"


def test_one_broken_target_breaks_the_objective() -> None:
    assert attainment([served(50, 5)] * 50 + [served(500, 5)] * 50, OBJECTIVE).verdict() == "broken"
    assert attainment([served(50, 50)] * 100, OBJECTIVE).verdict() == "broken"


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="within: got 3; accepted are numbers from 0 to the 2 requests"):
        wilson(3, 2)
