"""How long the scheduler's steps take, and how many blocks the next one may copy (`llmfleet.migration.governor`)."""

from __future__ import annotations

from collections.abc import Callable

from llmfleet.migration.governor import Governor, governor_step

_LONGEST_STEP_S = 5.0
"""Longer pauses are an engine that had nothing to do."""
_WEIGHT = 0.1


class StepTimes:
    """Told of each step when it is planned; a step lasts until the next is."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._planned_s = clock()
        self._busy = False
        self._copied = 0
        self._governor = Governor()
        self.mean_s = 0.0

    @property
    def blocks(self) -> int:
        """That the next step may copy."""
        return self._governor.blocks

    def planned(self, *, busy: bool, copied_blocks: int) -> None:
        """A step that computes tokens, or none, and copies so many blocks."""
        now_s = self._clock()
        took_s = now_s - self._planned_s
        if took_s < _LONGEST_STEP_S:
            self._governor = governor_step(self._governor, took_s, busy=self._busy, copied_blocks=self._copied)
            if self._busy:
                self.mean_s = took_s if not self.mean_s else self.mean_s + _WEIGHT * (took_s - self.mean_s)
        self._planned_s, self._busy, self._copied = now_s, busy, copied_blocks
