"""The queue between events and reconciles: a set of keys, each at most once, with back-off for those that fail.

An event says only *which* service to look at, never what happened, so a thousand events of one service are one
reconcile. A key that is being worked on and is added again is worked on once more afterwards, by no two workers at a
time. The rules are those of client-go's work queue.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 30.0


class WorkQueue:
    """Keys to reconcile. All methods belong to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ready: deque[str] = deque()
        self._queued: set[str] = set()
        self._active: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._delayed: list[tuple[float, int, str]] = []
        self._due: dict[str, float] = {}
        self._order = itertools.count()
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """Keys that wait for a worker, those with a delay not included."""
        return len(self._ready)

    def add(self, key: str) -> None:
        """Has the key worked on as soon as a worker is free."""
        if key in self._active:
            self._again.add(key)
        elif key not in self._queued:
            self._queued.add(key)
            self._ready.append(key)
            self._wake.set()

    def add_after(self, key: str, delay_s: float) -> None:
        """Has the key worked on after a delay, or sooner if something else adds it. The earliest wish counts."""
        due = self._clock() + delay_s
        if self._due.get(key, float("inf")) > due:
            self._due[key] = due
            heapq.heappush(self._delayed, (due, next(self._order), key))
            self._wake.set()

    async def get(self) -> str:
        """Takes the next key; the worker must call `done` or `failed` with it."""
        while True:
            wait_s = self._promote()
            if self._ready:
                key = self._ready.popleft()
                self._queued.discard(key)
                self._active.add(key)
                return key
            self._wake.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def done(self, key: str) -> None:
        """The key was worked on and needs no retry."""
        self._failures.pop(key, None)
        self._finish(key)

    def failed(self, key: str) -> float:
        """The work failed: the key comes back after a delay that doubles each time. Returns the delay in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        # Spread, or all keys that failed in one outage come back in one burst.
        delay_s = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(failures, 16)) * random.uniform(0.75, 1.25)
        # What was added in the meantime waits too: it would only fail the same way sooner.
        self._again.discard(key)
        self._active.discard(key)
        self.add_after(key, delay_s)
        return delay_s

    def _finish(self, key: str) -> None:
        self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _promote(self) -> float | None:
        """Moves keys whose delay is over to the ready ones; returns the seconds to the next, None if there is none."""
        now = self._clock()
        while self._delayed:
            due, _, key = self._delayed[0]
            if self._due.get(key) != due:
                heapq.heappop(self._delayed)
            elif due <= now:
                heapq.heappop(self._delayed)
                del self._due[key]
                self.add(key)
            else:
                return due - now
        return None
