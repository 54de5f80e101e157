"""What judges the numeric solver: enumeration, and the routing program written once more, sharing no code with it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pulp
from hypothesis import strategies as st

from llmfleet.placement.solver import Loss, Problem, Service


def shortage(service: Service, replicas: Sequence[int]) -> float:
    """The unserved share of a service's demand, and a tenth of what the worst of its losses would leave unserved."""
    short = unserved_share(service, replicas)
    at_risk = [
        unserved_share(
            replace(service, rates=loss.keep * service.rates, losses=()),
            [0 if lost else count for count, lost in zip(replicas, loss.lost.tolist(), strict=True)],
        )
        for loss in service.losses
    ]
    return short + 0.1 * max(at_risk, default=0.0)


def unserved_share(service: Service, replicas: Sequence[int]) -> float:
    """Least share of a service's demand that these replicas leave unserved: the transport program in requests/s."""
    if not len(service.rates):
        return 0.0
    reserve = np.zeros(len(replicas)) if service.reserve is None else service.reserve
    problem = pulp.LpProblem("judge", pulp.LpMaximize)
    served = {
        (b, v): problem.add_variable(f"s_{b}_{v}", 0)
        for b in range(len(service.rates))
        for v in range(len(replicas))
        if service.throughput[b, v] > 0 and replicas[v] > 0
    }
    if not served:
        return 1.0
    problem += pulp.lpSum(list(served.values()))
    for b, rate in enumerate(service.rates.tolist()):
        problem += pulp.lpSum([x for (bucket, _), x in served.items() if bucket == b]) <= rate
    for v, count in enumerate(replicas):
        row = [x * float(1 / service.throughput[b, v]) for (b, variant), x in served.items() if variant == v]
        if row:
            problem += pulp.lpSum(row) <= max(0.0, count - float(reserve[v]))
    problem.solve(pulp.HiGHS(msg=False))
    total = float(service.rates.sum())
    return max(0.0, (total - float(pulp.value(problem.objective))) / total)


def cost(service: Service, replicas: Sequence[int]) -> float:
    """Cost per hour with the price of change."""
    total = float(np.dot(service.cost, replicas))
    if service.previous is not None and service.switching is not None:
        total += sum(
            float(price) * abs(count - before)
            for price, count, before in zip(service.switching, replicas, service.previous, strict=True)
        )
    return total


def rank(problem: Problem, replicas: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """What the solve minimises, in order: by priority the shortage and the missing replicas; then the cost."""
    found: list[float] = []
    for priority in sorted({service.priority for service in problem.services}, reverse=True):
        level = [(s, y) for s, y in zip(problem.services, replicas, strict=True) if s.priority == priority]
        demand = sum(float(s.rates.sum()) for s, _ in level)
        unserved = sum(float(s.rates.sum()) * shortage(s, y) for s, y in level)
        found.append(round(unserved / demand, 5) if demand else 0.0)
        found.append(sum(max(0, s.minimum - sum(y)) for s, y in level))
    found.append(round(sum(cost(s, y) for s, y in zip(problem.services, replicas, strict=True)), 6))
    return tuple(found)


def options(service: Service, limits: Sequence[float], most: int) -> list[tuple[int, ...]]:
    """All replica vectors up to `most` of a variant that the service's own limits and the rows allow."""
    reserve = np.zeros(len(service.cost)) if service.reserve is None else service.reserve
    found = []
    for counts in itertools.product(range(most + 1), repeat=len(service.cost)):
        if service.maximum is not None and sum(counts) > service.maximum:
            continue
        if service.distinct is not None and sum(count > 0 for count in counts) > service.distinct:
            continue
        if any(0 < count < held for count, held in zip(counts, reserve.tolist(), strict=True)):
            continue
        if (service.use @ np.array(counts) <= np.array(limits) + 1e-9).all():
            found.append(counts)
    return found


def best_rank(problem: Problem, most: int) -> tuple[float, ...]:
    """The least rank by enumeration."""
    each = [options(service, problem.limits.tolist(), most) for service in problem.services]
    known = [
        {y: (shortage(s, y), max(0, s.minimum - sum(y)), cost(s, y)) for y in ys}
        for s, ys in zip(problem.services, each, strict=True)
    ]
    priorities = sorted({service.priority for service in problem.services}, reverse=True)
    demand = {p: sum(float(s.rates.sum()) for s in problem.services if s.priority == p) for p in priorities}
    best: tuple[float, ...] | None = None
    for choice in itertools.product(*each):
        used = sum(s.use @ np.array(y) for s, y in zip(problem.services, choice, strict=True))
        if (used > problem.limits + 1e-9).any():
            continue
        found = []
        for p in priorities:
            level = [
                (s, known[i][y])
                for i, (s, y) in enumerate(zip(problem.services, choice, strict=True))
                if s.priority == p
            ]
            unserved = sum(float(s.rates.sum()) * r[0] for s, r in level)
            found += [round(unserved / demand[p], 5) if demand[p] else 0.0, sum(r[1] for _, r in level)]
        found.append(round(sum(known[i][y][2] for i, y in enumerate(choice)), 6))
        best = tuple(found) if best is None else min(best, tuple(found))
    assert best is not None
    return best


@st.composite
def small_problems(draw: st.DrawFn, *, most_services: int = 2, losses: int = 0) -> Problem:
    """One or two services, up to three variants, two types and a budget; each has up to `losses` to survive."""
    limits = np.array([draw(st.integers(0, 5)), draw(st.integers(0, 3)), draw(st.sampled_from([4.0, 9.5, 100.0]))])
    members = []
    for number in range(draw(st.integers(1, most_services))):
        variants = draw(st.integers(1, 3))
        buckets = draw(st.integers(0, 3))
        rate, does = st.sampled_from([0.3, 1.1, 2.0, 4.7]), st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])
        throughput = np.array([[draw(does) for _ in range(variants)] for _ in range(buckets)]).reshape(
            buckets, variants
        )
        rates = np.array([draw(rate) for _ in range(buckets)])
        cost = np.array([draw(st.sampled_from([1.0, 1.5, 2.5, 4.0])) for _ in range(variants)])
        use = np.zeros((3, variants))
        for v in range(variants):
            use[draw(st.integers(0, 1)), v] = draw(st.integers(1, 2))
            use[2, v] = cost[v]
        minimum = draw(st.sampled_from([0, 0, 1, 2]))
        with_previous = draw(st.booleans())
        members.append(
            Service(
                key=f"s{number}",
                priority=draw(st.sampled_from([50, 100])),
                rates=rates,
                throughput=throughput,
                cost=cost,
                use=use,
                minimum=minimum,
                maximum=draw(st.sampled_from([None, None, 3])),
                distinct=draw(st.sampled_from([None, None, 1])),
                previous=tuple(draw(st.integers(0, 2)) for _ in range(variants)) if with_previous else None,
                switching=cost * draw(st.sampled_from([0.02, 0.5])) if with_previous else None,
                reserve=np.array([draw(st.sampled_from([0.0, 0.0, 0.4])) for _ in range(variants)]),
                losses=tuple(
                    Loss(
                        np.array([draw(st.booleans()) for _ in range(variants)]),
                        draw(st.sampled_from([1.0, 0.8, 0.5])),
                    )
                    for _ in range(draw(st.integers(0, losses)) if losses else 0)
                ),
            )
        )
    return Problem(tuple(members), ("small", "big", "budget"), limits)
