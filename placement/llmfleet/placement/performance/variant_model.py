"""The model of one variant, put together from what is known of it.

    variant_model(profile, gpu_type, tensor_parallel, now) -> PerformanceModel | None

In order of trust: the profile's measured points; kernels of the optional package, where it is installed; the roofline,
where the profile has the model's architecture and the GPU type its figures. What running engines taught is put on top.
None where nothing at all is known: then the variant is no candidate, and `missing_for` says what would make it one. A
variant that was measured at every bucket asks for nothing else.
"""

from __future__ import annotations

from llmfleet.api import GPUType, ModelProfile
from llmfleet.placement.performance.correction import Corrected
from llmfleet.placement.performance.hardware import figures_of
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.model import Layered, PerformanceModel
from llmfleet.placement.performance.prior import installed, kernel_prior
from llmfleet.placement.performance.roofline import Roofline


def variant_model(
    profile: ModelProfile, gpu_type: GPUType, tensor_parallel: int, *, now: float
) -> PerformanceModel | None:
    """What predicts the latency of one variant, corrected as of `now` (seconds since 1970)."""
    spec, name = profile.spec, gpu_type.metadata.name
    measured = [one for one in spec.measurements if (one.gpu_type, one.tensor_parallel) == (name, tensor_parallel)]
    models: list[PerformanceModel] = [MeasuredTable(one) for one in measured]
    corners = {spec.buckets.edges(bucket) for bucket in range(spec.buckets.count)}
    seen = {(point.input_tokens, point.output_tokens) for one in measured for point in one.points}
    device = figures_of(gpu_type)
    if spec.architecture is not None and device is not None and not corners <= seen:
        engines = sorted({one.engine.split(" ")[0] for one in spec.measurements if one.gpu_type == name} - {""})
        roofline = Roofline(spec.architecture, device, tensor_parallel, engines[0] if engines else "vllm")
        prior = kernel_prior(spec.model, roofline) if installed() else None
        models += [roofline] if prior is None else [prior, roofline]
    if not models:
        return None
    learned = [
        one for one in profile.status.corrections if (one.gpu_type, one.tensor_parallel) == (name, tensor_parallel)
    ]
    layered = models[0] if len(models) == 1 else Layered(models)
    return Corrected(layered, learned[0], now) if learned else layered


def missing_for(profile: ModelProfile, gpu_type: GPUType) -> list[str]:
    """What a variant that was not measured lacks to be predicted, in words; empty if nothing."""
    missing = []
    if profile.spec.architecture is None:
        missing.append(
            f"ModelProfile {profile.key}: spec.architecture; `llmfleet profile import --config config.json` writes it"
        )
    if figures_of(gpu_type) is None:
        missing.append(f"GPUType {gpu_type.metadata.name}: spec.hardware, as its name is none of the catalogue")
    return missing
