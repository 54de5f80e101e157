"""The lexicographic solve: least unserved demand, by priority, then least cost; each with a proof of its own.

Usually everything can be served. So the first phase tried is the last one: the least cost with all demand served and
no replica missing. One plan that does so proves that nothing need be unserved.

Otherwise, priority by priority, highest first: if all services so far can be served whole, they will be; else the
priority's unserved share is minimised, and held by a row for all that follows, and its missing replicas after it. So a
lower priority never gets what a higher one could have used, and no weight has to be big enough. The cost comes last.

A shortage is found to a gap, and held with a tenth of that gap to spare: to the last digit only the very plan that was
found would do, and what is left of other plans serves lower priorities far worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver.closing import close_gap, improve
from llmfleet.placement.solver.cut_program import WHOLE, Terms
from llmfleet.placement.solver.decomposition import Found, Phase, Rounds, Share
from llmfleet.placement.solver.limits import Limits, StoppedBy
from llmfleet.placement.solver.nodes import Packing
from llmfleet.placement.solver.pricing import Pricer
from llmfleet.placement.solver.problem import AT_RISK, Array, Problem, Replicas, Service
from llmfleet.placement.solver.stages import cheapest_way

_SHARE = 1e4
"""Scale of unserved shares in an objective: HiGHS tells objectives apart to 1e-7."""
_LOST = 0.1
"""Share of the gap asked of a shortage that is lost in it."""
_LITTLE = 10.0
"""Where less than one in so many requests can be served, the gap is relative to those that can."""


@dataclass(frozen=True)
class Level:
    """What the services of one priority leave undone."""

    priority: int
    unserved: float
    """Share of the priority's demand, what is at risk counted in part."""
    unserved_bound: float
    missing: int
    """Replicas missing to the minima."""
    missing_bound: float


@dataclass(frozen=True)
class Solution:
    """A plan in numbers, and what is proven of it."""

    replicas: tuple[Replicas, ...]
    """By service, in the problem's order."""
    unserved: tuple[float, ...]
    """Shortage of each service: the share of its demand, what is at risk counted in part (`problem.AT_RISK`)."""
    objective: float
    """Cost per hour with the price of change."""
    bound: float | None
    """No plan that leaves no more undone costs less; None if that is not proven."""
    levels: tuple[Level, ...]
    """Those that leave something undone, highest priority first."""
    stopped_by: StoppedBy
    rounds: int
    prices: Array
    """Shadow prices of the rows, in cost per hour per unit."""

    @property
    def gap_cost(self) -> float | None:
        """Relative gap of the objective."""
        if self.bound is None:
            return None
        return max(0.0, self.objective - self.bound) / self.objective if self.objective > 0 else 0.0

    @property
    def gap_unserved(self) -> float:
        """Share of a priority's demand that is unserved (what is at risk counted in part) and not proven to be
        unavoidable; the largest of them."""
        return min(1.0, max((level.unserved - level.unserved_bound for level in self.levels), default=0.0))


@dataclass
class _Held:
    """A row that holds what an earlier phase reached."""

    members: dict[int, float]
    """By service, its weight."""
    limit: float
    missing: bool = False


@dataclass
class _State:
    whole: set[int] = field(default_factory=set)
    held: list[_Held] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    plan: dict[int, Replicas] = field(default_factory=dict)
    proven: bool = True
    rounds: int = 0


