"""The part of the independent check that concerns stages: who may serve only one, and over which link.

    LLMService, PlannedVariant, its GPUType --kept_by_stage--> nothing, or what is not allowed or not so
                                            --handover_of--> what the model is asked about such a replica

What both stages of a request share, that no more is prefilled than decoded, is a matter of routes (`checker_routes`).
"""

from __future__ import annotations

from collections.abc import Iterator

from llmfleet.api import GPUType, LLMService, ModelProfile, PlannedVariant
from llmfleet.placement.performance.stages import Handover
from llmfleet.placement.violation import LOAD_TOLERANCE, Violation


def kept_by_stage(
    service: LLMService, variant: PlannedVariant, gpu_type: GPUType, *, can_hand_over: bool
) -> Iterator[Violation]:
    """A replica serves one stage only where that was asked for and can be, over a link that it has."""
    where, said, link = f"{service.key} {variant.name}", variant.kv_transfer_gb_per_second, None
    if variant.role is None:
        if said is not None:
            yield Violation("stage", where, said, "no transfer: it serves whole requests")
        return
    if not can_hand_over or not service.spec.engine.disaggregated or service.spec.spot is not None:
        yield Violation("stage", where, variant.role, "whole requests: nothing else is asked for, or can be done")
    if gpu_type.spec.kv_transfer_gb_per_second is not None:
        link = gpu_type.spec.kv_transfer_gb_per_second * variant.tensor_parallel
    if said is None or link is None or not said <= link * (1 + LOAD_TOLERANCE):
        yield Violation("stage", where, str(said), f"a transfer at no more than {link} GB/s")


def handover_of(profile: ModelProfile | None, variant: PlannedVariant) -> Handover | None:
    """The stage of a variant as the plan says it; None where it serves whole requests. `profile`: as the variant's
    configuration runs it, None where there is none."""
    link = variant.kv_transfer_gb_per_second
    if profile is None or variant.role is None or link is None:
        return None
    return Handover(variant.role, link, 1024 * profile.spec.kv_kib_per_token)
