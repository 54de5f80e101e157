"""A closed loop: `concurrency` clients, each sending its next request when the last one is answered.

Requests of one size that start together also end together, and every round would begin with all prompts at once,
which no independent users do. So the first request of each client, which also warms the engine up and is not counted,
is cut to another length: the clients then run evenly out of step, with all of them busy from the start.

The window opens when the last of these first requests is finished and closes with the request that makes it both
long enough and full enough. It begins and ends with a finished request, so requests divided by its length is an
unbiased rate however few they are.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from llmfleet.cli.profiling.engine import Completed

FEWEST_REQUESTS = 8
"""Least number of requests in a window, whatever it takes."""

Send = Callable[[int], Awaitable[Completed]]
"""Sends one request with so many output tokens."""


@dataclass(frozen=True)
class Window:
    """The requests that finished inside the window, and its length in seconds."""

    completed: list[Completed]
    seconds: float

    @property
    def requests_per_second(self) -> float:
        """Completed requests per second."""
        return len(self.completed) / self.seconds


async def closed_loop(send: Send, output_tokens: int, concurrency: int, seconds: float) -> Window:
    """Loads the engine until the window has lasted `seconds` and holds a request of every client.

    Raises what `send` raises, at once; requests that are still running at the end are cancelled.
    """
    completed: list[Completed] = []
    opened_s: float | None = None
    cold = concurrency
    full = asyncio.Event()
    fewest = max(FEWEST_REQUESTS, concurrency)

    async def client(index: int) -> None:
        nonlocal opened_s, cold
        warm_up = await send(max(2, math.ceil(output_tokens * (index + 1) / concurrency)))
        cold -= 1
        if cold == 0:
            opened_s = warm_up.finished_s
        while True:
            request = await send(output_tokens)
            if opened_s is not None:
                completed.append(request)
                if len(completed) >= fewest and request.finished_s - opened_s >= seconds:
                    full.set()
                    return

    clients = [asyncio.create_task(client(index)) for index in range(concurrency)]
    closing = asyncio.create_task(full.wait())
    try:
        done, _ = await asyncio.wait([closing, *clients], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in (closing, *clients):
            task.cancel()
        await asyncio.gather(closing, *clients, return_exceptions=True)
    assert opened_s is not None
    return Window(completed, max(request.finished_s for request in completed) - opened_s)
