"""How fast one replica of a variant is, as far as planning needs to know it, out of its measured points.

In flows one `Measurement` of a ModelProfile (closed-loop runs at the upper corners of the size buckets) and an
objective. Out flow three things:

* the **throughput column** T[bucket]: the most requests per second that a replica completes at the bucket's corner
  while TTFT *and* TPOT stay within the objective, both at their percentile. It is the largest rate among the measured
  points that meet both at once: never interpolated and never better than something that was seen to run. Zero means
  that no measured point meets the objective: the bucket must not be routed there (Mélange divides by zero here).
* a **straight-line fit** of the latency, by which a gateway chooses among replicas. Medians of pairwise slopes
  (Theil 1950, Sen 1968), because a single bad run must not tilt the line; clipped at zero, because a negative slope
  would send every request to the fullest replica.
* **plausibility warnings**: a decode step cannot be faster than reading the weights once, a prefill not faster than
  two operations per parameter and token. A profile that claims more was mixed up or measured on cached prompts.

The policy's utilisation target is not applied here: this is what a replica can do, not what is asked of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import numpy as np

from llmfleet.api import Buckets, LatencyCoefficients, MeasuredPoint, Measurement
from llmfleet.api.gputype import Hardware
from llmfleet.api.llmservice import Objective
from llmfleet.api.modelprofile import ModelProfileSpec
from llmfleet.placement.performance.model import BoolArray, FloatArray


@dataclass(frozen=True)
class ThroughputColumn:
    """What one variant does in each bucket."""

    rps: FloatArray
    """Requests per second of one replica within the objective, shape (buckets,); 0 where it is not met."""
    measured: BoolArray
    """Whether there is a point at the bucket's corner at all, shape (buckets,)."""


@dataclass(frozen=True)
class Miss:
    """The measured point that comes closest to an objective it does not meet."""

    ttft_ms: float
    """TTFT at the objective's percentile."""
    tpot_ms: float
    """TPOT at the objective's percentile."""
    concurrency: int
    """Requests in flight during the run."""


def points_at(measurement: Measurement, corner: tuple[int, int]) -> list[MeasuredPoint]:
    """The points measured at one corner (input tokens, output tokens)."""
    return [point for point in measurement.points if (point.input_tokens, point.output_tokens) == corner]


def throughput_column(measurement: Measurement, buckets: Buckets, objective: Objective) -> ThroughputColumn:
    """T[bucket] of one replica; see the module's docstring."""
    rps = np.zeros(buckets.count)
    measured = np.zeros(buckets.count, dtype=np.bool_)
    bucket_of = {buckets.edges(bucket): bucket for bucket in range(buckets.count)}
    for point in measurement.points:
        bucket = bucket_of.get((point.input_tokens, point.output_tokens))
        if bucket is None:
            continue
        measured[bucket] = True
        if meets(point, objective):
            rps[bucket] = max(rps[bucket], point.requests_per_second)
    return ThroughputColumn(rps, measured)


def meets(point: MeasuredPoint, objective: Objective) -> bool:
    """Whether a run kept both targets at once."""
    return (
        point.ttft_ms.at_least(objective.ttft.percentile) <= objective.ttft.milliseconds
        and point.tpot_ms.at_least(objective.tpot.percentile) <= objective.tpot.milliseconds
    )


def closest_miss(points: list[MeasuredPoint], objective: Objective) -> Miss | None:
    """The run whose worse target is missed by the smallest factor; None without points."""
    misses = [
        Miss(
            ttft_ms=point.ttft_ms.at_least(objective.ttft.percentile),
            tpot_ms=point.tpot_ms.at_least(objective.tpot.percentile),
            concurrency=point.concurrency,
        )
        for point in points
    ]
    return min(misses, key=lambda miss: (missed_by(miss, objective), miss.concurrency), default=None)


def missed_by(miss: Miss, objective: Objective) -> float:
    """Factor by which the worse of the two targets is missed."""
    return max(miss.ttft_ms / objective.ttft.milliseconds, miss.tpot_ms / objective.tpot.milliseconds)


def fit_latency(measurement: Measurement) -> LatencyCoefficients:
    """Straight lines through the medians: TTFT over prompt length at the lowest concurrency, TPOT over concurrency.

    Where all points share one abscissa the slope cannot be known: it is 0 and the base is the median.
    """
    return straight_lines(
        [(one.input_tokens, one.concurrency, one.ttft_ms.p50, one.tpot_ms.p50) for one in measurement.points]
    )


def straight_lines(points: Iterable[tuple[int, int, float, float]]) -> LatencyCoefficients:
    """The same through points of (input tokens, concurrency, TTFT in ms, TPOT in ms)."""
    given = list(points)
    least = min(concurrency for _, concurrency, _, _ in given)
    ttft_base_ms, ttft_slope = _robust_line([(tokens, ttft) for tokens, n, ttft, _ in given if n == least])
    tpot_base_ms, tpot_slope = _robust_line([(n - 1, tpot) for _, n, _, tpot in given])
    return LatencyCoefficients(
        ttft_base_ms=ttft_base_ms,
        ttft_ms_per_input_token=ttft_slope,
        tpot_base_ms=tpot_base_ms,
        tpot_ms_per_running=tpot_slope,
    )


def _robust_line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """(intercept, slope) by Theil and Sen, both at least zero."""
    by_x: dict[int, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    medians = [(x, median(ys)) for x, ys in sorted(by_x.items())]
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in itertools.combinations(medians, 2)]
    slope = max(0.0, median(slopes)) if slopes else 0.0
    intercept = max(0.0, median(y - slope * x for x, y in medians))
    return intercept, slope


def implausibilities(profile: ModelProfileSpec, measurement: Measurement, hardware: Hardware) -> list[str]:
    """What the measurement claims that the hardware cannot do, in words; empty if nothing.

    A decode step reads the weights once: at most two bytes per *active* parameter where that number is known (a
    mixture of experts reads only some of its weights), else all of them. Prefill costs two operations per parameter
    and prompt token. Both divide by the replica's devices.
    """
    weight_bytes = profile.weights_gib * 2**30
    if profile.parameters_billion is not None:
        weight_bytes = min(weight_bytes, 2e9 * profile.parameters_billion)
    devices = measurement.tensor_parallel
    found = []
    least_tpot_ms = 1e3 * weight_bytes / (hardware.memory_bandwidth_gb_per_second * 1e9 * devices)
    fastest = min(measurement.points, key=lambda point: point.tpot_ms.p50)
    if 0 < fastest.tpot_ms.p50 < least_tpot_ms:
        found.append(
            f"tpotMs.p50 of {fastest.tpot_ms.p50:g} ms at {_corner(fastest)} is below the {least_tpot_ms:.3g} ms that "
            "reading the weights once takes"
        )
    if profile.parameters_billion is not None:
        ms_per_token = 1e3 * 2e9 * profile.parameters_billion / (hardware.dense_tflops * 1e12 * devices)
        fastest = min(measurement.points, key=lambda point: point.ttft_ms.p50 / point.input_tokens)
        if fastest.ttft_ms.p50 < ms_per_token * fastest.input_tokens:
            found.append(
                f"ttftMs.p50 of {fastest.ttft_ms.p50:g} ms at {_corner(fastest)} is below the "
                f"{ms_per_token * fastest.input_tokens:.3g} ms that the prefill's operations take"
            )
    return found


def _corner(point: MeasuredPoint) -> str:
    return f"input {point.input_tokens} output {point.output_tokens} concurrency {point.concurrency}"
