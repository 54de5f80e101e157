"""What two engines must have in common for a request to go from one to the other.

In flow the fingerprints of both; out flow the fields that differ, and what is left of a migration then: KV is bytes in
one engine's layout, so it is copied only where everything is the same; where only the way of computing differs the
tokens so far can be computed again, which is not exact; other weights or another adapter would give another answer.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from llmfleet.api.meta import ApiModel

Text = Annotated[str, Field(max_length=512)]


class Adapter(ApiModel):
    """A LoRA adapter that an engine has loaded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=256)
    digest: Text
    """Hash of its weights, or of what identifies them."""


class Fingerprint(ApiModel):
    """What an engine's KV cache and arithmetic depend on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    vllm_version: Text
    model: Text
    """Name or path, as the engine was given it: fine-tuned models may differ in nothing else that is cheap to hash."""
    model_hash: Text
    """Hash of the model's configuration and of its weights' index."""
    dtype: Text
    kv_dtype: Text
    block_size: int = Field(ge=1, le=65_536)
    """Tokens in a block of KV cache."""
    layout: Text
    """Of a block in memory: shape, order and strides, layers and heads per rank."""
    attention_backend: Text
    instruction_set: Text
    """Of the CPU, or the GPU's compute capability: it chooses kernels."""
    tp: int = Field(ge=1, le=1024)
    """Tensor-parallel degree."""
    quantization: Text = ""
    """Empty: none."""
    lora: list[Adapter] = Field(default_factory=list, max_length=1024)


class Compatibility(StrEnum):
    """What can be done between two engines."""

    COPY = "copy"
    """KV goes along."""
    REPLAY = "replay"
    """The tokens so far are computed anew; the answer may go on otherwise than it would have."""
    NEVER = "never"
    """It would be another model's answer."""


OTHER_MODEL = frozenset({"model", "model_hash", "quantization", "lora"})
"""Fields that, when they differ, make another model."""


def differences(source: Fingerprint, destination: Fingerprint, adapter: str | None = None) -> tuple[str, ...]:
    """Fields that differ for a request with this LoRA adapter, those that make another model first."""
    differing = [
        name
        for name in Fingerprint.model_fields
        if name != "lora" and getattr(source, name) != getattr(destination, name)
    ]
    if adapter is not None:
        here, there = _digest(source, adapter), _digest(destination, adapter)
        if here is None or here != there:
            differing.append("lora")
    return tuple(sorted(differing, key=lambda name: name not in OTHER_MODEL))


def compatibility(differing: Collection[str]) -> Compatibility:
    """What differing fields leave possible."""
    if not differing:
        return Compatibility.COPY
    return Compatibility.NEVER if OTHER_MODEL.intersection(differing) else Compatibility.REPLAY


def _digest(fingerprint: Fingerprint, adapter: str) -> str | None:
    return next((one.digest for one in fingerprint.lora if one.name == adapter), None)
