"""A window of finished requests as a point of a ModelProfile. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmfleet.api import MeasuredPoint, Percentiles
from llmfleet.cli.profiling.load import Window


def percentiles(values: Sequence[float]) -> Percentiles:
    """By nearest rank, rounded up: each is a value that was seen, and never below the true quantile of the sample.

    Values in milliseconds, at least one; results to a hundredth.
    """
    ordered = sorted(values)

    def at(percent: float) -> float:
        return round(ordered[math.ceil(percent / 100 * len(ordered)) - 1], 2)

    return Percentiles(p50=at(50), p90=at(90), p95=at(95), p99=at(99), max=at(100))


def measured_point(corner: tuple[int, int], concurrency: int, window: Window) -> MeasuredPoint:
    """The point of a window at a bucket's corner (input tokens, output tokens)."""
    input_tokens, output_tokens = corner
    return MeasuredPoint(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        requests=len(window.completed),
        requests_per_second=float(f"{window.requests_per_second:.4g}"),
        ttft_ms=percentiles([request.ttft_ms for request in window.completed]),
        tpot_ms=percentiles([request.tpot_ms for request in window.completed]),
    )
