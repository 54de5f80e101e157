"""Capacity of one variant in the form that the fleet program takes: a column over the size buckets.

    capacity_column(model, buckets, objective, most_rps)      T[bucket]: requests/s of one replica in a large pool
    derating(model, buckets, objective, column, share)        what a mix loses against linear shares of that column
    reserve_of(model, buckets, objective, share, ...)         a and h of `a y - h`: what small pools lose

The program adds up shares, sum_b x_b / T_b <= 1, as if each bucket had a replica's time to itself. In truth a mix
decodes in one batch, so `derating` compares the mix's own capacity with that sum; a factor below one is what T has to
be multiplied with for this mix. A bucket is represented by its upper corner, as everywhere.
"""

from __future__ import annotations

import numpy as np

from llmfleet.api import Buckets, Measurement
from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance.capacity import Reserve, large_pool_rps, pool_reserve
from llmfleet.placement.performance.mixture import MOST_CONCURRENCY, SizeMix, combined, replica_curves
from llmfleet.placement.performance.model import FloatArray, PerformanceModel


def most_measured_rps(measurement: Measurement, buckets: Buckets) -> FloatArray:
    """The most requests per second seen at each bucket's corner, shape (buckets,); infinite where nothing was."""
    most = np.full(buckets.count, np.inf)
    for bucket in range(buckets.count):
        corner = buckets.edges(bucket)
        seen = [p.requests_per_second for p in measurement.points if (p.input_tokens, p.output_tokens) == corner]
        most[bucket] = max(seen, default=np.inf)
    return most


def capacity_column(
    model: PerformanceModel,
    buckets: Buckets,
    objective: Objective,
    *,
    most_rps: FloatArray | None = None,
    most_concurrency: int = MOST_CONCURRENCY,
    standard_errors: float = 1.0,
) -> FloatArray:
    """Requests per second of one replica of a large pool, each bucket alone, shape (buckets,); 0 where never.

    `most_rps`: what was seen at each corner (`most_measured_rps`); no capacity is above it.
    """
    corners = _corners(buckets, np.ones(buckets.count))
    concurrency = np.arange(1.0, most_concurrency + 1)
    answers = model.predict(corners.input_tokens[:, None], corners.output_tokens[:, None], concurrency)
    found = np.zeros(buckets.count)
    for bucket in range(buckets.count):
        only = slice(bucket, bucket + 1)
        curves = combined(
            answers.rows(only),
            SizeMix(corners.input_tokens[only], corners.output_tokens[only], np.ones(1)),
            standard_errors=standard_errors,
            most_requests_per_second=np.inf if most_rps is None else float(most_rps[bucket]),
        )
        found[bucket] = large_pool_rps(curves, objective)
    return found


def derating(
    model: PerformanceModel,
    buckets: Buckets,
    objective: Objective,
    column: FloatArray,
    share: FloatArray,
    *,
    most_concurrency: int = MOST_CONCURRENCY,
    standard_errors: float = 1.0,
) -> float:
    """Factor in [0, 1] on a column for one mix. `share`: of the requests, by bucket, shape (buckets,), any scale.

    Raises ValueError where the mix has requests in a bucket that the column never serves.
    """
    never = np.flatnonzero((share > 0) & (column <= 0))
    if never.size:
        raise ValueError(f"share of bucket {never[0]} is {share[never[0]]:g}, but the column never serves it")
    used = share > 0
    linear = share.sum() / (share[used] / column[used]).sum()
    curves = replica_curves(
        model,
        _corners(buckets, share),
        most_concurrency=most_concurrency,
        standard_errors=standard_errors,
        most_requests_per_second=linear,
    )
    return float(large_pool_rps(curves, objective) / linear)


def reserve_of(
    model: PerformanceModel,
    buckets: Buckets,
    objective: Objective,
    share: FloatArray,
    *,
    expected_replicas: float,
    arrivals_cv2: float = 1.0,
    most_concurrency: int = MOST_CONCURRENCY,
    standard_errors: float = 1.0,
) -> Reserve:
    """What pools of this variant lose to bursts under a mix; see `capacity.py`."""
    curves = replica_curves(
        model, _corners(buckets, share), most_concurrency=most_concurrency, standard_errors=standard_errors
    )
    return pool_reserve(curves, objective, expected_replicas=expected_replicas, arrivals_cv2=arrivals_cv2)


def _corners(buckets: Buckets, share: FloatArray) -> SizeMix:
    corners = np.array([buckets.edges(bucket) for bucket in range(buckets.count)], dtype=np.float64)
    return SizeMix(corners[:, 0], corners[:, 1], share)
