"""Solving in rounds until every pool holds what it is promised.

    Prepared ... --margins--> Reduced --fleet--> replicas --routes--> x --judged--> margins ... (again) --> Solved

Each round solves the fleet as a linear program sees it, routes, and asks the model about every pool (`margins`). A
fleet whose plan did not change since the last solve needs one round, since the lines are those of its own pools; a new
one two or three. What is left short when rounds or time end is routed no more than its pool holds.

**Keeping the plan in force.** New plans leave headroom: they use the share t = `utilizationTarget` of what replicas
hold. The plan in force stays while its load is between t^2 and all of what it holds: replicas come when it holds no
more, and go when the load has fallen as far below what new plans are given as these are below the whole (a Schmitt
trigger). A load that wavers by less than 1 - t cannot make replicas come and go. A service within that band is solved
at the utilisation that it has, so that a cheaper mix still is found; if anything but the plan in force then comes out,
it is solved again at the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from llmfleet.api import FleetPolicySpec, ServicePlan
from llmfleet.placement.checks import Prepared
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import Deadline
from llmfleet.placement.losses import Fallback, fallback, held, losses_of, lowered, raised
from llmfleet.placement.margins import Judged, Margins, around, corrected, guessed, held_share, judged
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.routes import kept_shares
from llmfleet.placement.rows import SharedRow
from llmfleet.placement.service_program import Replicas, ServiceProgram
from llmfleet.placement.solver.stages import has_way, in_step
from llmfleet.placement.topping import topped_up
from llmfleet.placement.warm_state import Outcome, WarmState
from llmfleet.placement.whole_nodes import NodeType

ROUNDS = 6
"""Solves of the fleet, at most."""
_LINES_MAY_RISE = 2
"""Rounds in which a pool's line may rise as well as fall."""
_ROUGHLY = 4.0
"""How many times the asked gap the first of these may leave in a fleet that has no plan in force yet: it is lines that
they look for, and no proof of theirs is ever told."""
_FEW = 10
"""Services that are solved exactly from the first round on: it takes no time."""


@dataclass(frozen=True)
class Reduced:
    """A prepared service and its numbers."""

    prepared: Prepared
    program: ServiceProgram
    buckets: tuple[tuple[int, ...], ...]
    """By bucket of the program, the profile's indices of what it stands for: the answers of one input bucket."""
    margins: Margins
    """What the program takes its variants to hold."""
    rows: tuple[SharedRow, ...]
    """What is shared beside devices by services such as this."""

    @property
    def throughput(self) -> FloatArray:
        """The throughput table of what is not closed, shape (buckets of the profile, variants)."""
        return self.margins.table

    @property
    def largest(self) -> tuple[int, ...]:
        """By bucket of the program, the profile's index of the one with the most requests."""
        rps = self.prepared.demand.rps
        return tuple(max(some, key=lambda bucket: (rps[bucket], -bucket)) for some in self.buckets)

    def by_profile(self, values: FloatArray) -> FloatArray:
        """Shares by bucket of the program, for each of the profile's; NaN without demand. Shape (buckets, ...)."""
        found = np.full((len(self.prepared.demand.rps), *values.shape[1:]), np.nan)
        found[self.prepared.demand.rps > 0] = 0.0
        for some, value in zip(self.buckets, values, strict=True):
            found[list(some)] = value
        return found


@dataclass(frozen=True)
class Routed:
    """One service of a solved fleet."""

    item: Reduced
    replicas: Replicas
    x: FloatArray
    """Shares by (bucket of the profile, variant); NaN in buckets without demand."""
    pools: tuple[Judged, ...]
    """Its variants that get requests, as they will do."""
    held_back: bool = False
    """Whether it is a step on the way to what was solved."""
    fallbacks: tuple[Fallback, ...] = ()
    """What its replicas would do after each loss that it has to survive."""

    @property
    def unserved(self) -> FloatArray:
        """Unserved requests per second by bucket of the program; zero where only rounding."""
        shares = 1.0 - self.item.program.served(self.x[list(self.item.largest)])
        return np.where(shares > 1e-6, self.item.program.rates * shares, 0.0)