class Lexicographic:
    """One solve. Programs of services live as long as it does."""

    def __init__(
        self,
        problem: Problem,
        limits: Limits,
        deadline: Deadline,
        pool: Callable[[Service, bool], Pricer] | None = None,
    ) -> None:
        """`pool` gives the program of a service in a mode (whole or not), where the caller keeps such."""
        self.problem, self.limits, self.deadline = problem, limits, deadline
        self._pool = pool or (lambda service, whole: Pricer(service, problem.limits, whole=whole))
        self._pricers: dict[tuple[int, bool], Pricer] = {}
        self._work_done = False
        self.last: Rounds | None = None
        """The last phase, if in it everything is served: what a changed service can be put into."""
        self._unit = _unit(problem)
        self._uses = [service.use for service in problem.services]

    def pricer(self, s: int, *, whole: bool) -> Pricer:
        """The program of a service in a mode."""
        if (s, whole) not in self._pricers:
            self._pricers[s, whole] = self._pool(self.problem.services[s], whole)
        return self._pricers[s, whole]

    def pricers(self) -> dict[tuple[str, bool], Pricer]:
        """All programs by service key and mode."""
        return {(pricer.service.key, whole): pricer for (_, whole), pricer in self._pricers.items()}

    def solve(self, start: Sequence[Replicas] | None = None) -> Solution:
        """The whole solve; `start` is a plan that may be good, such as the one in force."""
        everything = list(range(len(self.problem.services)))
        state = _State(whole=set(everything))
        offered = None if start is None else dict(enumerate(start))
        found = self._cost(everything, state, offered, satisfied=False)
        if found is None or found.replicas is None:
            self.last = None
            state = self._by_priority(offered)
            found = self._cost(everything, state, state.plan, satisfied=False)
        if state.levels or state.held:
            self.last = None
        return self._solution(found, state)

    def replace(self, s: int, service: Service, pricer: Pricer) -> None:
        """Puts another service in a service's place."""
        services = list(self.problem.services)
        services[s] = service
        self.problem = replace(self.problem, services=tuple(services))
        self._uses[s] = service.use
        self._pricers.pop((s, False), None)
        self._pricers[s, True] = pricer

    def served_solution(self, found: Found, *, done: bool) -> Solution:
        """The solution of a phase in which everything is served."""
        self._work_done = not done
        return self._solution(found, _State(whole=set(range(len(self.problem.services))), rounds=found.rounds))

    # Phases

    def _by_priority(self, offered: dict[int, Replicas] | None) -> _State:
        state = _State()
        services = self.problem.services
        members: list[int] = []
        for priority in sorted({service.priority for service in services}, reverse=True):
            level = [s for s, service in enumerate(services) if service.priority == priority]
            members += level
            if not state.held and len(members) < len(services):
                trial = _State(whole=set(members))
                found = self._cost(members, trial, None, satisfied=True)
                if found is not None and found.replicas is not None:
                    state.whole = set(members)
                    state.plan = dict(zip(members, found.replicas, strict=True))
                    continue
            self._shortage(priority, members, level, state, offered)
        return state

    def _shortage(
        self, priority: int, members: list[int], level: list[int], state: _State, offered: dict[int, Replicas] | None
    ) -> None:
        services, before = self.problem.services, len(state.held)
        total = sum(services[s].demand for s in level)
        plan = {s: state.plan.get(s, (0,) * services[s].variants) for s in members}
        unserved = unserved_bound = 0.0
        missing = sum(services[s].minimum for s in level)
        missing_bound = 0.0
        weights = {s: services[s].demand / total for s in level} if total > 0 else {}
        if weights:
            # Where little can be served the gap is of that: of a demand beyond all capacity nothing would be within it.
            # What can be served is not known without a plan offered; to ask for the exact shortage then takes for ever.
            served = 1.0
            if offered is not None:
                starts = (plan, offered)
                served -= min(sum(w * self._share(s, start[s]) for s, w in weights.items()) for start in starts)
            absolute = max(0.5 * self.limits.gap * min(1.0, _LITTLE * served), 2 * WHOLE) * _SHARE
            # Among plans that serve as much, those that waste nothing: so little that it is lost in the asked gap.
            most_cost = self._most_cost(members)
            little = _LOST * absolute / most_cost if self.limits.gap > 0 and most_cost > 0 else 0.0
            objective = {
                s: Terms(little * services[s].cost, np.zeros(services[s].variants), _SHARE * weights.get(s, 0.0), 0.0)
                for s in members
            }
            found = self._run(members, state, objective, [plan, offered], absolute=absolute, idle=little)
            found.bound -= little * most_cost
            state.proven = state.proven and self._near(found)
            if found.replicas is not None:
                plan = dict(zip(members, found.replicas, strict=True))
            unserved = sum(w * self._share(s, plan[s]) for s, w in weights.items())
            unserved_bound = max(0.0, found.bound / _SHARE) if np.isfinite(found.bound) else 0.0
            if unserved > WHOLE:
                state.held.append(_Held(weights, unserved * (1 + 1e-7) + 1e-9 + _LOST * absolute / _SHARE))
            else:
                unserved = 0.0
                state.held.append(_Held(weights, WHOLE))
        if missing:
            ones = {s: 1.0 for s in level if services[s].minimum}
            missing = sum(services[s].missing(plan[s]) for s in ones)
            if missing:
                objective = {
                    s: Terms(np.zeros(services[s].variants), np.zeros(services[s].variants), 0.0, 1.0) for s in ones
                }
                found = self._run(members, state, objective, [plan], absolute=0.999)
                state.proven = state.proven and self._near(found)
                if found.replicas is not None:
                    plan = dict(zip(members, found.replicas, strict=True))
                missing = sum(services[s].missing(plan[s]) for s in ones)
                missing_bound = found.bound
            state.held.append(_Held(ones, float(missing), missing=True))
        state.plan = plan
        if unserved > 0 or missing:
            state.levels.append(Level(priority, unserved, min(unserved, unserved_bound), missing, missing_bound))
        elif all(self.pricer(s, whole=True).add(plan[s]) is not None for s in level):
            del state.held[before:]
            state.whole |= set(level)

    def _cost(
        self, members: list[int], state: _State, plan: dict[int, Replicas] | None, *, satisfied: bool
    ) -> Found | None:
        objective = {
            s: Terms(service.cost, service.change, 0.0, 0.0)
            for s, service in enumerate(self.problem.services)
            if s in set(members)
        }
        if any(not self.pricer(s, whole=True).feasible for s in members if s in state.whole):
            return None
        return self._run(members, state, objective, [plan], absolute=0.0, satisfied=satisfied, idle=1.0)

    def _run(
        self,
        members: list[int],
        state: _State,
        objective: dict[int, Terms],
        plans: Sequence[dict[int, Replicas] | None],
        *,
        absolute: float,
        satisfied: bool = False,
        idle: float = 0.0,
    ) -> Found:
        """One phase; `satisfied` ends it at the first plan."""
        phase = self._phase(members, state, objective, absolute, idle)
        self.last = rounds = Rounds(phase, self.limits, self.deadline, any_plan=satisfied)
        for plan in plans:
            if plan is not None and all(s in plan for s in members):
                rounds.offer([plan[s] for s in members])
        prices, fits = rounds.prices_to_start()
        whole = all(s in state.whole for s in members)
        if whole and not fits:
            return rounds.best
        small = len(members) <= self.limits.closing_services
        # Of a cost, joint programs soon prove more than prices do. Of a shortage they hardly do: what they start from
        # counts, and where a shortage is held to its last digits good prices take many rounds.
        early = 3 if small and absolute == 0 else self.limits.rounds

        first: list[float] = []

        def enough(now: Rounds) -> bool:
            first.append(now.best.bound)
            if satisfied and now.best.replicas is not None:
                return True
            if whole and not now.best.fits and not small and (len(first) >= 4 or first[-1] > 1.2 * first[0] > 0):
                return True
            return now.best.rounds >= early

        found = rounds.run(prices, until=enough)
        if satisfied and found.replicas is not None:
            return found
        hopeless = whole and not found.fits and not small
        few = len(members) <= (2 if absolute > 0 else 3) * self.limits.closing_services
        if not rounds.done and absolute > 0:
            found = improve(rounds)
        if not rounds.done and np.isfinite(found.bound) and few and not hopeless:
            found = close_gap(rounds)
        given_up = whole and found.replicas is None
        if not rounds.done and not given_up:
            self._work_done = True
        state.rounds += found.rounds
        return found

    def _phase(
        self, members: list[int], state: _State, objective: dict[int, Terms], absolute: float, idle: float
    ) -> Phase:
        problem = self.problem
        rows, extra = len(problem.limits), len(state.held)
        shares, pricers = [], []
        for s in members:
            service = problem.services[s]
            pricers.append(self.pricer(s, whole=s in state.whole))
            none = Terms(np.zeros(service.variants), np.zeros(service.variants), 0.0, 0.0)
            unserved, missing = np.zeros(rows + extra), np.zeros(rows + extra)
            for k, held in enumerate(state.held):
                (missing if held.missing else unserved)[rows + k] = held.members.get(s, 0.0)
            use = np.vstack([service.use, np.zeros((extra, service.variants))])
            shares.append(Share(objective.get(s, none), use, unserved, missing))
        limits = np.concatenate([problem.limits, [held.limit for held in state.held]])
        worth = self._worth(members)
        # Objective per unit of cost, roughly: 1 where cost is the objective, else what serving everything would cost.
        undone = sum(terms.unserved + terms.missing for terms in objective.values())
        scale = undone / worth if undone > 0 else 1.0
        unit = np.concatenate([self._unit * scale, np.full(extra, worth * scale)])
        packing = Packing(problem.nodes, self._uses, rows + extra)
        return Phase(pricers, shares, limits, unit, packing, absolute, idle)

    def _worth(self, members: list[int]) -> float:
        """What it costs, at least, to serve these services: a first guess of what unserved demand is worth."""
        none = 0.0
        for s in members:
            service = self.problem.services[s]
            load = np.where(np.isfinite(service.load), service.load * service.cost[None, :], np.inf)
            least = cheapest_way(load, service.stage) if len(service.rates) else np.zeros(0)
            none += float(least[np.isfinite(least)].sum())
        return max(none, 1.0)

    def _most_cost(self, members: list[int]) -> float:
        """No plan of these services costs more: every variant within some row, or its own most."""
        total, rows = 0.0, np.zeros(len(self.problem.limits), dtype=bool)
        for s in members:
            service = self.problem.services[s]
            for v in range(service.variants):
                used = np.flatnonzero(service.use[:, v] > 0)
                if len(used):
                    rows[used[0]] = True
                else:
                    total += float(service.cost[v]) * service.most(self.problem.limits)[v]
        nodes = sum(one.price * one.size for one in self.problem.nodes)
        return total + float((self._unit * self.problem.limits)[rows].sum()) + nodes

    # What came out

    def _near(self, found: Found) -> bool:
        return bool(np.isfinite(found.value)) and bool(np.isfinite(found.bound))

    def _share(self, s: int, replicas: Replicas) -> float:
        """A service's shortage with these replicas."""
        pricer = self.pricer(s, whole=False)
        index = pricer.add(replicas)
        if index is None:
            return 1.0 + (AT_RISK if self.problem.services[s].losses else 0.0)
        return pricer.unserved[index]

    def _solution(self, found: Found | None, state: _State) -> Solution:
        services = self.problem.services
        replicas = tuple(found.replicas) if found is not None and found.replicas is not None else None
        if replicas is None:
            replicas = tuple(state.plan.get(s, (0,) * service.variants) for s, service in enumerate(services))
        shares = tuple(0.0 if s in state.whole else self._share(s, counts) for s, counts in enumerate(replicas))
        objective = sum(
            float(service.charge(np.array(counts, dtype=np.float64)))
            for service, counts in zip(services, replicas, strict=True)
        )
        if self.problem.nodes:
            packing = Packing(self.problem.nodes, self._uses, len(self.problem.limits))
            objective += float(packing.price @ packing.idle(self._uses, replicas)) - packing.before
        bound = found.bound if found is not None and state.proven and np.isfinite(found.bound) else None
        stopped_by: StoppedBy = "work_limit" if self._work_done else "gap"
        if self.deadline.hit:
            stopped_by = "time_limit"
        prices = np.zeros(len(self.problem.limits)) if found is None else found.prices[: len(self.problem.limits)]
        return Solution(
            replicas,
            shares,
            objective,
            None if bound is None else min(bound, objective),
            tuple(self._as_planned(level, shares) for level in state.levels),
            stopped_by,
            state.rounds,
            prices,
        )

    def _as_planned(self, level: Level, shares: Sequence[float]) -> Level:
        """A level as the last phase has left it."""
        members = [s for s, service in enumerate(self.problem.services) if service.priority == level.priority]
        total = sum(self.problem.services[s].demand for s in members)
        unserved = sum(self.problem.services[s].demand * shares[s] for s in members) / total if total > 0 else 0.0
        return replace(level, unserved=unserved, unserved_bound=min(unserved, level.unserved_bound))


def _unit(problem: Problem) -> Array:
    """By row, the dearest replica-hour per unit that it takes."""
    unit = np.zeros(len(problem.limits))
    for service in problem.services:
        worth = np.divide(service.cost[None, :], service.use, out=np.zeros_like(service.use), where=service.use > 0)
        unit = np.maximum(unit, worth.max(axis=1))
    return unit
