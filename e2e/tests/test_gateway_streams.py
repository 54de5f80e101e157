"""The gateway gives its client one answer out of several engines' ones, whatever breaks between them.

Engines are fakes that are cut and handed over by the test, and the test says what a coordinator would.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest

from e2e.migration.answer import Api
from e2e.migration.compare import differences
from e2e.migration.fake_engine import TOKENS, FakeEngine
from e2e.migration.leg import Call
from e2e.migration.owner import StreamOwner, Transcript
from gateway_testing.tables import table
from llmfleet.api.migration_messages import Journal, JournalEntry
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving.moves import Moved, Moves
from llmfleet.gateway.moving.owner import MovingStream
from llmfleet.gateway.policy import Router
from llmfleet.gateway.transport import AsyncioDataPlane, Limits
from llmfleet.migration.ports import Delivered, request_id
from llmfleet.migration.stream import StreamPhase

MIGRATION = "0123456789abcdef0123456789abcdef"
AGAIN = "ff" * 16
TOOLS = [{"type": "function", "function": {"name": "look"}}]
STREAM = {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
COMPLETION = Call(Api.COMPLETIONS, STREAM)
CALLS = {
    "completion": COMPLETION,
    "completion, whole": Call(Api.COMPLETIONS, {"model": "m"}),
    "completion with a stop string": Call(Api.COMPLETIONS, {**STREAM, "stop": ["klm"]}),
    "chat": Call(Api.CHAT, STREAM),
    "chat, whole": Call(Api.CHAT, {"model": "m"}),
    "chat with tools": Call(Api.CHAT, {**STREAM, "tools": TOOLS}),
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Rig:
    """A gateway before engines `a` and `b`; `b` gets no new requests, and has given its answer as soon as it may."""

    def __init__(self, session: aiohttp.ClientSession, a: FakeEngine, b: FakeEngine) -> None:
        self.session, self.a, self.b = session, a, b
        self.metrics = GatewayMetrics()
        self.plane = AsyncioDataPlane(Router(time.monotonic, "test"), Limits(), self.metrics)
        self.url = ""
        self.gate = asyncio.Semaphore(1)

    @property
    def moves(self) -> Moves:
        return self.plane._plane.moves

    def engine(self, fake: FakeEngine) -> Engine:
        host, _, port = fake.url.removeprefix("http://").partition(":")
        # Nobody listens there: what a coordinator would say, the test does.
        return Engine(fake.url, host, int(port), "fast", control="127.0.0.1:9")

    async def start(self) -> None:
        self.url = f"http://127.0.0.1:{await self.plane.start('127.0.0.1', 0)}"
        self.plane.update(Fleet([Service(table(), (self.engine(self.a),), peer_key=b"k" * 32)]))

    def client(self, call: Call) -> StreamOwner:
        """A client of the gateway, for whom nothing moves."""
        return StreamOwner(self.session, {"gateway": self.url}, call, request="mine", engine="gateway")

    async def begun(self) -> tuple[Moved, MovingStream]:
        """The request, once `a` has it, and its owner."""
        async with asyncio.timeout(5):
            await self.a.has_any()
        (request,) = self.moves.running(self.a.url)
        assert request.engine_request in self.a.requests
        return request, request.owner()

    async def parked(self, owner: MovingStream) -> None:
        """Through the course up to the cut."""
        owner.towards(self.engine(self.b), self.gate)
        assert await owner.begin() is not None
        await owner.park(self.b.url, MIGRATION)
        async with asyncio.timeout(5):
            await self.b.has(request_id(MIGRATION))

    async def frozen(self, request: Moved, owner: MovingStream, tokens: int) -> None:
        """Cut at `a` after so many tokens."""
        await self.parked(owner)
        assert await owner.freeze()
        self.a.cut(request.engine_request, tokens)
        self.a.allow(TOKENS)

    async def arrived(self, client: StreamOwner, tokens: int) -> None:
        """Until the client has got so many."""
        while len(client.transcript.answer.tokens()) < tokens:
            client.delivery.clear()
            await client.delivery.wait()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with aiohttp.ClientSession() as session, FakeEngine().serving() as a, FakeEngine().serving() as b:
        b.allow(TOKENS)
        rig = Rig(session, a, b)
        await rig.start()
        yield rig
        await rig.plane.drain(0.0)


@contextlib.asynccontextmanager
async def running(client: StreamOwner) -> AsyncIterator[asyncio.Task[Transcript]]:
    task = asyncio.create_task(client.run())
    try:
        async with asyncio.timeout(10):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def undisturbed(rig: Rig, call: Call) -> Transcript:
    rig.a.allow(TOKENS)
    transcript = await rig.client(call).run()
    rig.a.allow(0)
    rig.a.requests.clear()
    return transcript


def text_of(transcript: Transcript) -> str:
    return "".join(value for value in transcript.answer.fields.values() if isinstance(value, str) and value != "look")


def outcomes(rig: Rig, outcome: str) -> float:
    labels = {"namespace": "team", "service": "chat", "variant": "fast", "outcome": outcome}
    return rig.metrics.registry.get_sample_value("llmfleet_gateway_requests_total", labels) or 0.0


@EVERY_CALL
@pytest.mark.parametrize("cut", [1, 2, 7, TOKENS - 1])
async def test_an_answer_that_moves_is_the_one_that_stays(rig: Rig, call: Call, cut: int) -> None:
    expected = await undisturbed(rig, call)
    assert text_of(expected) == "abcdefghijkl"
    client = rig.client(call)
    async with running(client) as task:
        request, owner = await rig.begun()
        rig.a.allow(max(1, cut - 1))
        if call.streamed:
            await rig.arrived(client, max(1, cut - 1))
        await rig.frozen(request, owner, max(2, cut))
        rig.b.hand_over(request_id(MIGRATION), max(2, cut))
        if not call.streamed:
            owner.runs_there()
        transcript = await task
    assert [str(one) for one in differences(expected, transcript)] == []
    assert outcomes(rig, "200") == 2
    assert rig.moves.running(rig.a.url) == rig.moves.running(rig.b.url) == ()


async def test_what_the_cut_lets_out_of_a_held_back_text_is_not_told(rig: Rig) -> None:
    rig.a.held_back = rig.b.held_back = 3
    client = rig.client(CALLS["completion with a stop string"])
    async with running(client) as task:
        request, owner = await rig.begun()
        rig.a.allow(5)
        await rig.arrived(client, 5)
        await rig.frozen(request, owner, 6)
        await asyncio.sleep(0.05)
        assert text_of(client.transcript) == "ab"
        rig.b.allow(8)
        rig.b.hand_over(request_id(MIGRATION), 6)
        await rig.arrived(client, 8)
        assert text_of(client.transcript) == "abcde"
        rig.b.allow(TOKENS)
        assert text_of(await task) == "abcdefghijkl"


@pytest.mark.parametrize("call", [COMPLETION, CALLS["chat, whole"]], ids=["stream", "whole"])
async def test_the_end_of_the_cut_leg_means_nothing_until_the_source_has_spoken(rig: Rig, call: Call) -> None:
    expected = await undisturbed(rig, call)
    client = rig.client(call)
    async with running(client) as task:
        request, owner = await rig.begun()
        if call.streamed:
            rig.a.allow(1)
            await rig.arrived(client, 1)
        await rig.frozen(request, owner, TOKENS)
        await asyncio.sleep(0.05)
        assert not task.done()
        await owner.finished()
        assert [str(one) for one in differences(expected, await task)] == []
    await asyncio.sleep(0.05)
    assert rig.b.requests[request_id(MIGRATION)].gone


async def test_a_source_that_dies_in_the_freeze_goes_on_at_the_parked_destination(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    client = rig.client(COMPLETION)
    async with running(client) as task:
        request, owner = await rig.begun()
        rig.a.allow(4)
        await rig.arrived(client, 4)
        await rig.parked(owner)
        assert await owner.freeze()
        rig.a.break_off(request.engine_request)
        await asyncio.sleep(0.02)
        assert await owner.source_lost() == Delivered([], lagged=True)
        rig.b.hand_over(request_id(MIGRATION), 0)
        assert [str(one) for one in differences(expected, await task)] == []


async def test_a_destination_that_dies_before_the_cut_is_not_seen_by_the_client(rig: Rig) -> None:
    expected = await undisturbed(rig, COMPLETION)
    client = rig.client(COMPLETION)
    async with running(client) as task:
        _, owner = await rig.begun()
        rig.a.allow(4)
        await rig.arrived(client, 4)
        await rig.parked(owner)
        rig.b.break_off(request_id(MIGRATION))
        await owner.stays()
        assert owner.phase is StreamPhase.STREAMING
        rig.a.allow(TOKENS)
        assert [str(one) for one in differences(expected, await task)] == []


@pytest.mark.parametrize("call", [COMPLETION, CALLS["chat with tools"]], ids=["completion", "tools"])
async def test_a_stream_whose_engine_dies_goes_on_elsewhere(
    rig: Rig, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(rig, call)

    def resume(request: Moved) -> None:
        async def at_b() -> None:
            await request.owner().open_resumed(rig.engine(rig.b), AGAIN)
            await rig.b.has(request_id(AGAIN))
            rig.b.hand_over(request_id(AGAIN), 3)

        request.owner().resuming(asyncio.create_task(at_b()))

    monkeypatch.setattr(rig.moves, "resume", resume)
    client = rig.client(call)
    async with running(client) as task:
        request, _ = await rig.begun()
        rig.a.allow(4)
        await rig.arrived(client, 4)
        rig.a.break_off(request.engine_request)
        assert [str(one) for one in differences(expected, await task)] == []
    assert outcomes(rig, "200") == 2


@pytest.mark.parametrize(
    ("call", "tokens"),
    [
        (COMPLETION, 7),
        (Call(Api.COMPLETIONS, {**STREAM, "logprobs": 0}), 4),
        (Call(Api.CHAT, {**STREAM, "logprobs": True}), 4),
        (Call(Api.CHAT, {**STREAM, "logprobs": False}), 7),
    ],
    ids=["completion", "completion, logprobs", "chat, logprobs", "chat, no logprobs"],
)
async def test_log_probabilities_that_died_with_the_engine_are_made_anew(rig: Rig, call: Call, tokens: int) -> None:
    async with running(client := rig.client(call)):
        request, _ = await rig.begun()
        rig.a.allow(4)
        await rig.arrived(client, 4)
        link = rig.moves.link(request.service_key, rig.engine(rig.a))
        assert link is not None
        ahead = JournalEntry(request=request.engine_request, index=0, ids=list(range(100, 107)))
        link.journal._take(Journal(entries=[ahead]))
        assert rig.moves.delivered(request) == Delivered(ahead.ids[:tokens], lagged=False)


async def test_a_stream_that_nobody_goes_on_with_ends_with_an_error(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.moves, "resume", lambda request: request.give_up("was lost for good"))
    client = rig.client(COMPLETION)
    async with running(client) as task:
        request, _ = await rig.begun()
        rig.a.allow(4)
        await rig.arrived(client, 4)
        rig.a.break_off(request.engine_request)
        transcript = await task
    assert "was lost for good" in str(transcript.error)
    assert text_of(transcript) == "abcd"
    assert outcomes(rig, "engine_lost") == 1


async def test_a_leg_that_tells_another_answer_ends_the_stream_with_an_error(rig: Rig) -> None:
    rig.b.text = "abXdefghijkl"
    client = rig.client(COMPLETION)
    async with running(client) as task:
        request, owner = await rig.begun()
        rig.a.allow(4)
        await rig.arrived(client, 4)
        await rig.frozen(request, owner, 5)
        rig.b.hand_over(request_id(MIGRATION), 5)
        transcript = await task
    assert "repeated another 0/text than was told" in str(transcript.error)
    assert text_of(transcript) in ("abcd", "abcde")


async def test_a_client_that_goes_away_closes_both_legs(rig: Rig) -> None:
    client = rig.client(COMPLETION)
    async with running(client) as task:
        request, owner = await rig.begun()
        rig.a.allow(2)
        await rig.arrived(client, 2)
        await rig.parked(owner)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(2):
            while not (rig.a.requests[request.engine_request].gone and rig.b.requests[request_id(MIGRATION)].gone):
                rig.a.allow(rig.a.allowed + 1)
                await asyncio.sleep(0.01)
    assert outcomes(rig, "client_gone") == 1


async def test_no_more_are_cut_at_once_than_the_gate_lets_through(rig: Rig) -> None:
    client = rig.client(COMPLETION)
    async with running(client):
        _, owner = await rig.begun()
        await rig.gate.acquire()
        parked = asyncio.create_task(rig.parked(owner))
        await asyncio.sleep(0.02)
        assert rig.b.requests == {}
        rig.gate.release()
        await parked
        assert rig.gate.locked()
        await owner.stays()
        owner.settle()
        assert not rig.gate.locked()


async def test_a_second_migration_of_the_same_stream_is_refused(rig: Rig) -> None:
    client = rig.client(COMPLETION)
    async with running(client):
        _, owner = await rig.begun()
        assert await owner.begin() == 2
        assert await owner.begin() is None
