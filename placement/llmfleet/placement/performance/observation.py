"""What was seen of a variant in service, set against what was predicted for it: what `correction.observe` takes in.

    Seen, by size bucket and load --against(model)--> (Observation, Prediction), one for each octave of load

Profiles are closed loops of one size; service is an open mix. Set a mix's mean or median against a prediction for its
mean size, and the difference says more about the mix than about the engine: in simulation, an engine that was exactly
the profiled one seemed a quarter faster under code completions, and its prompts twice as slow. So like is set against
like, bucket by bucket, and only sums over many requests are compared:

* the time per token of each bucket against the prediction for its mean size, at the load that its requests had around
  them *on average, from arrival to end*: who finds an engine idle does not stay alone, and who finds it full does not
  stay in a crowd. A closed loop of one size has others of that size around each request, so short answers to long
  prompts seem fast in a mix and long answers slow; the mean of the logarithms of these ratios, each weighed by its
  tokens, is 0.84 to 1.15 of the truth in each octave of load, in simulation (the ratio of sums 0.75 to 1.03; by the
  load found on arrival 0.55 to 2.2);
* the mean time to first token of those who were all but alone, against the prediction for one request of their mean
  size. Under load it would say how arrivals queue (up to 3 times the truth).

Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmfleet.placement.performance.correction import Observation
from llmfleet.placement.performance.model import FloatArray, PerformanceModel, Prediction

_ALONE = 1.2


@dataclass(frozen=True)
class Seen:
    """Requests of one size bucket with about the same load around them. Raises ValueError for none."""

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

    Left out are sizes that the model does not know at their load, and answers that took no time or no token after their
    first.
    """
    octaves: dict[int, list[Seen]] = {}
    for one in seen:
        if one.decoded_tokens > 0 and one.decode_ms > 0 and one.ttft_ms > 0:
            octaves.setdefault(round(math.log2(one.concurrency)), []).append(one)
    pairs = [_compared(model, some, at) for _, some in sorted(octaves.items())]
    return [pair for pair in pairs if pair is not None]


def _compared(model: PerformanceModel, seen: Sequence[Seen], at: float) -> tuple[Observation, Prediction] | None:
    requests = np.array([one.requests for one in seen], dtype=np.float64)
    tokens = np.array([one.decoded_tokens for one in seen], dtype=np.float64)
    inputs = np.maximum(1.0, [one.input_tokens / one.requests for one in seen])
    outputs = 1.0 + tokens / requests
    predicted = model.predict(inputs, outputs, np.array([one.concurrency for one in seen]))
    possible = predicted.known & np.isfinite(predicted.tpot_ms)
    if not possible.all():
        known = [one for one, is_known in zip(seen, possible.tolist(), strict=True) if is_known]
        return _compared(model, known, at) if known else None
    alone = model.predict(inputs, outputs, 1.0)
    tpot_ms = sum(one.decode_ms for one in seen) / float(tokens.sum())
    off = np.log([one.decode_ms for one in seen]) - np.log(tokens * predicted.tpot_ms)
    concurrency = _mean(np.array([one.concurrency for one in seen]), requests)
    observation = Observation(
        at=at,
        input_tokens=_mean(inputs, requests),
        output_tokens=_mean(outputs, requests),
        concurrency=concurrency,
        ttft_ms=sum(one.ttft_ms for one in seen) / float(requests.sum()),
        tpot_ms=tpot_ms,
        requests=float(requests.sum()),
    )
    return observation, Prediction(
        ttft_ms=np.array(_mean(alone.ttft_ms, requests) if concurrency <= _ALONE else np.nan),
        tpot_ms=np.array(tpot_ms * math.exp(-_mean(off, tokens))),
        ttft_spread=np.array(_mean(alone.ttft_spread, requests)),
        tpot_spread=np.array(_mean(predicted.tpot_spread, tokens)),
        ttft_error=np.array(_mean(alone.ttft_error, requests)),
        tpot_error=np.array(_mean(predicted.tpot_error, tokens)),
        source=np.array(str(predicted.source[0])),
    )


def _mean(values: FloatArray, weights: FloatArray) -> float:
    return float((values * weights).sum() / weights.sum())
