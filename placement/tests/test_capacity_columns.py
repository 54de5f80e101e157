"""What is known of a variant becomes its column of the fleet program."""

from __future__ import annotations

import numpy as np
import pytest

from llmfleet.api import Buckets, Correction, ModelProfile
from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance import PerformanceModel, throughput_column
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.correction import Observation, observe
from llmfleet.placement.performance.figures import VariantFigures, figures_of_variant, most_measured_rps
from llmfleet.placement.performance.variant_model import missing_for, variant_model
from placement_testing.fleets import gpu_type, point, profile, service
from placement_testing.shapes import LLAMA_8B

OBJECTIVE: Objective = service().spec.objective
SHAPE = architecture_of(LLAMA_8B)
H100 = gpu_type("h100-sxm", 4.0)


def measured(*, architecture: bool = False) -> ModelProfile:
    """One second of TTFT and 50 ms of TPOT are asked for; the fastest run at each corner misses the latter."""
    points = [
        point(corner, rps, concurrency=n, ttft_ms=ttft, tpot_ms=tpot)
        for corner, n, rps, ttft, tpot in (
            ((512, 128), 1, 0.7, 60, 10),
            ((512, 128), 16, 6.0, 150, 20),
            ((512, 128), 64, 9.0, 500, 54),
            ((4096, 128), 1, 0.5, 300, 12),
            ((4096, 128), 16, 2.5, 800, 45),
            ((4096, 128), 64, 2.8, 4000, 150),
        )
    ]
    found = profile({"h100-sxm": points})
    spec = found.spec.model_copy(update={"architecture": SHAPE if architecture else None})
    return found.model_copy(update={"spec": spec})


def model(of: ModelProfile, tensor_parallel: int = 1) -> PerformanceModel:
    found = variant_model(of, H100, tensor_parallel, now=0.0)
    assert found is not None
    return found


def figures(of: ModelProfile, *, now: float = 0.0) -> VariantFigures:
    found = figures_of_variant(of, H100, 1, now=now)
    assert found is not None
    return found


def test_a_column_lies_between_the_best_run_that_kept_the_objective_and_the_fastest_of_all() -> None:
    spec = measured().spec
    kept = throughput_column(spec.measurements[0], spec.buckets, OBJECTIVE).rps
    most = most_measured_rps(spec.measurements[0], spec.buckets)
    assert list(most) == [9.0, 2.8]
    for found, at_a_point, fastest in zip(figures(measured()).column(OBJECTIVE), kept, most, strict=True):
        assert 0.9 * at_a_point <= found <= fastest


def test_a_bucket_that_was_not_measured_is_zero_without_and_predicted_with_an_architecture() -> None:
    buckets = Buckets(input_tokens=[512, 4096, 16384], output_tokens=[128])

    def wider(of: ModelProfile) -> ModelProfile:
        return of.model_copy(update={"spec": of.spec.model_copy(update={"buckets": buckets})})

    long = Objective.model_validate({"ttft": {"milliseconds": 60_000}, "tpot": {"milliseconds": 500}})
    without = figures(wider(measured()))
    assert without.known.tolist() == [True, True, False]
    assert without.column(long)[2] == 0
    predicted = figures(wider(measured(architecture=True)))
    assert predicted.column(long)[2] > 0
    assert predicted.source(np.array([True, True, False])) == "measured"
    assert predicted.source(np.array([True, True, True])) == "roofline"


def test_another_tensor_parallel_degree_is_predicted_and_only_with_what_it_needs() -> None:
    assert variant_model(measured(), H100, 2, now=0.0) is None
    assert missing_for(measured(), H100) == [
        "ModelProfile team/p: spec.architecture; `llmfleet profile import --config config.json` writes it"
    ]
    assert missing_for(measured(architecture=True), H100) == []
    assert "spec.hardware" in missing_for(measured(architecture=True), gpu_type("cpu", 1.0))[0]
    found = model(measured(architecture=True), 2).predict(512, 128, 4)
    assert found.source == "roofline"


def test_what_was_learned_of_a_variant_is_in_its_column() -> None:
    slower = measured()
    plain = model(slower)
    learned = Correction(gpu_type="h100-sxm", tensor_parallel=1, pipeline_parallel=1, configuration="default")
    for load in (1, 4, 16, 64):
        seen = plain.predict(512, 128, load)
        observation = Observation(0.0, 512, 128, load, 2 * float(seen.ttft_ms), 2 * float(seen.tpot_ms), 1000)
        learned = observe(learned, observation, seen)
    before = figures(slower).column(OBJECTIVE)
    slower.status.corrections.append(learned)
    assert figures(slower).column(OBJECTIVE)[0] < 0.7 * before[0]
    month = 30 * 86_400.0
    assert figures(slower, now=month).column(OBJECTIVE)[0] == pytest.approx(before[0], rel=0.02)


def test_a_mix_of_unlike_sizes_holds_less_than_the_sum_of_its_shares() -> None:
    one, mix = figures(measured()), np.array([0.7, 0.3])
    alone = one.margin(OBJECTIVE, np.array([1.0, 0.0]), replicas=4, arrivals_cv2=0)
    assert alone.share == pytest.approx(1.0)
    assert alone.reserve == 0
    mixed = one.margin(OBJECTIVE, mix, replicas=4, arrivals_cv2=0)
    assert 0 < mixed.share < 1
    held = mixed.holds(4) * one.linear_rps(OBJECTIVE, mix)
    assert one.outlook(OBJECTIVE, held * mix, replicas=4, arrivals_cv2=0).keeps(OBJECTIVE)
    assert not one.outlook(OBJECTIVE, 1.1 * held * mix, replicas=4, arrivals_cv2=0).keeps(OBJECTIVE)


def test_the_reserve_grows_with_bursts() -> None:
    calm, bursty = (
        figures(measured()).margin(OBJECTIVE, np.array([0.7, 0.3]), replicas=4, arrivals_cv2=cv2) for cv2 in (1.0, 9.0)
    )
    assert 0 < calm.reserve < bursty.reserve
    assert calm.holds(4) > bursty.holds(4)


def test_what_a_variant_can_do_at_best_is_an_objective_that_it_keeps() -> None:
    tight = Objective.model_validate({"ttft": {"milliseconds": 1}, "tpot": {"milliseconds": 1}})
    one = figures(measured())
    assert not one.column(tight).any()
    ttft_ms, tpot_ms = one.best(tight)
    just = Objective.model_validate({"ttft": {"milliseconds": ttft_ms[1]}, "tpot": {"milliseconds": tpot_ms[1]}})
    assert one.column(just)[1] > 0


def test_equal_variants_share_their_answers_and_unlike_ones_do_not() -> None:
    first = measured()
    other = first.model_copy(update={"metadata": first.metadata.model_copy(update={"name": "other"})})
    assert figures(first) is figures(other)
    assert figures(first) is not figures(measured(architecture=True))
