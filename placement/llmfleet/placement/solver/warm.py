"""A solved fleet in which a few services have changed: a new plan with proof, without solving the others again.

The bounds of all other services at the stored prices still hold, so one pricing of each changed service proves a
new bound at once. For the plan, the changed services first take the best of their columns that fits beside what all
others have; where that is not close enough to the bound, the master program chooses among all good columns; and where
that is not either, full rounds follow, in which the services that did not change have little left to do.

A service of which only the replicas in force are others, as all are that a plan has moved, is not even priced: its
bound falls by no more than what moving has cost (`_rebased`).

What changes the shape of the problem (rows, limits, who takes part, something that cannot be served) is solved anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.closing import close_gap
from llmfleet.placement.solver.cut_program import Terms
from llmfleet.placement.solver.decomposition import Rounds, Share, closed
from llmfleet.placement.solver.limits import Limits
from llmfleet.placement.solver.pricing import Pricer
from llmfleet.placement.solver.problem import Array, Problem, Replicas, Service
from llmfleet.placement.solver.stages import Stage
from llmfleet.placement.solver.two_phase import Lexicographic, Solution

_SLACK = 3e-3
"""Reduced cost, relative to the bound, up to which a column may be part of the new plan."""
_NODES = 60
_MOST_TAUGHT = 120
"""Cuts that a changed service is taught: more only pile up, change after change."""
_MOST_AGAIN = 200
"""Times that a solution is changed before all is solved anew, and what was learnt and is of no use is gone."""


class Solver:
    """Solves one problem after the other, and what did not change only once. Its answers depend on what it was asked
    before; each has its own proof."""

    def __init__(self, limits: Limits) -> None:
        """`limits` may be others for every solve."""
        self.limits = limits
        self._solved: Lexicographic | None = None
        self._again = 0

    def solve(self, problem: Problem, deadline: Deadline, *, start: Sequence[Replicas] | None = None) -> Solution:
        """Solves a problem; `start` is a plan that may be good, such as the one in force."""
        return self.again(problem, deadline) or self.anew(problem, deadline, start=start)

    def again(self, problem: Problem, deadline: Deadline) -> Solution | None:
        """The solution, got by putting what changed into the last one; None where it has to be solved anew."""
        if self._solved is None or self._again >= _MOST_AGAIN:
            return None
        self._again += 1
        return resolve(self._solved, problem, self.limits, deadline)

    def anew(
        self,
        problem: Problem,
        deadline: Deadline,
        *,
        start: Sequence[Replicas] | None = None,
        pool: Callable[[Service, bool], Pricer] | None = None,
    ) -> Solution:
        """Solves the whole problem. `pool` gives the program of a service in a mode, where the last solve has none."""
        known: dict[tuple[str, bool], Pricer] = {}
        if self._solved is not None and np.array_equal(self._solved.problem.limits, problem.limits):
            known = self._solved.pricers() if self._again < _MOST_AGAIN else {}
        other = pool or (lambda service, whole: Pricer(service, problem.limits, whole=whole))

        def find(service: Service, whole: bool) -> Pricer:
            """What services that did not change have learnt stays."""
            pricer = known.get((service.key, whole))
            return pricer if pricer is not None and same(pricer.service, service) else other(service, whole)

        self._solved, self._again = Lexicographic(problem, self.limits, deadline, find), 0
        return self._solved.solve(start)


def resolve(solved: Lexicographic, problem: Problem, limits: Limits, deadline: Deadline) -> Solution | None:
    """The solution of `problem`, which has the solved one's rows, limits and keys; None where it has to be solved anew.
    `solved` then stands for the new problem. Asks for twice the gap of the first solve at once."""
    rounds = solved.last
    if rounds is None or rounds.best.replicas is None or not _same_shape(solved.problem, problem):
        return None
    pairs = list(enumerate(zip(solved.problem.services, problem.services, strict=True)))
    differ = [s for s, (old, new) in pairs if old is not new and not same(old, new)]
    solved.deadline = rounds.deadline = deadline
    solved.limits = rounds.limits = limits
    wide = replace(limits, gap=2 * limits.gap)
    if not differ and closed(rounds.best.value, rounds.best.bound, rounds.phase, wide):
        return solved.served_solution(rounds.best, done=True)
    columns = list(rounds.best.columns)
    bounds, prices, proven = rounds.best.bounds.copy(), rounds.best.prices, rounds.best.bound
    changed = []
    for s in differ:
        lower = _rebased(solved, rounds, s, problem.services[s])
        if lower is None:
            changed.append(s)
            columns[s] = -1
            _exchange(solved, rounds, s, problem.services[s])
        else:
            bounds[s] -= lower
            proven -= lower
    if changed:
        fresh = rounds.price_some(changed, prices)
        if np.isinf(fresh).any():
            solved.last = None
            return None
        bounds[changed] = fresh[changed]
    best = rounds.best
    best.value, best.replicas, best.columns, best.rounds = float("inf"), None, [], 0
    best.bounds, best.bound = bounds, rounds.bound_of(bounds, prices)
    if not changed:
        # What a joint program has proven falls by no more either.
        best.bound = max(best.bound, proven)
    rounds.collect()
    _fit(rounds, columns, changed)
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


def same(old: Service, new: Service) -> bool:
    """Whether two services have equal answers."""

    def equal(a: Array | Stage | None, b: Array | Stage | None) -> bool:
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
        and equal(old.stage, new.stage)
        and len(old.losses) == len(new.losses)
        and all(
            a.keep == b.keep and np.array_equal(a.lost, b.lost) for a, b in zip(old.losses, new.losses, strict=True)
        )
    )


def _same_shape(old: Problem, new: Problem) -> bool:
    return (
        old.rows == new.rows
        and old.nodes == new.nodes
        and np.array_equal(old.limits, new.limits)
        and [service.key for service in old.services] == [service.key for service in new.services]
    )


def _rebased(solved: Lexicographic, rounds: Rounds, s: int, service: Service) -> float | None:
    """Puts a service that differs only in its replicas in force in its place. What its bound falls by, at any prices;
    None where more has changed, or change has become cheaper.

    With p, p' in force before and now, |y - p'| >= |y - p| - |p' - p| for every y, so no plan costs less than before by
    more than changing from p to p' did.
    """
    old = rounds.phase.pricers[s]
    before = old.service
    if not same(replace(before, previous=None, switching=None), replace(service, previous=None, switching=None)):
        return None
    if (service.change < before.change - 1e-12 * before.cost).any():
        return None
    pricer = old.rebased(service)
    share = rounds.phase.shares[s]
    share = replace(share, terms=Terms(service.cost, service.change, 0.0, 0.0))
    rounds.swap(s, pricer, share)
    solved.replace(s, service, pricer)
    if before.previous is None or service.previous is None:
        return 0.0
    return float(before.change @ np.abs(np.subtract(service.previous, before.previous)))


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
                pricer.cut(np.array(known[-_MOST_TAUGHT:]), scenario)
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
        slack=_SLACK * abs(rounds.best.bound) + rounds.phase.idle * rounds.phase.packing.dearest,
        relative=rounds.limits.gap,
        deadline=rounds.deadline,
        nodes=_NODES,
        idle=rounds.phase.idle,
    )
    if chosen is not None:
        rounds.take(chosen)
