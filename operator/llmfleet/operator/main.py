"""`llmfleet operator`: wait for the Lease, act while it is held, end cleanly.

The process ends, and is started again by whoever runs it, when another replica took the Lease or when a part crashed:
starting is cheap and always right, since nothing is kept only in memory. On SIGTERM and SIGINT the Lease is given up,
so that a standby need not wait for it to expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any

import httpx2
import uvloop
from lightkube import AsyncClient

from llmfleet.operator import health, logs
from llmfleet.operator.controllers import OperatorState, run_controllers
from llmfleet.operator.garbage import collect_garbage
from llmfleet.operator.leader import LeaderElector, LeadershipLostError
from llmfleet.operator.loop_lag import watch_lag
from llmfleet.operator.metrics import Metrics
from llmfleet.operator.model import FIELD_MANAGER
from llmfleet.operator.settings import OperatorSettings

log = logging.getLogger(__name__)

API_TIMEOUT_S = 20.0
SWITCH_INTERVAL_S = 0.0005
"""How long a thread that computes keeps the interpreter from one that waits for it; Python's own is ten times as long.
Each call of the event loop that lets go of it (a read, a write, a log line) may cost as much while kopf's thread is
busy, and one turn of the loop has dozens of them."""


def run(settings: OperatorSettings) -> None:
    """Runs the operator until it is told to end. Raises SystemExit(1) when it has to be started again."""
    logs.configure(settings.log_format, settings.log_level)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if not uvloop.run(_main(settings)):
        raise SystemExit(1)


async def _main(settings: OperatorSettings) -> bool:
    """Returns whether it ended because it was told to."""
    told_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_end.set)

    client = AsyncClient(field_manager=FIELD_MANAGER, timeout=httpx2.Timeout(API_TIMEOUT_S))
    elector = LeaderElector(client, settings.namespace, settings.identity)
    state = OperatorState(elector)
    metrics = Metrics(state)
    async with health.serve(
        settings.listen_host, settings.listen_port, state.not_alive, state.not_ready, metrics.exposition
    ):
        housekeeping = (
            asyncio.create_task(watch_lag(metrics.observe_loop_lag), name="loop-lag"),
            asyncio.create_task(collect_garbage(), name="garbage"),
        )
        try:
            if await _unless(told_to_end, elector.acquire()):
                return True
            state.elected = True
            return await _unless(told_to_end, _act(client, settings, state, metrics))
        except* LeadershipLostError as lost:
            log.error("no longer leader", extra={"cause": str(lost.exceptions[0])})
        except* Exception:
            log.exception("a part of the operator crashed")
        finally:
            for task in housekeeping:
                task.cancel()
            await elector.release()
            await client.close()
    return False


async def _act(client: AsyncClient, settings: OperatorSettings, state: OperatorState, metrics: Metrics) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(state.elector.keep(), name="lease")
        tasks.create_task(run_controllers(client, settings, state, metrics), name="controllers")


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Runs `work` to its end, or cancels it when the event is set; returns whether it was cancelled."""
    waiting, running = asyncio.create_task(event.wait()), asyncio.create_task(work)
    try:
        await asyncio.wait((waiting, running), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
            return False
        return True
    finally:
        for task in (waiting, running):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
