"""Is the promise kept? Plans tried on the engine model, in simulated time.

    engine model --closed loops--> ModelProfile --plan()--> routing table --replay of a load--> attainment

Every combination of a load, an objective and a fleet is planned for exactly the sizes and the rate that are then
replayed (`placement_promise_trial.py` says how, `placement_promise_fleets.py` what). These are the combinations that
the planner's makers look at; `placement_promise_heldout.py` has others, and `placement_promise_calibrated.py` engines
that are not those that were profiled. Rows and targets: docs/benchmarks.md.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from e2e.bench.placement_promise_engines import cpus, gpus
from e2e.bench.placement_promise_fleets import combinations, model_profile
from e2e.bench.placement_promise_trial import Outcome, tried
from e2e.bench.report import Report
from llmfleet.simulator import Engine, EngineSpec, Job
from llmfleet.simulator.arrivals import renewal
from llmfleet.simulator.attainment import wilson
from llmfleet.simulator.engine import FOREVER_PS
from llmfleet.simulator.spec import PS_PER_S

_EVERY = 1 if os.environ.get("FULL") else 5
"""Every fifth combination, unless all are asked for: each load, objective and fleet is still among them."""


def add_rows(report: Report) -> None:
    """Plans and replays the combinations and adds the rows of docs/benchmarks.md."""
    families = (gpus(), cpus())
    profiles = {family.name: model_profile(family) for family in families}
    outcomes = []
    for combination in list(combinations(families))[::_EVERY]:
        outcomes.append(tried(combination, profiles[combination.family.name]))
        print(outcomes[-1].line(), file=sys.stderr, flush=True)
    add_outcomes(report, "promise", outcomes)
    for load in dict.fromkeys(one.combination.load.name for one in outcomes):
        some = [one for one in outcomes if one.combination.load.name == load]
        report.add(f"promise_kept_{load}", "%", kept_percent(some), note=f"{len(some)} combinations")
    for row, some in (
        ("small_pools", [one for one in outcomes if one.planned and sum(one.planned.replicas.values()) <= 2]),
        ("fitted", [one for one in outcomes if one.combination.family.name == "cpus"]),
    ):
        report.add(f"promise_kept_{row}", "%", kept_percent(some), note=f"{len(some)} combinations")
    report.add(
        "engine_model_steps",
        "steps/s",
        [_steps_per_second(families[0].engines["h100"]) for _ in range(3)],
        target=100_000,
        at_most=False,
    )


def add_outcomes(report: Report, prefix: str, outcomes: Sequence[Outcome], *, target: float | None = 100.0) -> None:
    """The rows that every set of combinations has: kept, worst, and the share of the possible load."""
    planned = [one for one in outcomes if one.promised]
    verdicts = [one.found.verdict() for one in planned if one.found is not None]
    warned = sum(one.found is not None for one in outcomes) - len(planned)
    lower, _ = wilson(verdicts.count("kept"), len(planned))
    report.add(
        f"{prefix}_kept",
        "%",
        kept_percent(planned),
        target=target,
        at_most=False,
        note=f"{verdicts.count('kept')} of {len(planned)}, so at least {100 * lower:.1f} % of such (Wilson, 95 %); "
        f"{verdicts.count('broken')} broken, {verdicts.count('undecided')} undecided, "
        f"{warned} planned with a warning of their bursts, {len(outcomes) - len(planned) - warned} not planned",
    )
    worst = min(planned, key=lambda one: one.points, default=None)
    report.add(
        f"{prefix}_worst_points",
        "points",
        [worst.points] if worst else [],
        target=None if target is None else -1.0,
        at_most=False,
        note=worst.combination.name if worst else "",
    )
    report.add(f"{prefix}_of_possible", "%", [100 / one.possible_factor for one in planned])


def kept_percent(outcomes: Sequence[Outcome]) -> list[float]:
    """As the runs of a row: none where nothing was planned."""
    planned = [one for one in outcomes if one.found is not None]
    return [100.0 * sum(one.kept for one in planned) / len(planned)] if planned else []


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
