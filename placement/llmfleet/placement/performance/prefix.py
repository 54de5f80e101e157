"""What a prefix cache saves: a model of the same variant where a share of every prompt need not be computed.

vLLM keeps the KV cache of prompts it has seen by blocks; a request whose prompt begins with such blocks computes only
what follows them. So its TTFT, and what its prefill takes from others, is that of a prompt shorter by the share; while
it decodes, all of its context is read and held as ever, so TPOT and the places of a replica are those of the whole
prompt. The latter is on the safe side: part of the context is held once for all.

The share is a promise about *every* prompt (a system prompt that all have), not a mean over prompts of which some hit
and some miss: at the 95th percentile only those that miss would count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.placement.performance.model import PerformanceModel, Prediction, loads


@dataclass(frozen=True)
class PrefixCached:
    """A model where this share of every prompt is found in the prefix cache, 0 <= share < 1."""

    model: PerformanceModel
    share: float

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`. Where the model does not know the shorter prompt, nothing is saved."""
        inputs, outputs, concurrencies = loads(input_tokens, output_tokens, concurrency)
        whole = self.model.predict(inputs, outputs, concurrencies)
        computed = np.maximum(1.0, inputs * (1.0 - self.share))
        shorter = self.model.predict(computed, outputs, concurrencies)
        saved = whole.known & shorter.known & (shorter.ttft_ms <= whole.ttft_ms)
        return replace(
            whole,
            ttft_ms=np.where(saved, shorter.ttft_ms, whole.ttft_ms),
            ttft_spread=np.where(saved, shorter.ttft_spread, whole.ttft_spread),
            ttft_error=np.where(saved, shorter.ttft_error, whole.ttft_error),
        )


def prefix_cached(model: PerformanceModel, share: float) -> PerformanceModel:
    """The model itself where the share is zero."""
    return PrefixCached(model, share) if share > 0 else model
