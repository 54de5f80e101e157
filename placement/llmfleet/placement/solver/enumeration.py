"""One service alone, to the optimum: every vector of replicas that could be cheaper is looked at, few at a time.

    cheapest(service, limits, gap=...) -> Proven | None        None: too many to look at, or not all can be served

Programs of one service have a handful of integers, and calling a solver on them costs more than solving them. Here the
bounds are closed forms over arrays. For prices w >= 0 of capacity (`unserved` says why), every plan that serves all has

    sum_v w[v] C[v](y[v]) >= D(w) = sum_b min_v w[v] load[b,v]

C being the replicas less the reserve. So with some counts fixed, the least cost of the rest is at least

    D(w) + sum_fixed (h[v](y[v]) - w[v] C[v](y[v])) + sum_rest min_y (h[v](y) - w[v] C[v](y))

where h is the cost with the price of change, convex with one kink, so that the last term needs four values of y only.
A hundred prices around the cost serve at once. They first narrow every variant's counts beside a plan found by
rounding; then variants are fixed one by one, the one with the fewest counts first, keeping what may still be cheaper;
for the last one the cuts say how many it takes. Of the vectors left the cheapest is judged exactly, by the routing
program, whose duals are one cut more. The first that serves all is the optimum, since all that was left out costs more.

A loss that the service has to survive is a scenario beside the one in which nothing is lost: the same cuts without the
variants that are gone, and one more program by which a vector is judged. No cut of one loss is tight where several
bind, which is the rule: pools stand in for each other. So the cuts of all losses are added up, each variant's price
shared out over the losses that it survives.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from llmfleet.placement.solver.problem import Array, Replicas, Service
from llmfleet.placement.solver.unserved import SLACK, Unserved

_NEVER = 1e30
"""Stands for the infinite load of a bucket that a variant cannot serve: 0 times infinity is no number."""
_FACTORS = np.array([0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 0.98, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.5, 5.0, 20.0])
"""Of the cost of one variant, the prices of its capacity that are tried while the others' stay."""
_NOISE = tuple(sigma for sigma in (0.02, 0.05, 0.1, 0.2, 0.4) for _ in range(12))
_NOISE_OF_ORDER = tuple(sigma for sigma in (0.02, 0.05, 0.1, 0.2) for _ in range(5))
_LEAST_WEIGHT = 1e-3
_WHOLE = 1e-6
_TIE = 1e-7
"""Relative: plans cost the same."""
_SEED = 20260
_MOST_ROUNDED = 6
_MOST_JUDGED = 60
"""Vectors given to the routing program at most."""
MOST_VECTORS = 1500
"""Vectors of counts kept at once; more, and a branch and bound with stronger bounds is faster."""


@dataclass(frozen=True)
class Proven:
    """The answer of one service."""

    replicas: Replicas
    cost: float
    """With the price of change."""
    bound: float
    """No plan that serves all costs less."""


def cheapest(service: Service, limits: Array, *, gap: float) -> Proven | None:
    """The cheapest replicas that serve all demand and miss none of the minimum, within `gap` of the bound (0: the
    optimum itself). None where that is not found within the work allowed, whether or not there is such a plan, and
    where variants serve stages."""
    if service.stage is not None or not len(service.rates) or bool((service.change > service.cost).any()):
        return None
    search = _Search(service, limits, gap)
    return search.run() if search.possible else None


