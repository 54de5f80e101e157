"""Large fleets as objects: what `plan` itself is measured on, names, profiles and the performance model included.

    scarce_fleet(services, seed) -> PlanInputs

Five dense models of 3 to 70 billion parameters, seven GPU types known by their data sheets, and services whose rates
and sizes are those of `instances`: 60 buckets, a few profiles that many services share, log-uniform rates. No profile
is measured: figures are computed from the models' shapes. Devices of each type are a share of what the fleet would take
if nothing were scarce. Everything follows from the seed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from llmfleet.api import FleetPolicySpec, LLMService, ModelProfile
from llmfleet.placement import Demand, PlanInputs, plan
from placement_testing.fleets import gpu_type
from placement_testing.instances import INPUT_TOKENS, OUTPUT_TOKENS, sizes

_TYPES = (
    ("l4", 22.5, 0.70, 72),
    ("a10g", 22.5, 0.80, 150),
    ("l40s", 45.0, 1.95, 350),
    ("a100-40gb", 40.0, 1.90, 400),
    ("a100-80gb", 80.0, 2.40, 400),
    ("h100", 79.6, 6.00, 700),
    ("h200", 141.0, 7.50, 700),
)
"""Name, memory in GiB, price per hour, watts at peak."""
_AMPLE = "h200"
"""The dearest type, of which there is always enough: cheaper ones are short, and all can be served."""
_MODELS = (
    ("3b", 3.2, 28, 3072, 2.8),
    ("8b", 8.0, 32, 4096, 7.5),
    ("14b", 14.8, 48, 5120, 14.0),
    ("32b", 32.8, 64, 5120, 32.0),
    ("70b", 70.6, 80, 8192, 69.5),
)
"""Name, parameters in billions, layers, width, parameters that every token passes in billions."""
_INPUT_EDGES = 8
"""Prompts up to 16,384 tokens."""
_OBJECTIVES_TTFT_MS = (1000, 2000, 5000, 10_000)
_OBJECTIVES_TPOT_MS = (40, 60, 100, 150)


def scarce_fleet(services: int, seed: int, *, inventory: float = 0.8, **policy: Any) -> PlanInputs:
    """So many services on `inventory` of the devices that the fleet would take if nothing were scarce, at least eight
    of a type. `policy`: fields of the FleetPolicy."""
    chance = np.random.default_rng(seed)
    members, demand = [], {}
    for number in range(services):
        members.append(_service(number, chance))
        rate = float(np.exp(chance.uniform(np.log(0.05), np.log(20))))
        demand[members[-1].key] = Demand(rps=_rates(chance, rate))
    inputs = PlanInputs(
        services=members,
        profiles=[_profile(*model) for model in _MODELS],
        gpu_types=[
            gpu_type(name, price, memory_gib=memory_gib, watts={"idle": watts / 4, "peak": watts})
            for name, memory_gib, price, watts in _TYPES
        ],
        inventory={name: 1_000_000 for name, *_ in _TYPES},
        demand=demand,
        policy=FleetPolicySpec(**{"solve_time_limit_seconds": 600, **policy}),
    )
    ample, _ = plan(inputs, None)
    wanted = Counter[str]()
    for planned in ample.services:
        for variant in planned.variants:
            wanted[variant.gpu_type] += variant.replicas * variant.devices
    scarce = {name: max(8, int(wanted[name] * inventory)) for name, *_ in _TYPES} | {_AMPLE: 16 * services}
    return inputs.model_copy(update={"inventory": scarce})


def with_rate(inputs: PlanInputs, key: str, factor: float) -> PlanInputs:
    """The same fleet, the demand of one service times a factor."""
    rps = [factor * rate for rate in inputs.demand[key].rps]
    return inputs.model_copy(update={"demand": {**inputs.demand, key: Demand(rps=rps)}})


def _rates(chance: np.random.Generator, rps: float) -> list[float]:
    """Requests per second by bucket: a mix of sizes, what is longer than the buckets left out."""
    share = sizes(chance)[: _INPUT_EDGES * len(OUTPUT_TOKENS)]
    rates: list[float] = (share * rps / share.sum()).tolist()
    return rates


def _service(number: int, chance: np.random.Generator) -> LLMService:
    model = _MODELS[int(chance.choice(len(_MODELS), p=[0.2, 0.3, 0.2, 0.15, 0.15]))][0]
    types = [name for name, *_ in _TYPES if name != _AMPLE]
    return LLMService.parse(
        {
            "metadata": {"name": f"s{number:04}", "namespace": "team"},
            "spec": {
                "model": {"name": f"org/{model}", "contextLength": 32768},
                "profile": model,
                "gpuTypes": [*chance.choice(types, size=3, replace=False).tolist(), _AMPLE],
                "priority": int(chance.choice([50, 100, 200])),
                "objective": {
                    "ttft": {"percentile": 95, "milliseconds": int(chance.choice(_OBJECTIVES_TTFT_MS))},
                    "tpot": {"percentile": 95, "milliseconds": int(chance.choice(_OBJECTIVES_TPOT_MS))},
                },
            },
        },
        strict=True,
    )


def _profile(name: str, billions: float, layers: int, width: int, passed: float) -> ModelProfile:
    heads = 8
    return ModelProfile.parse(
        {
            "metadata": {"name": name, "namespace": "team"},
            "spec": {
                "model": f"org/{name}",
                "weightsGib": billions * 2e9 / 2**30,
                "kvKibPerToken": layers * 2 * heads * 128 * 2 / 1024,
                "overheadGib": 1.5,
                "parametersBillion": billions,
                "buckets": {
                    "inputTokens": [int(edge) for edge in INPUT_TOKENS[:_INPUT_EDGES]],
                    "outputTokens": [int(edge) for edge in OUTPUT_TOKENS],
                },
                "architecture": {
                    "layers": layers,
                    "hiddenSize": width,
                    "denseParametersBillion": passed,
                    "attentionLayers": layers,
                    "keyValueHeads": heads,
                    "kvValuesPerToken": 2 * heads * 128,
                    "prefillAttentionWidth": 2 * width,
                    "decodeAttentionWidth": 2 * width,
                },
            },
        },
        strict=True,
    )
