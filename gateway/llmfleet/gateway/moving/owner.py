"""RFC 2's owner of one client's stream: the gateway's side of a migration.

In flow a coordinator's words (`llmfleet.migration.ports.Owner`) and what becomes of the engines' answers; out flow
calls to the client's side (`Spliced`), which opens and closes connections and passes on what the client has not got.
What follows from what is decided by `llmfleet.migration.stream`. There is an owner only for a stream that moves or has
to be resumed.

No deadline runs while a coordinator is at work, since it is in this process. Once it is done, the next leg's first
token may still be on its way: then one does.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from llmfleet.gateway.fleet import Engine
from llmfleet.migration.ports import Delivered, request_id
from llmfleet.migration.stream import (
    LegBroken,
    LegEnded,
    Stream,
    StreamEffect,
    StreamEvent,
    StreamInput,
    StreamPhase,
    Tokens,
    stream_step,
)

if TYPE_CHECKING:
    from llmfleet.gateway.transport.upstream import EngineConnection

_FIRST_TOKEN_S = 10.0
"""For the next leg's first token to come, once its engine has said that it runs."""
_LEG_BYTES = 1024 * 1024
"""Of an event that a leg begins with."""
_ERROR = b'data: {"error"'


class Spliced(Protocol):
    """The client's side of a stream."""

    @property
    def streamed(self) -> bool:
        """Whether the answer comes as events, so that an engine's first token can be seen."""

    async def open_leg(self, leg: Leg) -> None:
        """Sends the request to the leg's engine; the leg gets the answer. Raises OSError or TimeoutError."""

    def switch(self, leg: Leg) -> None:
        """The client gets this leg's answer from now on, as far as it is beyond what was told."""

    def drop_present(self) -> None:
        """Ends the connection to the engine whose answer the client gets now."""

    def guard(self) -> None:
        """The end of the present answer says nothing from now on."""

    def thaw(self) -> None:
        """It does again."""

    def conclude(self) -> None:
        """The present answer has ended, and that was the end."""

    def resume(self) -> None:
        """No engine goes on: open a leg anywhere, or tell the client."""

    def delivered(self) -> Delivered:
        """The tokens so far, as the journal has them."""


