"""What changed for one service between two plans, and why.

In flow the earlier plan, the later one and the inputs of the later; out flows the difference with its causes. What
differs can be read off the plans (demand, prices, which constraints bind); whether it is the *reason* is tried: the
service is solved again, beside the others as they are now, with that one difference undone. If it then keeps the
replicas of the earlier plan, that difference alone moved it.
"""

from __future__ import annotations

import math

from pydantic import Field

from llmfleet.api import BucketSizes, Plan, ServicePlan
from llmfleet.api.meta import ApiModel
from llmfleet.placement.alone import Laboratory, laboratory, left_to
from llmfleet.placement.comparison import ServiceDifference, Standing
from llmfleet.placement.inputs import Demand, PlanInputs
from llmfleet.placement.whatif import edited

_SAME = 1e-9


class Cause(ApiModel):
    """One thing that differs, and whether it explains the change."""

    message: str
    """What differs, in words."""
    decisive: bool
    """With this alone undone, the replicas would be those of the earlier plan."""


class Changes(ApiModel):
    """One service in two plans, with the causes of the difference."""

    difference: ServiceDifference
    """Both plans' figures."""
    causes: list[Cause] = Field(default_factory=list)
    """What differs, decisive causes first; empty where the replicas are the same."""

    @property
    def moved(self) -> bool:
        """Whether there are other replicas."""
        before, after = self.difference.before, self.difference.after
        return (before.replicas if before else {}) != (after.replicas if after else {})


def changes_since(previous: Plan, decided: Plan, inputs: PlanInputs, key: str) -> Changes:
    """What changed for a service since an earlier plan. `inputs` are those of the later one, `decided`."""
    both = ServiceDifference(key=key, before=Standing.of(previous, key), after=Standing.of(decided, key))
    before = previous.service(key) or next((kept for kept in previous.kept if kept.key == key), None)
    after = decided.service(key)
    found = Changes(difference=both)
    if not found.moved or before is None or after is None:
        return found
    lab = laboratory(inputs, decided, key)
    causes = [*_devices(before, lab), *_undone(before, after, lab)]
    if not any(cause.decisive for cause in causes):
        causes.append(
            Cause(
                message="none of this alone explains it: the objective, the profile, replicas.min or max, or what the "
                "other services take changed too, or the change saves more than its price",
                decisive=False,
            )
        )
    causes.sort(key=lambda cause: not cause.decisive)
    return found.model_copy(update={"causes": causes})


def _devices(before: ServicePlan, lab: Laboratory) -> list[Cause]:
    """Types of which the earlier replicas would now take more than there is for this service."""
    left = left_to(lab)
    used: dict[str, int] = {}
    for variant in before.variants:
        used[variant.gpu_type] = used.get(variant.gpu_type, 0) + variant.replicas * variant.devices
    return [
        Cause(
            message=f"the earlier replicas take {count} devices of GPUType {name}, and {left.get(name, 0)} are left to "
            "this service by limit, inventory and the others",
            decisive=True,
        )
        for name, count in sorted(used.items())
        if count > left.get(name, 0)
    ]


def _undone(before: ServicePlan, after: ServicePlan, lab: Laboratory) -> list[Cause]:
    """Differences that can be undone, each tried alone."""
    tries: list[tuple[str, PlanInputs | None]] = []
    if before.buckets != after.buckets:
        tries.append(("the profile has other size buckets", None))
    elif any(not math.isclose(old, new, rel_tol=_SAME) for old, new in zip(before.demand, after.demand, strict=True)):
        went = f"demand went from {before.demand_rps:.3g} to {after.demand_rps:.3g} requests per second"
        if math.isclose(before.demand_rps, after.demand_rps, rel_tol=1e-3):
            went = "the mix of request sizes changed"
        tries.append((went, _with_demand(lab, before.demand, after.sizes)))
    for name, (old, new) in _prices(before, lab.inputs).items():
        message = f"a device of GPUType {name} went from {old:g} to {new:g} per hour"
        tries.append((message, edited(lab.inputs, [f"price:{name}={old:.12f}"])))
    causes = []
    for message, undone in tries:
        again = None if undone is None else lab.solved_from(before, undone)
        causes.append(Cause(message=message, decisive=again is not None and again.replicas == before.replicas))
    for constraint in sorted({*before.binding} ^ {*after.binding}):
        now = "binds now" if constraint in after.binding else "no longer binds"
        causes.append(Cause(message=f"{constraint} {now}", decisive=False))
    return causes


def _prices(before: ServicePlan, inputs: PlanInputs) -> dict[str, tuple[float, float]]:
    """(earlier, present) price of a device-hour, by type that the earlier plan used and that costs something else now.
    A type that was not used has left no price."""
    now = {gpu_type.metadata.name: gpu_type.spec.device_price_per_hour for gpu_type in inputs.gpu_types}
    found = {}
    for variant in before.variants:
        old = variant.cost_per_replica_hour / variant.devices
        new = now.get(variant.gpu_type)
        if new is not None and not math.isclose(old, new, rel_tol=1e-6, abs_tol=_SAME):
            found[variant.gpu_type] = (old, new)
    return found


def _with_demand(lab: Laboratory, rps: list[float], sizes: list[BucketSizes] | None) -> PlanInputs:
    """As if these rates had been observed, whatever the service's traffic mode is."""
    service = lab.service
    traffic = service.spec.traffic.model_copy(update={"mode": "observe"})
    observed = service.model_copy(update={"spec": service.spec.model_copy(update={"traffic": traffic})})
    demand = Demand(rps=rps, sizes=sizes)
    return lab.inputs.model_copy(update={"services": [observed], "demand": {service.key: demand}, "forecast": {}})