class _Search:
    """One search."""

    def __init__(self, service: Service, limits: Array, gap: float) -> None:
        self.service, self.limits, self.gap = service, limits, gap
        self.cost, self.change, self.held = service.cost, service.change, service.held_back
        self.before = np.zeros(service.variants) if service.previous is None else np.array(service.previous, float)
        self.least = np.array(service.least, dtype=np.float64)
        most = np.array(service.most(limits), dtype=np.float64)
        self.high = np.where(most >= self.least, most, 0.0)
        self.low = np.zeros(service.variants)
        usable = np.isfinite(service.load) & (self.high > 0)
        self.load = np.where(usable, service.load, _NEVER)
        self._lost = [np.zeros(service.variants, dtype=bool), *(loss.lost for loss in service.losses)]
        after = (np.where(usable, service.load_without(loss), np.inf) for loss in service.losses)
        self._loads = [self.load, *(np.where(np.isfinite(load), load, _NEVER) for load in after)]
        self.possible = all(bool((load < _NEVER).any(axis=1).all()) for load in self._loads)
        self.prices = np.zeros((0, service.variants))
        self._scenario = np.zeros(0, dtype=np.int64)
        self.cuts = np.zeros(0)
        self.best: Replicas | None = None
        self.value = np.inf
        self._judged = 0
        self._truth: dict[int, Unserved] = {}

    # What is known of a vector

    def charge(self, counts: Array) -> Array:
        """Cost of every variant's counts, shape (..., variants)."""
        charge: Array = self.cost * counts + self.change * np.abs(counts - self.before)
        return charge

    def capacity(self, counts: Array, held: Array | float) -> Array:
        """What counts do after the reserve."""
        capacity: Array = np.where(counts > 0, np.maximum(counts - held, 0.0), 0.0)
        return capacity

    def learn(self, prices: Array, *, each_loss: bool = True) -> None:
        """Adds the cuts of these prices, shape (n, variants): of what is there, and of all losses together; of every
        loss alone where `each_loss`."""
        prices = np.maximum(prices, 1e-12 * prices.max(axis=1, keepdims=True))
        self._add(prices, self._bounds(prices, 0), 0)
        losses = range(1, len(self._loads))
        for scenario in losses if each_loss else ():
            self._add(np.where(self._lost[scenario], 0.0, prices), self._bounds(prices, scenario), scenario)
        if len(losses) > 1:
            survived = len(losses) - np.sum(self._lost[1:], axis=0)
            shared = prices / np.maximum(survived, 1)
            total = np.sum([self._bounds(shared, scenario) for scenario in losses], axis=0)
            self._add(np.where(survived > 0, prices, 0.0), total, -1)

    def _bounds(self, prices: Array, scenario: int) -> Array:
        """D(w) of a scenario at prices of shape (n, variants), shape (n,)."""
        load, left = self._loads[scenario], np.flatnonzero(~self._lost[scenario]).tolist()
        least = np.multiply.outer(prices[:, left[0]], load[:, left[0]])
        for v in left[1:]:
            np.minimum(least, np.multiply.outer(prices[:, v], load[:, v]), out=least)
        total: Array = least.sum(axis=1) * (1 - SLACK)
        return total

    def _add(self, prices: Array, cuts: Array, scenario: int) -> None:
        self.prices = np.vstack([self.prices, prices])
        self.cuts = np.append(self.cuts, cuts)
        self._scenario = np.append(self._scenario, np.full(len(cuts), scenario))

    def learn_covers(self) -> None:
        """Some replica has to serve each bucket: of the variants that can, one at least, and replicas are whole."""
        kinds = np.unique(np.vstack([load < _NEVER for load in self._loads]), axis=0)
        kinds = kinds[~kinds.all(axis=1)]
        if len(kinds):
            first = np.maximum(self.least - self.held, 1e-6)
            dear = np.where(kinds, (self.cost - self.change)[None, :], np.inf).min(axis=1)
            self._add(np.where(kinds, dear[:, None] / first, 0.0), dear * (1 - SLACK), 0)

    def serves(self, counts: Array) -> bool:
        """Whether these counts serve all, whatever is lost; a cut is learnt where they do not."""
        return all(self._serves(counts, scenario) for scenario in range(len(self._loads)))

    def _serves(self, counts: Array, scenario: int) -> bool:
        load = self._loads[scenario]
        capacity = np.where(self._lost[scenario], 0.0, self.capacity(counts, self.held))
        if self._served_greedily(capacity, load, scenario):
            return True
        if scenario not in self._truth:
            weight = np.maximum(self.service.rates / self.service.demand, _LEAST_WEIGHT)
            self._truth[scenario] = Unserved(np.where(load < _NEVER, load, np.inf), weight, self.cost)
        self._judged += 1
        unserved, prices = self._truth[scenario](capacity)
        if unserved > _WHOLE:
            self.learn(prices[None, :])
        return unserved <= _WHOLE

    def _served_greedily(self, capacity: Array, loads: Array, scenario: int) -> bool:
        """Whether all is served when buckets go where the tightest cut's prices say, and what is too much for a variant
        moves on to where it costs least more. If so, no program need be asked."""
        known = self._scenario == scenario if len(self._loads) > 1 else slice(None)
        worth = np.maximum((self.prices[known] * capacity).sum(axis=1), 1e-300)
        prices = self.prices[known][int((self.cuts[known] / worth).argmax())]
        each = np.maximum(prices, 1e-12 * prices.max()) * loads
        at = each.argmin(axis=1)
        load = loads[np.arange(len(at)), at]
        spare = capacity * (1 + SLACK) - np.bincount(at, weights=load, minlength=len(capacity))
        for full in np.flatnonzero(spare < 0).tolist():
            mine = np.flatnonzero(at == full)
            dearer = each[mine] / each[mine, full, None]
            dearer[:, full] = np.inf
            for i, v in zip(*np.unravel_index(dearer.argsort(axis=None), dearer.shape), strict=True):
                here, there = load[mine[i]], loads[mine[i], v]
                if spare[full] >= 0 or there >= _NEVER:
                    break
                share = min(1.0, -spare[full] / loads[mine[i], full], max(0.0, spare[v]) / there)
                share = min(share, here / loads[mine[i], full])
                load[mine[i]] -= share * loads[mine[i], full]
                spare[full] += share * loads[mine[i], full]
                spare[v] -= share * there
            if spare[full] < -1e-12 * capacity[full]:
                return False
        return True

    def allowed(self, vectors: Array) -> npt.NDArray[np.bool_]:
        """By vector, whether the service's own limits hold, but for how much is served; shape (n,)."""
        service = self.service
        fine = (vectors @ service.use.T <= self.limits * (1 + 1e-9) + 1e-9).all(axis=1)
        fine &= ((vectors <= self.high) & ((vectors == 0) | (vectors >= self.least))).all(axis=1)
        total = vectors.sum(axis=1)
        if service.maximum is not None:
            fine &= total <= service.maximum
        if service.distinct is not None:
            fine &= (vectors > 0).sum(axis=1) <= service.distinct
        allowed: npt.NDArray[np.bool_] = fine & (total >= service.minimum)
        return allowed

    # The search

    def run(self) -> Proven | None:
        """The answer."""
        variants = self.service.variants
        around = np.tile(self.cost, (len(_FACTORS) * variants + 1, 1))
        for v in range(variants):
            around[v * len(_FACTORS) : (v + 1) * len(_FACTORS), v] *= _FACTORS
        self.learn(around, each_loss=False)
        (noise,) = _noises(_NOISE, (variants,))
        self.learn(self.cost * noise)
        self.learn_covers()
        self._round()
        if self.best is None:
            return None
        # The optimum itself is rarely more work, and its bound lets the caller keep more.
        answers = (self._look(gap) for gap in dict.fromkeys((_TIE, max(self.gap, _TIE))))
        return next((answer for answer in answers if answer is not None), None)

    def _look(self, gap: float) -> Proven | None:
        """Looks for plans that are cheaper by more than this share; None where there are too many to look at."""
        below = self.value * (1 - gap)
        for _ in range(2):
            if not self._narrow(below):
                return self._answer(below)
        order = sorted(
            np.flatnonzero(self.high > 0).tolist(), key=lambda v: (self.high[v] - self.low[v], -self.cost[v])
        )
        self._learn_order(order)
        vectors = self._enumerate(order, below)
        return None if vectors is None else self._judge(vectors, order[-1], below)

    def _learn_order(self, order: list[int]) -> None:
        """Adds cuts that are tight where the first few variants of an order are fixed: the others at their cost."""
        counts = tuple(range(2, len(order)))
        for count, noise in zip(counts, _noises(_NOISE_OF_ORDER, counts), strict=True):
            near = np.tile(self.cost, (len(noise), 1))
            near[:, order[:count]] *= noise
            self.learn(near, each_loss=False)

    def _answer(self, bound: float) -> Proven:
        assert self.best is not None
        return Proven(self.best, self.value, bound)

    def _round(self) -> None:
        """A plan to begin with: the relaxation rounded in all ways or the plan in force, one variant filling up; where
        none serves all, what surely does: the relaxation rounded up, or one variant alone."""
        relaxed: Array = np.max([self._relaxed(load) for load in self._loads], axis=0)
        used = relaxed > 0
        relaxed = np.where(used, np.maximum(relaxed + self.held, self.least), 0.0)
        sure = [np.ceil(relaxed * (1 - 1e-9))]
        alone = np.diag(np.array(self.service.need, dtype=np.float64))
        sure += list(alone[np.all([(load < _NEVER).all(axis=0) for load in self._loads], axis=0)])
        last = min(np.flatnonzero(used).tolist(), key=lambda v: (self.cost[v], v))
        others = [v for v in np.flatnonzero(used).tolist() if v != last]
        others = sorted(others, key=lambda v: (abs(relaxed[v] % 1 - 0.5), v))[:6]
        ways = np.array(list(itertools.product((0.0, 1.0), repeat=len(others))))
        rounded: Array = np.tile(np.round(relaxed), (len(ways), 1))
        rounded[:, others] = np.floor(relaxed[others]) + ways
        rounded = np.where(rounded > 0, np.maximum(rounded, self.least), 0.0)
        if self.service.previous is not None:
            rounded = np.vstack([rounded, self.before])
        for _ in range(_MOST_ROUNDED):
            full = self._filled(rounded, last)
            if not self._take(full) or self.best is not None:
                break
        self._take(np.array(sure))

    def _relaxed(self, load: Array) -> Array:
        """Fractions of replicas by variant, every bucket where it costs least."""
        cheapest = (self.cost * load).argmin(axis=1)
        loads = load[np.arange(len(cheapest)), cheapest]
        relaxed: Array = np.bincount(cheapest, weights=loads, minlength=len(self.cost)).astype(np.float64)
        return relaxed

    def _take(self, vectors: Array) -> bool:
        """Judges the cheapest of some vectors and notes it if it is the best plan; False where none would be."""
        value = np.where(self.allowed(vectors), self.charge(vectors).sum(axis=1), np.inf)
        first = int(value.argmin())
        if value[first] >= self.value:
            return False
        if self.serves(vectors[first]):
            self.value, self.best = float(value[first]), _counts(vectors[first])
        return True

    def _filled(self, vectors: Array, last: int) -> Array:
        """With the fewest replicas of variant `last` with which every cut holds; more than are allowed, where no
        number does."""
        capacity = self.capacity(vectors, self.held)
        capacity[:, last] = 0.0
        # Not `@`: a product of this shape wakes up threads that take longer to come than it takes.
        lacking = np.repeat(self.cuts[:, None], len(vectors), axis=1)
        for v in np.flatnonzero(capacity.any(axis=0)).tolist():
            lacking -= np.multiply.outer(self.prices[:, v], capacity[:, v])
        prices = self.prices[:, last]
        helps = prices > 0
        need = (lacking[helps] / prices[helps, None]).max(axis=0)
        need[(lacking[~helps] > 1e-9 * self.cuts[~helps, None]).any(axis=0)] = np.inf
        counts = np.where(
            need > 1e-9, np.maximum(np.ceil((need + self.held[last]) * (1 - 1e-9)), self.least[last]), 0.0
        )
        filled = vectors.copy()
        filled[:, last] = 0.0
        lacking_to_minimum = self.service.minimum - filled.sum(axis=1)
        counts = np.where(lacking_to_minimum > counts, np.maximum(lacking_to_minimum, self.least[last]), counts)
        filled[:, last] = np.minimum(np.maximum(counts, self.low[last]), self.high[last] + 1)
        return filled

    def _rest(self) -> Array:
        """By cut and variant, the least of h(y) - w C(y) over the counts that are left, shape (cuts, variants)."""
        first = np.maximum(self.low, self.least)
        least = np.full(self.prices.shape, np.inf)
        for counts in (first, self.high, np.clip(self.before, first, np.maximum(self.high, first))):
            value = self.charge(counts) - self.prices * (counts - self.held)
            least = np.minimum(least, np.where(self.high >= first, value, np.inf))
        return np.where(self.low <= 0, np.minimum(least, self.change * self.before), least)

    def _range(self, spare: Array, v: int, prices: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
        """Counts of v above zero for which h(y) - w C(y) stays below `spare` (cuts, n) at `prices` (cuts,): from, to,
        shape (n,); and whether zero does."""
        first, last = max(float(self.least[v]), float(self.low[v])), float(self.high[v])
        low, high = np.full(spare.shape[1], first), np.full(spare.shape[1], last)
        before = self.change[v] * self.before[v]
        for side in (1.0, -1.0) if self.change[v] > 0 else (1.0,):
            slope = self.cost[v] + side * self.change[v] - prices
            room = (
                spare if not before and not self.held[v] else spare + (side * before - prices * self.held[v])[:, None]
            )
            rising, falling = slope > 1e-9 * self.cost[v], slope < -1e-9 * self.cost[v]
            if rising.any():
                edge = (room[rising] / slope[rising, None]).min(axis=0)
                high = np.minimum(high, np.floor(edge + 1e-9 * np.abs(edge)))
            if falling.any():
                edge = (room[falling] / slope[falling, None]).max(axis=0)
                low = np.maximum(low, np.ceil(edge - 1e-9 * np.abs(edge)))
            flat = ~(rising | falling)
            if flat.any():
                high = np.where((room[flat] > 0).all(axis=0), high, -1.0)
        return low, high, (spare > before).all(axis=0) & (self.low[v] <= 0)

    def _narrow(self, below: float) -> bool:
        """Narrows every variant's counts to those of plans below a cost; False where there are none."""
        rest = self._rest()
        total = self.cuts + rest.sum(axis=1)
        for v in range(len(self.cost)):
            low, high, zero = self._range((below - total + rest[:, v])[:, None], v, self.prices[:, v])
            some = bool(high[0] >= low[0])
            if not some and not zero[0]:
                return False
            self.low[v] = 0.0 if zero[0] else low[0]
            self.high[v] = high[0] if some else 0.0
        return bool(self.high.any())

    def _enumerate(self, order: list[int], below: float) -> Array | None:
        """Vectors that may be part of a plan below a cost, the last variant of the order open; None where there are
        too many."""
        rest = self._rest()
        spare = (below - self.cuts - rest.sum(axis=1))[:, None]
        vectors = np.zeros((1, len(self.cost)))
        for v in order[:-1]:
            prices = self.prices[:, v]
            spare = spare + rest[:, v, None]
            low, high, zero = self._range(spare, v, prices)
            counts = np.maximum(high - low + 1, 0).astype(np.int64)
            if counts.sum() + zero.sum() > MOST_VECTORS:
                return None
            which = np.repeat(np.arange(len(vectors)), counts)
            value = low[which] + np.arange(len(which)) - (np.cumsum(counts) - counts)[which]
            without = np.flatnonzero(zero)
            which, value = np.append(which, without), np.append(value, np.zeros(len(without)))
            vectors = vectors[which]
            vectors[:, v] = value
            if not len(vectors):
                break
            charge = self.cost[v] * value + self.change[v] * np.abs(value - self.before[v])
            spare = spare[:, which] - charge + np.multiply.outer(prices, self.capacity(value, float(self.held[v])))
        return vectors

    def _judge(self, vectors: Array, last: int, below: float) -> Proven | None:
        """The cheapest of the vectors that serves all; the best plan so far where none below the cost does."""
        while self._judged < _MOST_JUDGED * len(self._loads):
            full = self._filled(vectors, last)
            value = np.where(self.allowed(full), self.charge(full).sum(axis=1), np.inf)
            open_ = value < below
            if not open_.any():
                return self._answer(below)
            vectors, full, value = vectors[open_], full[open_], value[open_]
            first = int(value.argmin())
            if self.serves(full[first]):
                return Proven(_counts(full[first]), float(value[first]), float(value[first]))
        return None


@cache
def _noises(sigmas: tuple[float, ...], widths: tuple[int, ...]) -> tuple[Array, ...]:
    """Factors around 1, for each width an array of shape (sigmas, width): equal services are tried at equal prices."""
    chance = np.random.default_rng(_SEED)
    spread = np.array(sigmas)[:, None]
    return tuple(np.exp(chance.normal(size=(len(sigmas), width)) * spread) for width in widths)


def _counts(vector: Array) -> Replicas:
    return tuple(int(count) for count in vector)
