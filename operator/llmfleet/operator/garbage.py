"""Garbage collection in small pieces: what survives a full collection is not looked at again by the next.

A full collection visits every container object of the process while all threads wait: a tenth of a second and more
with a thousand services, whose records live for days. Reference counts free nearly everything here; the collector is
needed for what refers to itself (tasks, exceptions with their tracebacks). So the interpreter makes no full
collections by itself. They are made here, as soon as some thousand objects have grown old, and each ends by
freezing its survivors, which are no garbage at that moment. The next visits only what has come since. Frozen objects
are still freed by their reference counts.

What is frozen and *becomes* cyclic garbage later would stay for ever. So now and then, once in `THAW_INTERVAL_S`,
everything is thawed and visited, for the price of that one stall.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

LOOK_INTERVAL_S = 0.05
"""How often it is looked whether a collection is due: while a fleet is listed, 100,000 objects may come in a second."""
THAW_INTERVAL_S = 6 * 3600.0
OLD_ENOUGH = 1
"""Collections of the middle generation, of some 8,000 new objects each, after which a full one is made: ten
milliseconds."""
_NEVER = 2**31 - 1


async def collect_garbage(clock: Callable[[], float] = time.monotonic) -> None:
    """Makes the process's full collections until cancelled; then the interpreter does so again."""
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], _NEVER)
    # What was imported stays as long as the process.
    gc.freeze()
    thawed_at = clock()
    try:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            if clock() - thawed_at >= THAW_INTERVAL_S:
                thawed_at = clock()
                gc.unfreeze()
            elif gc.get_count()[2] < OLD_ENOUGH:
                continue
            gc.collect()
            gc.freeze()
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
