"""Rounds begun again from what they ended with, and the plan in force beside what they found.

    Prepared ... --rounds--> Solved --lines of its own pools--> rounds --> Solved ... --> the best of each service

Rounds find the lines of the pools that they try, and never try what was guessed too low. So where services have no plan
in force yet, rounds begin again for these: from their own result with the lines of its pools, and once from the other
guess. What is better by the model counts, service by service where that fits, so that another turn never makes a plan
worse. Turns end when they bring nothing, and there are fewer in large fleets. A plan in force is where the next solve
begins anyway, so a fleet that has one gets no further turn; where it still holds what is asked and serves more than
what was found instead, or as much at no more cost, it stays, service by service. The next solve then begins with the
lines of what was found, not with those of what stayed: else it would find the same again, round by round.

**What is proven.** A bound is a proof for the lines with which its rounds ended. A plan put together from two turns has
the lower of their bounds, until a turn with the lines of both is solved, which is done where the gap would be missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmfleet.api import FleetPolicySpec, ServicePlan
from llmfleet.placement.checks import Prepared
from llmfleet.placement.fewer import with_fewer_variants
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import ROUNDING, Deadline
from llmfleet.placement.margins import FIRST_SOLVES, Learnt, Margins, guessed, shares_of, through
from llmfleet.placement.on_demand import with_spot, without_spot
from llmfleet.placement.ranks import LEAST_SAVING, charged_cost, decided, idle_cost, is_better, shortage
from llmfleet.placement.rounds import (
    Beginning,
    Routed,
    Solved,
    beginning,
    in_rounds,
    reduce,
    routed_by,
    together,
)
from llmfleet.placement.rows import SharedRow
from llmfleet.placement.warm_state import WarmState
from llmfleet.placement.whole_nodes import NodeType

Lines = Literal["own", "heaviest", "ended"]
"""What a further turn begins with: the lines of the plan's own pools and fresh guesses beside them, guesses from each
variant's heaviest size, or all lines as they ended."""
_TURNS: tuple[Lines, ...] = ("own", "heaviest", "own")
_LEAST_SERVED = 1e-5
"""Share of a service's demand below which other replicas serve no more."""
_MANY = ((10, 3), (100, 2), (300, 1))
"""So many turns of these up to so many services, beyond which there are none."""


def solved_fleet(
    services: Sequence[Prepared],
    policy: FleetPolicySpec,
    before: Mapping[str, ServicePlan] | None,
    rows: Iterable[SharedRow],
    limits: Mapping[str, float],
    warm: WarmState,
    deadline: Deadline,
    nodes: tuple[NodeType, ...] = (),
) -> Solved:
    """Solves the fleet. `before` are the plans in force by key, `limits` what there is of devices and rows, `nodes` the
    types that are billed by the node."""
    turns = _Turns(policy, before, tuple(rows), limits, warm, deadline, nodes)
    start = beginning(services, policy, before, turns.rows, warm)
    new = {one.key for one in services if one.key not in (before or {})}
    best = turns.sought(start, new)
    plain = [without_spot(one) if one.key in new else one for one in services]
    if _turns_of(services, new, nodes) and any(one is not other for one, other in zip(plain, services, strict=True)):
        others = _Turns(policy, before, turns.rows, limits, WarmState(), deadline, nodes)
        found = others.sought(beginning(plain, policy, before, turns.rows, WarmState()), new)
        best = turns.better(best, turns.with_spot(found, services), less_proven=True)
    sought, best = best, with_fewer_variants(turns.in_force(best), before or {}, policy.optimality_gap)
    if not deadline.hit:
        turns.used.lines = {
            one.item.prepared.key: _learnt(one, found, start, policy.utilization_target)
            for found, one in zip(sought.services, best.services, strict=True)
        }
    return replace(best, used=turns.used)


