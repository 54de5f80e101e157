"""Is the promise kept? Plans tried on the engine model, in simulated time.

    engine model --closed loops--> ModelProfile --plan()--> routing table --replay of a load--> attainment

Every combination of a load, an objective and a fleet is planned for exactly the sizes and the rate that are then
replayed, so that what is judged is the planner's idea of capacity: bursts, queues, mixed batches and small pools are
there in the replay and not in the profile. Replicas are whole, and a plan of one may be half idle; so the rate of a
small fleet is first raised to the highest that its plan still serves with the same replicas.

A planner that buys twice what is needed keeps every promise. So the same plan is also loaded with more than was asked,
and the largest factor at which it still keeps its promise is reported beside. And it is replayed on engines that are
15 % slower than those that were profiled. Rows and targets: docs/benchmarks.md.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from e2e.bench.placement_promise_engines import Family, cpus, gpus
from e2e.bench.placement_promise_fleets import FLEETS, KEY, OBJECTIVES, Fleet, Load, inputs_for, loads, model_profile
from e2e.bench.report import Report
from llmfleet.api import ModelProfile, Plan
from llmfleet.placement import Demand, PlanInputs, plan
from llmfleet.simulator import Engine, EngineSpec, Job, ObjectiveAttainment, attainment, replay, routing_table
from llmfleet.simulator.arrivals import at_rate, rate, renewal
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.spec import PS_PER_S

_WARM_UP_SHARE = 0.05
_OVERLOADS = (1.1, 1.25, 1.5, 2.0, 3.0)
_SLOWER = 1.15
_FILLING_STEPS = 5


@dataclass(frozen=True)
class Outcome:
    """One combination."""

    load: str
    objective: str
    fleet: Fleet
    requests_per_second: float
    replicas: dict[str, int]
    found: ObjectiveAttainment | None
    """None where the plan was refused or leaves demand unserved; `problem` says why."""
    slower: ObjectiveAttainment | None = None
    """The same on engines that are slower than profiled."""
    spare: float = 0.0
    """Largest of the loads tried, as a factor of the planned one, at which the promise is kept; 0 for none."""
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.load} {self.objective} {self.fleet.name}"

    @property
    def kept(self) -> bool:
        return self.found is not None and self.found.verdict() == "kept"

    @property
    def kept_slower(self) -> bool:
        return self.slower is not None and self.slower.verdict() == "kept"

    @property
    def points(self) -> float:
        """The worse target's attainment less its percentile, in percentage points."""
        if self.found is None:
            return -100.0
        return min(one.percent - one.target.percentile for one in (self.found.ttft, self.found.tpot))

    def line(self) -> str:
        """The combination in words."""
        replicas = " ".join(f"{count}x{name}" for name, count in self.replicas.items())
        head = f"{self.name:38} {self.requests_per_second:5.3g}/s on {replicas:24}"
        if self.found is None or self.slower is None:
            return f"{head} not planned: {self.problem}"
        return (
            f"{head} TTFT {self.found.ttft.percent:6.2f} % TPOT {self.found.tpot.percent:6.2f} % of "
            f"{self.found.ttft.target.percentile:g} %: {self.found.verdict()}; both {self.found.percent_both:.2f} %, "
            f"up to {self.spare:g} x, slower {self.slower.verdict()}"
        )


def filled(decided: Plan, inputs: PlanInputs) -> float:
    """The highest factor of the demand, below 2 and in steps of 2^(1/32), that a plan of the same cost serves."""
    (demand,) = inputs.demand.values()
    low, step = 0, 1 << _FILLING_STEPS
    while step > 1:
        step //= 2
        factor = math.exp2((low + step) / (1 << _FILLING_STEPS))
        more = inputs.model_copy(update={"demand": {KEY: Demand(rps=[factor * rps for rps in demand.rps])}})
        again, _ = plan(more, None)
        if again.cost_per_hour <= decided.cost_per_hour * (1 + 1e-9) and again.status != "partial":
            low += step
    return math.exp2(low / (1 << _FILLING_STEPS))


