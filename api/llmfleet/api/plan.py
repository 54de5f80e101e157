"""The plan: what one solve of the whole fleet decided. Serialisable, so that it survives its planner.

`placement.plan` makes it, the operator carries it out, the command line prints it, the next solve starts from it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmfleet.api.configuration import Configuration
from llmfleet.api.meta import ApiModel
from llmfleet.api.modelprofile import Buckets
from llmfleet.api.routing import LatencyCoefficients, Route


class Predicted(ApiModel):
    """What requests are predicted to see at the planned load, one standard error on the safe side."""

    source: Literal["measured", "prior", "roofline"]
    """What it rests on, the least trusted part of it: measured points, measured kernels, or published figures."""
    ttft_ms: float = Field(ge=0)
    """TTFT at the objective's percentile."""
    tpot_ms: float = Field(ge=0)
    """TPOT at the objective's percentile."""
    ttft_attainment: float = Field(ge=0, le=1)
    """Share of requests that keep the TTFT target."""
    tpot_attainment: float = Field(ge=0, le=1)
    """Share of requests that keep the TPOT target."""


class PlannedVariant(ApiModel):
    """A variant with the number of replicas it gets."""

    name: str
    """Name of the variant: the GPU type, then what is not plain of `-tp<n>`, `-pp<n>` and the configuration's name."""
    gpu_type: str
    """GPUType of its devices."""
    tensor_parallel: int = Field(ge=1)
    """Devices that share every layer."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """Stages of such devices."""
    configuration: Configuration | None = None
    """How its engines run, as the profile said when it was planned; absent: the default configuration."""
    role: Literal["prefill", "decode"] | None = None
    """The stage of a request that its replicas serve; absent: both."""
    kv_transfer_gb_per_second: float | None = Field(default=None, gt=0)
    """Of a variant with a role: how fast KV caches are reckoned to get from a replica that prefills to one that
    decodes, the slowest pair of the service."""
    replicas: int = Field(ge=0)
    """Replicas that the plan asks for."""
    cost_per_replica_hour: float = Field(ge=0)
    """Cost of one replica for one hour."""
    watts_per_replica: float | None = None
    """Peak power of one replica."""
    latency: LatencyCoefficients
    """Straight lines through the latency that is known."""
    predicted: Predicted | None = None
    """What its requests will see; absent where it gets none. With a role, its stage only: a prefill's TTFT ends when
    the KV cache has arrived, a decode's is the wait for a place and the first step, and each is of half of the
    requests that the percentile lets miss."""

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.tensor_parallel * self.pipeline_parallel


class PoolLoss(ApiModel):
    """A loss of spot capacity that the service has to survive, and what would be served after it."""

    gpu_types: list[str]
    """GPU types that are lost together."""
    share: float = Field(gt=0, le=1)
    """Share of the demand that has to be kept."""
    routes: list[Route]
    """Shares of these requests that the replicas which are left would serve within the objective."""
    unserved_rps: float = Field(ge=0)
    """Requests of those to be kept that they would not."""


class NextBest(ApiModel):
    """The cheapest plan of one service with another set of variants, the rest of the fleet unchanged."""

    replicas: dict[str, int]
    """Replicas by variant."""
    cost_per_hour: float
    """Its cost per hour."""


class BucketSizes(ApiModel):
    """How long the requests of one size bucket were: sums over the same requests, so that those of several gateways,
    restarts and times add up. Old requests may count less, in all five alike."""

    requests: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How many. 0: nothing is known."""
    input_tokens: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Their prompts, added up."""
    input_tokens_squared: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The square of each, added up."""
    output_tokens: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Their answers, added up."""
    output_tokens_squared: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The square of each, added up."""


class Alternative(ApiModel):
    """Another way to serve all of one service's demand, and why it was not chosen."""

    kind: Literal["nextBest", "singleType", "unified", "disaggregated"]
    """`nextBest`: the cheapest with another set of variants, beside the rest of the fleet. `singleType`: the cheapest
    on one GPU type, devices and other limits being no object. `unified`: the cheapest whose replicas all serve whole
    requests. `disaggregated`: the cheapest whose replicas may serve one stage only."""
    replicas: dict[str, int]
    """Replicas by variant."""
    cost_per_hour: float
    """Its cost per hour."""
    devices_missing: int = Field(default=0, ge=0)
    """Devices that it would take beyond what the rest of the fleet leaves."""
    reason: str
    """Why it was not chosen, in words."""


class PlannedForecast(ApiModel):
    """What was planned for because it is forecast."""

    within_seconds: float = Field(ge=0)
    """How far ahead was looked: until a replica started now would serve."""
    percentile: float
    """Of the forecast: the share of outcomes, in percent, that it covers."""
    rps: float = Field(ge=0)
    """Requests per second of `demand` that are not asked for yet."""


