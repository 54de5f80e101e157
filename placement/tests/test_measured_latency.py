"""Latency out of measured points: inside their shapes only, and never better than what was seen to run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Measurement
from llmfleet.placement.performance import Layered
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.roofline import Roofline
from placement_testing.fleets import point, profile
from placement_testing.shapes import LLAMA_8B

Run = tuple[tuple[int, int], int, float, float]
"""Corner, concurrency, TTFT, TPOT."""


def table(*runs: Run) -> MeasuredTable:
    points = [point(corner, 1.0, concurrency=n, ttft_ms=ttft, tpot_ms=tpot) for corner, n, ttft, tpot in runs]
    return MeasuredTable(measurement(*points))


def measurement(*points: dict[str, object]) -> Measurement:
    return profile({"l4": list(points)}, inputs=(512,), outputs=(128,)).spec.measurements[0]


RUNS: list[Run] = [
    ((512, 128), 1, 50, 10),
    ((512, 128), 8, 90, 16),
    ((2048, 128), 1, 120, 12),
    ((2048, 128), 8, 300, 24),
]


def test_a_point_is_answered_as_it_was_measured() -> None:
    found = table(*RUNS).predict(2048, 128, 8)
    assert (float(found.ttft_ms), float(found.tpot_ms), str(found.source)) == (300, 24, "measured")


def test_between_loads_and_between_sizes_the_answer_lies_on_the_chord() -> None:
    found = table(*RUNS).predict([512, 1280, 1280], 128, [4.5, 1, 4.5])
    assert found.tpot_ms.tolist() == [13, 11, 15.5]


@given(
    st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e3)), min_size=2, max_size=5),
    st.floats(1, 16),
)
def test_no_answer_is_better_than_any_run_at_the_same_or_a_lower_load(
    latencies: list[tuple[float, float]], concurrency: float
) -> None:
    runs = [((512, 128), 2**i, ttft, tpot) for i, (ttft, tpot) in enumerate(latencies)]
    found = table(*runs).predict(512, 128, concurrency)
    lower = [run for run in runs if run[1] <= concurrency]
    if concurrency > runs[-1][1]:
        assert not found.known
    else:
        assert found.ttft_ms >= max(run[2] for run in lower) * (1 - 1e-12)
        assert found.tpot_ms >= max(run[3] for run in lower) * (1 - 1e-12)


def test_a_shorter_answer_than_any_measured_bears_the_others_prefills_on_fewer_tokens() -> None:
    found = table(*RUNS).predict(2048, [128, 64, 32], 8)
    assert found.tpot_ms.tolist() == [24, 12 + 12 * 2, 12 + 12 * 4]
    assert table(*RUNS).predict(2048, 32, 1).tpot_ms == 12


def test_outside_the_shapes_there_is_no_answer_and_below_them_that_of_the_smallest() -> None:
    found = table(*RUNS).predict([4096, 512, 512, 64], [128, 256, 128, 16], [1, 1, 9, 1])
    assert found.known.tolist() == [False, False, False, True]
    assert found.ttft_ms[3] == 50
    assert found.source.tolist() == ["none", "none", "none", "measured"]


def test_a_bucket_with_a_corner_missing_is_answered_by_its_upper_corner() -> None:
    runs: list[Run] = [((512, 128), 1, 50, 10), ((2048, 512), 1, 200, 20)]
    found = table(*runs).predict([1024, 1024], [256, 64], 1)
    assert found.ttft_ms[0] == 200
    assert not found.known[1]


def test_scatter_covers_every_measured_percentile_and_the_error_falls_with_requests() -> None:
    tail = {"p50": 100.0, "p90": 110.0, "p95": 300.0, "p99": 310.0, "max": 320.0}
    few = point((512, 128), 1.0) | {"ttftMs": tail, "requests": 10}
    many = few | {"requests": 1000}
    found = [MeasuredTable(measurement(one)).predict(512, 128, 8) for one in (few, many)]
    assert 100 * np.exp(1.6449 * found[0].ttft_spread) == pytest.approx(300)
    assert found[0].ttft_error > found[1].ttft_error >= 0.02
    assert found[0].tpot_spread == 0


def test_a_layer_answers_only_what_the_one_before_does_not_know() -> None:
    roofline = Roofline(architecture_of(LLAMA_8B), CATALOGUE["h100-sxm"])
    found = Layered([table(*RUNS), roofline]).predict([512, 8192], 128, 8)
    assert found.source.tolist() == ["measured", "roofline"]
    assert found.ttft_ms[0] == 90
    assert found.ttft_ms[1] == roofline.predict(8192, 128, 8).ttft_ms
    assert Layered([table(*RUNS)]).predict(8192, 128, 8).source == "none"