@dataclass(frozen=True)
class Settled:
    """One service as the last solve left it, to be taken over as long as it is the same and gets the same."""

    planned: ServicePlan | None
    """The plan in force then."""
    routed: Routed

    def reduced(
        self,
        prepared: Prepared,
        policy: FleetPolicySpec,
        before: Mapping[str, ServicePlan] | None,
        rows: tuple[SharedRow, ...],
        margins: Margins,
    ) -> Reduced | None:
        """What `reduce` would say, where that is what it said then."""
        item = self.routed.item
        same = (
            item.prepared is prepared
            and item.margins is margins
            and item.rows == _concerning(prepared, rows)
            and item.program.switching == policy.switching_cost_fraction
            and item.program.previous == _in_force(prepared, before)
        )
        return item if same else None

    def again(
        self, item: Reduced, replicas: Replicas, planned: ServicePlan | None, solver: FleetSolver
    ) -> Routed | None:
        """What `routed_at` would say, where that is what it said then."""
        if self.routed.item is not item or self.routed.replicas != replicas:
            return None
        if self.planned is not planned and (
            self.planned is None
            or planned is None
            or (self.planned.buckets, self.planned.routes) != (planned.buckets, planned.routes)
        ):
            return None
        for loss in item.program.losses:
            solver.assignment(item.program, replicas, loss)  # what it knows of them is to live on
        return self.routed


@dataclass(frozen=True)
class Solved:
    """A solved fleet."""

    services: list[Routed]
    outcome: Outcome
    solver: FleetSolver
    used: WarmState
    """What the next solve may reuse."""


def starting(
    prepared: Prepared, policy: FleetPolicySpec, planned: ServicePlan | None, learnt: Margins | None = None
) -> Margins:
    """The margins of the first round, the pools of a plan in force at their own mix. `learnt`: those of the last round
    of an earlier solve."""
    if learnt is None:
        margins = guessed(prepared, policy.utilization_target)
    else:
        margins = replace(learnt, utilization=policy.utilization_target)
    return margins if planned is None else around(prepared, margins, planned)


