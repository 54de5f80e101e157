"""What ends a solve: counts of work, so that equal inputs give equal plans on any machine. The clock is a brake."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StoppedBy = Literal["gap", "work_limit", "time_limit"]


@dataclass(frozen=True)
class Limits:
    """Work that one solve may do."""

    gap: float = 0.005
    """Relative gap to the proven bound at which a phase ends."""
    rounds: int = 14
    """Rounds of pricing per phase."""
    closing_rounds: int = 12
    """Joint programs of the closing step per phase."""
    closing_services: int = 20
    """Fleets up to this size are closed early, larger ones only when the rounds have stalled."""
    improving_rounds: int = 5
    """Times that the neighbours of the best plan are looked at per phase."""
    master_nodes: int = 400
    closing_nodes: int = 1500
    threads: int = 2

    @property
    def pricing(self) -> float:
        """Relative tolerance of the first round of pricing."""
        return min(3e-3, self.gap * 0.5)
