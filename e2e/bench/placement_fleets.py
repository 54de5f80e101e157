"""Whole fleets on shared devices, budget and power: the `fleet_*` rows of `make bench-placement`.

    add_rows(report)                                measures; FULL=1 for 21 fleets of each size
    python -m e2e.bench.placement_fleets            only these rows

Fleets of 10, 50 and 200 services with 60 buckets and 12 variants (`placement_testing/instances.py`), with devices for
120 to 30 % of what the fleet would take, some short of money or watts instead. Each is solved in a process of its own,
which is ended after four times the target. Every answer is checked by code that the solver has no part in: rows by
adding up, unserved demand by a routing program per service. Peer: the plain joint program over all services in HiGHS
with its defaults, for as long as the target allows, with the unserved demand of our answer given to it, so that it has
one phase to do where ours has two or more. At last a fleet of 200 in which one service's rate changes, 100 times.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np

from e2e.bench.report import Report
from llmfleet.api import Plan
from llmfleet.placement import WarmState, plan, violations
from llmfleet.placement.highs import Deadline
from llmfleet.placement.solver import Limits, Problem, Replicas, Solver, solve
from placement_testing.instances import fleet
from placement_testing.judge import cost, unserved_share
from placement_testing.large_fleets import scarce_fleet, with_rate

GAP = 0.01
SECONDS = 30.0
THOUSAND_SECONDS = 120.0
STARVED = 0.05
"""Share of the demand; a fleet that leaves more unserved is judged by its cost gap alone, at 3 %."""
CASES: tuple[dict[str, float], ...] = (
    {"inventory": 0.8},
    {"inventory": 0.6},
    {"inventory": 0.8, "budget": 0.9},
    {"inventory": 0.8, "power": 0.9},
    {"inventory": 1.2},
    {"inventory": 0.5},
    {"inventory": 0.3},
)
_DEFAULT_CASES = {10: 7, 50: 5, 200: 4}
CHANGES = 100
_SETTLING = 5
"""Plans before the first change, in which the lines of all services settle."""
_MIB = 2**20


@dataclass(frozen=True)
class Asked:
    """One fleet."""

    services: int
    seed: int
    case: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What one solve took and proved, checked."""

    seconds: float
    cpu_seconds: float
    gap_cost: float
    gap_unserved: float
    unserved: float
    """Share of the fleet's demand."""
    stopped_by: str
    memory_mib: float
    replicas: tuple[Replicas, ...]
    shares: tuple[float, ...]

    @property
    def gap(self) -> float:
        """The larger of both."""
        return max(self.gap_cost, self.gap_unserved)


def main() -> None:
    report = Report("placement-fleets")
    add_rows(report)
    report.write()


def add_rows(report: Report) -> None:
    """Measures, and adds the rows."""
    seeds = 3 if os.environ.get("FULL") else 1
    starved: list[Answer] = []
    for services in (10, 50, 200):
        cases = CASES if seeds > 1 else CASES[: _DEFAULT_CASES[services]]
        asked = [Asked(services, 100 * services + seed, case) for seed in range(seeds) for case in cases]
        answers = [answer for one in asked if (answer := _answer(one, SECONDS)) is not None]
        failed = f"; {len(asked) - len(answers)} ended without an answer" if len(answers) < len(asked) else ""
        served = [answer for answer in answers if answer.unserved <= STARVED]
        starved += [answer for answer in answers if answer.unserved > STARVED]
        theirs = [_apart(_plain, (asked[0], answers[0]), 4 * SECONDS)] if answers else []
        note = f"{len(served)} of {len(asked)} fleets leave at most 5 % unserved{failed}"
        gaps = [100 * answer.gap for answer in served]
        plain = [100 * gap for gap in theirs if gap is not None]
        peer = f"plain joint program in {SECONDS:.0f} s, first fleet"
        report.add(f"fleet_{services}_gap_median", "%", gaps, target=0.5, peer=peer, peer_runs=plain, note=note)
        report.add(f"fleet_{services}_gap_max", "%", [max(gaps)] if gaps and not failed else [], target=1.0, note=note)
        seconds = [answer.seconds for answer in answers]
        note = f"CPU {max((answer.cpu_seconds for answer in answers), default=0.0):.1f} s{failed}"
        longest = [max(seconds)] if seconds and not failed else []
        report.add(f"fleet_{services}_seconds_max", "s", longest, target=SECONDS, note=note)
    note = f"{len(starved)} fleets, sizes together"
    worst = [100 * max(answer.gap_cost for answer in starved)] if starved else []
    report.add("fleet_starved_gap_cost_max", "%", worst, target=3.0, note=note)
    worst = [100 * max(answer.gap_unserved for answer in starved)] if starved else []
    report.add("fleet_starved_gap_unserved_max", "%", worst, note=note)
    _thousand(report)
    _warm(report)
    _replanned(report)


