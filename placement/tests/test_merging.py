"""Merged cells: fewer of them, no load lost, none made smaller."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.placement.workload import Histogram, TraceSizes, merged_cells, route_price, token_price

traces = st.dictionaries(
    st.tuples(st.integers(1, 50), st.integers(1, 50)), st.integers(1, 100), min_size=1, max_size=20
)


def histogram(counts: dict[tuple[int, int], int]) -> Histogram:
    return Histogram.of_trace(TraceSizes(counts, 1.0), float(sum(counts.values())))


def merge(fine: Histogram, *, most_cells: int, most_added: float) -> list[int]:
    """Bound relative to all tokens at the corners."""
    into = merged_cells(fine.rps, token_price(fine), most_cells=most_cells, most_added=most_added * corner_work(fine))
    return [int(cell) for cell in into]


def corner_work(cells: Histogram) -> float:
    return float(cells.rps @ (cells.input_tokens + cells.output_tokens))


@given(traces, st.integers(1, 20), st.sampled_from([0.0, 0.01, 0.1, 1.0, 50.0]))
def test_no_load_is_lost_no_request_made_smaller_and_the_bound_is_kept(
    counts: dict[tuple[int, int], int], most_cells: int, most_added: float
) -> None:
    fine = histogram(counts)
    into = np.array(merge(fine, most_cells=most_cells, most_added=most_added))
    assert (fine.input_tokens <= fine.input_tokens[into]).all()
    assert (fine.output_tokens <= fine.output_tokens[into]).all()
    assert (into[into] == into).all()
    coarse = fine.merged(into)
    assert coarse.rps.sum() == pytest.approx(fine.rps.sum())
    assert coarse.rps @ coarse.mean_tokens == pytest.approx(fine.rps @ fine.mean_tokens)
    assert len(coarse.rps) == len(set(into.tolist()))
    assert corner_work(coarse) <= corner_work(fine) * (1 + most_added) * (1 + 1e-9)


@given(traces)
def test_with_a_wide_bound_only_cells_stay_that_no_other_dominates(counts: dict[tuple[int, int], int]) -> None:
    fine = histogram(counts)
    stay = set(merge(fine, most_cells=1, most_added=1e9))
    sizes = list(counts)
    dominated = {
        a
        for a, small in enumerate(sizes)
        for b, big in enumerate(sizes)
        if a != b and small <= big and small[1] <= big[1]
    }
    assert stay == set(range(len(sizes))) - dominated


def test_the_cheapest_moves_first_and_no_more_than_needed() -> None:
    fine = histogram({(100, 10): 1, (110, 10): 100, (200, 10): 50, (200, 200): 1})
    assert merge(fine, most_cells=4, most_added=1.0) == [0, 1, 2, 3]
    assert merge(fine, most_cells=3, most_added=1.0) == [1, 1, 2, 3]
    assert merge(fine, most_cells=2, most_added=1.0) == [2, 2, 2, 3]
    assert merge(fine, most_cells=1, most_added=1.0) == [2, 2, 2, 3]
    assert merge(fine, most_cells=1, most_added=10.0) == [3, 3, 3, 3]


def test_what_a_cell_took_in_weighs_when_it_moves_on() -> None:
    fine = histogram({(100, 10): 30, (101, 10): 4, (111, 10): 100})
    added = (30 * 1 + 34 * 10) / corner_work(fine)
    assert merge(fine, most_cells=1, most_added=added * 1.001) == [2, 2, 2]
    assert merge(fine, most_cells=1, most_added=added * 0.999) == [1, 1, 2]


def test_only_what_has_a_price_is_merged() -> None:
    price = np.array([[0.0, np.inf, 3.0], [np.inf, 0.0, np.inf], [np.inf, np.inf, 0.0]])
    assert merged_cells(np.ones(3), price, most_cells=1, most_added=3.0).tolist() == [2, 1, 2]
    assert merged_cells(np.ones(3), price, most_cells=1, most_added=2.9).tolist() == [0, 1, 2]


@given(st.integers(1, 10), st.integers(1, 3), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, 5.0, 1e6]))
def test_routes_of_the_merged_program_hold_for_all_and_cost_no_more_than_the_bound(
    buckets: int, variants: int, seed: int, most_added: float
) -> None:
    chance = np.random.default_rng(seed)
    throughput = chance.choice([0.0, 1.0, 2.0, 8.0], (buckets, variants), p=[0.1, 0.3, 0.3, 0.3])
    cost, rates = chance.uniform(0.5, 4.0, variants), chance.uniform(0.01, 3.0, buckets)
    into = merged_cells(rates, route_price(throughput, cost), most_cells=1, most_added=most_added)
    assert ((throughput > 0) == (throughput[into] > 0)).all()
    assert (throughput >= throughput[into]).all()
    served = (throughput > 0).any(axis=1)
    for _ in range(3):  # any routes at all
        shares = np.where(throughput > 0, chance.uniform(0.0, 1.0, throughput.shape), 0.0)[served]
        shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-12) * rates[served, None]
        used = shares > 0
        fine = np.divide(shares * cost, throughput[served], out=np.zeros_like(shares), where=used).sum()
        merged = np.divide(shares * cost, throughput[into][served], out=np.zeros_like(shares), where=used).sum()
        assert merged <= fine + most_added + 1e-9


def test_cells_without_requests_go_first() -> None:
    counts = {(10, 10): 1, (20, 10): 1, (30, 10): 1}
    fine = histogram(counts)
    fine.rps[1] = 0.0
    assert merge(fine, most_cells=2, most_added=0.0) == [0, 2, 2]


def test_no_cells_stay_none() -> None:
    assert merge(Histogram.expected([], 0.0), most_cells=1, most_added=0.0) == []


@pytest.mark.parametrize(("most_cells", "most_added"), [(0, 0.1), (1, -0.1), (1, math.nan)])
def test_numbers_that_are_none_are_refused(most_cells: int, most_added: float) -> None:
    with pytest.raises(ValueError, match=r"most_(cells|added): got .*; accepted are"):
        merge(histogram({(1, 1): 1}), most_cells=most_cells, most_added=most_added)
