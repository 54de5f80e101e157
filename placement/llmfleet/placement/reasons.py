"""Why a service's plan is as it is, in words that are computed, not canned.

`binding`: what the service would get if devices and replica bounds were no object is known (`FleetSolver.relaxed`);
a constraint binds if that wish breaks it. So a type that happens to be used up, but of which the service wants no
more, is not named.

`shortfall`: for each constraint that keeps demand unserved, the least change of that constraint alone that would let
the service serve all of it, beside what it and all others already have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from llmfleet.placement.checks import Prepared
from llmfleet.placement.highs import ROUNDING
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.rows import SharedRow
from llmfleet.placement.service_program import PoolLoss, Replicas, ServiceProgram, ceil


@dataclass(frozen=True)
class Situation:
    """One service in a solved fleet."""

    prepared: Prepared
    """The service."""
    program: ServiceProgram
    """Its part of the program."""
    replicas: Replicas
    """What it got."""
    unserved: FloatArray
    """Unserved requests per second by bucket of the program; zero where only rounding."""
    unreachable_rps: float
    """Demand in buckets that no variant serves within the objective, in requests per second."""
    left: Mapping[str, float]
    """What may be used and nobody uses: devices by type, and of each row that is shared beside them."""
    inventory: Mapping[str, int]
    """Devices by type that exist, whatever the types' limits."""
    rows: tuple[SharedRow, ...] = ()
    """What is shared beside devices."""
    at_risk: tuple[tuple[PoolLoss, float], ...] = ()
    """Losses after which the service would be short, and of how many requests per second."""

    @property
    def unserved_rps(self) -> float:
        """All demand that is not served, in requests per second."""
        return float(self.unserved.sum()) + self.unreachable_rps


def binding(situation: Situation, wish: Replicas) -> list[str]:
    """Constraints that `wish`, the unconstrained optimum, breaks."""
    program, replicas = situation.program, situation.replicas
    found = []
    wanted, used = program.use(wish), program.use(replicas)
    for gpu_type in sorted(wanted):
        if wanted[gpu_type] > used[gpu_type] + situation.left[gpu_type]:
            found.append(devices_constraint(situation, gpu_type))
    for row in situation.rows:
        amounts = program.shared[row.name]
        wanted_amount, used_amount = float(np.dot(amounts, wish)), float(np.dot(amounts, replicas))
        if wanted_amount > (used_amount + situation.left[row.name]) * (1 + ROUNDING):
            found.append(row.name)
    if program.maximum is not None and sum(wish) > program.maximum:
        found.append("replicas.max")
    if program.distinct is not None and sum(count > 0 for count in wish) > program.distinct:
        found.append("replicas.maxVariants")
    if sum(wish) < program.minimum:
        found.append("replicas.min")
    return found


def devices_constraint(situation: Situation, gpu_type: str) -> str:
    """Which of limit and inventory bounds a type, in words."""
    limit = _limit(situation, gpu_type)
    by_limit = limit is not None and limit < situation.inventory.get(gpu_type, 0)
    return f"{'limit' if by_limit else 'inventory'} of GPUType {gpu_type}"


def _limit(situation: Situation, gpu_type: str) -> int | None:
    return next(v.gpu_type.spec.limit for v in situation.prepared.variants if v.type_name == gpu_type)


