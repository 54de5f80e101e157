"""Data plane to plan: what a gateway's admin port answers at `GET /v1/demand`.

Everything is a cumulative count since the gateway started, so that a lost or repeated answer loses or doubles
nothing: the operator subtracts what it saw last from the same `instanceId`, and starts anew when the id changes.

A request's answer length is unknown on arrival, so arrivals are counted by input bucket (waiting requests included:
a service without replicas can wake) and the split over output buckets comes from completed requests.

What changes slowly and takes room is told only where it is asked for, of some of the services at a time
(`?detail=<part>/<parts>`): how large the requests of a bucket are, and what engines took for them. A gateway that does
not know of it answers without, and nothing is known then; an operator that does not know of it never asks.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple
from zlib import crc32

from pydantic import Field

from llmfleet.api.meta import ApiModel
from llmfleet.api.modelprofile import Buckets

DEMAND_PATH = "/v1/demand"
DETAIL_QUERY = "detail"
"""Query parameter of DEMAND_PATH: a `Part` of the services, of which sizes, observations and loads are told as well."""


class Part(NamedTuple):
    """One of several equal parts of all services; which one a service is in follows from its key."""

    number: int
    """From 0."""
    of: int
    """How many parts there are."""

    def holds(self, service_key: str) -> bool:
        """Whether `namespace/name` is in this part."""
        return crc32(service_key.encode()) % self.of == self.number

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, text: str) -> Part | None:
        """`<number>/<of>` as it goes over the wire; None for anything else."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal() and int(number) < int(of)):
            return None
        return cls(int(number), int(of))


ALL_SERVICES = Part(0, 1)


_Count = Annotated[int, Field(ge=0)]
_Some = Annotated[int, Field(ge=1)]
_Sum = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SizeSums(NamedTuple):
    """How large the completed requests of one bucket were, on the wire a list of numbers: there may be many.

    Only those count whose usage the engine has told, and a size above the last edge counts as the last edge.
    """

    bucket: _Count
    """Index as in `Buckets.index`."""
    requests: _Some
    """How many."""
    input_tokens: _Count
    """Their prompts, added up."""
    input_tokens_squared: _Count
    """The squares of each, added up."""
    output_tokens: _Count
    """Their answers, added up."""
    output_tokens_squared: _Count
    """The squares of each, added up."""


class ObservedSums(NamedTuple):
    """What engines took for requests of one bucket with about the same load around them, on the wire a list of numbers.

    Only requests whose times are the engine's own are here: one answer, streamed, to a client that kept up, and no
    larger than the last edges.
    """

    bucket: _Count
    """Index as in `Buckets.index`."""
    octave: Annotated[int, Field(ge=0, le=32)]
    """Base 2 logarithm of the load around a request, rounded."""
    requests: _Some
    """How many."""
    load: _Sum
    """Requests of *this gateway* in the engine, the request itself included, averaged over the time from its sending to
    its end; added up over the requests."""
    input_tokens: _Count
    """Their prompts, added up."""
    ttft_ms: _Sum
    """Their times from being sent to the first token, added up."""
    decoded_tokens: _Count
    """Their tokens after the first, added up."""
    decode_ms: _Sum
    """Their times from first to last token, added up."""


class VariantLoad(NamedTuple):
    """What one gateway has had in the engines of one variant: others need it to know what was around their requests."""

    engines: _Count
    """Engines that there are now."""
    request_seconds: _Sum
    """Integral of the requests in flight over time, cumulative."""


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
    sizes: list[SizeSums] | None = None
    """By bucket, where there are any; absent: not told."""
    observed: dict[str, list[ObservedSums]] | None = None
    """By variant, those of any bucket and load; absent: not told."""
    loads: dict[str, VariantLoad] | None = None
    """By variant of the routing table; absent: not told."""


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
