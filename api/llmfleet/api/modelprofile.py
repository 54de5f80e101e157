"""ModelProfile: what one model costs on each GPU type, as measured.

`llmfleet profile` writes it by loading a running engine; nobody types it in. Its size buckets are also those of the
service's demand histogram and of the routing table, so that plan, gateway and profile speak of the same thing.

A bucket is named by its upper edges and represented by them: a request of 200 input tokens falls into the bucket
with edge 512 and is planned as if it had 512. That is never optimistic. Requests above the last edge are counted
in the last bucket.

What is said of memory and bits is said of the default configuration; others (`configuration`) say what differs, and
`configured` gives the profile as one of them runs it, so that nobody else has to know of them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import Annotated, ClassVar, Self

from pydantic import ConfigDict, Field, model_validator

from llmfleet.api.configuration import DEFAULT_CONFIGURATION, Configuration, ConfigurationName
from llmfleet.api.meta import ApiModel, Conditions, Name, PrinterColumn, Resource, Rule, UniqueBy, cel

_ASCENDING = "self.isSorted() && self.all(x, self.exists_one(y, y == x))"


class Buckets(ApiModel):
    """Upper edges of the size buckets, ascending, in tokens."""

    input_tokens: list[Annotated[int, Field(ge=1, le=16_777_216)]] = Field(
        min_length=1,
        max_length=16,
        json_schema_extra=cel(Rule(_ASCENDING, "inputTokens must be strictly ascending", got=("%s", "self"))),
    )
    """Upper edges over the prompt's length."""
    output_tokens: list[Annotated[int, Field(ge=1, le=16_777_216)]] = Field(
        min_length=1,
        max_length=16,
        json_schema_extra=cel(Rule(_ASCENDING, "outputTokens must be strictly ascending", got=("%s", "self"))),
    )
    """Upper edges over the answer's length."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for field, edges in (("inputTokens", self.input_tokens), ("outputTokens", self.output_tokens)):
            if any(b <= a for a, b in itertools.pairwise(edges)):
                raise ValueError(f"{field} must be strictly ascending, got {edges}")
        return self

    @property
    def count(self) -> int:
        """Number of buckets."""
        return len(self.input_tokens) * len(self.output_tokens)

    def index(self, input_tokens: float, output_tokens: float) -> int:
        """Bucket of a request: row-major, input index times number of output edges plus output index."""
        rows, columns = self.input_tokens, self.output_tokens
        row = bisect_left(rows, input_tokens, 0, len(rows) - 1)
        column = bisect_left(columns, output_tokens, 0, len(columns) - 1)
        return row * len(columns) + column

    def input_index(self, input_tokens: float) -> int:
        """Index of the first input edge that holds the prompt; the last one for longer prompts."""
        return bisect_left(self.input_tokens, input_tokens, 0, len(self.input_tokens) - 1)

    def output_index(self, output_tokens: float) -> int:
        """Index of the first output edge that holds the answer; the last one for longer answers."""
        return bisect_left(self.output_tokens, output_tokens, 0, len(self.output_tokens) - 1)

    def edges(self, bucket: int) -> tuple[int, int]:
        """(input tokens, output tokens) at the upper corner of a bucket."""
        row, column = divmod(bucket, len(self.output_tokens))
        return self.input_tokens[row], self.output_tokens[column]


class Percentiles(ApiModel):
    """A latency distribution over requests, in milliseconds."""

    p50: float = Field(ge=0)
    """Median."""
    p90: float = Field(ge=0)
    """90th percentile."""
    p95: float = Field(ge=0)
    """95th percentile."""
    p99: float = Field(ge=0)
    """99th percentile."""
    max: float = Field(ge=0)
    """Largest value seen."""

    def at_least(self, percentile: float) -> float:
        """The value at the next measured percentile at or above `percentile` (0-100): never optimistic."""
        for level, value in ((50, self.p50), (90, self.p90), (95, self.p95), (99, self.p99)):
            if percentile <= level:
                return value
        return self.max


class MeasuredPoint(ApiModel):
    """One closed-loop run: a bucket's upper corner at one concurrency."""

    input_tokens: int = Field(ge=1, le=16_777_216)
    """Prompt length of every request, in tokens."""
    output_tokens: int = Field(ge=1, le=16_777_216)
    """Answer length of every request, in tokens."""
    concurrency: int = Field(ge=1)
    """Requests in flight at once."""
    requests: int = Field(ge=1)
    """Requests that finished inside the measured window."""
    requests_per_second: float = Field(ge=1e-6, le=1e6)
    """Completed requests per second."""
    ttft_ms: Percentiles
    """Time to first token."""
    tpot_ms: Percentiles
    """Mean time per output token after the first, per request."""


