"""The largest load at which TTFT and TPOT both hold: against queues with known answers, and as laws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance import Prediction
from llmfleet.placement.performance.capacity import (
    Capacity,
    Margin,
    Outlook,
    capacities,
    large_pool_rps,
    outlook,
    pool_margin,
)
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.mixture import ReplicaCurves, SizeMix, combined, replica_curves
from llmfleet.placement.performance.model import loads
from placement_testing.fleets import point, profile


@dataclass(frozen=True)
class Engine:
    """TTFT grows with the prompt and the others' prompts, TPOT with the batch."""

    error: float = 0.0

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        inputs, _, n = loads(input_tokens, output_tokens, concurrency)
        flat = np.ones_like(n)
        return Prediction(
            ttft_ms=20 + 0.1 * inputs * (1 + 0.1 * (n - 1)),
            tpot_ms=10 + 0.3 * n + 0.001 * inputs,
            ttft_spread=0.3 * flat,
            tpot_spread=0.1 * flat,
            ttft_error=self.error * flat,
            tpot_error=self.error * flat,
            source=np.full(n.shape, "roofline"),
        )


def mix(inputs: list[float], outputs: list[float], weights: list[float]) -> SizeMix:
    return SizeMix(np.array(inputs, dtype=float), np.array(outputs, dtype=float), np.array(weights, dtype=float))


CHAT = mix([512, 2048], [128, 256], [3, 1])


def objective(ttft_ms: float = 1000, tpot_ms: float = 40, percentile: float = 95) -> Objective:
    return Objective.model_validate(
        {
            "ttft": {"milliseconds": ttft_ms, "percentile": percentile},
            "tpot": {"milliseconds": tpot_ms, "percentile": percentile},
        }
    )


def capacity(
    curves: ReplicaCurves, wanted: Objective | None = None, *, replicas: int = 1, arrivals_cv2: float = 1.0
) -> Capacity:
    return capacities([curves], wanted or objective(), replicas=replicas, arrivals_cv2=arrivals_cv2)[0]


def server(rps: float, service_ms: float) -> ReplicaCurves:
    """A replica with one place, no scatter, and a TPOT that is always kept."""
    one = np.ones((1, 1))
    return ReplicaCurves(np.ones(1), service_ms * one, 0 * one, np.ones(1), 0 * one, np.array([rps]))


def test_one_place_is_the_queue_with_one_server() -> None:
    found = capacity(server(10, 100), objective(ttft_ms=500))
    load = found.requests_per_second / 10
    assert found.concurrency == pytest.approx(load / (1 - load), rel=1e-6)
    # At most four more than the one in service may be found: the fifth waits (4 + 1) x 100 ms beyond its own 100.
    assert found.ttft_attainment == pytest.approx(1 - load**5, rel=1e-6)
    assert found.ttft_attainment == pytest.approx(0.95, abs=1e-6)
    assert found.limited_by == "ttft"


def test_several_single_places_are_the_queue_of_erlang() -> None:
    servers, found = 5, capacity(server(10, 100), objective(ttft_ms=150), replicas=5)
    offered = found.requests_per_second / 10
    load = offered / servers
    busy = offered**servers / math.factorial(servers) / (1 - load)
    waits = busy / (sum(offered**k / math.factorial(k) for k in range(servers)) + busy)
    assert found.concurrency * servers == pytest.approx(offered + waits * load / (1 - load), rel=1e-6)


@pytest.mark.parametrize("arrivals_cv2", [1.0, 3.0, 9.0])
def test_batches_lengthen_the_queue_as_the_theory_of_bulk_arrivals_says(arrivals_cv2: float) -> None:
    found = capacity(server(10, 100), objective(ttft_ms=3000), arrivals_cv2=arrivals_cv2)
    load, batch = found.requests_per_second / 10, (arrivals_cv2 + 1) / 2
    assert found.concurrency == pytest.approx(load * batch / (1 - load), rel=1e-6)


