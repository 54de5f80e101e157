"""Variants: the ways in which one service could be served.

A variant is a GPU type, a parallel layout inside a node and a configuration (`configurations`). In flow a service, its
profile and the fleet's GPU types; out flow the variants that *could* serve it (known, allowed, big enough, and measured
or predicted) and, for every one that could not, the reason. Both are kept: the reasons become warnings, refusals and
the answer to "why not type X?".

A type that was measured is offered as it was measured. One that never was, but whose latency can be predicted, is
offered at the fewest devices that hold the model, and at twice as many: more degrees would be guesses of guesses.

How many devices there are is not asked here. A type without devices today is still a candidate, because what a
missing device would buy is part of the explanation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmfleet.api import (
    DEFAULT_CONFIGURATION,
    Configuration,
    GPUType,
    LatencyCoefficients,
    LLMService,
    Measurement,
    ModelProfile,
)
from llmfleet.api.gputype import objection
from llmfleet.placement.configurations import VariantKey, permitted, variant_name
from llmfleet.placement.performance import fit_latency
from llmfleet.placement.performance.figures import VariantFigures, figures_of_variant
from llmfleet.placement.performance.stages import Role
from llmfleet.placement.performance.variant_model import missing_for

USABLE_MEMORY_FRACTION = 0.9
"""Share of a device's memory that an engine takes: vLLM's default `--gpu-memory-utilization`."""

PREDICTED_DEGREES = (1, 2, 4, 8)
"""Tensor-parallel degrees at which a type that was not measured is offered."""

ExclusionReason = Literal[
    "unknown",
    "not_allowed",
    "not_measured",
    "unusable",
    "does_not_fit",
    "larger_than_node",
    "ambiguous",
    "objective",
    "spot",
    "stages",
]


@dataclass(frozen=True)
class Variant:
    """One way of serving a model."""

    name: str
    """As `variant_name` makes it."""
    key: VariantKey
    """What tells it apart."""
    gpu_type: GPUType
    """Type of its devices."""
    profile: ModelProfile
    """The service's profile as its configuration runs it."""
    measurement: Measurement | None
    """What was measured; None where nothing was."""
    latency: LatencyCoefficients
    """Straight lines through its latency."""
    figures: VariantFigures
    """What it is promised to do."""

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.key.devices

    @property
    def role(self) -> Role | None:
        """The stage of a request that its replicas serve; None: both."""
        return None if self.key.role == "unified" else self.key.role

    @property
    def configuration(self) -> Configuration | None:
        """How its engines run; None for the default configuration."""
        return self.profile.spec.configuration(self.key.configuration)

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


def memory_needed_gib(profile: ModelProfile, context_length: int, devices: int) -> float:
    """Memory per device that one request of full context length needs: weights, its KV cache, overhead.

    `profile`: as the variant's configuration runs it. Stages are taken to hold equal parts.
    """
    spec = profile.spec
    kv_gib = spec.kv_kib_per_token * context_length / 2**20
    return (spec.weights_gib + kv_gib) / devices + spec.overhead_gib


def memory_usable_gib(gpu_type: GPUType) -> float:
    """Memory per device that an engine takes."""
    return USABLE_MEMORY_FRACTION * gpu_type.spec.memory_gib


def candidates(
    service: LLMService,
    profile: ModelProfile,
    gpu_types: dict[str, GPUType],
    *,
    now: float,
) -> tuple[list[Variant], list[Excluded]]:
    """(variants that could serve the service whole, those that could not), both in order of name.

    `now`, in seconds since 1970: what running engines taught counts less with age.
    """
    views, refused = permitted(service, profile)
    excluded = [
        Excluded(name, "unusable" if _has(profile, name) else "unknown", message) for name, message in refused.items()
    ]
    excluded += _types_left_out(service, profile, views, gpu_types)
    for key in sorted({VariantKey.of(one) for one in profile.spec.measurements}):
        if key.configuration not in service.spec.configurations and key.gpu_type in gpu_types:
            message = f"spec.configurations of {service.key} does not name {key.configuration}"
            excluded.append(Excluded(variant_name(key), "not_allowed", message))

    found: dict[str, Variant] = {}
    forbidden = {} if service.spec.spot is not None else _spot(gpu_types)
    excluded += [
        Excluded(
            name,
            "spot",
            f"GPUType {name} is spot capacity, of which spec.spot of {service.key} is to say how it may be used",
        )
        for name in sorted({key.gpu_type for key in offered(service, views, forbidden)})
    ]
    gpu_types = {name: gpu_type for name, gpu_type in gpu_types.items() if name not in forbidden}
    for key, measurement in offered(service, views, gpu_types).items():
        gpu_type, view, name = gpu_types[key.gpu_type], views[key.configuration], variant_name(key)
        needed = memory_needed_gib(view, service.spec.model.context_length, key.devices)
        usable = memory_usable_gib(gpu_type)
        layout, share = (key.tensor_parallel, key.pipeline_parallel), service.spec.traffic.prefix_cache_hit_share
        figures = figures_of_variant(view, gpu_type, *layout, now=now, prefix_share=share)
        if larger_than_node(gpu_type, key.devices):
            excluded.append(
                Excluded(
                    name,
                    "larger_than_node",
                    f"a replica of {name} takes {key.devices} devices of one node, and spec.devicesPerNode of GPUType "
                    f"{key.gpu_type} is {gpu_type.spec.devices_per_node}",
                )
            )
        elif needed > usable:
            excluded.append(
                Excluded(name, "does_not_fit", f"{name} needs {needed:.1f} GiB per device and has {usable:.1f} GiB")
            )
        elif name in found:
            excluded.append(
                Excluded(name, "ambiguous", f"another variant is also called {name}: {found[name].type_name}")
            )
        elif figures is not None:
            latency = figures.lines if measurement is None else fit_latency(measurement)
            found[name] = Variant(name, key, gpu_type, view, measurement, latency, figures)
    return [found[name] for name in sorted(found)], excluded


