"""Which size stands for a bucket of requests: what a plan reckons with for each of them.

    BucketSizes (sums of what was seen) --planned_sizes--> (input tokens, output tokens) by bucket

Where nothing is known it is the bucket's upper corner, which no request exceeds. That is safe and dear: with edges a
factor of two apart, and most requests in the lower part of their bucket, plans bought more than twice what was needed.
Where it is known how long the requests are, it is their mean and one standard deviation, in both directions, and never
above the corner. The mean alone would be too little, and not because a bucket's load were more than its mean: latency
is kept at a percentile, and is worst for those who are longer or, for TPOT, shorter than the mean.

Of few requests little is known. One more is added in thought, as long as the bucket allows: the deviation of one
request and this one is exactly what leads back to the corner, and a thousand do not notice it.

Sizes are rounded up to an eighth of their bucket. It costs a sixteenth of the bucket, and spares a plan from moving
with every request, and the model from being asked about sizes that it has all but seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmfleet.api import Buckets, BucketSizes
from llmfleet.placement.workload.histogram import FloatArray, lower_edges

_STEPS = 8
_ROUNDING = 1e-6


def planned_sizes(buckets: Buckets, seen: Sequence[BucketSizes] | None) -> FloatArray:
    """(input tokens, output tokens) that stand for each bucket, shape (buckets, 2); between its lower edges and its
    corner. A bucket whose sums cannot be those of requests in it is planned as its corner."""
    corners = np.array([buckets.edges(bucket) for bucket in range(buckets.count)], dtype=np.float64)
    if seen is None:
        return corners
    lowest = np.array([lower_edges(buckets, bucket) for bucket in range(buckets.count)], dtype=np.float64)
    count = np.array([[one.requests] for one in seen])
    total = np.array([[one.input_tokens, one.output_tokens] for one in seen])
    squares = np.array([[one.input_tokens_squared, one.output_tokens_squared] for one in seen])
    mean = (total + corners) / (count + 1)
    variance = (squares + corners**2) / (count + 1) - mean**2
    possible = (
        (count > 0)
        & (total >= count * lowest * (1 - _ROUNDING))
        & (total <= count * corners * (1 + _ROUNDING))
        & (squares * count >= total**2 * (1 - _ROUNDING))
        & (squares <= total * corners * (1 + _ROUNDING))
    ).all(axis=1, keepdims=True)
    planned = mean + np.sqrt(np.maximum(variance, 0.0))
    width = corners - lowest
    steps = np.ceil((planned - lowest) / np.maximum(width, 1.0) * _STEPS * (1 - 1e-9))
    return np.where(possible, np.clip(lowest + width * steps / _STEPS, lowest, corners), corners)


def mean_tokens(buckets: Buckets, seen: Sequence[BucketSizes] | None, otherwise: FloatArray) -> FloatArray:
    """Mean tokens of a request, input and output together, by bucket; `otherwise` where nothing is known."""
    if seen is None:
        return otherwise
    known = [
        (one.input_tokens + one.output_tokens) / one.requests if one.requests > 0 else default
        for one, default in zip(seen, otherwise.tolist(), strict=True)
    ]
    most = [float(sum(buckets.edges(bucket))) for bucket in range(buckets.count)]
    return np.asarray(np.minimum(known, most))
