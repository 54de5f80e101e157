"""What the promise rows plan: loads, objectives and fleets, and the inputs of a plan for each combination of them.

    Combination(load, objective, fleet, ...) --inputs_for(profile, arrivals)--> PlanInputs

`combinations` lists those that everybody who works on the planner looks at. Others, drawn by chance, are in
`placement_promise_heldout.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from e2e.bench.engine_model_loop import profile_model
from e2e.bench.placement_promise_engines import Family
from llmfleet.api import GPUType, LLMService, ModelProfile
from llmfleet.api.llmservice import Objective
from llmfleet.placement import Demand, PlanInputs
from llmfleet.placement.workload import TraceSizes
from llmfleet.simulator import Arrival
from llmfleet.simulator.arrivals import at_rate, burstiness, rate, renewal
from llmfleet.simulator.traces import read_trace

KEY = "bench/chat"
TRACES = Path(__file__).parents[2] / "simulator" / "traces"
DRAWN_REQUESTS = 4000
_PLENTY = 1000
_CODE_RATE = 0.5
_MOST_BURSTINESS = 100.0  # as the field allows

Size = tuple[int, int]
"""Input and output tokens."""


def objective(ttft_ms: float, tpot_ms: float, ttft_percentile: float, tpot_percentile: float) -> Objective:
    """Both targets."""
    return Objective.model_validate(
        {
            "ttft": {"milliseconds": ttft_ms, "percentile": ttft_percentile},
            "tpot": {"milliseconds": tpot_ms, "percentile": tpot_percentile},
        }
    )


OBJECTIVES = {
    "tight": objective(2500, 60, 90, 90),
    "usual": objective(4000, 120, 95, 95),
    "loose": objective(10000, 250, 99, 99),
}


@dataclass(frozen=True)
class Fleet:
    """Which devices there are, and the rate of conversations that they serve; code comes at half of it."""

    name: str
    family: str
    types: tuple[str, ...]
    requests_per_second: float
    filled: bool
    """Whether the rate is raised until the plan would need more."""


FLEETS = (
    Fleet("one_type_small", "gpus", ("a100",), 2.0, filled=True),
    Fleet("one_type_large", "gpus", ("h100",), 40.0, filled=False),
    Fleet("two_types_small", "gpus", ("l4", "h100"), 5.0, filled=True),
    Fleet("three_types_large", "gpus", ("l4", "a100", "h100"), 40.0, filled=False),
    Fleet("fitted_small", "cpus", ("core",), 15.0, filled=True),
    Fleet("fitted_large", "cpus", ("core", "slow-core"), 60.0, filled=False),
)


@dataclass(frozen=True)
class Load:
    """Requests."""

    name: str
    arrivals_at: Callable[[float], list[Arrival]]
    """At a rate of conversations per second."""
    cv2: float
    """CV^2 of the times between arrivals, as the plan is told."""

    def rate_at(self, conversations_per_second: float) -> float:
        """Requests per second."""
        return rate(self.arrivals_at(conversations_per_second))


def loads(family: Family) -> list[Load]:
    """Each load, its requests shorter than in the traces where the family serves such.

    The last two have every size at the corner of its bucket, as the planner reckons: nothing is hidden by its rounding.
    """
    buckets, shrink = family.buckets, family.shrink

    def trace(name: str) -> list[Arrival]:
        return [
            replace(one, input_tokens=-(-one.input_tokens // shrink), output_tokens=-(-one.output_tokens // shrink))
            for one in read_trace(TRACES / f"azure_{name}_2023.csv")
        ]

    def own_times(name: str, arrivals: Sequence[Arrival], share: float) -> Load:
        return Load(name, lambda rps: at_rate(arrivals, share * rps), burstiness(arrivals))

    def drawn(
        name: str, arrivals: Sequence[Arrival], share: float, cv2: float, seed: int, *, corners: bool = False
    ) -> Load:
        sizes = [(one.input_tokens, one.output_tokens) for one in arrivals]
        if corners:
            sizes = [buckets.edges(buckets.index(*size)) for size in sizes]
        return Load(name, lambda rps: renewal(sizes, share * rps, DRAWN_REQUESTS, seed=seed, cv2=cv2), cv2)

    conversations, code = trace("conv"), trace("code")
    return [
        own_times("conv", conversations, 1.0),
        own_times("code", code, _CODE_RATE),
        drawn("poisson_conv", conversations, 1.0, 1.0, 1),
        drawn("poisson_code", code, _CODE_RATE, 1.0, 2),
        drawn("bursty_conv", conversations, 1.0, 4.0, 3),
        drawn("corner_conv", conversations, 1.0, 1.0, 1, corners=True),
        drawn("corner_code", code, _CODE_RATE, 1.0, 2, corners=True),
    ]


@dataclass(frozen=True)
class Combination:
    """What is promised to whom, on which devices."""

    load: Load
    objective_name: str
    objective: Objective
    """As the family's requests are long: stricter for short ones."""
    fleet: Fleet
    family: Family

    @property
    def name(self) -> str:
        """Of all three."""
        return f"{self.load.name} {self.objective_name} {self.fleet.name}"


def combinations(families: Sequence[Family]) -> Iterator[Combination]:
    """Every load with every objective on every fleet."""
    by_name = {family.name: family for family in families}
    for fleet in FLEETS:
        family = by_name[fleet.family]
        for load in loads(family):
            for name, targets in OBJECTIVES.items():
                yield Combination(load, name, _stricter(targets, family.stricter), fleet, family)


def _stricter(targets: Objective, factor: float) -> Objective:
    return objective(
        targets.ttft.milliseconds / factor,
        targets.tpot.milliseconds / factor,
        targets.ttft.percentile,
        targets.tpot.percentile,
    )


def model_profile(family: Family) -> ModelProfile:
    """What `llmfleet profile` would have measured on each of the family's engines."""
    return ModelProfile.parse(
        {
            "metadata": {"name": family.name, "namespace": "bench"},
            "spec": {
                "model": f"bench/{family.name}",
                "weightsGib": family.weights_gib,
                "kvKibPerToken": family.kv_kib_per_token,
                "buckets": family.buckets.to_wire(),
                "measurements": [
                    profile_model(engine, name, family.buckets).to_wire() for name, engine in family.engines.items()
                ],
            },
        },
        strict=True,
    )


def inputs_for(combination: Combination, profile: ModelProfile, arrivals: Sequence[Arrival]) -> PlanInputs:
    """The inputs of a plan for exactly the sizes and the rate of these arrivals."""
    family, fleet = combination.family, combination.fleet
    counts = Counter((one.input_tokens, one.output_tokens) for one in arrivals)
    sizes = TraceSizes(counts, len(arrivals) / rate(arrivals)).by_bucket(family.buckets)
    rps = [one.requests * rate(arrivals) / len(arrivals) for one in sizes]
    service = LLMService.parse(
        {
            "metadata": {"name": "chat", "namespace": "bench"},
            "spec": {
                "model": {"name": f"bench/{family.name}", "contextLength": family.context_length},
                "profile": family.name,
                "objective": combination.objective.to_wire(),
                "gpuTypes": list(fleet.types),
                "traffic": {"burstiness": min(_MOST_BURSTINESS, combination.load.cv2)},
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
        for name, device in family.devices.items()
    ]
    return PlanInputs(
        services=[service],
        profiles=[profile],
        gpu_types=types,
        inventory=dict.fromkeys(fleet.types, _PLENTY),
        demand={KEY: Demand(rps=rps, sizes=sizes)},
    )
