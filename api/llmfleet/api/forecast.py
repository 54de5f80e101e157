"""A forecast of demand: what a plan is given beside what is observed, by whoever looks ahead.

    a file (`llmfleet plan --forecast`), or an autoscaler --Forecast--> plan: the larger of what is and what will be

Rates are already those to be ready for: a forecast is uncertain, and whoever makes it chooses the percentile of its
outcomes that capacity should hold, and says which one that is. Times are counted from now, the moment of the plan.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmfleet.api.meta import ApiModel, Name


class ForecastPoint(ApiModel):
    """Demand at one time to come."""

    after_seconds: float = Field(ge=0, le=604_800)
    """Seconds from now."""
    rps: list[Annotated[float, Field(ge=0, le=1e6)]]
    """Requests per second by bucket of the service's profile, answers within prompts (as in `Plan.demand`)."""


class ServiceForecast(ApiModel):
    """The forecast of one service."""

    namespace: Name
    """Namespace of the service."""
    service: Name
    """Name of the service."""
    percentile: float = Field(ge=50, lt=100)
    """Of all outcomes that are thought possible, the share in percent in which demand is no more than these rates."""
    points: list[ForecastPoint] = Field(min_length=1, max_length=1000)
    """What comes, in order of time. Between two points demand is on the straight line; before the first one the line
    begins at the demand of now, and after the last one nothing is known."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for number, (one, other) in enumerate(pairwise(self.points), start=1):
            if other.after_seconds <= one.after_seconds:
                raise ValueError(
                    f"points[{number}].afterSeconds is {other.after_seconds:g}; accepted is more than "
                    f"{one.after_seconds:g}, that of the point before"
                )
            if len(other.rps) != len(one.rps):
                raise ValueError(
                    f"points[{number}].rps has {len(other.rps)} rates; accepted are {len(one.rps)}, as in the first"
                )
        return self

    @property
    def key(self) -> str:
        """`namespace/name` of the service."""
        return f"{self.namespace}/{self.service}"


class Forecast(ApiModel):
    """Forecasts of some services; of the others nothing is known but what they are asked for now."""

    schema_version: Literal[1]
    services: list[ServiceForecast]
    """One for each service that has one."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        keys = [one.key for one in self.services]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise ValueError(f"services[{number}] is {key}, which has a forecast already; accepted is one for each")
        return self
