"""Fleets for the tests: readable builders, random small fleets, and a brute-force solver to judge plans by."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pulp
from hypothesis import strategies as st

from llmfleet.api import FleetPolicySpec, GPUType, LLMService, ModelProfile, Plan, PowerDomain
from llmfleet.api.fleetpolicy import NamespaceLimit
from llmfleet.placement import Demand, PlanInputs
from llmfleet.placement.checks import Catalogue, Prepared, prepare
from llmfleet.placement.rounds import reduce
from llmfleet.placement.service_program import ServiceProgram

Point = dict[str, Any]


def percentiles(milliseconds: float) -> dict[str, float]:
    return dict.fromkeys(("p50", "p90", "p95", "p99", "max"), milliseconds)


def point(
    corner: tuple[int, int], rps: float, *, concurrency: int = 64, ttft_ms: float = 100.0, tpot_ms: float = 20.0
) -> Point:
    """A run that stands for all lower loads as well: `rps` is what it completes, if 64 in flight can be so fast."""
    return {
        "inputTokens": corner[0],
        "outputTokens": corner[1],
        "concurrency": concurrency,
        "requests": 100,
        "requestsPerSecond": rps,
        "ttftMs": percentiles(ttft_ms),
        "tpotMs": percentiles(tpot_ms),
    }


def corners(inputs: Sequence[int], outputs: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.product(inputs, outputs))


def profile(
    measurements: dict[str, list[Point]],
    *,
    name: str = "p",
    inputs: Sequence[int] = (512, 4096),
    outputs: Sequence[int] = (128,),
    **spec: Any,
) -> ModelProfile:
    """`measurements`: points by variant name (`l4`, `l4-tp2`, `l4-tp2-pp2+fp8`)."""
    entries = []
    for variant, points in measurements.items():
        layout, _, configuration = variant.partition("+")
        layout, _, stages = layout.partition("-pp")
        gpu_type, _, degree = layout.partition("-tp")
        parallel = {"tensorParallel": int(degree or 1), "pipelineParallel": int(stages or 1)}
        run = {"configuration": configuration or "default"}
        entries.append({"gpuType": gpu_type, **parallel, **run, "points": points})
    return ModelProfile.parse(
        {
            "metadata": {"name": name, "namespace": "team"},
            "spec": {
                "model": "org/model",
                "weightsGib": 10,
                "kvKibPerToken": 64,
                "buckets": {"inputTokens": list(inputs), "outputTokens": list(outputs)},
                "measurements": entries,
                **spec,
            },
        },
        strict=True,
    )


def rates_profile(rates: Mapping[str, Sequence[float]], *, name: str = "p", **spec: Any) -> ModelProfile:
    """A profile of two buckets, by the requests per second of one replica in each; 0 misses every objective here."""
    return profile(
        {
            variant: [
                point(corner, rate or 1.0, ttft_ms=100.0 if rate else 1e6)
                for corner, rate in zip(corners((512, 4096), (128,)), row, strict=True)
            ]
            for variant, row in rates.items()
        },
        name=name,
        **spec,
    )


def gpu_type(name: str, price: float, *, memory_gib: float = 80, **spec: Any) -> GPUType:
    return GPUType.parse(
        {
            "metadata": {"name": name},
            "spec": {
                "resourceName": f"example.com/{name}",
                "memoryGib": memory_gib,
                "pricePerHour": {"onDemand": price},
                **spec,
            },
        },
        strict=True,
    )


def power_domain(budget_watts: float, *gpu_types: str, name: str = "rack") -> PowerDomain:
    return PowerDomain.parse(
        {"metadata": {"name": name}, "spec": {"gpuTypes": list(gpu_types), "budgetWatts": budget_watts}}, strict=True
    )


def service(
    name: str = "s", *, profile: str = "p", context_length: int = 8192, burstiness: float = 0.0, **spec: Any
) -> LLMService:
    """Its requests are paced unless told otherwise, so that nothing is held back for bursts and replicas are easy to
    see; `traffic` may say more."""
    spec["traffic"] = {"burstiness": burstiness, **spec.get("traffic", {})}
    return LLMService.parse(
        {
            "metadata": {"name": name, "namespace": "team"},
            "spec": {
                "model": {"name": "org/model", "contextLength": context_length},
                "profile": profile,
                "objective": {"ttft": {"milliseconds": 1000}, "tpot": {"milliseconds": 50}},
                **spec,
            },
        },
        strict=True,
    )


def fleet(
    services: Sequence[LLMService],
    profiles: Sequence[ModelProfile],
    gpu_types: Sequence[GPUType],
    *,
    inventory: dict[str, int],
    demand: Mapping[str, Sequence[float]] | None = None,
    **policy: Any,
) -> PlanInputs:
    """`demand`: observed requests per second by service *name*. The policy plans for all that was measured, to
    optimality, unless told otherwise, so that expected replicas are easy to see; the time limit is out of the way of a
    busy machine."""
    return PlanInputs(
        services=list(services),
        profiles=list(profiles),
        gpu_types=list(gpu_types),
        inventory=inventory,
        demand={f"team/{name}": Demand(rps=list(rps)) for name, rps in (demand or {}).items()},
        policy=FleetPolicySpec(
            **{"utilization_target": 1.0, "optimality_gap": 0.0, "solve_time_limit_seconds": 250, **policy}
        ),
    )


def replicas(plan: Plan, name: str) -> dict[str, int]:
    planned = plan.service(f"team/{name}")
    assert planned is not None
    return planned.replicas


def decisions(plan: Plan) -> dict[str, Any]:
    """A plan without what may differ between equal solves: wall time and the proof's last digits."""
    return plan.model_dump(exclude={"solve_seconds", "gap_cost", "gap_unserved", "bound"})


