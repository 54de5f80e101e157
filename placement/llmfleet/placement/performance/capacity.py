"""How many requests per second replicas may be given, so that TTFT *and* TPOT hold at their percentile.

    capacities(curves, objective, replicas=n, arrivals_cv2=c) -> one Capacity per curve
    outlook(curves, objective, rps, ...)                      -> what requests see at a load below it
    pool_margin(alone, together, objective, ...)              -> what small pools lose, for the fleet program

**Queue.** Requests come to a pool of m equal replicas, which are kept equally full (the gateway routes to the
emptiest), so N in the pool are N / m in each and leave at the rate mu(N) = m X(N / m), X from `replica_curves`; beyond
the places of the replicas they wait, and mu stays. Arrivals come in batches, Poisson in time, whose size is geometric
with mean b: the index of dispersion of such a process is 2 b - 1, so b = (c + 1) / 2 for arrivals with a squared
coefficient of variation c of at least one (b = 1 is Poisson; smoother arrivals are taken as Poisson). Equating the
flows across every cut between N and N + 1 gives the stationary distribution exactly, with q = 1 - 1 / b and rate
lambda:

    S(N) = pi(N) + q S(N - 1)              pi(N + 1) = lambda (1 - q) S(N) / mu(N + 1)

so that S is a product, S(N + 1) = S(N) (q + lambda (1 - q) / mu(N + 1)). A request finds, of those before it and those
before it in its own batch, a number distributed as (1 - q) S(N): memoryless sizes again. Beyond a horizon H where mu is
constant lies the mass lambda S(H) / (mu - lambda). For b = 1 this is the birth-death chain of a processor-sharing
queue, whose answer depends on sizes only through their mean.

**Latency.** A request that finds N has the TTFT of (N + 1) / m in flight, plus, without a place, its turn at the rate
mu. During its life it sees N with probability proportional to N pi(N) (it is one of them). TPOT is judged there as if N
stayed what it is, which overstates the tail. Around each median single requests scatter as a logarithmic normal.
Attainment is the probability, over N and the sizes of the mix, of keeping the target; capacity is the largest rate
where both attainments reach their percentile: by bisection, since more arrivals only ever make N larger.

**Margin.** What m replicas hold together is near m - beta sqrt(m) (square-root staffing, Halfin and Whitt 1981) of what
one holds in a pool without end. The fleet program takes a line, share (m - reserve): the chord of that curve between
one replica and the number that is expected. It is exact at both and a few percent off elsewhere; so a plan is judged by
`outlook` at the number that it has, and asked for again where it is short.

**Paced.** A squared coefficient of 0 says that the senders pace themselves, as batch jobs behind a queue do: requests
then find every replica equally full, nobody waits, and no reserve is held. Between 0 and 1 counts as 1.

Pools of thousands are computed on a coarser grid of N, over which all of this is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance.attainment import kept, percentile_ms, representatives
from llmfleet.placement.performance.mixture import ReplicaCurves
from llmfleet.placement.performance.model import BoolArray, FloatArray

Limit = Literal["ttft", "tpot", "throughput"]

_BISECTIONS = 28
_COARSE_BISECTIONS = 14  # of a line that is judged afterwards: within a ten-thousandth of the largest rate
_TAIL_SPREADS = 4.0
_MOST_STATES = 2048


@dataclass(frozen=True)
class Capacity:
    """The largest load of a pool of replicas."""

    requests_per_second: float
    """Of the whole pool; 0 where even a single request does not keep the objective often enough."""
    ttft_attainment: float
    """Share of requests that keep the TTFT target at that load, 0 to 1."""
    tpot_attainment: float
    """The same of TPOT."""
    concurrency: float
    """Mean number of requests in one replica at that load."""
    limited_by: Limit
    """What would be missed at a higher load; `throughput` where the replicas would not keep up at all."""


@dataclass(frozen=True)
class Outlook:
    """What the requests of a pool see at a load."""

    ttft_attainment: float
    """Share of requests that keep the TTFT target, 0 to 1."""
    tpot_attainment: float
    """The same of TPOT."""
    ttft_ms: float
    """TTFT at the objective's percentile; infinite where too many are never served."""
    tpot_ms: float
    """TPOT at the objective's percentile."""

    def keeps(self, objective: Objective, *, slack: float = 0.0) -> bool:
        """Whether both targets are kept, up to this share of the requests."""
        return (
            self.ttft_attainment >= objective.ttft.percentile / 100 - slack
            and self.tpot_attainment >= objective.tpot.percentile / 100 - slack
        )


