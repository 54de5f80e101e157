"""Request sizes and their rates, as cells: a corner that no request of the cell exceeds, and requests per second.

    sizes that a user expects  \\
    requests of a trace         >  Histogram  --on(buckets)-->  Histogram with one cell per bucket of a profile
    rates that gateways saw    /

What is planned is the corner, so a cell is never optimistic: whatever makes cells fewer moves a corner up, and keeps
every request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from llmfleet.api import Buckets, BucketSizes
from llmfleet.api.llmservice import RequestSize
from llmfleet.placement.workload.traces import Request

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Cells of request sizes; every array has shape (cells,)."""

    input_tokens: IntArray
    """Longest prompt of the cell."""
    output_tokens: IntArray
    """Longest answer of the cell."""
    rps: FloatArray
    """Requests per second."""
    mean_tokens: FloatArray
    """Mean tokens of a request, input and output together, as far as it is known: the middle of a bucket where only
    the bucket is."""

    @classmethod
    def expected(cls, sizes: Sequence[RequestSize], requests_per_second: float) -> Histogram:
        """One cell for each size that a user wrote down, the shares scaled to sum to one."""
        share = np.array([size.share for size in sizes])
        return cls._exact(
            [(size.input_tokens, size.output_tokens) for size in sizes], requests_per_second * (share / share.sum())
        )

    @classmethod
    def observed(cls, buckets: Buckets, rps: Sequence[float]) -> Histogram:
        """One cell for each bucket that requests were counted in, row-major as in `Buckets.index`."""
        largest = corners(buckets).astype(np.int64)
        return cls(largest[:, 0], largest[:, 1], np.array(rps, dtype=np.float64), _middles(buckets))

    @classmethod
    def of_trace(cls, trace: TraceSizes, requests_per_second: float | None = None) -> Histogram:
        """One cell for each size of a trace, at the trace's own rate or another. Raises as `TraceSizes.rps` does."""
        rate = trace.rps if requests_per_second is None else requests_per_second
        counts = np.array(list(trace.counts.values()), dtype=np.float64)
        return cls._exact(list(trace.counts), rate * (counts / trace.requests))

    @classmethod
    def _exact(cls, sizes: Sequence[tuple[int, int]], rps: FloatArray) -> Histogram:
        corners = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        return cls(corners[:, 0], corners[:, 1], rps, corners.sum(axis=1).astype(np.float64))

    def on(self, buckets: Buckets) -> Histogram:
        """The same requests with one cell per bucket, row-major as in `Buckets.index`; empty ones included.

        Requests above the last edges count in the last bucket, as gateways count them: `exceed_buckets` says which.
        """
        sizes = zip(self.input_tokens.tolist(), self.output_tokens.tolist(), strict=True)
        into = np.array([buckets.index(*size) for size in sizes], dtype=np.int64)
        rps = np.bincount(into, self.rps, buckets.count).astype(np.float64)
        tokens = np.bincount(into, self.rps * self.mean_tokens, buckets.count)
        mean = np.divide(tokens, rps, out=_middles(buckets), where=rps > 0)
        largest = corners(buckets).astype(np.int64)
        return Histogram(largest[:, 0], largest[:, 1], rps, mean)

    def exceed_buckets(self, buckets: Buckets) -> BoolArray:
        """Whether a cell's corner lies above the last edges, shape (cells,)."""
        return (self.input_tokens > buckets.input_tokens[-1]) | (self.output_tokens > buckets.output_tokens[-1])

    def exceed_context(self, context_length: int) -> BoolArray:
        """Whether a cell's corner is more than the context holds, shape (cells,)."""
        return self.input_tokens + self.output_tokens > context_length


@dataclass(frozen=True)
class TraceSizes:
    """What remains of a trace when the order of its requests is forgotten."""

    counts: Mapping[tuple[int, int], int]
    """Requests by (input tokens, output tokens)."""
    seconds: float
    """From the first request to the last."""

    @property
    def requests(self) -> int:
        """Number of requests."""
        return sum(self.counts.values())

    @property
    def rps(self) -> float:
        """Requests per second: gaps over the time that they take. Raises ValueError where there is no such time."""
        if self.seconds <= 0:
            raise ValueError(f"{self.requests} requests at one moment have no rate; accepted are times that differ")
        return (self.requests - 1) / self.seconds

    def by_bucket(self, buckets: Buckets) -> list[BucketSizes]:
        """How long the requests of each bucket are; those above the last edges as if they ended there."""
        sizes = np.array(list(self.counts), dtype=np.float64).reshape(-1, 2)
        sizes = np.minimum(sizes, [buckets.input_tokens[-1], buckets.output_tokens[-1]])
        count = np.array(list(self.counts.values()), dtype=np.float64)
        into = np.array([buckets.index(*size) for size in sizes], dtype=np.int64)
        columns = (np.ones(len(sizes)), sizes[:, 0], sizes[:, 0] ** 2, sizes[:, 1], sizes[:, 1] ** 2)
        sums = np.stack([np.bincount(into, count * column, buckets.count) for column in columns], axis=1)
        return [BucketSizes(**dict(zip(BucketSizes.model_fields, row, strict=True))) for row in sums.tolist()]


def trace_sizes(requests: Iterable[Request]) -> TraceSizes:
    """Counts the requests of a trace, which are in order of time. Raises ValueError where there are none."""
    counts: Counter[tuple[int, int]] = Counter()
    first_s = last_s = None
    for request in requests:
        first_s = request.at_s if first_s is None else first_s
        last_s = request.at_s
        counts[request.input_tokens, request.output_tokens] += 1
    if first_s is None or last_s is None:
        raise ValueError("no requests; accepted is at least one")
    return TraceSizes(counts, last_s - first_s)


def lower_edges(buckets: Buckets, bucket: int) -> tuple[int, int]:
    """(input tokens, output tokens) of the smallest request of a bucket."""
    row, column = divmod(bucket, len(buckets.output_tokens))
    return (
        buckets.input_tokens[row - 1] + 1 if row else 1,
        buckets.output_tokens[column - 1] + 1 if column else 1,
    )


def lowest(buckets: Buckets) -> FloatArray:
    """(input tokens, output tokens) of the smallest request of each bucket, shape (buckets, 2). Not to be written into,
    as what `corners` returns is not."""
    return _grids(tuple(buckets.input_tokens), tuple(buckets.output_tokens))[0]


def corners(buckets: Buckets) -> FloatArray:
    """(input tokens, output tokens) of the largest request of each bucket, shape (buckets, 2)."""
    return _grids(tuple(buckets.input_tokens), tuple(buckets.output_tokens))[1]


@lru_cache(maxsize=64)
def _grids(input_tokens: tuple[int, ...], output_tokens: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    buckets = Buckets(input_tokens=list(input_tokens), output_tokens=list(output_tokens))
    found = tuple(
        np.array([edges(bucket) for bucket in range(buckets.count)], dtype=np.float64)
        for edges in (partial(lower_edges, buckets), buckets.edges)
    )
    for grid in found:
        grid.flags.writeable = False
    return found[0], found[1]


def _middles(buckets: Buckets) -> FloatArray:
    """Mean of the smallest and the largest request of each bucket, input and output together."""
    middles: FloatArray = (lowest(buckets).sum(axis=1) + corners(buckets).sum(axis=1)) / 2
    return middles