def _warm(report: Report) -> None:
    runs: list[tuple[float, float]] = _apart(_changes, (Asked(200, 207, {"inventory": 0.8}), CHANGES), 600.0) or []
    seconds = [run[0] for run in runs]
    note = (
        f"{CHANGES} changes, slowest {max(seconds):.2f} s, largest gap {100 * max(run[1] for run in runs):.2f} %"
        if runs
        else ""
    )
    slow = [float(np.percentile(seconds, 95))] if runs and max(run[1] for run in runs) <= GAP else []
    report.add("fleet_200_warm_p95_s", "s", slow, target=1.0, note=note)


def _changes(asked: Asked, count: int) -> list[tuple[float, float]]:
    """Seconds and gap of every change: one service's rate times a lognormal factor."""
    problem, chance = _problem(asked), np.random.default_rng(asked.seed)
    solver = Solver(Limits(gap=GAP / 2))
    solver.solve(problem, Deadline(time.monotonic, time.monotonic() + 4 * SECONDS))
    runs = []
    for number in range(count):
        services = list(problem.services)
        changed = int(chance.integers(len(services)))
        rates = services[changed].rates * float(np.exp(chance.normal(0, 0.3)))
        services[changed] = replace(services[changed], rates=rates)
        problem = replace(problem, services=tuple(services))
        began = time.monotonic()
        found = solver.solve(problem, Deadline(time.monotonic, began + SECONDS))
        runs.append(
            (time.monotonic() - began, 1.0 if found.gap_cost is None else max(found.gap_cost, found.gap_unserved))
        )
        if number % 10 == 0:
            check(problem, found.replicas, found.unserved, found.objective)
    return runs


def _replanned(report: Report) -> None:
    count = CHANGES if os.environ.get("FULL") else CHANGES // 5
    runs: list[tuple[float, float]] = _apart(_replans, (200, 207, count), 1200.0) or []
    first, changes = [run[0] for run in runs[:1]], runs[_SETTLING:]
    worst = f"largest gap {100 * max(run[1] for run in changes):.2f} %" if changes else ""
    seconds = [run[0] for run in changes]
    note = f"{count} changes, slowest {max(seconds):.2f} s, {worst}" if seconds else ""
    slow = [float(np.percentile(seconds, 95))] if seconds and max(run[1] for run in changes) <= GAP else []
    report.add("plan_200_seconds", "s", first)
    report.add("plan_200_replan_p95_s", "s", slow, target=1.0, note=note)


