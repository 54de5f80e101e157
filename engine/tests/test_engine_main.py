"""`python -m llmfleet.engine args` prints what a shell passes on to `vllm serve` as it is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from llmfleet.engine.__main__ import main
from llmfleet.migration.engine_arguments import read_settings


def key_file(path: Path) -> Path:
    path.write_text("k" * 64)
    path.chmod(0o600)
    return path


def test_a_shell_gives_vllm_the_settings_as_they_are_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = key_file(tmp_path / "key")
    assert main(["args", "--listen", "0.0.0.0:7000", "--peer-key-file", str(key), "--platform", "cpu"]) == 0
    printed = capsys.readouterr().out
    shell = ["sh", "-c", 'for word in $(cat); do echo "$word"; done']
    words = subprocess.run(shell, input=printed, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = read_settings(json.loads(words[words.index("--additional-config") + 1]))
    assert (settings.listen, settings.peer_key_file) == ("0.0.0.0:7000", str(key))


@pytest.mark.parametrize(
    ("listen", "name", "message"),
    [
        ("7000", "key", "accepted is host:port"),
        ("0.0.0.0:7000", "none", "No such file"),
        ("0.0.0.0:7000", "a key", "white space in an argument"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listen: str, name: str, message: str
) -> None:
    path = tmp_path / name
    if name != "none":
        key_file(path)
    assert main(["args", "--listen", listen, "--peer-key-file", str(path), "--platform", "cpu"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
