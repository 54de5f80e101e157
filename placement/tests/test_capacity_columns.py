"""What is known of a variant becomes its column of the fleet program."""

from __future__ import annotations

import numpy as np
import pytest

from llmfleet.api import Buckets, Correction, ModelProfile
from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance import PerformanceModel, throughput_column
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.columns import capacity_column, derating, most_measured_rps, reserve_of
from llmfleet.placement.performance.correction import Observation, observe
from llmfleet.placement.performance.variant_model import missing_for, variant_model
from placement_testing.fleets import gpu_type, point, profile, service

OBJECTIVE: Objective = service().spec.objective
SHAPE = architecture_of(
    {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)
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


def column(of: ModelProfile, *, standard_errors: float = 1.0) -> list[float]:
    spec = of.spec
    most = most_measured_rps(spec.measurements[0], spec.buckets)
    found = capacity_column(model(of), spec.buckets, OBJECTIVE, most_rps=most, standard_errors=standard_errors)
    return list(found)


def test_a_column_lies_between_the_best_run_that_kept_the_objective_and_the_fastest_of_all() -> None:
    spec = measured().spec
    kept = throughput_column(spec.measurements[0], spec.buckets, OBJECTIVE).rps
    most = most_measured_rps(spec.measurements[0], spec.buckets)
    assert list(most) == [9.0, 2.8]
    for found, at_a_point, fastest in zip(column(measured(), standard_errors=0), kept, most, strict=True):
        assert 0.9 * at_a_point <= found <= fastest


def test_a_bucket_that_was_not_measured_is_zero_without_and_predicted_with_an_architecture() -> None:
    buckets = Buckets(input_tokens=[512, 4096, 16384], output_tokens=[128])
    without = capacity_column(model(measured()), buckets, OBJECTIVE)
    assert without[2] == 0
    long = Objective.model_validate({"ttft": {"milliseconds": 60_000}, "tpot": {"milliseconds": 500}})
    assert capacity_column(model(measured(architecture=True)), buckets, long)[2] > 0


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
    before = column(slower)
    slower.status.corrections.append(learned)
    assert column(slower)[0] < 0.7 * before[0]


def test_a_mix_of_unlike_sizes_holds_less_than_the_sum_of_its_shares() -> None:
    spec = measured().spec
    found = np.array(column(measured()))
    alone = derating(model(measured()), spec.buckets, OBJECTIVE, found, np.array([1.0, 0.0]))
    assert alone == pytest.approx(1.0)
    mixed = derating(model(measured()), spec.buckets, OBJECTIVE, found, np.array([0.7, 0.3]))
    assert 0 < mixed < 1
    with pytest.raises(ValueError, match=r"share of bucket 1 is 0\.3, but the column never serves it"):
        derating(model(measured()), spec.buckets, OBJECTIVE, found * [1, 0], np.array([0.7, 0.3]))


def test_the_reserve_grows_with_bursts() -> None:
    spec = measured().spec
    share = np.array([0.7, 0.3])
    calm, bursty = (
        reserve_of(model(measured()), spec.buckets, OBJECTIVE, share, expected_replicas=4, arrivals_cv2=cv2)
        for cv2 in (1.0, 9.0)
    )
    assert 0 < calm.replicas < bursty.replicas
    assert calm.holds(4) > bursty.holds(4)
