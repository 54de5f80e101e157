"""Settings, prompts, and the measurement as YAML."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from llmfleet.api import Buckets, MeasuredPoint, Measurement, ModelProfile, Percentiles
from llmfleet.cli.profiling import ProfileSettings, buckets_of, measurement_yaml, merge_measurement
from llmfleet.cli.profiling.prompts import SAMPLE_TEXT, Prompts
from llmfleet.cli.refused import RefusedError

BUCKETS = Buckets(input_tokens=[64, 256], output_tokens=[32])

PROFILE = """\
# How this was measured.
# On what.
apiVersion: llmfleet.io/v1alpha1
kind: ModelProfile
metadata: {name: tiny, namespace: demo}
spec:
  model: tiny
  weightsGib: 0.01
  kvKibPerToken: 2
  buckets: {inputTokens: [64, 256], outputTokens: [32]}
"""


def measurement(gpu_type: str = "l4", *, rate: float = 2.5, inputs: tuple[int, ...] = (64, 256)) -> Measurement:
    latency = Percentiles(p50=1, p90=2, p95=3, p99=4, max=5)
    points = [
        MeasuredPoint(
            input_tokens=tokens,
            output_tokens=32,
            concurrency=1,
            requests=8,
            requests_per_second=rate,
            ttft_ms=latency,
            tpot_ms=latency,
        )
        for tokens in inputs
    ]
    return Measurement(gpu_type=gpu_type, engine="vllm 0.32.0", measured_at="2026-01-01T00:00:00Z", points=points)


def parsed(text: str) -> ModelProfile:
    return ModelProfile.parse(yaml.safe_load(text), strict=True)


def test_the_entry_alone_is_an_item_of_spec_measurements() -> None:
    (entry,) = yaml.safe_load(measurement_yaml(measurement()))
    assert Measurement.model_validate(entry) == measurement()


def test_merging_adds_a_variant_and_keeps_the_rest() -> None:
    once = merge_measurement(PROFILE, measurement("l4"), "tiny.yaml")
    twice = merge_measurement(once, measurement("a100"), "tiny.yaml")
    assert parsed(twice).spec.measurements == [measurement("l4"), measurement("a100")]
    assert parsed(twice).spec.buckets == BUCKETS
    assert twice.startswith("# How this was measured.\n# On what.\napiVersion:")


def test_merging_replaces_the_measurement_of_the_same_variant() -> None:
    once = merge_measurement(PROFILE, measurement(rate=1), "tiny.yaml")
    again = merge_measurement(once, measurement(rate=9), "tiny.yaml")
    assert parsed(again).spec.measurements == [measurement(rate=9)]


def test_merging_refuses_a_measurement_with_a_hole() -> None:
    with pytest.raises(RefusedError, match=r"tiny\.yaml: spec\.buckets has corners .*: input 256 output 32"):
        merge_measurement(PROFILE, measurement(inputs=(64,)), "tiny.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: [", r"tiny\.yaml: not YAML"),
        ("kind: GPUType", r"tiny\.yaml: accepted is one ModelProfile, got \['GPUType'\]"),
        (PROFILE + "---\n" + PROFILE, "accepted is one ModelProfile, got .*ModelProfile.*ModelProfile"),
        (PROFILE.replace("weightsGib: 0.01", "weightsGib: -1"), r"tiny\.yaml: spec\.weightsGib: .*greater than 0"),
        (PROFILE + "  bucket: {}\n", r"tiny\.yaml: spec\.bucket: "),
    ],
)
def test_a_file_that_is_not_one_valid_profile_is_refused(text: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        buckets_of(text, "tiny.yaml")


def test_buckets_come_from_the_profile() -> None:
    assert buckets_of(PROFILE, "tiny.yaml") == BUCKETS
    assert ProfileSettings("http://engine", "l4", BUCKETS).corners == [(64, 32), (256, 32)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "engine:8000"}, "url: got 'engine:8000'; accepted is"),
        ({"concurrencies": []}, r"concurrency: got \[\]; accepted"),
        ({"concurrencies": [0, 1]}, r"concurrency: got \[0, 1\]; accepted"),
        ({"concurrencies": [4, 4]}, r"concurrency: got \[4, 4\]; accepted"),
        ({"seconds_per_point": 0}, "seconds per point: got 0; accepted"),
        ({"seconds_per_point": float("nan")}, "seconds per point: got nan; accepted"),
        ({"buckets": Buckets(input_tokens=[8], output_tokens=[1, 8])}, r"outputTokens: got \[1, 8\]; accepted"),
        ({"concurrencies": range(1, 300)}, "2 buckets at 299 levels .* at most 512 points"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        replace(ProfileSettings("http://engine", "l4", BUCKETS), **changes)


def test_a_key_is_not_shown_with_the_settings() -> None:
    assert "sesame" not in repr(ProfileSettings("http://engine", "l4", BUCKETS, api_key="sesame"))


def test_prompts_have_the_exact_length_and_only_ordinary_tokens() -> None:
    prompts = Prompts(range(100, 200), seed=1)
    drawn = [prompts.draw(tokens) for tokens in (1, 64, 4096)]
    assert [len(prompt) for prompt in drawn] == [1, 64, 4096]
    assert set().union(*drawn) <= set(range(100, 200))


def test_prompts_share_no_prefix_worth_caching() -> None:
    prompts = Prompts([ord(character) for character in SAMPLE_TEXT], seed=1)
    beginnings = {tuple(prompts.draw(256)[:16]) for _ in range(2000)}
    assert len(beginnings) == 2000


def test_prompts_repeat_with_the_seed_and_only_with_it() -> None:
    first, again, other = (Prompts(range(100), seed).draw(64) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_tokenizer_that_makes_everything_the_same_is_refused() -> None:
    with pytest.raises(RefusedError, match="only 2 different tokens"):
        Prompts([7, 8] * 100, seed=1)
