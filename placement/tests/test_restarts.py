"""A first plan is one that the planner itself goes on with: rounds begin again from their own result."""

from __future__ import annotations

import pytest

from llmfleet.placement import plan, restarts, violations
from placement_testing.large_fleets import scarce_fleet


def test_asked_again_with_its_own_plan_in_force_the_planner_finds_nothing_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = scarce_fleet(3, 0)
    first, _ = plan(inputs, None)
    second, _ = plan(inputs, first)
    assert violations(inputs, second) == []
    assert [one.replicas for one in second.services] == [one.replicas for one in first.services]
    assert first.bound is not None
    assert first.bound <= first.cost_per_hour * (1 + 1e-9)
    assert first.gap_cost is not None
    assert first.gap_cost <= inputs.policy.optimality_gap

    monkeypatch.setattr(restarts, "_MANY", ())
    in_one_turn, _ = plan(inputs, None)
    assert first.cost_per_hour < 0.95 * in_one_turn.cost_per_hour
    assert sum(one.unserved_rps for one in first.services) <= sum(one.unserved_rps for one in in_one_turn.services)


def test_a_plan_in_force_that_holds_gives_way_to_no_dearer_one() -> None:
    """Lines that have changed since it was made are no reason: the model says that its pools keep the objective."""
    inputs = scarce_fleet(1, 0)
    decided, _ = plan(inputs, None)
    for _ in range(2):
        following, _ = plan(inputs, decided)
        assert following.cost_per_hour <= decided.cost_per_hour + 1e-9
        assert following.services[0].unserved_rps <= decided.services[0].unserved_rps + 1e-9
        decided = following
