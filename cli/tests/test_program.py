"""The program itself: its help, its two names, its quick start, and how servers get their settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmfleet.cli.main import run
from llmfleet.gateway.settings import GatewaySettings
from llmfleet.operator.settings import OperatorSettings

COMMANDS = ("plan", "explain", "operator", "gateway", "requests", "drain", "migrate", "profile")
SCRIPTS = Path(sys.executable).parent


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: llmfleet {name} ")
    _, examples = text.split("Examples:\n")
    assert examples.lstrip().startswith(f"llmfleet {name} ")


def test_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    commands = capsys.readouterr().out.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in commands if line[:2] == "  " and line[2] != " "] == list(COMMANDS)


def test_without_a_command_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    asked = capsys.readouterr()
    assert run([]) == 0
    assert capsys.readouterr() == asked


@pytest.mark.parametrize(("part", "code"), [("operator", 1), ("gateway", 2)])
def test_a_server_without_a_cluster_ends_with_one_line(part: str, code: int) -> None:
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": "/nowhere/config"}
    ended = subprocess.run([SCRIPTS / "llmfleet", part], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == 1
    assert "/nowhere/config" in ended.stderr


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == "llmfleet 0.1.0\n"


def test_as_a_plugin_it_calls_itself_as_the_user_did() -> None:
    usage = subprocess.run([SCRIPTS / "kubectl-llmfleet", "plan", "--help"], capture_output=True, text=True, check=True)
    assert usage.stdout.startswith("Usage: kubectl llmfleet plan ")
    wrong = subprocess.run([SCRIPTS / "kubectl-llmfleet", "plan"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("kubectl llmfleet: error: ")


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    fleet = Path(__file__).with_name("fleet.yaml")
    command = f"{SCRIPTS / 'llmfleet'} plan -f {fleet} -o json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{", "")


def test_a_plan_needs_neither_kopf_nor_a_kubernetes_client() -> None:
    fleet = Path(__file__).with_name("fleet.yaml")
    program = (
        "import sys; from llmfleet.cli.main import run; "
        f"code = run(['plan', '-f', {str(fleet)!r}]); "
        "print(sorted({'kopf', 'lightkube', 'httpx', 'httpx2', 'uvloop'} & sys.modules.keys()), code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_naming_the_commands_loads_no_component() -> None:
    program = "import sys, llmfleet.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = [module for module in done.stdout.split() if module.startswith("llmfleet.")]
    assert loaded
    assert [module for module in loaded if not module.startswith("llmfleet.cli")] == []


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ([], 2, "the buckets"),
        (["--input-tokens", "512"], 2, "the buckets"),
        (["--input-tokens", "512,128", "--output-tokens", "128"], 2, "strictly ascending"),
        (["--input-tokens", "many", "--output-tokens", "128"], 2, "--input-tokens"),
        (["-f", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["--input-tokens", "512", "--output-tokens", "128", "--concurrency", "4,2"], 1, "ascending"),
        (["--input-tokens", "512", "--output-tokens", "128", "-o", "nowhere/profile.yaml"], 2, "no folder"),
        (["--input-tokens", "512", "--output-tokens", "128"], 1, "127.0.0.1:1"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_one_line(
    options: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["profile", "--url", "http://127.0.0.1:1", "--gpu-type", "l4", *options]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


@pytest.fixture
def operator_settings(monkeypatch: pytest.MonkeyPatch) -> list[OperatorSettings]:
    """What the operator would have been run with."""
    given: list[OperatorSettings] = []
    monkeypatch.setattr("llmfleet.operator.main.run", given.append)
    return given


def test_the_operator_s_defaults_are_those_of_its_settings(operator_settings: list[OperatorSettings]) -> None:
    assert run(["operator"]) == 0
    assert operator_settings == [OperatorSettings()]


def test_the_operator_is_told_by_options_and_by_environment(
    operator_settings: list[OperatorSettings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    monkeypatch.setenv("LLMFLEET_GATEWAY_URLS", "http://a:8081 http://b:8081")
    monkeypatch.setenv("LLMFLEET_LOG_LEVEL", "debug")
    options = ["--namespace", "fleet", "--listen", "127.0.0.1:0", "--gateway-token-file", str(token)]
    assert run(["operator", *options]) == 0
    settings = operator_settings[0]
    assert (settings.namespace, settings.listen_host, settings.listen_port) == ("fleet", "127.0.0.1", 0)
    assert settings.gateway_urls == ("http://a:8081", "http://b:8081")
    assert settings.gateway_token_file == token
    assert settings.log_level == "DEBUG"


@pytest.mark.parametrize(
    "option",
    [
        ["--listen", "8080"],
        ["--listen", "h:x"],
        ["--gateway-token-file", "nowhere"],
        ["--gateway-url", "gateway:8081"],
        ["--gateway-url", "http://:8081"],
        ["--gateway-url", "http://gateway:80810"],
    ],
)
def test_an_operator_option_that_cannot_work_is_wrong_usage(
    operator_settings: list[OperatorSettings], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["operator", *option]) == 2
    assert operator_settings == []
    assert option[0] in capsys.readouterr().err


@pytest.fixture
def gateway_settings(monkeypatch: pytest.MonkeyPatch) -> list[GatewaySettings]:
    """What the gateway would have been run with."""
    given: list[GatewaySettings] = []
    monkeypatch.setattr("llmfleet.gateway.main.run", given.append)
    return given


def test_the_gateway_s_defaults_are_those_of_its_settings(gateway_settings: list[GatewaySettings]) -> None:
    assert run(["gateway"]) == 0
    assert gateway_settings == [GatewaySettings()]


def test_the_gateway_is_told_its_engines(gateway_settings: list[GatewaySettings]) -> None:
    engines = ["--engine", "http://a:8000", "--engine", "http://b:8000"]
    assert run(["gateway", *engines, "--drain", "5", "--queue-wait", "90"]) == 0
    assert gateway_settings[0].engines == ("http://a:8000", "http://b:8000")
    assert gateway_settings[0].drain_s == 5
    assert gateway_settings[0].limits.queue_wait_s == 90


@pytest.mark.parametrize(
    "option", [["--listen", "x"], ["--drain", "-1"], ["--queue-wait", "0"], ["--routing-file", "nowhere"]]
)
def test_a_gateway_option_that_cannot_work_is_wrong_usage(
    gateway_settings: list[GatewaySettings], option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["gateway", *option]) == 2
    assert gateway_settings == []
    assert capsys.readouterr().err.count("\n") == 1