def _replans(services: int, seed: int, count: int) -> list[tuple[float, float]]:
    """Seconds and gap of the first plans and of every change: one service's rate times a lognormal factor."""
    inputs, chance = scarce_fleet(services, seed), np.random.default_rng(seed)
    decided: Plan | None = None
    warm: WarmState | None = None
    runs = []
    for number in range(_SETTLING + count):
        if number >= _SETTLING:
            changed = inputs.services[int(chance.integers(services))].key
            inputs = with_rate(inputs, changed, float(np.exp(chance.normal(0, 0.3))))
        began, before = time.monotonic(), decided
        decided, warm = plan(inputs, decided, warm)
        gap = 1.0 if decided.gap_cost is None else max(decided.gap_cost, decided.gap_unserved or 0.0)
        runs.append((time.monotonic() - began, gap))
        if number % 10 == 0 and (broken := violations(inputs, decided, before)):
            raise RuntimeError(f"plan {number}: {broken[0]}")
    return runs


def _thousand(report: Report) -> None:
    answer = _answer(Asked(1000, 1000, {"inventory": 0.8}), THOUSAND_SECONDS)
    runs = [] if answer is None else [answer]
    report.add("fleet_1000_seconds", "s", [one.seconds for one in runs], target=THOUSAND_SECONDS)
    report.add("fleet_1000_gap", "%", [100 * one.gap for one in runs], target=1.0)
    report.add("fleet_1000_memory_mib", "MiB", [one.memory_mib for one in runs], target=1536)


def _answer(asked: Asked, target_s: float) -> Answer | None:
    answer: Answer | None = _apart(_solve, (asked,), 4 * target_s)
    said = (
        "no answer"
        if answer is None
        else f"gap {100 * answer.gap_cost:.2f} % of cost, {100 * answer.gap_unserved:.2f} % of demand, "
        f"{100 * answer.unserved:.1f} % unserved, {answer.seconds:.1f} s ({answer.cpu_seconds:.1f} s of CPU), "
        f"{answer.stopped_by}"
    )
    print(f"{asked.services} services, {asked.case}: {said}", flush=True)
    return answer


