"""The model of one variant, put together from what is known of it.

    variant_model(profile, gpu_type, tensor_parallel, pipeline_parallel, now) -> PerformanceModel | None

`profile` is the profile as one configuration runs it (`ModelProfile.configured`), so weights, bits and measurements are
that configuration's. Stages and speculation are never predicted, only measured; a configuration's most sequences bound
every prediction.

In order of trust: the profile's measured points; kernels of the optional package, where it is installed; the roofline,
where the profile has the model's architecture and the GPU type its figures. What running engines taught is put on top.
None where nothing at all is known: then the variant is no candidate, and `missing_for` says what would make it one. A
variant that was measured at every bucket asks for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.api import GPUType, ModelProfile
from llmfleet.placement.performance.correction import Corrected, since
from llmfleet.placement.performance.hardware import figures_of
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.model import Layered, PerformanceModel, Prediction, unknown
from llmfleet.placement.performance.prior import installed, kernel_prior
from llmfleet.placement.performance.roofline import Roofline


def variant_model(
    profile: ModelProfile, gpu_type: GPUType, tensor_parallel: int, pipeline_parallel: int = 1, *, now: float
) -> PerformanceModel | None:
    """What predicts the latency of one variant, corrected as of `now` (seconds since 1970)."""
    spec, name = profile.spec, gpu_type.metadata.name
    layout = (name, tensor_parallel, pipeline_parallel)
    measured = [
        one for one in spec.measurements if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel) == layout
    ]
    models: list[PerformanceModel] = [MeasuredTable(one) for one in measured]
    corners = {spec.buckets.edges(bucket) for bucket in range(spec.buckets.count)}
    seen = {(point.input_tokens, point.output_tokens) for one in measured for point in one.points}
    device = figures_of(gpu_type)
    predictable = pipeline_parallel == 1 and not missing_for(profile, gpu_type)
    if predictable and spec.architecture is not None and device is not None and not corners <= seen:
        engines = sorted({one.engine.split(" ")[0] for one in spec.measurements if one.gpu_type == name} - {""})
        roofline = Roofline(spec.architecture, device, tensor_parallel, engines[0] if engines else "vllm")
        prior = kernel_prior(spec.model, roofline) if installed() else None
        most = min((one.max_num_seqs for one in spec.configurations if one.max_num_seqs is not None), default=None)
        predicted: list[PerformanceModel] = [roofline] if prior is None else [prior, roofline]
        models += predicted if most is None else [AtMost(model, most) for model in predicted]
    if not models:
        return None
    learned = [
        since(one, measured[0] if measured else None)
        for one in profile.status.corrections
        if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel) == layout
    ]
    layered = models[0] if len(models) == 1 else Layered(models)
    return Corrected(layered, learned[0], now) if learned else layered


@dataclass(frozen=True)
class AtMost:
    """A model of an engine that holds no more than so many requests at once; it knows nothing beyond."""

    model: PerformanceModel
    concurrency: int

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`; NaN above the most requests."""
        answer = self.model.predict(input_tokens, output_tokens, concurrency)
        beyond = np.broadcast_to(np.asarray(concurrency) > self.concurrency, answer.ttft_ms.shape)
        none = unknown(answer.ttft_ms.shape)
        return Prediction(
            **{
                one.name: np.where(beyond, getattr(none, one.name), getattr(answer, one.name))
                for one in fields(Prediction)
            }
        )


def missing_for(profile: ModelProfile, gpu_type: GPUType) -> list[str]:
    """What a variant that was not measured lacks to be predicted, in words; empty if nothing."""
    missing = []
    if profile.spec.architecture is None:
        missing.append(
            f"ModelProfile {profile.key}: spec.architecture; `llmfleet profile import --config config.json` writes it"
        )
    if figures_of(gpu_type) is None:
        missing.append(f"GPUType {gpu_type.metadata.name}: spec.hardware, as its name is none of the catalogue")
    speculating = [one.name for one in profile.spec.configurations if one.speculative_config is not None]
    if speculating:
        missing.append(
            f"ModelProfile {profile.key}: a measurement of configuration {speculating[0]}, as what speculation saves "
            "cannot be predicted"
        )
    return missing
