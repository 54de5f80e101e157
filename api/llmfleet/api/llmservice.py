"""LLMService: one model, its latency objective and its traffic. The one object that a user has to write.

The operator decides which GPU types and how many replicas serve it, and says in `status` what was decided, what it
costs, what the next best plan would cost and which constraint binds.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from llmfleet.api.configuration import DEFAULT_CONFIGURATION, WORD_PATTERN, ConfigurationName
from llmfleet.api.meta import ApiModel, Condition, Name, PrinterColumn, Resource, Rule, UniqueBy, cel
from llmfleet.api.pod import PodOverlay, SecretKeyRef

CONDITION_PLANNED = "Planned"
"""The last solve gave this service replicas for all its demand."""
CONDITION_ENGINES_READY = "EnginesReady"
"""Every planned replica runs the current template and is Ready."""
CONDITION_SHADOW = "Shadow"
"""What would be planned; there while the FleetPolicy's mode is `shadow`."""
CONDITION_READY = "Ready"
"""Planned and EnginesReady: clients get what the objective promises."""

RESERVED_ENGINE_ARGS = (
    "--host",
    "--port",
    "--model",
    "--served-model-name",
    "--revision",
    "--max-model-len",
    "--tensor-parallel-size",
    "-tp",
    "--api-key",
)
"""Arguments that the operator renders itself; a service that sets one is refused."""


HUB_NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?$"
"""A repository of the Hugging Face hub: `model` or `org/model`."""
MOST_TOKENS = 16_777_216


class Model(ApiModel):
    """Which weights are served, and under which name."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "self.source == 'hf' || !has(self.tokenSecret)",
                "tokenSecret needs source hf",
                got=("source %s", "self.source"),
                field=".tokenSecret",
            ),
            Rule("self.source != 'pvc' || has(self.claim)", "claim is required where source is pvc", field=".claim"),
            Rule(
                f"self.source != 'hf' || self.name.matches('{HUB_NAME_PATTERN}')",
                "name must be a Hugging Face repository such as `org/model` where source is hf",
                got=("%s", "self.name"),
                field=".name",
            ),
            Rule(
                "self.source != 'path' || self.name.startsWith('/')",
                "name must be an absolute path where source is path",
                got=("%s", "self.name"),
                field=".name",
            ),
        )
    )

    source: Literal["hf", "pvc", "path"] = "hf"
    """Where the weights come from: `hf` a Hugging Face repository, `pvc` a directory of a claim, `path` a
    directory that a volume of the overlay or the image provides."""
    name: str = Field(min_length=1, max_length=253)
    """Repository (hf), path inside the claim (pvc), or absolute path (path)."""
    revision: str | None = Field(default=None, min_length=1, max_length=128, pattern=WORD_PATTERN)
    """Branch, tag or commit of the repository."""
    served_name: str | None = Field(default=None, min_length=1, max_length=253, pattern=WORD_PATTERN)
    """Model name that clients use; absent: the object's name."""
    context_length: int = Field(ge=16, le=MOST_TOKENS)
    """Longest prompt plus answer, in tokens."""
    claim: str | None = Field(default=None, max_length=253)
    """PersistentVolumeClaim that holds the weights (source pvc) or caches them (source hf)."""
    token_secret: SecretKeyRef | None = None
    """Secret key with the Hugging Face token."""

    @model_validator(mode="after")
    def _same_rules_as_admission(self) -> Self:
        if self.source == "pvc" and self.claim is None:
            raise ValueError("claim is required where source is pvc")
        if self.source != "hf" and self.token_secret is not None:
            raise ValueError("tokenSecret needs source hf")
        if self.source == "path" and not self.name.startswith("/"):
            raise ValueError(f"name must be an absolute path where source is path, got {self.name}")
        if self.source == "hf" and not re.fullmatch(HUB_NAME_PATTERN, self.name):
            raise ValueError(
                f"name must be a Hugging Face repository such as `org/model` where source is hf, got {self.name}"
            )
        return self


class LatencyTarget(ApiModel):
    """One latency target: this share of requests stays below this many milliseconds."""

    percentile: float = Field(default=95, gt=0, lt=100)
    """Share of requests, in percent, strictly between 0 and 100."""
    milliseconds: float = Field(gt=0)
    """Largest latency at that percentile, in milliseconds."""


class Objective(ApiModel):
    """The latency objective; both targets hold together."""

    ttft: LatencyTarget
    """Time to first token."""
    tpot: LatencyTarget
    """Time per output token after the first, averaged over a request."""