def test_large_requests_slow_the_small_ones_down_in_the_same_batch() -> None:
    small, large = (replica_curves(Engine(), mix([size], [128], [1])) for size in (512, 8192))
    mixed = replica_curves(Engine(), mix([512, 8192], [128, 128], [0.5, 0.5]))
    assert (mixed.tpot_ms > small.tpot_ms).all()
    assert (mixed.tpot_ms < large.tpot_ms).all()
    assert (mixed.ttft_ms[0] >= small.ttft_ms[0]).all()
    # They stay longer, so more than half of those in flight are large.
    assert (mixed.tpot_ms > (small.tpot_ms + large.tpot_ms) / 2).all()


@settings(deadline=None)
@given(
    st.floats(50, 5000),
    st.floats(12, 120),
    st.floats(50, 99.9),
    st.integers(1, 8),
    st.floats(1, 20),
    st.floats(1.01, 3),
)
def test_capacity_falls_with_burstiness_and_with_tighter_objectives(
    ttft_ms: float, tpot_ms: float, percentile: float, replicas: int, arrivals_cv2: float, factor: float
) -> None:
    curves = replica_curves(Engine(), CHAT, most_concurrency=64)
    base = capacity(curves, objective(ttft_ms, tpot_ms, percentile), replicas=replicas, arrivals_cv2=arrivals_cv2)
    harder = [
        capacity(
            curves, objective(ttft_ms / factor, tpot_ms, percentile), replicas=replicas, arrivals_cv2=arrivals_cv2
        ),
        capacity(
            curves, objective(ttft_ms, tpot_ms / factor, percentile), replicas=replicas, arrivals_cv2=arrivals_cv2
        ),
        capacity(curves, objective(ttft_ms, tpot_ms, 99.95), replicas=replicas, arrivals_cv2=arrivals_cv2),
        capacity(
            curves, objective(ttft_ms, tpot_ms, percentile), replicas=replicas, arrivals_cv2=arrivals_cv2 * factor
        ),
    ]
    for one in harder:
        assert one.requests_per_second <= base.requests_per_second * (1 + 1e-6) + 1e-6
    if base.requests_per_second > 0:
        assert min(base.ttft_attainment, base.tpot_attainment) >= percentile / 100 - 1e-9


@settings(deadline=None)
@given(st.floats(0.1, 30), st.integers(1, 6), st.floats(1, 10))
def test_capacity_is_never_above_what_was_seen_to_be_completed(
    seen_rps: float, replicas: int, arrivals_cv2: float
) -> None:
    curves = replica_curves(Engine(), CHAT, most_concurrency=64, most_requests_per_second=seen_rps)
    found = capacity(curves, objective(1e6, 1e6), replicas=replicas, arrivals_cv2=arrivals_cv2)
    assert found.requests_per_second <= replicas * seen_rps
    assert large_pool_rps(curves, objective(1e6, 1e6)) <= seen_rps


def test_replicas_of_a_larger_pool_hold_more_each_up_to_the_pool_without_end() -> None:
    curves = replica_curves(Engine(), CHAT)
    each = [capacity(curves, replicas=m, arrivals_cv2=4).requests_per_second / m for m in (1, 2, 4, 16, 64)]
    assert each == sorted(each)
    assert each[0] < 0.9 * each[-1]
    assert each[-1] == pytest.approx(large_pool_rps(curves, objective()), rel=0.05)


@pytest.mark.parametrize("arrivals_cv2", [1.0, 6.0])
@pytest.mark.parametrize("expected", [2, 3, 20])
def test_a_margin_is_exact_for_one_and_the_expected_number_and_near_the_truth_beyond(
    arrivals_cv2: float, expected: int
) -> None:
    curves = replica_curves(Engine(), CHAT)
    rps = 1.3 * large_pool_rps(curves, objective())
    margin = pool_margin(curves, curves, objective(), rps=rps, expected=expected, arrivals_cv2=arrivals_cv2)
    assert 0 < margin.reserve <= 1
    assert margin.share == pytest.approx(1 / 1.3, rel=0.05)
    for replicas in (1, expected, 2 * expected, 50):
        holds = capacity(curves, replicas=replicas, arrivals_cv2=arrivals_cv2).requests_per_second
        assert rps * margin.holds(replicas) == pytest.approx(holds, rel=0.02)
        if replicas in (1, expected):
            assert rps * margin.holds(replicas) == pytest.approx(holds, rel=2e-4)


