"""Is the capacity of replicas what they hold? The `capacity_*` rows of `make bench-placement`.

    add_rows(report)                                    measures
    python -m e2e.bench.placement_capacity              only these rows

The function under test sees what a planner sees: a profile of closed loops at the bucket corners, the share of
requests in every bucket, an objective, and how bursty arrivals are. The judge is the engine model of `simulator/`,
which shares no formula with it: the promised rate is offered with the trace's real sizes, and the highest rate that
keeps the promise is found by bisection beside it. Requests go to the replica with the fewest unfinished.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from e2e.bench.engine_model_loop import profile_model
from e2e.bench.placement_promise_engines import gpus
from e2e.bench.report import Report
from llmfleet.api import Buckets
from llmfleet.api.llmservice import Objective
from llmfleet.placement.performance.capacity import capacities
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.mixture import SizeMix, replica_curves
from llmfleet.simulator import Engine, EngineSpec, Job
from llmfleet.simulator.arrivals import renewal
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.spec import PS_PER_MS, PS_PER_S
from llmfleet.simulator.traces import read_trace

_TRACES = Path(__file__).parents[2] / "simulator" / "traces"
_REQUESTS = 3000
_WARM_UP = _REQUESTS // 20
_ALLOWED_POINTS = 1.0
_BISECTIONS = 11
_LEAST_RPS, _MOST_RPS = 0.02, 300.0
_MOST_CONCURRENCY = 1024
POOLS = ((1, 1.0), (4, 4.0))
"""(replicas, CV^2 of the arrivals)"""
_OBJECTIVES = {
    name: Objective.model_validate(
        {
            "ttft": {"milliseconds": ttft, "percentile": percentile},
            "tpot": {"milliseconds": tpot, "percentile": percentile},
        }
    )
    for name, ttft, tpot, percentile in (("tight", 2500, 60, 90), ("usual", 4000, 120, 95), ("loose", 10000, 250, 99))
}

Size = tuple[int, int]


@dataclass(frozen=True)
class Tried:
    """One combination."""

    promised_rps: float
    points: float
    """The worse attainment at that rate less its percentile, in percentage points."""
    possible_rps: float
    """The highest rate tried that keeps the promise."""


def add_rows(report: Report) -> None:
    """Profiles the modelled engines and tries every combination."""
    outcomes = []
    family = gpus()
    for name, spec in family.engines.items():
        table = MeasuredTable(profile_model(spec, name, family.buckets))
        for load in ("conv", "code"):
            sizes = [(one.input_tokens, one.output_tokens) for one in read_trace(_TRACES / f"azure_{load}_2023.csv")]
            curves = replica_curves(table, _mix(sizes, family.buckets), most_concurrency=_MOST_CONCURRENCY)
            for objective_name, objective in _OBJECTIVES.items():
                for replicas, cv2 in POOLS:
                    found = capacities([curves], objective, replicas=replicas, arrivals_cv2=cv2)[0]
                    outcome = _tried(found.requests_per_second, spec, sizes, objective, replicas, cv2)
                    outcomes.append(outcome)
                    print(f"  {name} {load} {objective_name} x{replicas}: {outcome}", file=sys.stderr, flush=True)
    given = [one for one in outcomes if one.promised_rps > 0]
    kept = [one for one in given if one.points >= -_ALLOWED_POINTS]
    report.add(
        "capacity_promise_kept",
        "%",
        [100 * len(kept) / len(given)],
        target=100,
        at_most=False,
        note=f"{len(kept)} of {len(given)}, worst {min(one.points for one in given):.1f} points; nothing was promised "
        f"in {len(outcomes) - len(given)} others",
    )
    shares = [100 * one.promised_rps / one.possible_rps for one in given]
    report.add("capacity_of_possible", "%", shares)


def _mix(sizes: Sequence[Size], buckets: Buckets) -> SizeMix:
    counted = Counter(buckets.edges(buckets.index(*size)) for size in sizes)
    corners = np.array(list(counted), dtype=np.float64)
    return SizeMix(corners[:, 0], corners[:, 1], np.array(list(counted.values()), dtype=np.float64))


def _tried(
    promised_rps: float, spec: EngineSpec, sizes: Sequence[Size], objective: Objective, replicas: int, cv2: float
) -> Tried:
    def points(rps: float) -> float:
        return _points(spec, sizes, rps, objective, replicas, cv2)

    low, high = replicas * _LEAST_RPS, replicas * _MOST_RPS
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if points(middle) >= -_ALLOWED_POINTS else (low, middle)
    return Tried(promised_rps, points(promised_rps) if promised_rps > 0 else math.nan, low)


def _points(
    spec: EngineSpec, sizes: Sequence[Size], rps: float, objective: Objective, replicas: int, cv2: float
) -> float:
    engines = [Engine(spec) for _ in range(replicas)]
    jobs = []
    for number, arrival in enumerate(renewal(sizes, rps, _REQUESTS, seed=5, cv2=cv2)):
        now = round(arrival.at_s * PS_PER_S)
        for engine in engines:
            engine.advance(now)
        job = Job(number, arrival.input_tokens, arrival.output_tokens)
        min(engines, key=lambda engine: engine.unfinished).submit(job, now)
        jobs.append(job)
    for engine in engines:
        engine.advance(FOREVER_PS)
    judged = jobs[_WARM_UP:]
    ttft = [job.first_token_ps - job.arrived_ps <= objective.ttft.milliseconds * PS_PER_MS for job in judged]
    tpot = [
        job.finished_ps - job.first_token_ps <= max(1, job.output_tokens - 1) * objective.tpot.milliseconds * PS_PER_MS
        for job in judged
    ]
    targets = ((ttft, objective.ttft.percentile), (tpot, objective.tpot.percentile))
    return min(100 * sum(kept) / len(kept) - percentile for kept, percentile in targets)


if __name__ == "__main__":
    only = Report("placement_capacity")
    add_rows(only)
    only.write()
