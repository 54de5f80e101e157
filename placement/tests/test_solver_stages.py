"""Two stages in the numeric solver: right against enumeration, bounds that hold at any prices, never dearer."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import Limits, Problem, Service, Solution, solve
from llmfleet.placement.solver.cut_program import Terms
from llmfleet.placement.solver.relaxation import Relaxed
from llmfleet.placement.solver.stages import FIRST, SECOND, WHOLE, cheapest_way, in_step, served_share
from llmfleet.placement.solver.unserved import Unserved, bounds


def unserved_share(service: Service, replicas: tuple[int, ...]) -> float:
    """Least share unserved, by a program over pairs: it knows no stages, only who can serve a request together."""
    assert service.stage is not None
    stage = service.stage.tolist()
    each = range(len(stage))
    ways: list[tuple[int, ...]] = [(v,) for v in each if stage[v] == WHOLE]
    ways += [(p, d) for p in each if stage[p] == FIRST for d in each if stage[d] == SECOND]
    problem = pulp.LpProblem("pairs", pulp.LpMaximize)
    served = {
        (b, way): problem.add_variable(f"s_{b}_{number}", 0)
        for b in range(len(service.rates))
        for number, way in enumerate(ways)
        if all(service.throughput[b, v] > 0 and replicas[v] > 0 for v in way)
    }
    if not served:
        return 1.0
    problem += pulp.lpSum(list(served.values()))
    for b, rate in enumerate(service.rates.tolist()):
        problem += pulp.lpSum([x for (bucket, _), x in served.items() if bucket == b]) <= rate
    for v, count in enumerate(replicas):
        terms = [x * float(1 / service.throughput[b, v]) for (b, way), x in served.items() if v in way]
        if terms:
            problem += pulp.lpSum(terms) <= max(0.0, count - float(service.held_back[v]))
    problem.solve(pulp.HiGHS(msg=False))
    total = float(service.rates.sum())
    return max(0.0, (total - float(pulp.value(problem.objective))) / total)


@st.composite
def staged_services(draw: st.DrawFn) -> Service:
    stage = np.array(draw(st.sampled_from([(WHOLE, FIRST, SECOND), (FIRST, SECOND), (FIRST, SECOND, SECOND)])))
    variants, buckets = len(stage), draw(st.integers(1, 2))
    does = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
    cost = np.array([draw(st.sampled_from([1.0, 1.5, 2.5, 4.0])) for _ in range(variants)])
    return Service(
        key="s",
        priority=100,
        rates=np.array([draw(st.sampled_from([0.3, 1.1, 2.0])) for _ in range(buckets)]),
        throughput=np.array([[draw(does) for _ in range(variants)] for _ in range(buckets)]),
        cost=cost,
        use=np.stack([np.ones(variants), cost]),
        reserve=np.array([draw(st.sampled_from([0.0, 0.3])) for _ in range(variants)]),
        stage=stage,
    )


def solved(service: Service, limits: tuple[float, float]) -> Solution:
    problem = Problem((service,), ("devices", "budget"), np.array(limits))
    return solve(problem, Limits(gap=0.0), Deadline(time.monotonic, time.monotonic() + 60))


@settings(max_examples=15, deadline=None)
@given(service=staged_services(), limits=st.tuples(st.sampled_from([2.0, 3.0]), st.sampled_from([4.0, 9.5])))
def test_a_solve_with_stages_finds_what_enumeration_finds(service: Service, limits: tuple[float, float]) -> None:
    best = min(
        (round(unserved_share(service, y), 5), round(float(service.cost @ np.array(y)), 6))
        for y in itertools.product(range(int(limits[0]) + 1), repeat=service.variants)
        if service.allows(y, np.array(limits))
    )
    solution = solved(service, limits)
    (found,) = solution.replicas
    assert (round(unserved_share(service, found), 5), round(float(service.cost @ np.array(found)), 6)) == best
    assert solution.bound is not None
    assert solution.bound <= best[1] + 1e-6


@settings(deadline=None)
@given(service=staged_services(), prices=st.lists(st.floats(0, 5), min_size=3, max_size=3), data=st.data())
def test_a_bound_holds_at_any_prices_and_is_tight_at_those_of_the_program(
    service: Service, prices: list[float], data: st.DataObject
) -> None:
    weight = service.rates / service.demand
    function = Unserved(service.load, weight, service.cost, service.stage)
    capacity = np.array([data.draw(st.sampled_from([0.0, 0.4, 1.0, 3.0])) for _ in range(service.variants)])
    unserved, dual = function(capacity)
    for w in (np.array(prices[: service.variants]), dual):
        bound = float(bounds(service.load, weight, w[None, :], service.stage)[0])
        assert unserved + float(w @ capacity) >= bound - 1e-6
    assert float(bounds(service.load, weight, dual[None, :], service.stage)[0]) - float(dual @ capacity) == (
        pytest.approx(unserved, abs=1e-6)
    )


@settings(max_examples=50, deadline=None)
@given(service=staged_services())
def test_that_replicas_may_serve_one_stage_never_costs_more(service: Service) -> None:
    assert service.stage is not None
    whole = service.stage == WHOLE
    limits = (1e3, 1e4)
    if not (whole.any() and (service.throughput[:, whole] > 0).all()):
        return
    alone = Service(
        key="s",
        priority=100,
        rates=service.rates,
        throughput=service.throughput[:, whole],
        cost=service.cost[whole],
        use=service.use[:, whole],
        reserve=service.held_back[whole],
    )
    assert solved(service, limits).objective <= solved(alone, limits).objective * (1 + 1e-6)


def test_who_prefills_and_who_decodes_are_bought_in_the_proportion_of_their_loads() -> None:
    service = Service(
        key="s",
        priority=100,
        rates=np.array([12.0]),
        throughput=np.array([[1.0, 2.0, 3.0]]),
        cost=np.array([3.0, 1.0, 1.0]),
        use=np.array([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]),
        stage=np.array([WHOLE, FIRST, SECOND]),
    )
    assert solved(service, (100.0, 100.0)).replicas == ((0, 6, 4),)


def test_a_stage_that_nobody_else_serves_serves_nobody() -> None:
    service = Service(
        key="s",
        priority=100,
        rates=np.array([2.0]),
        throughput=np.array([[2.0, 2.0, 0.0]]),
        cost=np.array([5.0, 1.0, 1.0]),
        use=np.array([[1.0, 1.0, 1.0], [5.0, 1.0, 1.0]]),
        stage=np.array([WHOLE, FIRST, SECOND]),
    )
    assert solved(service, (9.0, 99.0)).replicas == ((1, 0, 0),)


def test_the_relaxation_buys_the_cheapest_way_of_each_bucket() -> None:
    service = Service(
        key="s",
        priority=100,
        rates=np.array([4.0, 4.0]),
        throughput=np.array([[4.0, 2.0, 2.0], [1.0, 2.0, 4.0]]),
        cost=np.array([1.0, 0.6, 0.6]),
        use=np.zeros((0, 3)),
        stage=np.array([WHOLE, FIRST, SECOND]),
    )
    replicas, unserved, cost = Relaxed(service, whole=True).price(Terms(service.cost, np.zeros(3), 0.0, 0.0))
    assert replicas.tolist() == [1.0, 2.0, 1.0]
    assert unserved == 0
    assert cost == pytest.approx(1.0 + 1.8)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_no_more_is_handed_over_than_is_taken(shares: list[float]) -> None:
    stage = np.array([WHOLE, FIRST, SECOND, SECOND])
    x = in_step(np.array([shares]), stage)
    assert x[0, 1] == pytest.approx(x[0, 2] + x[0, 3])
    assert (x <= np.array([shares]) * (1 + 1e-12)).all()
    assert served_share(x, stage)[0] == pytest.approx(shares[0] + min(shares[1], shares[2] + shares[3]))


def test_a_way_is_as_dear_as_both_of_its_stages() -> None:
    stage = np.array([WHOLE, FIRST, FIRST, SECOND])
    assert cheapest_way(np.array([[5.0, 3.0, 1.0, 2.0], [2.0, 3.0, 1.0, 2.0]]), stage).tolist() == [3.0, 2.0]
    assert cheapest_way(np.array([[5.0, 3.0, 1.0, np.inf]]), stage).tolist() == [5.0]