class Leg:
    """Another engine's answer before the client gets any of it: nothing comes before that engine begins."""

    __slots__ = ("_owner", "complete", "connection", "data", "engine", "epoch", "request")

    def __init__(self, owner: MovingStream, epoch: int, engine: Engine, request: str) -> None:
        self._owner = owner
        self.epoch = epoch
        self.engine = engine
        self.request = request
        """Its `X-Request-Id`."""
        self.connection: EngineConnection | None = None
        self.data = b""
        """What has come."""
        self.complete = False
        """Whether that is all."""

    def engine_data(self, connection: EngineConnection, data: bytes, complete: bool) -> None:
        """See upstream.Receiver."""
        self.connection = connection
        self.data += data
        self.complete = complete
        if connection.status != 200 or self.data.startswith(_ERROR) or len(self.data) > _LEG_BYTES:
            connection.abort()
            self._owner.lost(self)
        elif complete or (b"\n\n" in self.data and self._owner.streamed):
            self._owner.spoke(self)

    def engine_lost(self, connection: EngineConnection, reason: str) -> None:
        """See upstream.Receiver."""
        self.connection = None
        self._owner.lost(self)

    def close(self) -> None:
        """Its engine is to stop, if it has begun."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.abort()


class MovingStream:
    """One client's stream; `ports.Owner` for a coordinator."""

    def __init__(self, client: Spliced) -> None:
        self._client = client
        self._stream = Stream()
        self._destination: Engine | None = None
        self._gate: asyncio.Semaphore | None = None
        self._passed: asyncio.Semaphore | None = None
        self._next: Leg | None = None
        self._resumed: Leg | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def phase(self) -> StreamPhase:
        return self._stream.phase

    @property
    def epoch(self) -> int:
        """Of the present leg."""
        return self._stream.epoch

    @property
    def streamed(self) -> bool:
        """See Spliced."""
        return self._client.streamed

    @property
    def undecided(self) -> bool:
        """Whether the end of the present leg says nothing by itself."""
        return self._stream.phase is StreamPhase.FREEZING

    @property
    def between(self) -> bool:
        """Whether a next leg is awaited, so that an end of the present one is not an end of the answer."""
        return self._resumed is not None or self._resuming is not None or self._stream.leg_over

    def towards(self, destination: Engine, gate: asyncio.Semaphore) -> None:
        """Where the migration that begins next goes. `gate` is passed from the request's submission there to `settle`:
        what is submitted and cut is work for both engines at once, which others' clients would feel."""
        self._destination, self._gate = destination, gate

    # What a coordinator says: ports.Owner

    async def begin(self) -> int | None:
        if self.between or StreamEffect.REFUSE in self._step(StreamEvent.BEGIN):
            return None
        return self._stream.epoch + 1

    async def park(self, destination: str, migration: str) -> None:
        assert self._destination is not None
        assert self._destination.id == destination
        assert self._gate is not None
        await self._gate.acquire()
        self._passed = self._gate
        if StreamEffect.SUBMIT_NEXT not in self._step(StreamEvent.PARK):
            return
        leg = self._next = Leg(self, self._stream.epoch + 1, self._destination, request_id(migration))
        try:
            await self._client.open_leg(leg)
        except (OSError, TimeoutError):
            self.lost(leg)
            return
        if leg is not self._next:
            leg.close()

    async def freeze(self) -> bool:
        agreed = StreamEffect.AGREE in self._step(StreamEvent.FREEZE)
        if agreed:
            self._client.guard()
        return agreed

    async def finished(self) -> None:
        self._step(StreamEvent.FINISHED)

    async def stays(self) -> None:
        self._step(StreamEvent.STAYS)

    async def source_lost(self) -> Delivered:
        self._step(StreamEvent.SOURCE_LOST)
        return self._client.delivered()

    async def resume(self) -> None:
        self._step(StreamEvent.RESUME)

    def runs_there(self) -> None:
        """The coordinator is done, and the destination has begun."""
        if self._next is not None and not self.streamed:
            self.spoke(self._next)
        self.settle()

    def settle(self) -> None:
        """The coordinator is done: what has not been decided soon will not be."""
        gate, self._passed = self._passed, None
        if gate is not None:
            gate.release()
        if self._stream.phase not in (StreamPhase.STREAMING, StreamPhase.ENDED) and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_FIRST_TOKEN_S, self._late)

    # What becomes of legs

    def spoke(self, leg: Leg) -> None:
        """A leg's engine has begun."""
        if leg is self._resumed:
            self._resumed = None
            self._client.switch(leg)
        elif leg is self._next:
            self._step(Tokens(leg.epoch, self._stream.delivered_tokens + 1))
            self._next = None
            self._client.switch(leg)

    def lost(self, leg: Leg) -> None:
        """A leg that has not begun will not."""
        if leg is self._resumed:
            self._resumed = None
            if self._resuming is None:
                self._client.resume()
        elif leg is self._next:
            self._next = None
            self._step(LegBroken(leg.epoch))

    def present_ended(self) -> None:
        """The present leg's answer is complete, while that says nothing."""
        self._step(LegEnded(self._stream.epoch))

    def present_broken(self) -> None:
        """The present leg brings nothing more."""
        self._step(LegBroken(self._stream.epoch))

    def close(self) -> None:
        """The client's answer is over."""
        self._step(StreamEvent.CLIENT_GONE)
        self._disarm()
        for leg in (self._next, self._resumed):
            if leg is not None:
                leg.close()
        self._next = self._resumed = None
        if self._resuming is not None:
            self._resuming.cancel()

    # Resuming

    def resuming(self, task: asyncio.Task[None]) -> None:
        """This task looks for an engine that goes on."""
        self._resuming = task
        task.add_done_callback(self._resumption_over)

    def _resumption_over(self, task: asyncio.Task[None]) -> None:
        if self._resuming is task:
            self._resuming = None

    async def open_resumed(self, engine: Engine, migration: str) -> None:
        """A leg of the present epoch. Raises OSError or TimeoutError."""
        leg = self._resumed = Leg(self, self._stream.epoch, engine, request_id(migration))
        await self._client.open_leg(leg)
        if leg is not self._resumed:
            leg.close()

    def close_resumed(self) -> None:
        """The attempt has failed."""
        leg, self._resumed = self._resumed, None
        if leg is not None:
            leg.close()

    # What is to be done

    def _step(self, event: StreamInput) -> tuple[StreamEffect, ...]:
        before = self._stream
        self._stream, effects = stream_step(before, event)
        for effect in effects:
            match effect:
                case StreamEffect.CLOSE_NEXT:
                    leg, self._next = self._next, None
                    if leg is not None:
                        leg.close()
                case StreamEffect.CLOSE_PRESENT if event is not StreamEvent.CLIENT_GONE:
                    self._client.drop_present()
                case StreamEffect.RESUME:
                    self._client.resume()
                case StreamEffect.END_CLIENT:
                    self._client.conclude()
        if self._stream.phase is StreamPhase.STREAMING:
            self._disarm()
            if before.phase is StreamPhase.FREEZING and self._stream.epoch == before.epoch:
                self._client.thaw()
        return effects

    def _late(self) -> None:
        self._timer = None
        self._step(StreamEvent.DEADLINE)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
