"""Counts that change with every request, as plain numbers that become metrics only when they are scraped.

    outcome, seconds, tokens of one request --> VariantTallies of its (service, variant) --scrape--> RequestMetrics

The client library's own counters take a lock and follow its multi-process protocol with every change, which costs a
request several times what the change does. One event loop makes all of these changes and answers the scrapes as well,
so plain numbers are enough.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_DURATION_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Spread:
    """A histogram."""

    __slots__ = ("_bounds", "_counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: upper edges, ascending; a value on an edge counts below it."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """Sum of all values."""

    def observe(self, value: float) -> None:
        """Takes in one value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[float, int]]:
        """(upper edge, values up to there), the last edge infinite."""
        edges, count = [], 0
        for bound, here in zip((*self._bounds, float("inf")), self._counts, strict=True):
            count += here
            edges.append((bound, count))
        return edges


class VariantTallies:
    """What one gateway has counted of one variant of one service."""

    __slots__ = ("completion_tokens", "duration_s", "outcomes", "prompt_tokens", "retries", "tpot_s", "ttft_s")

    def __init__(self) -> None:
        self.ttft_s = Spread(_TTFT_S)
        self.tpot_s = Spread(_TPOT_S)
        self.duration_s = Spread(_DURATION_S)
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.retries = 0
        """Requests that an engine failed before its first token."""
        self.outcomes: defaultdict[str, int] = defaultdict(int)
        """Requests that have ended, by how."""
