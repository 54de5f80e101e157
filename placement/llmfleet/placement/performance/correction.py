"""Online correction: what engines in service are seen to do, as a bounded factor on what was predicted.

    observe(correction, observation, predicted) -> Correction     one more pair of load and latency
    Corrected(model, correction, now)                             the model with its correction

The state is an `api.Correction`, one per variant, kept in `ModelProfile.status`, so that a restart forgets nothing. Per
metric it holds bins an octave of load wide; a bin holds the logarithm of observed over predicted latency.

* **Robust**: after the first, one observation moves a bin by at most `_STEP`, so a single bad minute does not tilt a
  plan, and a lasting change is followed within a few.
* **Bounded**: the factor stays within 1/4 and 4. What is further off is not an error of a model but another engine.
* **Forgetting**: a bin's weight halves every `HALF_LIFE_SECONDS`, and a factor counts by its weight: what is old fades
  towards the uncorrected model.
* **Of one measurement**: what was learnt before a variant was measured last is gone with the measurement before.
* **No extrapolation**: between observed loads the factor is interpolated (over the logarithm of load). Further than one
  octave outside them, or for sizes more than twice outside those seen, only a factor that makes the variant *slower*
  counts: nobody is promised a speed that was not seen. The same holds for what was measured: an observation of service
  is rougher than a profile (`observation.py`), and may warn that an engine is slower than that, not praise it.

Pure: the time of an observation is part of it, and the present is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.api import Correction, CorrectionBin, Measurement, SeenRange
from llmfleet.placement.performance.model import BoolArray, FloatArray, PerformanceModel, Prediction, loads

HALF_LIFE_SECONDS = 86_400.0
"""After a day an observation counts half."""
BOUND = 4.0
"""A factor is never larger than this nor smaller than its inverse."""

_STEP = 0.25  # of a logarithm: an established bin follows a change of 28 % per observation at most
_OUTLIER = math.log(2 * BOUND)  # observations are clipped here before anything else
_HALF_TRUSTED_REQUESTS = 8.0  # a bin with this many requests counts half
_MOST_REQUESTS = 1000.0  # a bin never grows heavier than this: the newest tenth always counts
_SIZES_BEYOND = 2.0


@dataclass(frozen=True)
class Observation:
    """What one engine did over a short while at a steady load."""

    at: float
    """Time, in seconds since 1970."""
    input_tokens: float
    """Mean prompt length."""
    output_tokens: float
    """Mean answer length."""
    concurrency: float
    """Mean number of requests in flight in the engine."""
    ttft_ms: float
    """Median TTFT."""
    tpot_ms: float
    """Median TPOT."""
    requests: float
    """Requests that ended: how much this observation weighs."""

    def __post_init__(self) -> None:
        least = {"input_tokens": 1, "output_tokens": 1, "concurrency": 1, "ttft_ms": 0, "tpot_ms": 0, "requests": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            exclusive = bound == 0
            if not math.isfinite(value) or value < bound or (exclusive and value == 0):
                accepted = "a finite number above 0" if exclusive else "a finite number of at least 1"
                raise ValueError(f"Observation.{name} is {value!r}; accepted is {accepted}")
        if not math.isfinite(self.at):
            raise ValueError(f"Observation.at is {self.at!r}; accepted is a finite time")


def observe(correction: Correction, observation: Observation, predicted: Prediction) -> Correction:
    """The correction after one more observation. `predicted`: the *uncorrected* model at the observation's load.

    A metric whose prediction is unknown or infinite there is left as it was.
    """
    ttft = _log_ratio(observation.ttft_ms, predicted.ttft_ms)
    tpot = _log_ratio(observation.tpot_ms, predicted.tpot_ms)
    if ttft is None and tpot is None:
        return correction
    return correction.model_copy(
        update={
            "input_tokens": _widened(correction.input_tokens, observation.input_tokens),
            "output_tokens": _widened(correction.output_tokens, observation.output_tokens),
            "ttft": _learned(correction.ttft, observation, ttft),
            "tpot": _learned(correction.tpot, observation, tpot),
        }
    )


@dataclass(frozen=True)
class Corrected:
    """A model, corrected by what was observed of the variant."""

    model: PerformanceModel
    """What predicts."""
    correction: Correction
    """What was learned."""
    now: float
    """The present, in seconds since 1970: what is old counts less."""

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`. The errors shrink where observations stand behind the answer."""
        inputs, outputs, concurrencies = loads(input_tokens, output_tokens, concurrency)
        raw = self.model.predict(inputs, outputs, concurrencies)
        seen = _inside(self.correction.input_tokens, inputs) & _inside(self.correction.output_tokens, outputs)
        measured = np.asarray(raw.source == "measured")
        ttft, ttft_error = self._factor(self.correction.ttft, concurrencies, seen, measured, raw.ttft_error)
        tpot, tpot_error = self._factor(self.correction.tpot, concurrencies, seen, measured, raw.tpot_error)
        return Prediction(
            ttft_ms=raw.ttft_ms * ttft,
            tpot_ms=raw.tpot_ms * tpot,
            ttft_spread=raw.ttft_spread,
            tpot_spread=raw.tpot_spread,
            ttft_error=ttft_error,
            tpot_error=tpot_error,
            source=raw.source,
        )

    def _factor(
        self,
        bins: list[CorrectionBin],
        concurrency: FloatArray,
        seen: BoolArray,
        measured: BoolArray,
        error: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        if not bins:
            return np.ones_like(concurrency), error
        at = np.log2([one.concurrency for one in bins])
        trusts = np.array([_trust(one, self.now) for one in bins])
        where = np.log2(concurrency)
        logs = np.interp(where, at, trusts * np.array([one.log_ratio for one in bins]))
        trust = np.interp(where, at, trusts)
        deviation = np.interp(where, at, [one.deviation for one in bins])
        near = seen & (where >= at[0] - 1) & (where <= at[-1] + 1)
        logs = np.where(near & ~measured, logs, np.maximum(logs, 0.0))
        factor = np.exp(np.clip(logs, -math.log(BOUND), math.log(BOUND)))
        learned = np.hypot((1 - trust) * error, trust * deviation)
        return factor, np.where(near, learned, error)


def since(correction: Correction, measurement: Measurement | None) -> Correction:
    """What was learnt since the variant was measured: before that it was another measurement that was off."""
    try:
        measured_at = datetime.fromisoformat("" if measurement is None else measurement.measured_at).timestamp()
    except ValueError:
        return correction
    newer = {
        metric: [one for one in bins if one.at >= measured_at]
        for metric, bins in (("ttft", correction.ttft), ("tpot", correction.tpot))
    }
    return correction.model_copy(update=newer)


def largest_factor(bins: Sequence[CorrectionBin], now: float, *, measured: bool) -> float:
    """The largest factor on a latency at any load that was seen, as it counts now. `measured`: of a measured variant,
    for which none is less than 1."""
    largest = max(effects(bins, now).values(), default=0.0)
    bounded = max(-math.log(BOUND), min(math.log(BOUND), largest))
    return math.exp(max(0.0, bounded) if measured else bounded)


def effects(bins: Sequence[CorrectionBin], now: float) -> dict[int, float]:
    """By octave of load, the logarithm of the factor that a bin amounts to, weighed by how far it is trusted."""
    return {round(math.log2(one.concurrency)): _trust(one, now) * one.log_ratio for one in bins}


def _log_ratio(observed: float, predicted: FloatArray) -> float | None:
    value = float(predicted)
    if not (math.isfinite(value) and value > 0):
        return None
    return max(-_OUTLIER, min(_OUTLIER, math.log(observed / value)))


def _learned(bins: list[CorrectionBin], observation: Observation, ratio: float | None) -> list[CorrectionBin]:
    if ratio is None:
        return bins
    octave = round(math.log2(observation.concurrency))
    here = [one for one in bins if round(math.log2(one.concurrency)) == octave]
    others = [one for one in bins if round(math.log2(one.concurrency)) != octave]
    learned = _updated(here[0], observation, ratio) if here else _first(observation, ratio)
    return sorted([*others, learned], key=lambda one: one.concurrency)


def _first(observation: Observation, ratio: float) -> CorrectionBin:
    weight = min(observation.requests, _MOST_REQUESTS)
    return CorrectionBin(
        concurrency=observation.concurrency, log_ratio=ratio, deviation=0.0, weight=weight, at=observation.at
    )


def _updated(old: CorrectionBin, observation: Observation, ratio: float) -> CorrectionBin:
    kept = _faded(old, observation.at)
    weight = min(observation.requests, _MOST_REQUESTS)
    gain = weight / (kept + weight)
    off = ratio - old.log_ratio
    moved = max(-_STEP, min(_STEP, gain * off))
    load = math.log2(old.concurrency) + gain * (math.log2(observation.concurrency) - math.log2(old.concurrency))
    return CorrectionBin(
        concurrency=max(1.0, 2**load),
        log_ratio=old.log_ratio + moved,
        deviation=old.deviation + gain * (abs(off) - old.deviation),
        weight=min(kept + weight, _MOST_REQUESTS),
        at=max(old.at, observation.at),
    )


def _faded(one: CorrectionBin, now: float) -> float:
    return one.weight * math.exp2(-max(0.0, now - one.at) / HALF_LIFE_SECONDS)


def _trust(one: CorrectionBin, now: float) -> float:
    weight = _faded(one, now)
    return weight / (weight + _HALF_TRUSTED_REQUESTS)


def _widened(seen: SeenRange | None, value: float) -> SeenRange:
    if seen is None:
        return SeenRange(least=value, most=value)
    return SeenRange(least=min(seen.least, value), most=max(seen.most, value))


def _inside(seen: SeenRange | None, values: FloatArray) -> BoolArray:
    if seen is None:
        return np.zeros(values.shape, dtype=np.bool_)
    return (values >= seen.least / _SIZES_BEYOND) & (values <= seen.most * _SIZES_BEYOND)
