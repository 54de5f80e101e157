"""A first plan is one that the planner itself goes on with: rounds begin again from their own result, and what is known
of a plan in force is not sought again."""

from __future__ import annotations

import pytest

from llmfleet.placement import plan, restarts, violations
from llmfleet.placement.fleet import FleetSolver, Outcome
from llmfleet.placement.margins import FIRST_SOLVES
from llmfleet.placement.rounds import Solved, routed_at
from llmfleet.placement.service_program import Replicas, ServiceProgram
from placement_testing.fleets import MIXED_RATES, MIXED_TYPES, fleet, service
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


def test_what_a_plan_in_force_was_preferred_to_is_not_sought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan in force may stay though rounds found others: the next rounds begin where these ended, and end at once."""
    solves, stayed = [], []
    solve, in_force = FleetSolver.solve, restarts._Turns.in_force

    def counted(self: FleetSolver, programs: list[ServiceProgram]) -> Outcome:
        solves.append(len(programs))
        return solve(self, programs)

    def compared(self: restarts._Turns, best: Solved) -> Solved:
        found = in_force(self, best)
        stayed.append(found is not best)
        return found

    monkeypatch.setattr(FleetSolver, "solve", counted)
    monkeypatch.setattr(restarts._Turns, "in_force", compared)
    inputs = scarce_fleet(2, 7)
    decided, warm = plan(inputs, None)
    for _ in range(FIRST_SOLVES):
        decided, warm = plan(inputs, decided, warm)
    solves.clear()
    again, _ = plan(inputs, decided, warm)
    assert stayed[-1]
    assert len(solves) == 1
    assert again.plan_id == decided.plan_id


def test_of_two_services_one_goes_back_to_its_plan_in_force_and_the_other_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the plan in force serves more it stays, whatever it costs, but only of that service."""
    seen: list[tuple[restarts._Turns, Solved]] = []
    in_force = restarts._Turns.in_force

    def noted(self: restarts._Turns, best: Solved) -> Solved:
        seen.append((self, best))
        return in_force(self, best)

    monkeypatch.setattr(restarts._Turns, "in_force", noted)
    inventory = {"l4": 9, "a100": 9, "h100": 9}
    rates = {"a": [20.0, 0], "b": [20.0, 0]}
    plan(fleet([service("a"), service("b")], [MIXED_RATES], MIXED_TYPES, inventory=inventory, demand=rates), None)
    turns, best = seen[-1]
    first, second = best.services
    fewer = routed_at(first.item, one_changed(first.replicas, -1), best.solver, None)
    more = routed_at(second.item, one_changed(second.replicas, +1), best.solver, None)
    assert fewer.unserved.sum() > 0
    before = {first.item.program.key: first, second.item.program.key: more}
    monkeypatch.setattr(restarts._Turns, "_kept", lambda self, one, solver: before[one.item.program.key])
    found = in_force(turns, turns._with(best, [fewer, second], best.outcome.bound))
    assert [one.replicas for one in found.services] == [first.replicas, second.replicas]


def one_changed(replicas: Replicas, by: int) -> Replicas:
    """With more or fewer replicas of the variant that has most."""
    most = replicas.index(max(replicas))
    return (*replicas[:most], replicas[most] + by, *replicas[most + 1 :])
