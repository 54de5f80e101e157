"""One service's part of the program, reduced to numbers: what is left of an LLMService once names, units and policies
are applied. The decomposition (`fleet`) reasons about these, the program (`program`) is built from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from llmfleet.placement.performance import FloatArray
from llmfleet.placement.solver import Loss, Service
from llmfleet.placement.solver.stages import WHOLE, Stage, served_share

Replicas = tuple[int, ...]
"""Replicas by variant, in the order of the program's variants."""
LEAST_PRICE_PER_DEVICE = 1e-4
"""Price per hour that is at least reckoned with when deciding: of devices that cost nothing, too, no more are taken
than are needed. Lower prices count as equal; HiGHS tells objectives apart to 1e-6."""

STAGE_PREMIUM = 0.02
"""Share of their cost by which replicas of one stage count as dearer than they are. Two kinds of engines and a network
between them are more to run than one kind: they have to save something."""


@dataclass(frozen=True)
class PoolLoss:
    """GPU types that may be lost together, and what a service has to keep serving without them."""

    types: frozenset[str]
    """Names of the GPU types."""
    keep: float
    """Share of its demand, in every bucket, above 0 and at most 1."""
    utilization: float
    """Share of what replicas hold that the program plans for: after a loss they may be used up."""
    field: str
    """Of the LLMService, which asks for it."""