class ServicePlan(ApiModel):
    """What one service gets."""

    namespace: str
    """Namespace of the service."""
    service: str
    """Name of the service."""
    buckets: Buckets
    """Size buckets of the routing table."""
    variants: list[PlannedVariant]
    """Variants with at least one replica, by name."""
    routes: list[Route]
    """The routing table x. Where variants have roles, a request passes one variant without a role, or one that prefills
    and one that decodes: the shares of those that prefill add up to the shares of those that decode."""
    demand: list[float]
    """Demand that was planned for, in requests per second by bucket. After a restart of the operator it stands in
    for measurements until a window of new ones is complete."""
    sizes: list[BucketSizes] | None = None
    """What it was planned to be made of, by bucket: what was seen, or what `traffic.sizes` says where its mode is
    `expected`; absent: every request as long as its bucket allows."""
    forecast: PlannedForecast | None = None
    """What of the demand is forecast; absent where that is no more than is asked for now."""
    unserved_rps: float = Field(ge=0)
    """Demand that the plan cannot serve."""
    losses: list[PoolLoss] = Field(default_factory=list)
    """What was planned for by `spec.spot`, one loss at a time; empty where no spot type could be used."""
    predicted: Predicted | None = None
    """The worst of its variants' in each figure; absent without requests. Of variants with roles, both stages count as
    one: their TTFT added up, and what either misses."""
    cost_per_hour: float = Field(ge=0)
    """Cost of the replicas per hour, idle devices of their nodes included."""
    idle_cost_per_hour: float | None = None
    """Its part of that for devices that nobody uses on nodes billed whole, shared in proportion to devices; below 0
    where it fills gaps beside plans that stay in force. Absent without such nodes."""
    cost_per_million_tokens: float | None = None
    """Cost per million tokens, input and output together, at the served demand; absent without demand."""
    next_best: NextBest | None = None
    """What the next best set of variants would cost; absent where there is none, or none was looked for yet."""
    alternatives: list[Alternative] = Field(default_factory=list)
    """Other ways to serve it, cheapest first. Each takes solves of its own, so only `llmfleet plan` with `-o json` or
    `-o yaml` says them, and of the ten services that cost most; the plans of the operator have none."""
    binding: list[str] = Field(default_factory=list)
    """Constraints that bind, in words: `limit of GPUType l4`, `inventory of GPUType h100`, `replicas.max`."""
    shortfall: str | None = None
    """Who is short, by how much and what would help; absent when all demand is served."""
    conflict: list[str] = Field(default_factory=list)
    """Where the service is short: limits that cannot all hold while its demand is served, and none of which could be
    left out of this list. Others may stand in the way as well. Empty where no limit does, or it was not sought."""
    warnings: list[str] = Field(default_factory=list)
    """Facts that did not stop the plan but that the user should know."""

    @property
    def key(self) -> str:
        """`namespace/name` of the service."""
        return f"{self.namespace}/{self.service}"

    @property
    def demand_rps(self) -> float:
        """Demand over all buckets, in requests per second."""
        return sum(self.demand)

    @property
    def replicas(self) -> dict[str, int]:
        """Replicas by variant name."""
        return {variant.name: variant.replicas for variant in self.variants}


class Refusal(ApiModel):
    """A service that could not be planned at all. The others are planned without it."""

    namespace: str
    """Namespace of the service."""
    service: str
    """Name of the service."""
    reason: str
    """CamelCase reason for the Planned condition: UnknownGPUType, ProfileNotFound, ModelDoesNotFit,
    NoInventory, ProfileIncomplete, ObjectiveUnreachable, SpotNotAllowed."""
    message: str
    """Object, field, value, and what would be accepted."""
    generation: int = Field(default=0, ge=0)
    """metadata.generation of the LLMService that was refused; 0: not known."""

    @property
    def key(self) -> str:
        """`namespace/name` of the service."""
        return f"{self.namespace}/{self.service}"


class PlannedNodes(ApiModel):
    """Nodes of a type that is billed by the node."""

    gpu_type: str
    """GPUType."""
    devices_per_node: int = Field(ge=1)
    """Devices of each."""
    nodes: int = Field(ge=0)
    """The fewest that hold all replicas, those of plans that stay in force included."""
    idle_devices: int = Field(ge=0)
    """Devices on them that nobody uses."""
    idle_cost_per_hour: float = Field(ge=0)
    """What these cost per hour."""


class Plan(ApiModel):
    """What one solve of the whole fleet decided."""

    schema_version: Literal[1] = 1
    plan_id: str
    """Hash of what was decided (replicas and routes): equal decisions have equal ids."""
    status: Literal["optimal", "feasible", "partial"]
    """`optimal`: within the asked gap of the proven bound, replicas holding what they were taken to hold in the last
    solve, and all demand served. `feasible`: all demand served,
    gap not proven. `partial`: some demand is unserved."""
    gap_cost: float | None = None
    """Proven relative gap of the cost; absent when no bound was proven."""
    gap_unserved: float | None = None
    """Largest share of a priority's demand that is unserved and not proven to be unavoidable."""
    bound: float | None = None
    """Proven lower bound of the cost per hour with the price of change, at the least unserved demand; absent when not
    proven. Replicas with a role count 2 % dearer than they are in it."""
    stopped_by: Literal["gap", "work_limit", "time_limit"]
    """What ended the solve: the asked gap, its allowance of work, or the clock."""
    solve_seconds: float = Field(ge=0)
    """Wall time of the solve."""
    cost_per_hour: float = Field(ge=0)
    """Cost of the fleet per hour."""
    watts: float | None = None
    """Peak power of the planned replicas, over the types whose power is known."""
    nodes: list[PlannedNodes] | None = None
    """Nodes of types that are billed by the node; absent where none is used."""
    services: list[ServicePlan] = Field(default_factory=list)
    """One entry per planned service, by key."""
    refusals: list[Refusal] = Field(default_factory=list)
    """Services that could not be planned, by key."""
    kept: list[ServicePlan] = Field(default_factory=list)
    """Earlier plans of services that are refused or do not parse, by key. They stay in force, so nobody else was
    planned on their devices; they are no part of this plan's cost, watts and id."""

    def service(self, key: str) -> ServicePlan | None:
        """The plan of `namespace/name`, or None."""
        return next((service for service in self.services if service.key == key), None)
