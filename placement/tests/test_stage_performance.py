"""What a replica that only prefills, or only decodes, is promised to do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmfleet.api import Buckets
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.figures import VariantFigures
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.roofline import Roofline
from llmfleet.placement.performance.stages import (
    HANDED_OVER_STEPS,
    DecodeAlone,
    Handover,
    PrefillAlone,
    Role,
    Steps,
    stage_model,
)
from placement_testing.fleets import point, profile
from placement_testing.shapes import LLAMA_8B

ROOFLINE = Roofline(architecture_of(LLAMA_8B), CATALOGUE["h100-sxm"])
STEPS = Steps(ROOFLINE, ROOFLINE.admission_ms, 2048, None, 0.6, 0.2, "roofline")
KV_BYTES = 131072.0
BUCKETS = Buckets(input_tokens=[512, 8192], output_tokens=[128])
OBJECTIVE = Objective(
    ttft=LatencyTarget(percentile=90, milliseconds=2000), tpot=LatencyTarget(percentile=95, milliseconds=15)
)


def handover(role: Role, gb_per_second: float = 50.0) -> Handover:
    return Handover(role, gb_per_second, KV_BYTES)


def figures(role: Role, gb_per_second: float = 50.0) -> VariantFigures:
    over = handover(role, gb_per_second)
    return VariantFigures.of_model(stage_model(STEPS, over, 0.0), BUCKETS, np.full(2, np.inf), over)


def test_ttft_of_a_prefill_ends_when_the_whole_cache_has_arrived() -> None:
    fast, slow = (PrefillAlone(STEPS, handover("prefill", gb)).predict(8192, 128, 1).ttft_ms for gb in (1e6, 2.0))
    assert slow - fast == pytest.approx(8192 * KV_BYTES / 2e9 * 1e3, rel=1e-3)


def test_a_cached_prefix_is_not_computed_but_is_transferred() -> None:
    link = handover("prefill", 2.0)
    whole = PrefillAlone(STEPS, link).predict(8192, 128, 1).ttft_ms
    half = PrefillAlone(STEPS, link, prefix_share=0.5).predict(8192, 128, 1).ttft_ms
    saved = float(ROOFLINE.prefill_ms(np.array(8192.0)) - ROOFLINE.prefill_ms(np.array(4096.0)))
    two_steps = 2 * float(ROOFLINE.step_ms(np.array(1.0), np.array(4096.0)))
    assert whole - half == pytest.approx(saved + two_steps, rel=0.01)
    assert half > link.transfer_ms(np.array(8192.0))


def test_a_prefill_never_does_more_prompts_than_its_arithmetic_allows() -> None:
    n = np.array([1.0, 16.0, 256.0])
    rates = n / PrefillAlone(STEPS, handover("prefill")).predict(8192, 128, n).ttft_ms
    assert (np.diff(rates) > 0).all()
    assert (rates < 1 / ROOFLINE.prefill_ms(np.array(8192.0))).all()


def test_decodes_alone_are_not_slowed_by_the_prompts_of_others() -> None:
    n = np.array([1.0, 8.0, 32.0])
    alone = DecodeAlone(STEPS, handover("decode")).predict(8192, 128, n).tpot_ms
    together = ROOFLINE.predict(8192, 128, n).tpot_ms
    assert alone[0] == pytest.approx(together[0])
    assert (alone[1:] < together[1:]).all()


def test_a_decode_knows_no_more_requests_than_memory_or_the_configuration_has_places_for() -> None:
    places = int(ROOFLINE.places(np.array(8192 + 64.0)))
    full = DecodeAlone(STEPS, handover("decode")).predict(8192, 128, [places, places + 1])
    assert full.known.tolist() == [True, False]
    few = DecodeAlone(replace(STEPS, most_requests=4), handover("decode")).predict(8192, 128, [4, 5])
    assert few.known.tolist() == [True, False]


def test_a_request_has_its_place_while_its_cache_is_on_the_way() -> None:
    fast, slow = (figures("decode", gb).column(OBJECTIVE)[1] for gb in (1000.0, 1.0))
    assert 0 < slow < 0.8 * fast


def test_both_stages_together_miss_for_no_more_requests_than_the_objective_lets() -> None:
    first, second = (handover(role).part_of(OBJECTIVE) for role in ("prefill", "decode"))
    missed = sum(100 - part.ttft.percentile for part in (first, second))
    assert missed == pytest.approx(100 - OBJECTIVE.ttft.percentile)
    assert first.ttft.milliseconds + second.ttft.milliseconds == pytest.approx(OBJECTIVE.ttft.milliseconds)
    assert second.ttft.milliseconds == HANDED_OVER_STEPS * OBJECTIVE.tpot.milliseconds
    assert second.tpot == OBJECTIVE.tpot


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_pool_at_its_capacity_keeps_its_part_and_no_more(role: Role) -> None:
    one = figures(role)
    part = one.part_of(OBJECTIVE)
    mix = np.array([0.5, 0.5])
    line = one.margin(OBJECTIVE, mix, replicas=4, arrivals_cv2=1.0)
    rps = line.holds(4) * one.linear_rps(OBJECTIVE, mix)
    kept = one.outlook(OBJECTIVE, 0.99 * rps * mix, replicas=4, arrivals_cv2=1.0)
    beyond = one.outlook(OBJECTIVE, 1.1 * rps * mix, replicas=4, arrivals_cv2=1.0)
    assert kept.keeps(part)
    assert not beyond.keeps(part)


def test_a_slow_link_takes_from_what_a_prefill_holds_until_there_is_nothing_left() -> None:
    held = [figures("prefill", gb).column(OBJECTIVE)[1] for gb in (100.0, 4.0, 1.0)]
    assert held[0] > held[1] > 0
    assert held[2] == 0


def test_a_ttft_target_within_two_steps_leaves_nothing_for_a_prefill() -> None:
    strict = Objective(ttft=LatencyTarget(milliseconds=100), tpot=LatencyTarget(milliseconds=50))
    assert not figures("prefill").column(strict).any()


def test_what_was_measured_slower_than_predicted_alone_is_as_much_slower_in_each_stage() -> None:
    step = float(ROOFLINE.step_ms(np.array(1.0), np.array(8192.0 + 64)))
    alone_ms = float(PrefillAlone(STEPS, handover("prefill", 1e6)).predict(8192, 128, 1).ttft_ms)
    corners = [(512, 128), (8192, 128)]
    for factor, expected in ((2.0, 2.0), (0.5, 1.0)):
        runs = [point(c, 1.0, concurrency=1, ttft_ms=factor * alone_ms, tpot_ms=factor * step) for c in corners]
        (measured,) = profile({"h100": runs}, inputs=(512, 8192)).spec.measurements
        seen = replace(STEPS, measured=MeasuredTable(measured))
        for model, name in ((PrefillAlone, "ttft_ms"), (DecodeAlone, "tpot_ms")):
            over = handover("prefill", 1e6)
            found = getattr(model(seen, over).predict(8192, 128, 8), name)
            assert found == pytest.approx(expected * getattr(model(STEPS, over).predict(8192, 128, 8), name), rel=0.01)


def test_engines_that_were_seen_to_be_slower_are_no_faster_in_a_stage() -> None:
    slower = replace(STEPS, slower=(1.5, 2.0))
    first = [PrefillAlone(one, handover("prefill", 1e9)).predict(8192, 128, 4).ttft_ms for one in (STEPS, slower)]
    second = [DecodeAlone(one, handover("decode")).predict(8192, 128, 4).tpot_ms for one in (STEPS, slower)]
    assert first[1] == pytest.approx(1.5 * first[0], rel=1e-3)
    assert second[1] == pytest.approx(2.0 * second[0])