def _spot(gpu_types: dict[str, GPUType]) -> dict[str, GPUType]:
    return {name: one for name, one in gpu_types.items() if one.spec.capacity_class == "spot"}


def larger_than_node(gpu_type: GPUType, devices: int) -> bool:
    """Whether a replica of so many devices cannot lie within one node of the type, as far as that is known."""
    most = gpu_type.spec.devices_per_node
    return most is not None and devices > most


def offered(
    service: LLMService, views: dict[str, ModelProfile], gpu_types: dict[str, GPUType]
) -> dict[VariantKey, Measurement | None]:
    """All that the service allows and that is measured, or else can be predicted; in order.

    `views`: the profile by permitted configuration.
    """
    allowed = set(service.spec.gpu_types) or gpu_types.keys()
    found: dict[VariantKey, Measurement | None] = {
        VariantKey.of(m): m
        for view in views.values()
        for m in view.spec.measurements
        if m.gpu_type in gpu_types and m.gpu_type in allowed
    }
    for configuration, view in views.items():
        for name in allowed & (gpu_types.keys() - {m.gpu_type for m in view.spec.measurements}):
            if missing_for(view, gpu_types[name]):
                continue
            usable, context = memory_usable_gib(gpu_types[name]), service.spec.model.context_length
            within = [n for n in PREDICTED_DEGREES if not larger_than_node(gpu_types[name], n)] or PREDICTED_DEGREES[:1]
            fitting = [n for n in within if memory_needed_gib(view, context, n) <= usable]
            found |= {VariantKey(name, n, 1, configuration): None for n in fitting[:2] or within[-1:]}
    return dict(sorted(found.items(), key=lambda item: item[0]))


def _has(profile: ModelProfile, configuration: str) -> bool:
    return any(one.name == configuration for one in profile.spec.configurations)


def _types_left_out(
    service: LLMService, profile: ModelProfile, views: dict[str, ModelProfile], gpu_types: dict[str, GPUType]
) -> list[Excluded]:
    """GPU types that the service may not use, or not in one of its configurations, whatever the layout."""
    excluded: list[Excluded] = []
    allowed = set(service.spec.gpu_types)
    measured_types = sorted({m.gpu_type for view in views.values() for m in view.spec.measurements})
    for name in sorted(allowed - gpu_types.keys()):
        excluded.append(Excluded(name, "unknown", f"spec.gpuTypes names {name}, which is no GPUType"))
    for name in measured_types:
        if allowed and name not in allowed:
            excluded.append(Excluded(name, "not_allowed", f"spec.gpuTypes of {service.key} does not name {name}"))
        elif name not in gpu_types and not allowed:
            excluded.append(
                Excluded(name, "unknown", f"ModelProfile {profile.key} measures {name}, which is no GPUType")
            )
    for configuration, view in views.items():
        for name in sorted(gpu_types.keys() - {m.gpu_type for m in view.spec.measurements}):
            lacking = missing_for(view, gpu_types[name])
            if allowed and name not in allowed and not lacking:
                excluded.append(Excluded(name, "not_allowed", f"spec.gpuTypes of {service.key} does not name {name}"))
            elif lacking:
                message = f"ModelProfile {profile.key} has no measurement on GPUType {name}"
                if configuration != DEFAULT_CONFIGURATION:
                    message += f" in configuration {configuration}"
                objected = objection(gpu_types[name], gpu_types)
                if objected is not None:
                    message += f", nor does it take one over: {objected}"
                elif len(lacking) == 1:
                    message += f", and to predict it lacks {lacking[0]}"
                excluded.append(Excluded(variant_name(VariantKey(name, 1, 1, configuration)), "not_measured", message))
    return list(dict.fromkeys(excluded))
