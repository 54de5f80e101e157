"""One phase: the least total of a linear objective over all services within the shared rows, with a proof.

Prices on the rows take the services apart. Each round prices every service at the same prices (in two threads; a
service's answer depends on nothing but its own history, so their order does not matter), which proves

    L(prices) = sum_s bound_s(prices) - prices . limits   <=   the least total, whatever the prices,

and finds columns, out of which the master program makes the next prices and the plan. Prices are damped: 0.4 of the
best seen and 0.6 of the master's. It ends at the gap, or when the rounds are used up, or when time is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.cut_program import Terms
from llmfleet.placement.solver.limits import Limits
from llmfleet.placement.solver.master import Master, Priced
from llmfleet.placement.solver.nodes import Packing
from llmfleet.placement.solver.pricing import Pricer
from llmfleet.placement.solver.problem import Array, Replicas
from llmfleet.placement.solver.relaxation import Relaxed, relax


@dataclass(frozen=True)
class Share:
    """One service's part of a phase: what its quantities count for in the objective and in the rows."""

    terms: Terms
    use: Array
    """Per replica, shape (rows, variants)."""
    unserved_use: Array
    """Per share of its demand unserved, shape (rows,)."""
    missing_use: Array
    """Per replica missing, shape (rows,)."""

    def priced(self, prices: Array) -> Terms:
        """The terms with the rows' prices in them."""
        return Terms(
            self.terms.cost + prices @ self.use,
            self.terms.change,
            self.terms.unserved + float(prices @ self.unserved_use),
            self.terms.missing + float(prices @ self.missing_use),
        )


@dataclass(frozen=True)
class Phase:
    """An objective over services, and the rows they share in it."""

    pricers: Sequence[Pricer]
    shares: Sequence[Share]
    limits: Array
    unit: Array
    """What a unit of a row is worth at a guess, to begin the search for prices with; shape (rows,)."""
    packing: Packing
    """Devices that are paid for by the node."""
    absolute: float = 0.0
    """A gap this small counts as closed."""
    idle: float = 0.0
    """What the price of an idle device counts for in the objective."""

    @property
    def before(self) -> float:
        """What is idle before anything is planned, in the objective: the rest of a bill is counted from there."""
        return self.idle * self.packing.before if self.packing else 0.0


@dataclass
class Found:
    """What a phase found."""

    replicas: list[Replicas] | None
    value: float
    """Of these replicas; infinite without."""
    bound: float
    prices: Array
    """At which the bound holds."""
    bounds: Array
    """Bound of each service at these prices."""
    rounds: int = 0
    fits: bool = True
    """False if even mixtures of columns did not fit the rows."""
    columns: list[int] = field(default_factory=list)

    @property
    def gap(self) -> float:
        """Relative gap, zero where the value is."""
        if not np.isfinite(self.value):
            return float("inf")
        return max(0.0, self.value - self.bound) / self.value if self.value > 0 else 0.0


PROVEN = 1e-6
"""Relative gap below which a value is the optimum: bounds are relaxed by about this against floating point."""
_NEAR = 2.0
"""How many times the gap asked of a shortage mixtures of columns may be from the bound when the rounds end: the last
few come at the price of all before."""
_MATTERS = 0.05
"""Share of what is open that a single service may leave open for want of nodes."""
_COARSE = 0.02
"""Relative tolerance of the first round of pricing where nothing is known of the prices."""


def closed(value: float, bound: float, phase: Phase, limits: Limits) -> bool:
    """Whether a value is close enough to its bound."""
    return bool(np.isfinite(value)) and bool(value - bound <= max(max(limits.gap, PROVEN) * abs(value), phase.absolute))


