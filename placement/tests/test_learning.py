"""What a fleet's engines were seen to do becomes what its profiles have learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from llmfleet.api import Correction, Learnt, LLMService, ModelProfile, ObservedCell, ObservedVariant
from llmfleet.api.modelprofile import ModelProfileStatus
from llmfleet.placement import plan
from llmfleet.placement.learning import learn, news
from llmfleet.placement.performance.variant_model import variant_model
from placement_testing.fleets import Point, corners, fleet, gpu_type, point, profile, service

STEP_S = 900.0
INPUTS, OUTPUTS = (512, 4096), (128,)
TYPES = {"l4": gpu_type("l4", 1.0), "h100": gpu_type("h100", 3.0)}


def measured(tpot_ms: float = 10) -> list[Point]:
    """20 ms until the first token of a request alone, `tpot_ms` per token whatever the load."""
    return [
        point(corner, 10.0, concurrency=n, ttft_ms=20, tpot_ms=tpot_ms)
        for corner in corners(INPUTS, OUTPUTS)
        for n in (1, 64)
    ]


def profiled(*variants: str, **spec: Any) -> ModelProfile:
    return profile({variant: measured() for variant in variants}, inputs=INPUTS, outputs=OUTPUTS, **spec)


def saw(
    variant: str, tpot_ms: float, *, concurrency: float = 4.0, requests: int = 500, name: str = "s"
) -> ObservedVariant:
    cell = ObservedCell(
        bucket=0,
        requests=requests,
        concurrency=concurrency,
        input_tokens=requests * 512,
        ttft_ms=requests * 20.0,
        decoded_tokens=requests * 100,
        decode_ms=requests * 100 * tpot_ms,
    )
    return ObservedVariant(service=f"team/{name}", variant=variant, buckets=BUCKETS, cells=[cell])


BUCKETS = profiled("l4").spec.buckets


def taught(
    known: ModelProfile,
    *seen: ObservedVariant,
    services: Sequence[LLMService] = (service(),),
    at: float = 0.0,
    types: dict[str, Any] = TYPES,
) -> Learnt:
    """What one profile has learnt, `Learnt` without anything where that is nothing."""
    found = learn(
        {one.key: one for one in services},
        {known.key: known},
        types,
        {known.key: known.status.corrections},
        seen,
        at=at,
    )
    return found[0] if found else Learnt(profile=known.key)


def having(known: ModelProfile, learnt: Learnt) -> ModelProfile:
    return known.model_copy(update={"status": ModelProfileStatus(corrections=learnt.corrections)})


def factor(correction: Correction) -> float:
    [one] = correction.tpot
    return round(math.exp(one.log_ratio), 3)


def test_an_engine_that_is_slower_than_measured_gets_more_replicas() -> None:
    points = [
        point(corner, 60.0, concurrency=n, ttft_ms=20, tpot_ms=tpot_ms)
        for corner in corners(INPUTS, OUTPUTS)
        for n, tpot_ms in ((1, 10.0), (64, 40.0))
    ]
    known = profile({"l4": points}, inputs=INPUTS, outputs=OUTPUTS)
    chat = service(objective={"ttft": {"milliseconds": 1000}, "tpot": {"milliseconds": 30}})

    def planned(known: ModelProfile) -> int:
        inputs = fleet([chat], [known], list(TYPES.values()), inventory={"l4": 40}, demand={"s": [30.0, 0.0]})
        decided, _ = plan(inputs, None)
        assert decided.status == "optimal"
        return decided.services[0].replicas["l4"]

    loads = {1.0: 16.0, 16.0: 27.4, 64.0: 64.0}
    learnt = taught(known, *[saw("l4", tpot_ms, concurrency=load) for load, tpot_ms in loads.items()])
    assert planned(having(known, learnt)) > planned(known)
    assert planned(having(known, taught(known, saw("l4", 10.0, concurrency=1.0)))) == planned(known)


def test_what_is_as_predicted_changes_no_factor() -> None:
    [correction] = taught(profiled("l4"), saw("l4", 10.0)).corrections
    assert factor(correction) == 1.0


def test_prompts_from_the_prefix_cache_do_not_teach_that_the_engine_is_faster() -> None:
    points = [point((tokens, 128), 9.0, concurrency=n, ttft_ms=tokens) for tokens in INPUTS for n in (1, 64)]
    known = profile({"l4": points}, inputs=INPUTS, outputs=OUTPUTS)
    cell = saw("l4", 20.0, concurrency=1.0).cells[0]._replace(bucket=1, input_tokens=500 * 4096, ttft_ms=500 * 512.0)
    seen = saw("l4", 20.0).model_copy(update={"cells": [cell]})

    def learnt(share: float) -> float:
        cached = service(traffic={"prefixCacheHitShare": share})
        [correction] = taught(known, seen, services=[cached]).corrections
        return sum(one.log_ratio for one in correction.ttft)

    assert learnt(0.0) < -1
    assert learnt(0.875) == pytest.approx(0.0)


def test_services_of_one_profile_teach_it_together() -> None:
    learnt = taught(
        profiled("l4"),
        saw("l4", 10.0, name="s", requests=100),
        saw("l4", 20.0, name="t", requests=300),
        services=[service("s"), service("t")],
    )
    [correction] = learnt.corrections
    # Sizes of both weigh by their tokens: the fourth root of 2 * 2 * 2.
    assert factor(correction) == 1.682
    assert correction.tpot[0].weight == 400


def test_what_was_learnt_before_is_built_upon_and_what_was_not_seen_stays() -> None:
    known = profiled("l4", "h100")
    known = having(known, taught(known, saw("l4", 12.0), saw("h100", 15.0)))
    learnt = taught(known, saw("l4", 14.0), at=STEP_S)
    h100, l4 = learnt.corrections
    assert factor(h100) == 1.5
    assert 1.2 < factor(l4) < 1.4


def test_a_variant_that_the_service_cannot_have_teaches_nothing_and_is_named() -> None:
    learnt = taught(profiled("l4"), saw("b200", 50.0), saw("l4", 12.0))
    assert [one.gpu_type for one in learnt.corrections] == ["l4"]
    assert learnt.dropped == ["what was seen of variant b200 of LLMService team/s: it can have l4"]


def test_an_engine_that_seems_four_times_as_fast_is_another_one() -> None:
    learnt = taught(profiled("l4"), saw("l4", 2.0), saw("l4", 9.0, concurrency=1.0))
    [correction] = learnt.corrections
    assert [round(one.concurrency) for one in correction.tpot] == [1]
    [dropped] = learnt.dropped
    assert "what was seen of l4 at 4 requests in flight: 2 ms per token where 10 ms are predicted" in dropped


def test_an_engine_that_is_far_slower_is_learnt_up_to_the_bound() -> None:
    known = profiled("l4")
    learnt = taught(known, saw("l4", 400.0))
    assert learnt.dropped == []
    assert factor(learnt.corrections[0]) == 8.0


def test_sizes_of_other_edges_teach_nothing() -> None:
    other = profile({"l4": measured()}, inputs=(512, 4096), outputs=(256,), name="p")
    assert taught(other, saw("l4", 20.0)).corrections == []


def test_services_and_profiles_that_are_gone_teach_nothing() -> None:
    assert taught(profiled("l4"), saw("l4", 20.0), services=[]).corrections == []
    assert taught(profiled("l4"), saw("l4", 20.0), services=[service(profile="q")]).corrections == []


def test_what_was_learnt_of_a_configuration_that_is_gone_is_dropped_and_named() -> None:
    known = profiled("l4")
    old = Correction(gpu_type="l4", tensor_parallel=2, pipeline_parallel=1, configuration="fp8")
    learnt = taught(having(known, Learnt(profile=known.key, corrections=[old])), saw("l4", 10.0))
    assert [one.configuration for one in learnt.corrections] == ["default"]
    assert learnt.dropped == ["what was learnt of l4-tp2-fp8: the profile has no such configuration"]


@pytest.mark.parametrize("own", [False, True])
def test_pools_of_one_hardware_learn_together_unless_they_are_measured_themselves(own: bool) -> None:
    types = TYPES | {"l4-spot": gpu_type("l4-spot", 0.4, sameHardwareAs="l4")}
    known = profiled("l4", "l4-spot") if own else profiled("l4")
    learnt = taught(known, saw("l4-spot", 20.0), saw("l4", 20.0), types=types)
    assert [one.gpu_type for one in learnt.corrections] == (["l4", "l4-spot"] if own else ["l4"])


def test_sizes_that_were_not_measured_do_not_keep_the_others_from_being_learnt() -> None:
    points = [one for one in measured() if one["inputTokens"] == 512]
    known = profile({"l4": points}, inputs=INPUTS, outputs=OUTPUTS)
    large = ObservedCell(1, 10, 4.0, 40_000, 1e4, 1000, 1e5)
    seen = saw("l4", 12.0)
    [correction] = taught(known, seen.model_copy(update={"cells": [large, *seen.cells]})).corrections
    assert factor(correction) == 1.2
    assert correction.tpot[0].weight == 500


def test_the_same_again_is_no_news_and_small_steps_add_up() -> None:
    known = profiled("l4")
    told = having(known, taught(known, saw("l4", 12.0)))
    assert news(known, told)
    now, steps = told, 0
    for step in range(1, 30):
        now = having(now, taught(now, saw("l4", 12.0 + 0.1 * step), at=step * STEP_S))
        if news(told, now):
            steps, told = steps + 1, now
    assert 2 <= steps <= 10
    assert news(told, told.model_copy(update={"spec": profiled("l4", "h100").spec}))


def test_an_engine_that_is_faster_than_measured_is_no_news() -> None:
    known = profiled("l4")
    first = having(known, taught(known, saw("l4", 9.5)))
    second = having(first, taught(first, saw("l4", 7.0), at=STEP_S))
    assert second != first
    assert not news(first, second)


def test_what_was_learnt_before_a_variant_was_measured_again_counts_no_more() -> None:
    known = profiled("l4")
    told = having(known, taught(known, saw("l4", 20.0)))
    again = told.spec.measurements[0].model_copy(update={"measured_at": "1970-01-01T01:00:00Z"})
    new = told.model_copy(update={"spec": told.spec.model_copy(update={"measurements": [again]})})

    def predicted(known: ModelProfile) -> float:
        model = variant_model(known, TYPES["l4"], 1, now=3600.0)
        assert model is not None
        return round(float(model.predict(512, 128, 4).tpot_ms), 1)

    assert (predicted(told), predicted(new)) == (19.8, 10.0)
    [correction] = taught(new, saw("l4", 11.0), at=7200.0).corrections
    assert factor(correction) == 1.1
