"""Services are prepared once, and again only when something that they were prepared from has changed.

    PlanInputs, what the last plan knew --Preparations.of--> Prepared | Refusal of each service

Between two plans of a large fleet next to nothing changes, but what it is cannot be told from whether objects are the
same: whoever asks may have read them anew. So they are compared by what they say: GPU types, inventory and profiles
once for all services, a service, its demand and its forecast for each. A service that was prepared from equal objects
is the very object of the last plan, and whatever was made of that need not be made again either (`in_rounds`, `plan`).

Refusals are found anew each time: their words may name objects that are nothing to the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmfleet.api import GPUType, LLMService, ModelProfile, Refusal, ServiceForecast
from llmfleet.placement.checks import Catalogue, Prepared, prepare
from llmfleet.placement.inputs import Demand, PlanInputs


@dataclass(frozen=True)
class Surroundings:
    """What all services of a fleet are prepared from."""

    gpu_types: Mapping[str, GPUType]
    """By name."""
    profiles: Mapping[str, ModelProfile]
    """By key."""
    inventory: Mapping[str, int]
    """Devices by GPU type."""
    at: float
    """Seconds since 1970."""
    can_hand_over: bool
    """Whether engines hand KV caches over."""


@dataclass(frozen=True)
class Made:
    """A prepared service, and what it was prepared from."""

    prepared: Prepared
    demand: Demand | None
    forecast: ServiceForecast | None
    surroundings: Surroundings


class Preparations:
    """Those of one plan."""

    def __init__(self, inputs: PlanInputs, catalogue: Catalogue, last: Mapping[str, Made]) -> None:
        """`last`: what the last plan has made, by service key; all of it in the same surroundings."""
        self._inputs, self._catalogue, self._last = inputs, catalogue, last
        now = Surroundings(catalogue.gpu_types, catalogue.profiles, inputs.inventory, inputs.at, inputs.can_hand_over)
        self._now = now
        before = next((made.surroundings for made in last.values()), None)
        self._known_profiles: set[str] = set()
        if before is not None and replace(now, profiles={}) == replace(before, profiles={}):
            self._known_profiles = {key for key, one in now.profiles.items() if before.profiles.get(key) == one}
        self.made: dict[str, Made] = {}
        """For the next plan."""

    def of(self, service: LLMService) -> Prepared | Refusal:
        """The service prepared, or why it cannot be planned."""
        demand, known = self._inputs.demand.get(service.key), self._last.get(service.key)
        forecast = self._inputs.forecast.get(service.key)
        if (
            known is not None
            and f"{service.metadata.namespace}/{service.spec.profile}" in self._known_profiles
            and known.prepared.service == service
            and known.demand == demand
            and known.forecast == forecast
        ):
            found: Prepared | Refusal = known.prepared
        else:
            found = prepare(service, self._inputs, self._catalogue)
        if isinstance(found, Prepared):
            self.made[service.key] = Made(found, demand, forecast, self._now)
        return found
