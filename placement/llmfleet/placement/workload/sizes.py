"""Which size stands for a bucket of requests: what a plan reckons with for each of them.

    BucketSizes (sums of what was seen) --planned_sizes--> (input tokens, output tokens) by bucket

Where nothing is known it is the bucket's upper corner, which no request exceeds. That is safe and dear: with edges a
factor of two apart, and most requests in the lower part of their bucket, plans bought more than twice what was needed.
Where it is known how long the requests are, it is never above the corner, and

    prompts  mean + standard deviation             latency is kept at a percentile, and is worst beside long prompts
    answers  mean + standard error of that mean    what a replica completes depends on their mean, and TPOT is worst for
                                                   short ones: to plan longer answers would hide that

What a user writes down says how long answers are on the mean, but not how prompts scatter around what is written. So
answers are planned as written, and prompts as the corner (`stated_sizes`).

Against an engine model, both at mean + deviation promised 0.53 of the possible in the median and at most 0.93; this
0.62 and 0.94; plain means 0.68 and 1.14, and above 1 promises are broken; the corners 0.42 and 0.84.

Of few requests little is known. One more is added in thought, as long as the bucket allows: deviation and error of one
request and this one lead back to exactly the corner, and a thousand do not notice it.

Sizes are rounded up to an eighth of their bucket, which spares the model from being asked about sizes that it has all
but seen. And a plan should not move with every request: what the plan in force was made of stays (`settled`) until
requests are longer than it says, or shorter by more than a quarter of the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmfleet.api import Buckets, BucketSizes
from llmfleet.api.llmservice import RequestSize
from llmfleet.placement.workload.histogram import FloatArray, corners, lowest

_STATED_REQUESTS = 1e6
"""What is written down counts as having been seen this often: as certain."""
_STEPS = 8
_KEPT_STEPS = 2
_ROUNDING = 1e-6


def planned_sizes(buckets: Buckets, seen: Sequence[BucketSizes] | None) -> FloatArray:
    """(input tokens, output tokens) that stand for each bucket, shape (buckets, 2); between its lower edges and its
    corner. A bucket whose sums cannot be those of requests in it is planned as its corner."""
    most = corners(buckets)
    if seen is None:
        return most
    least = lowest(buckets)
    count = np.array([[one.requests] for one in seen])
    total = np.array([[one.input_tokens, one.output_tokens] for one in seen])
    squares = np.array([[one.input_tokens_squared, one.output_tokens_squared] for one in seen])
    mean = (total + most) / (count + 1)
    variance = (squares + most**2) / (count + 1) - mean**2
    possible = (
        (count > 0)
        & (total >= count * least * (1 - _ROUNDING))
        & (total <= count * most * (1 + _ROUNDING))
        & (squares * count >= total**2 * (1 - _ROUNDING))
        & (squares <= total * most * (1 + _ROUNDING))
    ).all(axis=1, keepdims=True)
    deviation = np.sqrt(np.maximum(variance, 0.0))
    planned = mean + deviation / np.concatenate([np.ones_like(count), np.sqrt(np.maximum(count, 1.0))], axis=1)
    width = most - least
    steps = np.ceil((planned - least) / np.maximum(width, 1.0) * _STEPS * (1 - 1e-9))
    return np.where(possible, np.clip(least + width * steps / _STEPS, least, most), most)


def stated_sizes(buckets: Buckets, sizes: Sequence[RequestSize]) -> list[BucketSizes]:
    """What written sizes say of the requests of each bucket; those above the last edges as if they ended there."""
    share = np.array([size.share for size in sizes])
    answers = np.minimum([float(size.output_tokens) for size in sizes], buckets.output_tokens[-1])
    into = np.array([buckets.index(size.input_tokens, size.output_tokens) for size in sizes], dtype=np.int64)
    total, of_answers, squares = (
        np.bincount(into, share * column, buckets.count) for column in (1.0, answers, answers**2)
    )
    found = [BucketSizes()] * buckets.count
    for bucket in np.flatnonzero(total).tolist():
        prompt, requests = float(buckets.edges(bucket)[0]), _STATED_REQUESTS
        found[bucket] = BucketSizes(
            requests=requests,
            input_tokens=requests * prompt,
            input_tokens_squared=requests * prompt**2,
            output_tokens=requests * float(of_answers[bucket] / total[bucket]),
            output_tokens_squared=requests * float(squares[bucket] / total[bucket]),
        )
    return found


def settled(
    buckets: Buckets, seen: Sequence[BucketSizes] | None, in_force: Sequence[BucketSizes] | None
) -> list[BucketSizes] | None:
    """What to plan with: by bucket, what is seen, or what the plan in force was made of where it still holds. Settled
    sums stay when they are settled again."""
    if seen is None or in_force is None or len(seen) != len(in_force):
        return None if seen is None else list(seen)
    now, before = planned_sizes(buckets, seen), planned_sizes(buckets, in_force)
    least = before - (_KEPT_STEPS + _ROUNDING) * (corners(buckets) - lowest(buckets)) / _STEPS
    keeps = np.all((now <= before) & (now >= least), axis=1)
    return [old if keep else new for old, new, keep in zip(in_force, seen, keeps, strict=True)]


def mean_tokens(buckets: Buckets, seen: Sequence[BucketSizes] | None, otherwise: FloatArray) -> FloatArray:
    """Mean tokens of a request, input and output together, by bucket; `otherwise` where nothing is known."""
    if seen is None:
        return otherwise
    known = [
        (one.input_tokens + one.output_tokens) / one.requests if one.requests > 0 else default
        for one, default in zip(seen, otherwise.tolist(), strict=True)
    ]
    return np.asarray(np.minimum(known, corners(buckets).sum(axis=1)))
