"""Bucket edges that suit a workload: the fewest that keep its over-estimate below a bound.

A request is planned as if it had its bucket's corner. Along one axis, with w_x requests of length x and edges e, that
over-estimates the tokens by

    excess(e) = sum_x w_x (edge(x) - x) / sum_x w_x x,      edge(x): the first edge that is not below x

The two axes are independent, since an edge's excess does not depend on the other axis' edges. On one of them the best k
edges are lengths that occur, the longest among them, and

    best[k][j] = min_i best[k-1][i] + excess of lengths i+1...j at edge j

is exact. The excess of a span fulfils the quadrangle inequality (longer lengths below a higher edge cost more than each
by itself), so that the best i never decreases with j and a layer takes n log n steps instead of n squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmfleet.api import Buckets
from llmfleet.placement.workload.histogram import FloatArray, Histogram, IntArray

MOST_EDGES = 16
"""As many as a ModelProfile holds on an axis."""
_ROUNDING = 1e-9
"""Excess that sums of floating-point numbers may show where there is none."""


@dataclass(frozen=True)
class FittedBuckets:
    """Edges, and by how much they over-estimate."""

    buckets: Buckets
    input_excess: float
    """Prompt tokens planned beyond those there are, relative."""
    output_excess: float
    """Answer tokens planned beyond those there are, relative."""


def fitted_buckets(workload: Histogram, most_excess: float) -> FittedBuckets:
    """The fewest edges on each axis whose excess there is at most `most_excess` (0.1: a tenth more tokens).

    Raises ValueError where the workload has no requests, or where `MOST_EDGES` are not enough, naming the excess that
    they reach.
    """
    inputs, input_excess = _fewest(workload.input_tokens, workload.rps, most_excess, "inputTokens")
    outputs, output_excess = _fewest(workload.output_tokens, workload.rps, most_excess, "outputTokens")
    return FittedBuckets(Buckets(input_tokens=inputs, output_tokens=outputs), input_excess, output_excess)


def _fewest(tokens: IntArray, rps: FloatArray, most_excess: float, axis: str) -> tuple[list[int], float]:
    if not math.isfinite(most_excess) or most_excess < 0:
        raise ValueError(f"excess: got {most_excess:g}; accepted are numbers from 0")
    if not rps.sum() > 0:
        raise ValueError("the workload has no requests to fit edges to")
    lengths, place = np.unique(tokens[rps > 0], return_inverse=True)
    weight = np.bincount(place, rps[rps > 0]).astype(np.float64)
    total = float(weight @ lengths)
    layers = _Layers(lengths.astype(np.float64), weight / total)
    while layers.excess > most_excess + _ROUNDING:
        if layers.edges == MOST_EDGES:
            raise ValueError(
                f"{axis}: {MOST_EDGES} edges reach an excess of {layers.excess:.3g}; accepted is at least this much"
            )
        layers.add_edge()
    return [int(length) for length in lengths[layers.chosen()]], max(0.0, layers.excess)


class _Layers:
    """The dynamic program over one axis, an edge at a time."""

    def __init__(self, lengths: FloatArray, weight: FloatArray) -> None:
        """`lengths`: ascending. `weight`: such that `weight @ lengths` is 1."""
        self._lengths = lengths
        self._count = np.concatenate(([0.0], np.cumsum(weight)))
        self._tokens = np.concatenate(([0.0], np.cumsum(weight * lengths)))
        everything = np.arange(len(lengths))
        self._best = self._span(np.zeros(1, dtype=np.int64), everything)
        """By j: least excess of the lengths up to j with an edge at j."""
        self._before: list[IntArray] = []
        """By layer and j: the edge before j; -1 for none."""

    @property
    def edges(self) -> int:
        """Number of edges so far."""
        return len(self._before) + 1

    @property
    def excess(self) -> float:
        """The least excess with so many edges."""
        return float(self._best[-1])

    def chosen(self) -> list[int]:
        """Indices of the lengths that are edges, ascending."""
        found = [len(self._lengths) - 1]
        for before in reversed(self._before):
            if before[found[-1]] < 0:
                break
            found.append(int(before[found[-1]]))
        return found[::-1]

    def add_edge(self) -> None:
        """One layer: every j takes the best edge before it, or none."""
        best, before = self._best.copy(), np.full(len(self._best), -1, dtype=np.int64)
        spans = [(1, len(best), 0, len(best) - 1)]
        while spans:
            low, high, first, last = spans.pop()
            if low >= high:
                continue
            j = (low + high) // 2
            earlier = np.arange(first, min(last, j - 1) + 1)
            excess = self._best[earlier] + self._span(earlier + 1, np.array([j]))
            at = int(np.argmin(excess))
            best[j], before[j] = excess[at], earlier[at]
            spans += [(low, j, first, int(earlier[at])), (j + 1, high, int(earlier[at]), last)]
        self._best = best
        self._before.append(before)

    def _span(self, first: IntArray, last: IntArray) -> FloatArray:
        """Excess of the lengths first...last with an edge at the last, of any shapes that fit together."""
        span: FloatArray = self._lengths[last] * (self._count[last + 1] - self._count[first]) - (
            self._tokens[last + 1] - self._tokens[first]
        )
        return span