VARIANT_KEYS = ("gpuType", "tensorParallel", "pipelineParallel", "configuration")
"""What tells the variants of a profile apart."""


class Measurement(ApiModel):
    """All points of one variant."""

    gpu_type: Name
    """Name of the GPUType."""
    tensor_parallel: int = Field(default=1, ge=1, le=64)
    """Devices that share every layer."""
    pipeline_parallel: int = Field(default=1, ge=1, le=64)
    """Stages of such devices, within one node."""
    configuration: ConfigurationName = DEFAULT_CONFIGURATION
    """How the engine was run: `default`, or a name of `spec.configurations`."""
    engine: str = Field(default="", max_length=253)
    """Engine and version that was measured, for example `vllm 0.32.0`."""
    measured_at: str = Field(default="", max_length=64)
    """When, as an RFC 3339 time."""
    points: Annotated[list[MeasuredPoint], UniqueBy("inputTokens", "outputTokens", "concurrency")] = Field(
        min_length=1, max_length=512
    )
    """The measured points; every bucket needs at least one at its upper corner."""

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.tensor_parallel * self.pipeline_parallel


class Architecture(ApiModel):
    """The model's shape, from which its speed on hardware that was never measured is computed.

    `llmfleet profile import --config config.json` derives it from a Hugging Face configuration.
    """

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "(self.experts > 0) == (self.expertsPerToken > 0)"
                " && (self.experts > 0) == (self.expertParametersBillion > 0.0)",
                "experts, expertsPerToken and expertParametersBillion go together: all zero or none",
                got=("%s, %s and %s", "self.experts", "self.expertsPerToken", "self.expertParametersBillion"),
            ),
            Rule(
                "self.expertsPerToken <= self.experts",
                "expertsPerToken must not exceed experts",
                got=("%s and %s", "self.expertsPerToken", "self.experts"),
                field=".expertsPerToken",
            ),
            Rule(
                "self.windowedLayers == 0 || self.windowTokens > 0",
                "windowTokens must be positive where windowedLayers is",
                got=("%s where windowedLayers is %s", "self.windowTokens", "self.windowedLayers"),
                field=".windowTokens",
            ),
        )
    )

    layers: int = Field(ge=1, le=10_000)
    """Number of layers."""
    hidden_size: int = Field(ge=1, le=1_000_000)
    """Width of the residual stream."""
    dense_parameters_billion: float = Field(gt=0, le=1e5)
    """Parameters that every token passes, output head included, input embedding and routed experts excluded."""
    expert_parameters_billion: float = Field(default=0.0, ge=0, le=1e6)
    """Parameters of all routed experts together."""
    experts: int = Field(default=0, ge=0, le=65_536)
    """Routed experts of a layer; 0 for a dense model."""
    experts_per_token: int = Field(default=0, ge=0, le=65_536)
    """Routed experts that one token passes."""
    shared_expert: bool = False
    """Every token passes a further expert."""
    dense_bits: float = Field(default=16.0, ge=1, le=32)
    """Bits of one dense weight as served, scales included."""
    expert_bits: float = Field(default=16.0, ge=1, le=32)
    """Bits of one expert weight as served, scales included."""
    attention_layers: int = Field(ge=0, le=10_000)
    """Layers whose attention sees the whole context."""
    windowed_layers: int = Field(default=0, ge=0, le=10_000)
    """Layers whose attention sees the last `windowTokens` only."""
    window_tokens: int = Field(default=0, ge=0, le=16_777_216)
    """Context of a windowed layer."""
    attended_tokens: int | None = Field(default=None, ge=1, le=16_777_216)
    """Most tokens of the context that one query reads, where attention is sparse."""
    key_value_heads: int = Field(ge=1, le=65_536)
    """Key/value heads, over which devices can share the cache; 1 for latent attention."""
    kv_values_per_token: int = Field(ge=1, le=1_000_000)
    """Numbers that one token leaves in the cache of one layer."""
    kv_bits: float = Field(default=16.0, ge=1, le=32)
    """Bits of one number in the cache."""
    prefill_attention_width: int = Field(ge=1, le=10_000_000)
    """Multiply-adds per layer for one query and one token of context in prefill: heads times twice the head size."""
    decode_attention_width: int = Field(ge=1, le=10_000_000)
    """The same in decode; larger than in prefill for latent attention, else equal."""
    state_kib_per_request: float = Field(default=0.0, ge=0, le=1e9)
    """Recurrent state that a decode step reads and writes for one request, over all linear-attention layers."""

    @model_validator(mode="after")
    def _experts_fit_together(self) -> Self:
        given = (self.experts > 0, self.experts_per_token > 0, self.expert_parameters_billion > 0)
        if any(given) and not all(given):
            raise ValueError(
                "experts, expertsPerToken and expertParametersBillion go together: all zero or none, got "
                f"{self.experts}, {self.experts_per_token} and {self.expert_parameters_billion:g}"
            )
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"expertsPerToken must not exceed experts, got {self.experts_per_token} and {self.experts}"
            )
        if self.windowed_layers and not self.window_tokens:
            raise ValueError(
                f"windowTokens must be positive where windowedLayers is, got {self.window_tokens} where windowedLayers "
                f"is {self.windowed_layers}"
            )
        return self


