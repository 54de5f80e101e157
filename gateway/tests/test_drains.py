"""Requests of an engine that leaves move, the longest first and not all at once, and none is given up too soon."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest

from gateway_testing.tables import engines, fleet, table
from llmfleet.api import Reason
from llmfleet.gateway.fleet import Engine, Fleet, Leaving, LeavingReason
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving import carry, drains
from llmfleet.gateway.moving.moves import Moved, Moves
from llmfleet.gateway.moving.owner import MovingStream
from llmfleet.gateway.policy import RequestShape, Router, Ticket
from llmfleet.migration.coordinator import Result
from llmfleet.migration.outcome import Outcome, Replay


@dataclass(eq=False)
class Running:
    """A request at an engine, of which nothing but where it runs is real."""

    rig: Rig
    ticket: Ticket
    engine: Engine
    engine_request: str
    length: float = 10.0
    begun: bool = True
    streamed: bool = True
    can_move: bool = True
    finished: bool = False
    high: bool = False
    service_key: str = "team/chat"
    restarts: int = 0

    def answered_tokens(self) -> int:
        return 0

    def remaining_tokens(self) -> float:
        return self.length

    def owner(self) -> MovingStream:
        return cast(MovingStream, _Owner())

    def restart(self) -> None:
        self.restarts += 1
        self.end()

    def end(self) -> None:
        self.rig.moves.left(cast(Moved, self))


class _Owner:
    def towards(self, destination: Engine, gate: asyncio.Semaphore) -> None: ...

    def settle(self) -> None: ...

    def runs_there(self) -> None: ...


class Rig:
    """Engine `a-0` leaves; what a migration comes to is the test's to say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replicas: int = 2) -> None:
        self.router = Router(time.monotonic, "test")
        self.moves = Moves(self.router, GatewayMetrics())
        self.engines = [replace(engine, control="127.0.0.1:9") for engine in engines({"a": replicas})]
        self.asked: list[tuple[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.answer: Callable[[str, str], Outcome] = lambda request, destination: Outcome(Result.MOVED)
        self.hold_s = self.release_s = 0.0
        self.released: list[str] = []
        self.replay: Replay | None = None
        monkeypatch.setattr(carry, "migrate", self._migrate)
        monkeypatch.setattr(drains, "_LOOK_S", 0.005)
        monkeypatch.setattr(drains, "_AGAIN_S", 0.01)
        self.news: list[tuple[str, str, bool]] = []
        self.moves.tell = lambda news: self.news.append((news.reason, news.message, news.warning))
        self._update(self.engines)

    def _update(self, running: list[Engine]) -> None:
        [service] = fleet(table({"a": 1.0}), running).services.values()
        marked = Fleet([replace(service, peer_key=b"k" * 32)])
        self.router.update(marked)
        self.moves.update(marked)

    def request(self, name: str, **changes: Any) -> Running:
        ticket = self.router.admit("team/chat", RequestShape(prompt_bytes=10))
        engine = None
        while engine is None or engine.id != "a-0":
            ticket = self.router.admit("team/chat", RequestShape(prompt_bytes=10))
            engine = self.router.assign(ticket)
        self.router.started(ticket)
        request = Running(self, ticket, engine, name, **changes)
        # Not followed in a journal: nobody listens there.
        self.moves._running[engine.id].add(cast(Moved, request))
        return request

    def leave(self, until_s: float | None = None) -> None:
        leaving = Leaving(LeavingReason.DELETED, until_s)
        self._update([replace(engine, leaving=leaving) if engine.id == "a-0" else engine for engine in self.engines])

    async def _migrate(self, request: str, source: Any, destination: Any, owner: Any, *, settings: Any) -> Outcome:
        self.asked.append((request, destination.name))
        self.replay = settings.replay
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(self.hold_s)
        self.at_once -= 1
        outcome = self.answer(request, destination.name)
        if outcome.result in (Result.MOVED, Result.FINISHED):
            [there] = [one for one in self.moves.running("a-0") if one.engine_request == request]
            cast(Running, there).end()
        await asyncio.sleep(self.release_s)
        self.released.append(request)
        return outcome

    async def empty(self) -> None:
        async with asyncio.timeout(5):
            while self.moves.running("a-0"):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        await asyncio.sleep(self.release_s + 0.02)
        await self.moves.close()


async def test_the_longest_go_first_and_not_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.hold_s = 0.005
    for number in range(40):
        rig.request(f"r{number}", length=float(number))
    rig.leave()
    await rig.empty()
    order = [name for name, _ in rig.asked]
    assert order[: drains.AT_ONCE] == [f"r{number}" for number in range(39, 39 - drains.AT_ONCE, -1)]
    assert rig.most_at_once == drains.AT_ONCE
    assert Counter(order).most_common(1)[0][1] == 1


async def test_they_spread_over_the_engines_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, replicas=4)
    rig.hold_s = 0.01
    for number in range(6):
        rig.request(f"r{number}")
    rig.leave()
    await rig.empty()
    went = Counter(destination for _, destination in rig.asked)
    assert went.keys() == {"a-1", "a-2", "a-3"}
    assert max(went.values()) - min(went.values()) <= 1


async def test_what_finds_no_room_is_tried_elsewhere_and_then_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, replicas=3)
    rig.request("r")

    def answer(request: str, destination: str) -> Outcome:
        return Outcome(Result.STAYED, reason=Reason.NO_ROOM) if len(rig.asked) < 5 else Outcome(Result.MOVED)

    rig.answer = answer
    rig.leave()
    await rig.empty()
    went = [destination for _, destination in rig.asked]
    assert len(went) == 5
    assert set(went[:2]) == set(went[2:4]) == {"a-1", "a-2"}


