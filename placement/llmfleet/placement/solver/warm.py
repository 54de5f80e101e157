"""A solved fleet in which a few services have changed: a new plan with proof, without solving the others again.

The bounds of all other services at the stored prices still hold, so one pricing of each changed service proves a
new bound at once. For the plan, the changed services first take the best of their columns that fits beside what all
others have; where that is not close enough to the bound, the master program chooses among all good columns; and where
that is not either, full rounds follow, in which the services that did not change have little left to do.

What changes the shape of the problem (rows, limits, who takes part, something that cannot be served) is solved anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.closing import close_gap
from llmfleet.placement.solver.decomposition import Rounds, Share, closed
from llmfleet.placement.solver.limits import Limits
from llmfleet.placement.solver.pricing import Pricer, Terms
from llmfleet.placement.solver.problem import Array, Problem, Replicas, Service
from llmfleet.placement.solver.two_phase import Lexicographic, Solution

_SLACK = 3e-3
"""Reduced cost, relative to the bound, up to which a column may be part of the new plan."""
_NODES = 60


class Solver:
    """Solves one problem after the other, and what did not change only once. Its answers depend on what it was asked
    before; each has its own proof."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._solved: Lexicographic | None = None

    def solve(self, problem: Problem, deadline: Deadline, *, start: Sequence[Replicas] | None = None) -> Solution:
        """Solves a problem; `start` is a plan that may be good, such as the one in force."""
        found = None if self._solved is None else resolve(self._solved, problem, deadline)
        if found is None:
            pool = None if self._solved is None else self._known(self._solved, problem)
            self._solved = Lexicographic(problem, self._limits, deadline, pool)
            found = self._solved.solve(start)
        return found

    @staticmethod
    def _known(before: Lexicographic, problem: Problem) -> Callable[[Service, bool], Pricer]:
        """Programs of services that did not change, with all they have learnt."""
        known = before.pricers() if np.array_equal(before.problem.limits, problem.limits) else {}

        def find(service: Service, whole: bool) -> Pricer:
            pricer = known.get((service.key, whole))
            if pricer is not None and same(pricer.service, service):
                return pricer
            return Pricer(service, problem.limits, whole=whole)

        return find


def resolve(solved: Lexicographic, problem: Problem, deadline: Deadline, *, most: int = 8) -> Solution | None:
    """The solution of `problem`, which differs from the solved one in at most `most` services; None where it has to be
    solved anew. `solved` then stands for the new problem. Asks for twice the gap of the first solve at once."""
    rounds, limits = solved.last, solved.limits
    if rounds is None or rounds.best.replicas is None or not _same_shape(solved.problem, problem):
        return None
    changed = [
        s
        for s, (old, new) in enumerate(zip(solved.problem.services, problem.services, strict=True))
        if old is not new and not same(old, new)
    ]
    if len(changed) > most:
        return None
    solved.deadline = rounds.deadline = deadline
    columns = list(rounds.best.columns)
    bounds, prices = rounds.best.bounds.copy(), rounds.best.prices
    for s in changed:
        columns[s] = -1
        _exchange(solved, rounds, s, problem.services[s])
    if changed:
        fresh = rounds.price_some(changed, prices)
        if np.isinf(fresh).any():
            solved.last = None
            return None
        bounds[changed] = fresh[changed]
        best = rounds.best
        best.value, best.replicas, best.columns, best.rounds = float("inf"), None, [], 0
        best.bounds, best.bound = bounds, float(bounds.sum()) - float(prices @ rounds.phase.limits)
        rounds.collect()
        _fit(rounds, columns, changed)
        wide = replace(rounds.limits, gap=2 * rounds.limits.gap)
        if not closed(best.value, best.bound, rounds.phase, wide):
            _choose(rounds)
        if not closed(best.value, best.bound, rounds.phase, wide) and not deadline.hit:
            rounds.run(prices)
            # As in a cold solve: few services leave a gap that no prices close.
            if not closed(best.value, best.bound, rounds.phase, wide) and len(bounds) <= 3 * limits.closing_services:
                close_gap(rounds)
        if best.replicas is None:
            solved.last = None
            return None
        return solved.served_solution(best, done=closed(best.value, best.bound, rounds.phase, wide))
    return solved.served_solution(rounds.best, done=True)


