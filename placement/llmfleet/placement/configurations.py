"""What tells variants apart, and in which configurations a service may be run at all.

    LLMService, ModelProfile --permitted--> the profile as each permitted configuration runs it, by name
                                            and, for each other one that the service names, why not
    VariantKey --variant_name--> a DNS label of at most 58 characters, the same for the same key

A configuration changes what answers say, or what they cost, so a service gets only those that it names. Of those it
gets none that would serve other than it says: weights of another model than its own, or options that its own engine
arguments set otherwise.
"""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

from llmfleet.api import DEFAULT_CONFIGURATION, Correction, LLMService, Measurement, ModelProfile

LONGEST_NAME = 58
"""So much of a label's 63 characters that a capacity class may follow."""


class VariantKey(NamedTuple):
    """What tells the variants of a profile apart; sorts by it."""

    gpu_type: str
    """Name of the GPUType."""
    tensor_parallel: int
    """Devices that share every layer."""
    pipeline_parallel: int = 1
    """Stages of such devices."""
    configuration: str = DEFAULT_CONFIGURATION
    """Name of the configuration."""
    role: Literal["unified", "prefill", "decode"] = "unified"
    """What its replicas serve of a request."""

    @classmethod
    def of(cls, measured: Measurement | Correction) -> VariantKey:
        """The variant that was measured, or that something was learnt of."""
        return cls(measured.gpu_type, measured.tensor_parallel, measured.pipeline_parallel, measured.configuration)

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.tensor_parallel * self.pipeline_parallel


def variant_name(key: VariantKey) -> str:
    """`<type>[-tp<n>][-pp<n>][-<configuration>][-<role>]`; a hash ends one that is longer than LONGEST_NAME."""
    parts = [key.gpu_type]
    if key.tensor_parallel > 1:
        parts.append(f"tp{key.tensor_parallel}")
    if key.pipeline_parallel > 1:
        parts.append(f"pp{key.pipeline_parallel}")
    if key.configuration != DEFAULT_CONFIGURATION:
        parts.append(key.configuration)
    if key.role != "unified":
        parts.append(key.role)
    name = "-".join(parts)
    if len(name) <= LONGEST_NAME:
        return name
    told = tuple(key) if key.role != "unified" else tuple(key)[:-1]
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('-')}-{digest}"


def permitted(service: LLMService, profile: ModelProfile) -> tuple[dict[str, ModelProfile], dict[str, str]]:
    """(the profile as configured, by configuration that may be used; why not, by other configuration that is named)."""
    known = {DEFAULT_CONFIGURATION, *(one.name for one in profile.spec.configurations)}
    found, refused = {}, {}
    for name in service.spec.configurations:
        reason = _objection(service, profile, name) if name in known else None
        if name not in known:
            refused[name] = (
                f"spec.configurations of {service.key} names {name}, which ModelProfile {profile.key} does not have; "
                f"it has {', '.join(sorted(known))}"
            )
        elif reason is not None:
            refused[name] = reason
        else:
            found[name] = profile.configured(name)
    return found, refused


def _objection(service: LLMService, profile: ModelProfile, name: str) -> str | None:
    configuration = profile.spec.configuration(name)
    if configuration is None:
        return None
    model = service.spec.model.name
    if model != profile.spec.model and (configuration.model is not None or configuration.revision is not None):
        return (
            f"configuration {name} of ModelProfile {profile.key} has other weights of {profile.spec.model}, but "
            f"spec.model.name of {service.key} is {model}"
        )
    argument = configuration.contradicted_by(service.spec.engine.args)
    if argument is not None:
        return (
            f"spec.engine.args of {service.key} has {argument}, which configuration {name} of ModelProfile "
            f"{profile.key} sets too"
        )
    return None
