"""An owner of one client's stream over HTTP: what the gateway is, without a gateway.

    owner = StreamOwner(session, {"a": url_a, "b": url_b}, call, request="r1", engine="a", resumption=...)
    transcript = await owner.run()              # meanwhile: await migrate(..., owner=owner)

In: the client's request, the engines' addresses, and the words of a coordinator (`llmfleet.migration.Owner`). Out: a
`Transcript` of what the client got and when. Decisions are those of `llmfleet.migration.stream`; this carries its
effects out: it opens and closes legs, passes on what is beyond what was delivered, and ends the client's answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import aiohttp

from e2e.migration.answer import Answer, Mismatch
from e2e.migration.leg import Call, Leg
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

Resumption = Callable[["StreamOwner", Delivered], Awaitable[None]]
"""Opens a leg from the tokens delivered, with `StreamOwner.open_resumed`; raises when no engine can."""
PATIENCE_S = 10.0
"""For how long an owner waits for word of a migration, a multiple of what one takes."""
_MOST_RESUMES = 8
"""A request that breaks so many legs breaks every engine that it comes to."""


@dataclass(frozen=True)
class Arrival:
    """A delta that reached the client: when (monotonic seconds), from which leg, by how many tokens (0: unknown)."""

    at_s: float
    epoch: int
    tokens: int


@dataclass
class Transcript:
    """What a client got. legs: the engines that spoke, in order. error: why the answer ended early."""

    answer: Answer = field(default_factory=Answer)
    arrivals: list[Arrival] = field(default_factory=list)
    legs: list[str] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    error: str | None = None
    started_s: float = 0.0
    ended_s: float = 0.0


class StreamOwner:
    """One client's stream. Begins at `engine` under the id `request`; both change when it moves."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Mapping[str, str],
        call: Call,
        *,
        request: str,
        engine: str,
        resumption: Resumption | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.transcript = Transcript()
        self.delivery = asyncio.Event()
        """Set at every delta and change of legs; who waits for one clears it first."""
        self._session, self._urls, self._call = session, urls, call
        self._resumption, self._patience_s = resumption, patience_s
        self._stream = Stream()
        self._present = Leg(1, engine, request)
        self._next: Leg | None = None
        self._parking: tuple[str, str] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._resumes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    @property
    def request(self) -> str:
        """The id under which the engine that speaks now knows the request."""
        return self._present.request

    @property
    def engine(self) -> str:
        """The engine that speaks now."""
        return self._present.engine

    @property
    def epoch(self) -> int:
        """Of the present leg."""
        return self._stream.epoch

    @property
    def phase(self) -> StreamPhase:
        return self._stream.phase

    @property
    def over(self) -> bool:
        """The client's answer has ended."""
        return self._over.is_set()

    async def run(self) -> Transcript:
        """Send the request, until the client's answer has ended. Cancelled: the client is gone."""
        self.transcript.started_s = time.monotonic()
        self._open(self._present)
        try:
            await self._over.wait()
        finally:
            self._step(StreamEvent.CLIENT_GONE)
            self._disarm()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.transcript.ended_s = time.monotonic()
        return self.transcript

    async def arrived(self, deltas: int) -> bool:
        """Wait until that many deltas were delivered; False if the answer ended before."""
        while len(self.transcript.arrivals) < deltas and not self._over.is_set():
            self.delivery.clear()
            await self.delivery.wait()
        return len(self.transcript.arrivals) >= deltas

    async def leg_after(self, request: str) -> None:
        """Wait until another leg than the one of this request speaks, or the answer has ended."""
        while self.request == request and not self._over.is_set():
            self.delivery.clear()
            await self.delivery.wait()

    # What a coordinator says.

    async def begin(self) -> int | None:
        if StreamEffect.REFUSE in self._step(StreamEvent.BEGIN):
            return None
        self._arm()
        return self._stream.epoch + 1

    async def park(self, destination: str, migration: str) -> None:
        self._parking = destination, request_id(migration)
        self._step(StreamEvent.PARK)
        self._arm()

    async def freeze(self) -> bool:
        agreed = StreamEffect.AGREE in self._step(StreamEvent.FREEZE)
        self._arm()
        return agreed

    async def finished(self) -> None:
        self._step(StreamEvent.FINISHED)

    async def stays(self) -> None:
        self._step(StreamEvent.STAYS)

    async def source_lost(self) -> Delivered:
        self._step(StreamEvent.SOURCE_LOST)
        self._arm()
        return self.delivered()

    async def resume(self) -> None:
        self._step(StreamEvent.RESUME)

    def delivered(self) -> Delivered:
        """The answer's tokens so far; without `return_token_ids` none are known, and all are made anew."""
        return Delivered(list(self.transcript.answer.tokens()), lagged=False)

    def open_resumed(self, engine: str, request: str) -> None:
        """For a `Resumption`: the present leg is at this engine, under this id."""
        self._present.engine, self._present.request = engine, request
        self._open(self._present)

    # What legs bring.

    def _open(self, leg: Leg) -> None:
        leg.task = self._spawn(
            leg.follow(self._session, self._urls[leg.engine], self._call, self._grown, self._leg_over)
        )

    def _grown(self, leg: Leg) -> None:
        upto = self._stream.delivered_tokens + leg.answer.beyond(self.transcript.answer)
        self._step(Tokens(leg.epoch, upto))

    def _leg_over(self, leg: Leg) -> None:
        if leg.error is not None:
            self.transcript.error = f"{leg.engine}: {leg.error}"
            if leg.refused and leg.epoch == 1:
                # The client's mistake: every engine would say so.
                self._fail()
            else:
                self._step(LegBroken(leg.epoch))
            return
        if leg is self._next:
            # An answer that ends at once, or comes whole, has a first token all the same.
            self._grown(leg)
        self._step(LegEnded(leg.epoch))

    # What is to be done.

    def _step(self, event: StreamInput) -> tuple[StreamEffect, ...]:
        epoch = self._stream.epoch
        self._stream, effects = stream_step(self._stream, event)
        past = self._present
        if self._stream.epoch != epoch:
            self._present = self._on_next_leg(event)
            self.delivery.set()
        for effect in effects:
            match effect:
                case StreamEffect.DELIVER:
                    self._deliver()
                case StreamEffect.SUBMIT_NEXT:
                    assert self._parking is not None
                    self._next = Leg(self._stream.epoch + 1, *self._parking)
                    self._open(self._next)
                case StreamEffect.CLOSE_NEXT:
                    self._close(self._next)
                    self._next = None
                case StreamEffect.CLOSE_PRESENT:
                    self._close(past)
                case StreamEffect.RESUME:
                    if self._resuming is not None:
                        self._resuming.cancel()
                    self._resuming = self._spawn(self._resume())
                case StreamEffect.END_CLIENT:
                    self._end()
        if self._stream.phase in (StreamPhase.STREAMING, StreamPhase.ENDED):
            self._disarm()
        return effects

    def _on_next_leg(self, event: StreamInput) -> Leg:
        self.transcript.mismatches += self.transcript.answer.mismatches(self._present.answer)
        if isinstance(event, Tokens):
            leg, self._next = self._next, None
            assert leg is not None
        else:
            leg = Leg(self._stream.epoch, self._present.engine, self._present.request)
        return leg

    def _deliver(self) -> None:
        leg, transcript = self._present, self.transcript
        if transcript.legs[-1:] != [leg.engine]:
            transcript.legs.append(leg.engine)
        growth = transcript.answer.take(leg.answer)
        ids = growth.fields.get((0, "token_ids"), ())
        transcript.arrivals.append(Arrival(time.monotonic(), leg.epoch, len(ids)))
        self.delivery.set()

    def _end(self) -> None:
        leg, transcript = self._present, self.transcript
        leg.complete()
        if leg.answer.beyond(transcript.answer):
            self._deliver()
        transcript.mismatches += transcript.answer.mismatches(leg.answer)
        transcript.answer.finish, transcript.answer.usage = leg.answer.finish, leg.answer.usage
        transcript.error = None
        self._over.set()
        self.delivery.set()

    async def _resume(self) -> None:
        try:
            self._resumes += 1
            if self._resumption is None or self._resumes > _MOST_RESUMES:
                raise LookupError(f"{self._resumes - 1} attempts")
            await self._resumption(self, self.delivered())
        except Exception as error:
            self.transcript.error = f"{self.transcript.error}; no engine resumes it: {error!r}"
            self._fail()

    def _fail(self) -> None:
        self._over.set()
        self.delivery.set()

    # Tasks and the deadline.

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.transcript.error = repr(error)
            self._fail()

    @staticmethod
    def _close(leg: Leg | None) -> None:
        if leg is not None and leg.task is not None and leg.task is not asyncio.current_task():
            leg.task.cancel()

    def _arm(self) -> None:
        self._disarm()
        if self._stream.phase not in (StreamPhase.STREAMING, StreamPhase.ENDED):
            self._timer = asyncio.get_running_loop().call_later(self._patience_s, self._give_up)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self._stream.phase is StreamPhase.FREEZING and self._stream.next_leg_open and not self._call.streamed:
            # The next leg may be at work: its first token is not seen before its last.
            self._arm()
        else:
            self._step(StreamEvent.DEADLINE)
