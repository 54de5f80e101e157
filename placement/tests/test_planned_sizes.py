"""The size that stands for a bucket: the corner where nothing is known, mean and deviation where it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmfleet.api import Buckets, BucketSizes, LLMService
from llmfleet.placement import Demand, PlanInputs, plan, violations
from llmfleet.placement.workload import TraceSizes, bucket_demand, planned_sizes, settled
from placement_testing.fleets import fleet, gpu_type, point, profile, rates_profile, service

BUCKETS = Buckets(input_tokens=[100, 1000], output_tokens=[10, 200])
LOWEST = np.array([[1, 1], [1, 11], [101, 1], [101, 11]])
CORNERS = np.array([[100, 10], [100, 200], [1000, 10], [1000, 200]])
requests = st.dictionaries(
    st.tuples(st.integers(1, 1000), st.integers(1, 200)), st.integers(1, 400), min_size=1, max_size=12
)
pure = settings(deadline=None)


def seen(counts: dict[tuple[int, int], int]) -> list[BucketSizes]:
    return TraceSizes(counts, 1.0).by_bucket(BUCKETS)


@pure
@given(requests)
def test_it_lies_in_its_bucket_and_no_less_than_the_mean(counts: dict[tuple[int, int], int]) -> None:
    sizes = planned_sizes(BUCKETS, seen(counts))
    assert ((sizes >= LOWEST) & (sizes <= CORNERS)).all()
    for bucket, one in enumerate(seen(counts)):
        if one.requests:
            assert sizes[bucket, 0] >= one.input_tokens / one.requests - 1e-6
            assert sizes[bucket, 1] >= one.output_tokens / one.requests - 1e-6


def test_nothing_known_is_the_corner_of_every_bucket() -> None:
    assert (planned_sizes(BUCKETS, None) == CORNERS).all()
    assert (planned_sizes(BUCKETS, [BucketSizes()] * 4) == CORNERS).all()


def test_a_single_request_says_nothing_and_a_thousand_alike_say_what_they_are() -> None:
    assert (planned_sizes(BUCKETS, seen({(150, 20): 1})) == CORNERS).all()
    many = planned_sizes(BUCKETS, seen({(150, 20): 1000}))[3]
    assert 150 <= many[0] <= 150 + 2 * (1000 - 101) / 8
    assert 20 <= many[1] <= 20 + 2 * (200 - 11) / 8


@pure
@given(requests)
def test_more_requests_of_the_same_kinds_never_move_it_towards_the_corner(counts: dict[tuple[int, int], int]) -> None:
    tenfold = {size: 10 * count for size, count in counts.items()}
    assert (planned_sizes(BUCKETS, seen(tenfold)) <= planned_sizes(BUCKETS, seen(counts)) + 1e-9).all()


@pytest.mark.parametrize(
    "sums",
    [
        {"input_tokens": 5000.0},  # a mean above the bucket
        {"output_tokens": 10.0},  # a mean below it
        {"input_tokens_squared": 10.0},  # squares that no such requests have
        {"output_tokens_squared": 1e9},
    ],
)
def test_sums_that_cannot_be_are_planned_as_the_corner(sums: dict[str, float]) -> None:
    (*_, good) = seen({(150, 20): 4, (300, 100): 90})
    assert (planned_sizes(BUCKETS, [BucketSizes()] * 3 + [good])[3] < CORNERS[3]).all()
    bad = good.model_copy(update=sums)
    assert (planned_sizes(BUCKETS, [BucketSizes()] * 3 + [bad]) == CORNERS).all()


def test_sums_of_two_gateways_are_those_of_all_requests_and_long_ones_end_at_the_last_edge() -> None:
    first, second, both = (
        seen(counts) for counts in ({(150, 20): 3}, {(5000, 900): 2}, {(150, 20): 3, (5000, 900): 2})
    )
    added = [
        BucketSizes(**{name: getattr(one, name) + getattr(other, name) for name in BucketSizes.model_fields})
        for one, other in zip(first, second, strict=True)
    ]
    assert added == both
    assert both[3].input_tokens == 3 * 150 + 2 * 1000
    assert both[3].output_tokens_squared == 3 * 20**2 + 2 * 200**2


@pure
@given(requests, requests)
def test_what_the_plan_in_force_was_made_of_stays_until_it_no_longer_covers_what_is_seen(
    before: dict[tuple[int, int], int], now: dict[tuple[int, int], int]
) -> None:
    old, new = seen(before), seen(now)
    found = settled(BUCKETS, new, old)
    assert found is not None
    planned, needed = planned_sizes(BUCKETS, found), planned_sizes(BUCKETS, new)
    assert (planned >= needed).all()
    assert (planned - needed <= (CORNERS - LOWEST) / 4 + 1e-6).all()
    assert settled(BUCKETS, new, found) == found
    assert settled(BUCKETS, new, None) == new
    assert settled(BUCKETS, None, old) is None


def test_observed_sums_give_the_mean_tokens_of_a_request() -> None:
    found = bucket_demand(service(), BUCKETS, Demand(rps=[0, 0, 0, 2.0], sizes=seen({(150, 20): 3, (250, 40): 1})))
    assert found.tokens[3] == pytest.approx((3 * 170 + 290) / 4)


def expected(*sizes: tuple[int, int, float], mode: str = "expected") -> LLMService:
    written = [{"inputTokens": prompt, "outputTokens": answer, "share": share} for prompt, answer, share in sizes]
    return service(traffic={"mode": mode, "requestsPerSecond": 2, "sizes": written})


def test_written_answers_are_planned_on_their_mean_and_prompts_as_long_as_the_bucket_allows() -> None:
    demand = bucket_demand(expected((150, 20, 3), (700, 60, 1)), BUCKETS, None)
    assert demand.sizes[3, 0] == 1000
    assert 30 <= demand.sizes[3, 1] <= 30 + (200 - 11) / 8
    assert (demand.sizes[:3] == CORNERS[:3]).all()


@pure
@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 400), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_no_written_answer_is_planned_shorter_than_the_mean_of_its_bucket(
    sizes: list[tuple[int, int, float]],
) -> None:
    demand = bucket_demand(expected(*sizes), BUCKETS, None)
    for bucket in range(BUCKETS.count):
        here = [(min(answer, 200), share) for prompt, answer, share in sizes if BUCKETS.index(prompt, answer) == bucket]
        mean = sum(answer * share for answer, share in here) / sum(share for _, share in here) if here else 0.0
        assert mean * (1 - 1e-9) <= demand.sizes[bucket, 1] <= CORNERS[bucket, 1]
        assert demand.sizes[bucket, 0] == CORNERS[bucket, 0]


def test_what_is_written_counts_by_its_corner_where_gateways_will_say_before_long() -> None:
    written = (150, 20, 1)
    assert (bucket_demand(expected(written, mode="observe"), BUCKETS, None).sizes == CORNERS).all()
    told = Demand(rps=[0, 0, 0, 2.0], sizes=seen({(300, 190): 1000}))
    assert bucket_demand(expected(written), BUCKETS, told).sizes[3, 1] < 60
    assert bucket_demand(expected(written, mode="observe"), BUCKETS, told).sizes[3, 1] > 180


def test_a_plan_says_what_it_made_of_written_sizes_and_one_that_says_otherwise_is_dropped() -> None:
    measured = [point((16, answer), 4.0, ttft_ms=40, tpot_ms=10) for answer in (10, 200)]
    one = profile({"l4": measured}, inputs=[16], outputs=[10, 200])
    inputs = fleet([expected((16, 50, 1))], [one], [gpu_type("l4", 1.0)], inventory={"l4": 8})
    decided, _ = plan(inputs, None)
    planned = decided.services[0]
    assert planned.sizes is not None
    assert planned.sizes[1].output_tokens == pytest.approx(50 * planned.sizes[1].requests)
    assert violations(inputs, decided) == []
    other = planned.model_copy(update={"sizes": None})
    found = violations(inputs, decided.model_copy(update={"services": [other]}))
    assert any(violation.constraint == "demand" for violation in found)


def test_as_many_sums_as_buckets_are_asked_for() -> None:
    inputs = fleet([service()], [rates_profile({"small": [1, 1]})], [gpu_type("small", 1.0)], inventory={"small": 1})
    wrong = {"team/s": Demand(rps=[1, 1], sizes=[BucketSizes()])}
    with pytest.raises(ValidationError, match=r"demand\['team/s'\].sizes: 1 values, but ModelProfile p has 2 buckets"):
        PlanInputs.model_validate({**dict(inputs), "demand": wrong})
