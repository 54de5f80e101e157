"""Control connections over real sockets: answers find their asks, and no peer disturbs another one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from llmfleet.api import Reason
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    GetLoad,
    Journal,
    JournalEntry,
    ListRequests,
    Load,
    Refused,
    RequestList,
    Subscribe,
    Subscribed,
    parse_answer,
    to_payload,
)
from llmfleet.migration.control import ControlConnection, Subscription, connect
from llmfleet.migration.control_server import ControlServer, Peer, serve
from llmfleet.migration.frames import CONTROL_HEADER_BYTES, ControlFrame, ControlKind, ControlReader, ControlWriter
from llmfleet.migration.handshake import CONTROL, HELLO_BYTES, REPLY_BYTES, Initiator
from llmfleet.migration.ports import NoAnswerError
from llmfleet.migration.tcp import ControlLimits

KEY = b"k" * 32
SOON_S = 5.0
LOAD = Load(
    blocks_total=10, blocks_free=9, blocks_reserved=0, blocks_held=0, running=1, waiting=0, step_ms=1, incoming=0,
    outgoing=0,
)  # fmt: skip


@dataclass
class Counts:
    refused: list[Reason] = field(default_factory=list)
    answered_with: list[tuple[str, Reason | None]] = field(default_factory=list)
    told: asyncio.Event = field(default_factory=asyncio.Event)

    def answered(self, kind: str, refused: Reason | None) -> None:
        self.answered_with.append((kind, refused))

    def connection_refused(self, reason: Reason) -> None:
        self.refused.append(reason)
        self.told.set()


async def tells_load(ask: AnyAsk, peer: Peer) -> AnyAnswer:
    return LOAD if isinstance(ask, GetLoad) else RequestList(requests=[])


@asynccontextmanager
async def engine(
    handler: Callable[[AnyAsk, Peer], Awaitable[AnyAnswer]] = tells_load,
    limits: ControlLimits | None = None,
    port: int = 0,
) -> AsyncIterator[tuple[ControlServer, Counts]]:
    counts = Counts()
    server = await serve(f"127.0.0.1:{port}", KEY, handler, limits, counts)
    try:
        yield server, counts
    finally:
        await server.close()


@asynccontextmanager
async def asking(server: ControlServer, key: bytes = KEY) -> AsyncIterator[ControlConnection]:
    connection = connect(f"127.0.0.1:{server.port}", key, name="engine")
    try:
        yield connection
    finally:
        await connection.close()


@dataclass
class Raw:
    """A peer that has the key and says what it likes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    out: ControlWriter
    into: ControlReader

    def say(self, payload: bytes, kind: ControlKind = ControlKind.ASK) -> None:
        self.writer.write(self.out.frame(ControlFrame(kind, 7, payload)))

    async def hear(self) -> AnyAnswer:
        async with asyncio.timeout(SOON_S):
            header = await self.reader.readexactly(CONTROL_HEADER_BYTES)
            frame = self.into.frame(header, await self.reader.readexactly(self.into.rest(header)))
        assert (frame.kind, frame.number) == (ControlKind.ANSWER, 7)
        return parse_answer(frame.payload)

    async def closed(self) -> bool:
        async with asyncio.timeout(SOON_S):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


@asynccontextmanager
async def raw(server: ControlServer) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        initiator = Initiator(KEY, CONTROL)
        writer.write(initiator.hello)
        proof, session = initiator.finish(await reader.readexactly(REPLY_BYTES))
        writer.write(proof)
        yield Raw(reader, writer, ControlWriter(session.send_key), ControlReader(session.receive_key, 2**20))
    finally:
        writer.transport.abort()


async def test_every_ask_gets_its_own_answer_and_a_long_one_holds_nothing_up() -> None:
    begun, end = asyncio.Event(), asyncio.Event()

    async def slow_requests(ask: AnyAsk, peer: Peer) -> AnyAnswer:
        if isinstance(ask, ListRequests):
            begun.set()
            await end.wait()
        return await tells_load(ask, peer)

    async with engine(slow_requests) as (server, counts), asking(server) as connection:
        slow = asyncio.create_task(connection.ask(ListRequests(), SOON_S))
        await begun.wait()
        loads = await asyncio.gather(*(connection.ask(GetLoad(), SOON_S) for _ in range(20)))
        assert loads == [LOAD] * 20
        assert not slow.done()
        end.set()
        assert await slow == RequestList(requests=[])
        assert counts.answered_with == [("load", None)] * 20 + [("requests", None)]


async def test_a_peer_with_another_key_is_refused_and_the_others_are_served() -> None:
    async with engine() as (server, counts), asking(server, b"x" * 32) as stranger, asking(server) as friend:
        answer = await stranger.ask(GetLoad(), SOON_S)
        assert isinstance(answer, Refused)
        assert answer.reason is Reason.UNAUTHORIZED
        async with asyncio.timeout(SOON_S):
            await counts.told.wait()
        assert counts.refused == [Reason.UNAUTHORIZED]
        assert await friend.ask(GetLoad(), SOON_S) == LOAD