def tried(load: str, arrivals_at: Load, objective: str, fleet: Fleet, profile: ModelProfile, family: Family) -> Outcome:
    """Plans one combination and replays its load through the plan."""
    arrivals = arrivals_at(fleet.requests_per_second)
    inputs = inputs_for(profile, family, objective, fleet, arrivals)
    decided, _ = plan(inputs, None)
    if fleet.filled and decided.status != "partial" and not decided.refusals:
        arrivals = at_rate(arrivals, rate(arrivals) * filled(decided, inputs))
        inputs = inputs_for(profile, family, objective, fleet, arrivals)
        decided, _ = plan(inputs, None)
    rps = rate(arrivals)
    if decided.refusals:
        return Outcome(load, objective, fleet, rps, {}, None, problem=decided.refusals[0].message)
    (service,) = decided.services
    if service.unserved_rps > 0:
        problem = service.shortfall or "demand unserved"
        return Outcome(load, objective, fleet, rps, service.replicas, None, problem=problem)
    table = routing_table(decided, KEY, context_length=family.context_length)
    wanted = inputs.services[0].spec.objective

    def attained(factor: float, slower: float = 1.0) -> ObjectiveAttainment:
        engines = {
            name: spec.model_copy(update={"step": spec.step.scaled(slower)}) for name, spec in family.engines.items()
        }
        served = replay(table, engines, at_rate(arrivals, factor * rps))
        return attainment(served[int(_WARM_UP_SHARE * len(served)) :], wanted)

    found = attained(1.0)
    spare = 1.0 if found.verdict() == "kept" else 0.0
    for factor in _OVERLOADS:
        if spare == 0.0 or attained(factor).verdict() != "kept":
            break
        spare = factor
    return Outcome(load, objective, fleet, rps, service.replicas, found, attained(1.0, _SLOWER), spare)


def add_rows(report: Report) -> None:
    """Plans and replays every combination and adds the rows of docs/benchmarks.md."""
    families = {family.name: family for family in (gpus(), cpus())}
    profiles = {name: model_profile(family) for name, family in families.items()}
    outcomes: list[Outcome] = []
    for fleet in FLEETS:
        family = families[fleet.family]
        for load, arrivals_at in loads(family).items():
            for objective in OBJECTIVES:
                outcomes.append(tried(load, arrivals_at, objective, fleet, profiles[family.name], family))
                print(outcomes[-1].line(), flush=True)
    verdicts = [one.found.verdict() for one in outcomes if one.found is not None]
    report.add(
        "promise_kept",
        "%",
        [_kept_percent(outcomes)],
        target=100.0,
        at_most=False,
        note=f"of {len(outcomes)} combinations {verdicts.count('kept')} kept, {verdicts.count('broken')} broken, "
        f"{verdicts.count('undecided')} undecided, {len(outcomes) - len(verdicts)} not planned",
    )
    for load in dict.fromkeys(one.load for one in outcomes):
        some = [one for one in outcomes if one.load == load]
        spare = statistics.median(one.spare for one in some)
        report.add(f"promise_kept_{load}", "%", [_kept_percent(some)], note=f"median spare load {spare:g} x")
    for row, some in (
        ("small_pools", [one for one in outcomes if 0 < sum(one.replicas.values()) <= 2]),
        ("fitted", [one for one in outcomes if one.fleet.family == "cpus"]),
    ):
        report.add(f"promise_kept_{row}", "%", [_kept_percent(some)] if some else [], note=f"{len(some)} combinations")
    report.add(
        "promise_kept_15_percent_slower",
        "%",
        [100.0 * sum(one.kept_slower for one in outcomes) / len(outcomes)],
        note="engines slower than profiled, and nothing corrects the profile",
    )
    report.add(
        "promise_spare_load",
        "x",
        [one.spare for one in outcomes if one.kept],
        note="factors tried: " + ", ".join(map(str, _OVERLOADS)),
    )
    worst = min(outcomes, key=lambda one: one.points)
    report.add("promise_worst_points", "points", [worst.points], target=-1.0, at_most=False, note=worst.name)
    report.add(
        "engine_model_steps",
        "steps/s",
        [_steps_per_second(families["gpus"].engines["h100"]) for _ in range(3)],
        target=100_000,
        at_most=False,
    )


def _kept_percent(outcomes: Sequence[Outcome]) -> float:
    return 100.0 * sum(one.kept for one in outcomes) / len(outcomes)


def _steps_per_second(spec: EngineSpec) -> float:
    """Steps of one engine with about 64 requests at once, per second of this process's CPU time."""
    engine = Engine(spec)
    arrivals = renewal([(200, 300), (1000, 200), (50, 600)], 12.0, 2000, seed=7)
    started = time.process_time()
    for number, one in enumerate(arrivals):
        at_ps = round(one.at_s * PS_PER_S)
        engine.advance(at_ps)
        engine.submit(Job(number, one.input_tokens, one.output_tokens), at_ps)
    engine.advance(FOREVER_PS)
    return engine.steps / (time.process_time() - started)


def main() -> None:
    """These rows alone."""
    report = Report("placement_promise")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
