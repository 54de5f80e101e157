"""What goes wrong between two engines, at a chosen moment.

Unreliable   an engine whose answers are lost, late or come twice, as its coordinator sees it
Rerouted     an engine whose data arrives through a `Wire`
Wire         a TCP proxy that cuts, stalls, or changes a byte of what goes through
at_moment    does something when the coordinator says a certain word to the stream's owner
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import StrEnum

from e2e.migration.owner import StreamOwner
from llmfleet.api.migration_messages import AnyAnswer, AnyAsk, Prepared
from llmfleet.migration.ports import Engine, NoAnswerError, host_and_port

_CHUNK_BYTES = 65536


class Unreliable:
    """Of ten questions two get no answer, one of them after it was asked; two are asked twice, and some are late."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.name = engine.name
        self._engine = engine
        self._random = random.Random(seed)

    async def ask(self, message: AnyAsk, deadline_s: float) -> AnyAnswer:
        fate = self._random.random()
        if fate < 0.1:
            raise NoAnswerError("the question was lost")
        await asyncio.sleep(self._random.choice((0.0, 0.0, 0.01, 0.05)))
        answer = await self._engine.ask(message, deadline_s)
        if fate < 0.2:
            raise NoAnswerError("the answer was lost")
        if fate < 0.4:
            return await self._engine.ask(message, deadline_s)
        return answer


class Rerouted:
    """An engine that tells another address for its data."""

    def __init__(self, engine: Engine, wire: Wire) -> None:
        self.name = engine.name
        self._engine = engine
        self._wire = wire

    async def ask(self, message: AnyAsk, deadline_s: float) -> AnyAnswer:
        answer = await self._engine.ask(message, deadline_s)
        if isinstance(answer, Prepared):
            (address,) = answer.destination.data
            self._wire.target = address
            data = answer.destination.model_copy(update={"data": [self._wire.address]})
            return answer.model_copy(update={"destination": data})
        return answer


class Harm(StrEnum):
    """What a wire does."""

    CUT = "cut"
    STALL = "stall"
    CORRUPT = "corrupt"


class Wire:
    """Passes bytes on until so many have gone to the target; then it does harm, once."""

    def __init__(self, harm: Harm, after_bytes: int) -> None:
        self.harm, self.left = harm, after_bytes
        self.target = ""
        self.address = ""
        self.done = False
        self._closing = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Wire]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        try:
            yield self
        finally:
            server.close()
            self._closing.set()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        there, back = await asyncio.open_connection(*host_and_port(self.target))
        ends = [
            asyncio.create_task(self._copy(reader, back, harmed=True)),
            asyncio.create_task(self._copy(there, writer, harmed=False)),
            asyncio.create_task(self._closed()),
        ]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        for one in (writer, back):
            one.close()
        self._connections.discard(task)

    async def _closed(self) -> None:
        await self._closing.wait()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, harmed: bool) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if harmed and not self.done:
                self.left -= len(data)
                if self.left <= 0:
                    self.done = True
                    match self.harm:
                        case Harm.CUT:
                            return
                        case Harm.STALL:
                            await self._closing.wait()
                        case Harm.CORRUPT:
                            data = data[:-1] + bytes([data[-1] ^ 1])
            writer.write(data)
            await writer.drain()


class Moment(StrEnum):
    """A word of the coordinator to the owner."""

    BEGIN = "begin"
    """Before anything is asked of the destination."""
    PARK = "park"
    """Full blocks are there, the request is about to be submitted."""
    FREEZE = "freeze"
    """The cut is about to be asked."""


def at_moment(owner: StreamOwner, moment: Moment, act: Callable[[], Awaitable[None]]) -> None:
    """Have `act` done right before the owner hears that word."""
    heard = getattr(owner, moment)

    async def after(*words: str) -> object:
        await act()
        return await heard(*words)

    setattr(owner, moment, after)
