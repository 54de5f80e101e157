"""Variants: the ways in which one service could be served.

A variant is a GPU type at a tensor-parallel degree, as the service's profile has measured it. In flow a service, its
profile and the fleet's GPU types; out flow the variants that *could* serve it (known, allowed, measured, big enough)
and, for every one that could not, the reason. Both are kept: the reasons become warnings, refusals and the answer to
"why not type X?".

How many devices there are is not asked here. A type without devices today is still a candidate, because what a
missing device would buy is part of the explanation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmfleet.api import GPUType, LatencyCoefficients, LLMService, Measurement, ModelProfile
from llmfleet.placement.performance import fit_latency

USABLE_MEMORY_FRACTION = 0.9
"""Share of a device's memory that an engine takes: vLLM's default `--gpu-memory-utilization`."""

ExclusionReason = Literal["unknown", "not_allowed", "not_measured", "does_not_fit", "ambiguous", "objective"]


@dataclass(frozen=True)
class Variant:
    """One way of serving a model."""

    name: str
    """GPU type, with `-tp<n>` where a replica has more than one device."""
    gpu_type: GPUType
    """Type of its devices."""
    measurement: Measurement
    """What was measured."""
    latency: LatencyCoefficients
    """Fit of the measured latency."""

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.measurement.tensor_parallel

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
    service: LLMService, profile: ModelProfile, gpu_types: dict[str, GPUType]
) -> tuple[list[Variant], list[Excluded]]:
    """(variants that could serve the service, those that could not), both in order of name."""
    excluded: list[Excluded] = []
    measured = {(m.gpu_type, m.tensor_parallel): m for m in profile.spec.measurements}
    allowed = set(service.spec.gpu_types)
    measured_types = sorted({gpu_type for gpu_type, _ in measured})
    for name in sorted(allowed):
        if name not in gpu_types:
            excluded.append(Excluded(name, "unknown", f"spec.gpuTypes names {name}, which is no GPUType"))
        elif name not in measured_types:
            excluded.append(
                Excluded(name, "not_measured", f"ModelProfile {profile.key} has no measurement on GPUType {name}")
            )
    for name in measured_types:
        if allowed and name not in allowed:
            excluded.append(Excluded(name, "not_allowed", f"spec.gpuTypes of {service.key} does not name {name}"))
        elif name not in gpu_types and not allowed:
            excluded.append(
                Excluded(name, "unknown", f"ModelProfile {profile.key} measures {name}, which is no GPUType")
            )
    for name in sorted(gpu_types):
        if name not in measured_types and name not in allowed:
            excluded.append(
                Excluded(name, "not_measured", f"ModelProfile {profile.key} has no measurement on GPUType {name}")
            )

    found: dict[str, Variant] = {}
    for (type_name, tensor_parallel), measurement in sorted(measured.items()):
        if type_name not in gpu_types or (allowed and type_name not in allowed):
            continue
        gpu_type = gpu_types[type_name]
        name = variant_name(type_name, tensor_parallel)
        needed, usable = (
            memory_needed_gib(profile, service.spec.model.context_length, tensor_parallel),
            memory_usable_gib(gpu_type),
        )
        if needed > usable:
            excluded.append(
                Excluded(name, "does_not_fit", f"{name} needs {needed:.1f} GiB per device and has {usable:.1f} GiB")
            )
        elif name in found:
            excluded.append(
                Excluded(name, "ambiguous", f"another variant is also called {name}: {found[name].type_name}")
            )
        else:
            found[name] = Variant(name, gpu_type, measurement, fit_latency(measurement))
    return [found[name] for name in sorted(found)], excluded