class RequestSize(ApiModel):
    """A kind of request and its share of the traffic."""

    input_tokens: int = Field(ge=1, le=MOST_TOKENS)
    """Prompt length, in tokens; planned as the longest of its bucket."""
    output_tokens: int = Field(ge=1, le=MOST_TOKENS)
    """Answer length, in tokens, on the mean."""
    share: float = Field(default=1.0, gt=0, le=1e6)
    """Weight among the sizes; the weights need not sum to one."""


class Traffic(ApiModel):
    """How much load to plan for."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            *(
                Rule(
                    f"self.mode != 'expected' || has(self.{field})",
                    f"{field} is required where mode is expected",
                    field=f".{field}",
                )
                for field in ("requestsPerSecond", "sizes")
            )
        )
    )

    mode: Literal["expected", "observe"] = "observe"
    """`expected`: plan for the rate and sizes given here. `observe`: for what gateways measure; what is given here
    counts until they have."""
    requests_per_second: float | None = Field(default=None, ge=0, le=1e6)
    """Arrival rate."""
    sizes: list[RequestSize] | None = Field(default=None, min_length=1, max_length=64)
    """Sizes of the requests."""
    burstiness: float = Field(default=1.0, ge=0, le=100)
    """Squared coefficient of variation of the times between arrivals: 1 as by chance, more in bursts, 0 paced by
    the senders. Small pools hold back more for bursts, nothing at 0."""
    prefix_cache_hit_share: float = Field(default=0.0, ge=0, le=0.99)
    """Share of every prompt, at least, that engines find in their prefix cache: a system prompt, say. It is not
    computed again."""

    @model_validator(mode="after")
    def _same_rules_as_admission(self) -> Self:
        if self.mode == "expected" and (self.requests_per_second is None or self.sizes is None):
            raise ValueError("requestsPerSecond and sizes are required where mode is expected")
        return self


class ReplicaBounds(ApiModel):
    """Bounds on the replicas of all variants together."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "!has(self.max) || self.min <= self.max",
                "min must not exceed max",
                got=("min %s and max %s", "self.min", "self.max"),
                field=".max",
            )
        )
    )

    min: int = Field(default=0, ge=0, le=10_000)
    """Fewest replicas, kept even without traffic."""
    max: int | None = Field(default=None, ge=0, le=10_000)
    """Most replicas; absent: what the load needs."""
    max_variants: int | None = Field(default=None, ge=1, le=64)
    """Most variants in use at once; absent: as many as pay."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"min must not exceed max, got min {self.min} and max {self.max}")
        return self


class Spot(ApiModel):
    """How spot capacity is used."""

    survive_loss_of: Literal["none", "anyPool"] = "anyPool"
    """`anyPool`: without any one spot GPUType the rest serves all demand."""
    max_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the demand, at most, that the loss of all spot would leave unserved."""


class Engine(ApiModel):
    """How the engine is started."""

    image: str = Field(default="docker.io/vllm/vllm-openai:v0.32.0", min_length=1, max_length=512)
    """Container image with vLLM."""
    command: list[str] = Field(default_factory=lambda: ["vllm", "serve"], min_length=1, max_length=16)
    """Command of the server; the model and the operator's arguments are appended."""
    args: list[Annotated[str, Field(max_length=1024)]] = Field(default_factory=list, max_length=64)
    """Further arguments; those that the operator renders (model, port, name, tensor parallelism, context length,
    key) are refused."""
    termination_grace_period_seconds: int = Field(default=300, ge=1, le=86_400)
    """How long a stream may run on an engine that is removed, in seconds."""
    startup_seconds: int = Field(default=300, ge=0, le=86_400)
    """From a pod to an engine that serves, in seconds: so far ahead a forecast is looked up."""
    startup_deadline_seconds: int = Field(default=1800, ge=1, le=86_400)
    """How long an engine may take to become Ready, in seconds, before it counts as failed."""
    migration: Literal["auto", "off"] = "auto"
    """`auto`: streams move on when an engine leaves, where it can. `"off"`, in quotes: they end where they began."""
    disaggregated: bool = False
    """Engines of their own may prefill and decode, where cheaper. `llmfleet plan` only."""


