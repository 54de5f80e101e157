"""The numeric problem: what is left of a fleet once names, units and policies are applied.

Services (rates by size bucket, what a replica of each variant does in a bucket, cost, limits) share `rows`: devices of
a type, budget, watts, quota are all the same here, a right-hand side that replicas use up. For service s, bucket b,
variant v, with integer replicas y and shares x, u of a bucket's demand that are served and not served:

    sum_v x[b,v] + u[b] = 1
    sum_b load[b,v] x[b,v] <= y[v] - reserve[v] [y[v] > 0]       load[b,v] = rate[b] / throughput[b,v]
    minimum - m <= sum_v y[v] <= maximum,  at most `distinct` variants in use
    sum_s use_s y_s <= limits                                     the only rows that couple services

A service may have to survive **losses**: with the variants of a loss gone, what is left of y is to serve a given share
of every bucket. Replicas are bought so that each loss is survived alone, and the worst one counts: what it would leave
unserved is *at risk*, and a service's shortage is

    unserved + AT_RISK x at risk                                  both as shares of its demand

so that demand is served first, and protected next. A service without losses is the same program as ever.

A service may have variants that serve one of two **stages** of a request only (`stages`).

Numbers that no plan can be made of (NaN, negative, wrong shape) are refused here, once, naming the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from llmfleet.placement.solver.stages import FIRST, SECOND, Stage

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Replicas = tuple[int, ...]
"""Replicas by variant."""

LEAST_LOAD = 1e-5
"""Least load that a bucket with demand counts for, in replicas. HiGHS takes a replica of 1e-6 for none, so a request a
week would else be planned without any."""
MOST_REPLICAS = 10_000_000
"""More replicas of one variant are taken for a mistake in the input."""

AT_RISK = 0.1
"""What demand at risk counts for beside demand that is not served at all. Small, so that none goes unserved to protect
another, except where ten times as much would be at risk; large against the gaps to which shortages are found."""


def whole(value: float) -> int:
    """Rounds up, forgiving what floating point adds to a whole number."""
    return math.ceil(value * (1 - 1e-9))


@dataclass(frozen=True, eq=False)
class Loss:
    """Variants that may be lost together, and what the others must hold then."""

    lost: Mask
    """Which variants, shape (variants,)."""
    keep: float
    """Load to serve without them, as a share of the service's load in every bucket: above 0, at most 1."""


