"""`llmfleet plan --what-if` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmfleet.cli.main import run

FLEET = Path(__file__).with_name("fleet.yaml")
BASE = ("plan", "-f", str(FLEET), "--inventory", "slow=4,fast=4")


def what_if(capfd: pytest.CaptureFixture[str], *arguments: str, base: tuple[str, ...] = BASE) -> tuple[int, str, str]:
    code = run([*base, *arguments])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_the_table_shows_each_service_that_changes_before_and_after(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = what_if(capfd, "--what-if", "price:fast=1.5")
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if line.startswith("team/chat"))
    assert "2 slow -> 1 fast" in row
    assert "2.00 -> 1.50" in row
    assert "-0.50" in row
    assert row.split()[-1] == "0"
    total = next(line for line in out.splitlines() if line.startswith("TOTAL"))
    assert total.split()[1:5] == ["2.00", "->", "1.50", "-0.50"]
    assert "with price:fast=1.5" in out


def test_all_edits_count_together(capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = what_if(capfd, "--what-if", "inventory:slow=1", "--what-if", "limit:fast=0")
    assert "2 slow -> 1 slow" in out
    assert "0 -> 1.2" in out


def test_what_does_not_change_is_said_to_stay(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = what_if(capfd, "--what-if", "inventory:slow=+2")
    assert code == 0
    assert "team/chat" not in out
    assert "1 of 1 services stay as they are" in out


def test_json_and_yaml_are_the_same_difference_with_every_service(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("--what-if", "rate:chat=x4")
    found = json.loads(what_if(capfd, *arguments, "-o", "json")[1])
    assert found == yaml.safe_load(what_if(capfd, *arguments, "-o", "yaml")[1])
    assert found["edits"] == ["rate:chat=x4"]
    (chat,) = found["services"]
    assert (chat["before"]["demandRps"], chat["after"]["demandRps"]) == (3, 12)
    assert chat["after"]["costPerHour"] == found["after"]["costPerHour"] > found["before"]["costPerHour"]


def test_an_edit_under_which_a_service_is_refused_is_shown_and_ends_with_code_1(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code, out, err = what_if(capfd, "--what-if", "objective:chat.tpot=1ms")
    assert code == 1
    assert "team/chat: would be REFUSED: ObjectiveUnreachable" in out
    assert "1 of 1 services refused" in err


def test_an_edit_that_cannot_be_made_is_one_line_and_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = what_if(capfd, "--what-if", "price:gold=1")
    assert (code, out) == (1, "")
    assert err == "llmfleet: error: --what-if price:gold=1: there is no GPUType 'gold'; there are fast, slow\n"
