"""The whole fleet in one solve, taken apart where that is exact.

Only what they share couples services, and only where it is scarce: devices, and rows beside them such as a budget
(`rows`), which count as types here. So:

* a type whose devices suffice even if every service took the most it can use of it couples nobody; services that
  share only such types fall into **components** of their own, and each component is solved by itself;
* within a component every service is first solved **alone**, as if it had all the devices. What a service gets then is
  a bound on what it can get beside others: no shortage smaller, no cost lower. So if the separate optima fit into the
  devices together, they are the joint optimum, and no joint program is built. A thousand services with one variant
  each are then a thousand divisions;
* where devices are billed by the node (`whole_nodes`), services that may use such a type are one component, and the
  separate optima are the answer where what stands idle beside them is within the gap;
* else the component is solved **jointly** by prices on the devices (`solver`), starting from the better of the plan in
  force and a greedy one (services one after the other by priority), and from what solving them alone has taught.

The plan in force is kept wherever it is within the asked gap of the proven bound (the solver itself is asked for half
that gap, so that a plan within the gap today still is when it is asked about again); and on a time-out whatever is
best of incumbent, greedy and plan in force: never worse than what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from llmfleet.placement.components import components, fits, greedy
from llmfleet.placement.highs import ROUNDING, Deadline
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.routes import assign
from llmfleet.placement.service_program import PoolLoss, Replicas, ServiceProgram
from llmfleet.placement.solver import (
    AT_RISK,
    PROVEN,
    Limits,
    Pricer,
    Problem,
    Service,
    Solution,
    Solver,
    StoppedBy,
    Terms,
    cheapest,
    solve,
)
from llmfleet.placement.warm_state import Assignment, Outcome, WarmState
from llmfleet.placement.whole_nodes import NodeType, with_held_idle


class FleetSolver:
    """One solve of a fleet."""

    def __init__(
        self,
        devices: Mapping[str, float],
        *,
        gap: float,
        deadline: Deadline,
        warm: WarmState,
        nodes: tuple[NodeType, ...] = (),
    ) -> None:
        """`nodes`: the types that are billed by the node, with what stays where it is on them."""
        self.nodes = nodes
        self.limits = devices
        """What there is, by row, what stands idle already taken off."""
        self.devices = with_held_idle(devices, nodes)
        """What there would be if nothing stood idle: more can never be used."""
        self.gap = gap
        self.deadline = deadline
        self.warm = warm
        self.used = WarmState()
        self._types = sorted(devices)
        # The solver is asked for half the gap, so that its plan still is within the gap when it is asked again.
        self._limits = Limits(gap=gap / 2)
        self._pricers: dict[tuple[object, ...], Pricer] = {}

    def solve(self, programs: list[ServiceProgram]) -> Outcome:
        """Decides replicas for all services, in order of key."""
        coupled = [name for one in self.nodes for name in (one.name, *one.rows)]
        outcomes = [self._component(component) for component in components(programs, self.devices, coupled)]
        bounds = [outcome.bound for outcome in outcomes]
        return Outcome(
            replicas={key: counts for outcome in outcomes for key, counts in outcome.replicas.items()},
            objective=sum(outcome.objective for outcome in outcomes),
            bound=None if None in bounds else sum(bound for bound in bounds if bound is not None),
            gap_unserved=max((outcome.gap_unserved for outcome in outcomes), default=0.0),
            stopped_by=_worst(outcomes),
        )

    def fits(self, programs: Sequence[ServiceProgram], replicas: Mapping[str, Replicas]) -> bool:
        """Whether there is enough of everything for all services together, what they leave idle counted."""
        if not self.nodes:
            return fits(programs, replicas, self.limits)
        return all(amount >= -1e-9 * (1 + self.limits[name]) for name, amount in self.left(programs, replicas).items())

    def left(self, programs: Sequence[ServiceProgram], replicas: Mapping[str, Replicas]) -> dict[str, float]:
        """What nobody uses of each row."""
        left = dict(self.limits)
        for program in programs:
            for name, amount in program.takes(replicas[program.key]).items():
                left[name] -= amount
        for one in self.nodes:
            idle = one.idle((program, replicas[program.key]) for program in programs)
            for name in one.rows:
                left[name] -= one.price * idle
        return left

    def objective(self, programs: Sequence[ServiceProgram], replicas: Mapping[str, Replicas]) -> float:
        """What a solve minimises: the services' objectives, and what stands idle beside their replicas."""
        total = sum(program.objective(replicas[program.key]) for program in programs)
        return total + self.idle(programs, replicas) if self.nodes else total

    def idle(self, programs: Sequence[ServiceProgram], replicas: Mapping[str, Replicas]) -> float:
        """What idle devices beside these replicas count for in a decision, per hour."""
        return _idle(self.nodes, programs, replicas)

    def assignment(self, program: ServiceProgram, replicas: Replicas, loss: PoolLoss | None = None) -> Assignment:
        """(x, u) of one service at given replicas, as it is or after a loss."""
        left = program if loss is None else program.after(loss)
        slot = (*left.served_by, replicas)
        known = self.used.routes.get(slot) or self.warm.routes.get(slot)
        known = self.used.routes[slot] = assign(left, replicas) if known is None else known
        return known

    def unserved_rps(self, program: ServiceProgram, replicas: Replicas) -> float:
        """Requests per second that these replicas cannot serve; 0 where it is only rounding."""
        if not program.rates.size:
            return 0.0
        unserved = float(np.dot(program.rates, self.assignment(program, replicas)[1]))
        return unserved if unserved > ROUNDING * float(program.rates.sum()) else 0.0

    def at_risk(self, program: ServiceProgram, replicas: Replicas) -> float:
        """Share of the demand that the worst of the losses would leave unserved, of what has to be kept; 0 where it is
        only rounding."""
        if not program.rates.size:
            return 0.0
        weight = program.rates / float(program.rates.sum())
        shares = (float(weight @ self.assignment(program, replicas, loss)[1]) for loss in program.losses)
        worst = max(shares, default=0.0)
        return worst if worst > ROUNDING else 0.0

    def alone(self, program: ServiceProgram, devices: Mapping[str, float]) -> Outcome:
        """The lexicographic optimum of one service that has `devices` to itself."""
        # More than it can use of something makes no difference.
        most = program.enough
        slot = (*program.fingerprint, tuple(min(devices[name], most[name]) for name in program.rows), self.gap)
        known = self.used.alone.get(slot) or self.warm.alone.get(slot)
        if known is None:
            hit_before, self.deadline.hit = self.deadline.hit, False
            known = self._solve_alone(program, devices)
            if self.deadline.hit:
                return known
            self.deadline.hit = hit_before
        self.used.alone[slot] = known
        (counts,) = known.replicas.values()
        return replace(known, replicas={program.key: counts})

    def relaxed(self, program: ServiceProgram) -> Replicas:
        """What the service would get if devices and replica bounds were no object."""
        free = program.relaxed
        (counts,) = self.alone(free, free.enough).replicas.values()
        return counts

    def _solve_alone(self, program: ServiceProgram, devices: Mapping[str, float]) -> Outcome:
        upper = program.upper(devices)
        if len(program.types) == 1 or not any(upper):
            return self._outcome([program], {program.key: upper}, program.objective(upper))
        is_free = program.unbounded and upper == program.upper(None)
        if not is_free:
            relaxed = self.alone(program.relaxed, program.relaxed.enough)
            if _allowed(program, relaxed.replicas[program.key]) and fits([program], relaxed.replicas, devices):
                return relaxed
        service = program.numbers(self._types)
        if self.deadline.remaining > 0:
            proven = cheapest(service, self._amounts(devices), gap=self._limits.gap)
            if proven is not None:
                return self._outcome([program], {program.key: proven.replicas}, proven.bound)
        pricer = self._pricer(program, devices)(service, True)
        terms = Terms(service.cost, service.change, 0.0, 0.0)
        bound = pricer.price(terms, relative=self._limits.gap, absolute=0.0, deadline=self.deadline)
        if pricer.replicas and np.isfinite(bound):
            index = int(pricer.values(terms).argmin())
            value = float(pricer.values(terms)[index])
            if value - bound <= max(self._limits.gap, PROVEN) * value:
                return self._outcome([program], {program.key: pricer.replicas[index]}, min(bound, value))
        start = greedy(program, devices)
        solution = self._solution([program], devices, {program.key: start})
        options = [solution.replicas[0], start] if self.deadline.hit else [solution.replicas[0]]
        best = min(options, key=lambda counts: self._rank([program], {program.key: counts}))
        return self._outcome([program], {program.key: best}, solution.bound, solution)

    def _solution(
        self, programs: list[ServiceProgram], devices: Mapping[str, float], start: Mapping[str, Replicas] | None
    ) -> Solution:
        return solve(
            self._problem(programs, devices),
            self._limits,
            self.deadline,
            start=None if start is None else [start[program.key] for program in programs],
            pool=self._pool(programs, devices),
        )

    def _problem(
        self, programs: list[ServiceProgram], devices: Mapping[str, float], nodes: Sequence[NodeType] = ()
    ) -> Problem:
        numbers = tuple(program.numbers(self._types) for program in programs)
        whole = tuple(one.numbers(self._types) for one in nodes)
        return Problem(numbers, tuple(self._types), self._amounts(devices), whole)

    def _pool(self, programs: list[ServiceProgram], devices: Mapping[str, float]) -> Callable[[Service, bool], Pricer]:
        by_key = {program.key: program for program in programs}
        return lambda service, whole: self._pricer(by_key[service.key], devices)(service, whole)

    def _amounts(self, devices: Mapping[str, float]) -> FloatArray:
        """By row, in the solver's order, how much there is."""
        return np.array([devices.get(name, 0) for name in self._types], dtype=np.float64)

    def _pricer(self, program: ServiceProgram, devices: Mapping[str, float]) -> Callable[[Service, bool], Pricer]:
        limits = self._amounts(devices)

        def find(service: Service, whole: bool) -> Pricer:
            # Of its own for each service: equal ones are priced at the same time, on two threads.
            slot = (program.key, *program.fingerprint, limits.tobytes(), whole)
            if slot not in self._pricers:
                self._pricers[slot] = Pricer(service, limits, whole=whole)
            return self._pricers[slot]

        return find

    def _outcome(
        self,
        programs: Sequence[ServiceProgram],
        replicas: dict[str, Replicas],
        bound: float | None,
        solution: Solution | None = None,
        nodes: Sequence[NodeType] = (),
    ) -> Outcome:
        objective = sum(p.objective(replicas[p.key]) for p in programs)
        objective += _idle(nodes, programs, replicas)
        if bound is not None and objective - bound <= PROVEN * objective:
            bound = objective
        if solution is None:
            return Outcome(replicas, objective, bound)
        return Outcome(replicas, objective, bound, solution.gap_unserved, solution.stopped_by)

    def _component(self, programs: list[ServiceProgram]) -> Outcome:
        alone = {program.key: self.alone(program, self.devices) for program in programs}
        kept = {program.key: self._kept(program, alone[program.key]) for program in programs}
        nodes = [one for one in self.nodes if any(one.name in program.types for program in programs)]
        for outcomes in (kept, alone):
            replicas = {key: outcome.replicas[key] for key, outcome in outcomes.items()}
            if self._fits(programs, replicas, nodes):
                bounds = [outcome.bound for outcome in outcomes.values()]
                total = None if None in bounds else sum(bound for bound in bounds if bound is not None)
                if not nodes:
                    return self._outcome(programs, replicas, total)
                # Nothing less than nothing is idle, so what is proven by the device is proven of the bill.
                total = None if total is None else max(0.0, total - sum(one.charged * one.held_idle for one in nodes))
                found = self._outcome(programs, replicas, total, nodes=nodes)
                slack = max(self._limits.gap, PROVEN) * found.objective
                if total is not None and found.objective - total <= slack:
                    return found
        slot = (*(program.fingerprint for program in programs), *sorted(self.devices.items()), self.gap, *nodes)
        known = self.warm.joint.get(slot)
        if known is None:
            known = self._joint(programs, nodes)
        else:
            self.used.solved[tuple(program.key for program in programs)] = self._last_solver(programs)
        if known.stopped_by != "time_limit":
            self.used.joint[slot] = known
        keys = [program.key for program in programs]
        return replace(known, replicas=dict(zip(keys, known.replicas.values(), strict=True)))

    def _kept(self, program: ServiceProgram, found: Outcome) -> Outcome:
        """The plan in force if it is as good as what was found, up to the gap; else what was found."""
        before = program.previous
        if before is None or before == found.replicas[program.key] or not _allowed(program, before):
            return found
        if not fits([program], {program.key: before}, self.devices):
            return found
        old, new = self._rank([program], {program.key: before}), self._rank([program], found.replicas)
        if not _as_good(old, new, found.bound, self.gap):
            return found
        return replace(self._outcome([program], {program.key: before}, found.bound), gap_unserved=found.gap_unserved)

    def _fits(
        self, programs: Sequence[ServiceProgram], replicas: Mapping[str, Replicas], nodes: Sequence[NodeType]
    ) -> bool:
        """Whether there is enough for one component, what it leaves idle counted."""
        if not fits(programs, replicas, self.devices):
            return False
        left = self.left(programs, replicas) if nodes else {}
        return all(left[name] >= -1e-9 * (1 + self.limits[name]) for one in nodes for name in one.rows)

    def _joint(self, programs: list[ServiceProgram], nodes: Sequence[NodeType]) -> Outcome:
        def rank(replicas: Mapping[str, Replicas]) -> tuple[float, ...]:
            *levels, objective = self._rank(programs, replicas)
            return (*levels, objective + _idle(nodes, programs, replicas))

        before = _previous(programs)
        if before is not None and not (
            self._fits(programs, before, nodes) and all(_allowed(p, before[p.key]) for p in programs)
        ):
            before = None
        options = [] if before is None else [before]
        solver = self._last_solver(programs)
        problem = self._problem(programs, self.devices, nodes)
        solution = solver.again(problem, self.deadline)
        if solution is None:
            greedily = self._one_after_the_other(programs)
            if self._fits(programs, greedily, nodes):
                options.append(greedily)
            start = min(options, key=rank, default=greedily)
            solution = solver.anew(
                problem,
                self.deadline,
                start=[start[program.key] for program in programs],
                pool=self._pool(programs, self.devices),
            )
        if not self.deadline.hit:
            self.used.solved[tuple(program.key for program in programs)] = solver
        options.append({p.key: counts for p, counts in zip(programs, solution.replicas, strict=True)})
        best = min(options, key=rank)
        if before is not None and _as_good(rank(before), rank(best), solution.bound, self.gap):
            best = before
        best = {program.key: best[program.key] for program in programs}
        return self._outcome(programs, best, solution.bound, solution, nodes)

    def _last_solver(self, programs: list[ServiceProgram]) -> Solver:
        """What solved these services last, or most of them."""
        keys = tuple(program.key for program in programs)
        known = self.warm.solved
        last = max(known, key=lambda other: len(set(keys) & set(other)), default=None)
        if last is None or not set(keys) & set(last):
            return Solver(self._limits)
        solver = known.pop(last)
        solver.limits = self._limits
        return solver

    def _one_after_the_other(self, programs: list[ServiceProgram]) -> dict[str, Replicas]:
        left = dict(self.devices)
        found: dict[str, Replicas] = {}
        for program in sorted(programs, key=lambda p: (-p.priority, p.key)):
            counts = greedy(program, left)
            for name, amount in program.takes(counts).items():
                left[name] -= amount
            found[program.key] = counts
        return found

    def _rank(self, programs: list[ServiceProgram], replicas: Mapping[str, Replicas]) -> tuple[float, ...]:
        """What the lexicographic solve minimises, to compare plans by: per priority, highest first, the unserved share
        (what is at risk counted in part) and the missing replicas; then the objective."""
        rank: list[float] = []
        for priority in sorted({program.priority for program in programs}, reverse=True):
            level = [program for program in programs if program.priority == priority]
            total = sum(float(program.rates.sum()) for program in level)
            unserved = sum(self._short_rps(program, replicas[program.key]) for program in level)
            rank.append(round(unserved / total, 5) if total else 0.0)
            rank.append(sum(program.missing(replicas[program.key]) for program in level))
        rank.append(sum(program.objective(replicas[program.key]) for program in programs))
        return tuple(rank)

    def _short_rps(self, program: ServiceProgram, replicas: Replicas) -> float:
        known = program.short_rps.get(replicas)
        if known is None:
            at_risk = AT_RISK * self.at_risk(program, replicas) * float(program.rates.sum())
            known = program.short_rps[replicas] = self.unserved_rps(program, replicas) + at_risk
        return known


