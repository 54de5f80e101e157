"""Plan to data plane: the routing table of one service, one ConfigMap each, owned by the service.

It is the solver's own x, not something derived from replica counts, so that plan and routing cannot disagree.
A gateway that meets a `schemaVersion` it does not know keeps the last table it understood.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmfleet.api.llmservice import Objective
from llmfleet.api.meta import ApiModel
from llmfleet.api.modelprofile import Buckets


class LatencyCoefficients(ApiModel):
    """A straight-line fit of one variant's measured latency, for choosing between replicas."""

    ttft_base_ms: float
    """TTFT of an empty prompt on an idle engine."""
    ttft_ms_per_input_token: float
    """Additional TTFT per prompt token on an idle engine."""
    tpot_base_ms: float
    """TPOT of a single request."""
    tpot_ms_per_running: float
    """Additional TPOT per further running request."""


class RoutedVariant(ApiModel):
    """Where a variant's engines are and how fast they are."""

    name: str
    """Name of the variant."""
    replicas: int = Field(ge=0)
    """Replicas that the shares were made for: the planned ones, or, while a change is carried out, those that serve
    already. With fewer Ready than this, a gateway lowers the variant's share in proportion."""
    selector: dict[str, str]
    """Pod labels of its engines, in the service's namespace."""
    port: int = 8000
    """Port of the OpenAI server in the pod."""
    latency: LatencyCoefficients
    """Fit of the measured latency."""


class Route(ApiModel):
    """The share of one bucket's requests that one variant gets."""

    bucket: int = Field(ge=0)
    """Bucket index as `Buckets.index` gives it."""
    variant: str
    """Name of the variant."""
    fraction: float = Field(ge=0, le=1)
    """Share of the bucket's requests. A bucket's fractions sum to one unless part of its demand is unserved."""


class RoutingTable(ApiModel):
    """How one service's requests are routed."""

    schema_version: Literal[1] = 1
    plan_id: str
    """Plan that this table belongs to."""
    namespace: str
    """Namespace of the service."""
    service: str
    """Name of the service."""
    served_name: str
    """Model name that clients use."""
    api_keys_secret: str | None = None
    """Secret in the same namespace whose values are the accepted API keys; absent: no key is asked for."""
    peer_key_secret: str | None = None
    """Secret in the same namespace with the key that gateways and engines prove to each other (`PEER_KEY`); absent:
    no engine of the service can hand a request over."""
    context_length: int
    """Longest prompt plus answer, in tokens."""
    objective: Objective | None = None
    """What the plan was made for; absent: nobody asked for a latency. A gateway that does not know this field routes
    by the rest."""
    buckets: Buckets
    """Size buckets."""
    variants: list[RoutedVariant] = Field(default_factory=list)
    """Variants in the plan. Variants that only drain are absent: they get no new requests."""
    routes: list[Route] = Field(default_factory=list)
    """The table x. A bucket without routes is spread over all variants by replicas."""
