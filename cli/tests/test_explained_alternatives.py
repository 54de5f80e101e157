"""What `llmfleet explain` sells as an alternative keeps the objective as the plan does: so it is not a bargain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmfleet.api import Plan
from llmfleet.cli.main import run
from llmfleet.placement import other_ways

ROOT = Path(__file__).parents[2]
FOUND_LATER = 0.02
"""Share of the cost by which rounds of another mix may end below the plan's."""


@pytest.mark.parametrize("rps", [4, 10, 12])
def test_no_set_of_variants_is_far_cheaper_than_the_plan(rps: int, capfd: pytest.CaptureFixture[str]) -> None:
    trace = f"mix/chat={ROOT}/simulator/traces/azure_conv_2023.csv,rps={rps}"
    assert run(["explain", "chat", "-n", "mix", "-f", f"{ROOT}/examples/mix", "--trace", trace, "-o", "json"]) == 0
    said = json.loads(capfd.readouterr().out)
    least = said["costPerHour"] * (1 - FOUND_LATER)
    without = [variant["costPerHourWithout"] for variant in said["chosen"] if "costPerHourWithout" in variant]
    other = [variant["costPerHourWith"] for variant in said["rejected"] if "costPerHourWith" in variant]
    assert without
    assert other
    assert min(*without, *other) >= least
    assert "nextBest" not in said or said["nextBest"]["costPerHour"] >= least


def planned(capfd: pytest.CaptureFixture[str], form: str) -> str:
    fleet = ["-f", f"{ROOT}/examples/mix", "--inventory", "l4=8,a10g=8,a100-80gb=3,h100-80gb=2"]
    trace = f"mix/chat={ROOT}/simulator/traces/azure_conv_2023.csv,rps=12"
    assert run(["plan", *fleet, "--trace", trace, "-o", form]) == 0
    return capfd.readouterr().out


def test_a_plan_as_json_says_the_alternatives_cheapest_first_and_why_they_were_not_chosen(
    capfd: pytest.CaptureFixture[str],
) -> None:
    decided = Plan.model_validate_json(planned(capfd, "json"), extra="forbid")
    (chat,) = decided.services
    assert chat.next_best is not None
    costs = [other.cost_per_hour for other in chat.alternatives]
    assert costs == sorted(costs)
    (next_best,) = [other for other in chat.alternatives if other.kind == "nextBest"]
    assert (next_best.replicas, next_best.cost_per_hour) == (chat.next_best.replicas, chat.next_best.cost_per_hour)
    assert next_best.reason.startswith(f"costs {next_best.cost_per_hour - chat.cost_per_hour:.3g} per hour more (+")
    singles = [other for other in chat.alternatives if other.kind == "singleType"]
    assert singles
    for other in singles:
        assert len({name.removesuffix("-tp2") for name in other.replicas}) == 1
        assert other.replicas != chat.replicas
        assert (f"takes {other.devices_missing} devices of GPUType" in other.reason) == (other.devices_missing > 0)
    assert any(other.devices_missing for other in singles)


def test_a_table_takes_no_time_for_alternatives(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_ways, "single_types", lambda *_, **__: pytest.fail("a single type is solved"))
    assert "mix/chat" in planned(capfd, "table")
