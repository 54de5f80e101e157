"""One leg of a stream: the client's request as one engine answers it.

In: what the client asked (`Call`), an engine's URL, a request id. Out, by call-backs: what the answer grows by, that it
is complete, or that nothing more will come. The request's body goes to every engine unchanged; the id, by which an
engine knows a request that migrates, is a header, and in the Responses API a field beside the client's own.

Some text of an answer's last event is said only because the answer ends: what was held back lest it began a stop
string, or what a parser of tool calls had not let out. After a cut the answer does not end there, so for requests with
either, the texts of the last event are kept apart (`rest`) until it is known whether the answer ended. A response that
is not streamed is all rest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from e2e.migration.answer import Answer, Api, Growth, read_event, read_whole

REQUEST_ID = "X-Request-Id"
_LONGEST_EVENT_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Call:
    """What a client asked. body: without the engine's affairs, `stream` included where it wants a stream."""

    api: Api
    body: Mapping[str, Any]

    @property
    def streamed(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def holds_back(self) -> bool:
        """Whether the last event may say more than its token does."""
        return not self.streamed or any(self.body.get(name) for name in ("stop", "tools"))

    def sent(self, request: str) -> tuple[dict[str, str], dict[str, Any]]:
        """Headers and body under a request id."""
        if self.api is Api.RESPONSES:
            return {}, {**self.body, "request_id": request}
        return {REQUEST_ID: request}, dict(self.body)


@dataclass(eq=False)
class Leg:
    """An engine's answer as far as it has come. request: the id under which the engine knows it."""

    epoch: int
    engine: str
    request: str
    answer: Answer = field(default_factory=Answer)
    rest: Growth | None = None
    error: str | None = None
    refused: bool = False
    """The engine took the request for a bad one."""
    task: asyncio.Task[None] | None = None

    async def follow(
        self,
        session: aiohttp.ClientSession,
        url: str,
        call: Call,
        grown: Callable[[Leg], None],
        over: Callable[[Leg], None],
    ) -> None:
        """Send the request and read the answer to its end; `over` is called once, with `error` set if it broke."""
        headers, body = call.sent(self.request)
        try:
            async with session.post(url + call.api, json=body, headers=headers) as response:
                if response.status != 200:
                    self.refused = 400 <= response.status < 500
                    self.error = f"{response.status} {(await response.text())[:500]}"
                elif call.streamed:
                    await self._read_stream(response, call, grown)
                else:
                    self._last(read_whole(call.api, await response.json()), call)
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            self.error = f"{type(error).__name__}: {error}"
        over(self)

    async def _read_stream(self, response: aiohttp.ClientResponse, call: Call, grown: Callable[[Leg], None]) -> None:
        async for data in _events(response.content):
            if data == b"[DONE]":
                return
            growth = read_event(call.api, json.loads(data))
            if growth.error is not None:
                self.error = growth.error
                return
            if growth.finish:
                self._last(growth, call)
            else:
                self.answer.add(growth)
            if growth.fields:
                grown(self)
            if growth.over:
                return
        self.error = "the response ended without saying so"

    def _last(self, growth: Growth, call: Call) -> None:
        if growth.error is not None:
            self.error = growth.error
        elif call.holds_back:
            lists, self.rest = growth.parted() if call.streamed else (Growth(), growth)
            self.answer.add(lists)
        else:
            self.answer.add(growth)

    def complete(self) -> None:
        """The answer ended here: what was kept apart belongs to it."""
        if self.rest is not None:
            self.answer.add(self.rest)
            self.rest = None


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The data of each server-sent event; every engine's event is one line of data."""
    held = b""
    async for block in content.iter_any():
        held += block
        *lines, held = held.split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield line[6:].strip()
        if len(held) > _LONGEST_EVENT_BYTES:
            raise aiohttp.ClientPayloadError(f"an event is longer than {_LONGEST_EVENT_BYTES} bytes")
