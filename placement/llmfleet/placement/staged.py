"""Variants that serve one stage of a request only, beside those that serve all of it.

    variants of a service --with_stages--> the same, and each that can be as `-prefill` and as `-decode`; why others not
                          --stages_of--> what the program is told of each (`solver/stages.py`)

A service asks for it (`spec.engine.disaggregated`), a GPU type says how fast KV caches leave and reach its devices
(`spec.kvTransferGbPerSecond`), and whoever plans, that engines can hand over at all (`PlanInputs.can_hand_over`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from llmfleet.api import LLMService
from llmfleet.placement.configurations import variant_name
from llmfleet.placement.performance.figures import figures_of_variant
from llmfleet.placement.performance.stages import Handover, Role
from llmfleet.placement.performance.variant_model import missing_for
from llmfleet.placement.solver.stages import FIRST, SECOND, WHOLE, Stage
from llmfleet.placement.variants import Excluded, Variant

_STAGES = {"unified": WHOLE, "prefill": FIRST, "decode": SECOND}


def stages_of(variants: Sequence[Variant]) -> Stage | None:
    """What each variant serves of a request; None where all serve all of it."""
    if all(variant.role is None for variant in variants):
        return None
    return np.array([_STAGES[variant.key.role] for variant in variants])


def with_stages(
    service: LLMService, variants: Sequence[Variant], *, now: float
) -> tuple[list[Variant], list[Excluded]]:
    """(the variants, and with them the same as replicas that only prefill and that only decode, by name; those that
    cannot be, and why).

    Any replica that prefills may hand over to any that decodes, so transfers are reckoned at the slowest of all.
    """
    whole_only = [
        Excluded(variant.name, "stages", f"{variant.name} does not prefill or decode alone: {reason}")
        for variant in variants
        if (reason := _whole_only(service, variant)) is not None
    ]
    left_out = {one.name for one in whole_only}
    able = [variant for variant in variants if variant.name not in left_out]
    slowest = min((handover_gb_per_second(variant) for variant in able), default=0.0)
    found = {variant.name: variant for variant in variants}
    for variant in able:
        key, spec = variant.key, variant.profile.spec
        for role in get_args(Role):
            handover = Handover(role, slowest, 1024 * spec.kv_kib_per_token)
            figures = figures_of_variant(
                variant.profile,
                variant.gpu_type,
                key.tensor_parallel,
                now=now,
                prefix_share=service.spec.traffic.prefix_cache_hit_share,
                handover=handover,
            )
            if figures is not None:
                alone = key._replace(role=role)
                name = variant_name(alone)
                apart = Variant(name, alone, variant.gpu_type, variant.profile, None, figures.lines, figures)
                found.setdefault(name, apart)
    return [found[name] for name in sorted(found)], whole_only


def left_alone(variants: Sequence[Variant]) -> list[Excluded]:
    """Those that serve a stage whose other stage nobody serves."""
    roles = {variant.role for variant in variants} - {None}
    if len(roles) != 1:
        return []
    names = [variant.name for variant in variants if variant.role is not None]
    return [Excluded(name, "stages", f"{name} has nobody that serves the other stage") for name in names]


def handover_gb_per_second(variant: Variant) -> float:
    """How fast a replica's KV cache gets out of it, or into it: every device sends its part."""
    return (variant.gpu_type.spec.kv_transfer_gb_per_second or 0.0) * variant.key.tensor_parallel


def _whole_only(service: LLMService, variant: Variant) -> str | None:
    """Why a variant's replicas prefill and decode themselves, in words; None where they need not."""
    if variant.gpu_type.spec.kv_transfer_gb_per_second is None:
        return f"GPUType {variant.type_name} has no spec.kvTransferGbPerSecond"
    if service.spec.spot is not None:
        return f"spec.spot of {service.key} is planned with whole replicas only"
    if variant.key.pipeline_parallel > 1:
        return "stages of layers are not predicted, only measured"
    lacking = missing_for(variant.profile, variant.gpu_type)
    return f"to predict it lacks {lacking[0]}" if lacking else None