def test_paced_arrivals_hold_nothing_back() -> None:
    curves = replica_curves(Engine(), CHAT)
    large = large_pool_rps(curves, objective())
    assert pool_margin(curves, curves, objective(), rps=large, expected=2, arrivals_cv2=0) == Margin(1.0, 0.0)
    seen = outlook(curves, objective(), 3 * large, replicas=3, arrivals_cv2=0)
    assert seen.keeps(objective())
    assert not outlook(curves, objective(), 3.3 * large, replicas=3, arrivals_cv2=0).keeps(objective())


@pytest.mark.parametrize(("replicas", "arrivals_cv2"), [(1, 1), (3, 1), (3, 6), (40, 2)])
def test_at_its_capacity_a_pool_just_keeps_the_objective(replicas: int, arrivals_cv2: float) -> None:
    curves, wanted = replica_curves(Engine(), CHAT), objective()
    holds = capacity(curves, replicas=replicas, arrivals_cv2=arrivals_cv2).requests_per_second

    def seen(factor: float) -> Outlook:
        return outlook(curves, wanted, factor * holds, replicas=replicas, arrivals_cv2=arrivals_cv2)

    assert seen(1.0).keeps(wanted)
    assert not seen(1.02).keeps(wanted)
    tightest = max(seen(1.0).ttft_ms / 1000, seen(1.0).tpot_ms / 40)
    assert tightest == pytest.approx(1.0, rel=0.03)
    assert seen(0.5).ttft_ms < seen(1.0).ttft_ms
    assert seen(0.5).tpot_ms < seen(1.0).tpot_ms
    assert math.isinf(seen(100).ttft_ms)


def test_the_coarse_grid_of_a_large_pool_agrees_with_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = replica_curves(Engine(), CHAT)
    coarse = capacity(curves, replicas=60, arrivals_cv2=3)
    monkeypatch.setattr("llmfleet.placement.performance.capacity._MOST_STATES", 10**9)
    exact = capacity(curves, replicas=60, arrivals_cv2=3)
    assert coarse.requests_per_second == pytest.approx(exact.requests_per_second, rel=3e-3)
    assert coarse.concurrency == pytest.approx(exact.concurrency, rel=5e-3)


def test_a_model_that_is_less_sure_is_given_less() -> None:
    sure, unsure = (replica_curves(Engine(error), CHAT) for error in (0.0, 0.2))
    assert capacity(unsure).requests_per_second < capacity(sure).requests_per_second
    trusted = replica_curves(Engine(0.2), CHAT, standard_errors=0)
    assert capacity(trusted).requests_per_second == pytest.approx(capacity(sure).requests_per_second)


def test_what_no_load_keeps_holds_nothing_and_an_unknown_size_neither() -> None:
    curves = replica_curves(Engine(), CHAT)
    found = capacity(curves, objective(ttft_ms=1))
    assert (found.requests_per_second, found.limited_by) == (0.0, "ttft")
    assert large_pool_rps(curves, objective(ttft_ms=1)) == 0.0
    assert pool_margin(curves, curves, objective(ttft_ms=1), rps=1.0, expected=2).holds(100) == 0.0
    table = MeasuredTable(profile({"l4": [point((512, 128), 1.0)]}, inputs=(512,), outputs=(128,)).spec.measurements[0])
    unknown = replica_curves(table, mix([512, 4096], [128, 128], [1, 1]))
    assert unknown.places == 0
    assert capacities([unknown, curves], objective())[0].requests_per_second == 0.0


