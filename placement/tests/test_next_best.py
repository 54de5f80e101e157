"""The next best set of variants: when it is looked for, and when what was found is still told."""

from __future__ import annotations

from typing import Any

import pytest

from llmfleet.api import Plan
from llmfleet.placement import PlanInputs, WarmState, next_best, plan
from llmfleet.placement.alternatives import cheapest_where
from llmfleet.placement.rounds import Reduced
from placement_testing.fleets import MIXED_RATES, MIXED_TYPES, fleet, service


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Services whose next best set was looked for, in order."""
    keys: list[str] = []

    def counted(condition: Any, item: Reduced, *arguments: Any, **options: Any) -> Any:
        keys.append(item.program.key)
        return cheapest_where(condition, item, *arguments, **options)

    monkeypatch.setattr(next_best, "cheapest_where", counted)
    return keys


def beside(neighbour_rps: float) -> PlanInputs:
    """`s` on two l4, an a100 being next best; its neighbour may use a100 only, of which there are three."""
    return fleet(
        [service("s"), service("neighbour", gpuTypes=["a100"])],
        [MIXED_RATES],
        MIXED_TYPES,
        inventory={"l4": 9, "a100": 3, "h100": 9},
        demand={"s": [8, 0], "neighbour": [neighbour_rps, 0]},
    )


def told(decided: Plan) -> dict[str, int] | None:
    planned = decided.service("team/s")
    assert planned is not None
    return None if planned.next_best is None else planned.next_best.replicas


def test_it_is_kept_while_it_fits_and_looked_for_when_a_neighbour_takes_its_device(searched: list[str]) -> None:
    decided, warm = plan(beside(5), None)
    decided, warm = plan(beside(5), decided, warm)
    assert told(decided) == {"a100": 1}
    searched.clear()
    decided, warm = plan(beside(15), decided, warm)
    assert (told(decided), searched) == ({"a100": 1}, [])
    decided, warm = plan(beside(25), decided, warm)
    assert told(decided) == {"h100": 1}
    assert searched == ["team/s"]


def test_one_that_may_have_become_cheaper_is_looked_for_again_some_plans_later(searched: list[str]) -> None:
    decided, warm = plan(beside(25), None)
    assert told(decided) == {"h100": 1}
    for _ in range(next_best._OLD + 3):
        decided, warm = plan(beside(5), decided, warm)
    assert told(decided) == {"a100": 1}
    searched.clear()
    plan(beside(5), decided, warm)
    assert searched == []


def test_no_plan_looks_for_more_than_it_may_and_the_next_ones_look_for_the_others(
    searched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_best, "_MOST_SEARCHED", 2)
    names = ["a", "b", "c"]
    inputs = fleet(
        [service(name) for name in names],
        [MIXED_RATES],
        MIXED_TYPES,
        inventory={"l4": 90, "a100": 90, "h100": 90},
        demand={name: [8.0 + i, 0] for i, name in enumerate(names)},
    )
    decided: Plan | None = None
    warm: WarmState | None = None
    seen = []
    for _ in range(3):
        decided, warm = plan(inputs, decided, warm)
        seen.append([s.service for s in decided.services if s.next_best is not None])
        assert len(searched) <= 2
        searched.clear()
    assert seen[0] == ["a", "b"]
    assert seen[-1] == names


def test_a_changed_fleet_is_not_searched_all_at_once(searched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_best, "_SEARCHED_ANEW", 1)
    names = ["a", "b", "c"]
    rates = {name: [8.0 + i, 0] for i, name in enumerate(names)}
    inventory = {"l4": 90, "a100": 90, "h100": 90}
    services = [service(name) for name in names]
    decided, warm = plan(fleet(services, [MIXED_RATES], MIXED_TYPES, inventory=inventory, demand=rates), None)
    assert searched == ["team/a", "team/b", "team/c"]
    searched.clear()
    more = {name: [2 * rps for rps in some] for name, some in rates.items()}
    changed = fleet(services, [MIXED_RATES], MIXED_TYPES, inventory=inventory, demand=more)
    for _ in range(4):
        decided, warm = plan(changed, decided, warm)
        assert len(searched) <= 1
        searched.clear()
    assert all(one.next_best is not None for one in decided.services)
