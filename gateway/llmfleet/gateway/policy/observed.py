"""How large requests were and what engines took for them: sums by bucket, so that they add up over gateways and time.

    Usage of a completed request ---------------------------> SizeSums by bucket
    its times, and the load around it (`Replica.load_s`) ---> ObservedSums by variant, bucket and octave of load

What the sums mean for a plan is decided elsewhere: sizes by the planner, times by `placement.performance.observation`,
which sets them against what was predicted at the same sizes and load. Here nothing is divided and nothing forgotten;
whoever wants the last minute takes a difference.
"""

from __future__ import annotations

import math
from collections import defaultdict

from llmfleet.api import Buckets, ObservedSums, SizeSums
from llmfleet.gateway.policy.sizes import Usage


class Sizes:
    """Sums over the sizes of completed requests, by bucket."""

    __slots__ = ("_last_input", "_last_output", "_sums")

    def __init__(self, buckets: Buckets) -> None:
        self._last_input, self._last_output = buckets.input_tokens[-1], buckets.output_tokens[-1]
        self._sums: dict[int, list[int]] = {}

    def add(self, bucket: int, input_tokens: int, output_tokens: int) -> None:
        """Takes in one completed request."""
        sums = self._sums.get(bucket)
        if sums is None:
            sums = self._sums[bucket] = [0] * 5
        input_tokens = max(1, min(input_tokens, self._last_input))
        output_tokens = max(1, min(output_tokens, self._last_output))
        sums[0] += 1
        sums[1] += input_tokens
        sums[2] += input_tokens * input_tokens
        sums[3] += output_tokens
        sums[4] += output_tokens * output_tokens

    def report(self) -> list[SizeSums]:
        """The sums as they go over the wire, by bucket."""
        return [SizeSums(bucket, *sums) for bucket, sums in sorted(self._sums.items())]


class Observations:
    """Sums over what engines took, by variant, bucket and octave of load."""

    __slots__ = ("_last_input", "_last_output", "_sums")

    def __init__(self, buckets: Buckets) -> None:
        self._last_input, self._last_output = buckets.input_tokens[-1], buckets.output_tokens[-1]
        self._sums: dict[tuple[str, int, int], list[float]] = {}

    def add(self, variant: str, bucket: int, usage: Usage, *, load: float, ttft_s: float, decode_s: float) -> None:
        """Takes in one completed request, unless it is larger than the last edges: its bucket does not stand for it.

        `load`: requests in the engine, itself included, averaged over its stay.
        """
        if not 1 <= usage.prompt_tokens <= self._last_input or not 1 <= usage.completion_tokens <= self._last_output:
            return
        cell = (variant, bucket, round(math.log2(load)) if load > 1.0 else 0)
        sums = self._sums.get(cell)
        if sums is None:
            sums = self._sums[cell] = [0.0] * 6
        sums[0] += 1
        sums[1] += max(1.0, load)
        sums[2] += usage.prompt_tokens
        sums[3] += ttft_s * 1e3
        sums[4] += usage.completion_tokens - 1
        sums[5] += decode_s * 1e3

    def report(self) -> dict[str, list[ObservedSums]]:
        """The sums as they go over the wire, by variant."""
        found: defaultdict[str, list[ObservedSums]] = defaultdict(list)
        for (variant, bucket, octave), (requests, load, inputs, ttft_ms, decoded, decode_ms) in self._sums.items():
            row = ObservedSums(bucket, octave, int(requests), load, int(inputs), ttft_ms, int(decoded), decode_ms)
            found[variant].append(row)
        return found
