"""Prompts of which a share is in the engines' prefix cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Plan
from llmfleet.placement import plan
from llmfleet.placement.checker import violations
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.measured import MeasuredTable
from llmfleet.placement.performance.prefix import PrefixCached, prefix_cached
from llmfleet.placement.performance.roofline import Roofline
from placement_testing.fleets import fleet, gpu_type, point, profile, service
from placement_testing.shapes import LLAMA_8B

ROOFLINE = Roofline(
    architecture_of(LLAMA_8B),
    CATALOGUE["h100-sxm"],
    1,
)
shares = st.floats(0.0, 0.99)


@given(st.integers(1, 32_768), st.integers(1, 2_048), st.integers(1, 64), shares, shares)
def test_a_larger_share_never_makes_the_first_token_later_and_decoding_stays_as_it_is(
    input_tokens: int, output_tokens: int, concurrency: int, one: float, other: float
) -> None:
    less, more = (
        prefix_cached(ROOFLINE, share).predict(input_tokens, output_tokens, concurrency)
        for share in sorted((one, other))
    )
    assert float(more.ttft_ms) <= float(less.ttft_ms) * (1 + 1e-9)
    np.testing.assert_array_equal(more.tpot_ms, less.tpot_ms)


def test_what_was_never_measured_so_short_saves_nothing() -> None:
    measured = profile({"h100": [point((512, 128), 8.0, ttft_ms=100), point((4096, 128), 4.0, ttft_ms=800)]})
    table = MeasuredTable(measured.spec.measurements[0])
    whole, half, nearly_all = (PrefixCached(table, share).predict(4096, 128, 1) for share in (0.0, 0.5, 0.99))
    assert float(nearly_all.ttft_ms) == 100  # the shortest that was seen, not an extrapolation
    assert 100 < float(half.ttft_ms) < 800 == float(whole.ttft_ms)


def planned(share: float, *, ttft_ms: float = 2000, rps: float = 6.0) -> Plan:
    points = [
        point(
            (tokens, 128), tokens_per_second / (tokens + 4 * 128), concurrency=n, ttft_ms=tokens / 5 * n, tpot_ms=10 + n
        )
        for tokens in (512, 4096)
        for n, tokens_per_second in ((1, 6_000.0), (4, 12_000.0), (8, 15_000.0))
    ]
    chat = service(
        objective={"ttft": {"milliseconds": ttft_ms}, "tpot": {"milliseconds": 30}},
        traffic={"prefixCacheHitShare": share},
    )
    inputs = fleet(
        [chat], [profile({"h100": points})], [gpu_type("h100", 3.0)], inventory={"h100": 40}, demand={"s": [0.0, rps]}
    )
    decided, _ = plan(inputs, None)
    assert violations(inputs, decided) == []
    return decided


def test_a_shared_system_prompt_takes_fewer_replicas() -> None:
    assert planned(0.6).cost_per_hour < planned(0.0).cost_per_hour


def test_an_objective_that_whole_prompts_miss_is_kept_for_what_is_left_of_them() -> None:
    assert [refusal.reason for refusal in planned(0.0, ttft_ms=500).refusals] == ["ObjectiveUnreachable"]
    kept = planned(0.8, ttft_ms=500)
    assert (kept.refusals, kept.services[0].unserved_rps) == ([], 0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="prefixCacheHitShare"):
        service(traffic={"prefixCacheHitShare": share})