@dataclass(frozen=True, eq=False)
class Service:
    """One service. Buckets without demand are left out by the caller."""

    key: str
    priority: int
    """Higher is served first, strictly."""
    rates: Array
    """Requests per second, shape (buckets,), all positive."""
    throughput: Array
    """Requests per second of one replica, shape (buckets, variants); 0 where it never meets the objective."""
    cost: Array
    """Cost per replica-hour, shape (variants,)."""
    use: Array
    """What a replica uses up of each row, shape (rows, variants)."""
    minimum: int = 0
    """Fewest replicas of all variants together; a miss is counted, not forbidden."""
    maximum: int | None = None
    """Most replicas of all variants together."""
    distinct: int | None = None
    """Most variants in use at once."""
    previous: Replicas | None = None
    """Replicas in force; None: nothing is charged for change."""
    switching: Array | None = None
    """Price of one replica more or less, shape (variants,)."""
    reserve: Array | None = None
    """Replicas' worth of capacity that a variant in use loses once, shape (variants,)."""
    losses: tuple[Loss, ...] = ()
    """What it has to survive, one at a time."""
    stage: Stage | None = None
    """By variant, what it serves of a request, shape (variants,); None: all of it."""

    def __post_init__(self) -> None:
        variants = len(self.cost)
        shapes = {
            "rates": (len(self.rates),),
            "throughput": (len(self.rates), variants),
            "cost": (variants,),
            "use": (self.use.shape[0], variants),
            "switching": (variants,),
            "reserve": (variants,),
            "stage": (variants,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != shape:
                raise ValueError(f"{self.key}: {name} has shape {value.shape}, expected {shape}")
            if not np.isfinite(value).all() or (value < 0).any():
                bad = value[~(np.isfinite(value) & (value >= 0))].flat[0]
                raise ValueError(f"{self.key}: {name} holds {bad}; finite numbers from 0 up are accepted")
        if variants == 0:
            raise ValueError(f"{self.key}: cost is empty; a service needs at least one variant")
        if (self.rates <= 0).any():
            raise ValueError(f"{self.key}: rates holds 0; leave out buckets without demand")
        if self.minimum < 0 or (self.maximum is not None and self.maximum < 0):
            raise ValueError(f"{self.key}: minimum {self.minimum}, maximum {self.maximum}; 0 and more are accepted")
        if self.distinct is not None and self.distinct < 1:
            raise ValueError(f"{self.key}: distinct is {self.distinct}; 1 and more are accepted")
        if self.previous is not None and (len(self.previous) != variants or min(self.previous) < 0):
            raise ValueError(f"{self.key}: previous is {self.previous}; {variants} counts from 0 up are accepted")
        if self.stage is not None and (self.stage > SECOND).any():
            raise ValueError(f"{self.key}: stage holds {self.stage.max()}; 0, {FIRST} and {SECOND} are accepted")
        for loss in self.losses:
            if loss.lost.shape != (variants,):
                raise ValueError(f"{self.key}: lost has shape {loss.lost.shape}, expected ({variants},)")
            if not 0 < loss.keep <= 1:
                raise ValueError(f"{self.key}: keep is {loss.keep}; above 0 and at most 1 is accepted")

    @property
    def variants(self) -> int:
        """Number of variants."""
        return len(self.cost)

    @cached_property
    def demand(self) -> float:
        """Requests per second over all buckets."""
        return float(self.rates.sum())

    @cached_property
    def load(self) -> Array:
        """Replicas that a whole bucket occupies, shape (buckets, variants); infinite where never served."""
        possible = self.throughput > 0
        with np.errstate(over="ignore"):
            load = np.divide(
                self.rates[:, None], self.throughput, out=np.full_like(self.throughput, np.inf), where=possible
            )
        return np.maximum(load, LEAST_LOAD)

    def load_without(self, loss: Loss) -> Array:
        """What has to be served after a loss, in replicas by whole bucket, shape (buckets, variants); infinite where
        never served, or not any more."""
        load: Array = np.where(loss.lost[None, :], np.inf, np.maximum(loss.keep * self.load, LEAST_LOAD))
        return load

    @cached_property
    def held_back(self) -> Array:
        """`reserve`, zero where there is none."""
        return np.zeros(self.variants) if self.reserve is None else self.reserve

    @cached_property
    def change(self) -> Array:
        """`switching`, zero where nothing is charged."""
        if self.switching is None or self.previous is None:
            return np.zeros(self.variants)
        return self.switching

    @cached_property
    def need(self) -> Replicas:
        """By variant, the replicas that would serve alone all that it can serve."""
        finite = np.where(np.isfinite(self.load), self.load, 0.0).sum(axis=0)
        return tuple(
            min(MOST_REPLICAS, whole(total + held)) if total > 0 else 0
            for total, held in zip(finite.tolist(), self.held_back.tolist(), strict=True)
        )

    @cached_property
    def least(self) -> Replicas:
        """By variant, the fewest replicas with which it is of use at all."""
        return tuple(max(1, whole(held)) for held in self.held_back.tolist())

    def most(self, limits: Array) -> Replicas:
        """By variant, the most replicas that can be of use within the rows' limits."""
        bounds = []
        for v, need in enumerate(self.need):
            bound = max(need, self.minimum, 0 if self.previous is None else self.previous[v])
            if self.maximum is not None:
                bound = min(bound, self.maximum)
            for row in np.flatnonzero(self.use[:, v] > 0).tolist():
                bound = min(bound, math.floor(limits[row] / self.use[row, v] * (1 + 1e-9)))
            bounds.append(bound)
        return tuple(bounds)

    def capacity(self, replicas: Array) -> Array:
        """Replicas' worth of capacity after the reserve, shape (..., variants)."""
        capacity: Array = np.where(replicas > 0, np.maximum(replicas - self.held_back, 0.0), 0.0)
        return capacity

    def missing(self, replicas: Replicas) -> int:
        """Replicas missing to the minimum."""
        return max(0, self.minimum - sum(replicas))

    def charge(self, replicas: Array) -> Array:
        """Cost per hour with the price of change, shape (...,) for replicas of shape (..., variants)."""
        cost: Array = replicas @ self.cost
        if self.previous is not None:
            cost = cost + np.abs(replicas - np.array(self.previous, dtype=np.float64)) @ self.change
        return cost

    def allows(self, replicas: Replicas, limits: Array) -> bool:
        """Whether the service's own limits, and the rows if it had them to itself, hold."""
        used = [count for count in replicas if count]
        if self.maximum is not None and sum(used) > self.maximum:
            return False
        if self.distinct is not None and len(used) > self.distinct:
            return False
        if any(0 < count < least for count, least in zip(replicas, self.least, strict=True)):
            return False
        return bool((self.use @ np.array(replicas, dtype=np.float64) <= limits * (1 + 1e-9) + 1e-9).all())


@dataclass(frozen=True)
class WholeNodes:
    """A row of devices that are paid for by the node (`nodes`)."""

    row: int
    """Index of the row that counts these devices."""
    size: int
    """Devices of a node."""
    price: float
    """Of an idle device, per hour; what services are charged for a device is the price of one in use."""
    takes: tuple[tuple[int, float], ...] = ()
    """What an idle device takes of other rows, by index."""
    held: tuple[tuple[int, int], ...] = ()
    """(devices of a replica, replicas) that are not planned here and stand on such nodes."""


@dataclass(frozen=True, eq=False)
class Problem:
    """Services and the rows that they share."""

    services: tuple[Service, ...]
    rows: tuple[str, ...]
    """Names of the rows, for messages."""
    limits: Array
    """Right-hand sides, shape (rows,)."""
    nodes: tuple[WholeNodes, ...] = ()
    """Devices that are paid for by the node."""

    def __post_init__(self) -> None:
        if self.limits.shape != (len(self.rows),):
            raise ValueError(f"limits has shape {self.limits.shape}, expected ({len(self.rows)},)")
        for name, limit in zip(self.rows, self.limits.tolist(), strict=True):
            if not math.isfinite(limit) or limit < 0:
                raise ValueError(f"limit of {name} is {limit}; finite numbers from 0 up are accepted")
        for one in self.nodes:
            if one.size < 1 or not math.isfinite(one.price) or one.price < 0:
                raise ValueError(
                    f"nodes of {self.rows[one.row]} have {one.size} devices at {one.price}; 1 and more at finite "
                    "prices from 0 up are accepted"
                )
        keys = [service.key for service in self.services]
        if len(set(keys)) != len(keys):
            raise ValueError(f"services: {next(k for k in keys if keys.count(k) > 1)} is given more than once")
        for service in self.services:
            if service.use.shape[0] != len(self.rows):
                raise ValueError(
                    f"{service.key}: use has {service.use.shape[0]} rows, the problem has {len(self.rows)}"
                )

    def used(self, replicas: tuple[Replicas, ...]) -> Array:
        """What is used up of each row, shape (rows,)."""
        total = np.zeros(len(self.rows))
        for service, counts in zip(self.services, replicas, strict=True):
            total += service.use @ np.array(counts, dtype=np.float64)
        return total

    def fits(self, replicas: tuple[Replicas, ...]) -> bool:
        """Whether no row is over its limit."""
        return bool((self.used(replicas) <= self.limits * (1 + 1e-9) + 1e-9).all())
