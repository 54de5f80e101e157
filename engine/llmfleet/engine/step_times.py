"""How long the scheduler's steps take, with blocks being copied and without, and how many blocks the next may copy."""

from __future__ import annotations

from collections.abc import Callable

_LONGEST_STEP_S = 5.0
"""Longer pauses are an engine that had nothing to do."""
_WEIGHT = 0.1


class StepTimes:
    """Told of each step when it is planned; a step lasts until the next is."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._planned_s: float | None = None
        self._copied = 0
        self.mean_s = 0.0
        self.blocks = 4

    def planned(self, has_tokens: bool, copied: int) -> None:
        """A step with or without tokens, in which so many blocks are copied."""
        now_s = self._clock()
        if self._planned_s is not None and now_s - self._planned_s < _LONGEST_STEP_S:
            took_s = now_s - self._planned_s
            self.mean_s = took_s if not self.mean_s else self.mean_s + _WEIGHT * (took_s - self.mean_s)
        self._planned_s = now_s if has_tokens else None
        self._copied = copied