def test_measured_points_limit_how_many_are_in_flight() -> None:
    points = [point((512, 128), rps, concurrency=n, ttft_ms=50, tpot_ms=10) for n, rps in ((1, 0.7), (16, 9.0))]
    table = MeasuredTable(profile({"l4": points}, inputs=(512,), outputs=(128,)).spec.measurements[0])
    curves = replica_curves(table, mix([512], [128], [1]), most_requests_per_second=9.0)
    assert curves.places == 16
    found = capacity(curves, objective(ttft_ms=1000, tpot_ms=1000))
    assert 0.8 * 9.0 < found.requests_per_second < 9.0


@pytest.mark.parametrize("weight", [[], [0.0], [-1.0, 2.0], [float("nan")]])
def test_an_impossible_mix_is_refused(weight: list[float]) -> None:
    with pytest.raises(ValueError, match=r"SizeMix\.weight is .*; accepted are numbers of at least 0, not all 0"):
        mix([1] * len(weight), [1] * len(weight), weight)


def test_impossible_pools_are_refused_by_name() -> None:
    curves = replica_curves(Engine(), CHAT)
    with pytest.raises(ValueError, match="replicas is 0; accepted is a number of at least 1"):
        capacity(curves, replicas=0)
    with pytest.raises(ValueError, match="expected is 1; accepted is a number of at least 2"):
        pool_margin(curves, curves, objective(), rps=1.0, expected=1)
    with pytest.raises(ValueError, match="arrivals_cv2 is nan"):
        capacity(curves, arrivals_cv2=math.nan)


def test_a_rare_large_size_takes_places_by_its_share_only() -> None:
    points = [point((512, 128), 1.0, concurrency=n, ttft_ms=50, tpot_ms=10 + n / 8) for n in (1, 64)] + [
        point((8192, 128), 1.0, concurrency=n, ttft_ms=800, tpot_ms=10 + 4 * n) for n in (1, 4)
    ]
    table = MeasuredTable(profile({"l4": points}, inputs=(512, 8192), outputs=(128,)).spec.measurements[0])
    small, rare, large = (
        replica_curves(table, mix([512, 8192], [128, 128], [1 - share, share])) for share in (0.0, 0.01, 1.0)
    )
    assert (small.places, large.places) == (64, 4)
    assert 40 < rare.places < 64
    assert (rare.tpot_ms >= small.tpot_ms[: rare.places]).all()


def test_short_answers_among_long_prompts_scatter_more_than_long_answers() -> None:
    curves = replica_curves(Engine(), mix([512, 512, 8192], [16, 512, 128], [1, 1, 1]))
    short, long, _ = curves.tpot_spread[:, 31]
    assert short > 2 * long > 0.1
    bursty = combined(
        Engine().predict([[512], [512], [8192]], [[16], [512], [128]], np.arange(1.0, 257)),
        mix([512, 512, 8192], [16, 512, 128], [1, 1, 1]),
        dispersion=4.0,
    )
    assert bursty.tpot_spread[0, 31] > 1.2 * short
    alone = replica_curves(Engine(), mix([512], [16], [1]))
    assert alone.tpot_spread[0, 31] == pytest.approx(0.1)


def test_answers_scatter_as_their_mean_does_and_as_half_of_the_longest_where_that_is_all_that_is_known() -> None:
    longest = mix([512, 512, 512], [256, 256, 256], [1, 1, 1])
    assert longest.scattering_output_tokens.tolist() == [128, 128, 128]
    known = SizeMix(
        np.full(3, 512.0), np.array([64.0, 170.0, 256.0]), np.ones(3), longest_output_tokens=np.full(3, 256.0)
    )
    assert known.scattering_output_tokens.tolist() == [64, 170, 128]


def test_a_size_that_does_not_come_leaves_the_others_with_their_longest() -> None:
    some = SizeMix(np.full(2, 512.0), np.array([64.0, 90.0]), np.array([0.0, 2.0]), np.array([128.0, 256.0]))
    assert some.longest_output_tokens is not None
    assert some.longest_output_tokens.tolist() == [256]
