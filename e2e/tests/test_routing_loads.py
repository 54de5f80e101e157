"""The routing benchmark's loads are those of the paper, and its peers do what they are said to do."""

from __future__ import annotations

from statistics import fmean

import pytest

from e2e.bench.routing_loads import drawn, power_law
from e2e.bench.routing_peers import CacheAware, LeastLoaded, RoundRobin
from e2e.bench.routing_split import split
from llmfleet.simulator import Arrival
from llmfleet.simulator.arrivals import burstiness


@pytest.mark.parametrize(
    ("name", "mean", "quantiles"),
    [("S", 128, (38, 113, 413, 1464)), ("M", 256, (32, 173, 1288, 4208)), ("L", 512, (55, 582, 3113, 5166))],
)
def test_lengths_have_the_quantiles_of_the_paper_and_nearly_its_mean(
    name: str, mean: float, quantiles: tuple[int, ...]
) -> None:
    assert tuple(power_law(name, share) for share in (0.5, 0.8, 0.95, 0.99)) == quantiles
    # The mean was not fitted: it says that the interpolation between the quantiles is right.
    assert fmean(power_law(name, (n + 0.5) / 10_000) for n in range(10_000)) == pytest.approx(mean, rel=0.03)


def test_gaps_are_as_bursty_as_asked_for_and_sizes_do_not_depend_on_it() -> None:
    even, bursty = drawn("S-L", 4000, 1), drawn("S-L", 4000, 1, cv=4.0)
    assert burstiness(even) == pytest.approx(1.0, rel=0.15)
    assert burstiness(bursty) == pytest.approx(16.0, rel=0.3)
    assert [one.input_tokens for one in even] == [one.input_tokens for one in bursty]


def test_cache_aware_evens_out_prompts_until_requests_are_far_out_of_balance() -> None:
    peer = CacheAware(["a", "b"])
    assert [peer.send(n, Arrival(0.0, size, 1)) for n, size in enumerate([1000, 10, 10])] == ["a", "b", "b"]
    for number in range(3, 67):
        assert peer.send(number, Arrival(0.0, 1, 1)) == "b"
    # 66 on `b` and one on `a`: more than 64 apart.
    assert peer.send(67, Arrival(0.0, 1, 1)) == "a"


def test_the_other_peers_do_what_their_names_say() -> None:
    turns, least = RoundRobin(["a", "b"]), LeastLoaded(["a", "b"])
    one = Arrival(0.0, 1, 1)
    assert [turns.send(n, one) for n in range(4)] == ["b", "a", "b", "a"]
    assert [least.send(n, one) for n in range(3)] == ["a", "b", "a"]
    least.finished(0)
    least.finished(2)
    assert least.send(3, one) == "a"


def test_the_realised_split_follows_the_plan() -> None:
    whole, buckets = split(7)
    assert whole <= 2.0
    assert len(buckets) > 8