@dataclass
class _Turns:
    """The turns of one solve, and what they have in common."""

    policy: FleetPolicySpec
    before: Mapping[str, ServicePlan] | None
    rows: tuple[SharedRow, ...]
    limits: Mapping[str, float]
    warm: WarmState
    deadline: Deadline
    nodes: tuple[NodeType, ...]

    def __post_init__(self) -> None:
        self.used = WarmState()

    def solved(self, start: Beginning) -> Solved:
        """The result of a turn."""
        warm = together(self.warm, self.used)
        found = in_rounds(start, self.policy, self.before, self.rows, self.limits, warm, self.deadline, self.nodes)
        self.used = together(self.used, found.used)
        return found

    def sought(self, start: Beginning, new: set[str]) -> Solved:
        """The best of a first turn and of as many further ones as the fleet allows. `new`: keys of services without a
        plan in force."""
        best = self.solved(start)
        most = _turns_of(start.items, new, self.nodes)
        idle = 0
        for lines in _TURNS[:most]:
            if self.deadline.hit or idle == 2:
                break
            found = self.better(best, self.solved(self.again(start, best, new, lines)))
            idle = 0 if found.outcome.replicas != best.outcome.replicas else idle + 1
            best = found
        if most and not self.deadline.hit and _gap(best) > self.policy.optimality_gap:
            best = self.better(best, self.solved(self.again(start, best, new, "ended")), same_lines=True)
        return best

    def with_spot(self, found: Solved, services: Sequence[Prepared]) -> Solved:
        """What was found for services without spot, as plans of the services as they are."""
        routed = with_spot(
            found.services,
            services,
            lambda prepared: guessed(prepared, self.policy.utilization_target),
            lambda prepared, margins: reduce(prepared, self.policy, self.before, self.rows, margins),
            found.solver,
        )
        return self._with(found, routed, found.outcome.bound)

    def again(self, start: Beginning, best: Solved, new: set[str], lines: Lines) -> Beginning:
        """Where a further turn begins. `new`: keys of services without a plan in force; all others stay as they are."""
        items = []
        for service in best.services:
            prepared, item = service.item.prepared, service.item
            if prepared.key in new:
                margins = self._lines(service, lines)
                item = reduce(prepared, self.policy, self.before, self.rows, margins)
            items.append(item)
        settled = {item.prepared.key for item in items if item.prepared.key not in new}
        return replace(start, items=items, repeated=start.repeated | settled)

    def _lines(self, service: Routed, lines: Lines) -> Margins:
        prepared = service.item.prepared
        if lines == "heaviest":
            return guessed(prepared, self.policy.utilization_target, of_all=False)
        margins = service.item.margins if lines == "ended" else guessed(prepared, self.policy.utilization_target)
        return through(prepared, margins, service.x, service.replicas)

    def better(self, best: Solved, found: Solved, *, same_lines: bool = False, less_proven: bool = False) -> Solved:
        """The better of two results, with what the other does better for single services where that fits.
        `same_lines`: whether both hold what is proven of either. `less_proven`: whether what is proven of `found` is
        proven of a part of the plans only."""
        one, other = (found, best) if is_better(found, best) else (best, found)
        services, mixed = self._exchanged(one.services, other.services, one.solver)
        bounds = [some.outcome.bound for some in (one, other) if some.outcome.bound is not None]
        bound = one.outcome.bound
        if same_lines and bounds:
            bound = max(bounds)
        elif mixed or (less_proven and one is found):
            bound = min(bounds) if len(bounds) == 2 else None
        return self._with(one, services, bound)

    def _exchanged(
        self, services: Sequence[Routed], others: Sequence[Routed], solver: FleetSolver
    ) -> tuple[list[Routed], bool]:
        """The services, with those of `others` (in the same order) that fit and leave less unserved, or as much at less
        cost; and whether there were any."""
        found, mixed = list(services), False
        left = dict(self.limits)
        for service in services:
            _take(left, service, 1)
        for i, offered in enumerate(others):
            now, tried = found[i], [*found[:i], offered, *found[i + 1 :]]
            cost = charged_cost(offered) + idle_cost(solver, tried) - idle_cost(solver, found)
            more = shortage(offered) - shortage(now)
            if more > ROUNDING or (more > -_LEAST_SERVED and cost >= charged_cost(now) * (1 - LEAST_SAVING)):
                continue
            if self.nodes and not solver.fits(*decided(tried)):
                continue
            _take(left, now, -1)
            if all(amount <= left[name] * (1 + 1e-9) + 1e-9 for name, amount in _takes(offered).items()):
                found[i], mixed = offered, True
            _take(left, found[i], 1)
        return found, mixed

    def _with(self, solved: Solved, services: list[Routed], bound: float | None) -> Solved:
        """The same with other services."""
        replicas = decided(services)[1]
        objective = solved.solver.objective(*decided(services))
        outcome = replace(solved.outcome, replicas=replicas, objective=objective)
        outcome = replace(outcome, bound=None if bound is None else min(bound, objective))
        return replace(solved, services=services, outcome=outcome)

    def in_force(self, best: Solved) -> Solved:
        """With the plans in force that still hold what is asked of them and cost no more than what was found. Where
        these do not fit beside the rest of what was found, the other way about: the plans in force, with what was found
        where that is better and fits."""
        kept = [self._kept(service, best.solver) for service in best.services]
        if all(one is service for one, service in zip(kept, best.services, strict=True)):
            return best
        services, changed = self._exchanged(best.services, kept, best.solver)
        found = self._with(best, services, best.outcome.bound) if changed else best
        if not best.solver.fits(*decided(kept)):
            return found
        stayed = self._with(best, self._exchanged(kept, best.services, best.solver)[0], best.outcome.bound)
        return stayed if is_better(stayed, found) else found

    def _kept(self, service: Routed, solver: FleetSolver) -> Routed:
        """The service as its plan in force does it, all that replicas hold counted; itself where that holds no more
        what is asked."""
        prepared, program = service.item.prepared, service.item.program
        planned, counts = (self.before or {}).get(program.key), program.previous
        if planned is None or counts is None or counts == service.replicas or not program.allows(counts):
            return service
        if planned.buckets != prepared.buckets:
            return service
        x = np.where(prepared.demand.rps[:, None] > 0, shares_of(prepared, planned), np.nan)
        routed, target = np.nan_to_num(x) > 0, self.policy.utilization_target
        margins = through(prepared, replace(service.item.margins, utilization=target), x, counts)
        if (margins.table[routed] <= 0).any():  # rounds have closed sizes that it serves
            margins = through(prepared, guessed(prepared, target), x, counts)
        if (margins.table[routed] <= 0).any():
            return service
        item = reduce(prepared, self.policy, self.before, self.rows, margins)
        found = routed_by(replace(item, margins=replace(margins, utilization=1.0)), counts, x, solver)
        pools = (*found.pools, *(pool for after in found.fallbacks for pool in after.pools))
        return service if any(pool.short for pool in pools) else replace(found, item=item)


