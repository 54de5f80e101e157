"""How late the event loop is: the time by which whatever is due has to wait for its turn.

    a task sleeps INTERVAL_S, over and over --> Lag of each waking --> histogram, and the longest of the window

Leases are renewed, probes answered and services reconciled by one event loop, so a piece of work that keeps it for
long delays all of them. That shows nowhere else: its CPU time looks the same in one piece and in a hundred. Work of
other threads shows too where it holds the interpreter, and so does a machine or a CPU limit that gives the process no
turn, which from outside is the same. To tell them apart, a lag comes with what the kernel knows of the time: how long
the loop's thread computed, how long all threads did, and how long threads wanted a core and had none (`run_delays`).
A lag less that wait is our own (`Lag.own_s`): the loop computed, or waited for another thread of ours that did.

A stall of S seconds begins at any moment of a sleep and is seen as S - INTERVAL_S to S.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
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
    delayed_s: float = 0.0
    """The part in which the process can have waited for a core: the loop's thread, or, while that waited for another
    thread of ours, that one."""

    @property
    def own_s(self) -> float:
        """The part that the process would have needed on a machine of its own."""
        return self.seconds - self.delayed_s


class RunDelays:
    """How long threads of this process have wanted a core and had none, as Linux counts it; nothing where it does not.

    Only Python's threads, which can hold the interpreter. Their files stay open: to read one is a few microseconds.
    Which threads there are is looked up now and then; they come and go seldom.
    """

    LOOK_EVERY = 100

    def __init__(self) -> None:
        self._files: dict[int, int] = {}
        self._reads = 0

    def read(self) -> dict[int, float]:
        """Seconds since its start by thread."""
        if self._reads % self.LOOK_EVERY == 0:
            self._look()
        self._reads += 1
        return {thread: delay for thread, file in self._files.items() if (delay := _delay_s(file)) is not None}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            os.close(file)
        self._files = {}

    def _look(self) -> None:
        threads = {thread.native_id for thread in threading.enumerate() if thread.native_id is not None}
        for gone in self._files.keys() - threads:
            os.close(self._files.pop(gone))
        for thread in threads - self._files.keys():
            with contextlib.suppress(OSError):
                self._files[thread] = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)


def _delay_s(file: int) -> float | None:
    """Second field of a `schedstat`, which is in nanoseconds; None of a thread that has ended."""
    try:
        return int(os.pread(file, 96, 0).split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return None


def delayed_s(late_s: float, loop_cpu_s: float, loop_delay_s: float, others_delay_s: float) -> float:
    """The part of a lag that a machine without a free core explains. While its thread neither computed nor waited for a
    core, the loop waited for another thread of ours (that held the interpreter), which may have waited for one."""
    waited_s = max(0.0, late_s - loop_cpu_s - loop_delay_s)
    return min(late_s, loop_delay_s + min(waited_s, others_delay_s))


async def watch_lag(
    record: Callable[[Lag], None],
    clock: Callable[[], float] = time.monotonic,
    loop_cpu_clock: Callable[[], float] = time.thread_time,
    process_cpu_clock: Callable[[], float] = time.process_time,
) -> None:
    """Records the running loop's lag, for ever."""
    loop_thread = threading.get_native_id()
    with contextlib.closing(RunDelays()) as delays:
        delays_at = delays.read()
        while True:
            asked_at, loop_cpu_at, process_cpu_at = clock(), loop_cpu_clock(), process_cpu_clock()
            await asyncio.sleep(INTERVAL_S)
            late_s = max(0.0, clock() - asked_at - INTERVAL_S)
            loop_cpu_s, process_cpu_s = loop_cpu_clock() - loop_cpu_at, process_cpu_clock() - process_cpu_at
            before, delays_at = delays_at, delays.read()
            waits = {thread: delay - before[thread] for thread, delay in delays_at.items() if thread in before}
            loop_delay_s = waits.pop(loop_thread, 0.0)
            record(
                Lag(
                    late_s,
                    min(late_s, loop_cpu_s),
                    min(late_s, process_cpu_s),
                    delayed_s(late_s, loop_cpu_s, loop_delay_s, sum(waits.values())),
                )
            )
