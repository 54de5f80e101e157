"""How late the event loop is: the time by which whatever is due has to wait for its turn.

    a task sleeps INTERVAL_S, over and over --> lateness of each waking --> histogram, and the longest of the window

Leases are renewed, probes answered and services reconciled by one event loop, so a piece of work that keeps it for
long delays all of them. That shows nowhere else: its CPU time looks the same in one piece and in a hundred. Work of
other threads shows too where it holds the interpreter, and so does a machine or a CPU limit that gives the process no
turn, which from outside is the same.

A stall of S seconds begins at any moment of a sleep and is seen as S - INTERVAL_S to S.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

INTERVAL_S = 0.010
"""Short beside the stalls that matter (50 ms); a hundred wakings a second cost a thousandth of a core."""
WINDOW_S = 30.0
"""How far back the longest lag is remembered: no shorter than the usual interval between two scrapes."""


class SlidingMaximum:
    """The largest of the values that were added within the last `window_s` seconds."""

    def __init__(self, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s = window_s
        self._clock = clock
        # Only values that no later one exceeds: they fall from left to right.
        self._candidates: deque[tuple[float, float]] = deque()

    def add(self, value: float) -> None:
        """Takes a value that was measured now."""
        while self._candidates and self._candidates[-1][1] <= value:
            self._candidates.pop()
        now = self._clock()
        self._candidates.append((now, value))
        while self._candidates[0][0] < now - self._window_s:
            self._candidates.popleft()

    def get(self) -> float:
        """The maximum; 0.0 where nothing was added within the window. May be asked from any thread."""
        oldest = self._clock() - self._window_s
        return next((value for added_at, value in tuple(self._candidates) if added_at >= oldest), 0.0)


async def watch_lag(record: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
    """Records the running loop's lag in seconds, for ever."""
    while True:
        asked_at = clock()
        await asyncio.sleep(INTERVAL_S)
        record(max(0.0, clock() - asked_at - INTERVAL_S))
