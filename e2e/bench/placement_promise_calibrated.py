"""Is the promise kept by engines that are not those that were profiled? Observe, correct, plan, in simulated time.

    profile of the known engines --plan--> replay on varied ones --gateways' reports, learn--> corrections --plan--> ...

The held-out combinations again, but every coefficient of the engines that serve is up to 15 % off the profiled one's;
in every third combination all of them are 15 % slower. Nothing tells the planner but what two gateways report, each
of its own requests. The rate is the one that the uncorrected plan was made for;
after three rounds the corrected plan is judged. Rows beside it: how the uncorrected plan fared, on the same engines.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace

from e2e.bench.placement_promise import add_outcomes
from e2e.bench.placement_promise_engines import Family
from e2e.bench.placement_promise_fleets import Combination, inputs_for
from e2e.bench.placement_promise_heldout import WITHIN, drawn, profile_of_site, varied
from e2e.bench.placement_promise_trial import Outcome, Planned, judged, planned_for, possible_factor, replayed
from e2e.bench.report import Report
from llmfleet.api import ALL_SERVICES, ModelProfile
from llmfleet.api.modelprofile import ModelProfileStatus
from llmfleet.operator.observations import EngineObserver
from llmfleet.placement.learning import learn
from llmfleet.simulator import replay

COMBINATIONS = 72 if os.environ.get("FULL") else 12
_ROUNDS = 3
_GATEWAYS = 2


def add_rows(report: Report) -> None:
    """Tries every combination with and without correction and adds the rows of docs/benchmarks.md."""
    before: list[Outcome] = []
    after: list[Outcome] = []
    for number in range(COMBINATIONS):
        pair = tried_twice(number)
        if pair is not None:
            for outcomes, outcome, word in zip((before, after), pair, ("before", "after"), strict=True):
                outcomes.append(outcome)
                print(f"{word:6} {outcome.line()}", file=sys.stderr, flush=True)
    add_outcomes(report, "promise_varied", before, target=None)
    add_outcomes(report, "promise_calibrated", after)


def tried_twice(number: int) -> tuple[Outcome, Outcome] | None:
    """A combination on varied engines, as it is planned for the known ones and as it is planned after correction;
    None where there is no plan for the known ones."""
    known, profile = drawn(number), profile_of_site(number)
    planned = planned_for(known, profile)
    if isinstance(planned, str):
        return None
    factor = planned.requests_per_second / known.load.rate_at(known.fleet.requests_per_second)
    rps = factor * known.fleet.requests_per_second
    fixed = replace(known, fleet=replace(known.fleet, requests_per_second=rps, filled=False), family=_off(number))
    first = _outcome(fixed, profile)
    for turn in range(_ROUNDS):
        planned = planned_for(fixed, profile)
        if isinstance(planned, str):
            break
        profile = corrected(profile, fixed, planned, at=900.0 * (turn + 1))
    return first, _outcome(fixed, profile)


def corrected(profile: ModelProfile, combination: Combination, planned: Planned, at: float) -> ModelProfile:
    """The profile with what a run of the plan taught through gateways and operator, `at` in seconds since 1970."""
    observer = EngineObserver()
    replay(
        planned.table,
        combination.family.engines,
        planned.arrivals,
        gateways=_GATEWAYS,
        hear=lambda reports, now_s: observer.record(reports, ALL_SERVICES, now_s),
    )
    inputs = inputs_for(combination, profile, planned.arrivals)
    learnt = learn(
        {one.key: one for one in inputs.services},
        {profile.key: profile},
        {one.key: one for one in inputs.gpu_types},
        {profile.key: profile.status.corrections},
        observer.take(),
        at=at,
    )
    corrections = learnt[0].corrections if learnt else profile.status.corrections
    return profile.model_copy(update={"status": ModelProfileStatus(corrections=corrections)})


def _outcome(combination: Combination, profile: ModelProfile) -> Outcome:
    planned = planned_for(combination, profile)
    if isinstance(planned, str):
        return Outcome(combination, None, problem=planned)
    found = judged(combination, replayed(planned, combination.family.engines))
    return Outcome(combination, planned, found, possible_factor(combination, planned))


def _off(number: int) -> Family:
    """The engines that serve instead of the profiled ones."""
    draw, family = random.Random(f"off {number}"), drawn(number).family
    slower = number % 3 == 0
    devices = {
        name: replace(
            device,
            engine=device.engine.model_copy(update={"step": device.engine.step.scaled(1 + WITHIN)})
            if slower
            else varied(device.engine, draw),
        )
        for name, device in family.devices.items()
    }
    return replace(family, devices=devices)


def main() -> None:
    """These rows alone."""
    report = Report("placement_promise_calibrated")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
