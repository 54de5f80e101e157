"""Objects that the integration tests and the benchmark apply: a policy, GPU types, a profile of them, a service."""

from __future__ import annotations

import math
from typing import Any

API_VERSION = "llmfleet.io/v1alpha1"
INPUT_EDGES = (128, 512, 2048)
OUTPUT_EDGES = (64, 256)
TPOT_MS = 10.0

Json = dict[str, Any]


def gpu_type(name: str, resource: str, price: float, limit: int | None = None, **more: Any) -> Json:
    """A GPUType whose devices are those that nodes offer as `resource`."""
    spec: Json = {"resourceName": resource, "memoryGib": 24, "pricePerHour": {"onDemand": price}, **more}
    return {
        "apiVersion": API_VERSION,
        "kind": "GPUType",
        "metadata": {"name": name},
        "spec": spec if limit is None else spec | {"limit": limit},
    }


def policy(**spec: Any) -> Json:
    """The FleetPolicy; what is not given has its default."""
    return {"apiVersion": API_VERSION, "kind": "FleetPolicy", "metadata": {"name": "default"}, "spec": spec}


def profile(namespace: str, requests_per_second: dict[str, float], name: str = "tiny") -> Json:
    """A profile of six buckets; `requests_per_second` is each type's throughput in the smallest bucket."""
    return {
        "apiVersion": API_VERSION,
        "kind": "ModelProfile",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": "example/tiny",
            "weightsGib": 1,
            "kvKibPerToken": 16,
            "buckets": {"inputTokens": list(INPUT_EDGES), "outputTokens": list(OUTPUT_EDGES)},
            "measurements": [
                {"gpuType": gpu, "points": [_point(i, o, rate) for i in INPUT_EDGES for o in OUTPUT_EDGES]}
                for gpu, rate in requests_per_second.items()
            ],
        },
    }


def _point(input_tokens: int, output_tokens: int, rate: float) -> Json:
    work = (input_tokens / 8 + output_tokens) / (INPUT_EDGES[0] / 8 + OUTPUT_EDGES[0])
    ttft_ms = 20 + input_tokens / 10

    def latency(ms: float) -> Json:
        return {"p50": ms, "p90": ms, "p95": ms, "p99": ms, "max": ms}

    return {
        "inputTokens": input_tokens,
        "outputTokens": output_tokens,
        # As many as it takes to have that rate at these latencies (Little's law).
        "concurrency": max(4, math.ceil(rate / work * (ttft_ms + output_tokens * TPOT_MS) / 1e3)),
        "requests": 100,
        "requestsPerSecond": rate / work,
        "ttftMs": latency(ttft_ms),
        "tpotMs": latency(TPOT_MS),
    }


def service(
    namespace: str,
    name: str,
    rate: float,
    *,
    gpu_types: tuple[str, ...] = (),
    profile_name: str = "tiny",
    **spec: Any,
) -> Json:
    """An LLMService that expects `rate` requests per second of the smallest size."""
    return {
        "apiVersion": API_VERSION,
        "kind": "LLMService",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": "hf", "name": "example/tiny", "contextLength": 4096},
            "profile": profile_name,
            "objective": {"ttft": {"milliseconds": 1000}, "tpot": {"milliseconds": 100}},
            "traffic": {
                "mode": "expected",
                "requestsPerSecond": rate,
                "sizes": [{"inputTokens": INPUT_EDGES[0], "outputTokens": OUTPUT_EDGES[0]}],
            },
            "gpuTypes": list(gpu_types),
            "engine": {"terminationGracePeriodSeconds": 1},
        }
        | spec,
    }
