"""What the promise row plans: fleets, objectives and loads, and the inputs of a plan for each combination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from e2e.bench.engine_model_loop import profile_model
from e2e.bench.placement_promise_engines import Family
from llmfleet.api import GPUType, LLMService, ModelProfile
from llmfleet.placement import Demand, PlanInputs
from llmfleet.simulator import Arrival
from llmfleet.simulator.arrivals import at_rate, rate, renewal
from llmfleet.simulator.traces import read_trace

KEY = "bench/chat"
_TRACES = Path(__file__).parents[2] / "simulator" / "traces"
_DRAWN_REQUESTS = 4000
_PLENTY = 1000
_CODE_RATE = 0.5

OBJECTIVES = {"tight": (2500.0, 60.0, 90.0), "usual": (4000.0, 120.0, 95.0), "loose": (10000.0, 250.0, 99.0)}
"""TTFT and TPOT in milliseconds, and the percentile of both."""


@dataclass(frozen=True)
class Fleet:
    """Which devices there are, and the rate of conversations that they serve; code comes at half of it."""

    name: str
    family: str
    types: tuple[str, ...]
    requests_per_second: float
    filled: bool
    """Whether the rate is raised until the plan would need more."""


FLEETS = (
    Fleet("one_type_small", "gpus", ("a100",), 2.0, filled=True),
    Fleet("one_type_large", "gpus", ("h100",), 40.0, filled=False),
    Fleet("two_types_small", "gpus", ("l4", "h100"), 5.0, filled=True),
    Fleet("three_types_large", "gpus", ("l4", "a100", "h100"), 40.0, filled=False),
    Fleet("fitted_small", "cpus", ("core",), 15.0, filled=True),
    Fleet("fitted_large", "cpus", ("core", "slow-core"), 60.0, filled=False),
)

Load = Callable[[float], list[Arrival]]
"""Arrivals at a rate of conversations per second."""


def loads(family: Family) -> dict[str, Load]:
    """Each load, its requests shorter than in the traces where the family serves such.

    The last two have every size at the corner of its bucket, as the planner reckons: nothing is hidden by its rounding.
    """
    buckets, shrink = family.buckets, family.shrink

    def trace(name: str) -> list[Arrival]:
        return [
            replace(one, input_tokens=-(-one.input_tokens // shrink), output_tokens=-(-one.output_tokens // shrink))
            for one in read_trace(_TRACES / f"azure_{name}_2023.csv")
        ]

    def drawn(trace: Sequence[Arrival], share: float, cv2: float, seed: int, *, corners: bool = False) -> Load:
        sizes = [(one.input_tokens, one.output_tokens) for one in trace]
        if corners:
            sizes = [buckets.edges(buckets.index(*size)) for size in sizes]
        return lambda rps: renewal(sizes, share * rps, _DRAWN_REQUESTS, seed=seed, cv2=cv2)

    conversations, code = trace("conv"), trace("code")
    return {
        "conv": lambda rps: at_rate(conversations, rps),
        "code": lambda rps: at_rate(code, _CODE_RATE * rps),
        "poisson_conv": drawn(conversations, 1.0, 1.0, 1),
        "poisson_code": drawn(code, _CODE_RATE, 1.0, 2),
        "bursty_conv": drawn(conversations, 1.0, 4.0, 3),
        "corner_conv": drawn(conversations, 1.0, 1.0, 1, corners=True),
        "corner_code": drawn(code, _CODE_RATE, 1.0, 2, corners=True),
    }


def model_profile(family: Family) -> ModelProfile:
    """What `llmfleet profile` would have measured on each of the family's engines."""
    return ModelProfile.parse(
        {
            "metadata": {"name": family.name, "namespace": "bench"},
            "spec": {
                "model": f"bench/{family.name}",
                "weightsGib": family.weights_gib,
                "kvKibPerToken": family.kv_kib_per_token,
                "buckets": family.buckets.to_wire(),
                "measurements": [
                    profile_model(engine, name, family.buckets).to_wire() for name, engine in family.engines.items()
                ],
            },
        },
        strict=True,
    )


def inputs_for(
    profile: ModelProfile, family: Family, objective: str, fleet: Fleet, arrivals: Sequence[Arrival]
) -> PlanInputs:
    """The inputs of a plan for exactly the sizes and the rate of these arrivals."""
    rps = [0.0] * family.buckets.count
    for one in arrivals:
        rps[family.buckets.index(one.input_tokens, one.output_tokens)] += rate(arrivals) / len(arrivals)
    service = LLMService.parse(
        {
            "metadata": {"name": "chat", "namespace": "bench"},
            "spec": {
                "model": {"name": f"bench/{family.name}", "contextLength": family.context_length},
                "profile": family.name,
                "objective": _objective(objective, family.stricter),
                "gpuTypes": list(fleet.types),
            },
        },
        strict=True,
    )
    types = [
        GPUType.parse(
            {
                "metadata": {"name": name},
                "spec": {
                    "resourceName": f"example.com/{name}",
                    "memoryGib": device.memory_gib,
                    "pricePerHour": {"onDemand": device.price_per_hour},
                },
            },
            strict=True,
        )
        for name, device in family.devices.items()
    ]
    return PlanInputs(
        services=[service],
        profiles=[profile],
        gpu_types=types,
        inventory=dict.fromkeys(fleet.types, _PLENTY),
        demand={KEY: Demand(rps=rps)},
    )


def _objective(name: str, stricter: float) -> dict[str, Any]:
    ttft_ms, tpot_ms, percentile = OBJECTIVES[name]
    return {
        "ttft": {"milliseconds": ttft_ms / stricter, "percentile": percentile},
        "tpot": {"milliseconds": tpot_ms / stricter, "percentile": percentile},
    }
