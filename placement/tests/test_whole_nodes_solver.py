"""Devices that are paid for by the node, in numbers: packings, proofs, enumeration."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import (
    Limits,
    Problem,
    Service,
    WholeNodes,
    idle_devices,
    nodes_for,
    solve,
)
from llmfleet.placement.solver.nodes import measures
from placement_testing.judge import rank, shortage

costly = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
EXACT = Limits(gap=0.0)


def no_hurry() -> Deadline:
    return Deadline(lambda: 0.0, 300.0)


def fewest_by_search(size: int, replicas: Sequence[int]) -> int:
    """The least number of nodes for these replicas (devices of each), by trying all."""

    def fits(free: list[int], left: Sequence[int]) -> bool:
        if not left:
            return True
        for n in range(len(free)):
            if free[n] >= left[0] and free[n] not in free[:n]:
                free[n] -= left[0]
                if fits(free, left[1:]):
                    return True
                free[n] += left[0]
        return False

    ordered = sorted(replicas, reverse=True)
    return next(nodes for nodes in itertools.count() if fits([size] * nodes, ordered))


@given(st.sampled_from([1, 2, 4, 8, 16]), st.lists(st.sampled_from([1, 2, 4, 8, 16]), max_size=40))
def test_sizes_that_divide_each_other_pack_without_loss(size: int, replicas: list[int]) -> None:
    replicas = [devices for devices in replicas if devices <= size]
    assert nodes_for(size, Counter(replicas)) == -(-sum(replicas) // size)


@given(st.integers(1, 8), st.lists(st.integers(1, 8), max_size=9))
def test_any_sizes_take_the_fewest_nodes_and_no_measure_says_more(size: int, replicas: list[int]) -> None:
    replicas = [devices for devices in replicas if devices <= size]
    counts, least = Counter(replicas), fewest_by_search(size, replicas)
    # Largest first is at most 11/9 of the least (Johnson 1973): so few replicas never need a node more.
    assert nodes_for(size, counts) == least
    for measure in measures(size, counts):
        assert sum(measure[devices] for devices in replicas) <= least + 1e-9


def test_a_node_of_eight_holds_two_replicas_of_three() -> None:
    assert nodes_for(8, {3: 2}) == 1
    assert nodes_for(8, {3: 3}) == 2
    assert idle_devices(8, {3: 3}) == 7
    assert nodes_for(8, {3: 2, 2: 1}) == 1
    assert nodes_for(8, {3: 2, 2: 2}) == 2


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """One or two services on two types, one of which, or both, are paid for by the node; engines of others stand there
    already, and a budget counts all."""
    prices, sizes = (1.0, 2.5), (draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([4, 8])))
    whole = draw(st.sampled_from([(0,), (1,), (0, 1)]))
    members = []
    for number in range(draw(st.integers(1, 2))):
        variants, buckets = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        rate, does = st.sampled_from([0.3, 1.1, 2.0, 4.7]), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
        use, cost = np.zeros((3, variants)), np.zeros(variants)
        for v in range(variants):
            g = draw(st.integers(0, 1))
            use[g, v] = draw(st.integers(1, min(3, sizes[g])))
            cost[v] = use[g, v] * prices[g]
            use[2, v] = cost[v]
        with_previous = draw(st.booleans())
        members.append(
            Service(
                key=f"s{number}",
                priority=draw(st.sampled_from([50, 100])),
                rates=np.array([draw(rate) for _ in range(buckets)]),
                throughput=np.array([[draw(does) for _ in range(variants)] for _ in range(buckets)]),
                cost=cost,
                use=use,
                minimum=draw(st.sampled_from([0, 0, 1])),
                previous=tuple(draw(st.integers(0, 2)) for _ in range(variants)) if with_previous else None,
                switching=cost * draw(st.sampled_from([0.02, 0.5])) if with_previous else None,
            )
        )
    nodes = tuple(
        WholeNodes(
            row=g,
            size=sizes[g],
            price=prices[g],
            takes=((2, prices[g]),),
            held=draw(st.sampled_from([(), ((1, 1),), ((2, 1), (1, 2))])),
        )
        for g in whole
    )
    limits = np.array([draw(st.integers(0, 6)), draw(st.integers(0, 6)), draw(st.sampled_from([9.5, 14.0, 100.0]))])
    # Without anything planned, what others leave idle is within the budget.
    limits[2] += sum(one.price * idle_devices(one.size, dict(one.held)) for one in nodes)
    return Problem(tuple(members), ("small", "big", "budget"), limits, nodes)


def idle(problem: Problem, replicas: Sequence[Sequence[int]]) -> dict[int, int]:
    """Devices of each type that stand idle on the fewest nodes, by row."""
    found = {}
    for one in problem.nodes:
        engines = [devices for devices, count in one.held for _ in range(count)]
        for service, counts in zip(problem.services, replicas, strict=True):
            for v, count in enumerate(counts):
                engines += [int(service.use[one.row, v])] * count if service.use[one.row, v] else []
        found[one.row] = one.size * fewest_by_search(one.size, engines) - sum(engines)
    return found


def billed(problem: Problem, replicas: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """The rank with what stands idle in its cost, beyond what others leave idle by themselves."""
    *levels, cost = rank(problem, replicas)
    none = [(0,) * service.variants for service in problem.services]
    now, before = idle(problem, replicas), idle(problem, none)
    return (*levels, round(cost + sum(one.price * (now[one.row] - before[one.row]) for one in problem.nodes), 6))


def best(problem: Problem, most: int) -> tuple[float, ...]:
    """The least such rank by enumeration."""
    each = []
    for service in problem.services:
        vectors = list(itertools.product(range(most + 1), repeat=service.variants))
        each.append([y for y in vectors if (service.use @ np.array(y) <= problem.limits + 1e-9).all()])
    choices = []
    cache: dict[tuple[int, tuple[int, ...]], float] = {}
    for choice in itertools.product(*each):
        used = sum((s.use @ np.array(y) for s, y in zip(problem.services, choice, strict=True)), np.zeros(3))
        standing = idle(problem, choice)
        used[2] += sum(one.price * standing[one.row] for one in problem.nodes)
        if (used > problem.limits + 1e-9).any():
            continue
        lost = []
        for priority in sorted({s.priority for s in problem.services}, reverse=True):
            level = [(i, s, y) for i, (s, y) in enumerate(zip(problem.services, choice, strict=True))]
            level = [one for one in level if one[1].priority == priority]
            for i, s, y in level:
                if (i, y) not in cache:
                    cache[i, y] = shortage(s, y)
            demand = sum(float(s.rates.sum()) for _, s, _ in level)
            lost.append(round(sum(float(s.rates.sum()) * cache[i, y] for i, s, y in level) / demand, 5))
            lost.append(sum(max(0, s.minimum - sum(y)) for _, s, y in level))
        choices.append((tuple(lost), choice))
    least = min(lost for lost, _ in choices)
    return min(billed(problem, choice) for lost, choice in choices if lost == least)


@costly
@given(problems())
def test_the_bill_equals_enumeration_and_is_proven(problem: Problem) -> None:
    found = solve(problem, EXACT, no_hurry())
    now = billed(problem, found.replicas)
    np.testing.assert_allclose(now, best(problem, 5), atol=2e-5)
    assert abs(found.objective - now[-1]) <= 1e-6
    assert found.bound is not None
    assert found.objective - 1e-6 * (1 + found.objective) <= found.bound <= found.objective