class Rounds:
    """The rounds of one phase."""

    def __init__(self, phase: Phase, limits: Limits, deadline: Deadline, *, any_plan: bool = False) -> None:
        """`any_plan`: a plan within the rows is all that is wanted, whatever its proof."""
        self.phase, self.limits, self.deadline, self._any_plan = phase, limits, deadline, any_plan
        rows = len(phase.limits)
        self.master = Master(len(phase.pricers), phase.limits, phase.packing)
        self._added = [0] * len(phase.pricers)
        self.best = Found(None, np.inf, -np.inf, np.zeros(rows), np.zeros(len(phase.pricers)))
        self._order = sorted(range(len(phase.pricers)), key=lambda s: (-sum(phase.pricers[s].most), s))
        # Where the objective is another than cost, nothing is known of the prices: no need to be exact at first.
        exact = limits.gap == 0 or (phase.absolute == 0 and not any_plan)
        self._relative = limits.pricing if exact else max(_COARSE, limits.pricing)

    def prices_to_start(self) -> tuple[Array, bool]:
        """Prices of the linear relaxation, and whether it fits the rows."""
        phase = self.phase
        return relax(
            [Relaxed(pricer.service, whole=pricer.whole) for pricer in phase.pricers],
            [share.terms for share in phase.shares],
            [share.use for share in phase.shares],
            [share.unserved_use for share in phase.shares],
            phase.limits,
            np.zeros(len(phase.limits)),
            phase.unit,
            self.deadline,
        )

    def price(self, prices: Array) -> Array:
        """Bounds of all services at these prices, shape (services,); notes the best total."""
        bounds = self.price_some(self._order, prices)
        total = self.bound_of(bounds, prices)
        if total > self.best.bound:
            self.best.bound, self.best.prices, self.best.bounds = total, prices, bounds
        return bounds

    def bound_of(self, bounds: Array, prices: Array) -> float:
        """The bound of all that those of the services at these prices prove: no fewer devices than none are idle."""
        return float(bounds.sum()) - float(prices @ self.phase.limits) - self.phase.before

    def price_some(self, which: Sequence[int], prices: Array) -> Array:
        """Bounds of these services at these prices, shape (services,); zero for the others."""
        phase = self.phase
        floor = max(abs(self.best.bound) if np.isfinite(self.best.bound) else 0.0, 0.0)
        absolute = max(0.3 * self.limits.gap * floor, 0.3 * phase.absolute) / max(1, len(phase.pricers))

        def one(s: int) -> float:
            pricer, terms = phase.pricers[s], phase.shares[s].priced(prices)
            if self.deadline.remaining <= 0:
                self.deadline.hit = True
                return pricer.linear_bound(terms)
            return pricer.price(terms, relative=self._relative, absolute=absolute, deadline=self.deadline)

        bounds = np.zeros(len(phase.pricers))
        for s, bound in zip(which, each(one, which, self.limits.threads), strict=True):
            bounds[s] = bound
        return bounds

    def collect(self) -> None:
        """Gives the master program the columns found since."""
        if self.master.mostly_retired:
            self.master = Master(len(self.phase.pricers), self.phase.limits, self.phase.packing)
            self._added = [0] * len(self.phase.pricers)
        for s, (pricer, share) in enumerate(zip(self.phase.pricers, self.phase.shares, strict=True)):
            first = self._added[s]
            if first == len(pricer.replicas):
                continue
            values = pricer.values(share.terms)[first:]
            use = pricer.uses(share.use)[first:]
            use = use + np.outer(pricer.shortage[first:, 0], share.unserved_use)
            use = use + np.outer(pricer.shortage[first:, 1], share.missing_use)
            packing = self.phase.packing
            nodes = pricer.uses(packing.weights(share.use))[first:] if packing else None
            self.master.add(s, first, values, use, nodes)
            self._added[s] = len(pricer.replicas)

    def swap(self, s: int, pricer: Pricer, share: Share) -> None:
        """Puts another service in a service's place: what was found of the others stays, and so do their bounds."""
        self.phase = replace(
            self.phase,
            pricers=[pricer if i == s else old for i, old in enumerate(self.phase.pricers)],
            shares=[share if i == s else old for i, old in enumerate(self.phase.shares)],
        )
        self.master.retire(s)
        self._added[s] = 0

    def offer(self, replicas: Sequence[Replicas]) -> None:
        """Makes a plan known that might be good: its columns, and the plan itself if it fits."""
        columns = [pricer.add(counts) for pricer, counts in zip(self.phase.pricers, replicas, strict=True)]
        if all(column is not None for column in columns):
            self.take([column for column in columns if column is not None])

    def take(self, columns: list[int]) -> None:
        """Notes a plan if it fits and is better than the best."""
        phase, value, used = self.phase, 0.0, np.zeros(len(self.phase.limits))
        for s, column in enumerate(columns):
            value += float(phase.pricers[s].values(phase.shares[s].terms)[column])
            used += self.taken(s, column)
        if phase.packing:
            counts = [pricer.replicas[column] for pricer, column in zip(phase.pricers, columns, strict=True)]
            idle = phase.packing.idle([share.use for share in phase.shares], counts)
            value += phase.idle * float(phase.packing.price @ idle) - phase.before
            used += idle @ phase.packing.takes
        if (used <= phase.limits * (1 + 1e-9) + 1e-9).all() and value < self.best.value:
            self.best.value, self.best.columns = value, columns
            self.best.replicas = [p.replicas[c] for p, c in zip(phase.pricers, columns, strict=True)]

    def taken(self, s: int, column: int) -> Array:
        """What a service's column takes of every row, shape (rows,)."""
        pricer, share = self.phase.pricers[s], self.phase.shares[s]
        short, missing = pricer.shortage[column]
        taken: Array = pricer.uses(share.use)[column] + short * share.unserved_use + missing * share.missing_use
        return taken

    def _over(self, priced: Priced) -> bool:
        return bool((priced.overflow > 1e-9 * np.maximum(self.phase.limits, 1.0)).any())

    @property
    def done(self) -> bool:
        """Whether the best plan is close enough to the bound."""
        return closed(self.best.value, self.best.bound, self.phase, self.limits)

    def run(self, prices: Array, *, until: Callable[[Rounds], bool] | None = None) -> Found:
        """Rounds from these prices on, until done, out of rounds or time, or `until` says so."""
        phase, best = self.phase, self.best
        box = 3.0 * prices + 0.45 * phase.unit
        stalled, before = 0, np.inf
        for number in range(self.limits.rounds):
            best.rounds += 1
            bounds = self.price(prices)
            if np.isinf(bounds).any():
                best.fits = False
                best.bound = float("inf")
                return best
            self.collect()
            priced = self.master.solve(box, self.deadline)
            grown = 0
            # With a plan at hand the columns do fit, at some price.
            while priced is not None and self._over(priced) and grown < (2 if best.replicas is None else 20):
                box = np.where(priced.overflow > 0, 2.0 * box + phase.unit, box)
                priced = self.master.solve(box, self.deadline)
                grown += 1
            if priced is None or self.deadline.hit:
                break
            best.fits = not priced.blank and not self._over(priced)
            mixed = priced.value - phase.before
            converged = closed(mixed, best.bound, replace(phase, absolute=_NEAR * phase.absolute), self.limits)
            last = number == self.limits.rounds - 1
            if best.fits and (self._any_plan or converged or last or number % 3 == 2):
                slack = max(mixed - best.bound, self.limits.gap * abs(mixed), phase.absolute)
                slack += phase.idle * phase.packing.dearest
                chosen = self.master.choose(
                    priced,
                    best.columns or None,
                    slack=slack,
                    relative=0.4 * self.limits.gap,
                    # Of a shortage, no closer than the prices are.
                    absolute=max(0.5 * phase.absolute, mixed - best.bound) if phase.absolute > 0 else 0.0,
                    deadline=self.deadline,
                    nodes=self.limits.master_nodes,
                    idle=phase.idle,
                )
                if chosen is not None:
                    self.take(chosen)
            if self.done or self.deadline.hit or (until is not None and until(self)):
                break
            if converged and best.fits and phase.absolute > 0:
                break  # what is open is not the prices'
            open_gap = (mixed if phase.absolute > 0 else best.value) - best.bound
            stalled = stalled + 1 if np.isfinite(open_gap) and open_gap > 0.9 * before else 0
            before = min(before, open_gap)
            if stalled >= 3:
                break
            self._refine(mixed)
            prices = 0.4 * best.prices + 0.6 * priced.prices
        return best

    def _refine(self, mixed: float) -> None:
        """How exactly the next round prices: a part of what is open between the bound and the value of mixtures. The
        services' bounds add up to much more than the total where rows are dear, and so do their tolerances."""
        best, phase = self.best, self.phase
        still_open = max(mixed - best.bound, self.limits.gap * abs(mixed), phase.absolute)
        for pricer in phase.pricers:
            if pricer.cut_short > _MATTERS * still_open:
                pricer.search_more()
        total = best.bound + float(best.prices @ phase.limits) + phase.before
        if not np.isfinite(total) or total <= 0:
            return
        least = min(1e-3, self.limits.pricing) * max(abs(best.bound), phase.absolute) / total
        self._relative = max(least, min(0.85 * self._relative, 0.2 * max(0.0, mixed - best.bound) / total))


def each(one: Callable[[int], float], order: Sequence[int], threads: int) -> list[float]:
    """`one` of every number, in this order; HiGHS lets go of the interpreter while it solves."""
    if threads < 2 or len(order) < 4:
        return [one(s) for s in order]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, order))
