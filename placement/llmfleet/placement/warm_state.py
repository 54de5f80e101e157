"""What one solve of a fleet decides, and what the next one may reuse.

    solve(fleet, WarmState) -> Outcome, WarmState of the next solve

Nothing of it is needed: without it a solve takes longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmfleet.placement.margins import Learnt
from llmfleet.placement.performance import FloatArray
from llmfleet.placement.service_program import Replicas
from llmfleet.placement.solver import Solver, StoppedBy

if TYPE_CHECKING:
    from llmfleet.placement.planner import Written
    from llmfleet.placement.preparations import Made
    from llmfleet.placement.rounds import Settled


@dataclass(frozen=True)
class Outcome:
    """What was decided for some services."""

    replicas: dict[str, Replicas]
    """By service key."""
    objective: float
    """Cost per hour with the price of switching."""
    bound: float | None
    """Proven lower bound of the objective at the least shortage; None if not proven."""
    gap_unserved: float = 0.0
    """Share of a priority's demand that is unserved and not proven to be unavoidable; the largest of them."""
    stopped_by: StoppedBy = "gap"


Assignment = tuple[FloatArray, FloatArray]


@dataclass(frozen=True)
class OtherSet:
    """The cheapest replicas of a service with another set of variants (`next_best`)."""

    room: Mapping[str, float]
    """What the service could use when they were looked for, by row."""
    replicas: Replicas | None
    """None where there were none."""
    plans: int
    """Plans since then for which there was more room."""


@dataclass
class WarmState:
    """What a solve may reuse from the last one: answers of single services and of components, routes, what was made of
    services that did not change, and whole solved components, into which a service that changes is put. Opaque: pass it
    back, or do not; losing it costs only time. With it a plan may be another one within the asked gap. Entries that one
    solve does not use are gone in the next, and a solved component goes from the state that is passed into the one that
    is returned."""

    joint: dict[tuple[object, ...], Outcome] = field(default_factory=dict)
    alone: dict[tuple[object, ...], Outcome] = field(default_factory=dict)
    routes: dict[tuple[object, ...], Assignment] = field(default_factory=dict)
    next_best: dict[tuple[object, ...], OtherSet] = field(default_factory=dict)
    lines: dict[str, Learnt] = field(default_factory=dict)
    """By service key, as the next three."""
    made: dict[str, Made] = field(default_factory=dict)
    settled: dict[str, Settled] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    solved: dict[tuple[str, ...], Solver] = field(default_factory=dict)
    """By the keys of a component's services."""
