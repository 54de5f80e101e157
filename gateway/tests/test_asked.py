"""A request that somebody names moves where it is told to, or stays and it is said why."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from gateway_testing.tables import engines, fleet, table
from llmfleet.api import Reason
from llmfleet.gateway.fleet import Engine, Fleet, Leaving, LeavingReason
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving import asked
from llmfleet.gateway.moving.asked import CannotMoveError, NotFoundError, move
from llmfleet.gateway.moving.moves import Moved, Moves
from llmfleet.gateway.policy import RequestShape, Router, Ticket
from llmfleet.migration.coordinator import Result
from llmfleet.migration.outcome import Outcome


@dataclass(eq=False)
class Running:
    """A request at an engine."""

    ticket: Ticket
    engine: Engine
    client_request: str
    engine_request: str = "inside"
    begun: bool = True
    streamed: bool = True
    can_move: bool = True
    finished: bool = False
    service_key: str = "team/chat"


class Rig:
    """Engines `a-0` to `a-2`; a migration ends as `outcome` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.router = Router(time.monotonic, "test")
        self.moves = Moves(self.router, GatewayMetrics())
        self.engines = [replace(engine, control="127.0.0.1:9") for engine in engines({"a": 3})]
        self.outcome = Outcome(Result.MOVED)
        self.update(self.engines)
        monkeypatch.setattr(asked, "carry", self._carry)

    def update(self, known: list[Engine]) -> None:
        [service] = fleet(table({"a": 1.0}), known).services.values()
        marked = Fleet([replace(service, peer_key=b"k" * 32)])
        self.router.update(marked)
        self.moves.update(marked)

    def request(self, name: str, **changes: Any) -> Running:
        ticket = self.router.admit("team/chat", RequestShape(prompt_bytes=10))
        engine = self.router.assign(ticket)
        assert engine is not None
        self.router.started(ticket)
        request = Running(ticket, engine, name, **changes)
        self.moves._running[engine.id].add(cast(Moved, request))
        return request

    async def _carry(self, moves: Moves, request: Running, here: Any, there: Engine, link: Any, replay: Any) -> Outcome:
        if self.outcome.result is Result.MOVED:
            request.engine = there
        return self.outcome


async def test_it_goes_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    request = rig.request("r1")
    told = next(engine.id for engine in rig.engines if engine.id != request.engine.id)
    assert await move(rig.moves, "r1", told) == (told, Outcome(Result.MOVED))
    await rig.moves.close()


async def test_told_nothing_it_goes_where_a_drain_would_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    source = rig.request("r1").engine
    engine, outcome = await move(rig.moves, "r1", None)
    assert outcome.result is Result.MOVED
    assert engine != source.id
    await rig.moves.close()


async def test_one_that_stays_is_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.outcome = Outcome(Result.STAYED, reason=Reason.NO_ROOM)
    request = rig.request("r1")
    assert await move(rig.moves, "r1", None) == (request.engine.id, rig.outcome)
    await rig.moves.close()


async def test_one_without_a_first_token_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.request("r1", begun=False)
    _, outcome = await move(rig.moves, "r1", None)
    assert (outcome.result, outcome.reason) == (Result.STAYED, Reason.BUSY)
    await rig.moves.close()


async def test_what_cannot_be_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    here = rig.request("r1").engine
    other = next(engine for engine in rig.engines if engine.id != here.id)
    with pytest.raises(NotFoundError, match="no request 'r2' runs here"):
        await move(rig.moves, "r2", None)
    with pytest.raises(NotFoundError, match="there is no engine 'ghost'"):
        await move(rig.moves, "r1", "ghost")
    with pytest.raises(CannotMoveError, match=f"it runs at engine '{here.id}' already"):
        await move(rig.moves, "r1", here.id)
    rig.request("twice")
    rig.request("twice")
    with pytest.raises(CannotMoveError, match="2 requests run under the id 'twice'"):
        await move(rig.moves, "twice", None)
    rig.request("whole", can_move=False)
    with pytest.raises(CannotMoveError, match="cannot hand it over"):
        await move(rig.moves, "whole", None)
    leaving = replace(other, leaving=Leaving(LeavingReason.CORDONED, None))
    rig.update([leaving if engine.id == other.id else engine for engine in rig.engines])
    with pytest.raises(CannotMoveError, match="leaves"):
        await move(rig.moves, "r1", other.id)
    rig.update([replace(other, revision="2") if engine.id == other.id else engine for engine in rig.engines])
    with pytest.raises(CannotMoveError, match="is of another revision"):
        await move(rig.moves, "r1", other.id)
    rig.update([replace(other, control=None) if engine.id == other.id else engine for engine in rig.engines])
    with pytest.raises(CannotMoveError, match="has no migration plug-in"):
        await move(rig.moves, "r1", other.id)
    rig.update([here])
    with pytest.raises(CannotMoveError, match="no other engine"):
        await move(rig.moves, "r1", None)
    await rig.moves.close()
