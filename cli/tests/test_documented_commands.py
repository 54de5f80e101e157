"""What the documentation prints after a command is what the command prints.

An indented block that begins with `$ llmfleet` is run from the repository's root, and the lines below it are its
standard output. Times are measured anew, so they are not compared.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from llmfleet.cli.main import run

ROOT = Path(__file__).parents[2]
CHAPTER = ROOT / "docs/concepts/placement.md"


def shown() -> list[tuple[str, list[str]]]:
    """(command, the lines of its output) of every command that the chapter shows."""
    found: list[tuple[str, list[str]]] = []
    inside = False
    for line in CHAPTER.read_text().replace("\\\n", "").splitlines():
        if line.startswith("    $ llmfleet "):
            found.append((line.removeprefix("    $ llmfleet "), []))
            inside = True
        elif line and not line.startswith("    "):
            inside = False
        elif found and inside:
            found[-1][1].append(line.removeprefix("    "))
    return [(command, compared(output)) for command, output in found]


def compared(lines: list[str]) -> list[str]:
    return [re.sub(r"solved in [0-9.]+ s", "solved in ... s", line).rstrip() for line in lines if line.strip()]


SHOWN = shown()


def test_the_chapter_shows_commands() -> None:
    assert len(SHOWN) >= 4


@pytest.mark.parametrize(("command", "output"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_prints_what_the_chapter_shows(
    command: str, output: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(shlex.split(command)) == 0
    assert compared(capfd.readouterr().out.splitlines()) == output
