"""Histograms of request sizes: no request lost, none made smaller, wherever it comes from."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Buckets
from llmfleet.api.llmservice import RequestSize
from llmfleet.placement import Demand
from llmfleet.placement.workload import Histogram, Request, TraceSizes, bucket_demand, requests_of, trace_sizes
from placement_testing.fleets import service

BUCKETS = Buckets(input_tokens=[100, 1000], output_tokens=[10, 200])
AZURE = Path(__file__).parent / "data" / "azure_conv_2023_sample.csv"

edges = st.lists(st.integers(1, 500), min_size=1, max_size=5, unique=True).map(sorted)
traces = st.dictionaries(
    st.tuples(st.integers(1, 600), st.integers(1, 600)), st.integers(1, 9), min_size=1, max_size=12
)


def test_expected_sizes_share_the_rate_by_their_weights() -> None:
    sizes = [RequestSize(input_tokens=50, output_tokens=5, share=3), RequestSize(input_tokens=70, output_tokens=9)]
    found = Histogram.expected(sizes, 8.0).on(BUCKETS)
    assert found.rps.tolist() == [8.0, 0, 0, 0]
    assert found.mean_tokens[0] == pytest.approx((3 * 55 + 79) / 4)
    assert found.mean_tokens[3] == (101 + 11 + 1000 + 200) / 2


def test_a_trace_has_the_rate_of_its_gaps_or_the_one_asked_for() -> None:
    sizes = trace_sizes([Request(5.0, 50, 5), Request(6.0, 500, 5), Request(9.0, 50, 5)])
    assert (sizes.requests, sizes.seconds, sizes.rps) == (3, 4.0, 0.5)
    assert Histogram.of_trace(sizes).on(BUCKETS).rps == pytest.approx([1 / 3, 0, 1 / 6, 0])
    assert Histogram.of_trace(sizes, 6.0).on(BUCKETS).rps == pytest.approx([4, 0, 2, 0])


def test_requests_at_one_moment_have_no_rate_but_can_be_given_one() -> None:
    sizes = trace_sizes([Request(5.0, 50, 5), Request(5.0, 50, 5)])
    with pytest.raises(ValueError, match="2 requests at one moment have no rate; accepted are times that differ"):
        Histogram.of_trace(sizes)
    assert Histogram.of_trace(sizes, 2.0).rps.tolist() == [2.0]


def test_no_requests_are_no_trace() -> None:
    with pytest.raises(ValueError, match="no requests"):
        trace_sizes([])


def test_the_azure_sample_fills_the_buckets_its_rows_fall_into() -> None:
    with AZURE.open(newline="") as lines:
        sizes = trace_sizes(requests_of(lines, str(AZURE)))
    with AZURE.open(newline="") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
    assert (sizes.requests, round(sizes.seconds)) == (500, 3479)
    found = Histogram.of_trace(sizes, 500.0).on(BUCKETS)
    medium = [row for row in rows if 100 < row[0] <= 1000 and 10 < row[1] <= 200]
    assert found.rps[3] == pytest.approx(sum(row[0] > 100 and row[1] > 10 for row in rows))
    assert found.rps[3] > len(medium) > 0
    short = [row for row in rows if row[0] <= 100 and row[1] > 10]
    assert found.rps[1] == pytest.approx(len(short))
    assert found.mean_tokens[1] == pytest.approx(sum(map(sum, short)) / len(short))


@given(traces, edges, edges)
def test_no_request_is_lost_or_made_smaller_by_buckets(
    counts: dict[tuple[int, int], int], inputs: list[int], outputs: list[int]
) -> None:
    buckets = Buckets(input_tokens=[*inputs, 600], output_tokens=[*outputs, 600])
    fine = Histogram.of_trace(TraceSizes(counts, 10.0), float(sum(counts.values())))
    coarse = fine.on(buckets)
    assert coarse.rps.sum() == pytest.approx(fine.rps.sum())
    assert (coarse.rps * coarse.mean_tokens).sum() == pytest.approx((fine.rps * fine.mean_tokens).sum())
    filled = coarse.rps > 0
    assert (coarse.mean_tokens <= coarse.input_tokens + coarse.output_tokens)[filled].all()
    for size in counts:
        corner = buckets.edges(buckets.index(*size))
        assert size[0] <= corner[0]
        assert size[1] <= corner[1]


@given(traces)
def test_what_no_bucket_and_no_context_holds_is_counted_all_the_same(counts: dict[tuple[int, int], int]) -> None:
    found = Histogram.of_trace(TraceSizes(counts, 10.0), float(sum(counts.values())))
    assert found.on(BUCKETS).rps.sum() == pytest.approx(sum(counts.values()))
    outside = sum(count for (i, o), count in counts.items() if i > 1000 or o > 200)
    assert found.rps[found.exceed_buckets(BUCKETS)].sum() == pytest.approx(outside)
    too_long = sum(count for (i, o), count in counts.items() if i + o > 256)
    assert found.rps[found.exceed_context(256)].sum() == pytest.approx(too_long)


def test_observed_rates_are_the_demand_as_they_are_and_their_tokens_the_middle() -> None:
    found = bucket_demand(service(), BUCKETS, Demand(rps=[1.0, 0.0, 2.5, 0.0]))
    assert found.observed
    assert found.rps.tolist() == [1.0, 0.0, 2.5, 0.0]
    assert found.tokens[0] == (1 + 1 + 100 + 10) / 2
    assert Histogram.observed(BUCKETS, found.rps.tolist()).on(BUCKETS).rps.tolist() == found.rps.tolist()


def test_without_figures_the_demand_is_zero() -> None:
    found = bucket_demand(service(), BUCKETS, None)
    assert not found.observed
    assert np.array_equal(found.rps, np.zeros(4))