def _previous(programs: list[ServiceProgram]) -> dict[str, Replicas] | None:
    found: dict[str, Replicas] = {}
    for program in programs:
        if program.previous is None:
            return None
        found[program.key] = program.previous
    return found


def _allowed(program: ServiceProgram, replicas: Replicas) -> bool:
    total = sum(replicas)
    if program.distinct is not None and sum(count > 0 for count in replicas) > program.distinct:
        return False
    return total >= program.minimum and (program.maximum is None or total <= program.maximum)


def _as_good(old: tuple[float, ...], new: tuple[float, ...], bound: float | None, gap: float) -> bool:
    """Whether the old rank is no worse than the new one, the cost counted as equal within the proven gap."""
    if old[:-1] != new[:-1]:
        return old[:-1] < new[:-1]
    slack = ROUNDING * abs(new[-1])
    return old[-1] <= new[-1] + slack or (bound is not None and old[-1] * (1 - gap) <= bound + slack)


def _idle(nodes: Sequence[NodeType], programs: Sequence[ServiceProgram], replicas: Mapping[str, Replicas]) -> float:
    """What stands idle beside replicas counts for in a decision."""
    return sum(one.charged * one.idle((p, replicas[p.key]) for p in programs) for one in nodes)


def _worst(outcomes: Iterable[Outcome]) -> StoppedBy:
    reasons: tuple[StoppedBy, ...] = ("gap", "work_limit", "time_limit")
    return max((outcome.stopped_by for outcome in outcomes), key=reasons.index, default="gap")
