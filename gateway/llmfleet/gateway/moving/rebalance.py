"""Streams go on where they lose less time: the policy's rescheduling, carried out.

    every half second, for each service: own streams that could move --Router.rebalance--> a few migrations

In flow the streams of this gateway; out flow migrations, at most one from an engine and one to an engine at a time.
Only services with an objective: their plan has measured how batches slow each other down, and somebody has said what
moving protects. A stream that has been asked to move rests for a while, whatever came of it, and one at an engine that
leaves is the drain's (`drains`). High priority stays, and others make room for it. Where KV cannot go along nothing
moves: computing it anew costs more than it saves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from llmfleet.gateway.fleet import Engine, Service
from llmfleet.gateway.moving.carry import carry
from llmfleet.migration.outcome import Replay

if TYPE_CHECKING:
    from llmfleet.gateway.moving.moves import Moved, Moves

log = logging.getLogger("llmfleet.gateway")

EVERY_S = 0.5
REST_S = 10.0
"""Before a stream is asked to move again."""


class Rebalance:
    """All services of one gateway."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._rests_until_s: dict[Moved, float] = {}
        self._moving: dict[asyncio.Task[None], tuple[str, str]] = {}  # from, to

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                now_s = time.monotonic()
                self._rests_until_s = {
                    request: until_s
                    for request, until_s in self._rests_until_s.items()
                    if until_s > now_s and not request.finished
                }
                for service in self._moves.services():
                    if service.peer_key is not None and service.table.objective is not None:
                        self._round(service, now_s)
        finally:
            for task in self._moving:
                task.cancel()
            await asyncio.gather(*self._moving, return_exceptions=True)

    def _round(self, service: Service, now_s: float) -> None:
        moves = self._moves
        streams = {
            request.ticket: request
            for engine in service.engines
            if engine.leaving is None
            for request in moves.running(engine.id)
            if request.can_move
            and request.streamed
            and request.begun
            and not request.high
            and request not in moves.moving
            and request not in self._rests_until_s
        }
        answered = {ticket: request.answered_tokens() for ticket, request in streams.items() if ticket.started}
        high = {engine.id: sum(one.high for one in moves.running(engine.id)) for engine in service.engines}
        for ticket, destination in moves.router.rebalance(service.key, answered, high) if answered else ():
            source = streams[ticket].engine
            if source is not None and self._idle(source, destination):
                self._rests_until_s[streams[ticket]] = now_s + REST_S
                task = asyncio.get_running_loop().create_task(self._carry(streams[ticket], source, destination))
                self._moving[task] = source.id, destination.id
                task.add_done_callback(self._done)

    def _idle(self, source: Engine, destination: Engine) -> bool:
        taken = {engine for ends in self._moving.values() for engine in ends}
        return source.id not in taken and destination.id not in taken and not self._moves.coming[destination.id]

    async def _carry(self, request: Moved, source: Engine, destination: Engine) -> None:
        here = self._moves.link(request.service_key, source)
        there = self._moves.link(request.service_key, destination)
        if here is not None and there is not None:
            outcome = await carry(self._moves, request, here, destination, there, Replay.NEVER)
            log.debug("rebalancing %s to %s: %s %s", source.id, destination.id, outcome.result, outcome.reason or "")

    def _done(self, task: asyncio.Task[None]) -> None:
        self._moving.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a migration failed", exc_info=error)
