"""Arrivals: replayed, stretched, thinned and drawn."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.simulator.arrivals import (
    at_rate,
    burstiness,
    rate,
    renewal,
    repeated,
    thinned,
)
from llmfleet.simulator.traces import read_trace

TRACES = Path(__file__).parents[1] / "traces"
SIZES = [(100, 10), (200, 20)]


def test_conversations_come_like_poisson_and_code_in_bursts() -> None:
    conversations, code = (read_trace(TRACES / f"azure_{name}_2023.csv") for name in ("conv", "code"))
    assert (len(conversations), len(code)) == (3118, 2146)
    assert burstiness(conversations) == pytest.approx(1.0, abs=0.1)
    assert burstiness(code) > 50


@given(st.floats(0.01, 1000))
def test_stretching_time_changes_the_rate_and_not_the_bursts(wanted: float) -> None:
    arrivals = renewal(SIZES, 3.0, 200, seed=1, cv2=4.0)
    stretched = at_rate(arrivals, wanted)
    assert rate(stretched) == pytest.approx(wanted)
    assert burstiness(stretched) == pytest.approx(burstiness(arrivals))
    assert [(one.input_tokens, one.output_tokens) for one in stretched] == [
        (one.input_tokens, one.output_tokens) for one in arrivals
    ]


def test_thinning_keeps_about_the_share_and_takes_the_bursts_apart() -> None:
    arrivals = renewal(SIZES, 10.0, 20_000, seed=2, cv2=9.0)
    fewer = thinned(arrivals, 0.1, seed=3)
    assert len(fewer) == pytest.approx(2000, rel=0.1)
    assert set(fewer) <= set(arrivals)
    assert 1.0 < burstiness(fewer) < 0.5 * burstiness(arrivals)
    assert thinned(arrivals, 1.0, seed=3) == arrivals


def test_a_repeated_load_keeps_its_rate() -> None:
    arrivals = renewal(SIZES, 2.0, 50, seed=4)
    longer = repeated(arrivals, 3)
    assert len(longer) == 150
    assert rate(longer) == pytest.approx(rate(arrivals))
    assert all(one.at_s < two.at_s for one, two in itertools.pairwise(longer))


@pytest.mark.parametrize("cv2", [0.0, 0.25, 1.0, 4.0])
def test_drawn_gaps_have_the_rate_and_burstiness_asked_for(cv2: float) -> None:
    arrivals = renewal(SIZES, 5.0, 40_000, seed=5, cv2=cv2)
    assert rate(arrivals) == pytest.approx(5.0, rel=0.05)
    assert burstiness(arrivals) == pytest.approx(cv2, rel=0.1, abs=1e-6)
    assert {(one.input_tokens, one.output_tokens) for one in arrivals} == set(SIZES)


def test_equal_seeds_give_equal_arrivals() -> None:
    assert renewal(SIZES, 5.0, 100, seed=6) == renewal(SIZES, 5.0, 100, seed=6)
    assert renewal(SIZES, 5.0, 100, seed=6) != renewal(SIZES, 5.0, 100, seed=7)


def test_impossible_loads_are_refused() -> None:
    arrivals = renewal(SIZES, 5.0, 10, seed=0)
    with pytest.raises(ValueError, match="requests_per_second: got 0"):
        at_rate(arrivals, 0.0)
    with pytest.raises(ValueError, match="cv2: got -1"):
        renewal(SIZES, 5.0, 10, seed=0, cv2=-1.0)
    with pytest.raises(ValueError, match=r"share: got 1\.5"):
        thinned(arrivals, 1.5, seed=0)
    with pytest.raises(ValueError, match="arrivals: got 1"):
        rate(arrivals[:1])
