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
from llmfleet.placement.performance.correction import Corrected, largest_factor, since
from llmfleet.placement.performance.hardware import figures_of
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.model import Layered, PerformanceModel, Prediction, unknown
from llmfleet.placement.performance.prior import KernelPrior, installed, kernel_prior
from llmfleet.placement.performance.roofline import Roofline
from llmfleet.placement.performance.stages import STEP_TOKENS, Handover, Steps, stage_model


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
    if pipeline_parallel == 1 and not corners <= seen:
        predicted = _predicted(profile, gpu_type, tensor_parallel)
        most = _most_sequences(profile)
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


def stage_model_of(
    profile: ModelProfile,
    gpu_type: GPUType,
    tensor_parallel: int,
    handover: Handover,
    *,
    now: float,
    prefix_share: float = 0.0,
) -> PerformanceModel | None:
    """What predicts a replica of the variant that serves one stage only; None where nothing predicts its steps."""
    spec, layout = profile.spec, (gpu_type.metadata.name, tensor_parallel, 1)
    predicted = _predicted(profile, gpu_type, tensor_parallel)
    if not predicted:
        return None
    times = predicted[0]
    measured = [
        one for one in spec.measurements if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel) == layout
    ]
    learned = [
        since(one, measured[0] if measured else None)
        for one in profile.status.corrections
        if (one.gpu_type, one.tensor_parallel, one.pipeline_parallel) == layout
    ]
    budgets = [one.max_num_batched_tokens for one in spec.configurations if one.max_num_batched_tokens is not None]
    ttft_error, tpot_error, source = times.trusted
    steps = Steps(
        times=times,
        admission_ms=times.admission_ms,
        step_tokens=min(budgets, default=STEP_TOKENS),
        most_requests=_most_sequences(profile),
        ttft_error=ttft_error,
        tpot_error=tpot_error,
        source=source,
        measured=MeasuredTable(measured[0]) if measured else None,
        slower=(
            max((largest_factor(one.ttft, now, measured=True) for one in learned), default=1.0),
            max((largest_factor(one.tpot, now, measured=True) for one in learned), default=1.0),
        ),
    )
    return stage_model(steps, handover, prefix_share)


def _predicted(profile: ModelProfile, gpu_type: GPUType, tensor_parallel: int) -> list[KernelPrior | Roofline]:
    """What predicts the steps of a variant without stages of layers, the most trusted first."""
    spec, name, device = profile.spec, gpu_type.metadata.name, figures_of(gpu_type)
    if missing_for(profile, gpu_type) or spec.architecture is None or device is None:
        return []
    engines = sorted({one.engine.split(" ")[0] for one in spec.measurements if one.gpu_type == name} - {""})
    roofline = Roofline(spec.architecture, device, tensor_parallel, engines[0] if engines else "vllm")
    prior = kernel_prior(spec.model, roofline) if installed() else None
    return [roofline] if prior is None else [prior, roofline]


def _most_sequences(profile: ModelProfile) -> int | None:
    return min((one.max_num_seqs for one in profile.spec.configurations if one.max_num_seqs is not None), default=None)


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
