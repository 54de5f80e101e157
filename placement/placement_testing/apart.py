"""Fleets whose services may have prefill and decode on replicas of their own: Llama 8B, predicted, not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmfleet.api import Plan, ServicePlan
from llmfleet.placement import PlanInputs
from llmfleet.placement.performance.architecture import architecture_of
from placement_testing.fleets import fleet, gpu_type, profile, service
from placement_testing.shapes import LLAMA_8B

H100 = ("h100-sxm", 4.0, 80.0)
L4 = ("l4", 0.6, 24.0)


def apart_fleet(
    *sizes: tuple[int, int],
    rps: float = 20.0,
    ttft_ms: float = 2000.0,
    tpot_ms: float = 12.0,
    types: Sequence[tuple[str, float, float]] = (H100,),
    link_gb_per_second: float | None = 50.0,
    allowed: bool = True,
    can_hand_over: bool = True,
    burstiness: float = 1.0,
    optimality_gap: float = 0.0,
    **spec: Any,
) -> PlanInputs:
    """`sizes`: input and output tokens, equally often. `types`: name of a known device, price, memory."""
    model = profile(
        {},
        inputs=(512, 2048, 8192),
        outputs=(128, 512),
        weightsGib=15,
        kvKibPerToken=128,
        architecture=architecture_of(LLAMA_8B).to_wire(),
    )
    link = {} if link_gb_per_second is None else {"kvTransferGbPerSecond": link_gb_per_second}
    served = service(
        context_length=16384,
        burstiness=burstiness,
        objective={"ttft": {"milliseconds": ttft_ms}, "tpot": {"milliseconds": tpot_ms}},
        engine={"disaggregated": allowed},
        traffic={
            "mode": "expected",
            "requestsPerSecond": rps,
            "sizes": [{"inputTokens": i, "outputTokens": o} for i, o in sizes],
        },
        **spec,
    )
    kinds = [gpu_type(name, price, memory_gib=memory, **link) for name, price, memory in types]
    inventory = {name: 64 for name, _, _ in types}
    inputs = fleet([served], [model], kinds, inventory=inventory, optimality_gap=optimality_gap)
    return inputs.model_copy(update={"can_hand_over": can_hand_over})


def only(plan: Plan) -> ServicePlan:
    (planned,) = plan.services
    return planned


def by_role(planned: ServicePlan) -> dict[str, int]:
    """Devices by role, `whole` for those without."""
    found: dict[str, int] = {}
    for variant in planned.variants:
        role = variant.role or "whole"
        found[role] = found.get(role, 0) + variant.replicas * variant.devices
    return found
