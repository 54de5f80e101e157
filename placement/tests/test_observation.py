"""What gateways see of an engine in service, as observations that a correction can learn from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmfleet.api import Correction
from llmfleet.placement.performance.correction import Corrected, observe
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.observation import Seen, against
from placement_testing.fleets import point, profile

SHORT, LONG = (512, 32), (4096, 256)
TABLE = MeasuredTable(
    profile(
        {
            "l4": [
                point(corner, 1.0, concurrency=n, ttft_ms=ttft_ms * n, tpot_ms=10 * n)
                for corner, ttft_ms in ((SHORT, 50), ((512, 256), 50), ((4096, 32), 400), (LONG, 400))
                for n in (1, 16)
            ]
        },
        inputs=(512, 4096),
        outputs=(32, 256),
    ).spec.measurements[0]
)
"""10 ms per token and request in flight; 50 ms until the first token of a short prompt, 400 ms of a long one."""


def cell(
    corner: tuple[int, int], concurrency: float, *, slower: float = 1.0, requests: int = 100, answer: int | None = None
) -> Seen:
    """Requests of the corner's size, or with other answers, on an engine so many times slower."""
    answer = corner[1] if answer is None else answer
    ttft_ms = 50 if corner[0] == 512 else 400
    return Seen(
        concurrency=concurrency,
        requests=requests,
        input_tokens=requests * corner[0],
        ttft_ms=requests * ttft_ms * concurrency * slower,
        decoded_tokens=requests * (answer - 1),
        decode_ms=requests * (answer - 1) * 10 * concurrency * slower,
    )


def test_an_engine_that_is_what_was_measured_shows_what_was_predicted_whatever_the_mix() -> None:
    cells = [cell(SHORT, 1), cell(LONG, 1, requests=7), cell(SHORT, 4, answer=200), cell(LONG, 4, requests=30)]
    for observation, predicted in against(TABLE, cells, 0.0):
        assert observation.tpot_ms == pytest.approx(float(predicted.tpot_ms))
        if not math.isnan(predicted.ttft_ms):
            assert observation.ttft_ms == pytest.approx(float(predicted.ttft_ms))


def test_an_engine_that_is_slower_teaches_by_how_much() -> None:
    correction = Correction(gpu_type="l4", tensor_parallel=1, pipeline_parallel=1, configuration="default")
    for observation, predicted in against(TABLE, [cell(SHORT, 1, slower=1.5), cell(LONG, 8, slower=1.5)], 0.0):
        correction = observe(correction, observation, predicted)
    raw, found = TABLE.predict(*LONG, 8), Corrected(TABLE, correction, 0.0).predict(*LONG, 8)
    assert found.tpot_ms == pytest.approx(1.5 * float(raw.tpot_ms), rel=0.1)
    assert found.ttft_ms == pytest.approx(1.5 * float(raw.ttft_ms), rel=0.1)


def test_first_tokens_count_only_of_those_who_were_alone() -> None:
    waited = replace(cell(SHORT, 8), ttft_ms=1e6)
    by_load = {observation.concurrency: predicted for observation, predicted in against(TABLE, [waited], 0.0)}
    assert math.isnan(by_load[8].ttft_ms)
    ((observation, predicted),) = against(TABLE, [cell(SHORT, 1)], 0.0)
    assert observation.ttft_ms == pytest.approx(float(predicted.ttft_ms))


def test_shorter_prompts_than_the_corner_are_not_taken_for_a_fast_engine() -> None:
    half = replace(cell(LONG, 1), input_tokens=100 * 2304, ttft_ms=100 * 225)
    ((observation, predicted),) = against(TABLE, [half], 0.0)
    assert observation.ttft_ms == pytest.approx(float(predicted.ttft_ms))


def test_each_octave_of_load_is_an_observation_and_what_nobody_predicts_is_none() -> None:
    cells = [cell(SHORT, 1), cell(SHORT, 2), cell(LONG, 2.5), cell(SHORT, 16), cell(SHORT, 40)]
    assert [observation.concurrency for observation, _ in against(TABLE, cells, 0.0)] == [1, 2.25, 16]
    assert against(TABLE, [cell(SHORT, 1, answer=1)], 0.0) == []
    for timeless in (replace(cell(SHORT, 1), decode_ms=0.0), replace(cell(SHORT, 1), ttft_ms=0.0)):
        assert against(TABLE, [timeless], 0.0) == []


def test_nothing_seen_is_no_observation() -> None:
    for requests, concurrency in ((0, 1.0), (1, 0.0), (1, math.inf)):
        with pytest.raises(ValueError, match="accepted are numbers of at least 1"):
            replace(cell(SHORT, 1), requests=requests, concurrency=concurrency)


def test_sizes_that_seem_fast_and_sizes_that_seem_slow_for_their_neighbours_make_up_for_each_other() -> None:
    quick, slow = cell(SHORT, 8, slower=0.5), cell((512, 256), 8, slower=2.0)
    slow = replace(slow, requests=100, decoded_tokens=quick.decoded_tokens, decode_ms=quick.decode_ms * 4)
    ((observation, predicted),) = against(TABLE, [quick, slow], 0.0)
    assert observation.tpot_ms == pytest.approx(float(predicted.tpot_ms), rel=0.01)
