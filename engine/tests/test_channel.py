"""Blocks arrive where they belong, over real sockets, and what is damaged or foreign changes nothing."""

from __future__ import annotations

import ctypes
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from llmfleet.engine.channel import DataLink, DataServer, receive
from llmfleet.engine.memory import HostMemory, Layer
from llmfleet.migration.frames import DATA_HEADER_BYTES, DataKind, Header, encode
from llmfleet.migration.handshake import HELLO_BYTES, PROOF_BYTES, REPLY_BYTES, Initiator, Responder, Session

KEY = b"k" * 32
MIGRATION = "ab" * 16
BLOCKS, PAGE, GAP = 64, 700, 68


class Cache:
    """A KV cache of two layers, with memory between the pages that belongs to nobody."""

    def __init__(self, fill: int) -> None:
        self.buffers = [ctypes.create_string_buffer(bytes([fill]) * (BLOCKS * (PAGE + GAP))) for _ in range(2)]
        layers = [Layer(ctypes.addressof(buffer), PAGE + GAP, PAGE) for buffer in self.buffers]
        self.memory = HostMemory(layers, BLOCKS)

    def block(self, number: int) -> bytes:
        return b"".join(bytes(page) for page in self.memory.pages([number]))


class Sink:
    """A destination that reserves blocks 10, 11, ... for the one migration it knows."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.writing = 0
        self.placed = 0
        self.words: list[bytes] = []
        self.over: list[str] = []

    def begin_write(self, migration: str, epoch: int, first: int, count: int) -> list[memoryview] | None:
        if migration != MIGRATION or first + count > 30:
            return None
        self.writing += 1
        return self.memory.pages(range(10 + first, 10 + first + count))

    def end_write(self, migration: str, first: int, count: int, whole: bool) -> int | None:
        self.writing -= 1
        if whole:
            self.placed = max(self.placed, first + count)
        return self.placed

    def word(self, migration: str, epoch: int, payload: bytes) -> bool:
        self.words.append(payload)
        return migration == MIGRATION

    def ended(self, migration: str, epoch: int) -> None:
        self.over.append(migration)


class Replies:
    """A source that remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.links_lost = 0

    def acknowledged(self, migration: str, epoch: int, blocks: int) -> None:
        self.heard.append(("acknowledged", blocks))

    def taken(self, migration: str, epoch: int) -> None:
        self.heard.append(("taken", 0))

    def refused(self, migration: str, epoch: int) -> None:
        self.heard.append(("refused", 0))

    def lost(self, link: DataLink) -> None:
        self.links_lost += 1


class Channel:
    def __init__(self, link_key: bytes = KEY) -> None:
        self.source, self.destination = Cache(0), Cache(255)
        for number in range(BLOCKS):
            for layer, page in enumerate(self.source.memory.pages([number])):
                page[:] = bytes((number * 7 + layer + offset) % 256 for offset in range(PAGE))
        self.sink, self.replies = Sink(self.destination.memory), Replies()
        self.server = DataServer("127.0.0.1:0", KEY, 0, self.destination.memory, self.sink, 2.0)
        address = f"127.0.0.1:{self.server.port}"
        self.link = DataLink(address, link_key, 0, self.source.memory, self.replies, 2.0)

    def hears(self, kind: str, count: int = 0) -> None:
        until(lambda: (kind, count) in self.replies.heard)


@pytest.fixture
def channel() -> Iterator[Channel]:
    opened = Channel()
    yield opened
    opened.link.close()
    opened.server.close()
    until(lambda: opened.replies.links_lost == 1)


def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends, "it does not come to that"
        time.sleep(0.002)


def test_blocks_are_put_in_their_places_and_nothing_beside_them_is_touched(channel: Channel) -> None:
    around = bytes(channel.destination.buffers[0])
    channel.link.send_blocks(MIGRATION, 2, 0, [5, 3, 60])
    channel.link.send_blocks(MIGRATION, 2, 3, range(20, 40))
    channel.hears("acknowledged", 23)
    for place, number in enumerate([5, 3, 60, *range(20, 40)]):
        assert channel.destination.block(10 + place) == channel.source.block(number)
    after = bytes(channel.destination.buffers[0])
    for number in range(BLOCKS):
        gap = slice(number * (PAGE + GAP) + PAGE, (number + 1) * (PAGE + GAP))
        assert after[gap] == around[gap]
    assert channel.destination.block(9) == channel.destination.block(33) == b"\xff" * 2 * PAGE
    assert not channel.sink.writing


def test_the_tail_and_the_word_follow_what_was_sent_before(channel: Channel) -> None:
    channel.link.send_blocks(MIGRATION, 2, 0, range(12))
    channel.link.send_tail(MIGRATION, 2, 12, [40], b"word" * 5000)
    channel.hears("taken")
    assert channel.sink.placed == 13
    assert channel.sink.words == [b"word" * 5000]
    channel.link.send_ended(MIGRATION, 2)
    until(lambda: channel.sink.over == [MIGRATION])


