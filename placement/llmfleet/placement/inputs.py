"""What a solve depends on, all of it: nothing else may influence a plan.

The operator fills this from its caches, the command line from files, the simulator from its own state. It is
serialisable, so that a solve can run in a process of its own and a puzzling plan can be reproduced from a file.

What is checked here is the caller's part: that the pieces belong together (every object has a namespace and occurs
once, every histogram has as many buckets as its profile). A caller that breaks this gets a ValidationError and no
plan. What *users* may get wrong is not an error of the call: it becomes a `Refusal` of that one service (`checks`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from llmfleet.api import (
    BucketSizes,
    FleetPolicySpec,
    GPUType,
    LLMService,
    ModelProfile,
    PowerDomain,
    ServiceForecast,
)
from llmfleet.api.meta import ApiModel
from llmfleet.placement.pools import with_figures, with_measurements


class Demand(ApiModel):
    """Observed demand of one service."""

    rps: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]
    """Requests per second by bucket of the service's profile (row-major as in `Buckets.index`)."""
    sizes: list[BucketSizes] | None = None
    """What their sizes were, by bucket; those above the last edges as if they ended there. None: nothing is known, and
    all are taken to be as long as their bucket allows."""


class PlanInputs(ApiModel):
    """Everything one solve depends on."""

    services: list[LLMService]
    """Services to plan; an object under deletion does not belong here."""
    unreadable: list[str] = Field(default_factory=list)
    """Keys of services that exist but whose objects do not parse. They run on by the plan in force, with its devices,
    as refused ones do."""
    gpu_types: list[GPUType] = Field(default_factory=list)
    """All GPU types. Pools of the same hardware take its figures over (`pools`)."""
    profiles: list[ModelProfile] = Field(default_factory=list)
    """Profiles of all namespaces. Pools of the same hardware take its measurements over (`pools`)."""
    power_domains: list[PowerDomain] = Field(default_factory=list)
    """All power domains."""
    inventory: dict[str, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """Devices that the fleet may use, by GPUType name, those in use by the fleet included. The type's `limit` is
    applied by the solver: this is what exists. An absent type has none."""
    demand: dict[str, Demand] = Field(default_factory=dict)
    """Observed demand by service key. Where absent, or where the service's traffic mode is `expected`, the demand
    comes from the service's own traffic specification; with neither, it is zero."""
    forecast: dict[str, ServiceForecast] = Field(default_factory=dict)
    """Demand that is expected to come, by service key, on top of what `demand` and the services say: what is planned
    for is the larger of both, until a replica started now would serve (`workload.ahead`). A forecast wins over nobody's
    wish: a service whose traffic mode is `expected` gets at least what it expects."""
    policy: FleetPolicySpec = Field(default_factory=FleetPolicySpec)
    """Knobs of the solve."""
    can_hand_over: bool = False
    """Whether engines hand KV caches over, so that services which allow it may get replicas that only prefill or only
    decode. In the cluster nothing does yet."""
    at: float = 0.0
    """Time of these inputs, in seconds since 1970. What `ModelProfile.status.corrections` learnt counts less with age;
    0: all of it counts in full. Each other time makes all figures of corrected profiles anew: whoever plans again and
    again goes in steps."""

    @field_validator("gpu_types")
    @classmethod
    def _pools_have_figures(cls, gpu_types: list[GPUType]) -> list[GPUType]:
        return with_figures(gpu_types)

    @field_validator("profiles")
    @classmethod
    def _pools_are_measured(cls, profiles: list[ModelProfile], given: ValidationInfo) -> list[ModelProfile]:
        return with_measurements(profiles, given.data.get("gpu_types", []))

    @model_validator(mode="after")
    def _pieces_belong_together(self) -> Self:
        for field, objects in (("services", self.services), ("profiles", self.profiles)):
            for resource in objects:
                if not resource.metadata.namespace:
                    raise ValueError(f"{field}: {resource.metadata.name!r} has no metadata.namespace")
        for field, keys in (
            ("services", [service.key for service in self.services]),
            ("profiles", [profile.key for profile in self.profiles]),
            ("gpuTypes", [gpu_type.key for gpu_type in self.gpu_types]),
            ("powerDomains", [domain.key for domain in self.power_domains]),
        ):
            twice = sorted(key for key, times in Counter(keys).items() if times > 1)
            if twice:
                raise ValueError(f"{field}: given more than once: {', '.join(twice)}")
        buckets = {profile.key: profile.spec.buckets.count for profile in self.profiles}
        named = {*(service.key for service in self.services), *self.unreadable}
        for key, forecast in self.forecast.items():
            if key != forecast.key or key not in named:
                raise ValueError(f"forecast[{key!r}]: of {forecast.key}; accepted are {', '.join(sorted(named))}")
        for service in self.services:
            self._forecast_of(service, buckets)
            demand = self.demand.get(service.key)
            expected = buckets.get(f"{service.metadata.namespace}/{service.spec.profile}")
            if demand is None or expected is None:
                continue
            for field, values in (("rps", demand.rps), ("sizes", demand.sizes)):
                if values is not None and len(values) != expected:
                    raise ValueError(
                        f"demand[{service.key!r}].{field}: {len(values)} values, but ModelProfile "
                        f"{service.spec.profile} has {expected} buckets"
                    )
        return self

    def _forecast_of(self, service: LLMService, buckets: Mapping[str, int]) -> None:
        forecast = self.forecast.get(service.key)
        expected = buckets.get(f"{service.metadata.namespace}/{service.spec.profile}")
        if forecast is None or expected is None:
            return
        for number, point in enumerate(forecast.points):
            if len(point.rps) != expected:
                raise ValueError(
                    f"forecast[{service.key!r}].points[{number}].rps: {len(point.rps)} values, but ModelProfile "
                    f"{service.spec.profile} has {expected} buckets"
                )
