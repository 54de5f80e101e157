"""A first plan is one that the planner itself goes on with: rounds begin again from their own result, and what is known
of a plan in force is not sought again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmfleet.placement import plan, restarts, violations
from llmfleet.placement.margins import FIRST_SOLVES, Margins
from llmfleet.placement.rounds import Beginning, Routed, Solved, routed_at
from llmfleet.placement.service_program import Replicas
from placement_testing.fleets import MIXED_RATES, MIXED_TYPES, fleet, service
from placement_testing.large_fleets import scarce_fleet


def test_asked_again_with_its_own_plan_in_force_the_planner_finds_nothing_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restarts, "with_fewer_variants", lambda solved, *_: solved)  # it finds the same in one turn
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


def test_the_next_solve_begins_where_rounds_ended_though_a_plan_in_force_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would find the same again, round by round. Only one that serves more is first looked at itself."""
    turns, best = two_services(monkeypatch)
    found, _ = best.services
    own = replace(found.item.margins, utilization=0.5)
    stays = replace(found, item=replace(found.item, margins=own))
    short = routed_at(found.item, one_changed(found.replicas, -1), best.solver, None)
    prepared = found.item.prepared

    def begins(found: Routed, solves: int) -> Margins:
        start = Beginning([], {prepared.key: prepared}, {prepared.key: solves}, set())
        learnt = restarts._learnt(stays, found, start, turns.policy.utilization_target)
        assert sum(learnt.replicas.values()) == sum(stays.replicas)
        return learnt.margins

    assert begins(found, 1) is found.item.margins
    assert begins(short, 1) is own
    assert begins(short, FIRST_SOLVES) is short.item.margins


def test_of_two_services_one_goes_back_to_its_plan_in_force_and_the_other_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the plan in force serves more it stays, whatever it costs, but only of that service."""
    in_force = restarts._Turns.in_force
    turns, best = two_services(monkeypatch)
    first, second = best.services
    fewer = routed_at(first.item, one_changed(first.replicas, -1), best.solver, None)
    more = routed_at(second.item, one_changed(second.replicas, +1), best.solver, None)
    assert fewer.unserved.sum() > 0
    before = {first.item.program.key: first, second.item.program.key: more}
    monkeypatch.setattr(restarts._Turns, "_kept", lambda self, one, solver: before[one.item.program.key])
    found = in_force(turns, turns._with(best, [fewer, second], best.outcome.bound))
    assert [one.replicas for one in found.services] == [first.replicas, second.replicas]


def two_services(monkeypatch: pytest.MonkeyPatch) -> tuple[restarts._Turns, Solved]:
    """Two services as rounds solve them, and the turns of that solve."""
    seen: list[tuple[restarts._Turns, Solved]] = []
    in_force = restarts._Turns.in_force

    def noted(self: restarts._Turns, best: Solved) -> Solved:
        seen.append((self, best))
        return in_force(self, best)

    with monkeypatch.context() as patched:
        patched.setattr(restarts._Turns, "in_force", noted)
        inventory = {"l4": 9, "a100": 9, "h100": 9}
        rates = {"a": [20.0, 0], "b": [20.0, 0]}
        plan(fleet([service("a"), service("b")], [MIXED_RATES], MIXED_TYPES, inventory=inventory, demand=rates), None)
    return seen[-1]


def one_changed(replicas: Replicas, by: int) -> Replicas:
    """With more or fewer replicas of the variant that has most."""
    most = replicas.index(max(replicas))
    return (*replicas[:most], replicas[most] + by, *replicas[most + 1 :])
