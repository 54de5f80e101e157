"""The engine model in the place of an engine: measured by the code of `llmfleet profile`, fitted, planned for."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest

from e2e.bench.engine_model import DATA, OPEN_LOADS, SEEN, UNSEEN, modelled
from e2e.bench.engine_model_loop import modelled_window, profile_model
from e2e.bench.placement_promise_calibrated import corrected
from e2e.bench.placement_promise_engines import Device, Family
from e2e.bench.placement_promise_fleets import OBJECTIVES, Combination, Fleet, inputs_for, loads, model_profile
from e2e.bench.placement_promise_heldout import COMBINATIONS, WITHIN, drawn, varied
from e2e.bench.placement_promise_real import BUCKETS, FAST, SLOW, fullest, profile_of
from e2e.bench.placement_promise_real import inputs_for as real_inputs_for
from e2e.bench.placement_promise_trial import Planned, filled, planned_for, tried
from llmfleet.api import Buckets
from llmfleet.cli.profiling.statistics import percentiles
from llmfleet.placement import plan
from llmfleet.simulator import EngineSpec, StepTime

STEADY = EngineSpec(step=StepTime(overhead_ms=10), kv_blocks=10_000, max_num_seqs=4)
"""Every step takes 10 ms, whatever is in it."""
SMALL = Family(
    "small",
    {"one": Device(EngineSpec(step=StepTime(overhead_ms=5, token_ms=0.2), kv_blocks=4000, max_num_seqs=16), 4, 1.0)},
    weights_gib=0.1,
    kv_kib_per_token=1,
    shrink=8,
)


def combination(load: str, objective: str) -> Combination:
    (found,) = (one for one in loads(SMALL) if one.name == load)
    return Combination(found, objective, OBJECTIVES[objective], Fleet("small", "small", ("one",), 20.0, True), SMALL)


def test_clients_of_a_closed_loop_get_their_tokens_step_by_step() -> None:
    window = modelled_window(STEADY, (100, 21), 4, seconds=5)
    # A prompt's step and 20 more; a client whose answer ends with a step is back in the next.
    assert window.requests_per_second == pytest.approx(4 / 0.21, rel=0.02)
    assert all(one.ttft_ms == pytest.approx(10) and one.tpot_ms == pytest.approx(10) for one in window.completed)


def test_more_clients_than_the_engine_takes_wait_for_their_turn() -> None:
    window = modelled_window(STEADY, (100, 21), 8, seconds=5)
    assert window.requests_per_second == pytest.approx(4 / 0.21, rel=0.02)
    assert percentiles([one.ttft_ms for one in window.completed]).p50 == pytest.approx(220, rel=0.1)


def test_a_profile_goes_on_until_more_clients_bring_nothing() -> None:
    measurement = profile_model(STEADY, "l4", Buckets(input_tokens=[100], output_tokens=[21, 41]), seconds=5)
    assert [(point.output_tokens, point.concurrency) for point in measurement.points] == [
        (outputs, concurrency) for outputs in (21, 41) for concurrency in (1, 2, 4, 8)
    ]


def test_the_model_still_shows_what_was_written_down_when_it_was_fitted() -> None:
    """If this fails, the model has changed: run `python -m e2e.bench.engine_model` again."""
    document = json.loads(DATA.read_text())
    spec = EngineSpec.model_validate(document["spec"])
    assert len(document["loads"]) == len(SEEN) + len(UNSEEN) + len(OPEN_LOADS)
    for load, row in zip((*SEEN, *UNSEEN), document["loads"], strict=False):
        assert vars(modelled(spec, load)) == pytest.approx(row["model"], rel=1e-6), row["load"]


def test_a_small_plan_is_filled_and_keeps_its_promise() -> None:
    profile, wanted = model_profile(SMALL), combination("poisson_conv", "usual")
    outcome = tried(wanted, profile)
    assert outcome.kept
    assert outcome.possible_factor >= 1
    assert outcome.planned is not None
    inputs = inputs_for(wanted, profile, outcome.planned.arrivals)
    decided, _ = plan(inputs, None)
    assert decided.services[0].replicas == outcome.planned.replicas
    assert filled(decided, inputs) < 1.05


def test_a_plan_for_the_mean_of_bursts_does_not_keep_its_promise() -> None:
    """What the row has to be able to say: code completions come nine times as fast as their mean or not at all."""
    wanted = combination("code", "loose")
    outcome = tried(replace(wanted, load=replace(wanted.load, cv2=1.0)), model_profile(SMALL))
    assert outcome.found is not None
    assert outcome.found.verdict() == "broken"
    assert outcome.possible_factor < 1


def test_held_out_combinations_are_the_same_in_every_run_and_unlike_each_other() -> None:
    names = [drawn(number).name for number in range(COMBINATIONS)]
    assert names == [drawn(number).name for number in range(COMBINATIONS)]
    assert len(set(names)) == COMBINATIONS
    one, again = (drawn(7).load.arrivals_at(5.0) for _ in range(2))
    assert one == again


def test_a_varied_engine_is_another_one_within_bounds() -> None:
    known = SMALL.engines["one"]
    other = varied(known, random.Random(1), schedulers=True)
    for name, value in known.step.model_dump().items():
        assert abs(getattr(other.step, name) - value) <= WITHIN * value
    assert other.step != known.step
    assert other.max_num_batched_tokens >= other.max_num_seqs


def test_what_slower_engines_show_teaches_that_they_are_slower() -> None:
    wanted, profile = combination("poisson_conv", "usual"), model_profile(SMALL)
    planned = planned_for(wanted, profile)
    assert isinstance(planned, Planned)
    known = SMALL.engines["one"]
    logs = {}
    for slower in (1.0, 1.3):
        engine = known.model_copy(update={"step": known.step.scaled(slower)})
        family = replace(SMALL, devices={"one": replace(SMALL.devices["one"], engine=engine)})
        (correction,) = corrected(profile, replace(wanted, family=family), planned, 0.0).status.corrections
        heavy = [one for one in correction.tpot if one.weight >= 100]
        logs[slower] = {round(math.log2(one.concurrency)): one.log_ratio for one in heavy}
    assert max(map(abs, logs[1.0].values())) < math.log(1.2)
    both = logs[1.0].keys() & logs[1.3].keys()
    assert both
    for octave in both:
        assert math.exp(logs[1.3][octave] - logs[1.0][octave]) == pytest.approx(1.3, rel=0.1)


def test_real_engines_are_offered_as_much_as_a_plan_with_both_serves() -> None:
    known = EngineSpec.model_validate(json.loads(DATA.read_text())["spec"])
    slow = known.model_copy(update={"step": known.step.scaled(3)})
    profile = profile_of([profile_model(spec, name, BUCKETS, 3) for name, spec in ((FAST, known), (SLOW, slow))])
    sizes = [(100, 16), (300, 30), (400, 60)]
    rps, decided = fullest(profile, sizes)
    assert decided.services[0].replicas == {FAST: 1, SLOW: 1}
    more, _ = plan(real_inputs_for(profile, sizes, 1.05 * rps), None)
    assert more.status == "partial"
