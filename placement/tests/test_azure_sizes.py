"""A plan for the request sizes of a real trace (see `data/README.md`): sixty buckets, four GPU types.

The throughputs are a toy: a replica reads its weights and the KV cache of its running requests once per step. Only
their shape matters here: small devices are cheap for short requests and cannot hold long ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfleet.api import GPUType, ModelProfile
from llmfleet.placement import PlanInputs, explain, plan, violations
from llmfleet.placement.workload import requests_of
from placement_testing.fleets import Point, corners, fleet, gpu_type, point, profile, service

INPUTS = (25, 100, 250, 500, 1000, 2000, 4000, 8000, 12000, 16000)
OUTPUTS = (25, 100, 250, 500, 1000, 2000)
TYPES: list[GPUType] = [
    gpu_type("l4", 0.70, memory_gib=24),
    gpu_type("a10g", 1.01, memory_gib=24),
    gpu_type("a100", 3.67, memory_gib=80),
    gpu_type("h100", 7.516, memory_gib=80),
]
FIGURES = {"l4": (300.0, 121.0), "a10g": (600.0, 125.0), "a100": (1935.0, 312.0), "h100": (3350.0, 989.0)}


def sizes() -> list[tuple[int, int]]:
    path = Path(__file__).parent / "data" / "azure_conv_2023_sample.csv"
    with path.open(newline="") as lines:
        return [(one.input_tokens, one.output_tokens) for one in requests_of(lines, str(path))]


def measured(name: str) -> list[Point]:
    """Points of a model of 7 billion parameters in 16 bits, KV cache of 0.5 MiB per token."""
    bandwidth_gb_s, tflops = FIGURES[name]
    memory_gib = next(t.spec.memory_gib for t in TYPES if t.metadata.name == name)
    points = []
    for inputs, outputs in corners(INPUTS, OUTPUTS):
        prefill_s = 14e9 * inputs / (0.5 * tflops * 1e12)
        kv_gb = (inputs + outputs / 2) * 0.5 / 1024
        for concurrency in (1, 4, 16, 64):
            if concurrency > 1 and concurrency * kv_gb > 0.9 * memory_gib - 15:
                continue
            step_s = (14 + concurrency * kv_gb) / (0.8 * bandwidth_gb_s)
            tpot_s = step_s + concurrency * prefill_s / outputs
            rps = concurrency / (concurrency * prefill_s + outputs * step_s)
            points.append(
                point((inputs, outputs), rps, concurrency=concurrency, ttft_ms=1e3 * prefill_s, tpot_ms=1e3 * tpot_s)
            )
    return points


@pytest.fixture(scope="module")
def model() -> ModelProfile:
    return profile({name: measured(name) for name in FIGURES}, inputs=INPUTS, outputs=OUTPUTS, kvKibPerToken=512)


def inputs_at(rps: float, model: ModelProfile, types: tuple[str, ...] = ()) -> PlanInputs:
    histogram = [0.0] * model.spec.buckets.count
    rows = sizes()
    for row in rows:
        histogram[model.spec.buckets.index(*row)] += rps / len(rows)
    objective = {"ttft": {"milliseconds": 5000}, "tpot": {"milliseconds": 120}}
    return fleet(
        [service(objective=objective, context_length=16384, gpuTypes=list(types))],
        [model],
        TYPES,
        inventory=dict.fromkeys(FIGURES, 200),
        demand={"s": histogram},
        optimality_gap=0.005,
        utilization_target=0.9,
    )


@pytest.mark.parametrize("rps", [1.0, 32.0, 512.0])
def test_a_mix_is_proven_and_no_dearer_than_any_single_type(rps: float, model: ModelProfile) -> None:
    inputs = inputs_at(rps, model)
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    assert decided.status == "optimal"
    assert decided.gap_cost is not None
    assert decided.gap_cost <= 0.005
    singles = explain(decided, inputs, "team/s").single_types
    assert singles
    assert decided.cost_per_hour <= singles[0].cost_per_hour * 1.005
    for single in singles:
        alone, _ = plan(inputs_at(rps, model, (single.gpu_type,)), None)
        if not single.devices_missing:
            assert alone.cost_per_hour == pytest.approx(single.cost_per_hour)


def test_at_scale_mixing_types_saves_money_on_real_sizes(model: ModelProfile) -> None:
    inputs = inputs_at(64.0, model)
    decided, _ = plan(inputs, None)
    cheapest = explain(decided, inputs, "team/s").single_types[0]
    assert len(decided.services[0].replicas) > 1
    assert decided.cost_per_hour < 0.985 * cheapest.cost_per_hour


def test_every_request_of_the_trace_has_a_route_that_meets_its_objective(model: ModelProfile) -> None:
    decided, _ = plan(inputs_at(32.0, model), None)
    (one,) = decided.services
    routed = [0.0] * one.buckets.count
    for route in one.routes:
        routed[route.bucket] += route.fraction
    for row in sizes():
        assert routed[one.buckets.index(*row)] == pytest.approx(1.0, abs=1e-5)
