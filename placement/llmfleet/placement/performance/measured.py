"""Latency out of a ModelProfile's measured points, inside their shapes only.

Points lie at corners (input tokens, output tokens), each at a few concurrencies. Between them the answer is
interpolated linearly, over concurrency first, then over the four corners around a size. That is on the safe side as
long as latency curves upwards, which it does in all three: a step's time is flat and then rises with the batch,
attention grows faster than the prompt, and a prefill's share of each token falls as 1 / answer. Where one of the four
corners is missing, the upper one stands for its whole bucket, as in the demand histogram.

Never better than what was seen to run:

* at every corner, medians are made non-decreasing in concurrency by a running maximum: a run at higher load that
  happened to be faster does not count;
* below the lowest concurrency or the smallest prompt the answer is that of the lowest or smallest;
* below the smallest answer, what TPOT has more than at the lowest concurrency grows as 1 / answer: it is mostly the
  prefills of the others, and as many fall on fewer tokens;
* above the highest concurrency or the largest corner there is no answer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from llmfleet.api import MeasuredPoint, Measurement, Percentiles
from llmfleet.placement.performance.model import FloatArray, Prediction, loads, unknown

_NORMAL_QUANTILES = {"p90": 1.2816, "p95": 1.6449, "p99": 2.3263}
_MEDIAN_EFFICIENCY = 1.2533  # standard error of a median over that of a mean: sqrt(pi / 2)
_LEAST_ERROR = 0.02  # what no number of requests makes smaller: clocks, temperature, neighbours
_FIELDS = ("ttft_ms", "tpot_ms", "ttft_spread", "tpot_spread", "ttft_error", "tpot_error")


@dataclass(frozen=True)
class _Curve:
    """One corner: columns of `_FIELDS` over ascending concurrency."""

    concurrency: FloatArray
    values: FloatArray

    def at(self, concurrency: FloatArray) -> FloatArray:
        """shape (fields, loads); NaN above the highest concurrency."""
        found = np.stack([np.interp(concurrency, self.concurrency, column) for column in self.values])
        found[:, concurrency > self.concurrency[-1]] = np.nan
        return found


class MeasuredTable:
    """A PerformanceModel of one variant's points."""

    def __init__(self, measurement: Measurement) -> None:
        corners: dict[tuple[int, int], list[MeasuredPoint]] = {}
        for point in measurement.points:
            corners.setdefault((point.input_tokens, point.output_tokens), []).append(point)
        self._curves = {corner: _curve(points) for corner, points in corners.items()}
        self._inputs = sorted({corner[0] for corner in corners})
        self._outputs = sorted({corner[1] for corner in corners})

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        """See `PerformanceModel.predict`; NaN outside the measured shapes."""
        inputs, outputs, concurrencies = loads(input_tokens, output_tokens, concurrency)
        answer = unknown(inputs.shape)
        # As complex numbers, pairs sort and compare in one go.
        sizes, which = np.unique(inputs.ravel() + 1j * outputs.ravel(), return_inverse=True)
        order = np.argsort(which, kind="stable")
        found = np.full((len(_FIELDS), inputs.size), np.nan)
        for size, here in zip(sizes, np.split(order, np.flatnonzero(np.diff(which[order])) + 1), strict=False):
            found[:, here] = self._at(float(size.real), float(size.imag), concurrencies.ravel()[here])
        known = ~np.isnan(found[0])
        fields = dict(zip(_FIELDS, found.reshape(len(_FIELDS), *inputs.shape), strict=True))
        source = np.where(known.reshape(inputs.shape), "measured", answer.source)
        return Prediction(**fields, source=source)

    def _at(self, input_tokens: float, output_tokens: float, concurrency: FloatArray) -> FloatArray:
        """Of one size, shape (fields, loads)."""
        across = _between(self._inputs, input_tokens)
        along = _between(self._outputs, output_tokens)
        if across is None or along is None:
            return np.full((len(_FIELDS), len(concurrency)), np.nan)
        blend = np.zeros((len(_FIELDS), len(concurrency)))
        for i, share_i in across:
            for o, share_o in along:
                if share_i * share_o > 0:
                    blend += share_i * share_o * self._corner(i, o, concurrency)
        upper = self._corner(across[-1][0], along[-1][0], concurrency)
        found = np.where(np.isnan(blend), upper, blend)
        if output_tokens < self._outputs[0]:
            tpot = _FIELDS.index("tpot_ms")
            alone = self._at(input_tokens, self._outputs[0], np.ones(1))[tpot]
            found[tpot] = alone + (found[tpot] - alone) * self._outputs[0] / output_tokens
        return found

    def _corner(self, input_tokens: int, output_tokens: int, concurrency: FloatArray) -> FloatArray:
        curve = self._curves.get((input_tokens, output_tokens))
        return np.full((len(_FIELDS), len(concurrency)), np.nan) if curve is None else curve.at(concurrency)


def _between(edges: list[int], value: float) -> list[tuple[int, float]] | None:
    """The edges around a value with their shares, the upper one last; None above the last."""
    upper = bisect_left(edges, value)
    if upper == len(edges):
        return None
    if upper == 0 or edges[upper] == value:
        return [(edges[upper], 1.0)]
    share = (value - edges[upper - 1]) / (edges[upper] - edges[upper - 1])
    return [(edges[upper - 1], 1 - share), (edges[upper], share)]


def _curve(points: list[MeasuredPoint]) -> _Curve:
    ordered = sorted(points, key=lambda point: point.concurrency)
    ttft_spread = np.array([_spread(point.ttft_ms) for point in ordered])
    tpot_spread = np.array([_spread(point.tpot_ms) for point in ordered])
    root = _MEDIAN_EFFICIENCY / np.sqrt([point.requests for point in ordered])
    return _Curve(
        concurrency=np.array([float(point.concurrency) for point in ordered]),
        values=np.stack(
            [
                np.maximum.accumulate([point.ttft_ms.p50 for point in ordered]),
                np.maximum.accumulate([point.tpot_ms.p50 for point in ordered]),
                ttft_spread,
                tpot_spread,
                np.hypot(_LEAST_ERROR, ttft_spread * root),
                np.hypot(_LEAST_ERROR, tpot_spread * root),
            ]
        ),
    )


def _spread(latency: Percentiles) -> float:
    """The widest logarithmic normal that any measured percentile asks for; 0 where all are equal."""
    if latency.p50 <= 0:
        return 0.0
    tails = ((max(getattr(latency, name), latency.p50), z) for name, z in _NORMAL_QUANTILES.items())
    return max(math.log(value / latency.p50) / z for value, z in tails)
