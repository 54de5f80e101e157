"""Demand: requests per second by size bucket, from what gateways saw or from what the user expects.

An observed histogram counts once it is there, unless the service insists on its own figures (`mode: expected`).
Without either the demand is zero, and the service keeps its fewest replicas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmfleet.api import Buckets, LLMService
from llmfleet.placement.inputs import Demand
from llmfleet.placement.performance import FloatArray


@dataclass(frozen=True)
class BucketDemand:
    """What has to be served."""

    rps: FloatArray
    """Requests per second, shape (buckets,)."""
    tokens: FloatArray
    """Mean tokens of a request, input and output together, shape (buckets,). Exact where the sizes are written in
    the service; else the middle of the bucket, since a histogram does not say where in it the requests lie."""
    observed: bool
    """Whether it was measured, rather than written by the user."""
    warnings: list[str]
    """What the user should know about the figures."""


def bucket_demand(service: LLMService, buckets: Buckets, observed: Demand | None) -> BucketDemand:
    """The demand that a plan has to serve."""
    traffic = service.spec.traffic
    tokens = np.array([_middle_tokens(buckets, bucket) for bucket in range(buckets.count)])
    if traffic.mode == "observe" and observed is not None:
        return BucketDemand(np.array(observed.rps, dtype=np.float64), tokens, True, [])

    rps = np.zeros(buckets.count)
    warnings: list[str] = []
    if traffic.requests_per_second is None or traffic.sizes is None:
        if traffic.requests_per_second:
            warnings.append(
                "spec.traffic.sizes is absent, so spec.traffic.requestsPerSecond cannot be planned for; "
                "demand counts once requests arrive"
            )
        return BucketDemand(rps, tokens, False, warnings)

    total_share = sum(size.share for size in traffic.sizes)
    token_rate = np.zeros(buckets.count)
    for size in traffic.sizes:
        rate = traffic.requests_per_second * size.share / total_share
        bucket = buckets.index(size.input_tokens, size.output_tokens)
        rps[bucket] += rate
        token_rate[bucket] += rate * (size.input_tokens + size.output_tokens)
        both = size.input_tokens + size.output_tokens
        if both > service.spec.model.context_length:
            warnings.append(
                f"spec.traffic.sizes: {size.input_tokens} + {size.output_tokens} tokens exceed "
                f"spec.model.contextLength {service.spec.model.context_length}; the engine will refuse such requests"
            )
        corner = buckets.edges(bucket)
        if size.input_tokens > corner[0] or size.output_tokens > corner[1]:
            warnings.append(
                f"spec.traffic.sizes: {size.input_tokens} input and {size.output_tokens} output tokens lie above the "
                f"last bucket ({corner[0]}, {corner[1]}) of ModelProfile {service.spec.profile} and are planned as it"
            )
    with_demand = rps > 0
    tokens[with_demand] = token_rate[with_demand] / rps[with_demand]
    return BucketDemand(rps, tokens, False, warnings)


def lower_edges(buckets: Buckets, bucket: int) -> tuple[int, int]:
    """(input tokens, output tokens) of the smallest request of a bucket."""
    row, column = divmod(bucket, len(buckets.output_tokens))
    return (
        buckets.input_tokens[row - 1] + 1 if row else 1,
        buckets.output_tokens[column - 1] + 1 if column else 1,
    )


def _middle_tokens(buckets: Buckets, bucket: int) -> float:
    return (sum(lower_edges(buckets, bucket)) + sum(buckets.edges(bucket))) / 2
