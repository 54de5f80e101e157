"""One migration of one request, with everything that has to be told about it.

In flow a request and the two engines; out flows its outcome, and meanwhile the destination counts as having one more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfleet.api import Reason
from llmfleet.gateway.fleet import Engine
from llmfleet.migration.coordinator import Result
from llmfleet.migration.course import Settings, migrate
from llmfleet.migration.outcome import Outcome, Replay

if TYPE_CHECKING:
    from llmfleet.gateway.moving.moves import EngineLink, Moved, Moves


async def carry(
    moves: Moves, request: Moved, source: EngineLink, destination: Engine, there: EngineLink, replay: Replay
) -> Outcome:
    """Moves a request. `replay`: what is good enough where its KV cache cannot go along."""
    if request in moves.moving:
        return Outcome(Result.STAYED, reason=Reason.BUSY, detail="it moves already")
    owner = request.owner()
    owner.towards(destination, source.gate)
    moves.moving.add(request)
    moves.coming[destination.id] += 1
    try:
        outcome = await migrate(
            request.engine_request, source.control, there.control, owner, settings=Settings(replay=replay)
        )
    finally:
        moves.moving.discard(request)
        moves.coming[destination.id] -= 1
        owner.settle()
    if outcome.result in (Result.MOVED, Result.RESUMED):
        owner.runs_there()
    moves.metrics.migrations.labels(outcome.result, outcome.reason or "").inc()
    return outcome
