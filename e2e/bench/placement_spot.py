"""Is what a plan says of the loss of a spot pool so, and what does spot save? Rows `spot_*` of `make bench-placement`.

    combination + two spot pools of each type --plan()--> replicas, and the routes after each loss
        --replay of the whole load on the replicas that are left--> attainment

The combinations are those of `placement_promise.py`, but for loads of which plans warn that their bursts may miss the
objective. Each type is there on demand and in two spot pools at two fifths of its price, and the service may lose any
one pool (`spec.spot: {}`). After a loss the headroom of the plan is used up, so this is the promise at its tightest.
What is replayed is the time after: requests that ran on lost engines are not.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from e2e.bench.placement_promise_engines import cpus, gpus
from e2e.bench.placement_promise_fleets import KEY, Combination, combinations, inputs_for, model_profile
from e2e.bench.placement_promise_trial import ALLOWED_POINTS, Planned, judged, points, replayed
from e2e.bench.report import Report
from llmfleet.api import GPUType, ModelProfile, Plan, ServicePlan
from llmfleet.api.plan import PoolLoss
from llmfleet.placement import PlanInputs, plan
from llmfleet.placement.performance.figures import MOST_ARRIVALS_CV2
from llmfleet.simulator import Arrival, ObjectiveAttainment, routing_table

POOLS = 2
SPOT_SHARE = 0.4
"""Price of spot capacity, as a share of the price on demand."""
_EVERY = 1 if os.environ.get("FULL") else 5


@dataclass(frozen=True)
class AfterLoss:
    """A combination after the loss of one pool."""

    name: str
    found: ObjectiveAttainment

    @property
    def kept(self) -> bool:
        """Whether even the lower ends of both Wilson intervals are enough."""
        return self.found.verdict(ALLOWED_POINTS) == "kept"


@dataclass(frozen=True)
class Outcome:
    """What became of one combination."""

    losses: list[AfterLoss]
    saved_percent: float
    """Of the cost of the plan without spot."""


def with_pools(inputs: PlanInputs) -> PlanInputs:
    """The same with spot pools of every type, any one of which may be lost."""
    (service,) = inputs.services
    pools = [_pool(gpu_type, number) for gpu_type in inputs.gpu_types for number in range(POOLS)]
    named = [*service.spec.gpu_types, *(_name(name, n) for name in service.spec.gpu_types for n in range(POOLS))]
    wire = service.to_wire()
    wire["spec"] |= {"spot": {}, "gpuTypes": named}
    return PlanInputs(
        services=[type(service).parse(wire)],
        profiles=inputs.profiles,
        gpu_types=[*inputs.gpu_types, *pools],
        inventory=dict.fromkeys(named, max(inputs.inventory.values())),
        demand=inputs.demand,
        policy=inputs.policy,
    )


def _name(hardware: str, number: int) -> str:
    return f"{hardware}-s{number}"


def _pool(gpu_type: GPUType, number: int) -> GPUType:
    wire = gpu_type.to_wire()
    price = gpu_type.spec.price_per_hour.on_demand
    wire["metadata"] = {"name": _name(gpu_type.metadata.name, number)}
    wire["spec"] |= {
        "sameHardwareAs": gpu_type.metadata.name,
        "capacityClass": "spot",
        "pricePerHour": {"onDemand": price, "spot": SPOT_SHARE * price},
    }
    return GPUType.parse(wire)


def tried(combination: Combination, profile: ModelProfile) -> Outcome | None:
    """Plans a combination and replays its load after every loss that is said to be survived; None without a plan."""
    arrivals = combination.load.arrivals_at(combination.fleet.requests_per_second)
    inputs = inputs_for(combination, profile, arrivals)
    on_demand, _ = plan(inputs, None)
    decided, _ = plan(with_pools(inputs), None)
    service = decided.service(KEY)
    if service is None or service.unserved_rps > 0:
        return None
    losses = list(_after_losses(combination, arrivals, decided))
    return Outcome(losses, 100 * (1 - decided.cost_per_hour / on_demand.cost_per_hour))


def _after_losses(combination: Combination, arrivals: list[Arrival], decided: Plan) -> Iterator[AfterLoss]:
    (service,) = decided.services
    engines = dict(combination.family.engines)
    engines |= {_name(name, number): engine for name, engine in engines.items() for number in range(POOLS)}
    for loss in service.losses:
        left = _left(service, loss)
        if loss.unserved_rps == 0 and len(left.variants) < len(service.variants):
            after = decided.model_copy(update={"services": [left]})
            table = routing_table(after, KEY, context_length=combination.family.context_length)
            served = replayed(Planned(arrivals, table, left.replicas), engines)
            name = f"{combination.name} without {' '.join(loss.gpu_types)}"
            yield AfterLoss(name, judged(combination, served))


def _left(service: ServicePlan, loss: PoolLoss) -> ServicePlan:
    variants = [variant for variant in service.variants if variant.gpu_type not in loss.gpu_types]
    return service.model_copy(update={"variants": variants, "routes": loss.routes})


def add_rows(report: Report) -> None:
    """Adds the rows of docs/benchmarks.md."""
    families = (gpus(), cpus())
    profiles = {family.name: model_profile(family) for family in families}
    outcomes = []
    for combination in list(combinations(families))[::_EVERY]:
        if combination.load.cv2 > MOST_ARRIVALS_CV2:
            continue
        found = tried(combination, profiles[combination.family.name])
        if found is not None:
            outcomes.append(found)
            for one in found.losses:
                print(f"{one.name:70} {points(one.found):+.2f} points: kept {one.kept}", file=sys.stderr, flush=True)
    losses = [one for outcome in outcomes for one in outcome.losses]
    kept = sum(one.kept for one in losses)
    report.add(
        "spot_loss_kept",
        "%",
        [100 * kept / len(losses)] if losses else [],
        target=100.0,
        at_most=False,
        note=f"{kept} of {len(losses)} losses of {len(outcomes)} plans",
    )
    worst = min(losses, key=lambda one: points(one.found), default=None)
    report.add(
        "spot_loss_worst_points",
        "points",
        [points(worst.found)] if worst else [],
        target=-1.0,
        at_most=False,
        note=worst.name if worst else "",
    )
    saved = [outcome.saved_percent for outcome in outcomes]
    report.add(
        "spot_saving_mean",
        "%",
        [fmean(saved)] if saved else [],
        note=f"{len(saved)} plans, {min(saved):.0f} to {max(saved):.0f}" if saved else "",
    )


def main() -> None:
    """These rows alone."""
    report = Report("placement_spot")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
