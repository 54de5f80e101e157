"""Variants: the ways in which one service could be served.

A variant is a GPU type at a tensor-parallel degree. In flow a service, its profile and the fleet's GPU types; out flow
the variants that *could* serve it (known, allowed, big enough, and measured or predicted) and, for every one that could
not, the reason. Both are kept: the reasons become warnings, refusals and the answer to "why not type X?".

A type that was measured is offered as it was measured. One that never was, but whose latency can be predicted, is
offered at the fewest devices that hold the model, and at twice as many: more degrees would be guesses of guesses.

How many devices there are is not asked here. A type without devices today is still a candidate, because what a
missing device would buy is part of the explanation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmfleet.api import GPUType, LatencyCoefficients, LLMService, Measurement, ModelProfile
from llmfleet.placement.performance import fit_latency
from llmfleet.placement.performance.figures import VariantFigures, figures_of_variant
from llmfleet.placement.performance.variant_model import missing_for

USABLE_MEMORY_FRACTION = 0.9
"""Share of a device's memory that an engine takes: vLLM's default `--gpu-memory-utilization`."""

PREDICTED_DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees at which a type that was not measured is offered."""

ExclusionReason = Literal["unknown", "not_allowed", "not_measured", "does_not_fit", "ambiguous", "objective"]


@dataclass(frozen=True)
class Variant:
    """One way of serving a model."""

    name: str
    """GPU type, with `-tp<n>` where a replica has more than one device."""
    gpu_type: GPUType
    """Type of its devices."""
    tensor_parallel: int
    """Devices that share every layer."""
    measurement: Measurement | None
    """What was measured; None where nothing was."""
    latency: LatencyCoefficients
    """Straight lines through its latency."""
    figures: VariantFigures
    """What it is promised to do."""

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.tensor_parallel

    @property
    def type_name(self) -> str:
        """Name of the GPU type."""
        return self.gpu_type.metadata.name

    @property
    def cost_per_replica_hour(self) -> float:
        """Price of a replica for one hour."""
        return self.gpu_type.spec.device_price_per_hour * self.devices

    @property
    def watts_per_replica(self) -> float | None:
        """Peak power of a replica, None where the type's power is not known."""
        watts = self.gpu_type.spec.watts
        return None if watts is None else watts.peak * self.devices


@dataclass(frozen=True)
class Excluded:
    """A type or variant that cannot serve the service, and why."""

    name: str
    """GPU type or variant."""
    reason: ExclusionReason
    """Which rule excluded it."""
    message: str
    """The reason in words."""


def variant_name(gpu_type: str, tensor_parallel: int) -> str:
    """Name of a variant: the GPU type, with `-tp<n>` where a replica has more than one device."""
    return gpu_type if tensor_parallel == 1 else f"{gpu_type}-tp{tensor_parallel}"


def memory_needed_gib(profile: ModelProfile, context_length: int, tensor_parallel: int) -> float:
    """Memory per device that one request of full context length needs: weights, its KV cache, overhead."""
    spec = profile.spec
    kv_gib = spec.kv_kib_per_token * context_length / 2**20
    return (spec.weights_gib + kv_gib) / tensor_parallel + spec.overhead_gib


def memory_usable_gib(gpu_type: GPUType) -> float:
    """Memory per device that an engine takes."""
    return USABLE_MEMORY_FRACTION * gpu_type.spec.memory_gib


def candidates(
    service: LLMService, profile: ModelProfile, gpu_types: dict[str, GPUType], *, now: float
) -> tuple[list[Variant], list[Excluded]]:
    """(variants that could serve the service, those that could not), both in order of name.

    `now`, in seconds since 1970: what running engines taught counts less with age.
    """
    excluded: list[Excluded] = []
    allowed = set(service.spec.gpu_types)
    measured_types = sorted({m.gpu_type for m in profile.spec.measurements})
    for name in sorted(allowed - gpu_types.keys()):
        excluded.append(Excluded(name, "unknown", f"spec.gpuTypes names {name}, which is no GPUType"))
    for name in measured_types:
        if allowed and name not in allowed:
            excluded.append(Excluded(name, "not_allowed", f"spec.gpuTypes of {service.key} does not name {name}"))
        elif name not in gpu_types and not allowed:
            excluded.append(
                Excluded(name, "unknown", f"ModelProfile {profile.key} measures {name}, which is no GPUType")
            )
    for name in sorted(gpu_types.keys() - set(measured_types)):
        lacking = missing_for(profile, gpu_types[name])
        if allowed and name not in allowed and not lacking:
            excluded.append(Excluded(name, "not_allowed", f"spec.gpuTypes of {service.key} does not name {name}"))
        elif lacking:
            message = f"ModelProfile {profile.key} has no measurement on GPUType {name}"
            if len(lacking) == 1:
                message += f", and to predict it lacks {lacking[0]}"
            excluded.append(Excluded(name, "not_measured", message))

    found: dict[str, Variant] = {}
    for (type_name, tensor_parallel), measurement in offered(service, profile, gpu_types).items():
        gpu_type = gpu_types[type_name]
        name = variant_name(type_name, tensor_parallel)
        needed, usable = (
            memory_needed_gib(profile, service.spec.model.context_length, tensor_parallel),
            memory_usable_gib(gpu_type),
        )
        figures = figures_of_variant(profile, gpu_type, tensor_parallel, now=now)
        if needed > usable:
            excluded.append(
                Excluded(name, "does_not_fit", f"{name} needs {needed:.1f} GiB per device and has {usable:.1f} GiB")
            )
        elif name in found:
            excluded.append(
                Excluded(name, "ambiguous", f"another variant is also called {name}: {found[name].type_name}")
            )
        elif figures is not None:
            latency = figures.lines() if measurement is None else fit_latency(measurement)
            found[name] = Variant(name, gpu_type, tensor_parallel, measurement, latency, figures)
    return [found[name] for name in sorted(found)], excluded


def offered(
    service: LLMService, profile: ModelProfile, gpu_types: dict[str, GPUType]
) -> dict[tuple[str, int], Measurement | None]:
    """(GPU type, degree) of all that the service allows and that is measured, or else can be predicted; in order."""
    allowed = set(service.spec.gpu_types) or gpu_types.keys()
    found: dict[tuple[str, int], Measurement | None] = {
        (m.gpu_type, m.tensor_parallel): m
        for m in profile.spec.measurements
        if m.gpu_type in gpu_types and m.gpu_type in allowed
    }
    measured_types = {m.gpu_type for m in profile.spec.measurements}
    for name in allowed & (gpu_types.keys() - measured_types):
        if not missing_for(profile, gpu_types[name]):
            usable, context = memory_usable_gib(gpu_types[name]), service.spec.model.context_length
            fitting = [n for n in PREDICTED_DEGREES if memory_needed_gib(profile, context, n) <= usable]
            found |= {(name, degree): None for degree in fitting[:2] or PREDICTED_DEGREES[-1:]}
    return dict(sorted(found.items(), key=lambda item: item[0]))
