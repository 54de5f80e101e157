"""`/healthz`, `/readyz` and `/metrics`.

Alive means: this event loop answers (it is the one that reconciles and renews the Lease), and kopf's loop took a turn
lately. A standby without kopf is alive by the first alone. Ready means: this replica is where it should be, a standby
that waits for the Lease or a leader whose caches are complete. Answers say what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from aiohttp import web

log = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""What is wrong, in words; None when nothing is."""


@contextlib.asynccontextmanager
async def serve(
    host: str, port: int, alive: Check, ready: Check, exposition: Callable[[], bytes]
) -> AsyncIterator[int]:
    """Serves as long as the context lasts. Gives the port, which is a free one where 0 was asked for."""

    def answer(check: Check) -> web.Response:
        problem = check()
        return web.Response(text="ok\n") if problem is None else web.Response(text=f"{problem}\n", status=503)

    async def healthz(_: web.Request) -> web.Response:
        return answer(alive)

    async def readyz(_: web.Request) -> web.Response:
        return answer(ready)

    async def metrics(_: web.Request) -> web.Response:
        # In a thread: written in one piece, the samples of a large fleet would stall the event loop.
        body = await asyncio.to_thread(exposition)
        return web.Response(body=body, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound = int(runner.addresses[0][1])
        log.info("serving health and metrics", extra={"host": host, "port": bound})
        yield bound
    finally:
        await runner.cleanup()
