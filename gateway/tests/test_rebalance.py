"""Streams are moved to where the policy says they lose less time, one at a time from and to an engine."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from gateway_testing.tables import engines, fleet, table
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.fleet import Engine, Fleet, Leaving, LeavingReason
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving import carry, rebalance
from llmfleet.gateway.moving.moves import Moved, Moves
from llmfleet.gateway.moving.owner import MovingStream
from llmfleet.gateway.policy import RequestShape, Router, Ticket
from llmfleet.migration.coordinator import Result
from llmfleet.migration.outcome import Outcome, Replay

OBJECTIVE = Objective(ttft=LatencyTarget(milliseconds=60_000), tpot=LatencyTarget(milliseconds=5_000))


class _Owner:
    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.to: Engine | None = None

    def towards(self, destination: Engine, gate: asyncio.Semaphore) -> None:
        self.to = destination

    def settle(self) -> None: ...

    def runs_there(self) -> None:
        assert self.to is not None
        self.stream.go(self.to)


@dataclass(eq=False)
class Stream:
    """A stream at an engine, of which nothing but where it runs is real."""

    rig: Rig
    ticket: Ticket
    engine: Engine
    engine_request: str
    begun: bool = True
    streamed: bool = True
    can_move: bool = True
    finished: bool = False
    high: bool = False
    service_key: str = "team/chat"

    def answered_tokens(self) -> int:
        return 5

    def owner(self) -> MovingStream:
        return cast(MovingStream, _Owner(self))

    def go(self, to: Engine) -> None:
        there = self.rig.moves._running
        there[self.engine.id].discard(cast(Moved, self))
        self.engine = to
        there[to.id].add(cast(Moved, self))
        self.rig.router.moved(self.ticket, to)


class Rig:
    """Two engines of which the first has all the streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, objective: Objective | None = OBJECTIVE) -> None:
        self.router = Router(time.monotonic, "test")
        self.moves = Moves(self.router, GatewayMetrics())
        self.engines = [replace(engine, control="127.0.0.1:9") for engine in engines({"a": 2})]
        self.objective = objective
        self.asked: list[tuple[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.outcome = Outcome(Result.MOVED)
        self.replay: Replay | None = None
        monkeypatch.setattr(carry, "migrate", self._migrate)
        monkeypatch.setattr(rebalance, "EVERY_S", 0.005)
        self.update(self.engines)

    def update(self, running: list[Engine]) -> None:
        [service] = fleet(table({"a": 1.0}), running).services.values()
        routing = service.table.model_copy(update={"objective": self.objective})
        whole = Fleet([replace(service, table=routing, peer_key=b"k" * 32)])
        self.router.update(whole)
        self.moves.update(whole)

    def streams(self, count: int, **changes: Any) -> list[Stream]:
        made = []
        for number in range(count):
            ticket = self.router.admit("team/chat", RequestShape(prompt_bytes=10, max_output_tokens=2000))
            assert self.router.assign(ticket) is not None
            self.router.started(ticket)
            made.append(Stream(self, ticket, self.engines[0], f"r{number}", **changes))
            self.router.moved(ticket, self.engines[0])
            self.moves._running["a-0"].add(cast(Moved, made[-1]))
        return made

    async def _migrate(self, request: str, source: Any, destination: Any, owner: Any, *, settings: Any) -> Outcome:
        self.asked.append((request, destination.name))
        self.replay = settings.replay
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        return self.outcome

    async def after(self, seconds: float) -> dict[str, int]:
        await asyncio.sleep(seconds)
        await self.moves.close()
        return {engine.id: len(self.moves.running(engine.id)) for engine in self.engines}


async def test_streams_move_one_by_one_until_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.streams(8)
    assert await rig.after(0.5) == {"a-0": 4, "a-1": 4}
    assert rig.most_at_once == 1
    assert len(rig.asked) == 4
    assert rig.replay is Replay.NEVER


async def test_a_stream_that_could_not_move_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.outcome = Outcome(Result.STAYED)
    rig.streams(3)
    assert await rig.after(0.3) == {"a-0": 3, "a-1": 0}
    assert sorted(name for name, _ in rig.asked) == ["r0", "r1", "r2"]


@pytest.mark.parametrize("changes", [{"begun": False}, {"streamed": False}, {"can_move": False}, {"high": True}])
async def test_who_cannot_move_is_left_alone(monkeypatch: pytest.MonkeyPatch, changes: dict[str, bool]) -> None:
    rig = Rig(monkeypatch)
    rig.streams(6, **changes)
    assert await rig.after(0.1) == {"a-0": 6, "a-1": 0}
    assert not rig.asked


async def test_without_an_objective_nothing_is_rebalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, objective=None)
    rig.streams(6)
    assert await rig.after(0.1) == {"a-0": 6, "a-1": 0}
    assert not rig.asked


async def test_nothing_is_rebalanced_towards_an_engine_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.streams(6)
    rig.update([rig.engines[0], replace(rig.engines[1], leaving=Leaving(LeavingReason.DELETED))])
    assert await rig.after(0.1) == {"a-0": 6, "a-1": 0}
    assert not rig.asked