@dataclass(frozen=True)
class Margin:
    """What m replicas hold together: `share * (m - reserve)`, in units of a rate that one was said to do."""

    share: float
    """What every further replica brings, at least 0."""
    reserve: float
    """Replicas' worth that a pool in use loses once, 0 to 1: a single replica is never less than none."""

    def holds(self, replicas: float) -> float:
        """In units of the rate of one."""
        return self.share * max(0.0, replicas - self.reserve)


def capacities(
    curves: Sequence[ReplicaCurves],
    objective: Objective,
    *,
    replicas: int = 1,
    arrivals_cv2: float = 1.0,
    bisections: int = _BISECTIONS,
) -> list[Capacity]:
    """The largest load of a pool of `replicas` for each of the curves; see the module's docstring.

    `arrivals_cv2`: squared coefficient of variation of the times between arrivals, 1 for Poisson, more for bursts.
    Raises ValueError for fewer than one replica, or a coefficient that is negative or not finite.
    """
    _check(replicas, arrivals_cv2)
    usable = [one for one in curves if one.places]
    if not usable:
        return [_NOTHING for _ in curves]
    pools = _Pools(usable, objective, replicas, arrivals_cv2)
    low, high = np.zeros(len(usable)), pools.most_rps.copy()
    for _ in range(bisections):
        middle = (low + high) / 2
        ttft, tpot, _ = pools.attainment(middle)
        holds = (ttft >= pools.ttft_share) & (tpot >= pools.tpot_share)
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    found = iter(pools.capacities(low, high))
    return [next(found) if one.places else _NOTHING for one in curves]


def dispersion_of(arrivals_cv2: float, replicas: int) -> float:
    """Index of dispersion of what arrives at one of so many replicas, each of which gets every so-manieth request."""
    return 1 + (max(1.0, arrivals_cv2) - 1) / replicas


def pool_margin(
    alone: ReplicaCurves,
    together: ReplicaCurves,
    objective: Objective,
    *,
    rps: float,
    expected: int,
    arrivals_cv2: float = 1.0,
) -> Margin:
    """The line that the fleet program takes, exact for one replica and for the expected number, of two at least.

    `alone` and `together`: a replica in a pool of one, and in one of `expected`. `rps`: what one replica is said to do,
    the unit of the answer. Raises ValueError as `capacities` does, and for fewer than two.
    """
    _check(expected, arrivals_cv2)
    if expected < 2:
        raise ValueError(f"expected is {expected}; accepted is a number of at least 2")
    large = large_pool_rps(together, objective) / rps
    if large <= 0 or arrivals_cv2 == 0:
        return Margin(large, 0.0)
    one, many = (
        capacities([curves], objective, replicas=count, arrivals_cv2=arrivals_cv2, bisections=_COARSE_BISECTIONS)[
            0
        ].requests_per_second
        / rps
        for curves, count in ((alone, 1), (together, expected))
    )
    share = (many - one) / (expected - 1)
    if share <= one or share <= 0:
        return Margin(many / expected, 0.0)
    return Margin(share, 1 - one / share)