class ModelProfileSpec(ApiModel):
    """What one model needs and what it does on each type."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "!has(self.measurements) || self.measurements.all(m, m.configuration == 'default'"
                " || (has(self.configurations) && self.configurations.exists(c, c.name == m.configuration)))",
                "configurations must have each that measurements name",
                got=("measurements of %s", "self.measurements.map(m, m.configuration)"),
                field=".measurements",
            )
        )
    )

    model: str = Field(
        min_length=1,
        max_length=253,
        json_schema_extra=cel(
            Rule(
                "self == oldSelf",
                "model is immutable: create another ModelProfile",
                got=("%s where it was %s", "self", "oldSelf"),
            )
        ),
    )
    """Model that was measured, as in an LLMService's `model.name`. Immutable."""
    weights_gib: float = Field(gt=0, le=1e6)
    """Memory of the weights as served, in GiB, over all devices of a replica."""
    kv_kib_per_token: float = Field(ge=1e-6, le=1e6)
    """KV cache of one token, in KiB, over all layers and devices."""
    overhead_gib: float = Field(default=1.0, ge=0, le=1e6)
    """Activations, graphs and engine overhead per device, in GiB."""
    parameters_billion: float | None = Field(default=None, gt=0)
    """Active parameters in billions; with a type's `hardware` figures it bounds what a measurement may claim."""
    architecture: Architecture | None = None
    """The model's shape; without it a variant that was not measured has no predicted latency."""
    buckets: Buckets
    """Size buckets of measurement, demand and routing."""
    configurations: Annotated[list[Configuration], UniqueBy("name")] = Field(default_factory=list, max_length=16)
    """Other precisions and engine arguments than the default ones, for services that allow them by name."""
    measurements: Annotated[list[Measurement], UniqueBy(*VARIANT_KEYS)] = Field(default_factory=list, max_length=64)
    """One entry per variant."""

    @model_validator(mode="after")
    def _configurations_are_known(self) -> Self:
        known = {DEFAULT_CONFIGURATION, *(configuration.name for configuration in self.configurations)}
        unknown = sorted({one.configuration for one in self.measurements} - known)
        if unknown:
            raise ValueError(
                f"configurations must have each that measurements name, got measurements of {', '.join(unknown)}; it "
                f"has {', '.join(sorted(known))}"
            )
        return self

    def configuration(self, name: str) -> Configuration | None:
        """The configuration of this name; None for the default one. Raises KeyError for an unknown one."""
        if name == DEFAULT_CONFIGURATION:
            return None
        found = next((one for one in self.configurations if one.name == name), None)
        if found is None:
            raise KeyError(name)
        return found


