"""How late the event loop is: the time by which whatever is due has to wait for its turn.

    a task sleeps INTERVAL_S, over and over --> Lag of each waking --> histogram, and the longest of the window

Leases are renewed, probes answered and services reconciled by one event loop, so a piece of work that keeps it for
long delays all of them. That shows nowhere else: its CPU time looks the same in one piece and in a hundred. Work of
other threads shows too where it holds the interpreter, and so does a machine or a CPU limit that gives the process no
turn, which from outside is the same. To tell them apart, a lag comes with the CPU time that was used meanwhile: what
the loop's own thread did not compute was somebody else's, and what no thread of the process computed was the machine's.

A stall of S seconds begins at any moment of a sleep and is seen as S - INTERVAL_S to S.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Lag:
    """How late one waking was, in seconds of wall time."""

    seconds: float
    loop_cpu_s: float
    """The part in which the loop's own thread can have computed: its CPU time since it went to sleep, or all of it."""
    process_cpu_s: float
    """The same of all threads of the process."""


async def watch_lag(
    record: Callable[[Lag], None],
    clock: Callable[[], float] = time.monotonic,
    loop_cpu_clock: Callable[[], float] = time.thread_time,
    process_cpu_clock: Callable[[], float] = time.process_time,
) -> None:
    """Records the running loop's lag, for ever."""
    while True:
        asked_at, loop_cpu_at, process_cpu_at = clock(), loop_cpu_clock(), process_cpu_clock()
        await asyncio.sleep(INTERVAL_S)
        late_s = max(0.0, clock() - asked_at - INTERVAL_S)
        loop_cpu_s, process_cpu_s = loop_cpu_clock() - loop_cpu_at, process_cpu_clock() - process_cpu_at
        record(Lag(late_s, min(late_s, loop_cpu_s), min(late_s, process_cpu_s)))
