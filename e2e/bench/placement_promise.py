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
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from e2e.bench.engine_model_loop import profile_model
from e2e.bench.placement_promise_engines import DEVICES, KV_BYTES_PER_TOKEN, WEIGHT_BYTES, modelled
from e2e.bench.report import Report
from llmfleet.api import Buckets, GPUType, LLMService, ModelProfile, Plan
from llmfleet.placement import Demand, PlanInputs, plan
from llmfleet.simulator import (
    Arrival,
    Engine,
    EngineSpec,
    Job,
    ObjectiveAttainment,
    attainment,
    replay,
    routing_table,
)
from llmfleet.simulator.arrivals import at_rate, rate, read_trace, renewal
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.spec import PS_PER_S

_TRACES = Path(__file__).parents[2] / "simulator" / "traces"
_BUCKETS = Buckets(input_tokens=[128, 512, 1024, 2048, 4096, 8192, 16384], output_tokens=[32, 128, 512, 2048])
_CONTEXT_LENGTH = 16384 + 2048
_KEY = "bench/chat"
_DRAWN_REQUESTS = 4000
_WARM_UP_SHARE = 0.05
_PLENTY = 1000
_OVERLOADS = (1.1, 1.25, 1.5, 2.0, 3.0)
_SLOWER = 1.15
_FILLING_STEPS = 5

OBJECTIVES = {
    "tight": {"ttft": {"milliseconds": 2500, "percentile": 90}, "tpot": {"milliseconds": 60, "percentile": 90}},
    "usual": {"ttft": {"milliseconds": 4000, "percentile": 95}, "tpot": {"milliseconds": 120, "percentile": 95}},
    "loose": {"ttft": {"milliseconds": 10000, "percentile": 99}, "tpot": {"milliseconds": 250, "percentile": 99}},
}


@dataclass(frozen=True)
class Fleet:
    """Which GPU types there are, and the rate of conversations that they serve; code comes at half of it."""

    name: str
    types: tuple[str, ...]
    requests_per_second: float
    filled: bool
    """Whether the rate is raised until the plan would need more."""


FLEETS = (
    Fleet("one_type_small", ("a100",), 2.0, filled=True),
    Fleet("one_type_large", ("h100",), 40.0, filled=False),
    Fleet("two_types_small", ("l4", "h100"), 5.0, filled=True),
    Fleet("three_types_large", ("l4", "a100", "h100"), 40.0, filled=False),
)


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


Load = Callable[[float], list[Arrival]]


def loads() -> dict[str, Load]:
    """The arrivals of each load at a rate of conversations per second."""
    conversations, code = (read_trace(_TRACES / f"azure_{name}_2023.csv") for name in ("conv", "code"))

    def sizes(trace: Sequence[Arrival]) -> list[tuple[int, int]]:
        return [(one.input_tokens, one.output_tokens) for one in trace]

    def drawn(trace: Sequence[Arrival], factor: float, cv2: float, seed: int) -> Load:
        return lambda rps: renewal(sizes(trace), factor * rps, _DRAWN_REQUESTS, seed=seed, cv2=cv2)

    return {
        "conv": lambda rps: at_rate(conversations, rps),
        "code": lambda rps: at_rate(code, 0.5 * rps),
        "poisson_conv": drawn(conversations, 1.0, 1.0, 1),
        "poisson_code": drawn(code, 0.5, 1.0, 2),
        "bursty_conv": drawn(conversations, 1.0, 4.0, 3),
    }


def model_profile(engines: dict[str, EngineSpec]) -> ModelProfile:
    """What `llmfleet profile` would have measured on each engine."""
    return ModelProfile.parse(
        {
            "metadata": {"name": "model", "namespace": "bench"},
            "spec": {
                "model": "bench/8b",
                "weightsGib": WEIGHT_BYTES / 2**30,
                "kvKibPerToken": KV_BYTES_PER_TOKEN / 1024,
                "buckets": _BUCKETS.to_wire(),
                "measurements": [profile_model(spec, name, _BUCKETS).to_wire() for name, spec in engines.items()],
            },
        },
        strict=True,
    )


def planned(profile: ModelProfile, objective: str, fleet: Fleet, arrivals: Sequence[Arrival]) -> PlanInputs:
    """The inputs of a plan for exactly these arrivals."""
    rps = [0.0] * _BUCKETS.count
    seconds = arrivals[-1].at_s - arrivals[0].at_s
    for one in arrivals:
        rps[_BUCKETS.index(one.input_tokens, one.output_tokens)] += 1 / seconds
    service = LLMService.parse(
        {
            "metadata": {"name": "chat", "namespace": "bench"},
            "spec": {
                "model": {"name": "bench/8b", "contextLength": _CONTEXT_LENGTH},
                "profile": "model",
                "objective": OBJECTIVES[objective],
                "gpuTypes": list(fleet.types),
            },
        },
        strict=True,
    )
    types = [
        GPUType.parse(
            {
                "metadata": {"name": name},
                "spec": {
                    "resourceName": f"example.com/{name}",
                    "memoryGib": device.memory_gib,
                    "pricePerHour": {"onDemand": device.price_per_hour},
                },
            },
            strict=True,
        )
        for name, device in DEVICES.items()
    ]
    return PlanInputs(
        services=[service],
        profiles=[profile],
        gpu_types=types,
        inventory=dict.fromkeys(fleet.types, _PLENTY),
        demand={_KEY: Demand(rps=rps)},
    )


