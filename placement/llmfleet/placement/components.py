"""Which services compete with each other, and what can be said of a fleet without solving it.

programs, devices --components--> sets of services that share nothing scarce
a program, devices --greedy-----> replicas without a solver
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from llmfleet.placement.service_program import Replicas, ServiceProgram, ceil
from llmfleet.placement.solver.stages import WHOLE


def components(
    programs: list[ServiceProgram], devices: Mapping[str, float], coupled: Iterable[str] = ()
) -> list[list[ServiceProgram]]:
    """Sets of services that compete for nothing with a service of another set; both in the given order. `coupled`: rows
    that tie services together even where there is enough: they may stand on one node."""
    most: dict[str, float] = {}
    for program in programs:
        for name, amount in program.takes(program.upper(devices)).items():
            most[name] = most.get(name, 0) + amount
    scarce = {name for name, amount in most.items() if amount > devices[name]} | set(coupled)

    parent = list(range(len(programs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, program in enumerate(programs):
        for name in sorted(scarce & set(program.rows)):
            parent[root(i)] = root(first.setdefault(name, i))
    found: dict[int, list[ServiceProgram]] = {}
    for i, program in enumerate(programs):
        found.setdefault(root(i), []).append(program)
    return list(found.values())


def fits(programs: Iterable[ServiceProgram], replicas: Mapping[str, Replicas], devices: Mapping[str, float]) -> bool:
    """Whether devices, and every other row, suffice for these replicas of all services together."""
    used: dict[str, float] = {}
    for program in programs:
        for name, amount in program.takes(replicas[program.key]).items():
            used[name] = used.get(name, 0) + amount
    return all(amount <= devices[name] * (1 + 1e-9) + 1e-9 for name, amount in used.items())


def greedy(program: ServiceProgram, devices: Mapping[str, float]) -> Replicas:
    """Replicas without a solver, for when there is no time for one: variant after variant, those that no loss takes
    away first, then the one with the lowest cost per request, each for as much of what is left as it can serve."""
    left = dict(devices)
    open_rps = program.rates.copy()
    counts = [0] * len(program.types)
    possible = (program.throughput > 0) & (program.stage is None or program.stage == WHOLE)

    def price(v: int) -> float:
        load = float((open_rps[possible[:, v]] / program.throughput[possible[:, v], v]).sum())
        return float(program.charged[v]) * load / max(float(open_rps[possible[:, v]].sum()), 1e-300)

    def room(v: int) -> int:
        if counts[v] == 0 and program.distinct is not None and sum(map(bool, counts)) >= program.distinct:
            return 0
        bound = program.room(v, left)
        return bound if program.maximum is None else min(bound, program.maximum - sum(counts))

    def take(v: int, count: int) -> None:
        counts[v] += count
        left[program.types[v]] -= count * program.devices[v]
        for name, amounts in program.shared.items():
            left[name] -= count * float(amounts[v])

    usable = [v for v in range(len(counts)) if possible[:, v].any()]
    for v in sorted(usable, key=lambda v: (program.exposed(v), price(v), v)):
        load = np.divide(open_rps, program.throughput[:, v], out=np.zeros_like(open_rps), where=possible[:, v])
        held = float(program.held_back[v])
        count = max(0, min(ceil(float(load.sum()) + held), room(v))) if load.sum() > 0 else 0
        take(v, count)
        if load.sum() > 0:
            open_rps[possible[:, v]] *= max(0.0, 1.0 - max(0.0, count - held) / float(load.sum()))
    for v in sorted(range(len(counts)), key=lambda v: (float(program.charged[v]), v)):
        take(v, max(0, min(program.missing(tuple(counts)), room(v))))
    return tuple(counts)
