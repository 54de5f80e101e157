"""Control connections to engines: `ports.Engine` over TCP.

    ask ──► ControlConnection ══ handshake, then frames ══► ControlServer ──► handler
    answer ◄──┘                                                └──◄── answer; events of a subscription

In flow asks of any number of tasks; out flow answers, matched by number, so that a long poll holds nothing up. A
connection is made when something is asked, and made again after it was lost: one attempt for all who wait for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import TypeVar

from llmfleet.api import Reason
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    Journal,
    MessageError,
    Refused,
    Subscribe,
    Subscribed,
    Unsubscribe,
    parse_answer,
    parse_journal,
    to_payload,
)
from llmfleet.migration.frames import (
    CONTROL_HEADER_BYTES,
    ControlFrame,
    ControlKind,
    ControlReader,
    ControlWriter,
    FrameError,
)
from llmfleet.migration.handshake import (
    CONTROL,
    REPLY_BYTES,
    HandshakeError,
    Initiator,
    Session,
)
from llmfleet.migration.ports import NoAnswerError, host_and_port
from llmfleet.migration.tcp import ControlLimits, close_writer, keep_alive, name_of

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.02, 1.0
"""Between attempts to connect."""


class _Link:
    """One connection, from its handshake to its end."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session, limits: ControlLimits
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._frames_out = ControlWriter(session.send_key)
        self._frames_in = ControlReader(session.receive_key, limits.message_bytes)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[AnyAnswer]] = {}
        self.journals: asyncio.Queue[Journal | None] = asyncio.Queue(limits.journals + 1)
        """None at its end."""
        self.open = True
        self._reading = asyncio.create_task(self._read())

    async def ask(self, message: AnyAsk) -> AnyAnswer:
        number = next(self._numbers)
        answer: asyncio.Future[AnyAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(self._frames_out.frame(ControlFrame(ControlKind.ASK, number, to_payload(message))))
            await self._writer.drain()
            return await answer
        finally:
            self._waiting.pop(number, None)

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        ended = "the connection was closed by the peer"
        try:
            while True:
                header = await self._reader.readexactly(CONTROL_HEADER_BYTES)
                self._take(self._frames_in.frame(header, await self._reader.readexactly(self._frames_in.rest(header))))
        except (OSError, EOFError):
            pass
        except (FrameError, MessageError) as error:
            ended = str(error)
            log.warning("control connection to %s closed: %s", name_of(self._writer), error)
        finally:
            self.open = False
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(NoAnswerError(ended))
            self._end_journals()
            await close_writer(self._writer)

    def _take(self, frame: ControlFrame) -> None:
        if frame.kind is ControlKind.EVENT:
            journal = parse_journal(frame.payload)
            if self.journals.qsize() < self.journals.maxsize - 1:
                self.journals.put_nowait(journal)
            else:
                raise FrameError("events came faster than they were read")
            return
        waiting = self._waiting.get(frame.number)
        if frame.kind is ControlKind.ANSWER and waiting is not None and not waiting.done():
            waiting.set_result(parse_answer(frame.payload))

    def _end_journals(self) -> None:
        self.journals.put_nowait(None)


class Subscription:
    """The token journal of an engine: iterates over its events and ends when the connection does.

    A new subscription tells everything from the first token on again, so a reader goes by the entries' index.
    """

    def __init__(self, connection: ControlConnection, link: _Link) -> None:
        self._connection = connection
        self._link = link

    async def add(self, requests: Iterable[str], deadline_s: float) -> AnyAnswer:
        """Of these, too. Raises NoAnswerError."""
        return await self._connection.ask_over(self._link, Subscribe(requests=list(requests)), deadline_s)

    async def remove(self, requests: Iterable[str], deadline_s: float) -> AnyAnswer:
        """No more of these. Raises NoAnswerError."""
        return await self._connection.ask_over(self._link, Unsubscribe(requests=list(requests)), deadline_s)

    async def __aiter__(self) -> AsyncIterator[Journal]:
        while (journal := await self._link.journals.get()) is not None:
            yield journal


class ControlConnection:
    """An engine at an address: `ports.Engine` over TCP."""

    def __init__(self, address: str, key: bytes, name: str = "", limits: ControlLimits | None = None) -> None:
        """Raises ValueError for a bad address. Nothing is connected before something is asked."""
        self._host, self._port = host_and_port(address)
        self.name = name or address
        self._key = key
        self._limits = limits or ControlLimits()
        self._link: _Link | None = None
        self._connecting: asyncio.Task[_Link] | None = None
        self._backoff_s = 0.0

    async def ask(self, message: AnyAsk, deadline_s: float) -> AnyAnswer:
        """One question, said once. Raises NoAnswerError; a peer that does not prove the key is a Refused."""
        return await self._within(deadline_s, self._ask(None, message))

    async def ask_over(self, link: _Link, message: AnyAsk, deadline_s: float) -> AnyAnswer:
        """As `ask`, over this connection or not at all."""
        return await self._within(deadline_s, self._ask(link, message))

    async def subscribe(self, requests: Iterable[str], deadline_s: float) -> Subscription | Refused:
        """The tokens of these requests, and of those added later. One subscription at a time is read by one reader.

        Raises NoAnswerError.
        """
        return await self._within(deadline_s, self._subscribe(list(requests)))

    async def close(self) -> None:
        """Ends the connection; the next ask makes another one."""
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._link is not None:
            await self._link.close()

    async def _within(self, deadline_s: float, answer: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(deadline_s):
                return await answer
        except TimeoutError:
            raise NoAnswerError(f"{self.name} said nothing within {deadline_s:g} s") from None
        except (OSError, EOFError) as error:
            raise NoAnswerError(f"{self.name} cannot be reached: {error}") from None

    async def _ask(self, link: _Link | None, message: AnyAsk) -> AnyAnswer:
        try:
            link = link or await self._connected()
        except HandshakeError as error:
            return Refused(reason=error.reason, detail=f"{self.name}: {error}")
        if not link.open:
            raise NoAnswerError(f"the connection to {self.name} was lost")
        return await link.ask(message)

    async def _subscribe(self, requests: list[str]) -> Subscription | Refused:
        try:
            link = await self._connected()
        except HandshakeError as error:
            return Refused(reason=error.reason, detail=f"{self.name}: {error}")
        answer = await link.ask(Subscribe(requests=requests))
        if isinstance(answer, Subscribed):
            return Subscription(self, link)
        if isinstance(answer, Refused):
            return answer
        return Refused(reason=Reason.MALFORMED, detail=f"{self.name} answered subscribe with {answer.kind}")

    async def _connected(self) -> _Link:
        if self._link is not None and self._link.open:
            return self._link
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._tried)
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> _Link:
        """One attempt, for all who wait for it: each would make another one otherwise."""
        await asyncio.sleep(self._backoff_s)
        async with asyncio.timeout(self._limits.handshake_s):
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                initiator = Initiator(self._key, CONTROL)
                writer.write(initiator.hello)
                proof, session = initiator.finish(await reader.readexactly(REPLY_BYTES))
                writer.write(proof)
            except BaseException:
                writer.transport.abort()
                raise
        keep_alive(writer.get_extra_info("socket"))
        return _Link(reader, writer, session, self._limits)

    def _tried(self, attempt: asyncio.Task[_Link]) -> None:
        self._connecting = None
        if attempt.cancelled() or attempt.exception() is not None:
            self._backoff_s = min(max(2 * self._backoff_s, FIRST_BACKOFF_S), MOST_BACKOFF_S)
        else:
            self._link, self._backoff_s = attempt.result(), 0.0


def connect(address: str, key: bytes, name: str = "", limits: ControlLimits | None = None) -> ControlConnection:
    """An engine's control port as an `Engine`. Raises ValueError for a bad address."""
    return ControlConnection(address, key, name, limits)
