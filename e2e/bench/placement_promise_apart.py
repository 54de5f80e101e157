"""Is the promise kept where prefill and decode are apart? Plans with both stages, replayed on the engine model.

    data sheets, shape of the model --plan()--> tables of both stages --replay of a load--> attainment, saving

The engines are those of `placement_promise_engines.gpus`, but nobody has measured them: stages are predicted from
published figures, so what is tried is the prediction's margin as well as queues, transfers and places. Objectives are
strict in TPOT, as otherwise whole replicas are chosen; a combination in which they are is not replayed, and counted in
the note. The saving is against the cheapest plan of whole replicas. Rows and targets: docs/benchmarks.md.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from e2e.bench.placement_promise_engines import Family, gpus
from e2e.bench.placement_promise_fleets import KEY, Combination, Fleet, inputs_for, loads, objective
from e2e.bench.placement_promise_trial import ALLOWED_POINTS, WARM_UP_SHARE
from e2e.bench.report import Report
from llmfleet.api import GPUType, ModelProfile, Plan
from llmfleet.api.gputype import Hardware
from llmfleet.placement import PlanInputs, plan, violations
from llmfleet.placement.performance.figures import MOST_ARRIVALS_CV2
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.simulator import ObjectiveAttainment, attainment, replay, staged_tables
from llmfleet.simulator.arrivals import at_rate, rate

PROFILE = Path(__file__).parents[2] / "examples" / "apart" / "modelprofile.yaml"
"""Whose shape the modelled engines have: Llama 3.1 8B."""
OBJECTIVES = {
    "strict": objective(3000, 25, 90, 90),
    "strict_answers": objective(6000, 15, 95, 95),
    "strict_both": objective(1500, 20, 90, 95),
}
FLEETS = (
    Fleet("apart_one_type", "gpus", ("h100",), 20.0, filled=False),
    Fleet("apart_two_types", "gpus", ("a100", "h100"), 20.0, filled=False),
    Fleet("apart_large", "gpus", ("h100",), 80.0, filled=False),
)
_DEVICES = {"a100": "a100-sxm-80gb", "h100": "h100-sxm"}
_GB_PER_SECOND = {"a100": 25.0, "h100": 50.0}
"""A card of 200 and of 400 Gb/s beside each device."""
_EVERY = 1 if os.environ.get("FULL") else 4


@dataclass(frozen=True)
class Tried:
    """One combination in which stages are apart."""

    combination: Combination
    found: ObjectiveAttainment
    twice_kept: bool
    """Whether the same replicas keep the objective at twice the load."""
    saving: float
    """Of the cost of whole replicas, as a share; 1 where these cannot serve all."""
    replicas: dict[str, int]

    @property
    def points(self) -> float:
        """The worse target's attainment less its percentile, in percentage points."""
        return min(one.percent - one.target.percentile for one in (self.found.ttft, self.found.tpot))

    @property
    def kept(self) -> bool:
        """Whether even the lower ends of both Wilson intervals are enough."""
        return self.found.verdict(ALLOWED_POINTS) == "kept"

    def line(self) -> str:
        """In words."""
        counts = " ".join(f"{count}x{name}" for name, count in self.replicas.items())
        return (
            f"{self.combination.name:42} {counts:44} TTFT {self.found.ttft.percent:6.2f} "
            f"TPOT {self.found.tpot.percent:6.2f}: {self.found.verdict(ALLOWED_POINTS)}, "
            f"twice the load {'kept' if self.twice_kept else 'not kept'}, saves {self.saving:.0%}"
        )


def combinations(family: Family) -> Iterator[Combination]:
    """Every load with every objective on every fleet, but for loads whose bursts a plan warns of."""
    for fleet in FLEETS:
        for load in loads(family):
            if load.cv2 > MOST_ARRIVALS_CV2:
                continue
            for name, targets in OBJECTIVES.items():
                yield Combination(load, name, targets, fleet, family)


def profile_of(family: Family) -> ModelProfile:
    """The shape of the model, no measurements."""
    read = yaml.safe_load(PROFILE.read_text())["spec"]
    return ModelProfile.parse(
        {
            "metadata": {"name": family.name, "namespace": "bench"},
            "spec": {
                "model": f"bench/{family.name}",
                "weightsGib": family.weights_gib,
                "kvKibPerToken": family.kv_kib_per_token,
                "buckets": family.buckets.to_wire(),
                "architecture": read["architecture"],
            },
        },
        strict=True,
    )