async def test_a_peer_that_does_not_prove_its_key_is_counted_and_closed() -> None:
    async with engine() as (server, counts):
        for sent in (b"GET / HTTP/1.1\r\n".ljust(HELLO_BYTES), Initiator(KEY, CONTROL).hello + bytes(32)):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            assert len(await reader.read()) in (0, REPLY_BYTES)
            writer.close()
        assert counts.refused == [Reason.MALFORMED, Reason.UNAUTHORIZED]


async def test_a_probe_that_only_connects_is_nothing_to_speak_of() -> None:
    async with engine() as (server, counts):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert counts.refused == []


async def test_a_peer_that_never_ends_its_handshake_is_closed() -> None:
    async with engine(limits=ControlLimits(handshake_s=0.05)) as (server, counts):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"LL")
        assert await reader.read() == b""
        writer.close()
        assert counts.refused == [Reason.UNAUTHORIZED]


async def test_a_bad_message_is_answered_and_the_connection_goes_on() -> None:
    async with engine() as (server, counts), raw(server) as peer:
        peer.say(b'{"kind":"load","version":1,"more":1}')
        refused = await peer.hear()
        assert isinstance(refused, Refused)
        assert (refused.reason, refused.field) == (Reason.MALFORMED, "load.more")
        peer.say(b'{"kind":"load","version":2}')
        refused = await peer.hear()
        assert isinstance(refused, Refused)
        assert refused.reason is Reason.UNSUPPORTED_VERSION
        peer.say(to_payload(GetLoad()))
        assert await peer.hear() == LOAD
        assert [reason for _, reason in counts.answered_with] == [Reason.MALFORMED, Reason.UNSUPPORTED_VERSION, None]


async def test_a_message_beyond_the_limit_is_answered_and_the_connection_closed() -> None:
    async with engine(limits=ControlLimits(message_bytes=100)) as (server, counts), raw(server) as peer:
        peer.say(bytes(101))
        refused = await peer.hear()
        assert isinstance(refused, Refused)
        assert (refused.reason, refused.detail) == (
            Reason.TOO_LARGE, "a message of 101 bytes; at most 100 are accepted",
        )  # fmt: skip
        assert await peer.closed()
        assert counts.refused == [Reason.TOO_LARGE]


async def test_a_changed_frame_closes_its_connection_only() -> None:
    async with engine() as (server, counts), raw(server) as peer, asking(server) as other:
        frame = bytearray(peer.out.frame(ControlFrame(ControlKind.ASK, 7, to_payload(GetLoad()))))
        frame[-1] ^= 1
        peer.writer.write(frame)
        assert await peer.closed()
        assert await other.ask(GetLoad(), SOON_S) == LOAD
        assert counts.refused == [Reason.CORRUPT]


async def test_a_frame_that_is_no_ask_closes_the_connection() -> None:
    async with engine() as (server, counts), raw(server) as peer:
        peer.say(b"{}", ControlKind.EVENT)
        assert await peer.closed()
        assert counts.refused == [Reason.CORRUPT]


async def test_a_handler_that_fails_is_answered_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(ask: AnyAsk, peer: Peer) -> AnyAnswer:
        raise RuntimeError("broken")

    async with engine(fails) as (server, _), asking(server) as connection:
        answer = await connection.ask(GetLoad(), SOON_S)
        assert isinstance(answer, Refused)
        assert answer.reason is Reason.FAILED
        assert "answering load of 127.0.0.1" in caplog.text


async def test_an_engine_that_does_not_answer_is_not_waited_for() -> None:
    cancelled = asyncio.Event()

    async def never(ask: AnyAsk, peer: Peer) -> AnyAnswer:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()
        raise AssertionError

    async with engine(never) as (server, _):
        async with asking(server) as connection:
            with pytest.raises(NoAnswerError, match=r"engine said nothing within 0\.05 s"):
                await connection.ask(GetLoad(), 0.05)
            assert not cancelled.is_set()
        async with asyncio.timeout(SOON_S):
            await cancelled.wait()


async def test_nobody_at_the_address_is_no_answer() -> None:
    async with engine() as (server, _):
        address = f"127.0.0.1:{server.port}"
    connection = connect(address, KEY)
    with pytest.raises(NoAnswerError, match=f"{address} cannot be reached"):
        await connection.ask(GetLoad(), SOON_S)
    await connection.close()


async def test_after_a_restart_the_engine_is_reached_again() -> None:
    async with engine() as (server, _):
        port = server.port
        connection = connect(f"127.0.0.1:{port}", KEY)
        assert await connection.ask(GetLoad(), SOON_S) == LOAD
    with pytest.raises(NoAnswerError):
        await connection.ask(GetLoad(), SOON_S)
    async with engine(port=port):
        assert await connection.ask(GetLoad(), SOON_S) == LOAD
    await connection.close()


