"""Why a service is planned as it is, as data: the command line prints it, the operator may put it into an event.

In flow a plan, the inputs it was made from and a service; out flows one `Explanation`. It repeats nothing that only
the solver knew: every alternative is computed again, with the rest of the fleet as planned, so that the figures are
what the alternative would really cost beside the others. It is therefore as true as the inputs are those of the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from llmfleet.api import LLMService, NextBest, Plan, Refusal, ServicePlan
from llmfleet.api.llmservice import ReplicaBounds
from llmfleet.api.meta import ApiModel
from llmfleet.api.plan import PlannedNodes, PoolLoss
from llmfleet.placement.alternatives import cheapest_where
from llmfleet.placement.checks import Catalogue, Prepared, prepare
from llmfleet.placement.configurations import VariantKey
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import ROUNDING, Deadline
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.performance.correction import largest_factor, since
from llmfleet.placement.restarts import solved_fleet
from llmfleet.placement.rounds import Reduced, reduce, starting
from llmfleet.placement.rows import left_by
from llmfleet.placement.service_program import Replicas, ServiceProgram
from llmfleet.placement.solver.problem import MOST_REPLICAS
from llmfleet.placement.variants import ExclusionReason, Variant
from llmfleet.placement.warm_state import WarmState
from llmfleet.placement.whole_nodes import node_types, without_held_idle
from llmfleet.placement.workload import settled_demand

RejectionReason = Literal["price", "inventory"] | ExclusionReason


class Corrected(ApiModel):
    """What engines in service have taught of a variant, as the plan counts with it."""

    ttft_factor: float
    """The largest factor on the predicted TTFT, at any load that was seen; 1: none."""
    tpot_factor: float
    """The same of TPOT."""


class ChosenVariant(ApiModel):
    """A variant with replicas, and why."""

    name: str
    """Name of the variant."""
    replicas: int
    """Planned replicas."""
    cost_per_hour: float
    """Cost of these replicas per hour."""
    served_rps: float
    """Requests per second that it is to serve."""
    utilization: float
    """Share used of the load at which its replicas just keep the objective; beyond the policy's target only while a
    plan in force is kept."""
    corrected: Corrected | None = None
    """What its engines have taught; absent where nothing was seen of them."""
    cost_per_hour_without: float | None
    """Least cost of the service without this variant, beside the rest of the fleet as planned; absent where no less
    can be left unserved without it."""


class SingleType(ApiModel):
    """What the service would cost on one GPU type alone, devices being no object."""

    gpu_type: str
    """Name of the GPU type."""
    replicas: dict[str, int]
    """Replicas by variant."""
    cost_per_hour: float
    """Cost per hour."""
    devices_missing: int
    """Devices that this would take beyond what the rest of the fleet leaves."""


class RejectedVariant(ApiModel):
    """A variant or GPU type that the plan does not use for this service, and why."""

    name: str
    """Name of the variant, or of the GPU type where no variant of it exists."""
    reason: RejectionReason
    """price: using it costs more. objective: too slow in every bucket with demand. inventory: no devices left.
    The others: it is no candidate."""
    message: str
    """The reason in words."""
    cost_per_hour_with: float | None = None
    """Least cost of the service with at least one replica of it (reason price)."""


class Explanation(ApiModel):
    """Why one service is planned as it is."""

    key: str
    """`namespace/name` of the service."""
    refusal: Refusal | None = None
    """Set where the service could not be planned at all; everything below is then empty."""
    demand_rps: float = 0.0
    """Demand, in requests per second."""
    unserved_rps: float = 0.0
    """Demand that the plan does not serve."""
    cost_per_hour: float = 0.0
    """Cost of the planned replicas."""
    idle_cost_per_hour: float | None = None
    """Its part of that for idle devices of nodes that are billed whole; absent where there are no such nodes."""
    nodes: list[PlannedNodes] = Field(default_factory=list)
    """Nodes, of all services together, of the types that it uses and that are billed by the node."""
    chosen: list[ChosenVariant] = Field(default_factory=list)
    """Variants with replicas, by name."""
    single_types: list[SingleType] = Field(default_factory=list)
    """GPU types that could serve all the demand alone, cheapest first; none where nothing has to run."""
    next_best: NextBest | None = None
    """The cheapest plan with another set of variants."""
    binding: list[str] = Field(default_factory=list)
    """Constraints that bind."""
    shortfall: str | None = None
    """Who is short, by how much and what would help."""
    losses: list[PoolLoss] = Field(default_factory=list)
    """Losses of spot capacity that it has to survive, and what would be served after each."""
    rejected: list[RejectedVariant] = Field(default_factory=list)
    """Variants and types that are not used, by name."""
    warnings: list[str] = Field(default_factory=list)
    """Facts that did not stop the plan."""


def explain(plan: Plan, inputs: PlanInputs, key: str, *, clock: Callable[[], float] = time.monotonic) -> Explanation:
    """Explains one service of a plan. `inputs` are those that the plan was made from; `clock` gives seconds.

    Raises KeyError, naming what there is, if neither plan nor inputs know the service.
    """
    inputs = settled_demand(inputs, {part.key: part for part in plan.services})
    service = next((service for service in inputs.services if service.key == key), None)
    planned = plan.service(key)
    refusal = next((refusal for refusal in plan.refusals if refusal.key == key), None)
    if service is None or (planned is None and refusal is None):
        known = sorted([s.key for s in plan.services] + [r.key for r in plan.refusals])
        raise KeyError(f"service {key!r} is not in the plan; it has {', '.join(known) or 'none'}")
    if planned is None:
        return Explanation(key=key, refusal=refusal)
    study = _study(plan, inputs, service, planned, clock)
    return Explanation(
        key=key,
        demand_rps=planned.demand_rps,
        unserved_rps=planned.unserved_rps,
        cost_per_hour=planned.cost_per_hour,
        idle_cost_per_hour=planned.idle_cost_per_hour,
        nodes=[one for one in plan.nodes or [] if one.gpu_type in {v.gpu_type for v in planned.variants}],
        chosen=study.chosen(),
        single_types=study.single_types(),
        next_best=planned.next_best,
        binding=planned.binding,
        shortfall=planned.shortfall,
        losses=planned.losses,
        rejected=study.rejected(),
        warnings=planned.warnings,
    )


def single_types(
    plan: Plan, inputs: PlanInputs, key: str, *, clock: Callable[[], float] = time.monotonic
) -> list[SingleType]:
    """The GPU types that could serve all that a planned service is asked for, cheapest first. Arguments and errors as
    `explain`'s."""
    service = next(service for service in inputs.services if service.key == key)
    planned = plan.service(key)
    if planned is None:
        raise KeyError(f"service {key!r} has no plan")
    return _study(plan, settled_demand(inputs, {key: planned}), service, planned, clock).single_types()