def reduce(
    prepared: Prepared,
    policy: FleetPolicySpec,
    before: Mapping[str, ServicePlan] | None,
    rows: Iterable[SharedRow] = (),
    margins: Margins | None = None,
) -> Reduced:
    """The numbers of one service: only input buckets with demand that some variant serves within the objective, each
    with all of its answers, as requests come (`margins`)."""
    spec = prepared.service.spec
    if margins is None:
        margins = starting(prepared, policy, None if before is None else before.get(prepared.key))
    table = margins.table * margins.share
    answers = len(prepared.buckets.output_tokens)
    reached = np.flatnonzero((prepared.demand.rps > 0) & has_way(table > 0, prepared.stage))
    alike: dict[int, list[int]] = {}
    for bucket in reached.tolist():
        alike.setdefault(bucket // answers, []).append(bucket)
    first = [some[0] for some in alike.values()]
    mine = _concerning(prepared, rows)
    program = ServiceProgram(
        key=prepared.key,
        priority=spec.priority,
        rates=np.array([prepared.demand.rps[some].sum() for some in alike.values()]),
        throughput=table[first] * margins.utilization,
        cost=np.array([variant.cost_per_replica_hour for variant in prepared.variants]),
        devices=tuple(variant.devices for variant in prepared.variants),
        types=tuple(variant.type_name for variant in prepared.variants),
        minimum=spec.replicas.min,
        maximum=spec.replicas.max,
        distinct=spec.replicas.max_variants,
        previous=_in_force(prepared, before),
        switching=policy.switching_cost_fraction,
        reserve=margins.reserve if margins.reserve.any() else None,
        shared={row.name: row.per_replica(prepared.variants) for row in mine},
        losses=losses_of(prepared.service, prepared.variants, margins.utilization),
        stage=prepared.stage,
    )
    return Reduced(prepared, program, tuple(map(tuple, alike.values())), margins, mine)


def _concerning(prepared: Prepared, rows: Iterable[SharedRow]) -> tuple[SharedRow, ...]:
    return tuple(row for row in rows if row.concerns(prepared.service.metadata.namespace))


def _in_force(prepared: Prepared, before: Mapping[str, ServicePlan] | None) -> Replicas | None:
    """Replicas by variant in the plan in force."""
    if before is None:
        return None
    known = before.get(prepared.key)
    counts = {} if known is None else known.replicas
    return tuple(counts.get(variant.name, 0) for variant in prepared.variants)


@dataclass(frozen=True)
class Beginning:
    """Where rounds begin."""

    items: list[Reduced]
    """The services, in order of key."""
    begun: dict[str, Prepared]
    """By key, the service as it was when its margins were guessed."""
    solves: dict[str, int]
    """By key, solves in a row that were asked for this very demand, this one included."""
    repeated: set[str]
    """Keys of services that go on where the last solve ended: their lines no more rise."""


def beginning(
    services: Sequence[Prepared],
    policy: FleetPolicySpec,
    before: Mapping[str, ServicePlan] | None,
    rows: tuple[SharedRow, ...],
    warm: WarmState,
) -> Beginning:
    """Where the rounds of a fleet begin. `before` are the plans in force by key, `warm` what the last solve left."""
    found = Beginning([], {}, {}, set())
    for prepared in services:
        planned, learnt = (before or {}).get(prepared.key), warm.lines.get(prepared.key)
        if learnt is not None and not learnt.holds_for(prepared):
            learnt = None
        found.begun[prepared.key] = prepared if learnt is None else learnt.begun
        found.solves[prepared.key] = 1 + (learnt.solves if learnt is not None and learnt.is_for(prepared) else 0)
        if learnt is not None and planned is not None and learnt.repeats(prepared, planned, policy.utilization_target):
            last, margins = warm.settled.get(prepared.key), learnt.margins_for(prepared)
            as_before = None if last is None else last.reduced(prepared, policy, before, rows, margins)
            found.items.append(as_before or reduce(prepared, policy, before, rows, margins))
            found.repeated.add(prepared.key)
            continue
        known = None if learnt is None else learnt.margins_for(prepared)
        item = reduce(prepared, policy, before, rows, starting(prepared, policy, planned, known))
        used = _utilization_in_force(item, planned)
        if policy.utilization_target**2 <= used <= 1 and used != item.margins.utilization:
            item = reduce(prepared, policy, before, rows, replace(item.margins, utilization=used))
        found.items.append(item)
    return found


def in_rounds(
    start: Beginning,
    policy: FleetPolicySpec,
    before: Mapping[str, ServicePlan] | None,
    rows: tuple[SharedRow, ...],
    limits: Mapping[str, float],
    warm: WarmState,
    deadline: Deadline,
    nodes: tuple[NodeType, ...] = (),
) -> Solved:
    """Solves the fleet. `before` are the plans in force by key, `limits` what there is of devices and rows, `nodes` the
    types that are billed by the node."""
    plans = before or {}
    items, settled = list(start.items), dict(warm.settled)
    kept = WarmState()
    roughly = before is None and len(items) > _FEW
    for number in range(ROUNDS):
        gap = policy.optimality_gap * (_ROUGHLY if roughly else 1.0)
        solver = FleetSolver(limits, gap=gap, deadline=deadline, warm=warm, nodes=nodes)
        outcome = solver.solve([item.program for item in items])
        routed = []
        for item in items:
            key, planned = item.program.key, plans.get(item.program.key)
            same = settled[key].again(item, outcome.replicas[key], planned, solver) if key in settled else None
            routed.append(same or routed_at(item, outcome.replicas[key], solver, planned))
            settled[key] = Settled(planned, routed[-1])
        kept = together(kept, solver.used)
        margins = [
            next_margins(service, policy, _LINES_MAY_RISE if service.item.prepared.key in start.repeated else number)
            for service in routed
        ]
        if deadline.hit or number == ROUNDS - 1:
            break
        changed = [i for i, (item, new) in enumerate(zip(items, margins, strict=True)) if new is not item.margins]
        if not changed and not roughly:
            break
        roughly = roughly and bool(changed) and number + 1 < _LINES_MAY_RISE
        for i in changed:
            items[i] = reduce(items[i].prepared, policy, before, rows, margins[i])
        warm = together(warm, kept)
    if not deadline.hit:
        # As they were routed: what follows depends on what others leave.
        kept.settled = {item.prepared.key: settled[item.prepared.key] for item in items}
    routed, outcome = topped_up(routed, outcome, solver)
    return Solved([_held(service) for service in routed], outcome, solver, kept)


def _utilization_in_force(item: Reduced, planned: ServicePlan | None) -> float:
    """The utilisation at which the plan in force serves the demand by its own routes; 0 where it does not."""
    program, margins = item.program, item.margins
    if planned is None or planned.buckets != item.prepared.buckets or program.previous is None:
        return 0.0
    whole = replace(program, throughput=program.throughput / margins.utilization)
    names = [variant.name for variant in item.prepared.variants]
    x = kept_shares(planned, names, whole, item.largest, program.previous)
    if x is None or not x.any():
        return 0.0
    load = np.divide(whole.rates[:, None] * x, whole.throughput, out=np.zeros_like(x), where=x > 0).sum(axis=0)
    used = load > 0
    return float((load[used] / whole.capacity(program.previous)[used]).max())


def routed_at(item: Reduced, replicas: Replicas, solver: FleetSolver, planned: ServicePlan | None) -> Routed:
    """The service with these replicas, and its routes."""
    program = item.program
    names = [variant.name for variant in item.prepared.variants]
    x = None
    if planned is not None and planned.buckets == item.prepared.buckets:
        x = kept_shares(planned, names, program, item.largest, replicas)
    if x is None:
        x = solver.assignment(program, replicas)[0]
    return routed_by(item, replicas, item.by_profile(x), solver)


def routed_by(item: Reduced, replicas: Replicas, shares: FloatArray, solver: FleetSolver) -> Routed:
    """The service with these replicas and routes. `shares`: as in `Routed`."""
    program, prepared = item.program, item.prepared
    return Routed(
        item,
        replicas,
        shares,
        tuple(judged(prepared, item.margins, shares, replicas)),
        fallbacks=tuple(
            fallback(
                prepared,
                item.margins,
                replicas,
                loss,
                np.nan_to_num(item.by_profile(solver.assignment(program, replicas, loss)[0])),
            )
            for loss in program.losses
        ),
    )


def next_margins(service: Routed, policy: FleetPolicySpec, number: int) -> Margins:
    """The margins of the next round; the same object where nothing has to change."""
    item = service.item
    margins = item.margins
    short = any(pool.short for pool in service.pools)
    in_band = margins.utilization != policy.utilization_target
    if in_band and (short or service.replicas != item.program.previous):
        margins = replace(margins, utilization=policy.utilization_target)
    if number < _LINES_MAY_RISE:
        margins = raised(item.prepared, margins, service.fallbacks)
    for pool in service.pools:
        if pool.short or (pool.tight and not in_band) or (pool.lavish and number < _LINES_MAY_RISE):
            margins = corrected(item.prepared, margins, pool, only_down=number >= _LINES_MAY_RISE)
    return lowered(item.prepared, margins, service.fallbacks)


def _held(service: Routed) -> Routed:
    """With no pool given more than it holds, now or after a loss."""
    prepared, margins = service.item.prepared, service.item.margins
    after = tuple(held(prepared, margins, service.replicas, one) for one in service.fallbacks)
    if any(new is not old for new, old in zip(after, service.fallbacks, strict=True)):
        service = replace(service, fallbacks=after)
    short = [pool for pool in service.pools if pool.short]
    if not short:
        return service
    x = service.x.copy()
    for pool in short:
        x[:, pool.variant] *= held_share(service.item.prepared, pool)
    x = in_step(x, prepared.stage)
    pools = judged(service.item.prepared, service.item.margins, x, service.replicas)
    return replace(service, x=x, pools=tuple(pools))


def together(first: WarmState, second: WarmState) -> WarmState:
    """What two solves may reuse, the second's where both know."""
    return WarmState(
        **{one.name: {**getattr(first, one.name), **getattr(second, one.name)} for one in fields(WarmState)}
    )
