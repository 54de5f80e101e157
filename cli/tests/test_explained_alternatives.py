"""What `llmfleet explain` sells as an alternative keeps the objective as the plan does: so it is not a bargain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmfleet.cli.main import run

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
