"""A request moves because somebody asked for it by name (`kubectl llmfleet migrate`).

In flow the id that the client has of its request, and perhaps an engine; out flows where it runs then and what came of
it. What cannot even be tried is an error that says why; what was tried and did not succeed is an outcome, and the
request runs on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from llmfleet.api import Reason
from llmfleet.gateway.fleet import Engine
from llmfleet.gateway.moving.carry import carry
from llmfleet.migration.coordinator import Result
from llmfleet.migration.outcome import Outcome, Replay

if TYPE_CHECKING:
    from llmfleet.gateway.moving.moves import Moved, Moves


_SWITCH_S = 5.0
_LOOK_S = 0.01


class NotFoundError(LookupError):
    """Of this gateway no request has this id, or no engine."""


class CannotMoveError(ValueError):
    """The request cannot move there, or nowhere."""


async def move(moves: Moves, client_request: str, destination_id: str | None) -> tuple[str, Outcome]:
    """The engine on which the request runs in the end, and the outcome.

    Without a destination it goes where a drain would send it. Raises NotFoundError and CannotMoveError.
    """
    request = _the_one(moves, client_request)
    source = request.engine
    assert source is not None, "it was found at an engine"
    destination = _destination(moves, request, source, destination_id)
    here, there = (moves.link(request.service_key, engine) for engine in (source, destination))
    if not request.can_move or here is None:
        raise CannotMoveError(
            f"request {client_request!r} cannot move: its engine or its kind of call cannot hand it over"
        )
    if there is None:
        raise CannotMoveError(f"engine {destination.id!r} has no migration plug-in")
    if request.streamed and not request.begun:
        return source.id, Outcome(Result.STAYED, reason=Reason.BUSY, detail="it has no first token yet")
    outcome = await carry(moves, request, here, destination, there, Replay.EXACT)
    if outcome.result is Result.MOVED:
        # With its first token from there it is there for all of the gateway, and the next command finds it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SWITCH_S):
                while request.engine == source and not request.finished:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_S)
        return destination.id, outcome
    return (request.engine or source).id, outcome


def _the_one(moves: Moves, client_request: str) -> Moved:
    found = [
        request
        for engine_id in moves.engines()
        for request in moves.running(engine_id)
        if request.client_request == client_request
    ]
    if not found:
        raise NotFoundError(f"no request {client_request!r} runs here")
    if len(found) > 1:
        raise CannotMoveError(
            f"{len(found)} requests run under the id {client_request!r}; one that no other has can move"
        )
    return found[0]


def _destination(moves: Moves, request: Moved, source: Engine, destination_id: str | None) -> Engine:
    if destination_id is None:
        chosen = moves.router.elsewhere(request.ticket, (), moves.coming)
        if chosen is None:
            raise CannotMoveError("no other engine of its service and revision can take it now")
        return chosen
    engine = moves.engines().get(destination_id)
    if engine is None:
        raise NotFoundError(f"there is no engine {destination_id!r}")
    if engine.id == source.id:
        raise CannotMoveError(f"it runs at engine {destination_id!r} already")
    if engine.id not in moves.engines_of(request.service_key):
        raise CannotMoveError(f"engine {destination_id!r} is of another service than {request.service_key}")
    if engine.revision != source.revision:
        raise CannotMoveError(f"engine {destination_id!r} is of another revision: it has other weights or adapters")
    if engine.leaving is not None:
        raise CannotMoveError(f"engine {destination_id!r} leaves ({engine.leaving.reason})")
    return engine
