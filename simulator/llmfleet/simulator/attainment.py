"""Was a promise kept? The share of requests within a target, and what a finite run can prove about it.

An objective says for each of its two targets which share of the requests must stay within it. A run of n requests of
which k did shows k/n, but another run would show another share. Wilson's score interval (Journal of the American
Statistical Association 22, 1927) says which shares would not be surprising; unlike the textbook interval it holds near
100 %, where objectives are. A promise is *kept* if even the interval's lower end is enough, *broken* if not even its
upper end is, and otherwise the run was too short to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.simulator.replay import Served

Z_ONE_SIDED_95 = 1.6449
"""Standard normal quantile: with one run in twenty, the true share lies beyond the bound."""

Verdict = Literal["kept", "broken", "undecided"]


def wilson(within: int, requests: int, z: float = Z_ONE_SIDED_95) -> tuple[float, float]:
    """(lower, upper) end of the score interval of a share; (0, 1) without requests."""
    if not 0 <= within <= requests:
        raise ValueError(f"within: got {within}; accepted are numbers from 0 to the {requests} requests")
    if requests == 0:
        return 0.0, 1.0
    share = within / requests
    shrink = 1.0 + z * z / requests
    middle = (share + z * z / (2 * requests)) / shrink
    half = z * math.sqrt(share * (1 - share) / requests + z * z / (4 * requests * requests)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Attainment:
    """How one target fared."""

    target: LatencyTarget
    within: int
    """Requests within the target."""
    requests: int

    @property
    def percent(self) -> float:
        """Share within the target, in percent."""
        return 100.0 * self.within / self.requests if self.requests else math.nan

    def verdict(self, slack_points: float = 1.0) -> Verdict:
        """Whether the target was met by its percentile of the requests, less `slack_points` percentage points."""
        lower, upper = wilson(self.within, self.requests)
        wanted = (self.target.percentile - slack_points) / 100.0
        return "kept" if lower >= wanted else "broken" if upper < wanted else "undecided"


@dataclass(frozen=True)
class ObjectiveAttainment:
    """How both targets fared, each at its own percentile."""

    ttft: Attainment
    tpot: Attainment

    def verdict(self, slack_points: float = 1.0) -> Verdict:
        """Kept if both are, broken if one is."""
        both = {self.ttft.verdict(slack_points), self.tpot.verdict(slack_points)}
        return "broken" if "broken" in both else "undecided" if "undecided" in both else "kept"


def attainment(served: Iterable[Served], objective: Objective) -> ObjectiveAttainment:
    """How the objective fared. An answer of one token has no time per token after the first: it is within."""
    requests: Sequence[Served] = list(served)
    ttft = [one.ttft_ms <= objective.ttft.milliseconds for one in requests]
    tpot = [one.tpot_ms is None or one.tpot_ms <= objective.tpot.milliseconds for one in requests]
    return ObjectiveAttainment(
        Attainment(objective.ttft, sum(ttft), len(requests)),
        Attainment(objective.tpot, sum(tpot), len(requests)),
    )
