"""Data plane to plan: what a gateway's admin port answers at `GET /v1/demand`.

Everything is a cumulative count since the gateway started, so that a lost or repeated answer loses or doubles
nothing: the operator subtracts what it saw last from the same `instanceId`, and starts anew when the id changes.

A request's answer length is unknown on arrival, so arrivals are counted by input bucket (waiting requests included:
a service without replicas can wake) and the split over output buckets comes from completed requests.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmfleet.api.meta import ApiModel
from llmfleet.api.modelprofile import Buckets

DEMAND_PATH = "/v1/demand"


class ServiceDemand(ApiModel):
    """Counts of one service."""

    namespace: str
    """Namespace of the service."""
    service: str
    """Name of the service."""
    buckets: Buckets
    """Edges that the counts refer to; the operator drops counts of edges that no longer hold."""
    arrived: list[int]
    """Requests that arrived, by input bucket. Refused ones (bad key, malformed) are not counted."""
    completed: list[int]
    """Requests that completed, by bucket (row-major as in `Buckets.index`)."""
    waiting: int = Field(default=0, ge=0)
    """Requests that wait for an engine now."""
    running: int = Field(default=0, ge=0)
    """Requests that engines work on now."""


class DemandReport(ApiModel):
    """One gateway's answer."""

    schema_version: Literal[1] = 1
    instance_id: str
    """Changes whenever the counts start from zero."""
    uptime_seconds: float | None = Field(default=None, ge=0)
    """How long ago the counts started from zero. It tells whoever hears of this instance for the first time whether
    they are news; where it is absent they are taken for old."""
    services: list[ServiceDemand] = Field(default_factory=list)
    """Services that this gateway has seen traffic for."""
