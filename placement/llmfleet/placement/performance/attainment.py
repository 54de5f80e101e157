"""From medians and scatter to shares of requests, and back.

    kept(weight, target, median, spread)          the share of requests within a target, by load
    percentile_ms(percentile, weight, mass, ...)  the latency that a share of all requests stays below
    representatives(mass)                         the few states that stand for all in it

Single requests scatter around a median as a logarithmic normal. A pool's requests are a mixture: of sizes (weight) and
of how full the pool is when they come (mass). Its share within a target is a sum; its percentile is found by halving
the range of the logarithm twice, forty-eight parts at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmfleet.placement.performance.model import FloatArray

_LEVELS = np.array([*np.linspace(0, 0.9, 13), 0.92, 0.94, 0.955, 0.97, 0.98, 0.987, 0.992, 0.996, 0.998, 0.9995, 1.0])

_ROUNDING = 1e-5
"""Of a share of requests."""


def kept(weight: FloatArray, target_ms: float, median_ms: FloatArray, spread: FloatArray) -> FloatArray:
    """Share of requests within a target: weight of shape (sizes,), the others broadcast to (sizes, loads); (loads,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = np.log(target_ms / median_ms) / spread
    sharp = np.where(median_ms <= target_ms, 1.0, 0.0)
    share = np.where(spread > 0, _normal(deviations), sharp)
    return np.asarray(np.minimum((weight[:, None] * share).sum(axis=0), 1.0))


def _normal(deviations: FloatArray) -> FloatArray:
    """The normal distribution function, within 1e-7 (Abramowitz and Stegun 26.2.17)."""
    size = np.abs(deviations)
    t = 1 / (1 + 0.2316419 * size)
    series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-(size**2) / 2) / math.sqrt(2 * math.pi) * series
    return np.where(deviations >= 0, 1 - upper, upper)


@dataclass(frozen=True)
class Representatives:
    """A few states that stand for all, more of them in the upper tail."""

    index: NDArray[np.intp]
    weight: FloatArray
    """Sums to one."""


def representatives(mass: FloatArray) -> Representatives:
    """Of states with these (unnormalised) chances, in an order in which latency grows."""
    total = np.cumsum(mass)
    total = total / total[-1]
    index = np.minimum(np.searchsorted(total, (_LEVELS[1:] + _LEVELS[:-1]) / 2), len(mass) - 1)
    return Representatives(index, np.diff(_LEVELS))


def percentile_ms(
    percentile: float,
    weight: FloatArray,
    mass: FloatArray,
    missing: float,
    median_ms: FloatArray,
    spread: FloatArray,
) -> float:
    """Latency that this share of requests stays below: mixture over sizes (weight) and states (mass), in ms.

    `median_ms` and `spread` have the shape (sizes, states); `missing` is the mass of those who never are below.
    """
    if 1 - missing < percentile / 100 - _ROUNDING:
        return math.inf
    shares = (weight[:, None] * mass[None, :]).ravel()
    centre, width = np.log(median_ms).ravel(), np.maximum(spread.ravel(), 1e-9)
    low, high = float((centre - 5 * width).min()), float((centre + 5 * width).max())
    for _ in range(2):
        targets = np.linspace(low, high, 48)
        below = (shares * _normal((targets[:, None] - centre) / width)).sum(axis=1)
        first = int(np.argmax(below >= percentile / 100)) if below[-1] >= percentile / 100 else len(targets) - 1
        low, high = float(targets[max(0, first - 1)]), float(targets[first])
    return math.exp(high)
