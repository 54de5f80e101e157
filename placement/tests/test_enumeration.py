"""One service alone by enumeration: the same optimum as brute force and as branch and bound, or no answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import Limits, Loss, Pricer, Problem, Service, Terms, cheapest, enumeration, solve
from placement_testing.instances import services
from placement_testing.judge import cost, options, shortage, small_problems


def whole(service: Service, counts: tuple[int, ...]) -> bool:
    return sum(counts) >= service.minimum and shortage(service, counts) < 1e-6


@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(small_problems(most_services=1, losses=2), st.sampled_from([0.0, 0.0, 0.1]))
def test_what_is_called_cheapest_is_no_dearer_than_brute_force_allows(problem: Problem, gap: float) -> None:
    service = problem.services[0]
    found = cheapest(service, problem.limits, gap=gap)
    serving = [counts for counts in options(service, problem.limits.tolist(), 6) if whole(service, counts)]
    if found is None:
        own = service.minimum or service.maximum or service.distinct
        spare = (service.use @ np.array(service.need) <= problem.limits).all()
        assert own or not spare or service.losses or not len(service.rates) or not serving
        return
    assert found.replicas in serving
    assert found.cost == pytest.approx(cost(service, found.replicas))
    best = min(cost(service, counts) for counts in serving)
    assert found.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-6) <= found.cost <= best / (1 - gap) * (1 + 1e-6)


@pytest.mark.parametrize("gap", [0.0, 0.0025])
@pytest.mark.parametrize(("changing", "losing"), [(False, False), (True, False), (False, True)])
def test_services_of_sixty_buckets_and_twelve_variants_agree_with_branch_and_bound(
    gap: float, changing: bool, losing: bool
) -> None:
    answered = 0
    for number, service in enumerate(services(12, 5)):
        limits = np.full(service.use.shape[0], 1e9)
        if changing:
            before = tuple(int(count) for count in np.random.default_rng(number).integers(0, 3, service.variants))
            held = np.where(np.arange(service.variants) % 3 == 0, 0.3, 0.0)
            service = replace(service, previous=before, switching=0.1 * service.cost, reserve=held)
        if losing:
            best = int(service.cost.argmin())
            losses = (
                Loss(np.arange(service.variants) % 2 == best % 2, 0.6),
                Loss(service.cost < service.cost.max(), 0.2),
            )
            service = replace(service, losses=losses)
        found = cheapest(service, limits, gap=gap)
        if found is None:
            continue
        answered += 1
        pricer, terms = Pricer(service, limits, whole=True), Terms(service.cost, service.change, 0.0, 0.0)
        bound = pricer.price(terms, relative=gap, absolute=0.0, deadline=Deadline(lambda: 0.0, 300.0))
        index = pricer.add(found.replicas)
        assert index is not None
        assert found.cost == pytest.approx(float(pricer.values(terms)[index]))
        assert bound <= found.cost * (1 + 1e-6)
        assert found.bound <= float(pricer.values(terms).min()) * (1 + 1e-6)
        assert found.cost - found.bound <= (max(gap, 1e-6) + 1e-9) * found.cost
    assert answered >= (2 if losing else 6)


def test_one_service_is_solved_without_a_phase_and_one_that_is_too_wide_by_the_phases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits, no_hurry = np.full(9, 1e9), Deadline(lambda: 0.0, 300.0)
    answered = [service for service in services(12, 5) if cheapest(service, limits, gap=0.0)]
    with monkeypatch.context() as narrowed:
        narrowed.setattr(enumeration, "MOST_VECTORS", 0)
        service = next(service for service in answered if cheapest(service, limits, gap=0.0) is None)
        problem = Problem((service,), tuple("abcdefghi"), limits)
        slow = solve(problem, Limits(gap=0.0), no_hurry)
    quick = solve(problem, Limits(gap=0.0), no_hurry)
    assert quick.rounds == 0
    assert slow.rounds > 0
    assert slow.objective == pytest.approx(quick.objective)
