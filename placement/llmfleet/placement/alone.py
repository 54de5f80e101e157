"""One service solved by itself beside the others: the laboratory of every "what would".

In flow the inputs of a plan, the plan and a service; out flows a `Laboratory`, in which the inputs may be edited and
the service solved again while all others stay exactly as planned, with all they take of devices, budget and whatever
else is shared. To the planner the others are services that cannot be read: those keep what they have.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmfleet.api import FleetPolicySpec, LLMService, Plan, ServicePlan
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.planner import plan

TIME_LIMIT_S = 5.0
"""For one such solve; a single service takes milliseconds."""


@dataclass(frozen=True)
class Laboratory:
    """A service and the plans of all others."""

    inputs: PlanInputs
    """What to solve; `services` holds the one."""
    others: tuple[ServicePlan, ...]
    """Plans that are in force beside it."""

    @property
    def service(self) -> LLMService:
        """The one service."""
        return self.inputs.services[0]

    def solved(self, inputs: PlanInputs) -> ServicePlan | None:
        """The cheapest plan of the service with edited inputs, change having no price; None where it is refused."""
        limit_s = min(TIME_LIMIT_S, inputs.policy.solve_time_limit_seconds)
        free = {"optimality_gap": 0.0, "switching_cost_fraction": 0.0, "solve_time_limit_seconds": limit_s}
        return self._solved(inputs, inputs.policy.model_copy(update=free), ())

    def solved_from(self, before: ServicePlan, inputs: PlanInputs) -> ServicePlan | None:
        """The same where `before` is in force, with the policy's own gap and price of change."""
        return self._solved(inputs, inputs.policy, (before,))

    def _solved(
        self, inputs: PlanInputs, policy: FleetPolicySpec, before: tuple[ServicePlan, ...]
    ) -> ServicePlan | None:
        in_force = Plan(
            plan_id="",
            status="feasible",
            stopped_by="gap",
            solve_seconds=0,
            cost_per_hour=0,
            services=[*self.others, *before],
        )
        return plan(inputs.model_copy(update={"policy": policy}), in_force)[0].service(self.service.key)


def laboratory(inputs: PlanInputs, decided: Plan, key: str) -> Laboratory:
    """The service `key` beside the others of a plan. Raises KeyError where the inputs do not have it."""
    service = next((service for service in inputs.services if service.key == key), None)
    if service is None:
        raise KeyError(key)
    others = tuple(other for other in (*decided.services, *decided.kept) if other.key != key)
    named = f"{service.metadata.namespace}/{service.spec.profile}"
    update = {
        "services": [service],
        "unreadable": sorted(other.key for other in others),
        "profiles": [profile for profile in inputs.profiles if profile.key == named],
        "demand": {key: inputs.demand[key]} if key in inputs.demand else {},
        "forecast": {key: inputs.forecast[key]} if key in inputs.forecast else {},
    }
    return Laboratory(inputs.model_copy(update=update), others)


def left_to(lab: Laboratory) -> dict[str, int]:
    """Devices by GPU type that limits, inventory and the others leave to the service, those that it has included."""
    left = {}
    for gpu_type in lab.inputs.gpu_types:
        name, limit = gpu_type.metadata.name, gpu_type.spec.limit
        exist = lab.inputs.inventory.get(name, 0)
        taken = sum(v.replicas * v.devices for plan in lab.others for v in plan.variants if v.gpu_type == name)
        left[name] = max(0, (exist if limit is None else min(exist, limit)) - taken)
    return left