def test_what_nobody_waits_for_is_refused_and_the_channel_goes_on(channel: Channel) -> None:
    channel.link.send_blocks("cd" * 16, 2, 0, [1, 2])
    channel.hears("refused")
    channel.link.send_blocks(MIGRATION, 2, 0, [1])
    channel.hears("acknowledged", 1)


def test_a_peer_with_another_key_gets_nowhere() -> None:
    channel = Channel(link_key=b"x" * 32)
    channel.link.send_blocks(MIGRATION, 2, 0, [1])
    until(lambda: channel.replies.links_lost == 1)
    assert not channel.sink.placed
    channel.server.close()


def test_nothing_listens_there() -> None:
    replies = Replies()
    link = DataLink("127.0.0.1:1", KEY, 0, Cache(0).memory, replies, 1.0)
    link.send_blocks(MIGRATION, 2, 0, [1])
    until(lambda: replies.links_lost == 1)
    assert link.closed


@contextmanager
def by_hand(channel: Channel) -> Iterator[tuple[socket.socket, Session]]:
    """A peer that has the key and does what it likes."""
    with socket.create_connection(("127.0.0.1", channel.server.port), timeout=2) as connection:
        initiator = Initiator(KEY, 0)
        connection.sendall(initiator.hello)
        proof, session = initiator.finish(receive(connection, REPLY_BYTES))
        connection.sendall(proof)
        yield connection, session


def is_closed(connection: socket.socket) -> bool:
    """With what the other side had not read yet, its end is a reset."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def frame(channel: Channel, session: Session, blocks: list[int], counter: int = 0) -> bytes:
    pages = channel.source.memory.pages(blocks)
    header = Header(DataKind.BLOCKS, 0, bytes.fromhex(MIGRATION), 2, 0, len(blocks), 2 * PAGE * len(blocks))
    return b"".join(bytes(buffer) for buffer in encode(header, pages, session.send_key, counter))


@pytest.mark.parametrize("at", [0, 20, DATA_HEADER_BYTES + 100, -1])
def test_a_damaged_frame_is_not_acknowledged_and_ends_the_channel(channel: Channel, at: int) -> None:
    with by_hand(channel) as (connection, session):
        damaged = bytearray(frame(channel, session, [1, 2]))
        damaged[at] ^= 1
        connection.sendall(damaged)
        assert is_closed(connection)
    assert channel.sink.placed == channel.sink.writing == 0


def test_a_frame_said_twice_ends_the_channel(channel: Channel) -> None:
    with by_hand(channel) as (connection, session):
        connection.sendall(frame(channel, session, [1]))
        receive(connection, DATA_HEADER_BYTES)
        connection.sendall(frame(channel, session, [1]))
        assert is_closed(connection)


def test_a_peer_that_goes_silent_within_a_frame_lets_go_of_the_blocks(channel: Channel) -> None:
    with by_hand(channel) as (connection, session):
        connection.sendall(frame(channel, session, [1, 2])[:-600])
        until(lambda: channel.sink.writing == 1)
        until(lambda: channel.sink.writing == 0)
    assert not channel.sink.placed


def test_a_frame_of_another_length_than_its_blocks_writes_nothing(channel: Channel) -> None:
    with by_hand(channel) as (connection, session):
        header = Header(DataKind.BLOCKS, 0, bytes.fromhex(MIGRATION), 2, 0, 3, 10)
        connection.sendall(b"".join(bytes(b) for b in encode(header, [b"x" * 10], session.send_key, 0)))
        assert is_closed(connection)
    assert channel.destination.block(10) == b"\xff" * 2 * PAGE


def test_a_destination_that_reads_nothing_does_not_hold_up_the_scheduler() -> None:
    """The tail is tried from the scheduler's thread: it must come back though the socket takes nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []

        def accept_only() -> None:
            connection, _ = listener.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connections.append(connection)
            responder = Responder(KEY, 0)
            connection.sendall(responder.reply(receive(connection, HELLO_BYTES)))
            responder.finish(receive(connection, PROOF_BYTES))

        accepting = threading.Thread(target=accept_only)
        accepting.start()
        replies = Replies()
        link = DataLink(f"127.0.0.1:{listener.getsockname()[1]}", KEY, 0, Cache(0).memory, replies, 1.0)
        accepting.join()
        time.sleep(0.05)
        begun = time.monotonic()
        link.send_tail(MIGRATION, 2, 0, [1], b"x" * 32 * 2**20)
        assert time.monotonic() - begun < 0.5
        until(lambda: replies.links_lost == 1)
        connections[0].close()
