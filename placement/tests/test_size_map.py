"""The map of sizes: prices by hand, shares as planned."""

from __future__ import annotations

import pytest

from llmfleet.placement import plan
from llmfleet.placement.size_map import size_map
from placement_testing.fleets import fleet, gpu_type, rates_profile, service

TYPES = [gpu_type("l4", 1.0), gpu_type("h100", 5.0), gpu_type("slow", 0.1)]
RATES = {"l4": [4, 1], "h100": [8, 16], "slow": [0, 0]}


def test_a_size_is_cheapest_where_a_request_keeps_the_fewest_dollars_busy() -> None:
    inputs = fleet([service()], [rates_profile(RATES)], TYPES, inventory={"l4": 9, "h100": 9}, demand={"s": [8, 8]})
    decided, _ = plan(inputs, None)
    short, long = size_map(decided, inputs, "team/s")
    assert [short.cheapest, long.cheapest] == ["l4", "h100"]
    target = inputs.policy.utilization_target
    assert short.cost_per_thousand_requests == {
        "l4": pytest.approx(1000 * 1.0 / 3600 / (4 * target)),
        "h100": pytest.approx(1000 * 5.0 / 3600 / (8 * target)),
    }
    assert list(long.cost_per_thousand_requests) == ["h100", "l4"]
    assert (short.demand_rps, long.demand_rps) == (8, 8)
    assert sum(short.share.values()) == pytest.approx(1)
    assert long.share == {"h100": pytest.approx(1)}


def test_what_nobody_serves_has_no_price_and_goes_nowhere() -> None:
    nobody = {"l4": [4, 0], "h100": [8, 0], "slow": [0, 0]}
    inputs = fleet([service()], [rates_profile(nobody)], TYPES, inventory={"l4": 9}, demand={"s": [4, 1]})
    decided, _ = plan(inputs, None)
    _, long = size_map(decided, inputs, "team/s")
    assert (long.cheapest, long.cost_per_thousand_requests, long.share) == (None, {}, {})
    assert long.demand_rps == 1


def test_a_refused_service_has_no_map_and_an_unknown_one_is_an_error() -> None:
    inputs = fleet([service(profile="nope")], [rates_profile(RATES)], TYPES, inventory={"l4": 9})
    decided, _ = plan(inputs, None)
    assert size_map(decided, inputs, "team/s") == []
    with pytest.raises(KeyError):
        size_map(decided, inputs, "team/t")
