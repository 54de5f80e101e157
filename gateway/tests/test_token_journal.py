"""A gateway knows the tokens of its own streams at an engine, whenever it subscribed and however often it had to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gateway_testing.harness import eventually
from llmfleet.api import Reason
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    Journal,
    JournalEntry,
    Refused,
    Subscribe,
    Subscribed,
    Unsubscribe,
)
from llmfleet.gateway.moving import journal as journal_module
from llmfleet.gateway.moving.journal import TokenJournal
from llmfleet.migration.control import connect
from llmfleet.migration.control_server import ControlServer, Peer, serve

KEY = b"k" * 32


class Telling:
    """An engine's control port that knows nothing but its journal."""

    def __init__(self) -> None:
        self.followed: set[str] = set()
        self.peers: list[Peer] = []
        self.server: ControlServer | None = None
        self.port = 0

    async def start(self) -> None:
        self.server = await serve(f"127.0.0.1:{self.port}", KEY, self._handle)
        self.port = self.server.port

    async def stop(self) -> None:
        assert self.server is not None
        await self.server.close()
        self.followed.clear()
        self.peers.clear()

    async def _handle(self, ask: AnyAsk, peer: Peer) -> AnyAnswer:
        match ask:
            case Subscribe():
                self.followed |= set(ask.requests)
                if peer not in self.peers:
                    self.peers.append(peer)
            case Unsubscribe():
                self.followed -= set(ask.requests)
            case _:
                return Refused(reason=Reason.FAILED)
        return Subscribed(requests=len(self.followed))

    def tell(self, request: str, index: int, ids: list[int], *, lagging: bool = False) -> None:
        entry = JournalEntry(request=request, index=index, ids=ids)
        assert self.peers[-1].publish(Journal(entries=[entry], lagging=lagging))


@contextlib.asynccontextmanager
async def journal_of(engine: Telling) -> AsyncIterator[TokenJournal]:
    await engine.start()
    control = connect(f"127.0.0.1:{engine.port}", KEY, "engine")
    journal = TokenJournal(control)
    try:
        yield journal
    finally:
        await journal.close()
        await control.close()
        await engine.stop()


async def test_tokens_of_a_stream_are_known_as_they_are_told() -> None:
    engine = Telling()
    async with journal_of(engine) as journal:
        journal.follow("r1")
        await eventually(lambda: engine.followed == {"r1"})
        engine.tell("r1", 0, [5, 6])
        engine.tell("r1", 2, [7])
        await eventually(lambda: journal.tokens("r1") == ([5, 6, 7], False))
        engine.tell("r1", 3, [8], lagging=True)
        await eventually(lambda: journal.tokens("r1") == ([5, 6, 7, 8], True))
        engine.tell("somebody-elses", 0, [1])
        # What was told already may come again; what leaves a gap is of no use.
        engine.tell("r1", 2, [7, 8, 9])
        engine.tell("r1", 7, [1])
        await eventually(lambda: journal.tokens("r1") == ([5, 6, 7, 8, 9], False))
        assert journal.tokens("somebody-elses") == ([], False)


async def test_who_begins_and_ends_later_is_followed_only_meanwhile() -> None:
    engine = Telling()
    async with journal_of(engine) as journal:
        journal.follow("r1")
        await eventually(lambda: engine.followed == {"r1"})
        for number in range(2, 6):
            journal.follow(f"r{number}")
        journal.forget("r1")
        journal.forget("r5")
        await eventually(lambda: engine.followed == {"r2", "r3", "r4"})
        assert journal.tokens("r1") == ([], False)


async def test_a_journal_that_broke_is_told_again_from_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "_AGAIN_S", 0.02)
    engine = Telling()
    async with journal_of(engine) as journal:
        journal.follow("r1")
        await eventually(lambda: engine.followed == {"r1"})
        engine.tell("r1", 0, [5, 6])
        await eventually(lambda: journal.tokens("r1")[0] == [5, 6])
        assert not journal.ended.is_set()
        await engine.stop()
        await asyncio.wait_for(journal.ended.wait(), 5)
        assert journal.tokens("r1")[0] == [5, 6], "what a dead engine has told is what a stream goes on from"
        await engine.start()
        await eventually(lambda: engine.followed == {"r1"})
        engine.tell("r1", 0, [5, 6, 7])
        await eventually(lambda: journal.tokens("r1")[0] == [5, 6, 7])
