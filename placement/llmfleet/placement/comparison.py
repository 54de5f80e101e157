"""Two plans side by side: what each service has in one and in the other.

In flow two plans, of the same fleet at two times or under two suppositions; out flow, for each service of either, its
replicas, demand, cost and shortage in both, and the same in total. No figure is computed twice: all are the plans' own.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field

from llmfleet.api import Plan
from llmfleet.api.meta import ApiModel


class Standing(ApiModel):
    """What one service has in one plan."""

    replicas: dict[str, int] = Field(default_factory=dict)
    """Replicas by variant."""
    demand_rps: float = 0.0
    """Demand, in requests per second."""
    unserved_rps: float = 0.0
    """Demand that the plan does not serve."""
    cost_per_hour: float = 0.0
    """Cost of the replicas."""
    refusal: str | None = None
    """Reason for which the service was refused; its figures are then those of the plan that it keeps, if any."""

    @classmethod
    def of(cls, plan: Plan, key: str) -> Self | None:
        """The service's standing in a plan; None where the plan does not know it."""
        refusal = next((refusal.reason for refusal in plan.refusals if refusal.key == key), None)
        planned = plan.service(key) or next((kept for kept in plan.kept if kept.key == key), None)
        if planned is None:
            return None if refusal is None else cls(refusal=refusal)
        return cls(
            replicas=planned.replicas,
            demand_rps=planned.demand_rps,
            unserved_rps=planned.unserved_rps,
            cost_per_hour=planned.cost_per_hour,
            refusal=refusal,
        )


class ServiceDifference(ApiModel):
    """One service in two plans."""

    key: str
    """`namespace/name`."""
    before: Standing | None
    """In the first plan; absent where it does not have the service."""
    after: Standing | None
    """In the second plan."""

    @property
    def changed(self) -> bool:
        """Whether the service has other replicas, another cost, or goes short by another amount."""
        return self.before != self.after


class Total(ApiModel):
    """One plan as a whole."""

    plan_id: str
    """Equal ids: equal replicas and routes."""
    status: str
    """As in the plan."""
    cost_per_hour: float
    """Cost of the fleet."""
    unserved_rps: float
    """Demand of all services that is not served."""

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """A plan's total."""
        return cls(
            plan_id=plan.plan_id,
            status=plan.status,
            cost_per_hour=plan.cost_per_hour,
            unserved_rps=sum(service.unserved_rps for service in plan.services),
        )


class PlanDifference(ApiModel):
    """Two plans side by side."""

    edits: list[str] = Field(default_factory=list)
    """What was supposed for the second plan, where it is a supposition."""
    before: Total
    """The first plan."""
    after: Total
    """The second plan."""
    services: list[ServiceDifference]
    """Every service of either plan, by key."""


def difference(before: Plan, after: Plan, *, edits: list[str] | None = None) -> PlanDifference:
    """Holds two plans against each other."""
    keys = {service.key for plan in (before, after) for service in (*plan.services, *plan.kept)}
    keys |= {refusal.key for plan in (before, after) for refusal in plan.refusals}
    return PlanDifference(
        edits=edits or [],
        before=Total.of(before),
        after=Total.of(after),
        services=[
            ServiceDifference(key=key, before=Standing.of(before, key), after=Standing.of(after, key))
            for key in sorted(keys)
        ],
    )