@dataclass(frozen=True, eq=False)
class ServiceProgram:
    """One service's part of the program, reduced to numbers. Buckets without demand, and those that no variant
    serves within the objective, are left out. What follows from the numbers is computed once: most programs stay what
    they are from plan to plan."""

    key: str
    """`namespace/name`."""
    priority: int
    """Higher is served first."""
    rates: FloatArray
    """Requests per second, shape (buckets,), all positive."""
    throughput: FloatArray
    """Planned requests per second of one further replica (capacity, its margin, the utilisation target), shape
    (buckets, variants)."""
    cost: FloatArray
    """Cost per replica-hour, shape (variants,)."""
    devices: tuple[int, ...]
    """Devices per replica, by variant."""
    types: tuple[str, ...]
    """GPU type, by variant."""
    minimum: int
    """Fewest replicas of all variants together."""
    maximum: int | None
    """Most replicas of all variants together."""
    previous: Replicas | None = None
    """Replicas of the plan in force; None without one: then nothing is charged for switching."""
    switching: float = 0.0
    """Price of one replica more or less, as a share of its cost."""
    distinct: int | None = None
    """Most variants with replicas."""
    reserve: FloatArray | None = None
    """Replicas' worth of capacity that a variant in use loses once, 0 to 1, shape (variants,); None: nothing."""
    shared: Mapping[str, FloatArray] = field(default_factory=dict)
    """What a replica takes of each row that is shared beside devices, by the row's name, shape (variants,)."""
    losses: tuple[PoolLoss, ...] = ()
    """What it has to survive, one at a time."""
    stage: Stage | None = None
    """By variant, what it serves of a request (`solver.stages`); None: all of it."""

    def served(self, x: FloatArray) -> FloatArray:
        """The share of every bucket that is served by shares x, shape (buckets, variants)."""
        return served_share(x, self.stage)

    @property
    def unbounded(self) -> bool:
        """Whether the service itself sets no bounds on its replicas."""
        return self.minimum == 0 and self.maximum is None and self.distinct is None

    @cached_property
    def charged(self) -> FloatArray:
        """What a replica-hour counts for in a decision, shape (variants,): its cost, or a little where it is free; more
        where it serves one stage only."""
        charged = np.maximum(self.cost, LEAST_PRICE_PER_DEVICE * np.array(self.devices))
        return charged if self.stage is None else charged * np.where(self.stage == WHOLE, 1.0, 1.0 + STAGE_PREMIUM)

    @cached_property
    def held_back(self) -> FloatArray:
        """`reserve`, zero where there is none."""
        return np.zeros(len(self.types)) if self.reserve is None else self.reserve

    def capacity(self, replicas: Replicas) -> FloatArray:
        """Replicas' worth of capacity after the reserve, shape (variants,)."""
        counts = np.array(replicas, dtype=np.float64)
        return np.maximum(counts - self.held_back, 0.0)

    @cached_property
    def need(self) -> Replicas:
        """By variant, the replicas that would serve alone all that the variant can serve."""
        if not self.rates.size:
            return (0,) * len(self.types)
        possible = self.throughput > 0
        load = np.divide(self.rates[:, None], self.throughput, out=np.zeros_like(self.throughput), where=possible)
        return tuple(
            ceil(total + held) if total > 0 else 0
            for total, held in zip(load.sum(axis=0).tolist(), self.held_back.tolist(), strict=True)
        )

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """Names of the rows that replicas take something of: GPU types, and what is shared beside them."""
        return (*sorted(set(self.types)), *(name for name, amounts in self.shared.items() if amounts.any()))

    def room(self, variant: int, limits: Mapping[str, float]) -> int:
        """The most replicas of one variant for which `limits`, by row, suffice."""
        bound = int(limits[self.types[variant]]) // self.devices[variant]
        for name, amounts in self.shared.items():
            if amounts[variant] > 0:
                bound = min(bound, math.floor(limits[name] / float(amounts[variant]) * (1 + 1e-9)))
        return bound

    def upper(self, limits: Mapping[str, float] | None) -> Replicas:
        """By variant, the most replicas that can be of use, within `limits` by row if given."""
        bounds = []
        for v, need in enumerate(self.need):
            bound = max(need, self.minimum)
            if self.maximum is not None:
                bound = min(bound, self.maximum)
            if limits is not None:
                bound = min(bound, self.room(v, limits))
            bounds.append(bound)
        return tuple(bounds)

    def cost_of(self, replicas: Replicas) -> float:
        """Cost per hour."""
        return float(np.dot(self.cost, replicas))

    def objective(self, replicas: Replicas) -> float:
        """What a solve minimises: the charged cost per hour with the price of switching from the previous replicas."""
        total = float(np.dot(self.charged, replicas))
        if self.previous is not None:
            moved = np.abs(np.subtract(replicas, self.previous))
            total += self.switching * float(np.dot(self.charged, moved))
        return total

    def use(self, replicas: Replicas) -> dict[str, int]:
        """Devices by type."""
        used: dict[str, int] = {}
        for gpu_type, per_replica, count in zip(self.types, self.devices, replicas, strict=True):
            used[gpu_type] = used.get(gpu_type, 0) + per_replica * count
        return used

    def takes(self, replicas: Replicas) -> dict[str, float]:
        """What replicas take of every row: devices by type, and of what is shared beside them."""
        taken: dict[str, float] = {**self.use(replicas)}
        for name, amounts in self.shared.items():
            taken[name] = float(np.dot(amounts, replicas))
        return taken

    @cached_property
    def _after(self) -> dict[PoolLoss, ServiceProgram]:
        return {}

    def after(self, loss: PoolLoss) -> ServiceProgram:
        """The same once a loss has happened: without its variants, what has to be kept as demand, all headroom used."""
        known = self._after.get(loss)
        if known is None:
            known = self._after[loss] = self._left_by(loss)
        return known

    def _left_by(self, loss: PoolLoss) -> ServiceProgram:
        gone = np.array([name in loss.types for name in self.types])
        throughput = np.where(gone[None, :], 0.0, self.throughput / loss.utilization)
        return replace(self, rates=loss.keep * self.rates, throughput=throughput, losses=())

    def exposed(self, variant: int) -> bool:
        """Whether some loss takes this variant away."""
        return any(self.types[variant] in loss.types for loss in self.losses)

    def missing(self, replicas: Replicas) -> int:
        """Replicas missing to the minimum."""
        return max(0, self.minimum - sum(replicas))

    def allows(self, replicas: Replicas) -> bool:
        """Whether these replicas are within the service's own bounds."""
        few = self.distinct is None or sum(count > 0 for count in replicas) <= self.distinct
        return few and self.missing(replicas) == 0 and (self.maximum is None or sum(replicas) <= self.maximum)

    @cached_property
    def short_rps(self) -> dict[Replicas, float]:
        """What replicas leave short, in requests per second, of those that somebody has routed (`fleet`)."""
        return {}

    @cached_property
    def _numbers(self) -> dict[tuple[str, ...], Service]:
        return {}

    def numbers(self, rows: Sequence[str]) -> Service:
        """The same for the solver, whose rows these are."""
        known = self._numbers.get(tuple(rows))
        if known is None:
            known = self._numbers[tuple(rows)] = self._numbered(rows)
        return known

    def _numbered(self, rows: Sequence[str]) -> Service:
        use = np.zeros((len(rows), len(self.types)))
        for v, (gpu_type, devices) in enumerate(zip(self.types, self.devices, strict=True)):
            use[rows.index(gpu_type), v] = devices
        for name, amounts in self.shared.items():
            use[rows.index(name)] = amounts
        return Service(
            key=self.key,
            priority=self.priority,
            rates=self.rates,
            throughput=self.throughput,
            cost=self.charged,
            use=use,
            minimum=self.minimum,
            maximum=self.maximum,
            distinct=self.distinct,
            previous=self.previous,
            reserve=self.reserve,
            switching=None if self.previous is None else self.switching * self.charged,
            losses=tuple(
                Loss(np.array([name in loss.types for name in self.types]), loss.keep * loss.utilization)
                for loss in self.losses
            ),
            stage=self.stage,
        )

    @cached_property
    def enough(self) -> dict[str, float]:
        """The most of every row that it can make use of."""
        return self.takes(self.upper(None))

    @cached_property
    def relaxed(self) -> ServiceProgram:
        """The same without bounds on its replicas."""
        return self if self.unbounded else replace(self, minimum=0, maximum=None, distinct=None)

    @cached_property
    def unmoved(self) -> ServiceProgram:
        """The same where change has no price."""
        return replace(self, previous=None, switching=0.0)

    @cached_property
    def served_by(self) -> tuple[object, ...]:
        """Equal for programs that the same replicas serve in the same way."""
        reserve = None if self.reserve is None else self.reserve.tobytes()
        return self.rates.tobytes(), self.throughput.tobytes(), reserve, self._stage_bytes

    @cached_property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for programs with equal answers."""
        return (
            self.rates.tobytes(),
            self.throughput.tobytes(),
            self.cost.tobytes(),
            self.devices,
            self.types,
            self.minimum,
            self.maximum,
            self.distinct,
            self.previous,
            self.switching,
            None if self.reserve is None else self.reserve.tobytes(),
            tuple((name, amounts.tobytes()) for name, amounts in self.shared.items()),
            self.losses,
            self._stage_bytes,
        )

    @property
    def _stage_bytes(self) -> bytes | None:
        return None if self.stage is None else self.stage.tobytes()


def ceil(value: float) -> int:
    """Rounds up, forgiving what floating point adds to a whole number."""
    return math.ceil(value * (1 - 1e-9))
