"""What `llmfleet profile` is told to measure, checked before anything is sent."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmfleet.api import Buckets, Configuration
from llmfleet.cli.refused import RefusedError

DEFAULT_CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Doubling; the run stops at the one that brings no more throughput."""
DEFAULT_SECONDS_PER_POINT = 20.0

_MOST_POINTS = 512
"""As many as a ModelProfile holds."""


@dataclass(frozen=True)
class ProfileSettings:
    """One measurement of one running engine.

    url: where it answers, with or without `/v1`. gpu_type: name of the GPUType that it runs on.
    buckets: the ModelProfile's size buckets; their upper corners are what is measured.
    tensor_parallel, pipeline_parallel, configuration: how the engine was started; None: the default configuration.
    model: name to ask for; None: the only one that it serves. api_key: sent as bearer token.
    concurrencies: requests in flight at once, ascending. seconds_per_point: least length of a window.
    seed: of the random prompts; a run with another seed shares no prompt with this one.

    Raises RefusedError for a value that cannot be measured.
    """

    url: str
    gpu_type: str
    buckets: Buckets
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    configuration: Configuration | None = None
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrencies: Sequence[int] = DEFAULT_CONCURRENCIES
    seconds_per_point: float = DEFAULT_SECONDS_PER_POINT
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise RefusedError(f"url: got {self.url!r}; accepted is the engine's address, http://host:port")
        levels = list(self.concurrencies)
        if not levels or levels[0] < 1 or any(b <= a for a, b in itertools.pairwise(levels)):
            raise RefusedError(f"concurrency: got {levels}; accepted are ascending numbers from 1")
        if not self.seconds_per_point > 0:
            raise RefusedError(f"seconds per point: got {self.seconds_per_point:g}; accepted is a positive number")
        if self.buckets.output_tokens[0] < 2:
            raise RefusedError(
                f"outputTokens: got {self.buckets.output_tokens}; accepted are edges from 2, because the time per "
                "output token is that between tokens"
            )
        if self.buckets.count * len(levels) > _MOST_POINTS:
            raise RefusedError(
                f"{self.buckets.count} buckets at {len(levels)} levels of concurrency: accepted are at most "
                f"{_MOST_POINTS} points in one measurement"
            )

    @property
    def corners(self) -> list[tuple[int, int]]:
        """(input tokens, output tokens) of every bucket's upper corner, in bucket order."""
        return [self.buckets.edges(bucket) for bucket in range(self.buckets.count)]
