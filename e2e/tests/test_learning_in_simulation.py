"""From requests through gateways, observations and learning: simulated engines teach what they are, and no more."""

from __future__ import annotations

import math

import pytest

from e2e.bench.engine_model_loop import profile_model
from llmfleet.api import (
    ALL_SERVICES,
    Buckets,
    Correction,
    GPUType,
    LatencyCoefficients,
    LLMService,
    ModelProfile,
    RoutedVariant,
    RoutingTable,
)
from llmfleet.operator.observations import EngineObserver
from llmfleet.placement.learning import learn
from llmfleet.simulator import EngineSpec, StepTime, replay
from llmfleet.simulator.arrivals import renewal

ENGINE = EngineSpec(step=StepTime(overhead_ms=8, token_ms=0.1, context_token_ms=5e-5), kv_blocks=4000)
BUCKETS = Buckets(input_tokens=[128, 512, 2048], output_tokens=[32, 128])
SIZES = [(60, 20), (300, 100), (900, 30), (1800, 120), (100, 110)]
TYPES = {
    "sim": GPUType.parse(
        {
            "metadata": {"name": "sim"},
            "spec": {"resourceName": "example.com/sim", "memoryGib": 24, "pricePerHour": {"onDemand": 1.0}},
        }
    )
}
CHAT = LLMService.parse(
    {
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": {
            "model": {"name": "org/model", "contextLength": 4096},
            "profile": "p",
            "objective": {"ttft": {"milliseconds": 2000}, "tpot": {"milliseconds": 60}},
        },
    }
)
PROFILE = ModelProfile.parse(
    {
        "metadata": {"name": "p", "namespace": "team"},
        "spec": {
            "model": "org/model",
            "weightsGib": 10,
            "kvKibPerToken": 64,
            "buckets": BUCKETS.to_wire(),
            "measurements": [profile_model(ENGINE, "sim", BUCKETS).to_wire()],
        },
    }
)
TABLE = RoutingTable(
    plan_id="p",
    namespace="team",
    service="chat",
    served_name="chat",
    context_length=4096,
    buckets=BUCKETS,
    variants=[
        RoutedVariant(
            name="sim",
            replicas=2,
            selector={},
            latency=LatencyCoefficients(
                ttft_base_ms=10, ttft_ms_per_input_token=0.1, tpot_base_ms=8, tpot_ms_per_running=0.1
            ),
        )
    ],
)


def learnt(slower: float, gateways: int, rps: float) -> Correction:
    """What is learnt of two engines that take so many times what was measured, from 1500 requests."""
    observer = EngineObserver()
    replay(
        TABLE,
        {"sim": ENGINE.model_copy(update={"step": ENGINE.step.scaled(slower)})},
        renewal(SIZES, rps, 1500, seed=1),
        gateways=gateways,
        hear=lambda reports, now_s: observer.record(reports, ALL_SERVICES, now_s),
    )
    [found] = learn({CHAT.key: CHAT}, {PROFILE.key: PROFILE}, TYPES, {}, observer.take(), at=0.0)
    assert found.dropped == []
    [correction] = found.corrections
    return correction


@pytest.mark.parametrize("gateways", [1, 3])
@pytest.mark.parametrize("slower", [1.0, 1.5])
def test_engines_teach_what_they_take_whatever_the_mix_and_however_many_gateways_share_them(
    slower: float, gateways: int
) -> None:
    for rps in (0.5, 4.0):
        correction = learnt(slower, gateways, rps)
        heavy = [one for one in correction.tpot if one.weight >= 100]
        assert heavy
        for one in [*heavy, *(one for one in correction.ttft if one.weight >= 100)]:
            assert 0.8 * slower < math.exp(one.log_ratio) < 1.2 * slower
        if rps < 1:
            assert any(one.weight >= 100 for one in correction.ttft)
