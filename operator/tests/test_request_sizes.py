"""How long requests are, over all gateways and restarts, for as long as it is remembered."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Buckets, BucketSizes, DemandReport, ServiceDemand, ServicePlan, SizeSums
from llmfleet.operator.request_sizes import REMEMBERED_REQUESTS, RequestSizes

EDGES = Buckets(input_tokens=[512, 4096], output_tokens=[128])
OTHER = Buckets(input_tokens=[100], output_tokens=[128])
KEY = "ns/chat"
Sizes = list[tuple[int, int]]


def sums(sizes: Sizes) -> list[SizeSums]:
    found: defaultdict[int, list[int]] = defaultdict(lambda: [0] * 5)
    for i, o in sizes:
        row = found[EDGES.index(i, o)]
        row[:] = [a + b for a, b in zip(row, (1, i, i * i, o, o * o), strict=True)]
    return [SizeSums(bucket, *row) for bucket, row in sorted(found.items())]


def report(sizes: Sizes | None, instance: str = "i", edges: Buckets = EDGES) -> DemandReport:
    demand = ServiceDemand(
        namespace="ns",
        service="chat",
        buckets=edges,
        arrived=[0] * len(edges.input_tokens),
        completed=[0] * edges.count,
        sizes=None if sizes is None else sums(sizes),
    )
    return DemandReport(instance_id=instance, services=[demand])


def plan(sizes: list[BucketSizes] | None, edges: Buckets = EDGES) -> ServicePlan:
    return ServicePlan(
        namespace="ns",
        service="chat",
        buckets=edges,
        variants=[],
        routes=[],
        demand=[0.0] * edges.count,
        sizes=sizes,
        unserved_rps=0,
        cost_per_hour=0,
    )


def exact(sizes: Sizes) -> list[BucketSizes]:
    """The sums of all of them, by bucket."""
    found = [BucketSizes()] * EDGES.count
    for bucket, *row in sums(sizes):
        values = dict(zip(BucketSizes.model_fields, map(float, row), strict=True))
        found[bucket] = BucketSizes(**values)
    return found


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b"]),
            st.sampled_from(["tell", "keep", "restart"]),
            st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 128)), max_size=5),
        ),
        max_size=30,
    )
)
def test_the_sums_of_all_gateways_are_those_of_all_requests_that_were_told(
    steps: list[tuple[str, str, Sizes]],
) -> None:
    known, told = RequestSizes(), Sizes()
    counted: dict[str, Sizes] = {"a": [], "b": []}
    new: dict[str, Sizes] = {"a": [], "b": []}
    starts = 0
    for name, what, sizes in steps:
        if what == "restart":
            starts += 1
            instance = f"{name} {starts}"
            counted[instance], new[instance] = [], []
        instance = max((one for one in counted if one[0] == name), key=lambda one: int(one[2:] or 0))
        counted[instance] += sizes
        new[instance] += sizes
        if what != "keep":
            told += new[instance]
            new[instance] = []
            # Twice is as good as once.
            known.record([report(counted[instance], instance)] * 2)
    assert known.of(KEY, EDGES, None) == (exact(told) if told else None)


def test_old_requests_fade_as_new_ones_come_and_not_by_themselves() -> None:
    known = RequestSizes()
    sizes: Sizes = [(100, 100)] * 2000
    known.record([report(sizes)])
    for _ in range(4):
        sizes += [(300, 100)] * 1000
        known.record([report(sizes)])
    (first, second) = known.of(KEY, EDGES, None) or []
    assert first.requests == pytest.approx(REMEMBERED_REQUESTS)
    assert 285 < first.input_tokens / first.requests < 300
    assert first.input_tokens_squared * first.requests >= first.input_tokens**2
    assert second == BucketSizes()
    known.record([report(sizes)])
    assert known.of(KEY, EDGES, None) == [first, second]


def test_what_the_plan_was_made_with_stands_in_for_what_is_not_known_yet() -> None:
    known = RequestSizes()
    planned = exact([(100, 10), (2000, 10)])
    assert known.of(KEY, EDGES, plan(None)) is None
    assert known.of(KEY, EDGES, plan(planned)) == planned
    assert known.of(KEY, EDGES, plan([BucketSizes()], OTHER)) is None
    known.record([report([(3000, 20)])])
    assert known.of(KEY, EDGES, plan(planned)) == [planned[0], exact([(3000, 20)])[1]]


def test_a_gateway_that_tells_no_sizes_changes_nothing() -> None:
    known = RequestSizes()
    known.record([report(None)])
    assert known.of(KEY, EDGES, None) is None
    known.record([report([(100, 10)])])
    known.record([report(None), report([(5, 5)], edges=OTHER)])
    assert known.of(KEY, EDGES, None) == exact([(100, 10)])


def test_sums_that_began_anew_are_new() -> None:
    known = RequestSizes()
    known.record([report([(100, 10)] * 3)])
    known.record([report([(200, 10)])])
    assert known.of(KEY, EDGES, None) == exact([(100, 10)] * 3 + [(200, 10)])
