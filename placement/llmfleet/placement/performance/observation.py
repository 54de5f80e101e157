"""What was seen of a variant in service, set against what was predicted for it: what `correction.observe` takes in.

    Seen, by size bucket and load --against(model)--> (Observation, Prediction), one for each octave of load

Profiles are closed loops of one size; service is an open mix. Set a mix's mean or median against a prediction for its
mean size, and the difference says more about the mix than about the engine: in simulation, an engine that was exactly
the profiled one seemed a quarter faster under code completions, and its prompts twice as slow. So like is set against
like, bucket by bucket, and only sums over many requests are compared:

* the time per token over all tokens, since in a mix all answers share each step, against the prediction for each
  bucket's corner at the load that its requests had around them *on average, from arrival to end*: who finds an engine
  idle does not stay alone, and who finds it full does not stay in a crowd. In simulation 0.91 to 1.18 of the truth, in
  each octave of load (by the load found on arrival: 0.55 to 2.2);
* the mean time to first token of those who were alone, against the prediction for one request with their mean prompt.
  Under load it would say how arrivals queue (up to 3 times the truth).

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmfleet.placement.performance.correction import Observation
from llmfleet.placement.performance.model import FloatArray, PerformanceModel, Prediction


@dataclass(frozen=True)
class Seen:
    """Requests of one size bucket with about the same load around them. Raises ValueError for none."""

    corner: tuple[int, int]
    """Largest input and output tokens of the bucket."""
    concurrency: float
    """Requests in the engine, themselves included, averaged over the time from a request's arrival to its end, and then
    over the requests."""
    requests: int
    """How many there were."""
    input_tokens: int
    """Their prompts, added up."""
    ttft_ms: float
    """Their times to first token, added up."""
    decoded_tokens: int
    """Their tokens after the first, added up."""
    decode_ms: float
    """Their times from first to last token, added up."""

    def __post_init__(self) -> None:
        if self.requests < 1 or not (1 <= self.concurrency < math.inf):
            raise ValueError(
                f"Seen has {self.requests} requests at {self.concurrency:g} at once; accepted are numbers of at least 1"
            )


def against(model: PerformanceModel, seen: Sequence[Seen], at: float) -> list[tuple[Observation, Prediction]]:
    """Observations and what `model`, uncorrected, predicts for them, ascending in load. `at`: seconds since 1970.

    Left out are sizes that the model does not know at their load, and octaves in which no answer went beyond its first
    token.
    """
    octaves: dict[int, list[Seen]] = {}
    for one in seen:
        if one.decoded_tokens > 0:
            octaves.setdefault(round(math.log2(one.concurrency)), []).append(one)
    pairs = [_compared(model, some, at, idle=octave == 0) for octave, some in sorted(octaves.items())]
    return [pair for pair in pairs if pair is not None]


def _compared(
    model: PerformanceModel, seen: Sequence[Seen], at: float, *, idle: bool
) -> tuple[Observation, Prediction] | None:
    inputs, outputs = np.array([one.corner for one in seen], dtype=np.float64).T
    requests = np.array([one.requests for one in seen], dtype=np.float64)
    tokens = np.array([one.decoded_tokens for one in seen], dtype=np.float64)
    prompts = np.array([one.input_tokens / one.requests for one in seen])
    predicted = model.predict(inputs, outputs, np.array([one.concurrency for one in seen]))
    if not predicted.known.all():
        known = [one for one, is_known in zip(seen, predicted.known.tolist(), strict=True) if is_known]
        return _compared(model, known, at, idle=idle) if known else None
    alone = model.predict(prompts, outputs, 1.0)
    observation = Observation(
        at=at,
        input_tokens=_mean(inputs, requests),
        output_tokens=_mean(outputs, requests),
        concurrency=_mean(np.array([one.concurrency for one in seen]), requests),
        ttft_ms=sum(one.ttft_ms for one in seen) / float(requests.sum()),
        tpot_ms=sum(one.decode_ms for one in seen) / float(tokens.sum()),
        requests=float(requests.sum()),
    )
    return observation, Prediction(
        ttft_ms=np.array(_mean(alone.ttft_ms, requests) if idle else np.nan),
        tpot_ms=np.array(_mean(predicted.tpot_ms, tokens)),
        ttft_spread=np.array(_mean(alone.ttft_spread, requests)),
        tpot_spread=np.array(_mean(predicted.tpot_spread, tokens)),
        ttft_error=np.array(_mean(alone.ttft_error, requests)),
        tpot_error=np.array(_mean(predicted.tpot_error, tokens)),
        source=np.array(str(predicted.source[0])),
    )


def _mean(values: FloatArray, weights: FloatArray) -> float:
    return float((values * weights).sum() / weights.sum())
