"""Measuring and importing another precision or layout: filed under its own variant, or refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from llmfleet.api import Buckets, Configuration, ModelProfile
from llmfleet.cli.main import run
from llmfleet.cli.profiling import ProfileSettings, profile_engine
from llmfleet.cli.profiling.configured import require_configuration
from llmfleet.cli.profiling.engine import MeasuredEngine, ServedModel
from llmfleet.cli.refused import RefusedError

PROFILE = """\
apiVersion: llmfleet.io/v1alpha1
kind: ModelProfile
metadata: {name: model, namespace: team}
spec:
  model: org/model
  weightsGib: 16
  kvKibPerToken: 128
  buckets: {inputTokens: [512], outputTokens: [128]}
  configurations:
  - name: fp8
    model: org/model-fp8
    revision: v2
    kvCacheDtype: fp8
    kvKibPerToken: 64
    maxNumSeqs: 64
    weightsGib: 8.5
"""
FP8 = Configuration(name="fp8", model="org/model-fp8", kv_cache_dtype="fp8", kv_kib_per_token=64, weights_gib=8.5)
METRICS = 'vllm:cache_config_info{block_size="16",cache_dtype="%s",mamba_cache_dtype="auto",x="{}"} 1.0\n'


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    return str(path)


def result(folder: Path, name: str = "run.json", **facts: object) -> str:
    """A run of `vllm bench serve`, with what `--metadata` puts beside its figures."""
    path = folder / name
    latency = {f"{level}_{metric}_ms": 50.0 for level in ("median", "p99") for metric in ("ttft", "tpot")}
    sizes = {"total_input_tokens": 100 * 512, "total_output_tokens": 100 * 128, "completed": 100}
    path.write_text(json.dumps({**latency, **sizes, "max_concurrency": 8, "request_throughput": 5.0, **facts}))
    return str(path)


def measured(path: str) -> dict[tuple[str, int, int, str], float]:
    spec = ModelProfile.parse(yaml.safe_load(Path(path).read_text()), strict=True).spec
    return {
        (one.gpu_type, one.tensor_parallel, one.pipeline_parallel, one.configuration): one.points[0].requests_per_second
        for one in spec.measurements
    }


@asynccontextmanager
async def engine(answers: Mapping[str, str]) -> AsyncIterator[str]:
    """A server on loopback that answers each path with its text, others with 404; yields its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        status = "200 OK" if path in answers else "404 Not Found"
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{answers.get(path, '')}".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def test_every_variant_of_a_type_keeps_its_own_measurement(tmp_path: Path, profile: str) -> None:
    into = ["--gpu-type", "l4", "-f", profile, "-o", profile]
    for options in ([], ["--configuration", "fp8"], ["--pipeline-parallel", "2"], ["--tensor-parallel", "2"]):
        assert run(["profile", "import", result(tmp_path), *options, *into]) == 0
    assert run(["profile", "import", result(tmp_path, request_throughput=9.0), "--configuration", "fp8", *into]) == 0
    assert measured(profile) == {
        ("l4", 1, 1, "default"): 5.0,
        ("l4", 1, 1, "fp8"): 9.0,
        ("l4", 1, 2, "default"): 5.0,
        ("l4", 2, 1, "default"): 5.0,
    }


