"""One promise put to the test: a combination is planned, and its load replayed through the plan on the engine model.

    tried(combination, profile) -> Outcome

What is judged is the planner's idea of capacity: bursts, queues, mixed batches and small pools are there in the replay
and not in the profile. Replicas are whole, and a plan of one may be half idle; so the rate of a small fleet is first
raised to the highest that its plan still serves with the same replicas.

A planner that buys twice what is needed keeps every promise. So the same replicas and routes are also given more or
less, and the planned load is compared with the highest one at which they still keep the promise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from e2e.bench.placement_promise_fleets import KEY, Combination, inputs_for
from llmfleet.api import ModelProfile, Plan, RoutingTable
from llmfleet.placement import PlanInputs, plan
from llmfleet.placement.performance.figures import MOST_ARRIVALS_CV2
from llmfleet.simulator import Arrival, EngineSpec, ObjectiveAttainment, Served, attainment, replay, routing_table
from llmfleet.simulator.arrivals import at_rate, rate

WARM_UP_SHARE = 0.05
"""Requests that are not judged: the fleet begins empty."""
ALLOWED_POINTS = 1.0
_FILLING_STEPS = 5
_LEAST_FACTOR, _MOST_FACTOR = 0.25, 16.0
_BISECTIONS = 7


@dataclass(frozen=True)
class Planned:
    """A plan that serves all of a load."""

    arrivals: list[Arrival]
    table: RoutingTable
    replicas: dict[str, int]

    @property
    def requests_per_second(self) -> float:
        """Of the load."""
        return rate(self.arrivals)


@dataclass(frozen=True)
class Outcome:
    """What became of one combination."""

    combination: Combination
    planned: Planned | None
    """None where the plan was refused or leaves demand unserved; `problem` says why."""
    found: ObjectiveAttainment | None = None
    """How the objective fared."""
    possible_factor: float = math.nan
    """Highest load at which the plan's replicas and routes keep the objective, as a factor of the planned one."""
    problem: str = ""

    @property
    def promised(self) -> bool:
        """Whether there is a plan, and it does not itself warn that such bursts may miss the objective."""
        return self.found is not None and self.combination.load.cv2 <= MOST_ARRIVALS_CV2

    @property
    def kept(self) -> bool:
        """Whether even the lower ends of both Wilson intervals are enough."""
        return self.found is not None and self.found.verdict(ALLOWED_POINTS) == "kept"

    @property
    def points(self) -> float:
        """The worse target's attainment less its percentile, in percentage points."""
        return -100.0 if self.found is None else points(self.found)

    def line(self) -> str:
        """The combination in words."""
        if self.planned is None or self.found is None:
            return f"{self.combination.name:42} not planned: {self.problem}"
        replicas = " ".join(f"{count}x{name}" for name, count in self.planned.replicas.items())
        ttft, tpot = self.found.ttft, self.found.tpot
        return (
            f"{self.combination.name:42} {self.planned.requests_per_second:5.3g}/s on {replicas:24} "
            f"TTFT {ttft.percent:6.2f} of {ttft.target.percentile:g} % "
            f"TPOT {tpot.percent:6.2f} of {tpot.target.percentile:g} %: {self.found.verdict(ALLOWED_POINTS)}, "
            f"possible {self.possible_factor:.2f} x"
        )


def tried(combination: Combination, profile: ModelProfile) -> Outcome:
    """Plans a combination out of a profile and replays its load on the combination's own engines."""
    planned = planned_for(combination, profile)
    if isinstance(planned, str):
        return Outcome(combination, None, problem=planned)
    found = judged(combination, replayed(planned, combination.family.engines))
    return Outcome(combination, planned, found, possible_factor(combination, planned))


def possible_factor(combination: Combination, planned: Planned) -> float:
    """The highest multiple of the planned load that keeps the objective less the allowed points."""

    def keeps(factor: float) -> bool:
        found = judged(combination, replayed(planned, combination.family.engines, factor))
        return points(found) >= -ALLOWED_POINTS

    low, high = (1.0, _MOST_FACTOR) if keeps(1.0) else (_LEAST_FACTOR, 1.0)
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def planned_for(combination: Combination, profile: ModelProfile) -> Planned | str:
    """The plan and the load that it serves, or why there is none."""
    arrivals = combination.load.arrivals_at(combination.fleet.requests_per_second)
    inputs = inputs_for(combination, profile, arrivals)
    decided, _ = plan(inputs, None)
    if combination.fleet.filled and decided.status != "partial" and not decided.refusals:
        arrivals = at_rate(arrivals, rate(arrivals) * filled(decided, inputs))
        decided, _ = plan(inputs_for(combination, profile, arrivals), None)
    if decided.refusals:
        return decided.refusals[0].message
    (service,) = decided.services
    if service.unserved_rps > 0:
        return service.shortfall or "demand unserved"
    table = routing_table(decided, KEY, context_length=combination.family.context_length)
    return Planned(arrivals, table, service.replicas)


def filled(decided: Plan, inputs: PlanInputs) -> float:
    """The highest factor of the demand, below 2 and in steps of 2^(1/32), that a plan of the same cost serves."""
    (demand,) = inputs.demand.values()
    low, step = 0, 1 << _FILLING_STEPS
    while step > 1:
        step //= 2
        factor = math.exp2((low + step) / (1 << _FILLING_STEPS))
        raised = demand.model_copy(update={"rps": [factor * rps for rps in demand.rps]})
        more = inputs.model_copy(update={"demand": {KEY: raised}})
        again, _ = plan(more, None)
        if again.cost_per_hour <= decided.cost_per_hour * (1 + 1e-9) and again.status != "partial":
            low += step
    return math.exp2(low / (1 << _FILLING_STEPS))


def replayed(planned: Planned, engines: Mapping[str, EngineSpec], factor: float = 1.0) -> list[Served]:
    """The planned load, or a multiple of it, on engines; what came while the fleet filled is left out."""
    arrivals = at_rate(planned.arrivals, factor * planned.requests_per_second)
    served = replay(planned.table, engines, arrivals)
    return served[int(WARM_UP_SHARE * len(served)) :]


def judged(combination: Combination, served: list[Served]) -> ObjectiveAttainment:
    """How the combination's objective fared."""
    return attainment(served, combination.objective)


def points(found: ObjectiveAttainment) -> float:
    """The worse target's attainment less its percentile, in percentage points."""
    return min(one.percent - one.target.percentile for one in (found.ttft, found.tpot))