async def test_an_ask_under_way_when_the_engine_dies_gets_no_answer_at_once() -> None:
    begun = asyncio.Event()

    async def never(ask: AnyAsk, peer: Peer) -> AnyAnswer:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with engine(never) as (server, _), asking(server) as connection:
        ask = asyncio.create_task(connection.ask(GetLoad(), 60))
        await begun.wait()
        await server.close()
        with pytest.raises(NoAnswerError, match="closed by the peer"):
            async with asyncio.timeout(SOON_S):
                await ask


async def test_more_asks_than_an_engine_takes_at_once_are_told_that_it_is_busy() -> None:
    end = asyncio.Event()

    async def waits(ask: AnyAsk, peer: Peer) -> AnyAnswer:
        await end.wait()
        return LOAD

    async with engine(waits, ControlLimits(asks_in_flight=3)) as (server, _), asking(server) as connection:
        asks = [asyncio.create_task(connection.ask(GetLoad(), SOON_S)) for _ in range(5)]
        done, _ = await asyncio.wait(asks, timeout=SOON_S, return_when=asyncio.FIRST_COMPLETED)
        assert all(isinstance(one.result(), Refused) for one in done)
        end.set()
        answers = await asyncio.gather(*asks)
        assert [a.reason for a in answers if isinstance(a, Refused)] == [Reason.BUSY] * 2


async def test_more_connections_than_an_engine_takes_are_closed() -> None:
    async with engine(limits=ControlLimits(connections=1)) as (server, counts), asking(server) as first:
        assert await first.ask(GetLoad(), SOON_S) == LOAD
        async with asking(server) as second:
            with pytest.raises(NoAnswerError):
                await second.ask(GetLoad(), SOON_S)
        assert counts.refused == [Reason.BUSY]
        assert await first.ask(GetLoad(), SOON_S) == LOAD


@dataclass
class Journals:
    """An engine whose subscribers are told what a test says."""

    peers: list[Peer] = field(default_factory=list)

    async def answer(self, ask: AnyAsk, peer: Peer) -> AnyAnswer:
        if isinstance(ask, Subscribe):
            self.peers.append(peer)
        return Subscribed(requests=1)


def journal(index: int, tokens: int = 1) -> Journal:
    return Journal(entries=[JournalEntry(request="r", index=index, ids=[5] * tokens)])


async def subscribed(connection: ControlConnection) -> Subscription:
    subscription = await connection.subscribe(["r"], SOON_S)
    assert isinstance(subscription, Subscription)
    return subscription


async def test_a_subscriber_is_told_every_event_in_order_until_the_connection_ends() -> None:
    journals = Journals()
    async with engine(journals.answer) as (server, _), asking(server) as connection:
        subscription = await subscribed(connection)
        assert await subscription.add(["s"], SOON_S) == Subscribed(requests=1)
        for index in range(50):
            assert journals.peers[0].publish(journal(index))
        await server.close()
        assert [event.entries[0].index async for event in subscription] == list(range(50))
        with pytest.raises(NoAnswerError, match="was lost"):
            await subscription.remove(["s"], SOON_S)


async def test_a_subscriber_that_reads_too_slowly_is_told_less_and_can_be_told_later() -> None:
    journals = Journals()
    limits = ControlLimits(unsent_bytes=1000)
    async with engine(journals.answer, limits) as (server, _), raw(server) as peer:
        peer.say(to_payload(Subscribe(requests=["r"])))
        assert await peer.hear() == Subscribed(requests=1)
        published = 0
        while journals.peers[0].publish(journal(published, tokens=100_000)):
            published += 1
            assert published < 1000, "nothing limits what waits to be sent"
            await asyncio.sleep(0)
        while not journals.peers[0].publish(journal(published)):
            await peer.reader.read(2**20)


async def test_a_reader_that_lost_its_place_has_its_subscription_ended() -> None:
    journals = Journals()
    async with engine(journals.answer) as (server, _):
        connection = connect(f"127.0.0.1:{server.port}", KEY, limits=ControlLimits(journals=3))
        subscription = await subscribed(connection)
        for index in range(10):
            journals.peers[0].publish(journal(index))
        async with asyncio.timeout(SOON_S):
            await journals.peers[0].closed.wait()
        assert [event.entries[0].index async for event in subscription] == [0, 1, 2]
        assert not journals.peers[0].publish(journal(10))
        await connection.close()


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:eighty", "host:70000"])
def test_a_bad_address_is_refused_with_what_is_accepted(address: str) -> None:
    with pytest.raises(ValueError, match=f"address '{address}'; accepted is host:port"):
        connect(address, KEY)


async def test_an_ipv6_address_is_served() -> None:
    server = await serve("[::1]:0", KEY, tells_load)
    connection = connect(f"[::1]:{server.port}", KEY)
    assert await connection.ask(GetLoad(), SOON_S) == LOAD
    await connection.close()
    await server.close()