def keeps(
    curves: ReplicaCurves,
    objective: Objective,
    rps: float,
    *,
    replicas: int,
    arrivals_cv2: float = 1.0,
    slack: float = 0.0,
) -> bool:
    """Whether `outlook` keeps the objective, up to `slack` of the requests, at a third of its cost."""
    _check(replicas, arrivals_cv2)
    if not curves.places or arrivals_cv2 == 0:
        seen = outlook(curves, objective, rps, replicas=replicas, arrivals_cv2=arrivals_cv2)
        return seen.keeps(objective, slack=slack)
    pools = _Pools([curves], objective, replicas, arrivals_cv2)
    ttft, tpot, _ = pools.attainment(np.array([rps]))
    return bool(ttft[0] >= pools.ttft_share - slack and tpot[0] >= pools.tpot_share - slack)


def outlook(
    curves: ReplicaCurves, objective: Objective, rps: float, *, replicas: int, arrivals_cv2: float = 1.0
) -> Outlook:
    """What requests see where `replicas` are given `rps` together. Raises ValueError as `capacities` does."""
    _check(replicas, arrivals_cv2)
    if not curves.places:
        return Outlook(0.0, 0.0, math.inf, math.inf)
    if arrivals_cv2 == 0:
        return _paced(curves, objective, rps / replicas)
    pools = _Pools([curves], objective, replicas, arrivals_cv2)
    rate = np.array([rps])
    ttft, tpot, _ = pools.attainment(rate)
    ttft_ms, tpot_ms = pools.latencies(rate)
    return Outlook(min(1.0, float(ttft[0])), min(1.0, float(tpot[0])), ttft_ms, tpot_ms)


def _paced(curves: ReplicaCurves, objective: Objective, rps: float) -> Outlook:
    """Every replica at the fewest requests in flight at which it completes what it is given."""
    enough = np.flatnonzero(curves.requests_per_second >= rps * (1 - 1e-6))
    if not len(enough):
        return Outlook(0.0, 0.0, math.inf, math.inf)
    n = slice(enough[0], enough[0] + 1)
    ttft_ms, tpot_ms = curves.ttft_ms[:, n], np.broadcast_to(curves.tpot_ms[n], curves.tpot_spread[:, n].shape)
    ones = np.ones(1)
    return Outlook(
        float(kept(curves.weight, objective.ttft.milliseconds, ttft_ms, curves.ttft_spread[:, n])[0]),
        float(kept(curves.weight, objective.tpot.milliseconds, tpot_ms, curves.tpot_spread[:, n])[0]),
        percentile_ms(objective.ttft.percentile, curves.weight, ones, 0.0, ttft_ms, curves.ttft_spread[:, n]),
        percentile_ms(objective.tpot.percentile, curves.weight, ones, 0.0, tpot_ms, curves.tpot_spread[:, n]),
    )


def large_pool_rps(curves: ReplicaCurves, objective: Objective) -> float:
    """Requests per second of one replica in a pool so large that every replica is always equally full."""
    if not curves.places:
        return 0.0
    ttft = kept(curves.weight, objective.ttft.milliseconds, curves.ttft_ms, curves.ttft_spread)
    tpot = kept(curves.weight, objective.tpot.milliseconds, curves.tpot_ms, curves.tpot_spread)
    holds = (ttft >= objective.ttft.percentile / 100) & (tpot >= objective.tpot.percentile / 100)
    fitting = int(np.argmin(holds)) if not holds.all() else len(holds)
    return float(curves.requests_per_second[:fitting].max(initial=0.0))


_NOTHING = Capacity(0.0, 0.0, 0.0, 0.0, "ttft")