def prepared(inputs: PlanInputs) -> dict[str, Prepared]:
    catalogue = Catalogue(inputs)
    found = {}
    for one in inputs.services:
        checked = prepare(one, inputs, catalogue)
        if isinstance(checked, Prepared):
            found[one.key] = checked
    return found


def used_devices(plan: Plan) -> dict[str, int]:
    used: dict[str, int] = {}
    for one in plan.services:
        for variant in one.variants:
            used[variant.gpu_type] = used.get(variant.gpu_type, 0) + variant.replicas * variant.devices
    return used


_LIMITS = [
    [{"namespace": "team", "costPerHour": 3.0}],
    [{"namespace": "team", "devices": {"small": 3, "big": 1}}, {"namespace": "elsewhere", "costPerHour": 0.0}],
]


@st.composite
def small_fleets(draw: st.DrawFn, *, most_services: int = 3, optimality_gap: float = 0.0) -> PlanInputs:
    """Up to three services, three variants on two types, two buckets, scarce or ample devices."""
    small = {"idle": 20.0, "peak": 100.0}
    types = [
        gpu_type("small", draw(st.sampled_from([1.0, 1.5])), watts=small),
        gpu_type("big", draw(st.sampled_from([2.5, 4.0])), watts={"idle": 50.0, "peak": 350.0}),
    ]
    inventory = {"small": draw(st.integers(0, 6)), "big": draw(st.integers(0, 3))}
    if draw(st.booleans()):
        types[0] = gpu_type("small", 1.0, limit=draw(st.integers(0, 4)), watts=small)
    services, profiles, demand = [], [], {}
    for i in range(draw(st.integers(1, most_services))):
        rate = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
        profiles.append(
            rates_profile(
                {
                    "small": [draw(rate), draw(rate)],
                    "small-tp2": [draw(rate), draw(rate)],
                    "big": [draw(rate), draw(rate)],
                },
                name=f"p{i}",
            )
        )
        least = draw(st.integers(0, 2))
        bounds: dict[str, int] = {"min": least}
        if draw(st.booleans()):
            bounds["max"] = least + draw(st.integers(0, 3))
        if draw(st.integers(0, 2)) == 0:
            bounds["maxVariants"] = draw(st.integers(1, 2))
        services.append(
            service(f"s{i}", profile=f"p{i}", priority=draw(st.sampled_from([50, 100, 200])), replicas=bounds)
        )
        load = st.sampled_from([0.0, 0.3, 1.1, 2.0, 4.7])
        demand[f"s{i}"] = [draw(load), draw(load)]
    inputs = fleet(
        services,
        profiles,
        types,
        inventory=inventory,
        demand=demand,
        utilization_target=draw(st.sampled_from([0.8, 1.0])),
        optimality_gap=optimality_gap,
        budget_per_hour=draw(st.sampled_from([None, None, 1.0, 4.5, 9.0])),
        namespace_limits=draw(st.sampled_from([[], [], [], *_LIMITS])),
    )
    domains = st.sampled_from([[], [], [power_domain(600, "small", "big")], [power_domain(250, "small")]])
    return inputs.model_copy(update={"power_domains": draw(domains)})


