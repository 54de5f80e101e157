"""When requests come and how large they are: those of a trace (`traces` reads them), or drawn.

    thinned, at_rate, repeated            the same load, less or faster or longer
    renewal(...) -> arrivals              gaps drawn from a gamma distribution: Poisson, or as bursty as asked for

An arrival process is called bursty by the squared coefficient of variation of its gaps (CV^2): 0 is a metronome, 1 is
Poisson, and the queue in front of an engine grows in proportion to it (Kingman 1961). Everything random takes a seed;
equal seeds give equal arrivals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, pvariance


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request: when it comes, in seconds, and its size in tokens."""

    at_s: float
    input_tokens: int
    output_tokens: int


def thinned(arrivals: Iterable[Arrival], share: float, seed: int) -> list[Arrival]:
    """Each request with probability `share`. Gaps between distant requests are more nearly Poisson."""
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share: got {share:g}; accepted is more than 0 and at most 1")
    drawn = random.Random(seed)
    return [arrival for arrival in arrivals if drawn.random() < share]


def at_rate(arrivals: Sequence[Arrival], requests_per_second: float) -> list[Arrival]:
    """The same requests with time stretched so that so many come per second; bursts stay what they are."""
    if not (0.0 < requests_per_second < math.inf):
        raise ValueError(f"requests_per_second: got {requests_per_second:g}; accepted is a positive number")
    factor = rate(arrivals) / requests_per_second
    first_s = arrivals[0].at_s
    return [replace(arrival, at_s=(arrival.at_s - first_s) * factor) for arrival in arrivals]


def repeated(arrivals: Sequence[Arrival], times: int) -> list[Arrival]:
    """The same load `times` times in a row, a mean gap between one end and the next beginning."""
    length_s = len(arrivals) / rate(arrivals)
    return [replace(one, at_s=one.at_s + turn * length_s) for turn in range(times) for one in arrivals]


def rate(arrivals: Sequence[Arrival]) -> float:
    """Requests per second: gaps over the time that they take. Raises ValueError where there is no such time."""
    if len(arrivals) < 2 or arrivals[-1].at_s <= arrivals[0].at_s:
        raise ValueError(f"arrivals: got {len(arrivals)}; a rate needs two at different times")
    return (len(arrivals) - 1) / (arrivals[-1].at_s - arrivals[0].at_s)


def burstiness(arrivals: Sequence[Arrival]) -> float:
    """CV^2 of the gaps."""
    gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(arrivals)]
    return pvariance(gaps) / fmean(gaps) ** 2


def renewal(
    sizes: Sequence[tuple[int, int]], requests_per_second: float, count: int, *, seed: int, cv2: float = 1.0
) -> list[Arrival]:
    """`count` requests with independent gaps of a gamma distribution, their sizes drawn from `sizes`.

    cv2: CV^2 of the gaps; 1 is a Poisson process, 0 gives equal gaps.
    """
    if not (0.0 < requests_per_second < math.inf):
        raise ValueError(f"requests_per_second: got {requests_per_second:g}; accepted is a positive number")
    if not (0.0 <= cv2 < math.inf):
        raise ValueError(f"cv2: got {cv2:g}; accepted are numbers from 0")
    drawn = random.Random(seed)
    mean_s = 1.0 / requests_per_second
    now_s = 0.0
    arrivals = []
    for _ in range(count):
        now_s += mean_s if cv2 == 0.0 else drawn.gammavariate(1.0 / cv2, cv2 * mean_s)
        arrivals.append(Arrival(now_s, *drawn.choice(sizes)))
    return arrivals
