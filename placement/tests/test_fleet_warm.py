"""Solving again after a change: the proof stays a proof, and what did not change is not solved again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import Limits, Loss, Pricer, Problem, Service, Solver, master
from placement_testing.instances import fleet, in_force
from placement_testing.judge import best_rank, rank, small_problems


def no_hurry() -> Deadline:
    return Deadline(lambda: 0.0, 300.0)


def with_rates(problem: Problem, number: int, factor: float) -> Problem:
    services = list(problem.services)
    services[number] = replace(services[number], rates=services[number].rates * factor)
    return replace(problem, services=tuple(services))


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_problems(losses=2), st.lists(st.sampled_from([0.4, 0.9, 1.5, 3.0]), min_size=1, max_size=3))
def test_after_changes_the_plan_is_as_good_as_enumeration_and_the_bound_holds(
    problem: Problem, factors: list[float]
) -> None:
    solver = Solver(Limits(gap=0.0))
    solver.solve(problem, no_hurry())
    for number, factor in enumerate(factors):
        problem = with_rates(problem, number % len(problem.services), factor)
        found, best = solver.solve(problem, no_hurry()), best_rank(problem, 9)
        assert problem.fits(found.replicas)
        np.testing.assert_allclose(rank(problem, found.replicas), best, atol=3e-5)
        assert found.bound is not None
        assert found.bound <= best[-1] + 1e-6


@settings(
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_problems(losses=2), st.lists(st.sampled_from([None, 0.4, 1.0]), min_size=2, max_size=4))
def test_a_service_that_has_to_survive_other_losses_is_put_into_the_solved_fleet_as_it_is_from_nothing(
    problem: Problem, keeps: list[float | None]
) -> None:
    solver = Solver(Limits(gap=0.0))
    solver.solve(problem, no_hurry())
    for keep in keeps:
        problem = with_loss(problem, keep)
        found, best = solver.solve(problem, no_hurry()), best_rank(problem, 9)
        assert problem.fits(found.replicas)
        np.testing.assert_allclose(rank(problem, found.replicas), best, atol=3e-5)
        assert found.bound is not None
        assert found.bound <= best[-1] + 1e-6


def with_loss(problem: Problem, keep: float | None) -> Problem:
    """The first service with its first variant's loss to survive, or none."""
    first, *others = problem.services
    losses = () if keep is None else (Loss(np.arange(first.variants) == 0, keep),)
    return replace(problem, services=(replace(first, losses=losses), *others))


def test_few_services_are_closed_to_the_optimum_after_a_change_as_they_are_from_nothing() -> None:
    first = Service(
        key="s0",
        priority=100,
        rates=np.array([4.7, 1.1, 2.0]),
        throughput=np.array([[3.0, 2.0], [1.0, 3.0], [0.5, 2.0]]),
        cost=np.array([1.0, 1.0]),
        use=np.array([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]),
        minimum=1,
        previous=(0, 2),
        switching=np.array([0.02, 0.02]),
        reserve=np.array([0.4, 0.0]),
    )
    second = Service(
        key="s1",
        priority=100,
        rates=np.array([4.7, 4.7]),
        throughput=np.full((2, 3), 2.0),
        cost=np.array([2.5, 1.0, 1.5]),
        use=np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [2.5, 1.0, 1.5]]),
        minimum=1,
        maximum=3,
        previous=(0, 2, 2),
        switching=np.array([0.05, 0.02, 0.03]),
        reserve=np.array([0.0, 0.0, 0.4]),
    )
    problem = Problem((first, second), ("small", "big", "budget"), np.array([3.0, 2.0, 9.5]))
    solver = Solver(Limits(gap=0.0))
    solver.solve(problem, no_hurry())
    for number in (0, 1, 0):
        problem = with_rates(problem, number, 0.4)
        found = solver.solve(problem, no_hurry())
    assert found.objective == pytest.approx(best_rank(problem, 9)[-1])


def test_only_the_changed_service_is_priced_and_the_proof_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = fleet(12, 7, inventory=0.9)
    solver = Solver(Limits(gap=0.005))
    first = solver.solve(problem, no_hurry())
    assert not first.levels
    priced: list[str] = []
    price = Pricer.price

    def counted(self: Pricer, *arguments: Any, **options: Any) -> float:
        priced.append(self.service.key)
        return price(self, *arguments, **options)

    monkeypatch.setattr(Pricer, "price", counted)
    changed = with_rates(problem, 3, 0.8)
    again = solver.solve(changed, no_hurry())
    assert set(priced) == {problem.services[3].key}
    assert again.gap_cost is not None
    assert again.gap_cost <= 0.01
    assert changed.fits(again.replicas)
    priced.clear()
    assert solver.solve(changed, no_hurry()).replicas == again.replicas
    assert not priced