def same(old: Service, new: Service) -> bool:
    """Whether two services have equal answers."""

    def equal(a: Array | None, b: Array | None) -> bool:
        return a is b or (a is not None and b is not None and np.array_equal(a, b))

    return (
        (old.key, old.priority, old.minimum, old.maximum, old.distinct, old.previous)
        == (new.key, new.priority, new.minimum, new.maximum, new.distinct, new.previous)
        and equal(old.rates, new.rates)
        and equal(old.throughput, new.throughput)
        and equal(old.cost, new.cost)
        and equal(old.use, new.use)
        and equal(old.switching, new.switching)
        and equal(old.reserve, new.reserve)
        and len(old.losses) == len(new.losses)
        and all(
            a.keep == b.keep and np.array_equal(a.lost, b.lost) for a, b in zip(old.losses, new.losses, strict=True)
        )
    )


def _same_shape(old: Problem, new: Problem) -> bool:
    return (
        old.rows == new.rows
        and np.array_equal(old.limits, new.limits)
        and [service.key for service in old.services] == [service.key for service in new.services]
    )


def _exchange(solved: Lexicographic, rounds: Rounds, s: int, service: Service) -> None:
    """A new program for a changed service, taught by the old one: prices of capacity, and plans scaled to the rate."""
    old = rounds.phase.pricers[s]
    pricer = Pricer(service, solved.problem.limits, whole=True)
    share = rounds.phase.shares[s]
    share = Share(Terms(service.cost, service.change, 0.0, 0.0), service.use, share.unserved_use, share.missing_use)
    terms = share.priced(rounds.best.prices)
    if old.service.variants == service.variants:
        for scenario in sorted(set(old.cut_scenarios)):
            if scenario <= len(service.losses):
                known = [w for w, of in zip(old.cut_prices, old.cut_scenarios, strict=True) if of == scenario]
                pricer.cut(np.array(known), scenario)
        assert rounds.best.replicas is not None
        counts = np.array(rounds.best.replicas[s], dtype=np.float64)
        scale = service.demand / old.service.demand if old.service.demand > 0 else 1.0
        for start in (counts, np.round(counts * scale), np.ceil(counts * scale)):
            pricer.add_near(start, terms)
    rounds.swap(s, pricer, share)
    solved.replace(s, service, pricer)


def _fit(rounds: Rounds, columns: list[int], changed: list[int]) -> None:
    """The changed services take, one after the other, the cheapest of their columns that fits beside the others."""
    phase = rounds.phase
    left = phase.limits.copy()
    for s, column in enumerate(columns):
        if column >= 0:
            left -= phase.pricers[s].uses(phase.shares[s].use)[column]
    for s in changed:
        pricer, share = phase.pricers[s], phase.shares[s]
        use, values = pricer.uses(share.use), pricer.values(share.terms)
        fitting = np.flatnonzero((use <= left + 1e-9).all(axis=1)) if len(values) else np.zeros(0, dtype=np.int64)
        if not len(fitting):
            return
        columns[s] = int(fitting[values[fitting].argmin()])
        left -= use[columns[s]]
    rounds.take(columns)


def _choose(rounds: Rounds) -> None:
    box = 3.0 * rounds.best.prices + 0.45 * rounds.phase.unit
    priced = rounds.master.solve(box, rounds.deadline)
    if priced is None:
        return
    chosen = rounds.master.choose(
        priced,
        rounds.best.columns or None,
        slack=_SLACK * abs(rounds.best.bound),
        relative=rounds.limits.gap,
        deadline=rounds.deadline,
        nodes=_NODES,
    )
    if chosen is not None:
        rounds.take(chosen)
