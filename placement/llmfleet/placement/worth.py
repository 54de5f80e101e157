"""What a little more of something would be worth to a service, the rest of the fleet as planned.

In flow the inputs, the plan and a service; out flows one `Worth` for each thing that could be relaxed by one step: a
device of each type that the service is short of, a limit in money, watts or devices that services share, the bounds of
`spec.replicas` where they bind, and 10 ms of each latency. These are differences of two solves and not shadow prices:
replicas are whole, so the first device of a type may be worth nothing and the second a lot. The step of a type is
therefore what makes one more replica of the narrowest variant fit, and where that helps nothing, of the next wider one.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmfleet.api import Plan, ServicePlan
from llmfleet.api.meta import ApiModel
from llmfleet.placement.alone import Laboratory, laboratory, left_to
from llmfleet.placement.inputs import PlanInputs
from llmfleet.placement.rows import SharedRow, rows_of
from llmfleet.placement.whatif import edited

OBJECTIVE_STEP_MS = 10
"""Step of a latency, in milliseconds."""
BUDGET_STEP = 1
"""Step of a budget, in its currency per hour."""
_NOTHING = 1e-6
"""Differences below this are the solver's rounding."""


class Worth(ApiModel):
    """What one relaxation would bring."""

    relaxed: str
    """What there would be more of, in words: `1 more device of GPUType l4`."""
    cost_per_hour: float
    """Difference of the service's cost; negative: saved."""
    unserved_rps: float
    """Difference of its unserved requests per second; negative: served in addition."""
    replicas: dict[str, int]
    """What it would then have, by variant."""

    @property
    def helps(self) -> bool:
        """Whether more would be served, or the same for less."""
        return self.unserved_rps < 0 or (self.unserved_rps == 0 and self.cost_per_hour < 0)


def worth_of_more(inputs: PlanInputs, decided: Plan, key: str) -> list[Worth]:
    """What a step of each constraint would be worth, the most helpful first. Empty where the service has no plan."""
    planned = decided.service(key)
    if planned is None:
        return []
    lab = laboratory(inputs, decided, key)
    as_it_is = lab.solved(lab.inputs)
    if as_it_is is None:
        return []
    found = []
    for binding in planned.binding:
        gpu_type = binding.partition(" of GPUType ")[2]
        if gpu_type:
            found.append(_of_devices(lab, gpu_type, as_it_is))
    for row in rows_of(lab.inputs):
        if row.name in planned.binding:
            found += _of_row(lab, row, planned, as_it_is)
    for relaxed, changed in _other_steps(lab, planned):
        found += _worth(lab, relaxed, changed, as_it_is)
    return sorted(found, key=lambda worth: (worth.unserved_rps, worth.cost_per_hour))


def more_devices(inputs: PlanInputs, gpu_type: str, count: int) -> PlanInputs:
    """With so many more devices that the fleet may use: existing, and allowed by the type's limit."""
    limit = next(t.spec.limit for t in inputs.gpu_types if t.metadata.name == gpu_type)
    exist = inputs.inventory.get(gpu_type, 0)
    usable = count + (exist if limit is None else min(exist, limit))
    edits = [f"inventory:{gpu_type}={max(exist, usable)}"]
    if limit is not None:
        edits.append(f"limit:{gpu_type}={max(limit, usable)}")
    return edited(inputs, edits)


def _of_devices(lab: Laboratory, gpu_type: str, as_it_is: ServicePlan) -> Worth:
    """The fewest devices of the type that help, or the widest step that was tried."""
    tried: list[Worth] = []
    for step in _steps(lab, gpu_type):
        more = f"{step} more device{'s' if step > 1 else ''} of GPUType {gpu_type}"
        tried += _worth(lab, more, more_devices(lab.inputs, gpu_type, step), as_it_is)
        if tried[-1].helps:
            break
    return tried[-1]


def _of_row(lab: Laboratory, row: SharedRow, planned: ServicePlan, as_it_is: ServicePlan) -> list[Worth]:
    """One more of a limit in money; of another, the least that makes one more replica of some variant fit and helps, or
    the most that was tried."""
    steps = [float(BUDGET_STEP)]
    if row.unit != "cost":
        left = row.limit - sum(row.held(plan) for plan in (*lab.others, planned))
        measured = lab.inputs.profiles[0].spec.measurements
        takes = {row.per_device.get(entry.gpu_type, 0.0) * entry.devices for entry in measured}
        steps = sorted({amount - left for amount in takes if amount > left})
    tried: list[Worth] = []
    for step in steps:
        more = f"{step:.12g} more of spec.{row.name}"
        tried += _worth(lab, more, row.with_limit(lab.inputs, row.limit + step), as_it_is)
        if tried and tried[-1].helps:
            break
    return tried[-1:]


def _steps(lab: Laboratory, gpu_type: str) -> list[int]:
    """Numbers of devices with which one more replica of some variant of the type fits, ascending."""
    left = left_to(lab).get(gpu_type, 0)
    measured = lab.inputs.profiles[0].spec.measurements
    degrees = {entry.devices for entry in measured if entry.gpu_type == gpu_type}
    return sorted({degree - left % degree for degree in degrees}) or [1]


def _other_steps(lab: Laboratory, planned: ServicePlan) -> Iterator[tuple[str, PlanInputs]]:
    service, inputs = lab.service, lab.inputs
    bounds = service.spec.replicas
    steps = []
    if "replicas.max" in planned.binding and bounds.max is not None:
        steps.append((f"spec.replicas.max of {bounds.max + 1}", {"max": bounds.max + 1}))
    if "replicas.maxVariants" in planned.binding and bounds.max_variants is not None:
        most = bounds.max_variants + 1
        steps.append((f"spec.replicas.maxVariants of {most}", {"max_variants": most}))
    if "replicas.min" in planned.binding and bounds.min > 0:
        steps.append((f"spec.replicas.min of {bounds.min - 1}", {"min": bounds.min - 1}))
    for relaxed, update in steps:
        spec = service.spec.model_copy(update={"replicas": bounds.model_copy(update=update)})
        yield relaxed, inputs.model_copy(update={"services": [service.model_copy(update={"spec": spec})]})
    if planned.demand_rps > 0:
        for metric in ("ttft", "tpot"):
            relaxed = f"{OBJECTIVE_STEP_MS} ms more of spec.objective.{metric}"
            yield relaxed, edited(inputs, [f"objective:{service.key}.{metric}=+{OBJECTIVE_STEP_MS}ms"])


def _worth(lab: Laboratory, relaxed: str, inputs: PlanInputs, as_it_is: ServicePlan) -> list[Worth]:
    after = lab.solved(inputs)
    if after is None:
        return []
    return [
        Worth(
            relaxed=relaxed,
            cost_per_hour=_rounded(after.cost_per_hour - as_it_is.cost_per_hour),
            unserved_rps=_rounded(after.unserved_rps - as_it_is.unserved_rps),
            replicas=after.replicas,
        )
    ]


def _rounded(difference: float) -> float:
    return 0.0 if abs(difference) < _NOTHING else difference
