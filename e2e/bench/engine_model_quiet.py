"""How much of the machine others use while something is measured.

An engine that shares its core is slower, and a fit would believe it. So engine and client go first where we may say so
(root), and each measurement says how many cores were busy with anything but them, a hypervisor's theft included; a
disturbed one is repeated, and the less disturbed counts. What interference does to a figure is never corrected for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

QUIET_CORES = 0.08
"""Others may use this much without a repetition."""
TRIES = 2
_NICENESS = -15
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """A result, and how many cores others used meanwhile."""

    value: T
    others_cores: float


def go_first(sessions: Iterable[int]) -> bool:
    """Puts the processes of these sessions before others on their cores. False if that is not allowed.

    Linux shares a core out among sessions before it does among processes, where `sched_autogroup_enabled` is set; so it
    is the session's niceness that counts.
    """
    try:
        for session in sessions:
            Path(f"/proc/{session}/autogroup").write_text(f"{_NICENESS}\n")
            os.setpriority(os.PRIO_PGRP, session, _NICENESS)
    except OSError:
        return False
    return True


async def least_disturbed(measure: Callable[[], Awaitable[T]], session: int) -> Measured[T]:
    """The result of `measure` from the try that others disturbed least; the first quiet one ends it.

    session: whose processes, beside this one, are the measurement's own (an engine's leading process).
    """
    best: Measured[T] | None = None
    for _ in range(TRIES):
        found = await disturbed(measure, [session])
        if best is None or found.others_cores < best.others_cores:
            best = found
        if found.others_cores <= QUIET_CORES:
            break
    assert best is not None
    return best


async def disturbed(measure: Callable[[], Awaitable[T]], sessions: Collection[int]) -> Measured[T]:
    """The result of `measure` at the first try, however disturbed. sessions: as in `least_disturbed`, of several."""
    started, busy, own = time.monotonic(), _busy_s(), _own_s(sessions)
    value = await measure()
    seconds = time.monotonic() - started
    return Measured(value, max(0.0, (_busy_s() - busy) - (_own_s(sessions) - own)) / seconds)


def _busy_s() -> float:
    """Time of all cores that was neither idle nor waiting for a disk, in seconds since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def _own_s(sessions: Collection[int]) -> float:
    """CPU time so far of this process and of all in the sessions, in seconds."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(entry.name) == os.getpid() or int(fields[3]) in sessions:
                    total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total
