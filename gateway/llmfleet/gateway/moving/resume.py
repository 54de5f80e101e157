"""A stream whose engine is lost goes on at another one, from the tokens of the journal.

In flow a request whose answer has begun and whose engine brings nothing more; out flows a leg at another engine of
its service, or an error to its client. The engine that goes on gets the original request and the tokens so far, and
computes what it lacks (RFC 2): exact in float32 for greedy and seeded requests. Where the journal is behind the client,
the missing tokens are made anew; should they come out otherwise, the splice finds it and the answer ends with an error.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from llmfleet.api import Feature
from llmfleet.api.migration_messages import Capabilities, EngineCapabilities
from llmfleet.gateway.fleet import Engine
from llmfleet.gateway.moving.owner import MovingStream
from llmfleet.migration.coordinator import Result
from llmfleet.migration.ports import Delivered, NoAnswerError
from llmfleet.migration.resumption import Leaving, resume_elsewhere

if TYPE_CHECKING:
    from llmfleet.gateway.moving.moves import EngineLink, Moved, Moves

log = logging.getLogger("llmfleet.gateway")

_LAST_WORDS_S = 0.25
"""For what a dead engine had told to be read."""
_LONGEST_S = 30.0
"""For another engine to be found."""
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.05, 0.5
"""Between rounds over all engines: the client waits."""
_ASK_S = 2.0


async def resume(moves: Moves, request: Moved, owner: MovingStream) -> None:
    """Tries one engine after another, the least loaded first."""
    engine = request.engine
    assert engine is not None
    link = moves.link(request.service_key, engine)
    if link is not None:
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await link.journal.ended.wait()
        except TimeoutError:
            pass
    delivered = moves.delivered(request)
    ends_s = asyncio.get_running_loop().time() + _LONGEST_S
    tried: set[str] = set()
    reason, pause_s = "there is no other engine", _FIRST_PAUSE_S
    while asyncio.get_running_loop().time() < ends_s:
        destination = moves.router.elsewhere(request.ticket, tried, moves.coming)
        there = moves.link(request.service_key, destination) if destination is not None else None
        if destination is None:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)
            tried.clear()
        elif there is None:
            tried.add(destination.id)
        else:
            tried.add(destination.id)
            moves.coming[destination.id] += 1
            try:
                result, reason = await _at(moves, request, owner, link, destination, there, delivered)
            finally:
                moves.coming[destination.id] -= 1
            moves.metrics.migrations.labels(result, "engine_lost").inc()
            if result is Result.RESUMED:
                return
            owner.close_resumed()
    request.give_up(f"was lost, and no other one goes on: {reason}")


async def _at(
    moves: Moves,
    request: Moved,
    owner: MovingStream,
    lost: EngineLink | None,
    destination: Engine,
    there: EngineLink,
    delivered: Delivered,
) -> tuple[Result, str]:
    capabilities = lost.journal.capabilities if lost is not None else None
    try:
        # An engine that died before it told of itself: whether weights are the same, the revision says.
        known = capabilities or await there.control.ask(Capabilities(), _ASK_S)
    except NoAnswerError as error:
        return Result.FAILED, str(error)
    if not isinstance(known, EngineCapabilities):
        return Result.FAILED, f"{destination.id} answered {known.kind}"
    leaving = Leaving(known.fingerprint, request.most_tokens(), features_of(request.body()), None)
    resuming = _Resuming(owner, destination, delivered)
    outcome = await resume_elsewhere(leaving, there.control, resuming, epoch=owner.epoch)
    if outcome.result is not Result.RESUMED:
        log.warning(
            "a stream does not go on at engine %s: %s %s %s",
            destination.id, outcome.reason, outcome.field, outcome.detail,
        )  # fmt: skip
    return outcome.result, f"{destination.id}: {outcome.reason} {outcome.detail}"


class _Resuming:
    """The part of an owner that a resumption needs."""

    def __init__(self, owner: MovingStream, destination: Engine, delivered: Delivered) -> None:
        self._owner = owner
        self._destination = destination
        self._delivered = delivered

    async def park(self, destination: str, migration: str) -> None:
        try:
            await self._owner.open_resumed(self._destination, migration)
        except (OSError, TimeoutError) as error:
            # The engine is asked whether the request has come, and says no until its time is over.
            log.warning("engine %s could not be connected to: %s", destination, error)

    async def source_lost(self) -> Delivered:
        return self._delivered


def features_of(body: dict[str, Any]) -> list[Feature]:
    """What of a request decides whether another engine may go on with it exactly."""
    features = []
    temperature = body.get("temperature")
    if temperature != 0:
        features.append(Feature.SAMPLING if body.get("seed") is None else Feature.SEED)
    return features
