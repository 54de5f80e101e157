"""Configuration: a way to run a model's engine, beside the one that every profile has.

    Configuration --engine_args--> options of vLLM        what the operator renders, and a measurement is made with
                  --contradicted_by--> an argument        what a service sets itself, so that it cannot have both

A precision changes what an answer costs *and* what it says; the chunked-prefill budget, the most sequences and
speculation change what it costs only. All of them are the plan's to choose among, of those that a service allows by
name. A configuration without fields would be the default one, which is never written down: the service's own engine,
with the profile's memory figures.

Options are those of vLLM 0.32 (`vllm/engine/arg_utils.py`). Their values are checked for form only: which precisions
there are is the engine image's to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from llmfleet.api.meta import ApiModel, Rule, cel

DEFAULT_CONFIGURATION = "default"
"""Name of the configuration that every profile has: its own memory figures, nothing added to the engine's arguments."""

_NAME = r"^[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?$"
_TAKEN = r"^(default|(.*-)?spot|(tp|pp)[0-9].*)$"
"""What other parts of a variant's name look like."""
WORD_PATTERN = r"^[^\s-]\S*$"
"""A value of an engine's command line: no blanks, and no leading dash that would make it an option."""
_METHOD_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"

_OPTIONS = {
    "quantization": ("--quantization", "-q"),
    "kv_cache_dtype": ("--kv-cache-dtype",),
    "max_num_batched_tokens": ("--max-num-batched-tokens",),
    "max_num_seqs": ("--max-num-seqs",),
    "speculative_config": ("--speculative-config", "-sc", "--spec-method", "--spec-model", "--spec-tokens"),
}
"""By field, the option that it is rendered as, and others that set the same."""


class Configuration(ApiModel):
    """A way to run the model that a service may allow by its name."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "has(self.weightsGib) || !(has(self.model) || has(self.revision) || has(self.quantization))",
                "weightsGib is required with model, revision or quantization",
                got=("none for %s", "self.name"),
                field=".weightsGib",
            ),
            Rule(
                "has(self.kvKibPerToken) || !has(self.kvCacheDtype)",
                "kvKibPerToken is required with kvCacheDtype",
                got=("none for %s", "self.name"),
                field=".kvKibPerToken",
            ),
            Rule(
                "!has(self.maxNumBatchedTokens) || !has(self.maxNumSeqs)"
                " || self.maxNumSeqs <= self.maxNumBatchedTokens",
                "maxNumSeqs must not exceed maxNumBatchedTokens",
                got=("%s and %s", "self.maxNumSeqs", "self.maxNumBatchedTokens"),
                field=".maxNumSeqs",
            ),
        )
    )

    name: str = Field(
        max_length=20,
        pattern=_NAME,
        json_schema_extra=cel(
            Rule(
                f"!self.matches('{_TAKEN}')",
                "name must not be default, end in spot or begin as tp2 or pp2 do",
                got=("%s", "self"),
            )
        ),
    )
    """Services allow it by this name, with which its variants' names end."""
    model: str | None = Field(default=None, max_length=253, pattern=WORD_PATTERN)
    """Where the weights are; only for services whose `model.name` is `spec.model`."""
    revision: str | None = Field(default=None, max_length=128, pattern=WORD_PATTERN)
    """Branch, tag or commit of these weights, in place of the service's `model.revision`."""
    quantization: str | None = Field(default=None, max_length=64, pattern=_METHOD_PATTERN)
    """vLLM's `--quantization`, for example `fp8`; absent: what the weights say."""
    kv_cache_dtype: str | None = Field(default=None, max_length=64, pattern=_METHOD_PATTERN)
    """vLLM's `--kv-cache-dtype`, for example `fp8`; absent: what the engine takes by itself."""
    max_num_batched_tokens: int | None = Field(default=None, ge=1, le=16_777_216)
    """vLLM's `--max-num-batched-tokens`: less lowers TPOT, more lowers TTFT."""
    max_num_seqs: int | None = Field(default=None, ge=1, le=65_536)
    """vLLM's `--max-num-seqs`: most requests in one step."""
    speculative_config: str | None = Field(default=None, max_length=1024, pattern=r"^\{.*\}$")
    """vLLM's `--speculative-config`, in JSON. Measure it with prompts like yours."""
    weights_gib: float | None = Field(default=None, gt=0, le=1e6)
    """In place of `spec.weightsGib`, a guessing model included."""
    kv_kib_per_token: float | None = Field(default=None, ge=1e-6, le=1e6)
    """In place of `spec.kvKibPerToken`."""
    overhead_gib: float | None = Field(default=None, ge=0, le=1e6)
    """In place of `spec.overheadGib`."""
    weight_bits: float | None = Field(default=None, ge=1, le=32)
    """In place of `denseBits` and `expertBits` of `spec.architecture`."""
    kv_bits: float | None = Field(default=None, ge=1, le=32)
    """In place of `kvBits` of `spec.architecture`."""

    @model_validator(mode="after")
    def _same_rules_as_admission(self) -> Self:
        if re.fullmatch(_TAKEN, self.name):
            raise ValueError(
                f"name must not be default, end in spot or begin as tp2 or pp2 do, got {self.name}: it ends the names "
                "of variants"
            )
        if self.weights_gib is None and (self.model or self.revision or self.quantization):
            raise ValueError(
                f"weightsGib is required with model, revision or quantization, got none for {self.name}: other "
                "weights, other memory"
            )
        if self.kv_kib_per_token is None and self.kv_cache_dtype is not None:
            raise ValueError(
                f"kvKibPerToken is required with kvCacheDtype, got none for {self.name}: another cache takes "
                "other memory"
            )
        if self.speculative_config is not None:
            try:
                json.loads(self.speculative_config)
            except ValueError as error:
                raise ValueError(f"speculativeConfig must be JSON, got {self.speculative_config}: {error}") from error
        sequences, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if sequences is not None and tokens is not None and sequences > tokens:
            raise ValueError(f"maxNumSeqs must not exceed maxNumBatchedTokens, got {sequences} and {tokens}")
        return self

    def engine_args(self) -> list[str]:
        """Options that vLLM is started with, the model itself and its revision aside."""
        rendered: list[str] = []
        for field, (option, *_) in _OPTIONS.items():
            value = getattr(self, field)
            if value is not None:
                rendered += [option, str(value)]
        return rendered

    def contradicted_by(self, args: Iterable[str]) -> str | None:
        """The first of a service's own engine arguments that sets what this configuration sets; None without one."""
        reserved = [name for field, names in _OPTIONS.items() if getattr(self, field) is not None for name in names]
        return next((argument for argument in args if any(sets(argument, option) for option in reserved)), None)


def sets(argument: str, option: str) -> bool:
    """Whether vLLM reads this argument of its command line as the option, alone or together with its value.

    `--max_model_len` is `--max-model-len`, any unambiguous abbreviation is the whole, `--port.x 1` is a part of
    `--port`'s value, and a short option may have its value behind it (`-q4`, `-tp2`).
    """
    if not argument.startswith("-"):
        return False
    flag = re.split("[=.]", argument, maxsplit=1)[0].replace("_", "-")
    if option.startswith("--"):
        return flag == option or (len(flag) > 2 and flag.startswith("--") and option.startswith(flag))
    return (len(flag) > 1 and option.startswith(flag)) or re.fullmatch(re.escape(option) + r"\d+", flag) is not None


ConfigurationName = Annotated[str, Field(max_length=20, pattern=_NAME)]
"""Name of a configuration, `default` included."""
