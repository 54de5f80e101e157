"""Which limits are in conflict with the demand of a service that is short: an irreducible set, in words.

In flow the inputs, the plan and a service; out flow limits that cannot all hold while the demand is served, but could
if any one of them were lifted. It is found by the deletion filter (Chinneck and Dravnieks, ORSA Journal on Computing 3,
1991): lift one limit after the other and solve again; where the service stays short the limit has nothing to do
with it and stays lifted, else it belongs to the set and is put back. So n limits take n + 2 solves, of this service
alone beside the others as planned, some ten milliseconds each. There may be several such sets; since what nobody can
change at once (inventory) is lifted first, the set found holds what somebody wrote down rather than that.

Demand of sizes that no variant serves within the objective is in conflict with no limit, and is left out. So is what
cannot be told in time: a set is whole or not named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llmfleet.api import LLMService, Plan, Refusal, ServicePlan
from llmfleet.placement.checks import Catalogue, Prepared, prepare
from llmfleet.placement.components import greedy
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import ROUNDING, Deadline
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.losses import FIELD_ANY_POOL
from llmfleet.placement.rounds import reduce, starting
from llmfleet.placement.rows import SharedRow, left_by
from llmfleet.placement.service_program import ServiceProgram
from llmfleet.placement.solver import Pricer, Terms
from llmfleet.placement.warm_state import WarmState
from llmfleet.placement.whole_nodes import node_types, without_held_idle

MOST_SERVICES = 10
"""Short services per plan for which a set is sought."""
TIME_S = 2.0
"""Time for all of them: a plan is worth more than its explanation."""
_GAP = 1e-3
"""Of the solves; what they leave unserved is exact to a tenth of it."""
_SAME = 1e-3
"""Unserved rates that differ by less, as a share of the demand, are equal."""


@dataclass(frozen=True)
class _Case:
    """The service with some of its limits lifted."""

    programs: tuple[ServiceProgram, ServiceProgram]
    """With the GPU types that it allows, and with all."""
    limits: Mapping[str, float]
    """By row, what the others leave of it."""
    any_type: bool = False

    @property
    def program(self) -> ServiceProgram:
        """The one that counts."""
        return self.programs[self.any_type]


@dataclass(frozen=True)
class _Limit:
    """One limit of the candidates."""

    words: str
    lifted: Callable[[_Case], _Case]


@dataclass(frozen=True)
class _Shortage:
    """What is left undone."""

    unserved_rps: float
    missing: int
    at_risk: float
    """Share of the demand that the worst of the losses would leave unserved."""
    no_replica: bool
    """Not even one replica is possible."""

    def exceeds(self, least: _Shortage, demand_rps: float) -> bool:
        """Whether more is left undone than must be."""
        more = self.unserved_rps > least.unserved_rps + _SAME * demand_rps
        more = more or self.at_risk > least.at_risk + _SAME
        return more or self.missing > least.missing or self.no_replica > least.no_replica


_NOTHING = _Shortage(0.0, 0, 0.0, False)


def with_conflicts(
    inputs: PlanInputs,
    decided: Plan,
    known: Iterable[ServicePlan] = (),
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Plan:
    """The plan with the conflict of each short service, as far as `TIME_S` allows, highest priority first. `known` are
    earlier plans of the services: one that is as short as there has the same conflict. `clock` gives seconds."""
    short = [service for service in decided.services if service.shortfall is not None]
    if not short:
        return decided
    deadline = Deadline(clock, clock() + TIME_S)
    specs = {service.key: service.spec for service in inputs.services}
    before = {plan.key: plan for plan in known}
    found = {
        service.key: before[service.key].conflict
        for service in short
        if service.key in before
        and (before[service.key].shortfall, before[service.key].replicas) == (service.shortfall, service.replicas)
        and before[service.key].conflict
    }
    # Where demand is unserved although nothing binds, no limit is to blame; `binding` knows the allowed types only.
    waiting = [
        service.key
        for service in short
        if service.key not in found and (service.binding or specs[service.key].gpu_types or service.unserved_rps == 0)
    ]
    if waiting:
        catalogue = Catalogue(inputs)
        for key in sorted(waiting, key=lambda key: (-specs[key].priority, key))[:MOST_SERVICES]:
            found[key] = _Search(inputs, decided, key, catalogue, deadline).conflict()
    services = [
        service.model_copy(update={"conflict": found[service.key]}) if found.get(service.key) else service
        for service in decided.services
    ]
    return decided.model_copy(update={"services": services})


class _Search:
    """One service beside the others as planned."""

    def __init__(self, inputs: PlanInputs, decided: Plan, key: str, catalogue: Catalogue, deadline: Deadline) -> None:
        (self.service,) = (service for service in inputs.services if service.key == key)
        self.inputs, self.catalogue, self.deadline = inputs, catalogue, deadline
        self.planned = decided.service(key)
        self.others = [other for other in (*decided.services, *decided.kept) if other.key != key]
        nodes = node_types(inputs.gpu_types, catalogue.rows, self.others)
        self.left = without_held_idle(left_by(self.others, catalogue.devices, catalogue.rows), nodes)
        self.demand_rps = 0.0

    def conflict(self) -> list[str]:
        """Limits that cannot all hold while the demand is served, and none of which is superfluous; empty where no
        limit is to blame, or the time did not suffice."""
        prepared = prepare(self.service, self.inputs, self.catalogue) if self._in_time() else None
        if prepared is None or isinstance(prepared, Refusal):
            return []
        self.demand_rps = float(prepared.demand.rps.sum())
        case, limits = self._as_it_is(prepared)
        least = self._shortage(_all_lifted(case, limits))
        if not self._is_short(case, least):
            return []
        needed = []
        for limit in limits:
            without = limit.lifted(case)
            if self._is_short(without, least):
                case = without
            else:
                needed.append(limit.words)
        return [] if self.deadline.hit else needed

    def _is_short(self, case: _Case, least: _Shortage) -> bool:
        """Whether more is left undone than must be. Where nothing must be, replicas that serve all, or the proof that
        there are none, are found several times faster than the least shortage."""
        program = case.program
        all_reachable = self.demand_rps <= float(program.rates.sum()) * (1 + ROUNDING)
        if self._in_time() and least == _NOTHING and all_reachable and program.rates.size:
            rows = sorted(case.limits)
            amounts = np.array([case.limits[name] for name in rows], dtype=np.float64)
            service = program.numbers(rows)
            pricer = Pricer(service, amounts, whole=True)
            terms = Terms(service.cost, service.change, 0.0, 0.0)
            bound = pricer.price(terms, relative=1.0, absolute=0.0, deadline=self.deadline)
            if pricer.replicas:
                return False
            if np.isinf(bound):
                return True
        return self._shortage(case).exceeds(least, self.demand_rps)

    def _shortage(self, case: _Case) -> _Shortage:
        if not self._in_time():
            return _NOTHING
        program = case.program
        solver = FleetSolver(case.limits, gap=_GAP, deadline=self.deadline, warm=WarmState())
        # With limits lifted most cases are not short, and any replicas that show it will do.
        counts = greedy(program, case.limits)
        if program.missing(counts) or solver.unserved_rps(program, counts) > 0 or solver.at_risk(program, counts) > 0:
            (counts,) = solver.alone(program, case.limits).replicas.values()
        unreachable = self.demand_rps - float(program.rates.sum())
        possible = any(program.room(v, case.limits) > 0 for v in range(len(program.types)))
        unserved = unreachable + solver.unserved_rps(program, counts)
        if unserved <= ROUNDING * self.demand_rps:
            unserved = 0.0
        return _Shortage(unserved, program.missing(counts), solver.at_risk(program, counts), not possible)

    def _in_time(self) -> bool:
        if self.deadline.remaining <= 0:
            self.deadline.hit = True
        return not self.deadline.hit

    def _as_it_is(self, prepared: Prepared) -> tuple[_Case, list[_Limit]]:
        """The service with all its limits, and these, those first that are rather left out of the set."""
        spec = self.service.spec
        program = self._reduced(prepared)
        anything = program
        if spec.gpu_types:
            free = self.service.model_copy(update={"spec": spec.model_copy(update={"gpu_types": []})})
            other = prepare(free, self.inputs, self.catalogue)
            if isinstance(other, Prepared):
                anything = self._reduced(other)
        written: list[_Limit] = []
        inventories: list[_Limit] = []
        if set(anything.types) > set(program.types):
            words = f"spec.gpuTypes {', '.join(spec.gpu_types)}"
            written.append(_Limit(words, lambda case: replace(case, any_type=True)))
        for row in self.catalogue.rows:
            if row.name in program.rows:
                written.append(_Limit(self._shared_in_words(row), _without_row(row.name)))
        if spec.replicas.max is not None:
            words = f"spec.replicas.max {spec.replicas.max}"
            written.append(_Limit(words, _with_every(lambda program: replace(program, maximum=None))))
        if spec.replicas.max_variants is not None:
            words = f"spec.replicas.maxVariants {spec.replicas.max_variants}"
            written.append(_Limit(words, _with_every(lambda program: replace(program, distinct=None))))
        for field in sorted({loss.field for loss in program.losses}):
            written.append(_Limit(_policy_in_words(self.service, field), _without_losses(field)))
        for name in sorted(set(program.types)):
            words, is_written = self._devices_in_words(name)
            (written if is_written else inventories).append(_Limit(words, _without_row(name)))
        limits = [*inventories, *sorted(written, key=lambda limit: limit.words)]
        return _Case((program, anything), self.left), limits

    def _reduced(self, prepared: Prepared) -> ServiceProgram:
        """Its numbers, the pools of the plan at what the plan found them to hold."""
        margins = starting(prepared, self.inputs.policy, self.planned)
        return reduce(prepared, self.inputs.policy, None, self.catalogue.rows, margins).program

    def _devices_in_words(self, name: str) -> tuple[str, bool]:
        """The bound on devices of a type, and whether somebody wrote it."""
        limit, exist = self.catalogue.gpu_types[name].spec.limit, self.inputs.inventory.get(name, 0)
        by_limit = limit is not None and limit < exist
        usable = self.catalogue.devices[name]
        taken = usable - int(self.left[name])
        words = f"{'limit' if by_limit else 'inventory'} {usable} of GPUType {name}"
        return words + (f", of which other services have {taken}" if taken else ""), by_limit

    def _shared_in_words(self, row: SharedRow) -> str:
        taken = sum(row.held(other) for other in self.others)
        field, _, whose = row.name.partition(" of ")
        others = f", of which other services take {taken:g}" if taken else ""
        return f"{field} {row.limit:g} of {whose}{others}"


def _policy_in_words(service: LLMService, field: str) -> str:
    spot = service.spec.spot
    assert spot is not None
    return f"{field} {spot.survive_loss_of if field == FIELD_ANY_POOL else f'{spot.max_share:g}'}"


def _without_losses(field: str) -> Callable[[_Case], _Case]:
    return _with_every(
        lambda program: replace(program, losses=tuple(loss for loss in program.losses if loss.field != field))
    )


def _all_lifted(case: _Case, limits: Iterable[_Limit]) -> _Case:
    for limit in limits:
        case = limit.lifted(case)
    return case


def _without_row(name: str) -> Callable[[_Case], _Case]:
    def lifted(case: _Case) -> _Case:
        enough = 0.0
        for program in case.programs:
            unbounded = replace(program, maximum=None)
            enough = max(enough, unbounded.takes(tuple(max(1, n) for n in unbounded.upper(None))).get(name, 0.0))
        return replace(case, limits={**case.limits, name: max(enough, case.limits[name])})

    return lifted


def _with_every(change: Callable[[ServiceProgram], ServiceProgram]) -> Callable[[_Case], _Case]:
    def lifted(case: _Case) -> _Case:
        first, second = case.programs
        return replace(case, programs=(change(first), change(second)))

    return lifted