def unserved_at(program: ServiceProgram, counts: Sequence[int]) -> float:
    """Least unserved requests per second at given replicas, by a linear program written independently."""
    if not program.rates.size:
        return 0.0
    problem = pulp.LpProblem("check", pulp.LpMaximize)
    served = {}
    for b in range(len(program.rates)):
        for v in range(len(counts)):
            if program.throughput[b, v] > 0:
                served[b, v] = problem.add_variable(f"served_{b}_{v}", 0)
    if not served:
        return float(program.rates.sum())
    problem += pulp.lpSum(list(served.values()))
    for b, rate in enumerate(program.rates):
        problem += pulp.lpSum([x for (bucket, _), x in served.items() if bucket == b]) <= float(rate)
    for v, count in enumerate(counts):
        row = [x * float(1 / program.throughput[b, v]) for (b, variant), x in served.items() if variant == v]
        if row:
            problem += pulp.lpSum(row) <= max(0.0, count - float(program.held_back[v]))
    problem.solve(pulp.HiGHS(msg=False))
    return max(0.0, float(program.rates.sum()) - float(pulp.value(problem.objective)))


def shortage_at(program: ServiceProgram, counts: Sequence[int]) -> float:
    """The same with a tenth of what the worst of its losses would leave unserved."""
    at_risk = (unserved_at(program.after(loss), counts) / loss.keep for loss in program.losses)
    return unserved_at(program, counts) + 0.1 * max(at_risk, default=0.0)


def _over(limit: NamespaceLimit, programs: list[ServiceProgram], choice: Sequence[Any]) -> bool:
    rows = [row for program, row in zip(programs, choice, strict=True) if program.key.startswith(f"{limit.namespace}/")]
    if limit.cost_per_hour is not None and sum(row[3] for row in rows) > limit.cost_per_hour:
        return True
    return any(sum(row[0].get(name, 0) for row in rows) > most for name, most in (limit.devices or {}).items())


def brute_force(inputs: PlanInputs) -> tuple[float, ...] | None:
    """The lexicographic optimum by enumeration: per priority, highest first, unserved requests per second (what is at
    risk counted in part) and missing replicas; then cost. None where no service can be planned."""
    programs = [reduce(one, inputs.policy, None).program for one in prepared(inputs).values()]
    if not programs:
        return None
    devices, budget = Catalogue(inputs).devices, inputs.policy.budget_per_hour
    peak = {one.metadata.name: one.spec.watts.peak for one in inputs.gpu_types if one.spec.watts is not None}
    options = []
    for program in programs:
        rows = []
        for counts in itertools.product(*(range(bound + 1) for bound in program.upper(devices))):
            if program.distinct is not None and sum(count > 0 for count in counts) > program.distinct:
                continue
            if program.maximum is None or sum(counts) <= program.maximum:
                cost = float(np.dot(program.cost, counts))
                rows.append((program.use(counts), shortage_at(program, counts), program.missing(counts), cost))
        options.append(rows)
    levels = sorted({program.priority for program in programs}, reverse=True)
    best: tuple[float, ...] | None = None
    for choice in itertools.product(*options):
        if any(sum(row[0].get(name, 0) for row in choice) > count for name, count in devices.items()):
            continue
        if any(
            sum(row[0].get(name, 0) * peak[name] for row in choice for name in domain.spec.gpu_types)
            > domain.spec.budget_watts
            for domain in inputs.power_domains
        ):
            continue
        if budget is not None and sum(row[3] for row in choice) > budget:
            continue
        if any(_over(limit, programs, choice) for limit in inputs.policy.namespace_limits):
            continue
        rank: list[float] = []
        for level in levels:
            rows = [row for program, row in zip(programs, choice, strict=True) if program.priority == level]
            rank += [round(sum(row[1] for row in rows), 4), sum(row[2] for row in rows)]
        rank.append(round(sum(row[3] for row in choice), 6))
        best = tuple(rank) if best is None else min(best, tuple(rank))
    return best


MIXED_TYPES = [gpu_type("l4", 1.0), gpu_type("a100", 3.0), gpu_type("h100", 5.5)]
MIXED_RATES = rates_profile({"l4": [4, 0], "a100": [10, 3], "h100": [20, 8]})
"""Short prompts are cheapest on l4, which cannot take long ones."""


def mixed_traffic(rps: float) -> dict[str, object]:
    """`spec.traffic` of four short prompts to one long."""
    sizes = [
        {"inputTokens": inputs, "outputTokens": 100, "share": share} for inputs, share in ((400, 4.0), (3000, 1.0))
    ]
    return {"mode": "expected", "requestsPerSecond": rps, "sizes": sizes}