def _apart(work: Callable[..., Any], arguments: tuple[Any, ...], limit_s: float) -> Any:
    """`work` in a process of its own; None if it was ended or died. HiGHS has been seen not to return."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(work, *arguments)
        try:
            return future.result(timeout=limit_s)
        except TimeoutError:
            for process in list((pool._processes or {}).values()):
                process.kill()
            return None
        except BrokenProcessPool:
            return None


def _problem(asked: Asked) -> Problem:
    return fleet(asked.services, asked.seed, **asked.case)


def _solve(asked: Asked) -> Answer:
    problem = _problem(asked)
    limit_s = SECONDS if asked.services < 1000 else THOUSAND_SECONDS
    began, cpu = time.monotonic(), time.process_time()
    found = solve(problem, Limits(gap=GAP / 2), Deadline(time.monotonic, began + 2 * limit_s))
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB
    check(problem, found.replicas, found.unserved, found.objective)
    demand = np.array([service.demand for service in problem.services])
    return Answer(
        seconds,
        cpu_seconds,
        1.0 if found.gap_cost is None else found.gap_cost,
        found.gap_unserved,
        float(demand @ np.array(found.unserved) / demand.sum()),
        found.stopped_by,
        memory,
        found.replicas,
        found.unserved,
    )


def check(problem: Problem, replicas: tuple[Replicas, ...], shares: tuple[float, ...], objective: float) -> None:
    """Raises RuntimeError where an answer breaks a row or does not do what it says."""
    used = sum(service.use @ np.array(counts) for service, counts in zip(problem.services, replicas, strict=True))
    for name, total, limit in zip(problem.rows, np.atleast_1d(used).tolist(), problem.limits.tolist(), strict=True):
        if total > limit * (1 + 1e-9) + 1e-6:
            raise RuntimeError(f"{name}: {total} of {limit} used")
    for service, counts, share in zip(problem.services, replicas, shares, strict=True):
        least = unserved_share(service, counts)
        # The solver counts a bucket for at least 1e-5 of a replica, so it may claim less than is served, never more.
        if not least - 1e-5 <= share <= least + 1e-3:
            raise RuntimeError(f"{service.key}: {share} of the demand is said to be unserved, {least} is")
    total = sum(cost(service, counts) for service, counts in zip(problem.services, replicas, strict=True))
    if abs(total - objective) > 1e-6 * (1 + total):
        raise RuntimeError(f"the cost is said to be {objective}, it is {total}")


def _plain(asked: Asked, answer: Answer) -> float:
    """Gap of the plain joint program: fractions x, unserved u, replicas y of all services at once."""
    problem = _problem(asked)
    began = time.monotonic()
    lower: list[float] = []
    upper: list[float] = []
    costs: list[float] = []
    integer: list[bool] = []
    rows: list[tuple[float, float, list[int], list[float]]] = []
    shared: list[tuple[list[int], list[float]]] = [([], []) for _ in problem.rows]
    held: dict[int, tuple[list[int], list[float], float]] = {}
    for service, share in zip(problem.services, answer.shares, strict=True):
        buckets, variants = service.throughput.shape
        y = len(costs)
        costs += service.cost.tolist()
        lower += [0.0] * variants
        upper += [float(most) for most in service.most(problem.limits)]
        integer += [True] * variants
        u = len(costs)
        columns, values, limit = held.setdefault(service.priority, ([], [], 0.0))
        held[service.priority] = (columns, values, limit + share * service.demand)
        columns += range(u, u + buckets)
        values += service.rates.tolist()
        costs += [0.0] * buckets
        lower += [0.0] * buckets
        upper += [1.0] * buckets
        integer += [False] * buckets
        pairs = np.argwhere(service.throughput > 0)
        x = len(costs)
        costs += [0.0] * len(pairs)
        lower += [0.0] * len(pairs)
        upper += [1.0] * len(pairs)
        integer += [False] * len(pairs)
        for b in range(buckets):
            mine = np.flatnonzero(pairs[:, 0] == b)
            rows.append((1.0, 1.0, [*(x + mine).tolist(), u + b], [1.0] * (len(mine) + 1)))
        for v in range(variants):
            mine = np.flatnonzero(pairs[:, 1] == v)
            loads = (service.rates[pairs[mine, 0]] / service.throughput[pairs[mine, 0], v]).tolist()
            rows.append((-highspy.kHighsInf, 0.0, [*(x + mine).tolist(), y + v], [*loads, -1.0]))
        for k, (used, amounts) in enumerate(shared):
            for v in np.flatnonzero(service.use[k] > 0).tolist():
                used.append(y + v)
                amounts.append(float(service.use[k, v]))
    for (used, amounts), limit in zip(shared, problem.limits.tolist(), strict=True):
        rows.append((-highspy.kHighsInf, limit, used, amounts))
    for columns, values, limit in held.values():
        rows.append((-highspy.kHighsInf, limit * (1 + 1e-6) + 1e-6, columns, values))
    model: Any = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(costs), len(rows)
    model.col_cost_, model.col_lower_, model.col_upper_ = np.array(costs), np.array(lower), np.array(upper)
    model.row_lower_ = np.array([row[0] for row in rows])
    model.row_upper_ = np.array([row[1] for row in rows])
    model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    model.a_matrix_.start_ = np.cumsum([0, *(len(row[2]) for row in rows)])
    model.a_matrix_.index_ = np.concatenate([row[2] for row in rows])
    model.a_matrix_.value_ = np.concatenate([row[3] for row in rows])
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    model.integrality_ = [kinds[int(flag)] for flag in integer]
    highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("time_limit", max(1.0, SECONDS - (time.monotonic() - began)))
    highs.setOptionValue("mip_rel_gap", GAP / 2)
    highs.passModel(model)
    highs.run()
    info = highs.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return 1.0
    value = float(info.objective_function_value)
    gap = (value - float(info.mip_dual_bound)) / value if value > 0 else 0.0
    print(f"{asked.services} services, {asked.case}: the plain joint program: {100 * gap:.2f} %", flush=True)
    return gap


if __name__ == "__main__":
    main()
