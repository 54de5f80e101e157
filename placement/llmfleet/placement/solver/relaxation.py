"""Shadow prices to start from: those of the fleet's linear relaxation, found without building it.

At given prices of the rows a relaxed service falls apart into its buckets: each goes to the variant with the cheapest
capacity, or stays unserved where that is cheaper, and the number of replicas is what this load needs. That is a few
array operations for a whole fleet. So the relaxation is solved by the same master program, over fractional columns:
about a dozen rounds.
"""

from __future__ import annotations

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.cut_program import Terms
from llmfleet.placement.solver.master import Master
from llmfleet.placement.solver.problem import Array, Service
from llmfleet.placement.solver.stages import cheapest_load, cheapest_way


class Relaxed:
    """The relaxation of one service: loads and weights of its buckets."""

    def __init__(self, service: Service, *, whole: bool) -> None:
        self.whole = whole
        self.load, self.stage = service.load, service.stage
        self.weight = service.rates / service.demand if len(service.rates) else service.rates

    def price(self, terms: Terms) -> tuple[Array, float, float]:
        """(fractional replicas, unserved share, least cost) at these prices."""
        variants = len(terms.cost)
        if not len(self.weight):
            return np.zeros(variants), 0.0, 0.0
        # A price of nothing is no price: among free variants those that need fewer replicas are better.
        each = np.where(np.isinf(self.load), np.inf, (terms.cost + 1e-12)[None, :] * self.load)
        cheapest = cheapest_way(each, self.stage)
        served = np.isfinite(cheapest) if self.whole else cheapest < terms.unserved * self.weight
        if self.stage is None:
            best = each.argmin(axis=1)[served]
            load = self.load[served, best]
            replicas = np.bincount(best, weights=load, minlength=variants).astype(np.float64)
        else:
            replicas = cheapest_load(each, self.load, self.stage)[served].sum(axis=0)
        unserved = float(self.weight[~served].sum())
        return replicas, unserved, float(np.where(served, cheapest, terms.unserved * self.weight).sum())


def fits_loosely(overflow: Array, limits: Array) -> bool:
    """Whether what does not fit is rounding."""
    return bool((overflow <= 1e-6 * np.maximum(limits, 1.0)).all())


def relax(
    services: list[Relaxed],
    terms: list[Terms],
    use: list[Array],
    unserved_use: list[Array],
    limits: Array,
    start: Array,
    box: Array,
    deadline: Deadline,
    *,
    rounds: int = 25,
) -> tuple[Array, bool]:
    """Prices of the rows, and whether the relaxation fits the rows at all.

    `terms` at no price; `use` (rows, variants) and `unserved_use` (rows,) by service; `start` prices to begin with.
    """
    master = Master(len(services), limits)
    prices, best, best_value = start, start, -np.inf
    counts = [0] * len(services)
    fits = False
    for _ in range(rounds):
        value = -float(prices @ limits)
        for s, (service, own, mine, short) in enumerate(zip(services, terms, use, unserved_use, strict=True)):
            priced = Terms(own.cost + prices @ mine, own.change, own.unserved + float(prices @ short), own.missing)
            replicas, unserved, cost = service.price(priced)
            value += cost
            total = float(own.cost @ replicas) + own.unserved * unserved
            master.add(s, counts[s], np.array([total]), (mine @ replicas + short * unserved)[None, :])
            counts[s] += 1
        if value > best_value:
            best_value, best = value, prices
        answer = master.solve(box, deadline)
        if answer is None:
            break
        fits = not answer.blank and fits_loosely(answer.overflow, limits)
        if fits and answer.value - best_value <= 2e-3 * abs(answer.value):
            break
        if not fits:
            box = np.where(answer.overflow > 0, box * 2, box)
        prices = 0.4 * best + 0.6 * answer.prices
    return best, fits
