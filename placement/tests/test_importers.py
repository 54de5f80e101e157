"""Results of other tools as measured points: read as they are, completed and repaired towards the worse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Buckets
from llmfleet.placement.performance.importers import (
    Imported,
    ImportRefusedError,
    at_corners,
    combined,
    read_benchmark,
)
from llmfleet.placement.performance.importers.aibrix import UNKNOWN_MS, KnownObjective

FILE = "run.json"
BUCKETS = Buckets(input_tokens=[512, 2048], output_tokens=[128])


def vllm_run(**changed: Any) -> dict[str, Any]:
    """One run as `vllm bench serve --save-result --metric-percentiles 50,90,95,99` writes it."""
    return {
        "backend": "vllm",
        "model_id": "org/model",
        "num_prompts": 200,
        "request_rate": "inf",
        "max_concurrency": 16,
        "duration": 40.0,
        "completed": 200,
        "failed": 0,
        "total_input_tokens": 200 * 512,
        "total_output_tokens": 200 * 128,
        "request_throughput": 5.0,
        "mean_ttft_ms": 110.0,
        "median_ttft_ms": 100.0,
        "p50_ttft_ms": 100.0,
        "p90_ttft_ms": 150.0,
        "p95_ttft_ms": 180.0,
        "p99_ttft_ms": 240.0,
        "median_tpot_ms": 20.0,
        "p50_tpot_ms": 20.0,
        "p90_tpot_ms": 22.0,
        "p95_tpot_ms": 23.0,
        "p99_tpot_ms": 26.0,
    } | changed


def guidellm_report(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"version": 1}, "benchmarks": list(runs)}


def guidellm_run(strategy: dict[str, Any], **metrics: Any) -> dict[str, Any]:
    def summary(mean: float, **tail: float) -> dict[str, Any]:
        levels = {"p50": mean, "p90": mean, "p95": mean, "p99": mean} | tail
        return {"successful": {"mean": mean, "count": 300, "max": levels["p99"], "percentiles": levels}}

    return {
        "config": {"strategy": strategy},
        "metrics": {
            "requests_per_second": summary(4.0),
            "request_concurrency": summary(7.8),
            "prompt_token_count": summary(512.0),
            "output_token_count": summary(128.0),
            "time_to_first_token_ms": summary(90.0, p95=120.0, p99=200.0),
            "inter_token_latency_ms": summary(15.0, p99=18.0),
            "time_per_output_token_ms": summary(99.0),
        }
        | metrics,
    }


def aibrix_profile(**changed: Any) -> dict[str, Any]:
    return {
        "gpu": "a40",
        "cost": 0.3,
        "tputs": [[8.0, 4.0], [2.0, 0.0]],
        "indexes": [[64, 256], [512, 2048]],
        "slos": {"percentile": 99, "e2e": 5.0},
    } | changed


def read(document: Any, objective: KnownObjective | None = None) -> Imported:
    return read_benchmark(json.dumps(document), FILE, objective)


def test_a_run_of_vllm_is_read_as_it_is() -> None:
    found = read(vllm_run())
    (point,) = found.points
    assert (point.input_tokens, point.output_tokens, point.concurrency, point.requests) == (512, 128, 16, 200)
    assert point.requests_per_second == 5.0
    assert (point.ttft_ms.p50, point.ttft_ms.p95, point.tpot_ms.p99) == (100, 180, 26)
    assert (found.engine, found.model) == ("vllm", "org/model")


def test_percentiles_that_a_file_lacks_are_the_next_higher_ones_and_said() -> None:
    run = vllm_run()
    for name in ("p90_ttft_ms", "p95_ttft_ms", "p50_ttft_ms"):
        del run[name]
    found = read(run)
    assert found.points[0].ttft_ms.model_dump() == {"p50": 100, "p90": 240, "p95": 240, "p99": 240, "max": 240}
    assert any("p90, p95, max not in the file" in note for note in found.notes)


def test_a_median_alone_is_no_tail() -> None:
    run = {name: value for name, value in vllm_run().items() if not name.startswith(("p9", "p5"))}
    with pytest.raises(ImportRefusedError, match=r"ttft: percentiles known are p50; accepted is at least one from p90"):
        read(run)


def test_detailed_runs_have_all_percentiles() -> None:
    detailed = {"ttfts": [0.1] * 9 + [0.5], "latencies": [1.37] * 10, "output_lens": [128] * 10}
    (point,) = read(vllm_run(**detailed)).points
    assert point.ttft_ms.max == pytest.approx(500)
    assert point.tpot_ms.p50 == pytest.approx(1000 * 1.27 / 127)


def test_an_open_loop_run_counts_at_the_load_that_littles_law_gives() -> None:
    found = read(vllm_run(max_concurrency=None, request_rate=5.0))
    assert found.points[0].concurrency == int(5.0 * (0.1 + 127 * 0.02))
    assert any("open loop" in note for note in found.notes)


def test_several_runs_are_a_list_or_lines_or_files() -> None:
    runs = [vllm_run(), vllm_run(max_concurrency=32, request_throughput=8.0)]
    lines = read_benchmark("\n".join(map(json.dumps, runs)), FILE)
    assert lines == read(runs)
    assert [p.concurrency for p in lines.points] == [16, 32]
    together = combined([read(run) for run in runs])
    assert together.points == lines.points
    with pytest.raises(ImportRefusedError, match="the files name the models org/model, org/other"):
        combined([read(vllm_run()), read(vllm_run(model_id="org/other"))])


def test_guidellm_counts_streams_and_takes_its_inter_token_latency_as_tpot() -> None:
    found = read(
        guidellm_report(guidellm_run({"type_": "concurrent", "streams": 8}), guidellm_run({"type_": "synchronous"}))
    )
    assert [(p.concurrency, p.tpot_ms.p50, p.ttft_ms.p95) for p in found.points] == [(1, 15, 120), (8, 15, 120)]
    loose = read(guidellm_report(guidellm_run({"type_": "poisson"})))
    assert loose.points[0].concurrency == 7
    assert "strategy poisson" in loose.notes[0]


def test_an_aibrix_profile_says_that_its_objective_was_kept_and_nothing_stricter() -> None:
    found = read(aibrix_profile())
    by_size = {(p.input_tokens, p.output_tokens): p for p in found.points}
    assert set(by_size) == {(512, 64), (2048, 64), (512, 256)}
    point = by_size[512, 256]
    assert (point.requests_per_second, point.ttft_ms.p99, point.ttft_ms.max) == (2.0, 5000, UNKNOWN_MS)
    assert point.tpot_ms.p50 == pytest.approx(5000 / 255)
    assert any("no point, at input 2048 output 256" in note for note in found.notes)


def test_an_aibrix_profile_without_objective_needs_one() -> None:
    old = aibrix_profile()
    del old["slos"]
    with pytest.raises(ImportRefusedError, match=r"slos: missing.*accepted is a file with slos\.e2e"):
        read(old)
    found = read(old, KnownObjective(800, 40, 90))
    assert (found.points[0].ttft_ms.p90, found.points[0].ttft_ms.p95) == (800, UNKNOWN_MS)


def test_a_larger_request_completed_more_often_than_a_smaller_one_is_repaired_downwards() -> None:
    runs = [
        vllm_run(),
        vllm_run(total_input_tokens=200 * 2048, request_throughput=7.0),
        vllm_run(max_concurrency=32, request_throughput=9.0),
    ]
    found = read(runs)
    assert [p.requests_per_second for p in found.points] == [5.0, 9.0, 5.0]
    assert any("input 2048 output 128 concurrency 16: 7 requests/s is more than the 5" in note for note in found.notes)


def test_falling_percentiles_are_raised_and_a_run_made_twice_counts_as_the_worse() -> None:
    found = read([vllm_run(p99_ttft_ms=120.0), vllm_run(request_throughput=4.0)])
    assert found.points[0].requests_per_second == 4.0
    raised = read(vllm_run(p99_ttft_ms=120.0))
    assert raised.points[0].ttft_ms.p99 == 180
    assert any("p99 of 120 ms is below a lower percentile" in note for note in raised.notes)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.floats(0.1, 100)), min_size=1, max_size=12))
def test_repair_only_ever_lowers_and_leaves_no_contradiction(cells: list[tuple[int, int, float]]) -> None:
    runs = [
        vllm_run(total_input_tokens=200 * 512 * size, max_concurrency=8 * n, request_throughput=rps)
        for size, n, rps in cells
    ]
    seen = {(512 * size, 8 * n): rps for size, n, rps in cells}
    points = read(runs).points
    for point in points:
        assert point.requests_per_second <= seen[point.input_tokens, point.concurrency] or len(cells) > len(seen)
        for other in points:
            if other.concurrency == point.concurrency and other.input_tokens <= point.input_tokens:
                assert other.requests_per_second >= point.requests_per_second


def test_a_run_stands_for_a_corner_that_it_is_not_smaller_than() -> None:
    near = vllm_run(total_input_tokens=200 * 600)
    found = at_corners(read(near), BUCKETS)
    assert found.points[0].input_tokens == 512
    smaller = vllm_run(total_input_tokens=200 * 500)
    left = at_corners(read([near, smaller]), BUCKETS)
    assert len(left.points) == 1
    assert any("left out" in note and "input 500" in note for note in left.notes)
    with pytest.raises(ImportRefusedError, match=r"no run fits a bucket: accepted are sizes of the corners"):
        at_corners(read(smaller), BUCKETS)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            vllm_run(request_throughput=float("nan")),
            r"run\.json: request_throughput: got nan; accepted is a finite number",
        ),
        (vllm_run(median_tpot_ms="20"), r"median_tpot_ms: got '20'"),
        (vllm_run(failed=50), r"failed: 50 of 250 requests; accepted are at most 1 %"),
        (vllm_run(completed=0), r"completed: got 0; accepted is a finite number of at least 1"),
        ([vllm_run(), vllm_run(p99_ttft_ms=-1)], r"run\.json\[1\]\.p99_ttft_ms: got -1"),
        (guidellm_report(), r"benchmarks: empty"),
        (
            guidellm_report(guidellm_run({"type_": "concurrent", "streams": 0})),
            r"benchmarks\[0\]\.config\.strategy\.streams: got 0",
        ),
        (
            guidellm_report(guidellm_run({"type_": "synchronous"}, inter_token_latency_ms={})),
            r"benchmarks\[0\]\.metrics\.inter_token_latency_ms\.successful: got NoneType; accepted is an object",
        ),
        (aibrix_profile(tputs=[[1.0, 2.0]]), r"tputs: accepted are 2 rows"),
        (aibrix_profile(tputs=[[1.0, -2.0], [1.0, 1.0]]), r"tputs\[0\]\[1\]: got -2\.0"),
        (aibrix_profile(tputs=[[0.0, 0.0], [0.0, 0.0]]), r"tputs: every cell is 0"),
        (aibrix_profile(indexes=[[64, 0], [512, 2048]]), r"indexes\[0\]\[1\]: got 0"),
        (aibrix_profile(slos={"percentile": 99, "ttft": 1.0}), r"slos: got .*; accepted is e2e, or ttft and tpot"),
        ({"hello": 1}, r"unknown format with fields hello; accepted are results of `vllm bench serve"),
        ([], r"accepted is a JSON object, a list of them, or one per line"),
    ],
)
def test_what_cannot_be_used_is_refused_with_path_and_value(document: Any, message: str) -> None:
    with pytest.raises(ImportRefusedError, match=message):
        read(document)


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(ImportRefusedError, match=r"run\.json: neither JSON nor one JSON object per line"):
        read_benchmark("ttft 100\n", FILE)
