"""The streams of an engine that leaves move to the others, until none is left.

In flow the requests of this gateway at the engine; out flow migrations, first of those whose answers will be the
longest, a few at a time. What a destination refuses for want of room is tried at the next one, and when all have been
tried, again after a moment. A request that cannot move runs to its end; one of which nothing has come yet begins anew
elsewhere, which costs its prompt and no more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from llmfleet.api import Reason
from llmfleet.gateway.fleet import Engine
from llmfleet.gateway.moving.carry import carry
from llmfleet.migration.coordinator import Result
from llmfleet.migration.outcome import Replay

if TYPE_CHECKING:
    from llmfleet.gateway.moving.moves import Moved, Moves

log = logging.getLogger("llmfleet.gateway")

AT_ONCE = 8
"""Migrations from one engine at a time. More of them would share the same network and steps, and end no sooner."""
_LOOK_S = 0.1
_AGAIN_S = 0.5
"""Before destinations are tried again that had no room."""
_LAST_S = 10.0
"""Before an engine's end: from then on an inexact continuation is better than none."""


@dataclass(frozen=True)
class DrainNews:
    """What people should know of it."""

    engine: Engine
    reason: str
    """`StreamsMoved`: how it ended. `StreamsStay`: some cannot move, said once."""
    message: str
    warning: bool


class Drain:
    """One engine's."""

    def __init__(self, moves: Moves, engine: Engine) -> None:
        self.over = False
        self._moves = moves
        self._engine = engine
        self._moving: dict[Moved, asyncio.Task[None]] = {}
        self._tried: defaultdict[Moved, set[str]] = defaultdict(set)
        self._rests_until_s: dict[Moved, float] = {}
        self._stays: set[Moved] = set()
        """They run to their end."""
        self._said: set[Reason | None] = set()
        """Reasons to stay that are in the log."""
        self._results: Counter[Result] = Counter()
        self._begun_anew = 0

    async def run(self) -> None:
        """Until nothing of this gateway runs there, or it does not leave any more, and no migration is under way: a
        request is elsewhere with its first token from there, and what its old engine holds is released after that."""
        engine = self._engine
        log.info(
            "engine %s leaves (%s): %d requests run there",
            engine.id, engine.leaving.reason if engine.leaving else "", len(list(self._moves.running(engine.id))),
        )  # fmt: skip
        try:
            while (there := list(self._moves.running(engine.id)) if self._leaving() else []) or self._moving:
                self._begin(there)
                if self._moving:
                    await asyncio.wait(self._moving.values(), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                else:
                    await asyncio.sleep(_LOOK_S)
        finally:
            self.over = True
            self._tell_the_end()
            for task in self._moving.values():
                task.cancel()
            await asyncio.gather(*self._moving.values(), return_exceptions=True)

    def _tell_the_end(self) -> None:
        moved = self._results[Result.MOVED] + self._results[Result.RESUMED] + self._begun_anew
        if moved:
            why = self._engine.leaving.reason if self._engine.leaving else ""
            message = f"{moved} requests moved to other engines ({why}); {len(self._stays)} stayed to their end"
            self._moves.tell(DrainNews(self._engine, "StreamsMoved", message, warning=False))

    def _leaving(self) -> bool:
        known = self._moves.engines().get(self._engine.id)
        return known is not None and known.leaving is not None

    def _begin(self, there: list[Moved]) -> None:
        now_s = time.monotonic()
        ready = [
            request
            for request in there
            if request not in self._moving
            and request not in self._stays
            and self._rests_until_s.get(request, 0.0) <= now_s
        ]
        ready.sort(key=lambda request: request.remaining_tokens(), reverse=True)
        for request in ready:
            if request.streamed and not request.begun:
                self._restart(request)
            elif len(self._moving) < AT_ONCE:
                task = asyncio.get_running_loop().create_task(self._move(request))
                self._moving[request] = task
                task.add_done_callback(partial(self._moved, request))

    def _restart(self, request: Moved) -> None:
        if self._moves.router.elsewhere(request.ticket) is None:
            self._rest(request)
        else:
            request.restart()
            self._begun_anew += 1

    def _rest(self, request: Moved) -> None:
        self._tried.pop(request, None)
        self._rests_until_s[request] = time.monotonic() + _AGAIN_S

    def _moved(self, request: Moved, task: asyncio.Task[None]) -> None:
        self._moving.pop(request, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a migration failed", exc_info=error)
            self._stays.add(request)

    async def _move(self, request: Moved) -> None:
        moves, tried = self._moves, self._tried[request]
        source = moves.link(request.service_key, self._engine)
        if source is None or not request.can_move:
            self._stay(request, "its kind of call cannot be handed over")
            return
        destination = moves.router.elsewhere(request.ticket, tried, moves.coming)
        if destination is None:
            self._rest(request)
            return
        tried.add(destination.id)
        there = moves.link(request.service_key, destination)
        if there is None:
            return
        leaving = self._engine.leaving
        last = leaving is not None and leaving.until_s is not None and leaving.until_s - time.time() < _LAST_S
        outcome = await carry(moves, request, source, destination, there, Replay.INEXACT if last else Replay.EXACT)
        self._results[outcome.result] += 1
        if outcome.result is Result.STAYED:
            level = logging.DEBUG if outcome.reason in self._said else logging.INFO
            self._said.add(outcome.reason)
            log.log(
                level, "a request stays at %s: %s %s %s", self._engine.id, outcome.reason, outcome.field, outcome.detail
            )
            if outcome.reason is Reason.UNSUPPORTED:
                self._stay(request, outcome.detail)

    def _stay(self, request: Moved, why: str) -> None:
        # Where engines have no plug-in, the service's condition `NoMigration` has said so.
        if not self._stays and self._engine.control is not None:
            message = f"a request cannot move to another engine and runs to its end here: {why}"
            self._moves.tell(DrainNews(self._engine, "StreamsStay", message, warning=True))
        self._stays.add(request)