def shortfall(situation: Situation, bound_by: list[str]) -> str | None:
    """Who is short, by how much and what would help; None if nothing is."""
    program, prepared = situation.program, situation.prepared
    missing = program.missing(situation.replicas)
    parts = []
    if situation.unserved_rps > 0:
        total = float(program.rates.sum()) + situation.unreachable_rps
        parts.append(
            f"{prepared.key} is short of {_rate(situation.unserved_rps)} of {_rate(total)} requests per second "
            f"(priority {program.priority})"
        )
    if missing:
        parts.append(f"{prepared.key} is short of {missing} of replicas.min {program.minimum}")
    parts += [
        f"{prepared.key} would be short of {_rate(rps)} requests per second after the loss of "
        f"{' and '.join(sorted(loss.types))} ({loss.field})"
        for loss, rps in situation.at_risk
    ]
    if prepared.forbidden is not None and not parts:
        parts.append(f"{prepared.key}: {prepared.forbidden}")
    if not parts:
        return None
    if bound_by:
        parts.append(f"held by {', '.join(bound_by)}")
    if situation.unserved.any() or missing:
        helps = remedies(situation)
        if helps:
            parts.append(f"would help: {', or '.join(helps)}")
    if situation.unreachable_rps > 0:
        parts.append(
            f"{_rate(situation.unreachable_rps)} requests per second are of sizes that no variant serves within the "
            "objective, alone or beside the other sizes: allow a faster GPU type or a slower objective"
        )
    return "; ".join(parts)


def remedies(situation: Situation) -> list[str]:
    """By GPU type, what it takes to serve on it what is unserved and to fill up replicas.min: the least number of
    further devices, and the limits that would have to rise for them."""
    program, replicas = situation.program, situation.replicas
    options: dict[str, tuple[int, int, int]] = {}
    for v, gpu_type in enumerate(program.types):
        open_buckets = situation.unserved > 0
        if situation.prepared.variants[v].role is not None or (program.throughput[open_buckets, v] <= 0).any():
            continue
        load = float((situation.unserved[open_buckets] / program.throughput[open_buckets, v]).sum())
        more = max(ceil(load), program.missing(replicas))
        devices = max(0, more * program.devices[v] - int(situation.left[gpu_type]))
        options[gpu_type] = min(options.get(gpu_type, (devices, more, v)), (devices, more, v))
    found = []
    for gpu_type, (devices, more, v) in sorted(options.items(), key=lambda item: (item[1][0], item[0])):
        steps = []
        if devices:
            limit, exist = _limit(situation, gpu_type), situation.inventory.get(gpu_type, 0)
            wanted = devices + (exist if limit is None else min(exist, limit))
            if limit is not None and wanted > limit:
                steps.append(f"spec.limit of GPUType {gpu_type} of {wanted} instead of {limit}")
            if wanted > exist:
                lacking = wanted - exist
                steps.append(f"{lacking} more device{'s' if lacking > 1 else ''} of GPUType {gpu_type}")
        for row in situation.rows:
            lacking_amount = more * float(program.shared[row.name][v]) - situation.left[row.name]
            if lacking_amount > ROUNDING * max(1.0, row.limit):
                wanted_amount = math.ceil((row.limit + lacking_amount) * 100 * (1 - 1e-9)) / 100
                steps.append(f"{row.name} of {wanted_amount:.12g} instead of {row.limit:.12g}")
        in_use = sum(count > 0 for count in replicas)
        if program.distinct is not None and replicas[v] == 0 and in_use >= program.distinct:
            steps.append(f"replicas.maxVariants of {in_use + 1} instead of {program.distinct}")
        if program.maximum is not None and sum(replicas) + more > program.maximum:
            steps.append(f"replicas.max of {sum(replicas) + more} instead of {program.maximum}")
        if steps:
            found.append(" and ".join(steps))
    return list(dict.fromkeys(found))


def cost_per_million_tokens(cost_per_hour: float, prepared: Prepared, served_rps: FloatArray) -> float | None:
    """Cost of a million tokens, input and output together, at the served demand; None if nothing is served.

    `served_rps`: shape (buckets,). Tokens per request as in `BucketDemand.tokens`.
    """
    tokens_per_hour = 3600 * float(np.dot(served_rps, prepared.demand.tokens))
    if tokens_per_hour <= 0:
        return None
    cost = 1e6 * cost_per_hour / tokens_per_hour
    return cost if math.isfinite(cost) else None


def _rate(rps: float) -> str:
    return f"{rps:.3g}"