def apart_inputs(combination: Combination, profile: ModelProfile) -> PlanInputs:
    """The inputs of a plan that may have stages apart, one device a replica."""
    arrivals = combination.load.arrivals_at(combination.fleet.requests_per_second)
    inputs = inputs_for(combination, profile, arrivals)
    (service,) = inputs.services
    engine = service.spec.engine.model_copy(update={"disaggregated": True})
    service = service.model_copy(update={"spec": service.spec.model_copy(update={"engine": engine})})
    types = [_known(one) for one in inputs.gpu_types if one.metadata.name in combination.fleet.types]
    return inputs.model_copy(update={"services": [service], "gpu_types": types, "can_hand_over": True})


def _known(gpu_type: GPUType) -> GPUType:
    name = gpu_type.metadata.name
    device = CATALOGUE[_DEVICES[name]]
    hardware = Hardware(memory_bandwidth_gb_per_second=device.memory_gb_per_second, dense_tflops=device.tflops_16bit)
    known = {"hardware": hardware, "kv_transfer_gb_per_second": _GB_PER_SECOND[name], "devices_per_node": 1}
    return gpu_type.model_copy(update={"spec": gpu_type.spec.model_copy(update=known)})


def tried(combination: Combination, profile: ModelProfile) -> Tried | None:
    """Plans and replays a combination; None where the plan has whole replicas only, or leaves demand unserved."""
    inputs = apart_inputs(combination, profile)
    decided, _ = plan(inputs, None)
    if decided.refusals or decided.status == "partial" or not _apart(decided):
        return None
    if broken := violations(inputs, decided):
        raise RuntimeError(f"{combination.name}: {broken[0]}")
    whole, _ = plan(inputs.model_copy(update={"can_hand_over": False}), None)
    served = not whole.refusals and whole.status != "partial"
    saving = 1 - decided.cost_per_hour / whole.cost_per_hour if served else 1.0
    found, twice = (_replayed(combination, decided, factor) for factor in (1.0, 2.0))
    return Tried(combination, found, twice.verdict(ALLOWED_POINTS) == "kept", saving, decided.services[0].replicas)


def _apart(decided: Plan) -> bool:
    return any(variant.role is not None for part in decided.services for variant in part.variants)


def _replayed(combination: Combination, decided: Plan, factor: float) -> ObjectiveAttainment:
    family = combination.family
    arrivals = combination.load.arrivals_at(combination.fleet.requests_per_second)
    table, second = staged_tables(
        decided, KEY, context_length=family.context_length, kv_bytes_per_token=1024 * family.kv_kib_per_token
    )
    engines = {variant.name: family.engines[variant.gpu_type] for variant in decided.services[0].variants}
    served = replay(table, engines, at_rate(arrivals, factor * rate(arrivals)), second=second)
    return attainment(served[int(WARM_UP_SHARE * len(served)) :], combination.objective)


def add_rows(report: Report) -> None:
    """Plans and replays the combinations and adds the rows of docs/benchmarks.md."""
    family = gpus()
    profile, chosen = profile_of(family), list(combinations(family))[::_EVERY]
    found: Sequence[Tried] = [one for one in (tried(each, profile) for each in chosen) if one is not None]
    for one in found:
        print(one.line(), file=sys.stderr, flush=True)
    note = f"{len(found)} of {len(chosen)} combinations have stages apart"
    kept = [100.0 * sum(one.kept for one in found) / len(found)] if found else []
    report.add("promise_apart_kept", "%", kept, target=100.0, at_most=False, note=note)
    worst = min(found, key=lambda one: one.points, default=None)
    report.add(
        "promise_apart_worst_points",
        "points",
        [worst.points] if worst else [],
        target=-ALLOWED_POINTS,
        at_most=False,
        note=worst.combination.name if worst else "",
    )
    twice = [100.0 * sum(one.twice_kept for one in found) / len(found)] if found else []
    report.add("promise_apart_twice_the_load", "%", twice)
    savings = [100.0 * one.saving for one in found if one.saving < 1]
    report.add("promise_apart_saving", "%", [statistics.median(savings)] if savings else [])


def main() -> None:
    """These rows alone."""
    report = Report("placement_promise_apart")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