def _turns_of(services: Sequence[object], new: set[str], nodes: Sequence[NodeType]) -> int:
    """Further turns that a fleet gets. Where nodes are billed whole each round of more than a few services takes a
    joint program, of seconds."""
    if nodes and len(services) > _MANY[0][0]:
        return 0
    return next((few for size, few in _MANY if len(services) <= size), 0) if new else 0


def _gap(solved: Solved) -> float:
    """The proven relative gap of its cost; 0 where nothing is proven: no further turn would prove it."""
    outcome = solved.outcome
    return 0.0 if outcome.bound is None else (outcome.objective - outcome.bound) / max(outcome.objective, 1e-300)


def _learnt(service: Routed, found: Routed, start: Beginning, target: float) -> Learnt:
    """What the next solve may begin with. `found`: the service as rounds found it. Where its plan in force stays
    instead, its own lines would lead the next rounds to the same search with the same end. Only where it serves more
    than was found, the first solves look for a cheaper way to do so, from its lines."""
    prepared, replicas = service.item.prepared, service.replicas
    serves_more = shortage(service) < shortage(found) - ROUNDING
    ended = service if serves_more and start.solves[prepared.key] < FIRST_SOLVES else found
    counts = {one.name: count for one, count in zip(prepared.variants, replicas, strict=True) if count}
    begun, solves = start.begun[prepared.key], start.solves[prepared.key]
    return Learnt(begun, prepared, ended.item.margins, counts, solves, target)


def _takes(service: Routed) -> dict[str, float]:
    return service.item.program.takes(service.replicas)


def _take(left: dict[str, float], service: Routed, sign: int) -> None:
    for name, amount in _takes(service).items():
        left[name] -= sign * amount
