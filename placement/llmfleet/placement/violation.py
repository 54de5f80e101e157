"""What the checker says: one broken constraint, and how far a figure may be off before it is one.

The tolerances are wide of a solver's rounding and far below anything that matters, since a plan that is dropped for
nothing costs an operator its plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

LOAD_TOLERANCE = 1e-4
"""Of a variant's capacity, of a bucket's demand and of a gap: relative."""
MONEY_TOLERANCE = 1e-6
"""Of costs and watts: relative, and absolute below one."""
STAGE_PREMIUM = 0.02
"""Share of their cost by which replicas of one stage count as dearer in a bound, at most."""
FREE_DEVICE_PER_HOUR = 1e-4
"""What a device that costs nothing counts for in a bound, at most."""
LEAST_SHARE = 1e-6
"""Of a bucket's requests: a smaller share is left out of a routing table."""
RARE_SHARE = 0.5
"""Of those whom the percentile lets miss the objective: requests that a variant may get though it never keeps it."""
PROMISE_TOLERANCE = 1e-4
"""Of a share of requests that keep a target, and of predicted latencies: absolute and relative."""

Constraint = Literal[
    "coverage",
    "kept",
    "variant",
    "configuration",
    "stage",
    "replicas_min",
    "replicas_max",
    "variants_max",
    "devices",
    "budget",
    "power",
    "namespace",
    "buckets",
    "demand",
    "shares",
    "route",
    "load",
    "predicted",
    "unserved",
    "losses",
    "cost",
    "nodes",
    "watts",
    "bound",
    "gap",
    "status",
]


@dataclass(frozen=True)
class Violation:
    """One broken constraint."""

    constraint: Constraint
    """Which."""
    where: str
    """Service key, with variant or bucket where it is about one; GPU type; or `fleet`."""
    figure: float | str
    """What the plan says or does."""
    allowed: str
    """What would be right, in words and figures."""

    def __str__(self) -> str:
        figure = self.figure if isinstance(self.figure, str) else f"{self.figure:g}"
        return f"{self.constraint} of {self.where}: {figure}, allowed is {self.allowed}"


def money(constraint: Constraint, where: str, said: float, right: float) -> Iterator[Violation]:
    """A violation where an amount is not what it should be."""
    if not abs(said - right) <= MONEY_TOLERANCE * max(1.0, abs(right)):
        yield Violation(constraint, where, said, f"{right:g}")
