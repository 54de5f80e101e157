"""The launcher adds the plug-in's arguments where the vLLM beside it can have them, and becomes the engine anyway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmfleet.engine import launch

ECHO = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))", "serve", "--x"]
WORDS = ["--scheduler-cls", "a b"]


def installed(path: Path, version: str | None) -> dict[str, str]:
    """An environment in which Python finds our engine package and a vLLM of this version, or none."""
    if version is not None:
        metadata = path / f"vllm-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    folder = Path(launch.__file__).parents[2]
    return os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{folder}"}


def launched(environment: dict[str, str], key: Path, command: list[str] = ECHO) -> subprocess.CompletedProcess[str]:
    options = ["--peer-key-file", str(key), "--arguments", json.dumps(WORDS)]
    return subprocess.run(
        [sys.executable, "-m", "llmfleet.engine.launch", *options, "--", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def key_file(path: Path, content: str = "k" * 64) -> Path:
    path.write_text(content)
    return path


def test_a_vllm_that_the_plug_in_was_written_for_gets_its_arguments(tmp_path: Path) -> None:
    done = launched(installed(tmp_path, "0.32.1+cpu"), key_file(tmp_path / "key"))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ["serve", "--x", *WORDS]


@pytest.mark.parametrize(
    ("version", "key", "said"),
    [
        (None, "k" * 64, "has no vLLM"),
        ("0.31.2+cpu", "k" * 64, "vLLM is 0.31.2+cpu; the plug-in is for 0.32"),
        ("0.320.0+cpu", "k" * 64, "the plug-in is for 0.32"),
        ("0.32.0", "k" * 64, "not for CPUs"),
        ("0.32.0+cpu", "short", "has 5 bytes where at least 32 are accepted"),
        ("0.32.0+cpu", None, "No such file"),
    ],
)
def test_an_engine_that_cannot_have_it_starts_as_it_is_and_says_why(
    tmp_path: Path, version: str | None, key: str | None, said: str
) -> None:
    file = tmp_path / "key" if key is None else key_file(tmp_path / "key", key)
    done = launched(installed(tmp_path, version), file)
    assert json.loads(done.stdout) == ["serve", "--x"]
    assert said in done.stderr
    assert done.returncode == 0


def test_the_engine_takes_over_the_process_with_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]
    assert launched(installed(tmp_path, None), tmp_path / "none", command).returncode == -15
