"""What running engines teach about predicted latency."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from llmfleet.api import Correction, ModelProfile
from llmfleet.placement.performance import Prediction
from llmfleet.placement.performance.correction import (
    BOUND,
    HALF_LIFE_SECONDS,
    Corrected,
    Observation,
    observe,
)
from llmfleet.placement.performance.measured import MeasuredTable
from placement_testing.fleets import point, profile

DAY = 86_400.0
NEVER_SEEN = Correction(gpu_type="l4", tensor_parallel=1, pipeline_parallel=1, configuration="default")
MEASURED = MeasuredTable(
    profile(
        {"l4": [point((8192, 1024), 1.0, concurrency=n, ttft_ms=100, tpot_ms=20) for n in (1, 512)]},
        inputs=(8192,),
        outputs=(1024,),
    ).spec.measurements[0]
)
"""100 ms and 20 ms everywhere."""


class Computed:
    """The same, but computed instead of measured."""

    def predict(self, input_tokens: ArrayLike, output_tokens: ArrayLike, concurrency: ArrayLike) -> Prediction:
        found = MEASURED.predict(input_tokens, output_tokens, concurrency)
        return replace(found, source=np.full(found.source.shape, "roofline"))


TABLE = Computed()


def seen(
    *,
    ttft_ms: float = 100,
    tpot_ms: float = 20,
    concurrency: float = 16,
    at: float = 0.0,
    requests: float = 1000,
    input_tokens: float = 1024,
) -> Observation:
    return Observation(at, input_tokens, 256, concurrency, ttft_ms, tpot_ms, requests)


def learned(*observations: Observation) -> Correction:
    correction = NEVER_SEEN
    for one in observations:
        correction = observe(correction, one, TABLE.predict(one.input_tokens, one.output_tokens, one.concurrency))
    return correction


def corrected(
    correction: Correction, *, concurrency: float = 16, now: float = 0.0, input_tokens: float = 1024
) -> Prediction:
    return Corrected(TABLE, correction, now).predict(input_tokens, 256, concurrency)


def test_without_observations_nothing_changes() -> None:
    assert corrected(NEVER_SEEN).tpot_ms == 20
    assert corrected(NEVER_SEEN).tpot_error == TABLE.predict(1024, 256, 16).tpot_error


def test_what_is_seen_at_a_load_is_predicted_there() -> None:
    found = corrected(learned(seen(ttft_ms=150, tpot_ms=15)))
    assert found.ttft_ms == pytest.approx(150, rel=0.02)
    assert found.tpot_ms == pytest.approx(15, rel=0.02)


def test_between_two_loads_the_factor_is_interpolated() -> None:
    found = corrected(learned(seen(tpot_ms=20, concurrency=4), seen(tpot_ms=40, concurrency=64)))
    assert found.tpot_ms == pytest.approx(20 * math.sqrt(2), rel=0.02)


@pytest.mark.parametrize("beyond", [{"concurrency": 128.0}, {"concurrency": 2.0}, {"input_tokens": 4096.0}])
def test_beyond_what_was_seen_only_a_slower_variant_is_believed(beyond: dict[str, float]) -> None:
    assert corrected(learned(seen(tpot_ms=10)), **beyond).tpot_ms == 20
    assert corrected(learned(seen(tpot_ms=40)), **beyond).tpot_ms == pytest.approx(40, rel=0.02)


def test_what_was_measured_is_taken_to_be_slower_where_it_is_seen_to_be_and_never_faster() -> None:
    for tpot_ms, expected in ((15, 20), (30, 30)):
        correction = learned(seen(tpot_ms=tpot_ms))
        found = Corrected(MEASURED, correction, 0.0).predict(1024, 256, 16)
        assert found.tpot_ms == pytest.approx(expected, rel=0.02)
        assert found.ttft_ms == pytest.approx(100)


@given(
    st.lists(
        st.builds(
            seen,
            ttft_ms=st.floats(1e-3, 1e9),
            tpot_ms=st.floats(1e-3, 1e9),
            concurrency=st.floats(1, 512),
            at=st.floats(0, 30 * DAY),
            requests=st.floats(0.1, 1e9),
        ),
        max_size=12,
    ),
    st.floats(1, 512),
    st.floats(0, 60 * DAY),
)
def test_the_factor_is_bounded_whatever_is_observed(
    observations: list[Observation], concurrency: float, now: float
) -> None:
    found = corrected(learned(*observations), concurrency=concurrency, now=now)
    for value, plain in ((found.ttft_ms, 100), (found.tpot_ms, 20)):
        assert plain / BOUND * (1 - 1e-9) <= value <= plain * BOUND * (1 + 1e-9)


def test_one_bad_minute_does_not_tilt_it_and_a_lasting_change_is_followed() -> None:
    steady = [seen(tpot_ms=20, at=minute * 60.0) for minute in range(10)]
    one_bad = learned(*steady, seen(tpot_ms=2000, at=600))
    assert corrected(one_bad, now=600).tpot_ms < 20 * 1.3
    lasting = [seen(tpot_ms=40, at=600 + minute * 60.0) for minute in range(20)]
    assert corrected(learned(*steady, *lasting), now=1800).tpot_ms == pytest.approx(40, rel=0.05)


def test_a_few_requests_weigh_less_than_many_and_what_is_old_fades() -> None:
    few, many = learned(seen(tpot_ms=40, requests=2)), learned(seen(tpot_ms=40, requests=2000))
    assert corrected(few).tpot_ms < corrected(many).tpot_ms
    later = [corrected(many, now=days * HALF_LIFE_SECONDS).tpot_ms for days in (0, 5, 30)]
    assert later[0] > later[1] > later[2] > 20
    assert later[2] == pytest.approx(20, rel=0.01)


def test_the_error_shrinks_where_observations_agree_and_not_elsewhere() -> None:
    correction = learned(*(seen(tpot_ms=25, at=float(i)) for i in range(5)))
    wide = TABLE.predict(1024, 256, 16).tpot_error
    assert corrected(correction).tpot_error < wide
    assert corrected(correction, concurrency=256).tpot_error == wide
    quarrel = learned(*(seen(tpot_ms=10 if i % 2 else 40, at=float(i)) for i in range(20)))
    assert corrected(quarrel).tpot_error > 10 * corrected(correction).tpot_error


def test_it_survives_a_restart_in_the_profiles_status() -> None:
    correction = learned(seen(ttft_ms=130, tpot_ms=17, concurrency=5), seen(ttft_ms=90, concurrency=40))
    stored = profile({"l4": [point((512, 128), 1.0)]}, inputs=(512,), outputs=(128,))
    stored.status.corrections.append(correction)
    restored = ModelProfile.parse(stored.to_wire()).status.corrections[0]
    assert restored == correction
    again = seen(tpot_ms=18, concurrency=5, at=60)
    predicted = TABLE.predict(again.input_tokens, again.output_tokens, again.concurrency)
    assert observe(restored, again, predicted) == observe(correction, again, predicted)


def test_a_load_that_the_model_does_not_know_teaches_nothing() -> None:
    unknown = seen(concurrency=2000)
    assert observe(NEVER_SEEN, unknown, TABLE.predict(1024, 256, 2000)) == NEVER_SEEN


@pytest.mark.parametrize(
    ("field", "value"),
    [("ttft_ms", float("nan")), ("tpot_ms", -1.0), ("concurrency", 0.5), ("requests", 0.0), ("at", float("inf"))],
)
def test_an_impossible_observation_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Observation\.{field} is "):
        seen(**{field: value})