def filled(decided: Plan, inputs: PlanInputs) -> float:
    """The highest factor of the demand, up to 2 and in steps of 2^(1/32), that a plan of the same cost serves."""
    (demand,) = inputs.demand.values()
    low, step = 0, 1 << _FILLING_STEPS
    while step > 1:
        step //= 2
        factor = math.exp2((low + step) / (1 << _FILLING_STEPS))
        more = inputs.model_copy(update={"demand": {_KEY: Demand(rps=[factor * rps for rps in demand.rps])}})
        again, _ = plan(more, None)
        if again.cost_per_hour <= decided.cost_per_hour * (1 + 1e-9) and again.status != "partial":
            low += step
    return math.exp2(low / (1 << _FILLING_STEPS))


def tried(
    load: str, arrivals_at: Load, objective: str, fleet: Fleet, profile: ModelProfile, engines: dict[str, EngineSpec]
) -> Outcome:
    """Plans one combination and replays its load through the plan."""
    arrivals = arrivals_at(fleet.requests_per_second)
    inputs = planned(profile, objective, fleet, arrivals)
    decided, _ = plan(inputs, None)
    if fleet.filled and decided.status != "partial" and not decided.refusals:
        arrivals = at_rate(arrivals, rate(arrivals) * filled(decided, inputs))
        inputs = planned(profile, objective, fleet, arrivals)
        decided, _ = plan(inputs, None)
    rps = rate(arrivals)
    if decided.refusals:
        return Outcome(load, objective, fleet, rps, {}, None, problem=decided.refusals[0].message)
    (service,) = decided.services
    if service.unserved_rps > 0:
        problem = service.shortfall or "demand unserved"
        return Outcome(load, objective, fleet, rps, service.replicas, None, problem=problem)
    table = routing_table(decided, _KEY, context_length=_CONTEXT_LENGTH)
    wanted = inputs.services[0].spec.objective

    def attained(factor: float, by: dict[str, EngineSpec]) -> ObjectiveAttainment:
        served = replay(table, by, at_rate(arrivals, factor * rps))
        return attainment(served[int(_WARM_UP_SHARE * len(served)) :], wanted)

    found = attained(1.0, engines)
    slow_engines = {name: spec.model_copy(update={"step": spec.step.scaled(_SLOWER)}) for name, spec in engines.items()}
    spare = 1.0 if found.verdict() == "kept" else 0.0
    if spare:
        for factor in _OVERLOADS:
            if attained(factor, engines).verdict() != "kept":
                break
            spare = factor
    return Outcome(load, objective, fleet, rps, service.replicas, found, attained(1.0, slow_engines), spare)


def add_rows(report: Report) -> None:
    """Plans and replays every combination and adds the rows of docs/benchmarks.md."""
    engines = {name: modelled(device) for name, device in DEVICES.items()}
    profile = model_profile(engines)
    outcomes: list[Outcome] = []
    for load, arrivals_at in loads().items():
        for fleet in FLEETS:
            for objective in OBJECTIVES:
                outcomes.append(tried(load, arrivals_at, objective, fleet, profile, engines))
                print(_line(outcomes[-1]), flush=True)
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
    for load in loads():
        report.add(f"promise_kept_{load}", "%", [_kept_percent([one for one in outcomes if one.load == load])])
    small = [one for one in outcomes if 0 < sum(one.replicas.values()) <= 2]
    report.add(
        "promise_kept_small_pools", "%", [_kept_percent(small)] if small else [], note=f"{len(small)} combinations"
    )
    report.add(
        "promise_kept_15_percent_slower",
        "%",
        [100.0 * sum(one.kept_slower for one in outcomes) / len(outcomes)],
        note="engines slower than profiled; nothing corrects the profile yet",
    )
    spare = [one.spare for one in outcomes if one.kept]
    report.add("promise_spare_load", "x", spare, note="factors tried: " + ", ".join(map(str, _OVERLOADS)))
    worst = min(outcomes, key=lambda one: one.points)
    report.add("promise_worst_points", "points", [worst.points], target=-1.0, at_most=False, note=_name(worst))
    report.add("engine_model_steps", "steps/s", _steps_per_second(engines["h100"]), target=100_000, at_most=False)


def _kept_percent(outcomes: Sequence[Outcome]) -> float:
    return 100.0 * sum(one.kept for one in outcomes) / len(outcomes)


def _name(outcome: Outcome) -> str:
    return f"{outcome.load} {outcome.objective} {outcome.fleet.name}"


def _line(outcome: Outcome) -> str:
    replicas = f"{outcome.requests_per_second:.3g}/s on " + " ".join(
        f"{n}x{name}" for name, n in outcome.replicas.items()
    )
    found = outcome.found
    if found is None:
        return f"{_name(outcome):40} {replicas:32} not planned: {outcome.problem}"
    return (
        f"{_name(outcome):40} {replicas:32} TTFT {found.ttft.percent:6.2f} % TPOT {found.tpot.percent:6.2f} % "
        f"of {found.ttft.target.percentile:g} %, both {found.percent_both:6.2f} %: {found.verdict()}; "
        f"up to {outcome.spare:g} x, {_SLOWER:g} x slower {outcome.slower.verdict() if outcome.slower else '-'}"
    )


def _steps_per_second(spec: EngineSpec, runs: int = 3) -> list[float]:
    """Steps of one engine with about 64 requests at once, per second of this process's CPU time."""
    arrivals = renewal([(200, 300), (1000, 200), (50, 600)], 12.0, 2000, seed=7)
    found = []
    for _ in range(runs):
        engine = Engine(spec)
        started = time.process_time()
        for number, one in enumerate(arrivals):
            at_ps = round(one.at_s * PS_PER_S)
            engine.advance(at_ps)
            engine.submit(Job(number, one.input_tokens, one.output_tokens), at_ps)
        engine.advance(FOREVER_PS)
        found.append(engine.steps / (time.process_time() - started))
    return found


def main() -> None:
    """These rows alone."""
    report = Report("placement_promise")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