class CorrectionBin(ApiModel):
    """How far off the predicted latency is around one load."""

    concurrency: float = Field(ge=1)
    """Mean requests in flight; bins are an octave wide."""
    log_ratio: float = Field(ge=-16, le=16)
    """Logarithm of observed over predicted latency, robustly averaged."""
    deviation: float = Field(ge=0, le=16)
    """Mean absolute deviation of single observations from it."""
    weight: float = Field(ge=0)
    """Requests that stand behind it; halves with every half-life."""
    at: float
    """Unix time of the last observation."""


class SeenRange(ApiModel):
    """What has been observed of a quantity."""

    least: float = Field(gt=0)
    """Smallest value seen."""
    most: float = Field(gt=0)
    """Largest value seen."""


class Correction(ApiModel):
    """How far one variant's predicted latency is off in service."""

    gpu_type: Name
    """Name of the GPUType."""
    tensor_parallel: int = Field(ge=1, le=64)
    """As in the measurement."""
    pipeline_parallel: int = Field(ge=1, le=64)
    """As in the measurement."""
    configuration: ConfigurationName
    """As in the measurement."""
    input_tokens: SeenRange | None = None
    """Mean prompt lengths."""
    output_tokens: SeenRange | None = None
    """Mean answer lengths."""
    ttft: list[CorrectionBin] = Field(default_factory=list, max_length=32)
    """Of TTFT, ascending by load."""
    tpot: list[CorrectionBin] = Field(default_factory=list, max_length=32)
    """Of TPOT, ascending by load."""


class ModelProfileStatus(ApiModel):
    """Whether the profile counts, and what running engines have taught since it was measured."""

    conditions: Conditions
    """Accepted: the spec parses and counts."""
    last_accepted: str | None = None
    """The last version that parsed, as JSON: it counts while a later one does not."""
    corrections: Annotated[list[Correction], UniqueBy(*VARIANT_KEYS)] = Field(default_factory=list, max_length=64)
    """One entry per variant that has been observed."""


class ModelProfile(Resource):
    """What one model costs on each GPU type, as measured by `llmfleet profile`."""

    KIND: ClassVar[str] = "ModelProfile"
    PLURAL: ClassVar[str] = "modelprofiles"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("mprof",)
    PRINTER_COLUMNS: ClassVar[tuple[PrinterColumn, ...]] = (
        PrinterColumn(name="Model", type="string", json_path=".spec.model"),
        PrinterColumn(name="Weights", type="number", json_path=".spec.weightsGib", description="GiB"),
        PrinterColumn(name="KV/token", type="number", json_path=".spec.kvKibPerToken", description="KiB"),
        PrinterColumn(name="Accepted", type="string", json_path='.status.conditions[?(@.type=="Accepted")].status'),
        PrinterColumn(name="Age", type="date", json_path=".metadata.creationTimestamp"),
    )

    spec: ModelProfileSpec
    status: ModelProfileStatus = Field(default_factory=ModelProfileStatus)

    def configured(self, name: str) -> Self:
        """The profile as it is where the engine runs in this configuration: its own memory figures and bits, and only
        what was measured and learnt in it. Raises KeyError for a configuration that the profile does not have.
        """
        spec, configuration = self.spec, self.spec.configuration(name)
        if configuration is None and not spec.configurations:
            return self
        changed: dict[str, object] = {
            "configurations": [] if configuration is None else [configuration],
            "measurements": [one for one in spec.measurements if one.configuration == name],
        }
        corrections = [one for one in self.status.corrections if one.configuration == name]
        if configuration is not None:
            changed |= _given(configuration, "weights_gib", "kv_kib_per_token", "overhead_gib")
            if spec.architecture is not None:
                bits = _given(configuration, "kv_bits")
                if configuration.weight_bits is not None:
                    bits |= dict.fromkeys(("dense_bits", "expert_bits"), configuration.weight_bits)
                changed["architecture"] = spec.architecture.model_copy(update=bits)
        return self.model_copy(
            update={
                "spec": spec.model_copy(update=changed),
                "status": self.status.model_copy(update={"corrections": corrections}),
            }
        )


def _given(configuration: Configuration, *fields: str) -> dict[str, float]:
    return {field: value for field in fields if (value := getattr(configuration, field)) is not None}
