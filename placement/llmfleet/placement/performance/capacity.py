"""How many requests per second replicas may be given, so that TTFT *and* TPOT hold at their percentile.

    capacities(curves, objective, replicas=n, arrivals_cv2=c) -> one Capacity per curve
    pool_reserve(curves, objective, ...)                      -> what small pools lose, for the fleet program

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

**Reserve.** What m replicas hold together, in units of what one holds in a pool without end, is at least
m - beta sqrt(m) (square-root staffing, Halfin and Whitt 1981), beta taken as the largest that any of a few pool sizes
asks for. That curve is convex, so its tangent at any m0, a m - h with a = 1 - beta / (2 sqrt(m0)) and
h = beta sqrt(m0) / 2, promises nowhere more than the curve. That is the form which the fleet program takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance.mixture import ReplicaCurves
from llmfleet.placement.performance.model import BoolArray, FloatArray

Limit = Literal["ttft", "tpot", "throughput"]

_BISECTIONS = 28
_TAIL_SPREADS = 4.0
_POOL_SIZES = (1, 2, 4, 8, 16)


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
class Reserve:
    """What m replicas hold at least, m at the tangent's best: `share * m - replicas`, in units of `large_pool_rps`."""

    large_pool_rps: float
    """Requests per second of one replica in a pool so large that bursts even out."""
    beta: float
    """Of the staffing curve m - beta sqrt(m)."""
    share: float
    """a: capacity that every further replica brings."""
    replicas: float
    """h: capacity, in replicas, that the pool loses once."""

    def holds(self, replicas: float) -> float:
        """Requests per second that a pool of this many replicas is promised."""
        return self.large_pool_rps * max(0.0, self.share * replicas - self.replicas)