def test_other_limits_are_solved_anew() -> None:
    problem = fleet(6, 5, inventory=0.9)
    solver = Solver(Limits(gap=0.005))
    solver.solve(problem, no_hurry())
    poorer = replace(problem, limits=problem.limits * 0.7)
    found = solver.solve(poorer, no_hurry())
    assert poorer.fits(found.replicas)


def test_a_service_more_leaves_the_others_what_they_have_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = fleet(6, 5, inventory=0.9)
    solver = Solver(Limits(gap=0.005))
    solver.solve(replace(problem, services=problem.services[:5]), no_hurry())
    built: list[str] = []
    build = Pricer._build

    def counted(self: Pricer) -> None:
        built.append(self.service.key)
        build(self)

    monkeypatch.setattr(Pricer, "_build", counted)
    found = solver.solve(problem, no_hurry())
    assert set(built) == {problem.services[5].key}
    assert problem.fits(found.replicas)
    assert found.gap_cost is not None
    assert found.gap_cost <= 0.005


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_problems(losses=2), st.lists(st.integers(-1, 1), min_size=12, max_size=12), st.sampled_from([0.02, 0.3]))
def test_other_replicas_in_force_are_put_into_a_solved_fleet_with_a_bound_that_still_holds(
    problem: Problem, steps: list[int], price: float
) -> None:
    solver = Solver(Limits(gap=0.0))
    first = solver.solve(problem, no_hurry())
    for replicas in (first.replicas, tuple(moved(counts, steps) for counts in first.replicas)):
        problem = in_force(problem, replicas, price=price)
        found, best = solver.solve(problem, no_hurry()), best_rank(problem, 9)
        np.testing.assert_allclose(rank(problem, found.replicas), best, atol=3e-5)
        assert found.bound is not None
        assert found.bound <= best[-1] + 1e-6


def moved(counts: tuple[int, ...], steps: list[int]) -> tuple[int, ...]:
    return tuple(max(0, count + step) for count, step in zip(counts, steps, strict=False))


def test_services_that_differ_in_their_replicas_in_force_only_are_not_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = fleet(12, 7, inventory=0.9)
    solver = Solver(Limits(gap=0.005))
    first = solver.solve(problem, no_hurry())
    monkeypatch.setattr(Pricer, "price", lambda *_, **__: pytest.fail("a service is priced"))
    kept = in_force(problem, first.replicas)
    again = solver.solve(kept, no_hurry())
    assert again.replicas == first.replicas
    assert again.bound == pytest.approx(first.bound)
    assert again.objective == pytest.approx(first.objective)


def test_what_services_leave_behind_as_they_change_does_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(master, "_MOST_RETIRED", 20)
    problem = fleet(6, 5, inventory=0.9)
    solver = Solver(Limits(gap=0.005))
    for number in range(20):
        solver.solve(problem, no_hurry())
        problem = with_rates(problem, number % 6, 0.9 if number % 2 else 1.1)
    assert solver._solved is not None
    rounds = solver._solved.last
    assert rounds is not None
    live = sum(len(pricer.replicas) for pricer in rounds.phase.pricers)
    assert rounds.master.columns <= max(20, 2 * live) + live


def test_a_joint_program_that_rounding_denies_takes_no_proof_away() -> None:
    first = Service(
        key="s0",
        priority=100,
        rates=np.array([0.3, 0.3]),
        throughput=np.array([[2.0], [3.0]]),
        cost=np.array([1.5]),
        use=np.array([[0.0], [2.0], [1.5]]),
        maximum=3,
        previous=(0,),
        switching=np.array([0.75]),
        reserve=np.array([0.4]),
        losses=(Loss(np.array([True]), 0.4),),
    )
    second = Service(
        key="s1",
        priority=100,
        rates=np.array([0.3, 2.0, 0.3]),
        throughput=np.array([[2.0, 1.0, 0.0], [3.0, 1.0, 2.0], [3.0, 2.0, 2.0]]),
        cost=np.array([2.5, 2.5, 2.5]),
        use=np.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0], [2.5, 2.5, 2.5]]),
        minimum=2,
        reserve=np.array([0.0, 0.4, 0.0]),
    )
    problem = Problem((first, second), ("small", "big", "budget"), np.array([1.0, 3.0, 9.5]))
    found = Solver(Limits(gap=0.0)).solve(problem, no_hurry())
    assert found.objective == pytest.approx(best_rank(problem, 9)[-1])
    assert found.bound is not None
    assert 0.9 * found.objective <= found.bound <= found.objective
