"""Ways to run a model: what is accepted, what it is rendered as, and the profile as it is in each."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmfleet.api import Configuration, ModelProfile
from llmfleet.api.configuration import sets

FP8: dict[str, Any] = {"name": "fp8", "quantization": "fp8", "weightsGib": 8.5}

LATENCY = dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 10.0)
POINT: dict[str, Any] = {
    "inputTokens": 512,
    "outputTokens": 128,
    "concurrency": 1,
    "requests": 9,
    "requestsPerSecond": 1.0,
    "ttftMs": LATENCY,
    "tpotMs": LATENCY,
}


def configuration(**fields: Any) -> Configuration:
    return Configuration.model_validate({"name": "other", **fields})


def profile(*configurations: dict[str, Any], **spec: Any) -> ModelProfile:
    names = ["default", *(one["name"] for one in configurations)]
    return ModelProfile.parse(
        {
            "metadata": {"name": "p", "namespace": "team"},
            "spec": {
                "model": "org/model",
                "weightsGib": 16,
                "kvKibPerToken": 128,
                "overheadGib": 2,
                "buckets": {"inputTokens": [512], "outputTokens": [128]},
                "configurations": list(configurations),
                "measurements": [{"gpuType": "l4", "configuration": name, "points": [POINT]} for name in names],
                **spec,
            },
        },
        strict=True,
    )


def test_every_field_becomes_the_option_of_the_same_name() -> None:
    assert configuration(
        quantization="fp8",
        weightsGib=9,
        kvCacheDtype="fp8",
        kvKibPerToken=64,
        maxNumBatchedTokens=4096,
        maxNumSeqs=64,
        speculativeConfig='{"method": "ngram", "num_speculative_tokens": 3}',
    ).engine_args() == [
        *("--quantization", "fp8", "--kv-cache-dtype", "fp8", "--max-num-batched-tokens", "4096"),
        *("--max-num-seqs", "64", "--speculative-config"),
        '{"method": "ngram", "num_speculative_tokens": 3}',
    ]


def test_what_is_left_out_is_left_to_the_engine() -> None:
    assert configuration(model="org/model-awq", weightsGib=5).engine_args() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "default"}, "name must not be default"),
        ({"name": "my-spot"}, "end in spot"),
        ({"name": "tp2-fast"}, "begin as tp2"),
        ({"name": "Fast"}, "pattern"),
        ({"name": "a" * 21}, "at most 20"),
        ({"quantization": "fp8"}, "weightsGib is required with model, revision or quantization"),
        ({"model": "org/model-awq"}, "weightsGib is required with model, revision or quantization"),
        ({"kvCacheDtype": "fp8"}, "kvKibPerToken is required with kvCacheDtype"),
        ({"revision": "gptq-4bit"}, "weightsGib is required with model, revision or quantization"),
        ({"maxNumSeqs": 512, "maxNumBatchedTokens": 256}, "maxNumSeqs must not exceed maxNumBatchedTokens, got 512"),
        ({"quantization": "fp8 --port 1", "weightsGib": 1}, "pattern"),
        ({"speculativeConfig": "{method: ngram}"}, "speculativeConfig must be JSON"),
        ({"model": "--port", "weightsGib": 1}, "pattern"),
    ],
)
def test_a_configuration_that_could_not_be_run_or_told_apart_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        configuration(**fields)


def test_a_measurement_of_an_unknown_configuration_is_refused() -> None:
    measured = {"gpuType": "l4", "configuration": "fp9", "points": [POINT]}
    with pytest.raises(ValidationError, match="got measurements of fp9; it has default, fp8"):
        profile(FP8, measurements=[measured])


def test_the_profile_as_configured_has_that_configuration_s_memory_bits_and_measurements_only() -> None:
    shape: dict[str, Any] = {
        "layers": 2,
        "hiddenSize": 64,
        "denseParametersBillion": 8,
        "attentionLayers": 2,
        "keyValueHeads": 8,
    }
    shape |= {"kvValuesPerToken": 64, "prefillAttentionWidth": 64, "decodeAttentionWidth": 64}
    cache: dict[str, Any] = {"kvCacheDtype": "fp8", "kvKibPerToken": 64, "weightBits": 8, "kvBits": 8}
    found = profile({**FP8, **cache}, architecture=shape).configured("fp8")
    spec = found.spec
    assert (spec.weights_gib, spec.kv_kib_per_token, spec.overhead_gib) == (8.5, 64, 2)
    assert [one.configuration for one in spec.measurements] == ["fp8"]
    assert spec.architecture is not None
    assert (spec.architecture.dense_bits, spec.architecture.kv_bits, spec.architecture.expert_bits) == (8, 8, 8)


def test_the_default_is_the_profile_without_the_others() -> None:
    found = profile(FP8).configured("default")
    assert (found.spec.weights_gib, found.spec.configurations) == (16, [])
    assert [one.configuration for one in found.spec.measurements] == ["default"]


def test_an_unknown_configuration_is_no_key() -> None:
    with pytest.raises(KeyError):
        profile(FP8).configured("awq")


@pytest.mark.parametrize(
    "argument",
    ["--quantization", "--quantization=awq", "--quant", "-q", "-q=awq", "--kv_cache_dtype", "--speculative_config.x"],
)
def test_a_service_that_sets_the_same_option_contradicts_it_however_it_is_written(argument: str) -> None:
    full = configuration(
        quantization="fp8",
        weightsGib=9,
        kvCacheDtype="fp8",
        kvKibPerToken=64,
        speculativeConfig='{"method": "ngram"}',
    )
    assert full.contradicted_by(["--seed", "1", argument, "x"]) == argument
    assert configuration().contradicted_by([argument]) is None


@settings(deadline=None)
@given(st.sampled_from(["--max-num-seqs", "--quantization"]), st.integers(3, 14), st.booleans())
def test_any_abbreviation_of_an_option_sets_it(option: str, length: int, underscores: bool) -> None:
    short = option[:length]
    written = "--" + short[2:].replace("-", "_") if underscores else short
    assert sets(written, option)
    assert not sets(written + "0", option)
    assert not sets(written.lstrip("-"), option)
