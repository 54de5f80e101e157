"""The aggregated program: fractions x, unserved u, integer replicas y, through PuLP with HiGHS.

For services s, their variants v and the buckets b with demand r_b (requests per second):

    0 <= x[b,v] <= 1   share of bucket b that v serves, only where v meets the objective
    0 <= u[b]   <= 1   share of bucket b that nobody serves
    y[v] integer       replicas
    m    >= 0          replicas missing to replicas.min

    sum_v x[b,v] + u[b] = 1                       every request is served or counted
    sum_b r_b x[b,v] / T[b,v] <= y[v] - h[v] [y[v] > 0]      a replica does T; a variant in use loses its reserve h once
    sum_v y[v] + m >= replicas.min,  sum_v y[v] <= replicas.max,  at most replicas.maxVariants of the y[v] above 0
    sum over services and variants of type k: y[v] devices[v] <= devices of type k

A service that has to survive losses has x and u once more for each, of what is left of y. Where variants serve only the
prefill or only the decode of a request, a bucket has a row for each of these stages (`solver/stages.py`).

Fractions of whole buckets instead of Mélange's binary slices: the same optimum, without the symmetry, and x *is* the
routing table. `u` and `m` make every instance feasible: a shortage is an answer, not an error.

It is solved lexicographically. For each priority, highest first: least unserved requests per second, then fewest
missing replicas; each result is held fixed for all that follows. Only then the cost, with the price of changing
replicas: sum c[v] (y[v] + f |y[v] - y_previous[v]|). So no weight has to be big enough, and a lower priority never
gets what a higher one could have used. As most fleets can serve everything, the cost is first tried with u and m
fixed at zero; if that has a solution, zero was the least of every level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pulp

from llmfleet.placement.highs import ROUNDING, Deadline, minimise
from llmfleet.placement.service_program import Replicas, ServiceProgram
from llmfleet.placement.solver import AT_RISK
from llmfleet.placement.solver.nodes import measures
from llmfleet.placement.solver.stages import rows_of
from llmfleet.placement.whole_nodes import NodeType

_LEAST_LOAD = 1e-5
"""Least load that a bucket with demand counts for, in replicas. HiGHS takes a replica of 1e-6 for none, so a request a
week would else be planned without any."""


@dataclass(frozen=True)
class Solution:
    """Replicas for a set of services."""

    replicas: dict[str, Replicas]
    """By service key."""
    bound: float | None
    """Proven lower bound of the objective at the least shortage; None if the shortage or the bound is not proven."""


@dataclass
class _Columns:
    """The variables of one service."""

    y: list[Any]
    x: dict[tuple[int, int], Any]
    u: list[Any]
    m: Any
    cost: list[tuple[Any, float]] = field(default_factory=list)
    """Terms of its cost with switching."""
    risk: Any = None
    """Share of the demand that the worst of its losses leaves unserved; None where it has none to survive."""
    lacking: list[Any] = field(default_factory=list)
    """By loss and bucket, the share that it leaves unserved."""
    floor: pulp.LpConstraint | None = None
    """Row that keeps the cost above a proven bound, once there is one."""


class FleetProgram:
    """The joint program of a set of services."""

    def __init__(
        self, services: Sequence[ServiceProgram], devices: Mapping[str, float], nodes: Sequence[NodeType] = ()
    ) -> None:
        """`devices`: how many of each type, and how much of each other row, these services may use together. `nodes`:
        the types that are billed by the node."""
        self.services = list(services)
        self.devices = devices
        self.problem = pulp.LpProblem("fleet", pulp.LpMinimize)
        self.columns = [self._add(index, service) for index, service in enumerate(self.services)]
        used: dict[str, list[tuple[Any, float]]] = {}
        for service, columns in zip(self.services, self.columns, strict=True):
            for y, gpu_type, per_replica in zip(columns.y, service.types, service.devices, strict=True):
                used.setdefault(gpu_type, []).append((y, per_replica))
            for name, amounts in service.shared.items():
                used.setdefault(name, []).extend(zip(columns.y, amounts.tolist(), strict=True))
        self.idle_cost: list[tuple[Any, float]] = []
        for number, one in enumerate(nodes):
            self._pay_for_nodes(number, one, used)
        for gpu_type in sorted(used):
            self._at_most(used[gpu_type], devices[gpu_type])

    def _pay_for_nodes(self, number: int, one: NodeType, used: dict[str, list[tuple[Any, float]]]) -> None:
        """Idle devices of one type, beyond those that are idle without these services: a column that costs and is
        counted in the rows that count the bill."""
        mine = [
            (y, devices)
            for service, columns in zip(self.services, self.columns, strict=True)
            for y, name, devices in zip(columns.y, service.types, service.devices, strict=True)
            if name == one.name
        ]
        if not mine:
            return
        held = dict(one.held)
        nodes = self.problem.add_variable(f"n_{number:02}", 0, cat=pulp.LpInteger)
        idle = self.problem.add_variable(f"i_{number:02}", -one.held_idle)
        for measure in measures(one.size, {devices for _, devices in mine} | held.keys()):
            taken = sum(count * measure[devices] for devices, count in held.items())
            self._at_most([*((y, measure[devices]) for y, devices in mine), (nodes, -1.0)], -taken)
        stands = sum(devices * count for devices, count in held.items()) + one.held_idle
        terms = [*((y, float(devices)) for y, devices in mine), (idle, 1.0), (nodes, -float(one.size))]
        self.problem.addConstraint(
            pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintEQ, rhs=-float(stands))
        )
        self.idle_cost.append((idle, one.charged))
        for name in one.rows:
            used.setdefault(name, []).append((idle, one.price))

    def _at_most(self, terms: list[tuple[Any, float]], most: float) -> None:
        self.problem.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=most))

    def _at_least(self, terms: list[tuple[Any, float]], least: float) -> pulp.LpConstraint:
        row = pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintGE, rhs=least)
        self.problem.addConstraint(row)
        return row

    def _add(self, index: int, service: ServiceProgram) -> _Columns:
        upper = service.upper(self.devices)
        y = [
            self.problem.add_variable(f"y_{index:05}_{v:03}", 0, bound, cat=pulp.LpInteger)
            for v, bound in enumerate(upper)
        ]
        u = [self.problem.add_variable(f"u_{index:05}_{b:03}", 0, 1) for b in range(len(service.rates))]
        m = self.problem.add_variable(f"m_{index:05}", 0, service.minimum)
        columns = _Columns(y=y, x={}, u=u, m=m)
        load: list[list[tuple[Any, float]]] = [[(variable, -1.0)] for variable in y]
        for b, rate in enumerate(service.rates.tolist()):
            for v, throughput in enumerate(service.throughput[b].tolist()):
                if throughput > 0 and upper[v] > 0:
                    x = self.problem.add_variable(f"x_{index:05}_{b:03}_{v:03}", 0, 1)
                    columns.x[b, v] = x
                    load[v].append((x, max(rate / throughput, _LEAST_LOAD)))
            for covered in rows_of(service.stage, len(y)):
                mine = [v for v in np.flatnonzero(covered).tolist() if (b, v) in columns.x]
                served = [(u[b], 1.0), *((columns.x[b, v], 1.0) for v in mine)]
                self.problem.addConstraint(
                    pulp.LpConstraint(pulp.LpAffineExpression(served), pulp.LpConstraintEQ, rhs=1.0)
                )
        held = service.held_back
        scarce = service.distinct is not None and sum(bound > 0 for bound in upper) > service.distinct
        used = []
        uses: dict[int, Any] = {}
        for v, (variable, bound) in enumerate(zip(y, upper, strict=True)):
            if scarce or held[v] > 0:
                use = self.problem.add_variable(f"k_{index:05}_{v:03}", 0, 1, cat=pulp.LpInteger)
                self._at_most([(variable, 1.0), (use, -float(max(bound, 1)))], 0.0)
                used.append((use, 1.0))
                uses[v] = use
                if held[v] > 0:
                    load[v].append((use, float(held[v])))
        for terms in load:
            self._at_most(terms, 0.0)
        self._survive(index, service, columns, held_use={v: use for v, use in uses.items() if held[v] > 0})
        if scarce and service.distinct is not None:
            self._at_most(used, service.distinct)
        if service.minimum:
            self._at_least([(variable, 1.0) for variable in y] + [(m, 1.0)], service.minimum)
        if service.maximum is not None:
            self._at_most([(variable, 1.0) for variable in y], service.maximum)
        charged = service.charged.tolist()
        cost = list(zip(y, charged, strict=True))
        if service.previous is not None and service.switching > 0:
            for v, (variable, before) in enumerate(zip(y, service.previous, strict=True)):
                moved = self.problem.add_variable(f"d_{index:05}_{v:03}", 0)
                self._at_least([(moved, 1.0), (variable, -1.0)], -before)
                self._at_least([(moved, 1.0), (variable, 1.0)], before)
                cost.append((moved, service.switching * charged[v]))
        columns.cost = cost
        return columns

    def _survive(self, index: int, service: ServiceProgram, columns: _Columns, held_use: Mapping[int, Any]) -> None:
        """Rows of what each loss leaves unserved. `held_use`: by variant with a reserve, whether it is in use."""
        if not service.losses:
            return
        y = columns.y
        columns.risk = self.problem.add_variable(f"r_{index:05}", 0, 1)
        weight = service.rates / float(service.rates.sum()) if service.rates.size else service.rates
        for number, loss in enumerate(service.losses):
            after, name = service.after(loss), f"{index:05}_{number:02}"
            load: dict[int, list[tuple[Any, float]]] = {}
            short = []
            for b, rate in enumerate(after.rates.tolist()):
                lacking = self.problem.add_variable(f"v_{name}_{b:03}", 0, 1)
                columns.lacking.append(lacking)
                short.append((lacking, float(weight[b])))
                kept = [(lacking, 1.0)]
                for v, throughput in enumerate(after.throughput[b].tolist()):
                    if throughput > 0 and y[v].upBound > 0:
                        x = self.problem.add_variable(f"q_{name}_{b:03}_{v:03}", 0, 1)
                        kept.append((x, 1.0))
                        load.setdefault(v, []).append((x, max(rate / throughput, _LEAST_LOAD)))
                self.problem.addConstraint(
                    pulp.LpConstraint(pulp.LpAffineExpression(kept), pulp.LpConstraintEQ, rhs=1.0)
                )
            for v, terms in load.items():
                terms.append((y[v], -1.0))
                if v in held_use:
                    terms.append((held_use[v], float(service.held_back[v])))
                self._at_most(terms, 0.0)
            self._at_most([*short, (columns.risk, -1.0)], 0.0)

    def require_another_set(self, index: int, replicas: Replicas) -> bool:
        """Demands of one service another set of variants than these replicas have, and fewer of at least one of
        them: a superset that only adds is no alternative. False where there are no replicas to have fewer of."""
        another: list[tuple[Any, float]] = []
        fewer: list[tuple[Any, float]] = []
        for v, (y, count) in enumerate(zip(self.columns[index].y, replicas, strict=True)):
            present = self.problem.add_variable(f"z_{index:05}_{v:03}", 0, 1, cat=pulp.LpInteger)
            self._at_least([(y, 1.0), (present, -1.0)], 0.0)
            self._at_most([(y, 1.0), (present, -float(y.upBound))], 0.0)
            another.append((present, -1.0 if count else 1.0))
            if count:
                less = self.problem.add_variable(f"w_{index:05}_{v:03}", 0, 1, cat=pulp.LpInteger)
                self._at_most([(y, 1.0), (less, float(max(y.upBound, count) - count + 1))], max(y.upBound, count))
                fewer.append((less, 1.0))
        self._at_least(another, 1.0 - len(fewer))
        self._at_least(fewer, 1.0)
        return bool(fewer)

    def bound_replicas(self, index: int, variant: int, least: int, most: int | None) -> bool:
        """Bounds the replicas of one variant; False if the bounds leave nothing. A replica beyond what is of use is
        allowed if asked for: that is how the price of using a variant at all is found."""
        y = self.columns[index].y[variant]
        service = self.services[index]
        room = service.room(variant, self.devices)
        y.lowBound = least
        y.upBound = max(least, y.upBound if most is None else min(y.upBound, most))
        return least <= room

    def hold_shortage(self, index: int, unserved_rps: float, missing: int, at_risk: float = 0.0) -> None:
        """Demands that one service leaves no more unserved, lacks no more replicas, and has no larger share of its
        demand at risk, than this."""
        service, columns = self.services[index], self.columns[index]
        for variable in columns.lacking:
            variable.upBound = 0 if at_risk <= ROUNDING else 1
        if columns.risk is not None:
            columns.risk.upBound = min(1.0, at_risk + ROUNDING)
        total = float(service.rates.sum())
        columns.m.upBound = missing
        if unserved_rps <= ROUNDING * total:
            for u in columns.u:
                u.upBound = 0
        else:
            self._at_most(
                list(zip(columns.u, (service.rates / total).tolist(), strict=True)), unserved_rps / total + ROUNDING
            )

    def cheapest(self, *, gap: float, deadline: Deadline) -> tuple[Replicas, ...] | None:
        """Least cost under whatever was demanded so far; None if there is no solution or no time."""
        self._set_objective(self._cost())
        answer = minimise(self.problem, gap=gap, deadline=deadline)
        return self._replicas() if answer.feasible else None

    def _cost(self) -> list[tuple[Any, float]]:
        return [*(term for columns in self.columns for term in columns.cost), *self.idle_cost]

    def lexicographic(
        self, *, gap: float, deadline: Deadline, floors: Mapping[str, float] | None = None
    ) -> Solution | None:
        """The module's lexicographic solve. None if no solution was found in time.

        `floors`: by service key, a proven lower bound of its objective with all demand served and no replica
        missing. It is the strongest cut there is for a joint solve, since the integrality gap sits inside the services.
        """
        everything = range(len(self.services))
        full = self._solve_full(everything, gap=gap, deadline=deadline, floors=floors or {})
        if full is not None:
            return full
        proven = True
        held_full: set[int] = set()
        for priority in sorted({service.priority for service in self.services}, reverse=True):
            level = [i for i in everything if self.services[i].priority == priority]
            level_proven, is_full = self._hold_level(level, deadline)
            proven = proven and level_proven
            if is_full:
                held_full.update(level)
                for i in level:
                    self._close(i, True)
        self._set_floors(held_full, floors or {})
        self._set_objective(self._cost())
        answer = minimise(self.problem, gap=gap, deadline=deadline)
        replicas = self._replicas()
        if replicas is None:
            return None
        return Solution(self._by_key(replicas), answer.bound if proven and answer.feasible else None)

    def _solve_full(
        self, level: Sequence[int], *, gap: float, deadline: Deadline, floors: Mapping[str, float]
    ) -> Solution | None:
        """Least cost with nothing unserved; None if that is impossible or was not found in half the time."""
        for i in level:
            self._close(i, True)
        self._set_floors(set(level), floors)
        self._set_objective(self._cost())
        hit_before = deadline.hit
        answer = minimise(self.problem, gap=gap, deadline=deadline, share=0.5)
        if answer.feasible:
            replicas = self._replicas()
            assert replicas is not None
            return Solution(self._by_key(replicas), answer.bound)
        self._set_floors(set(), floors)
        for i in level:
            self._close(i, False)
        deadline.hit = hit_before
        return None

    def _close(self, index: int, closed: bool) -> None:
        """Fixes unserved shares and missing replicas of one service at zero, or frees them."""
        for u in self.columns[index].u:
            u.upBound = 0 if closed else 1
        for lacking in self.columns[index].lacking:
            lacking.upBound = 0 if closed else 1
        self.columns[index].m.upBound = 0 if closed else self.services[index].minimum

    def _hold_level(self, level: Sequence[int], deadline: Deadline) -> tuple[bool, bool]:
        """Minimises and holds one priority's shortage. (Whether it is proven, whether there is none.)"""
        total = sum(float(self.services[i].rates.sum()) for i in level)
        proven, full = True, True
        if total > 0:
            unserved = [
                (u, rate / total)
                for i in level
                for u, rate in zip(self.columns[i].u, self.services[i].rates.tolist(), strict=True)
            ]
            unserved += [
                (self.columns[i].risk, AT_RISK * float(self.services[i].rates.sum()) / total)
                for i in level
                if self.columns[i].risk is not None
            ]
            self._set_objective(unserved)
            answer = minimise(self.problem, gap=ROUNDING, deadline=deadline, share=0.5)
            proven = answer.proven
            least = self._value(unserved)
            self._at_most(unserved, least + ROUNDING)
            full = least <= ROUNDING
        if any(self.services[i].minimum for i in level):
            missing = [(self.columns[i].m, 1.0) for i in level]
            self._set_objective(missing)
            answer = minimise(self.problem, gap=ROUNDING, deadline=deadline, share=0.5)
            proven = proven and answer.proven
            fewest = round(self._value(missing))
            self._at_most(missing, fewest)
            full = full and fewest == 0
        return proven, full

    def _set_floors(self, indices: set[int], floors: Mapping[str, float]) -> None:
        """Puts the floors of these services, and of no others, into force."""
        for i, (service, columns) in enumerate(zip(self.services, self.columns, strict=True)):
            floor = floors.get(service.key, 0.0) if i in indices else 0.0
            if columns.floor is None and floor > 0:
                columns.floor = self._at_least(columns.cost, 0.0)
            if columns.floor is not None:
                columns.floor.changeRHS(floor * (1 - ROUNDING))

    def _set_objective(self, terms: list[tuple[Any, float]]) -> None:
        self.problem.setObjective(pulp.LpAffineExpression(terms))

    @staticmethod
    def _value(terms: list[tuple[Any, float]]) -> float:
        return sum((variable.varValue if variable.varValue is not None else 1.0) * factor for variable, factor in terms)

    def _replicas(self) -> tuple[Replicas, ...] | None:
        if any(y.varValue is None for columns in self.columns for y in columns.y):
            return None
        return tuple(tuple(round(y.varValue) for y in columns.y) for columns in self.columns)

    def _by_key(self, replicas: tuple[Replicas, ...]) -> dict[str, Replicas]:
        return {service.key: counts for service, counts in zip(self.services, replicas, strict=True)}
