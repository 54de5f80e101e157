"""Is the promise kept by engines that are not those that were profiled? Observe, correct, plan, in simulated time.

    profile of the known engines --plan--> replay on varied ones --against, observe--> corrections --plan--> replay ...

The held-out combinations again, but every coefficient of the engines that serve is up to 15 % off the profiled one's;
in every third combination all of them are 15 % slower. Nothing tells the planner but what gateways can see: sizes,
times, and how many requests an engine had meanwhile. The rate is the one that the uncorrected plan was made for;
after three rounds the corrected plan is judged. Rows beside it: how the uncorrected plan fared, on the same engines.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from e2e.bench.placement_promise import add_outcomes
from e2e.bench.placement_promise_engines import Family
from e2e.bench.placement_promise_fleets import Combination
from e2e.bench.placement_promise_heldout import WITHIN, drawn, profile_of_site, varied
from e2e.bench.placement_promise_trial import Outcome, judged, planned_for, possible_factor, replayed
from e2e.bench.report import Report
from llmfleet.api import Buckets, Correction, ModelProfile
from llmfleet.api.modelprofile import ModelProfileStatus
from llmfleet.placement.performance.correction import observe
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.observation import Seen, against
from llmfleet.simulator import Served

COMBINATIONS = 72 if os.environ.get("FULL") else 12
_ROUNDS = 3


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
        profile = corrected(profile, replayed(planned, fixed.family.engines), at=600.0 * (turn + 1))
    return first, _outcome(fixed, profile)


def corrected(profile: ModelProfile, served: Sequence[Served], at: float) -> ModelProfile:
    """The profile with what a run taught, `at` in seconds since 1970."""
    by_variant: dict[str, list[Served]] = defaultdict(list)
    for one in served:
        by_variant[one.variant].append(one)
    known = {one.gpu_type: one for one in profile.status.corrections}
    for measurement in profile.spec.measurements:
        name = measurement.gpu_type
        correction = known.get(name) or Correction(
            gpu_type=name,
            tensor_parallel=measurement.tensor_parallel,
            pipeline_parallel=measurement.pipeline_parallel,
            configuration=measurement.configuration,
        )
        cells = list(seen(by_variant[name], profile.spec.buckets))
        for observation, predicted in against(MeasuredTable(measurement), cells, at):
            correction = observe(correction, observation, predicted)
        known[name] = correction
    return profile.model_copy(update={"status": ModelProfileStatus(corrections=list(known.values()))})


def seen(served: Sequence[Served], buckets: Buckets) -> Iterator[Seen]:
    """What gateways would report of these requests of one variant: sums by bucket and by octave of load."""
    cells: dict[tuple[int, int], list[tuple[Served, float]]] = defaultdict(list)
    for one, load in _around(served):
        cells[buckets.index(one.input_tokens, one.output_tokens), round(math.log2(load))].append((one, load))
    for (bucket, _), some in cells.items():
        yield Seen(
            corner=buckets.edges(bucket),
            concurrency=sum(load for _, load in some) / len(some),
            requests=len(some),
            input_tokens=sum(one.input_tokens for one, _ in some),
            ttft_ms=sum(one.ttft_ms for one, _ in some),
            decoded_tokens=sum(one.output_tokens - 1 for one, _ in some),
            decode_ms=sum((one.tpot_ms or 0.0) * (one.output_tokens - 1) for one, _ in some),
        )


def _around(served: Sequence[Served]) -> Iterator[tuple[Served, float]]:
    """Each request, and how many its engine had on average while it was there, itself included."""
    by_engine: dict[str, list[Served]] = defaultdict(list)
    for one in served:
        by_engine[one.engine].append(one)
    for some in by_engine.values():
        begins, ends = np.array([one.at_s for one in some]), np.array([_end_s(one) for one in some])
        times = np.concatenate([begins, ends])
        order = np.argsort(times, kind="stable")
        running = np.cumsum(np.repeat([1, -1], len(some))[order])
        added_up = np.concatenate([[0.0], np.cumsum(running[:-1] * np.diff(times[order]))])
        before, after = (np.interp(at, times[order], added_up) for at in (begins, ends))
        yield from zip(some, np.maximum(1.0, (after - before) / (ends - begins)).tolist(), strict=True)


def _end_s(one: Served) -> float:
    return one.at_s + (one.ttft_ms + (one.tpot_ms or 0.0) * (one.output_tokens - 1)) / 1e3


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
