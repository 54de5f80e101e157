"""What services share beside devices: a budget is a row of the program, as the devices of a type are.

    PlanInputs --rows_of--> SharedRow ... : a limit, and what a device of each GPU type takes of it

Every row is linear in devices, so that one form does for money, watts and counts. The planner turns rows into
coefficients of the program, the plans that stay in force are taken off their limits first, and the explanation of a
shortage names them in words. They live beside devices under names that no GPUType can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llmfleet.api import PlannedVariant, PowerDomain, ServicePlan
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
    unit: Literal["cost", "watts"]
    """What is counted: a plan that stays in force on a deleted type then counts as its plan says."""
    types: frozenset[str] | None = None
    """GPU types that it is about; None: all."""

    def per_replica(self, variants: Iterable[Variant]) -> FloatArray:
        """What one replica takes, shape (variants,)."""
        return np.array([self.per_device.get(v.type_name, 0.0) * v.devices for v in variants], dtype=np.float64)

    def uncounted(self, gpu_type: str) -> bool:
        """Whether the row is about a type of which it is not known what a device takes."""
        return self.types is not None and gpu_type in self.types and gpu_type not in self.per_device

    def held(self, plan: ServicePlan) -> float:
        """What a plan that stays in force takes."""
        return sum(variant.replicas * self._recorded(variant) for variant in plan.variants)

    def _recorded(self, variant: PlannedVariant) -> float:
        if variant.gpu_type in self.per_device:
            return self.per_device[variant.gpu_type] * variant.devices
        if self.types is not None and variant.gpu_type not in self.types:
            return 0.0
        return variant.cost_per_replica_hour if self.unit == "cost" else variant.watts_per_replica or 0.0


def rows_of(inputs: PlanInputs) -> tuple[SharedRow, ...]:
    """The rows that the inputs ask for, in a fixed order."""
    found = []
    if inputs.policy.budget_per_hour is not None:
        prices = {gpu_type.metadata.name: gpu_type.spec.device_price_per_hour for gpu_type in inputs.gpu_types}
        found.append(SharedRow("budgetPerHour of FleetPolicy default", inputs.policy.budget_per_hour, prices, "cost"))
    found += [_power(domain, inputs) for domain in sorted(inputs.power_domains, key=lambda domain: domain.key)]
    return tuple(found)


def _power(domain: PowerDomain, inputs: PlanInputs) -> SharedRow:
    members = frozenset(domain.spec.gpu_types)
    watts = {
        gpu_type.metadata.name: gpu_type.spec.watts.peak
        for gpu_type in inputs.gpu_types
        if gpu_type.metadata.name in members and gpu_type.spec.watts is not None
    }
    return SharedRow(f"budgetWatts of PowerDomain {domain.key}", domain.spec.budget_watts, watts, "watts", members)


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