async def test_what_cannot_move_is_asked_once_and_runs_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    unsupported, plain = rig.request("several"), rig.request("plain", can_move=False)
    rig.answer = lambda request, destination: Outcome(Result.STAYED, reason=Reason.UNSUPPORTED)
    rig.leave()
    await asyncio.sleep(0.1)
    assert rig.asked == [("several", "a-1")]
    unsupported.end()
    plain.end()
    await rig.empty()


async def test_a_stream_of_which_nothing_has_come_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    waiting = rig.request("waiting", begun=False)
    whole = rig.request("whole", begun=False, streamed=False)
    rig.leave()
    await rig.empty()
    assert waiting.restarts == 1
    assert rig.asked == [(whole.engine_request, "a-1")]


async def test_without_another_engine_it_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, replicas=1)
    moving, waiting = rig.request("r"), rig.request("waiting", begun=False)
    rig.leave()
    await asyncio.sleep(0.05)
    assert rig.asked == []
    assert waiting.restarts == 0
    moving.end()
    waiting.end()
    await rig.empty()


@pytest.mark.parametrize(("left_s", "replay"), [(None, Replay.EXACT), (60.0, Replay.EXACT), (1.0, Replay.INEXACT)])
async def test_at_the_end_an_inexact_continuation_is_better_than_none(
    monkeypatch: pytest.MonkeyPatch, left_s: float | None, replay: Replay
) -> None:
    rig = Rig(monkeypatch)
    rig.request("r")
    rig.leave(None if left_s is None else time.time() + left_s)
    await rig.empty()
    assert rig.replay is replay


async def test_a_drain_that_is_taken_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.answer = lambda request, destination: Outcome(Result.STAYED, reason=Reason.BUSY)
    request = rig.request("r")
    rig.leave()
    await asyncio.sleep(0.05)
    rig._update(rig.engines)
    await asyncio.sleep(0.05)
    asked = len(rig.asked)
    assert asked > 1
    await asyncio.sleep(0.05)
    assert len(rig.asked) == asked
    request.end()
    await rig.empty()


async def test_how_a_drain_ends_and_what_cannot_move_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    for number in range(3):
        rig.request(f"r{number}")
    stays = [rig.request(f"whole-{number}", can_move=False) for number in range(2)]
    rig.leave()
    async with asyncio.timeout(5):
        while len(rig.moves.running("a-0")) > len(stays):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
    for request in stays:
        request.end()
    await rig.empty()
    assert rig.news == [
        (
            "StreamsStay",
            "a request cannot move to another engine and runs to its end here: its kind of call cannot be handed over",
            True,
        ),
        ("StreamsMoved", "3 requests moved to other engines (deleted); 2 stayed to their end", False),
    ]


async def test_a_drain_lasts_until_the_last_migration_has_released_what_the_engine_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    rig.release_s = 0.1
    rig.request("r1")
    rig.leave()
    await rig.empty()
    assert rig.released == ["r1"]
    assert rig.news == [("StreamsMoved", "1 requests moved to other engines (deleted); 0 stayed to their end", False)]
