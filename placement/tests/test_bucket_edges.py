"""Bucket edges out of a workload: the fewest, by exact search, and never below a request."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Buckets
from llmfleet.placement.workload import Histogram, TraceSizes, fitted_buckets, requests_of, trace_sizes

AZURE = Path(__file__).parent / "data" / "azure_conv_2023_sample.csv"
MELANGE = Buckets(
    input_tokens=[25, 100, 250, 500, 1000, 2000, 4000, 8000, 12000, 16000],
    output_tokens=[25, 100, 250, 500, 1000, 2000],
)

lengths = st.dictionaries(st.integers(1, 60), st.integers(1, 20), min_size=1, max_size=8)


def prompts(counts: dict[int, int]) -> Histogram:
    """A workload whose answers are all alike."""
    return Histogram.of_trace(TraceSizes({(x, 7): count for x, count in counts.items()}, 1.0), 3.0)


def excess(counts: dict[int, int], edges: tuple[int, ...]) -> float:
    """By its definition, a request at a time."""
    planned = sum(count * min(edge for edge in edges if edge >= x) for x, count in counts.items())
    return planned / sum(count * x for x, count in counts.items()) - 1


def least_excess(counts: dict[int, int], edges: int) -> float:
    """Of all choices of so many edges."""
    top = max(counts)
    others = [x for x in counts if x != top]
    choices = itertools.combinations(others, min(edges - 1, len(others)))
    return min(excess(counts, (*choice, top)) for choice in choices)


@given(lengths, st.sampled_from([0.0, 0.02, 0.1, 0.3, 1.0, 3.0]))
def test_there_are_as_few_edges_as_any_choice_needs_and_none_does_better(
    counts: dict[int, int], most_excess: float
) -> None:
    found = fitted_buckets(prompts(counts), most_excess)
    edges = tuple(found.buckets.input_tokens)
    assert edges[-1] == max(counts)
    assert found.input_excess == pytest.approx(excess(counts, edges), abs=1e-9)
    assert found.input_excess <= most_excess + 1e-9
    assert found.input_excess == pytest.approx(least_excess(counts, len(edges)), abs=1e-9)
    if len(edges) > 1:
        assert least_excess(counts, len(edges) - 1) > most_excess - 1e-9


def test_the_axes_are_fitted_each_by_itself() -> None:
    counts = {(10, 500): 5, (1000, 500): 5, (1000, 2): 5, (10, 2): 5}
    found = fitted_buckets(Histogram.of_trace(TraceSizes(counts, 1.0), 1.0), 0.0)
    assert (found.buckets.input_tokens, found.buckets.output_tokens) == ([10, 1000], [2, 500])
    assert (found.input_excess, found.output_excess) == (0.0, 0.0)


def test_rates_weigh_and_a_size_without_requests_does_not_count() -> None:
    workload = Histogram(
        np.array([10, 90, 100]), np.array([5, 5, 5]), np.array([1.0, 100.0, 0.0]), np.array([15.0, 95.0, 105.0])
    )
    found = fitted_buckets(workload, 0.01)
    assert found.buckets.input_tokens == [90]
    assert found.input_excess == pytest.approx(80 / 9010)


def test_fitted_buckets_over_estimate_less_than_twice_as_many_that_fit_no_one() -> None:
    with AZURE.open(newline="") as lines:
        workload = Histogram.of_trace(trace_sizes(requests_of(lines, str(AZURE))))
    found = fitted_buckets(workload, 0.25)
    prompts = workload.rps @ workload.input_tokens
    answers = workload.rps @ workload.output_tokens
    melange = workload.on(MELANGE)
    assert found.buckets.count <= MELANGE.count / 2
    assert found.input_excess < melange.rps @ melange.input_tokens / prompts - 1
    assert found.output_excess < melange.rps @ melange.output_tokens / answers - 1


def test_where_sixteen_edges_are_not_enough_it_says_how_far_they_reach() -> None:
    counts = {10 * i: 1 for i in range(1, 19)}
    with pytest.raises(ValueError, match=r"inputTokens: 16 edges reach an excess of 0\.0117; accepted is at least"):
        fitted_buckets(prompts(counts), 0.0)
    assert len(fitted_buckets(prompts(counts), least_excess(counts, 16)).buckets.input_tokens) == 16


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_an_excess_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"excess: got .*; accepted are numbers from 0"):
        fitted_buckets(prompts({1: 1}), bad)


def test_nothing_can_be_fitted_to_no_requests() -> None:
    with pytest.raises(ValueError, match="no requests"):
        fitted_buckets(Histogram.expected([], 0.0), 0.1)
