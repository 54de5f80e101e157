"""What a solve depends on, all of it: nothing else may influence a plan.

The operator fills this from its caches, the command line from files, the simulator from its own state. It is
serialisable, so that a solve can run in a process of its own and a puzzling plan can be reproduced from a file.
"""

from __future__ import annotations

from pydantic import Field

from llmfleet.api import FleetPolicySpec, GPUType, LLMService, ModelProfile
from llmfleet.api.meta import ApiModel


class Demand(ApiModel):
    """Observed demand of one service."""

    rps: list[float]
    """Requests per second by bucket of the service's profile (row-major as in `Buckets.index`)."""


class PlanInputs(ApiModel):
    """Everything one solve depends on."""

    services: list[LLMService]
    """Services to plan; an object under deletion does not belong here."""
    profiles: list[ModelProfile] = Field(default_factory=list)
    """Profiles of all namespaces."""
    gpu_types: list[GPUType] = Field(default_factory=list)
    """All GPU types."""
    inventory: dict[str, int] = Field(default_factory=dict)
    """Devices that the fleet may use, by GPUType name, those in use by the fleet included. The type's `limit` is
    applied by the solver: this is what exists. An absent type has none."""
    demand: dict[str, Demand] = Field(default_factory=dict)
    """Observed demand by service key. Where absent, or where the service's traffic mode is `expected`, the demand
    comes from the service's own traffic specification; with neither, it is zero."""
    policy: FleetPolicySpec = Field(default_factory=FleetPolicySpec)
    """Knobs of the solve."""