class LLMServiceSpec(ApiModel):
    """What to serve, how fast, and how much of it."""

    model: Model
    """Which weights are served."""
    profile: str = Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
    """Name of the ModelProfile in this namespace."""
    objective: Objective
    """Latency objective."""
    traffic: Traffic = Field(default_factory=Traffic)
    """Load to plan for."""
    priority: int = Field(default=100, ge=0, le=1000)
    """Who is served first when capacity is short: higher wins."""
    gpu_types: Annotated[list[Name], UniqueBy()] = Field(default_factory=list, max_length=32)
    """GPU types that may serve this model; empty: every type that the profile has measured."""
    configurations: Annotated[list[ConfigurationName], UniqueBy()] = Field(
        default_factory=lambda: [DEFAULT_CONFIGURATION], min_length=1, max_length=16
    )
    """Configurations of the profile that may be used, such as another precision. What is not named here is not used."""
    replicas: ReplicaBounds = Field(default_factory=ReplicaBounds)
    """Bounds on the number of replicas."""
    zone_spread: Literal["none", "preferred"] = "none"
    """`preferred`: engines are spread over zones where there is room."""
    spot: Spot | None = None
    """Absent: no spot GPUType is used."""
    engine: Engine = Field(default_factory=Engine)
    """How the engine is started."""
    api_keys_secret: str | None = Field(default=None, min_length=1, max_length=253)
    """Secret whose values are the API keys that clients may use; absent: no key is asked for."""
    pod_overlay: PodOverlay | None = None
    """What this cluster needs to add to engine pods."""


class VariantStatus(ApiModel):
    """One variant's replicas."""

    name: str
    """Name of the variant."""
    gpu_type: str
    """GPUType of the variant."""
    tensor_parallel: int = 1
    """Devices that share every layer."""
    devices: int = 1
    """Devices per replica."""
    desired: int = 0
    """Replicas that the plan asks for."""
    ready: int = 0
    """Replicas that are Ready on the current template."""
    surplus: int = 0
    """Replicas beyond the plan that still serve or drain."""


class LLMServiceStatus(ApiModel):
    """What was decided and what is so."""

    observed_generation: int = 0
    """Generation of the spec that this status speaks of."""
    conditions: Annotated[list[Condition], UniqueBy("type")] = Field(default_factory=list, max_length=16)
    """Planned, EnginesReady, Ready, and others while they matter."""
    plan_id: str = ""
    """Plan that the replicas and the routing table follow."""
    variants: list[VariantStatus] = Field(default_factory=list, max_length=256)
    """Replicas by variant."""
    replicas: str = ""
    """Replicas by variant, ready/desired."""
    cost_per_hour: float | None = None
    """Cost of the planned replicas per hour."""
    cost_per_million_tokens: float | None = None
    """Cost per million tokens, input and output together, at the planned load."""
    next_best_cost_per_hour: float | None = None
    """Cost of the cheapest plan with another set of variants; absent where there is none."""
    binding: list[str] = Field(default_factory=list, max_length=32)
    """Constraints that keep this service's plan from being cheaper or larger."""
    unserved_requests_per_second: float = 0.0
    """Demand that the plan cannot serve."""


class LLMService(Resource):
    """One model with a latency objective; the operator finds the cheapest fleet that serves it."""

    KIND: ClassVar[str] = "LLMService"
    PLURAL: ClassVar[str] = "llmservices"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("llms",)
    PRINTER_COLUMNS: ClassVar[tuple[PrinterColumn, ...]] = (
        PrinterColumn(name="Ready", type="string", json_path='.status.conditions[?(@.type=="Ready")].status'),
        PrinterColumn(name="Replicas", type="string", json_path=".status.replicas"),
        PrinterColumn(name="Cost/h", type="number", json_path=".status.costPerHour"),
        PrinterColumn(name="Cost/Mtok", type="number", json_path=".status.costPerMillionTokens"),
        PrinterColumn(name="Reason", type="string", json_path='.status.conditions[?(@.type=="Ready")].reason'),
        PrinterColumn(name="NextBest/h", type="number", json_path=".status.nextBestCostPerHour", priority=1),
        PrinterColumn(name="Plan", type="string", json_path=".status.planId", priority=1),
        PrinterColumn(name="Age", type="date", json_path=".metadata.creationTimestamp"),
    )
    NAME_RULE: ClassVar[tuple[str, str] | None] = (
        r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        "metadata.name of an LLMService must be a DNS label of at most 63 characters: it becomes a pod label",
    )

    spec: LLMServiceSpec
    status: LLMServiceStatus = Field(default_factory=LLMServiceStatus)

    @property
    def served_name(self) -> str:
        """Model name that clients use."""
        return self.spec.model.served_name or self.metadata.name