class _Pools:
    """Pools of equal size, one per curve, on a common grid of N = 0 ... H; arrays have shape (pools, grid)."""

    def __init__(
        self, curves: Sequence[ReplicaCurves], objective: Objective, replicas: int, arrivals_cv2: float
    ) -> None:
        self._curves, self._objective, self._replicas = curves, objective, replicas
        self._follows = 1 - 2 / (max(1.0, arrivals_cv2) + 1)  # q: the chance that another comes in the same batch
        self.ttft_share, self.tpot_share = objective.ttft.percentile / 100, objective.tpot.percentile / 100
        self.most_rps = np.array([replicas * one.requests_per_second.max() for one in curves])
        horizon = max(_horizon(one, objective, replicas) for one in curves)
        self._step = math.ceil(horizon / _MOST_STATES)
        self._number = np.arange(0.0, horizon + self._step, self._step)
        stacked = [_on_grid(one, objective, replicas, self._number) for one in curves]
        self._rate, self._ttft_kept, self._tpot_kept = (np.stack(part) for part in zip(*stacked, strict=True))

    def _chances(self, rps: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """Unnormalised: finding N, (pools, grid); finding more than H, (pools,); being among N, and among more, while
        served; all states together."""
        q, step = self._follows, self._step
        # Leaving from the middle of a step, which for steps of one is N + 1 itself.
        middle = (step + 1) / (2 * step)
        joining = rps[:, None] * (1 - q) / (middle * self._rate[:, 1:] + (1 - middle) * self._rate[:, :-1])
        with np.errstate(divide="ignore"):
            logs = step * np.cumsum(np.log(q + joining), axis=1)
        highest = np.maximum(logs.max(axis=1, keepdims=True), 0.0)
        behind = np.exp(np.concatenate([-highest, logs - highest], axis=1))  # S, up to a factor
        alone = np.concatenate([behind[:, :1] / step, joining * behind[:, :-1]], axis=1)  # pi, up to the same factor
        spare = self._rate[:, -1] - rps
        stable = spare > 0
        spare = np.where(stable, spare, 1.0)
        beyond = rps * behind[:, -1] / spare
        found = (1 - q) * step * behind
        during = alone * self._number * step
        outside = beyond * (self._number[-1] + self._rate[:, -1] / spare / (1 - q))
        states = np.where(stable, step * alone.sum(axis=1) + beyond, np.inf)
        return found, beyond + q * behind[:, -1], during, outside, states

    def attainment(self, rps: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(share within TTFT, share within TPOT, mean number in the pool), each of shape (pools,)."""
        found, beyond, during, outside, states = self._chances(rps)
        stable = np.isfinite(states)
        ttft = (found * self._ttft_kept).sum(axis=1) / (found.sum(axis=1) + beyond)
        total = np.maximum(during.sum(axis=1) + outside, 1e-300)
        tpot = ((during * self._tpot_kept).sum(axis=1) + outside * self._tpot_kept[:, -1]) / total
        number = np.where(stable, total / states, np.inf)
        tpot = np.where(rps > 0, tpot, self._tpot_kept[:, 1])
        return np.where(stable, ttft, 0.0), np.where(stable, tpot, 0.0), number

    def latencies(self, rps: FloatArray) -> tuple[float, float]:
        """(TTFT, TPOT) of the first pool at the objective's percentiles, in ms."""
        found, beyond, during, outside, states = self._chances(rps)
        if not np.isfinite(states[0]):
            return math.inf, math.inf
        curves, objective = self._curves[0], self._objective
        seen = representatives(found[0])
        _, ttft_ms, ttft_spread, _, _ = _seen_at(curves, self._replicas, self._number[seen.index])
        missing = float(beyond[0] / (found[0].sum() + beyond[0]))
        ttft = percentile_ms(
            objective.ttft.percentile, curves.weight, seen.weight * (1 - missing), missing, ttft_ms, ttft_spread
        )
        during = during.copy()
        during[0, -1] += outside[0]
        if rps[0] <= 0:
            during[0, 1] = 1.0
        seen = representatives(during[0])
        _, _, _, tpot_ms, tpot_spread = _seen_at(curves, self._replicas, self._number[seen.index])
        median = np.broadcast_to(tpot_ms, tpot_spread.shape)
        return ttft, percentile_ms(objective.tpot.percentile, curves.weight, seen.weight, 0.0, median, tpot_spread)

    def capacities(self, low: FloatArray, high: FloatArray) -> list[Capacity]:
        """What the bisection ended at."""
        ttft, tpot, number = self.attainment(low)
        ttft_above, tpot_above, _ = self.attainment(high)
        missed_ttft: BoolArray = ttft_above < self.ttft_share
        missed_tpot: BoolArray = tpot_above < self.tpot_share
        found = []
        for pool in range(len(low)):
            limit: Limit = "ttft" if missed_ttft[pool] else "tpot"
            if (missed_ttft[pool] and missed_tpot[pool]) or high[pool] >= self.most_rps[pool]:
                limit = "throughput"
            found.append(
                Capacity(
                    requests_per_second=float(low[pool]),
                    ttft_attainment=float(ttft[pool]),
                    tpot_attainment=float(tpot[pool]),
                    concurrency=float(number[pool] / self._replicas),
                    limited_by=limit,
                )
            )
        return found


def _horizon(curves: ReplicaCurves, objective: Objective, replicas: int) -> int:
    """The number in the pool beyond which no request meets the TTFT target."""
    widest = math.exp(_TAIL_SPREADS * float(curves.ttft_spread.max()))
    waiting = objective.ttft.milliseconds * widest / 1e3 * replicas * float(curves.requests_per_second[-1])
    return replicas * curves.places + math.ceil(min(waiting, 4.0 * replicas * curves.places)) + 1


def _seen_at(
    curves: ReplicaCurves, replicas: int, number: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
    """(rate, TTFT and its spread of those who find N, TPOT and its spread of those among N)."""
    places = np.arange(1.0, curves.places + 1)
    each = number / replicas
    running_rps = np.concatenate([[0.0], curves.requests_per_second])
    rate = replicas * np.interp(each, np.concatenate([[0.0], places]), running_rps)
    full_rps = replicas * curves.requests_per_second[-1]
    joined = np.clip((number + 1) / replicas, 1, curves.places)
    waits_ms = 1e3 * np.maximum(number + 1 - replicas * curves.places, 0) / full_rps
    ttft_ms = _interpolated(joined, curves.ttft_ms) + waits_ms
    running = np.clip(each, 1, curves.places)
    return (
        rate,
        ttft_ms,
        _interpolated(joined, curves.ttft_spread),
        np.interp(running, places, curves.tpot_ms),
        _interpolated(running, curves.tpot_spread),
    )


def _interpolated(at: FloatArray, table: FloatArray) -> FloatArray:
    """Between the columns of a table, (sizes, n), that stand for 1, 2, ...; (sizes, loads)."""
    low = np.minimum(at.astype(np.intp) - 1, max(0, table.shape[1] - 2))
    share = np.minimum(at - 1 - low, table.shape[1] - 1)
    high = np.minimum(low + 1, table.shape[1] - 1)
    return np.asarray(table[:, low] + share * (table[:, high] - table[:, low]))


def _on_grid(
    curves: ReplicaCurves, objective: Objective, replicas: int, number: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(rate with N in the pool, share within TTFT of those who find N, share within TPOT of those among N)."""
    rate, ttft_ms, ttft_spread, tpot_ms, tpot_spread = _seen_at(curves, replicas, number)
    ttft = kept(curves.weight, objective.ttft.milliseconds, ttft_ms, ttft_spread)
    return rate, ttft, kept(curves.weight, objective.tpot.milliseconds, tpot_ms, tpot_spread)


def _check(replicas: float, arrivals_cv2: float) -> None:
    if not (math.isfinite(replicas) and replicas >= 1):
        raise ValueError(f"replicas is {replicas!r}; accepted is a number of at least 1")
    if not (math.isfinite(arrivals_cv2) and arrivals_cv2 >= 0):
        raise ValueError(f"arrivals_cv2 is {arrivals_cv2!r}; accepted is a finite number of at least 0")
