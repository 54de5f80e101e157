"""The owner of one client's stream between `protocol_engine`s, and the client: `stream.py`, carried out."""

from __future__ import annotations

import asyncio

from e2e.migration.protocol_engine import ModelEngine, answer_of
from llmfleet.migration.ports import Delivered, request_id
from llmfleet.migration.stream import (
    LegBroken,
    LegEnded,
    Stream,
    StreamEffect,
    StreamEvent,
    StreamInput,
    Tokens,
    stream_step,
)

OWNER_WAITS_S = 3.0
"""For word of a migration."""


class Client:
    """The stream's owner, and its client."""

    def __init__(self, name: str, engines: dict[str, ModelEngine], length: int) -> None:
        self.name = name
        self.answer: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self.delivered: list[int] = []
        self.stream = Stream()
        self.gives_up = False
        self.waits_s = OWNER_WAITS_S
        self.engines = engines
        self.length = length
        self._legs: dict[int, tuple[ModelEngine, str, asyncio.Task[None]]] = {}
        self._next = ("", "")

    def begin_at(self, engine: ModelEngine) -> None:
        """The client's request goes to this engine."""
        self._open(1, engine, self.name)

    def leave(self) -> None:
        """The client closes its connection."""
        self._hear(StreamEvent.CLIENT_GONE)

    async def begin(self) -> int | None:
        """Grants the next epoch."""
        if StreamEffect.REFUSE in self._hear(StreamEvent.BEGIN):
            return None
        asyncio.get_running_loop().call_later(self.waits_s, self._hear, StreamEvent.DEADLINE)
        return self.stream.epoch + 1

    async def park(self, destination: str, migration: str) -> None:
        """Submits the request to the destination."""
        self._next = (destination, request_id(migration))
        self._hear(StreamEvent.PARK)

    async def freeze(self) -> bool:
        """Agrees to the cut, unless it gives up."""
        if self.gives_up:
            self._hear(StreamEvent.DEADLINE)
        return StreamEffect.AGREE in self._hear(StreamEvent.FREEZE)

    async def finished(self) -> None:
        """The request ended by itself."""
        self._hear(StreamEvent.FINISHED)

    async def stays(self) -> None:
        """The migration is over."""
        self._hear(StreamEvent.STAYS)

    async def source_lost(self) -> Delivered:
        """The present leg counts no more."""
        self._hear(StreamEvent.SOURCE_LOST)
        return Delivered(list(self.delivered), False)

    async def resume(self) -> None:
        """A leg at any engine that lives."""
        self._hear(StreamEvent.RESUME)

    def _open(self, epoch: int, engine: ModelEngine, request: str) -> None:
        leg = engine.submit(request, self.name, self.length)
        self._legs[epoch] = (engine, request, asyncio.create_task(self._read(epoch, leg)))

    async def _read(self, epoch: int, leg: asyncio.Queue[int | str]) -> None:
        while not isinstance(told := await leg.get(), str):
            self._hear(Tokens(epoch, told))
        self._hear(LegEnded(epoch) if told == "ended" else LegBroken(epoch))

    def _close(self, epoch: int) -> None:
        engine, request, _ = self._legs.pop(epoch)
        engine.abort(request)

    def _hear(self, event: StreamInput) -> tuple[StreamEffect, ...]:
        before = self.stream.epoch
        self.stream, effects = stream_step(self.stream, event)
        for effect in effects:
            match effect:
                case StreamEffect.DELIVER:
                    answer = answer_of(self.name, self.length)
                    self.delivered += answer[len(self.delivered) : self.stream.delivered_tokens]
                case StreamEffect.SUBMIT_NEXT:
                    name, request = self._next
                    self._open(before + 1, self.engines[name], request)
                case StreamEffect.CLOSE_NEXT:
                    self._close(before + 1)
                case StreamEffect.CLOSE_PRESENT:
                    self._close(before)
                case StreamEffect.RESUME:
                    engine = next(engine for engine in self.engines.values() if engine.alive)
                    self._open(self.stream.epoch, engine, f"{self.name}-again-{self.stream.epoch}")
                case StreamEffect.END_CLIENT:
                    self.answer.set_result(self.delivered)
        return effects
