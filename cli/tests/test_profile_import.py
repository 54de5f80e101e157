"""`llmfleet profile import`: other tools' results and a model's config.json into a ModelProfile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmfleet.api import ModelProfile
from llmfleet.cli.main import run

PROFILE = """\
# Buckets of the chat service.
apiVersion: llmfleet.io/v1alpha1
kind: ModelProfile
metadata: {name: model, namespace: team}
spec:
  model: org/model
  weightsGib: 10
  kvKibPerToken: 64
  buckets: {inputTokens: [512, 2048], outputTokens: [128]}
"""
CONFIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def result(folder: Path, input_tokens: int, rps: float) -> str:
    path = folder / f"in{input_tokens}.json"
    latency = {f"{level}_{metric}_ms": 50.0 for level in ("median", "p99") for metric in ("ttft", "tpot")}
    sizes = {"total_input_tokens": 100 * input_tokens, "total_output_tokens": 100 * 128}
    path.write_text(json.dumps(latency | sizes | {"completed": 100, "max_concurrency": 8, "request_throughput": rps}))
    return str(path)


@pytest.fixture
def profile(tmp_path: Path) -> str:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    return str(path)


def test_results_become_the_measurement_of_a_profile(
    tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [result(tmp_path, 512, 9.0), result(tmp_path, 2100, 3.0)]
    assert run(["profile", "import", *files, "--gpu-type", "l4", "-f", profile, "-o", profile]) == 0
    text = Path(profile).read_text()
    assert text.startswith("# Buckets of the chat service.\n")
    (measured,) = ModelProfile.parse(yaml.safe_load(text), strict=True).spec.measurements
    assert [(p.input_tokens, p.concurrency, p.requests_per_second) for p in measured.points] == [
        (512, 8, 9.0),
        (2048, 8, 3.0),
    ]
    assert (measured.gpu_type, measured.engine) == ("l4", "vllm")
    said = capsys.readouterr()
    assert "not in the file; the next higher percentile" in said.err
    assert said.out == ""


def test_a_config_becomes_the_architecture(tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    assert run(["profile", "import", "--config", str(config), "--weight-bits", "8", "-f", profile]) == 0
    found = ModelProfile.parse(yaml.safe_load(capsys.readouterr().out), strict=True).spec.architecture
    assert found is not None
    assert (found.layers, found.dense_bits, found.key_value_heads) == (32, 8, 8)
    assert run(["profile", "import", "--config", str(config)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["layers"] == 32


def test_without_a_profile_the_measurement_alone_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["profile", "import", result(tmp_path, 700, 2.0), "--gpu-type", "l4", "--tensor-parallel", "2"]) == 0
    (measured,) = yaml.safe_load(capsys.readouterr().out)
    assert (measured["tensorParallel"], measured["points"][0]["inputTokens"]) == (2, 700)


@pytest.mark.parametrize(
    ("files", "options", "code", "message"),
    [
        ([512], [], 1, "spec.buckets has corners that were not measured: input 2048 output 128"),
        ([300], [], 1, "no run fits a bucket"),
        ([], [], 2, "give result files, or --config"),
        ([512], ["--ttft-ms", "100"], 1, "accepted are both times above 0"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    files: list[int],
    options: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    profile: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [result(tmp_path, size, 1.0) for size in files]
    assert run(["profile", "import", *paths, "--gpu-type", "l4", "-f", profile, *options]) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert Path(profile).read_text() == PROFILE


def test_a_config_that_is_not_understood_names_file_and_field(
    tmp_path: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": -1}))
    assert run(["profile", "import", "--config", str(config), "-f", profile]) == 1
    assert f"{config}: num_hidden_layers: got -1; accepted is a whole number" in capsys.readouterr().err
