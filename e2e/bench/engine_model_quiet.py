"""How much of the machine others use while something is measured.

An engine that shares its core is slower, and a fit would believe it. So each measurement says how many cores were
busy with anything but the engine and its client, a hypervisor's theft included; a disturbed one is repeated, and of
all tries the least disturbed counts. Interference is only ever seen, never corrected for.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

QUIET_CORES = 0.08
"""Others may use this much without a repetition."""
TRIES = 6
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured(Generic[T]):
    """A result, and how many cores others used meanwhile."""

    value: T
    others_cores: float


async def least_disturbed(measure: Callable[[], Awaitable[T]], session: int) -> Measured[T]:
    """The result of `measure` from the try that others disturbed least; the first quiet one ends it.

    session: whose processes, beside this one, are the measurement's own (an engine's leading process).
    """
    best: Measured[T] | None = None
    for _ in range(TRIES):
        started, busy, own = time.monotonic(), _busy_s(), _own_s(session)
        value = await measure()
        seconds = time.monotonic() - started
        others = max(0.0, (_busy_s() - busy) - (_own_s(session) - own)) / seconds
        if best is None or others < best.others_cores:
            best = Measured(value, others)
        if others <= QUIET_CORES:
            break
    assert best is not None
    return best


def _busy_s() -> float:
    """Time of all cores that was neither idle nor waiting for a disk, in seconds since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) * _TICK_S


def _own_s(session: int) -> float:
    """CPU time so far of this process and of all in a session, in seconds."""
    total = 0.0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has just ended
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(entry.name) == os.getpid() or int(fields[3]) == session:
                    total += (int(fields[11]) + int(fields[12])) * _TICK_S
    return total