def _study(
    plan: Plan, inputs: PlanInputs, service: LLMService, planned: ServicePlan, clock: Callable[[], float]
) -> _Study:
    catalogue = Catalogue(inputs)
    checked = prepare(service, inputs, catalogue)
    if isinstance(checked, Refusal):
        raise ValueError(f"the inputs are not those of the plan, which has {service.key!r}: {checked.message}")
    item = reduce(checked, inputs.policy, None, catalogue.rows, starting(checked, inputs.policy, planned))
    return _Study(plan, inputs, catalogue, item, clock)


class _Study:
    """One service and its alternatives, the rest of the fleet as planned."""

    def __init__(
        self, plan: Plan, inputs: PlanInputs, catalogue: Catalogue, item: Reduced, clock: Callable[[], float]
    ) -> None:
        self.item = item
        self.policy = inputs.policy
        self.at = inputs.at
        planned = plan.service(item.program.key)
        assert planned is not None
        self.planned = planned
        self.names = [variant.name for variant in item.prepared.variants]
        self.replicas: Replicas = tuple(planned.replicas.get(name, 0) for name in self.names)
        others = [other for other in plan.services if other.key != item.program.key]
        self.rows = catalogue.rows
        self.nodes = node_types(inputs.gpu_types, catalogue.rows, [*plan.kept, *others])
        self.room = without_held_idle(left_by([*plan.kept, *others], catalogue.devices, catalogue.rows), self.nodes)
        self.solver = FleetSolver(
            self.room,
            gap=self.policy.optimality_gap,
            deadline=Deadline(clock, clock() + self.policy.solve_time_limit_seconds),
            warm=WarmState(),
        )

    def chosen(self) -> list[ChosenVariant]:
        program, found = self.item.program, []
        fraction = {(route.bucket, route.variant): route.fraction for route in self.planned.routes}
        for v, (name, count) in enumerate(zip(self.names, self.replicas, strict=True)):
            if not count:
                continue
            shares = np.array([fraction.get((bucket, name), 0.0) for bucket in self.item.largest])
            possible = program.throughput[:, v] > 0
            load = float((shares * program.rates)[possible] @ (1 / program.throughput[possible, v]))
            without = self._cheapest(v, least=0, most=0)
            found.append(
                ChosenVariant(
                    name=name,
                    replicas=count,
                    cost_per_hour=count * float(program.cost[v]),
                    served_rps=float(shares @ program.rates),
                    utilization=load / float(program.capacity(self.replicas)[v]) * self.item.margins.utilization,
                    corrected=self._corrected(self.item.prepared.variants[v]),
                    cost_per_hour_without=None if without is None else self._cost(program, without),
                )
            )
        return found

    def _cost(self, program: ServiceProgram, counts: Replicas) -> float:
        """What the service costs with these replicas, all that they change of the bill for nodes being its own."""
        cost = program.cost_of(counts)
        for one in self.nodes:
            idle = one.idle([(program, counts)]) - one.idle([(self.item.program, self.replicas)])
            cost += one.price * idle
        return cost + (self.planned.idle_cost_per_hour or 0.0)

    def _corrected(self, variant: Variant) -> Corrected | None:
        learnt = next((one for one in variant.profile.status.corrections if VariantKey.of(one) == variant.key), None)
        if learnt is None:
            return None
        learnt, measured = since(learnt, variant.measurement), variant.measurement is not None
        return Corrected(
            ttft_factor=largest_factor(learnt.ttft, self.at, measured=measured),
            tpot_factor=largest_factor(learnt.tpot, self.at, measured=measured),
        )

    def single_types(self) -> list[SingleType]:
        program, found = self.item.program, []
        for gpu_type in sorted(set(program.types)):
            columns = [v for v, name in enumerate(program.types) if name == gpu_type]
            alone = _restricted(self.item.prepared, columns)
            enough = {name: float(MOST_REPLICAS) for name in set(program.types)}
            nodes = tuple(replace(one, rows=()) for one in self.nodes if one.name == gpu_type)
            deadline = self.solver.deadline
            solved = solved_fleet([alone], self.policy, None, (), enough, WarmState(), deadline, nodes).services[0]
            served = solved.item.program.rates.sum() - solved.unserved.sum()
            if program.rates.sum() - served > ROUNDING:
                continue
            counts = solved.replicas
            used = sum(solved.item.program.use(counts).values())
            if not used:
                continue
            found.append(
                SingleType(
                    gpu_type=gpu_type,
                    replicas={self.names[v]: count for v, count in zip(columns, counts, strict=True) if count},
                    cost_per_hour=self._cost(solved.item.program, counts),
                    devices_missing=max(0, used - int(self.room[gpu_type])),
                )
            )
        return sorted(found, key=lambda single: (single.cost_per_hour, single.gpu_type))

    def rejected(self) -> list[RejectedVariant]:
        program = self.item.program
        found = [
            RejectedVariant(name=excluded.name, reason=excluded.reason, message=excluded.message)
            for excluded in self.item.prepared.excluded
        ]
        for v, name in enumerate(self.names):
            if self.replicas[v]:
                continue
            gpu_type, devices = program.types[v], program.devices[v]
            used = program.use(self.replicas).get(gpu_type, 0)
            if program.rates.size and not (program.throughput[:, v] > 0).any():
                message = f"{name} meets the objective in no bucket with demand"
                found.append(RejectedVariant(name=name, reason="objective", message=message))
            elif self.room[gpu_type] < devices:
                found.append(
                    RejectedVariant(
                        name=name,
                        reason="inventory",
                        message=f"a replica takes {devices} of GPUType {gpu_type}; the rest of the fleet leaves "
                        f"{self.room[gpu_type]}",
                    )
                )
            else:
                found.append(self._too_dear(v, name, int(self.room[gpu_type]) - used))
        return sorted(found, key=lambda rejected: rejected.name)

    def _too_dear(self, v: int, name: str, left: int) -> RejectedVariant:
        counts = self._cheapest(v, least=1, most=None)
        if counts is None:
            return RejectedVariant(
                name=name,
                reason="inventory",
                message=f"with a replica of {name} more demand would go unserved; {left} devices are unused",
            )
        cost = self._cost(self.item.program, counts)
        more = cost - self.planned.cost_per_hour
        share = f" ({more / self.planned.cost_per_hour:+.0%})" if self.planned.cost_per_hour > 0 else ""
        return RejectedVariant(
            name=name,
            reason="price",
            message=f"the cheapest plan with {name} costs {cost:g} per hour, {more:+.3g}{share}",
            cost_per_hour_with=cost,
        )

    def _cheapest(self, v: int, *, least: int, most: int | None) -> Replicas | None:
        """Least cost with bounds on one variant's replicas and no more unserved than planned."""
        return cheapest_where(
            lambda program: program.bound_replicas(0, v, least, most),
            self.item,
            self.replicas,
            self.planned.demand_rps - self.planned.unserved_rps,
            room=self.room,
            rows=self.rows,
            policy=self.policy,
            deadline=self.solver.deadline,
            nodes=self.nodes,
        )


def _restricted(prepared: Prepared, columns: list[int]) -> Prepared:
    """The service with some of its variants only, and no bounds on its replicas."""
    service = prepared.service
    unbounded = service.model_copy(update={"spec": service.spec.model_copy(update={"replicas": ReplicaBounds()})})
    return replace(
        prepared,
        service=unbounded,
        variants=[prepared.variants[v] for v in columns],
        throughput=prepared.throughput[:, columns],
        known=prepared.known[:, columns],
    )