def capacities(
    curves: Sequence[ReplicaCurves], objective: Objective, *, replicas: int = 1, arrivals_cv2: float = 1.0
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
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        ttft, tpot, _ = pools.attainment(middle)
        holds = (ttft >= pools.ttft_share) & (tpot >= pools.tpot_share)
        low, high = np.where(holds, middle, low), np.where(holds, high, middle)
    found = iter(pools.capacities(low, high))
    return [next(found) if one.places else _NOTHING for one in curves]


def pool_reserve(
    curves: ReplicaCurves, objective: Objective, *, expected_replicas: float, arrivals_cv2: float = 1.0
) -> Reserve:
    """The staffing curve of one variant, and its tangent at the pool size that is expected (at least one)."""
    _check(expected_replicas, arrivals_cv2)
    large = large_pool_rps(curves, objective)
    if large <= 0:
        return Reserve(0.0, 0.0, 1.0, 0.0)
    beta = 0.0
    for size in _POOL_SIZES:
        held = capacities([curves], objective, replicas=size, arrivals_cv2=arrivals_cv2)[0].requests_per_second
        beta = max(beta, (1 - held / (size * large)) * math.sqrt(size))
    # Beyond this the tangent would fall with the number of replicas.
    at = max(expected_replicas, beta**2 / 4)
    return Reserve(large, beta, 1 - beta / (2 * math.sqrt(at)), beta * math.sqrt(at) / 2)


def large_pool_rps(curves: ReplicaCurves, objective: Objective) -> float:
    """Requests per second of one replica in a pool so large that every replica is always equally full."""
    if not curves.places:
        return 0.0
    ttft = _kept(curves.weight, objective.ttft.milliseconds, curves.ttft_ms, curves.ttft_spread)
    tpot = _kept(curves.weight, objective.tpot.milliseconds, curves.tpot_ms, curves.tpot_spread)
    holds = (ttft >= objective.ttft.percentile / 100) & (tpot >= objective.tpot.percentile / 100)
    fitting = int(np.argmin(holds)) if not holds.all() else len(holds)
    return float(curves.requests_per_second[:fitting].max(initial=0.0))


_NOTHING = Capacity(0.0, 0.0, 0.0, 0.0, "ttft")


class _Pools:
    """Pools of equal size, one per curve, on a common grid of N = 0 ... H; arrays have shape (pools, H + 1)."""

    def __init__(
        self, curves: Sequence[ReplicaCurves], objective: Objective, replicas: int, arrivals_cv2: float
    ) -> None:
        self._replicas = replicas
        self._follows = 1 - 2 / (max(1.0, arrivals_cv2) + 1)  # q: the chance that another comes in the same batch
        self.ttft_share, self.tpot_share = objective.ttft.percentile / 100, objective.tpot.percentile / 100
        self.most_rps = np.array([replicas * one.requests_per_second.max() for one in curves])
        horizon = max(_horizon(one, objective, replicas) for one in curves)
        self._number = np.arange(horizon + 1.0)
        stacked = [_on_grid(one, objective, replicas, self._number) for one in curves]
        self._rate, self._ttft_kept, self._tpot_kept = (np.stack(part) for part in zip(*stacked, strict=True))

    def attainment(self, rps: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(share within TTFT, share within TPOT, mean number in the pool), each of shape (pools,)."""
        q = self._follows
        joining = rps[:, None] * (1 - q) / self._rate[:, 1:]
        with np.errstate(divide="ignore"):
            logs = np.cumsum(np.log(q + joining), axis=1)
        highest = np.maximum(logs.max(axis=1, keepdims=True), 0.0)
        behind = np.exp(np.concatenate([-highest, logs - highest], axis=1))  # S, up to a factor
        alone = np.concatenate([behind[:, :1], joining * behind[:, :-1]], axis=1)  # pi, up to the same factor
        spare = self._rate[:, -1] - rps
        stable = spare > 0
        spare = np.where(stable, spare, 1.0)
        beyond = rps * behind[:, -1] / spare
        found = (1 - q) * behind.sum(axis=1) + beyond + q * behind[:, -1]
        ttft = ((1 - q) * behind * self._ttft_kept).sum(axis=1) / found
        during = alone * self._number
        outside = beyond * (self._number[-1] + self._rate[:, -1] / spare / (1 - q))
        total = np.maximum(during.sum(axis=1) + outside, 1e-300)
        tpot = ((during * self._tpot_kept).sum(axis=1) + outside * self._tpot_kept[:, -1]) / total
        number = total / (alone.sum(axis=1) + beyond)
        tpot = np.where(rps > 0, tpot, self._tpot_kept[:, 1])
        return np.where(stable, ttft, 0.0), np.where(stable, tpot, 0.0), number

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


def _on_grid(
    curves: ReplicaCurves, objective: Objective, replicas: int, number: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(rate with N in the pool, share within TTFT of those who find N, share within TPOT of those among N)."""
    places = np.arange(1.0, curves.places + 1)
    each = number / replicas
    running_rps = np.concatenate([[0.0], curves.requests_per_second])
    rate = replicas * np.interp(each, np.concatenate([[0.0], places]), running_rps)
    rate[0] = 1.0  # never used: nobody leaves an empty pool
    joined = np.clip((number + 1) / replicas, 1, curves.places)
    waits_ms = 1e3 * np.maximum(number + 1 - replicas * curves.places, 0) / rate[-1]
    ttft_ms = np.stack([np.interp(joined, places, row) for row in curves.ttft_ms]) + waits_ms
    spread = np.stack([np.interp(joined, places, row) for row in curves.ttft_spread])
    ttft = _kept(curves.weight, objective.ttft.milliseconds, ttft_ms, spread)
    running = np.clip(each, 1, curves.places)
    tpot_ms = np.interp(running, places, curves.tpot_ms)
    tpot_spread = np.stack([np.interp(running, places, row) for row in curves.tpot_spread])
    return rate, ttft, _kept(curves.weight, objective.tpot.milliseconds, tpot_ms, tpot_spread)


def _kept(weight: FloatArray, target_ms: float, median_ms: FloatArray, spread: FloatArray) -> FloatArray:
    """Share of requests within a target: weight of shape (sizes,), the others broadcast to (sizes, loads); (loads,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = np.log(target_ms / median_ms) / spread
    sharp = np.where(median_ms <= target_ms, 1.0, 0.0)
    share = np.where(spread > 0, _normal(deviations), sharp)
    return np.asarray((weight[:, None] * share).sum(axis=0))


def _normal(deviations: FloatArray) -> FloatArray:
    """The normal distribution function, within 1e-7 (Abramowitz and Stegun 26.2.17)."""
    size = np.abs(deviations)
    t = 1 / (1 + 0.2316419 * size)
    series = t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-(size**2) / 2) / math.sqrt(2 * math.pi) * series
    return np.where(deviations >= 0, 1 - upper, upper)


def _check(replicas: float, arrivals_cv2: float) -> None:
    if not (math.isfinite(replicas) and replicas >= 1):
        raise ValueError(f"replicas is {replicas!r}; accepted is a number of at least 1")
    if not (math.isfinite(arrivals_cv2) and arrivals_cv2 >= 0):
        raise ValueError(f"arrivals_cv2 is {arrivals_cv2!r}; accepted is a finite number of at least 0")
