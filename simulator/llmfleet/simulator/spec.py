"""What an engine model is told about the engine: how long a step takes, and what its scheduler may put into one.

A *step* is one pass through the model. Every running request that has its prompt behind it gets one token in it; the
room that is left in the batch takes prompt tokens. How long it takes:

    step = overhead + max(weights, token * tokens) + sequence * sequences + context * context tokens + pair * pairs

tokens: prompt tokens and decoding requests together; sequences: requests in the step; context tokens: KV entries that
the decoding requests read; pairs: (query, key) pairs of the prompt chunks' attention. The maximum is what makes small
prompts free on a device that reads its weights anyway.

Time is counted in whole picoseconds. Sums of whole numbers do not depend on their order, so that a thousand equal
steps taken at once end at exactly the time at which they end one by one.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from llmfleet.api.meta import ApiModel

PS_PER_MS = 1_000_000_000
PS_PER_S = 1000 * PS_PER_MS


class StepTime(ApiModel):
    """Coefficients of the formula above, in milliseconds."""

    overhead_ms: float = Field(default=0.0, ge=0, le=1e6)
    """Of every step: scheduling, launching, sampling."""
    weights_ms: float = Field(default=0.0, ge=0, le=1e6)
    """Reading the weights once."""
    token_ms: float = Field(default=0.0, ge=0, le=1e6)
    """Of each token that is computed, prompt or answer."""
    sequence_ms: float = Field(default=0.0, ge=0, le=1e6)
    """Of each request in the step."""
    context_token_ms: float = Field(default=0.0, ge=0, le=1e6)
    """Of each KV entry that a decoding request reads."""
    pair_ms: float = Field(default=0.0, ge=0, le=1e6)
    """Of each pair of query and key in a prompt chunk's attention."""

    @model_validator(mode="after")
    def _takes_time(self) -> Self:
        if ps(self.overhead_ms) + max(ps(self.weights_ms), ps(self.token_ms)) + ps(self.sequence_ms) <= 0:
            raise ValueError(
                "overheadMs, weightsMs, tokenMs and sequenceMs are all zero: accepted are values with which a step of "
                "one token takes at least 1e-9 ms"
            )
        return self

    def scaled(self, factor: float) -> StepTime:
        """The same engine, everything `factor` times as slow."""
        return StepTime(**{name: value * factor for name, value in self.model_dump().items()})


class EngineSpec(ApiModel):
    """One engine: what its steps cost, and its scheduler's limits under the names that vLLM gives them."""

    step: StepTime
    """Time of a step."""
    frontend_ms: float = Field(default=0.0, ge=0, le=1e6)
    """From a request's arrival until the scheduler sees it: parsing, tokenizing, one way of the network."""
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=1_048_576)
    """Most tokens in a step; a longer prompt is taken in chunks."""
    max_num_seqs: int = Field(default=256, ge=1, le=65_536)
    """Most requests that run at once."""
    kv_blocks: int = Field(ge=1, le=2**31)
    """Blocks of the KV cache that requests can have."""
    block_tokens: int = Field(default=16, ge=1, le=4096)
    """Tokens of a block."""

    @model_validator(mode="after")
    def _every_request_gets_its_token(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"maxNumBatchedTokens must be at least maxNumSeqs ({self.max_num_seqs}), "
                f"got {self.max_num_batched_tokens}"
            )
        return self

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.kv_blocks * self.block_tokens


def ps(milliseconds: float) -> int:
    """Milliseconds as whole picoseconds."""
    return round(milliseconds * PS_PER_MS)
