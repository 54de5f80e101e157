"""What a replica is taken to be able to do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import MeasuredPoint, Measurement
from llmfleet.api.gputype import Hardware
from llmfleet.placement.performance import fit_latency, implausibilities, throughput_column
from llmfleet.placement.variants import candidates
from placement_testing.fleets import gpu_type, percentiles, point, profile, service

CORNER = (512, 128)


def column(
    *points: dict[str, object], ttft_ms: float = 1000, tpot_ms: float = 50, percentile: float = 95
) -> list[float]:
    measured = profile({"l4": list(points)}, inputs=(512,), outputs=(128,)).spec
    objective = service(
        objective={
            "ttft": {"milliseconds": ttft_ms, "percentile": percentile},
            "tpot": {"milliseconds": tpot_ms, "percentile": percentile},
        }
    ).spec.objective
    return list(throughput_column(measured.measurements[0], measured.buckets, objective).rps)


def test_the_fastest_point_within_both_targets_counts() -> None:
    slow, fast, too_fast = (
        point(CORNER, 1.0, concurrency=1),
        point(CORNER, 5.0, concurrency=8),
        point(CORNER, 9.0, concurrency=32, tpot_ms=51),
    )
    assert column(slow, fast, too_fast) == [5.0]


def test_a_point_that_meets_only_one_target_is_not_combined_with_one_that_meets_the_other() -> None:
    assert column(point(CORNER, 3.0, concurrency=4, ttft_ms=2000), point(CORNER, 4.0, tpot_ms=80)) == [0.0]


def test_the_objective_is_judged_at_the_next_measured_percentile_above_it() -> None:
    tail = point(CORNER, 2.0) | {"tpotMs": {"p50": 10, "p90": 20, "p95": 30, "p99": 90, "max": 95}}
    assert column(tail, percentile=95) == [2.0]
    assert column(tail, percentile=96) == [0.0]
    assert column(tail, percentile=96, tpot_ms=90) == [2.0]


def test_points_off_the_corners_say_nothing_about_a_bucket() -> None:
    measured = profile({"l4": [point((256, 128), 9.0)]}, inputs=(512,), outputs=(128,)).spec
    found = throughput_column(measured.measurements[0], measured.buckets, service().spec.objective)
    assert list(found.rps) == [0.0]
    assert not found.measured.any()


def test_straight_lines_are_recovered_and_one_bad_run_does_not_tilt_them() -> None:
    points = [
        point(
            (inputs, 128), 1.0, concurrency=concurrency, ttft_ms=30 + 0.1 * inputs, tpot_ms=10 + 2 * (concurrency - 1)
        )
        for inputs in (256, 512, 1024, 2048, 4096)
        for concurrency in (1, 2, 4, 8, 16)
    ]
    points[5] |= {"ttftMs": percentiles(5000)}
    fit = fit_latency(profile({"l4": points}).spec.measurements[0])
    assert fit.ttft_base_ms == pytest.approx(30)
    assert fit.ttft_ms_per_input_token == pytest.approx(0.1)
    assert fit.tpot_base_ms == pytest.approx(10)
    assert fit.tpot_ms_per_running == pytest.approx(2)


@given(
    st.lists(
        st.tuples(st.sampled_from([16, 512, 4096]), st.integers(1, 64), st.floats(0, 1e5), st.floats(0, 1e3)),
        min_size=1,
        max_size=20,
        unique_by=lambda run: run[:2],
    )
)
def test_coefficients_are_never_negative(runs: list[tuple[int, int, float, float]]) -> None:
    points = [
        MeasuredPoint.model_validate(point((inputs, 128), 1.0, concurrency=c, ttft_ms=ttft, tpot_ms=tpot))
        for inputs, c, ttft, tpot in runs
    ]
    fit = fit_latency(Measurement(gpu_type="l4", points=points))
    assert min(fit.ttft_base_ms, fit.ttft_ms_per_input_token, fit.tpot_base_ms, fit.tpot_ms_per_running) >= 0


def test_claims_faster_than_the_hardware_are_called_out() -> None:
    hardware = Hardware(memory_bandwidth_gb_per_second=300, dense_tflops=121)
    # 8 billion parameters in 16 bits: 53 ms to read once, 67 ms of operations for 512 tokens.
    honest = profile({"l4": [point(CORNER, 1.0, ttft_ms=70, tpot_ms=55)]}, weightsGib=15, parametersBillion=8).spec
    boast = profile({"l4": [point(CORNER, 1.0, ttft_ms=60, tpot_ms=50)]}, weightsGib=15, parametersBillion=8).spec
    split = profile({"l4-tp2": [point(CORNER, 1.0, ttft_ms=60, tpot_ms=50)]}, weightsGib=15, parametersBillion=8).spec
    assert implausibilities(honest, honest.measurements[0], hardware) == []
    assert implausibilities(split, split.measurements[0], hardware) == []
    tpot, ttft = implausibilities(boast, boast.measurements[0], hardware)
    assert "tpotMs.p50 of 50 ms at input 512 output 128 concurrency 64 is below the 53.3 ms" in tpot
    assert "ttftMs.p50 of 60 ms" in ttft
    assert "67.7 ms" in ttft


def test_a_mixture_of_experts_is_not_accused_of_reading_too_few_weights() -> None:
    hardware = Hardware(memory_bandwidth_gb_per_second=300, dense_tflops=121)
    experts = profile({"l4": [point(CORNER, 1.0, ttft_ms=70, tpot_ms=25)]}, weightsGib=60, parametersBillion=3).spec
    assert implausibilities(experts, experts.measurements[0], hardware) == []


def test_a_replica_needs_memory_for_weights_one_full_context_and_overhead() -> None:
    # 10 GiB of weights, 64 KiB x 16384 tokens = 1 GiB, 1 GiB overhead: 12 GiB of 0.9 x memory.
    model = profile({"l4": [point(CORNER, 1.0)], "l4-tp2": [point(CORNER, 1.0)]})
    asked = service(context_length=16384)
    for memory_gib, names in ((13.4, ["l4", "l4-tp2"]), (13.3, ["l4-tp2"]), (7.2, []), (7.3, ["l4-tp2"])):
        found, excluded = candidates(asked, model, {"l4": gpu_type("l4", 1.0, memory_gib=memory_gib)}, now=0.0)
        assert [variant.name for variant in found] == names
        assert {e.name for e in excluded if e.reason == "does_not_fit"} == {"l4", "l4-tp2"} - set(names)
