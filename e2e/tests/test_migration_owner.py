"""The owner over HTTP gives its client one answer out of several legs, whatever breaks between them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from e2e.migration.answer import Api
from e2e.migration.compare import differences
from e2e.migration.fake_engine import TOKENS, FakeEngine
from e2e.migration.leg import Call
from e2e.migration.owner import StreamOwner, Transcript
from llmfleet.migration.ports import Delivered, request_id
from llmfleet.migration.stream import StreamPhase

MIGRATION = "0123456789abcdef0123456789abcdef"
AGAIN = "ff" * 16
TOOLS = [{"type": "function", "function": {"name": "look"}}]

COMPLETION = Call(Api.COMPLETIONS, {"model": "m", "stream": True})
CALLS = {
    "completion": COMPLETION,
    "completion, whole": Call(Api.COMPLETIONS, {"model": "m"}),
    "completion with a stop string": Call(Api.COMPLETIONS, {"model": "m", "stream": True, "stop": ["klm"]}),
    "chat": Call(Api.CHAT, {"model": "m", "stream": True}),
    "chat, whole": Call(Api.CHAT, {"model": "m"}),
    "chat with tools": Call(Api.CHAT, {"model": "m", "stream": True, "tools": TOOLS}),
    "response": Call(Api.RESPONSES, {"model": "m", "stream": True}),
    "response, whole": Call(Api.RESPONSES, {"model": "m"}),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Rig:
    """Engines `a` and `b` and an owner whose request began at `a`."""

    def __init__(self, session: aiohttp.ClientSession, engines: dict[str, FakeEngine]) -> None:
        self.session, self.engines = session, engines
        self.a, self.b = engines["a"], engines["b"]
        self.resumed: list[Delivered] = []

    def owner(self, call: Call, **options: Any) -> StreamOwner:
        urls = {name: engine.url for name, engine in self.engines.items()}
        return StreamOwner(self.session, urls, call, request="r", engine="a", **options)

    async def resume_at_b(self, owner: StreamOwner, delivered: Delivered) -> None:
        self.resumed.append(delivered)
        owner.open_resumed("b", request_id(AGAIN))
        await self.known(self.b, request_id(AGAIN))
        self.b.hand_over(request_id(AGAIN), len(delivered.tokens))

    async def known(self, engine: FakeEngine, request: str) -> None:
        """Wait until an engine has the request."""
        async with asyncio.timeout(5):
            await engine.has(request)

    async def parked(self, owner: StreamOwner) -> None:
        """Through the course up to the cut."""
        assert await owner.begin() == 2
        await owner.park("b", MIGRATION)
        await self.known(self.b, request_id(MIGRATION))

    async def frozen(self, owner: StreamOwner, tokens: int) -> None:
        """Cut at `a` after so many tokens."""
        await self.parked(owner)
        assert await owner.freeze()
        self.a.cut("r", tokens)
        self.a.allow(TOKENS)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with aiohttp.ClientSession() as session, FakeEngine().serving() as a, FakeEngine().serving() as b:
        b.allow(TOKENS)
        yield Rig(session, {"a": a, "b": b})


@contextlib.asynccontextmanager
async def running(owner: StreamOwner) -> AsyncIterator[asyncio.Task[Transcript]]:
    task = asyncio.create_task(owner.run())
    try:
        async with asyncio.timeout(10):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def undisturbed(rig: Rig, call: Call) -> Transcript:
    """What the client gets when nothing happens."""
    rig.a.allow(TOKENS)
    transcript = await rig.owner(call).run()
    rig.a.allow(0)
    del rig.a.requests["r"]
    return transcript


def text_of(transcript: Transcript) -> str:
    return "".join(value for value in transcript.answer.fields.values() if isinstance(value, str) and value != "look")


@EVERY_CALL
async def test_without_a_migration_the_answer_is_the_engines(rig: Rig, call: Call) -> None:
    transcript = await undisturbed(rig, call)
    assert text_of(transcript) == "abcdefghijkl"
    assert transcript.answer.finish[0][0] in ("length", "completed")
    assert transcript.answer.usage == {"completion_tokens": TOKENS}
    assert transcript.error is None
    assert transcript.legs == ["a"]


@EVERY_CALL
@pytest.mark.parametrize("cut", [1, 2, 7, TOKENS - 1])
async def test_a_stream_that_moves_gives_the_same_answer(rig: Rig, call: Call, cut: int) -> None:
    expected = await undisturbed(rig, call)
    owner = rig.owner(call)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.allow(cut - 1)
        if call.streamed and cut > 1:
            await owner.arrived(cut - 1)
        await rig.frozen(owner, cut)
        rig.b.hand_over(request_id(MIGRATION), cut)
        transcript = await task
    assert differences(expected, transcript) == []
    assert transcript.legs[-1] == "b"


async def test_what_the_cut_lets_out_of_a_held_back_text_is_not_delivered() -> None:
    a, b = FakeEngine(held_back=3), FakeEngine(held_back=3)
    async with aiohttp.ClientSession() as session, a.serving(), b.serving():
        rig = Rig(session, {"a": a, "b": b})
        owner = rig.owner(CALLS["completion with a stop string"])
        async with running(owner):
            await rig.known(a, "r")
            a.allow(5)
            await owner.arrived(5)
            await rig.frozen(owner, 6)
            await asyncio.sleep(0.05)
            assert text_of(owner.transcript) == "ab"
            b.hand_over(request_id(MIGRATION), 6)
            b.allow(8)
            while len(owner.transcript.answer.tokens()) < 8:
                await owner.arrived(len(owner.transcript.arrivals) + 1)
            assert text_of(owner.transcript) == "abcde"
            assert owner.transcript.mismatches == []


async def test_the_end_of_the_cut_leg_means_nothing_until_the_source_has_spoken(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    owner = rig.owner(COMPLETION)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        await rig.frozen(owner, TOKENS)
        await asyncio.sleep(0.1)
        assert not task.done()
        await owner.finished()
        assert differences(expected, await task) == []
    await asyncio.sleep(0.05)
    assert rig.b.requests[request_id(MIGRATION)].gone


async def test_a_source_that_dies_before_the_cut_is_resumed_from_what_was_delivered(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    owner = rig.owner(COMPLETION, resumption=rig.resume_at_b)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.allow(4)
        await owner.arrived(4)
        rig.a.break_off("r")
        transcript = await task
    assert differences(expected, transcript) == []
    assert [len(one.tokens) for one in rig.resumed] == [4]
    assert transcript.legs == ["a", "b"]


async def test_a_source_that_dies_in_the_freeze_goes_on_at_the_parked_destination(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    owner = rig.owner(COMPLETION, resumption=rig.resume_at_b)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.allow(4)
        await owner.arrived(4)
        await rig.parked(owner)
        assert await owner.freeze()
        rig.a.break_off("r")
        delivered = await owner.source_lost()
        assert delivered == Delivered([100, 101, 102, 103], lagged=False)
        rig.b.hand_over(request_id(MIGRATION), 4)
        assert differences(expected, await task) == []
    assert rig.resumed == []


async def test_a_destination_that_dies_before_the_cut_is_not_seen_by_the_client(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    owner = rig.owner(COMPLETION)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.allow(4)
        await owner.arrived(4)
        await rig.parked(owner)
        rig.b.break_off(request_id(MIGRATION))
        await owner.stays()
        rig.a.allow(TOKENS)
        transcript = await task
    assert differences(expected, transcript) == []
    assert transcript.legs == ["a"]


async def test_a_destination_that_dies_after_the_cut_is_resumed_elsewhere(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    owner = rig.owner(COMPLETION, resumption=rig.resume_at_b)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        await rig.frozen(owner, 5)
        rig.b.break_off(request_id(MIGRATION))
        await owner.arrived(5)
        await owner.resume()
        assert differences(expected, await task) == []
    assert [len(one.tokens) for one in rig.resumed] == [5]


async def test_an_owner_that_hears_nothing_before_the_freeze_stays(rig: Rig) -> None:
    owner = rig.owner(COMPLETION, patience_s=0.05)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.allow(2)
        await owner.arrived(2)
        await rig.parked(owner)
        await asyncio.sleep(0.15)
        assert owner.phase is StreamPhase.STREAMING
        assert not await owner.freeze()
        rig.a.allow(TOKENS)
        assert text_of(await task) == "abcdefghijkl"
    assert rig.b.requests[request_id(MIGRATION)].gone


async def test_an_owner_that_hears_nothing_after_the_freeze_resumes(rig: Rig) -> None:
    owner = rig.owner(COMPLETION, patience_s=0.05, resumption=rig.resume_at_b)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        await rig.frozen(owner, 3)
        assert text_of(await task) == "abcdefghijkl"
    assert [len(one.tokens) for one in rig.resumed] == [3]


async def test_a_second_migration_of_the_same_stream_is_refused(rig: Rig) -> None:
    owner = rig.owner(COMPLETION)
    async with running(owner):
        await rig.known(rig.a, "r")
        assert await owner.begin() == 2
        assert await owner.begin() is None


async def test_a_client_that_goes_away_closes_both_legs(rig: Rig) -> None:
    owner = rig.owner(COMPLETION)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        await rig.parked(owner)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(2):
            while not (rig.a.requests["r"].gone and rig.b.requests[request_id(MIGRATION)].gone):
                rig.a.allow(rig.a.allowed + 1)
                await asyncio.sleep(0.01)


async def test_a_bad_request_is_the_clients_and_no_other_engine_is_asked(rig: Rig) -> None:
    owner = rig.owner(Call(Api.COMPLETIONS, {"model": "another", "stream": True}), resumption=rig.resume_at_b)
    transcript = await owner.run()
    assert transcript.error is not None
    assert "no model another" in transcript.error
    assert rig.resumed == []


async def test_a_stream_whose_legs_all_break_ends_with_an_error(rig: Rig) -> None:
    async def resume_and_break(owner: StreamOwner, delivered: Delivered) -> None:
        owner.open_resumed("b", request_id(AGAIN))
        await rig.known(rig.b, request_id(AGAIN))
        rig.b.break_off(request_id(AGAIN))
        del rig.b.requests[request_id(AGAIN)]

    owner = rig.owner(COMPLETION, resumption=resume_and_break)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.break_off("r")
        transcript = await task
    assert transcript.error is not None
    assert "8 attempts" in transcript.error


async def test_a_leg_that_repeats_something_else_is_found(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    rig.b.text = "abXdefghijkl"
    owner = rig.owner(COMPLETION)
    async with running(owner) as task:
        await rig.known(rig.a, "r")
        rig.a.allow(4)
        await owner.arrived(4)
        await rig.frozen(owner, 5)
        rig.b.hand_over(request_id(MIGRATION), 5)
        found = differences(expected, await task)
    assert "repeated (0, 'text') at 2: expected 'cdefghij', got 'Xdefghij'" in map(str, found)
