"""Which measured rows predictions are judged by."""

from __future__ import annotations

import pytest

from e2e.bench.placement_silicon_rows import Row, concurrency, counted

_TRTLLM = "nvcr.io#nvidia/tensorrt-llm/release:"


def row(**changed: str) -> Row:
    return {
        "silicon_data_source": f"source_file=a.csv; silicon_concurrency=8; measured=2026-02-06; image={_TRTLLM}1.2.0",
        "backend": "trtllm",
        "model_path": "deepseek-ai/DeepSeek-R1",
        "system": "b200_sxm",
        "precision": "fp8",
        "mode": "agg",
        "isl": "1024",
        "osl": "1024",
        "batch_size": "8",
        "tp_size": "8",
        "attention_dp_size": "1",
        "silicon_ttft_ms": "200.0",
        "silicon_tpot_ms": "10.0",
    } | changed


def source(image: str, measured: str = "2026-02-06", load: int = 8, also: str = "") -> str:
    return f"source_file=a.csv;{also} silicon_concurrency={load}; measured={measured}T00:00:00Z; image={image}"


@pytest.mark.parametrize(
    "changed",
    [
        {"mode": "disagg"},
        {"system": "gb200"},
        {"attention_dp_size": "8"},
        {"tp_size": "16"},
        {"batch_size": "2"},
        {
            "model_path": "openai/gpt-oss-120b",
            "system": "h100_sxm",
            "batch_size": "512",
            "silicon_data_source": source("vllm", load=512),
        },
    ],
)
def test_what_no_replica_of_ours_ran_does_not_count(changed: dict[str, str]) -> None:
    assert counted([row(), row(**changed)]) == [row()]


@pytest.mark.parametrize(
    ("image", "measured", "changed", "counts"),
    [
        (_TRTLLM + "1.2.0rc6.post3", "2026-02-06", {}, False),
        (_TRTLLM + "1.2.0rc6.post2", "2026-02-06", {}, True),
        (_TRTLLM + "1.1.0rc2.post2", "2026-01-14", {}, False),
        (_TRTLLM + "1.1.0rc2.post2", "2025-12-15", {}, True),
        ("lmsysorg/sglang:v0.5.9-cu130", "2026-03-25", {}, False),
        ("lmsysorg/sglang:v0.5.9-cu130", "2026-03-25", {"precision": "fp4"}, True),
        ("lmsysorg/sglang:v0.5.9-cu130", "2026-03-25", {"system": "h200_sxm"}, True),
        ("lmsysorg/sglang:v0.5.9-cu130", "2026-03-20", {"model_path": "Qwen/Qwen3.5-397B-A17B"}, False),
        ("lmsysorg/sglang:v0.5.9-cu130-amd64", "2026-03-24", {"model_path": "Qwen/Qwen3.5-397B-A17B"}, True),
    ],
)
def test_runs_that_may_have_been_speculative_do_not_count(
    image: str, measured: str, changed: dict[str, str], counts: bool
) -> None:
    run = row(silicon_data_source=source(image, measured), **changed)
    assert counted([run]) == ([run] if counts else [])


def test_a_row_that_the_database_dump_has_as_well_was_not_speculative() -> None:
    image = "lmsysorg/sglang:v0.5.9-cu130"
    run = row(silicon_data_source=source(image))
    dumped = row(silicon_data_source=source(image, also=" config_id=87;"), model_path="deepseek-ai/DeepSeek-V3")
    assert counted([run, dumped]) == [run]


def test_a_measurement_counts_once_and_takes_its_repetitions_with_it() -> None:
    again = row(model_path="deepseek-ai/DeepSeek-V3", silicon_tpot_ms="10.01", silicon_data_source="gap.csv")
    slower = row(silicon_tpot_ms="10.1")
    other_model = row(model_path="zai-org/GLM-5")
    assert counted([row(), again, slower, other_model]) == [row(), slower, other_model]
    speculative = row(silicon_data_source=source(_TRTLLM + "1.2.0rc6.post3"))
    assert counted([again, speculative, slower]) == [slower]


def test_the_load_is_what_the_source_says_else_the_batch() -> None:
    assert concurrency(row()) == 8
    assert concurrency(row(silicon_data_source="file.csv", batch_size="3")) == 3