def test_a_configuration_that_the_profile_does_not_describe_is_refused_with_those_that_it_does(
    tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    into = ["--gpu-type", "l4", "--configuration", "awq", "-f", profile]
    assert run(["profile", "import", result(tmp_path), *into]) == 1
    assert "spec.configurations has no 'awq'; accepted are default, fp8" in capsys.readouterr().err
    assert run(["profile", "--url", "http://127.0.0.1:9", *into]) == 1
    assert "spec.configurations has no 'awq'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"tp": 2}, "the files say tensor_parallel 2, but the variant has 1"),
        ({"pipeline-parallel-size": "4"}, "the files say pipeline_parallel 4, but the variant has 1"),
        ({"kv_cache_dtype": "auto"}, "the files say kv_cache_dtype auto, but the variant has fp8"),
        ({"max-num-seqs": 256}, "the files say max_num_seqs 256, but the variant has 64"),
    ],
)
def test_results_that_say_another_variant_are_refused(
    tmp_path: Path, profile: str, facts: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = result(tmp_path, "run.json", **facts)
    assert run(["profile", "import", file, "--gpu-type", "l4", "--configuration", "fp8", "-f", profile]) == 1
    assert message in capsys.readouterr().err


def test_results_that_say_more_than_the_variant_are_taken_and_said(
    tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = result(tmp_path, tp="1", quantization="fp8", model_id="org/other", max_num_seqs=64)
    assert run(["profile", "import", file, "--gpu-type", "l4", "--configuration", "fp8", "-f", profile]) == 0
    said = capsys.readouterr().err
    assert "the files say quantization fp8, which configuration fp8 leaves open" in said
    assert "the files name the model org/other" in said
    assert "org/model-fp8" in said
    assert "max_num_seqs" not in said


def test_results_of_unlike_engines_are_not_mixed(
    tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [result(tmp_path, "a.json", quantization="fp8"), result(tmp_path, "b.json", quantization="awq")]
    assert run(["profile", "import", *files, "--gpu-type", "l4", "-f", profile]) == 1
    assert "the files say quantization fp8 and awq; accepted are results of one engine" in capsys.readouterr().err


def test_the_command_that_an_engine_is_to_be_started_with_is_printed(
    profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["profile", "--configuration", "fp8", "--tensor-parallel", "2", "-f", profile]) == 0
    assert capsys.readouterr().out == (
        "vllm serve org/model-fp8 --revision v2 --max-model-len 640 --tensor-parallel-size 2 --kv-cache-dtype fp8 "
        "--max-num-seqs 64\n"
    )
    assert run(["profile", "--pipeline-parallel", "2", "-f", profile]) == 0
    assert capsys.readouterr().out == "vllm serve org/model --max-model-len 640 --pipeline-parallel-size 2\n"


def test_a_configuration_without_the_profile_that_describes_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--input-tokens", "512", "--output-tokens", "128"]
    assert run(["profile", "--url", "http://127.0.0.1:9", "--gpu-type", "l4", "--configuration", "fp8", *sizes]) == 2
    assert "--configuration" in capsys.readouterr().err


async def test_an_engine_tells_the_type_of_its_cache() -> None:
    async with engine({"/metrics": METRICS % "fp8"}) as url, MeasuredEngine(url, None) as asked:
        assert await asked.cache_dtype() == "fp8"
    async with engine({}) as url, MeasuredEngine(url, None) as asked:
        assert await asked.cache_dtype() is None


async def test_an_engine_of_another_precision_is_refused_before_anything_is_measured() -> None:
    models = json.dumps({"data": [{"id": "model", "root": "org/model-fp8", "max_model_len": 4096}]})
    async with engine({"/v1/models": models, "/metrics": METRICS % "auto"}) as url:
        buckets = Buckets(input_tokens=[512], output_tokens=[128])
        settings = ProfileSettings(url, "l4", buckets, configuration=FP8)
        with pytest.raises(RefusedError, match="cache is of type auto; accepted for configuration fp8 is --kv-cache"):
            await profile_engine(settings, progress=lambda line: None)


@pytest.mark.parametrize("weights", ["org/model-fp8", "/models/model-fp8/", None])
def test_an_engine_that_says_nothing_else_is_believed(weights: str | None) -> None:
    require_configuration(FP8, ServedModel("model", None, weights), None)
    require_configuration(FP8, ServedModel("model", None, weights), "fp8")


def test_an_engine_of_other_weights_is_refused() -> None:
    with pytest.raises(RefusedError, match="serves the weights org/model; accepted for configuration fp8 are those of"):
        require_configuration(FP8, ServedModel("model", None, "org/model"), "fp8")
