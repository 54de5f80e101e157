"""What services share beside devices: a budget is a row of the program, as the devices of a type are.

    PlanInputs --rows_of--> SharedRow ... : a limit, and what a device of each GPU type takes of it
                            (of all services, or of those of one namespace)

Every row is linear in devices, so that one form does for money, watts and counts. The planner turns rows into
coefficients of the program, the plans that stay in force are taken off their limits first, and the explanation of a
shortage names them in words. They live beside devices under names that no GPUType can have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llmfleet.api import PlannedVariant, PowerDomain, ServicePlan
from llmfleet.api.fleetpolicy import NamespaceLimit
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.variants import Variant


@dataclass(frozen=True)
class SharedRow:
    """One limit that services share."""

    name: str
    """What it is, in words: `budgetPerHour of FleetPolicy default`. Has a space, so it is no GPUType's name."""
    limit: float
    """The most that all replicas may take."""
    per_device: Mapping[str, float]
    """What a device takes, by GPUType name; an absent type takes nothing."""
    unit: Literal["cost", "watts", "devices"]
    """What is counted: a plan that stays in force on a deleted type then counts as its plan says."""
    with_limit: Callable[[PlanInputs, float], PlanInputs] = field(compare=False, repr=False)
    """The inputs with another limit in its place."""
    types: frozenset[str] | None = None
    """GPU types that it is about; None: all."""
    namespace: str | None = None
    """Namespace whose services it is about; None: all."""

    def concerns(self, namespace: str | None) -> bool:
        """Whether it is about the services of a namespace."""
        return self.namespace is None or self.namespace == namespace

    def per_replica(self, variants: Iterable[Variant]) -> FloatArray:
        """What one replica takes, shape (variants,)."""
        return np.array([self.per_device.get(v.type_name, 0.0) * v.devices for v in variants], dtype=np.float64)

    def uncounted(self, gpu_type: str) -> bool:
        """Whether the row is about a type of which it is not known what a device takes."""
        return self.types is not None and gpu_type in self.types and gpu_type not in self.per_device

    def held(self, plan: ServicePlan) -> float:
        """What a plan that stays in force takes."""
        if not self.concerns(plan.namespace):
            return 0.0
        return sum(variant.replicas * self._recorded(variant) for variant in plan.variants)

    def _recorded(self, variant: PlannedVariant) -> float:
        if variant.gpu_type in self.per_device:
            return self.per_device[variant.gpu_type] * variant.devices
        if self.types is not None and variant.gpu_type not in self.types:
            return 0.0
        match self.unit:
            case "cost":
                return variant.cost_per_replica_hour
            case "watts":
                return variant.watts_per_replica or 0.0
            case "devices":
                return 0.0


def rows_of(inputs: PlanInputs) -> tuple[SharedRow, ...]:
    """The rows that the inputs ask for, in a fixed order."""
    found = []
    prices = {gpu_type.metadata.name: gpu_type.spec.device_price_per_hour for gpu_type in inputs.gpu_types}
    budget = inputs.policy.budget_per_hour
    if budget is not None:
        found.append(SharedRow("budgetPerHour of FleetPolicy default", budget, prices, "cost", _with_budget))
    found += [_power(domain, inputs) for domain in sorted(inputs.power_domains, key=lambda domain: domain.key)]
    for limit in sorted(inputs.policy.namespace_limits, key=lambda limit: limit.namespace):
        found += _of_namespace(limit, prices)
    return tuple(found)


def _with_budget(inputs: PlanInputs, budget: float) -> PlanInputs:
    return inputs.model_copy(update={"policy": inputs.policy.model_copy(update={"budget_per_hour": budget})})


def _of_namespace(limit: NamespaceLimit, prices: Mapping[str, float]) -> Iterator[SharedRow]:
    def named(field: str) -> str:
        return f"namespaceLimits[{limit.namespace}].{field} of FleetPolicy default"

    def changed(inputs: PlanInputs, **update: object) -> PlanInputs:
        others = [other for other in inputs.policy.namespace_limits if other.namespace != limit.namespace]
        limits = [*others, limit.model_copy(update=update)]
        return inputs.model_copy(update={"policy": inputs.policy.model_copy(update={"namespace_limits": limits})})

    def with_cost(inputs: PlanInputs, cost: float) -> PlanInputs:
        return changed(inputs, cost_per_hour=cost)

    def with_devices(name: str) -> Callable[[PlanInputs, float], PlanInputs]:
        return lambda inputs, most: changed(inputs, devices={**(limit.devices or {}), name: int(most)})

    whose = limit.namespace
    if limit.cost_per_hour is not None:
        yield SharedRow(named("costPerHour"), limit.cost_per_hour, prices, "cost", with_cost, namespace=whose)
    for name, most in sorted((limit.devices or {}).items()):
        row, types = named(f"devices.{name}"), frozenset({name})
        yield SharedRow(row, most, {name: 1.0}, "devices", with_devices(name), types, whose)


def _power(domain: PowerDomain, inputs: PlanInputs) -> SharedRow:
    members = frozenset(domain.spec.gpu_types)
    watts = {
        gpu_type.metadata.name: gpu_type.spec.watts.peak
        for gpu_type in inputs.gpu_types
        if gpu_type.metadata.name in members and gpu_type.spec.watts is not None
    }

    def with_limit(inputs: PlanInputs, budget: float) -> PlanInputs:
        spec = domain.spec.model_copy(update={"budget_watts": budget})
        others = [other for other in inputs.power_domains if other.key != domain.key]
        return inputs.model_copy(update={"power_domains": [*others, domain.model_copy(update={"spec": spec})]})

    name = f"budgetWatts of PowerDomain {domain.key}"
    return SharedRow(name, domain.spec.budget_watts, watts, "watts", with_limit, members)


def left_by(kept: Iterable[ServicePlan], devices: Mapping[str, int], rows: Iterable[SharedRow]) -> dict[str, float]:
    """What is left of devices and rows, by name, beside plans that stay in force; never below 0."""
    left: dict[str, float] = {**devices, **{row.name: row.limit for row in rows}}
    for plan in kept:
        for variant in plan.variants:
            if variant.gpu_type in devices:
                left[variant.gpu_type] -= variant.replicas * variant.devices
        for row in rows:
            left[row.name] -= row.held(plan)
    return {name: max(0, amount) for name, amount in left.items()}
