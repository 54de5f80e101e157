"""From the time of a step and of a prefill to what requests see in a closed loop: shared by roofline and prior.

With n requests in flight, each sees the prefills of the other n - 1 during its own life. They lengthen its decode by
`interference` times their time, spread over its answer, and its own prefill waits for `queueing` of them. What does
not fit into the memory left by the weights waits for a place: Little's law on the rest of the request's life.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from llmfleet.placement.performance.model import FloatArray, Prediction, Source

TTFT_SPREAD, TPOT_SPREAD = 0.4, 0.1
"""Scatter of single requests (standard deviation of the logarithm): TTFT depends on who else arrives, TPOT hardly."""


class StepTimes(Protocol):
    """What an engine does in one go. Arrays have the shape of the loads."""

    def step_ms(self, batch: FloatArray, context: FloatArray) -> FloatArray:
        """One decode step of `batch` requests at `context` tokens each."""
        ...

    def prefill_ms(self, prompt: FloatArray) -> FloatArray:
        """What one prompt adds to the engine's work."""
        ...

    def places(self, context: FloatArray) -> FloatArray:
        """Requests of this context that fit into the cache; below one where not even a single one does."""
        ...


def closed_loop(
    times: StepTimes,
    input_tokens: FloatArray,
    output_tokens: FloatArray,
    concurrency: FloatArray,
    *,
    interference: float,
    queueing: float,
    admission_ms: float,
) -> tuple[FloatArray, FloatArray]:
    """(TTFT, TPOT) in ms; a request that alone fills the memory waits for ever."""
    context = input_tokens + output_tokens / 2
    places = times.places(context)
    running = np.minimum(concurrency, np.maximum(places, 1.0))
    prefill_ms = times.prefill_ms(input_tokens)
    others_ms = (running - 1) * prefill_ms
    tpot_ms = times.step_ms(running, context) + interference * others_ms / output_tokens
    ttft_ms = admission_ms + times.step_ms(np.ones_like(input_tokens), input_tokens) + prefill_ms
    ttft_ms = ttft_ms + queueing * others_ms
    waiting = concurrency - running
    ttft_ms = np.where(places < 1, np.inf, ttft_ms + waiting / running * (ttft_ms + output_tokens * tpot_ms))
    return ttft_ms, tpot_ms


def computed(
    ttft_ms: FloatArray,
    tpot_ms: FloatArray,
    *,
    ttft_error: float,
    tpot_error: float,
    source: Source,
    ttft_spread: float = TTFT_SPREAD,
) -> Prediction:
    """A prediction whose errors and scatter are the same everywhere; NaN stays unknown."""
    known = ~(np.isnan(ttft_ms) | np.isnan(tpot_ms))
    ones = np.where(known, 1.0, np.nan)
    return Prediction(
        ttft_ms=np.where(known, ttft_ms, np.nan),
        tpot_ms=np.where(known, tpot_ms, np.nan),
        ttft_spread=ttft_spread * ones,
        tpot_spread=TPOT_SPREAD * ones,
        ttft_error=ttft_error * ones,
        tpot_error=tpot_error * ones,
        source=np.where(known, source, "none"),
    )
