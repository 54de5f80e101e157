"""Blocks and the word to begin, from engine to engine: one connection per pair of engines and rank.

A source connects, and sends from the KV cache's own memory; a destination receives into its own. What was received is
acknowledged on the same connection. Frames are `llmfleet.migration.frames`', each with a MAC.

    scheduler's thread ──jobs──► DataLink ═════════════════► DataServer ──► Incoming
                                    ◄═══acknowledgements═══════┘

Jobs are sent by a thread of the link, in order. The tail alone is also tried from the scheduler's thread, which has
just put it there: nothing is gained by waiting for another thread to wake up while a client waits. It never waits for
the network: what the socket does not take is left to the link's thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from llmfleet.engine.memory import HostMemory
from llmfleet.migration.frames import (
    DATA_HEADER_BYTES,
    MAC_BYTES,
    Buffer,
    DataKind,
    FrameError,
    Header,
    Verifier,
    encode,
)
from llmfleet.migration.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    REPLY_BYTES,
    HandshakeError,
    Initiator,
    Responder,
    Session,
)
from llmfleet.migration.ports import host_and_port
from llmfleet.migration.tcp import keep_alive

log = logging.getLogger("vllm.llmfleet")

MOST_WORD_BYTES = 64 * 2**20
"""Token ids, sampler state and log probabilities of the longest request."""
MOST_CONNECTIONS = 1024
"""Of one rank: a thread each."""
_AGAIN_S = 0.1
_MOST_BUFFERS = 512
"""Of one `sendmsg`; Linux takes 1,024."""
_SCRATCH_BYTES = 256 * 1024
_DEPTH = 8
"""Jobs of blocks in one frame at most: what is acknowledged together."""


class Sink(Protocol):
    """Where received data goes. Any thread."""

    def begin_write(self, migration: str, epoch: int, first: int, count: int) -> list[memoryview] | None: ...

    def end_write(self, migration: str, first: int, count: int, whole: bool) -> int | None: ...

    def word(self, migration: str, epoch: int, payload: bytes) -> bool: ...

    def ended(self, migration: str, epoch: int) -> None: ...


class Replies(Protocol):
    """Where a source hears of what it sent. Any thread."""

    def acknowledged(self, migration: str, epoch: int, blocks: int) -> None: ...

    def taken(self, migration: str, epoch: int) -> None: ...

    def refused(self, migration: str, epoch: int) -> None: ...

    def lost(self, link: DataLink) -> None: ...


class DataLink:
    """A source's connection to one rank of one destination."""

    def __init__(self, address: str, key: bytes, rank: int, memory: HostMemory, replies: Replies, timeout_s: float):
        self.address = address
        self._rank = rank
        self._memory = memory
        self._replies = replies
        self._timeout_s = timeout_s
        self._jobs: deque[tuple[Header, list[int] | bytes]] = deque()
        self._out: list[memoryview] = []
        self._sending = threading.Lock()
        self._work = threading.Event()
        self._socket: socket.socket | None = None
        self._session: Session | None = None
        self._sent = 0
        self.closed = False
        threading.Thread(target=self._run, args=(key,), name="llmfleet-send", daemon=True).start()

    def send_blocks(self, migration: str, epoch: int, first: int, block_ids: Sequence[int]) -> None:
        for start in range(0, len(block_ids), _DEPTH):
            ids = list(block_ids[start : start + _DEPTH])
            self._put(DataKind.BLOCKS, migration, epoch, first + start, ids)
        self._work.set()

    def send_tail(self, migration: str, epoch: int, first: int, block_ids: Sequence[int], word: bytes | None) -> None:
        if block_ids:
            self._put(DataKind.TAIL, migration, epoch, first, list(block_ids))
        if word is not None:
            self._put(DataKind.HAND_OVER, migration, epoch, 0, word)
        self._send_now()
        self._work.set()

    def send_ended(self, migration: str, epoch: int) -> None:
        self._put(DataKind.ENDED, migration, epoch, 0, b"")
        self._work.set()

    def close(self) -> None:
        """End the connection. Migrations over it are told that it is lost."""
        self.closed = True
        self._work.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _put(self, kind: DataKind, migration: str, epoch: int, first: int, what: list[int] | bytes) -> None:
        blocks = len(what) if isinstance(what, list) else 0
        length = blocks * self._memory.block_bytes if isinstance(what, list) else len(what)
        self._jobs.append((Header(kind, self._rank, bytes.fromhex(migration), epoch, first, blocks, length), what))

    def _send_now(self) -> None:
        if self._session is None or not self._sending.acquire(blocking=False):
            return
        try:
            self._send(wait_s=0.0)
        except (OSError, FrameError):
            self.close()
        finally:
            self._sending.release()

    def _send(self, wait_s: float) -> None:
        """Send what there is. Without waiting (`wait_s` 0) it stops where the socket takes no more."""
        assert self._socket is not None
        assert self._session is not None
        while True:
            if not self._out:
                if not self._jobs:
                    return
                header, what = self._jobs.popleft()
                payload: Sequence[Buffer] = self._memory.pages(what) if isinstance(what, list) else [what]
                frame = encode(header, payload if header.length else [], self._session.send_key, self._sent)
                self._out = [memoryview(buffer) for buffer in frame]
                self._sent += 1
            try:
                self._advance(self._socket.sendmsg(self._out[:_MOST_BUFFERS]))
            except BlockingIOError:
                if not wait_s:
                    return
                if not _wait(self._socket, select.POLLOUT, wait_s):
                    raise TimeoutError(f"{self.address} takes no data") from None

    def _advance(self, sent: int) -> None:
        done = 0
        while done < len(self._out) and sent >= len(self._out[done]):
            sent -= len(self._out[done])
            done += 1
        self._out = self._out[done:]
        if sent:
            self._out[0] = self._out[0][sent:]

    def _run(self, key: bytes) -> None:
        use_any_core()
        try:
            self._connect(key)
            threading.Thread(target=self._hear, name="llmfleet-hear", daemon=True).start()
            while not self.closed:
                self._work.wait()
                self._work.clear()
                with self._sending:
                    self._send(self._timeout_s)
        except (OSError, ValueError, FrameError, HandshakeError) as error:
            log.warning("the data channel to %s ended: %s", self.address, error)
        finally:
            self.close()
            if self._socket is not None:
                self._socket.close()
            self._replies.lost(self)

    def _connect(self, key: bytes) -> None:
        connection = self._socket = socket.create_connection(host_and_port(self.address), timeout=self._timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(connection)
        initiator = Initiator(key, self._rank)
        connection.sendall(initiator.hello)
        proof, session = initiator.finish(receive(connection, REPLY_BYTES))
        connection.sendall(proof)
        connection.setblocking(False)
        self._session = session

    def _hear(self) -> None:
        use_any_core()
        assert self._socket is not None
        assert self._session is not None
        heard = 0
        try:
            while True:
                data = receive(self._socket, DATA_HEADER_BYTES)
                header = Header.parse(data, self._session.receive_key, heard)
                heard += 1
                migration = header.migration.hex()
                match header.kind:
                    case DataKind.ACKNOWLEDGED:
                        self._replies.acknowledged(migration, header.epoch, header.first_block)
                    case DataKind.TAKEN:
                        self._replies.taken(migration, header.epoch)
                    case DataKind.REFUSED:
                        self._replies.refused(migration, header.epoch)
        except (OSError, FrameError):
            self.close()


class DataServer:
    """A destination's end of all data channels of one rank."""

    def __init__(self, listen: str, key: bytes, rank: int, memory: HostMemory, sink: Sink, timeout_s: float) -> None:
        self._key = key
        self._rank = rank
        self._block_bytes = memory.block_bytes
        self._sink = sink
        self._timeout_s = timeout_s
        host, port = host_and_port(listen)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self._connections: set[socket.socket] = set()
        self._closed = False
        threading.Thread(target=self._accept, name="llmfleet-accept", daemon=True).start()

    def close(self) -> None:
        """End the listener and all connections."""
        self._closed = True
        for connection in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_AGAIN_S)  # out of files: others will be closed
                continue
            self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        """A peer that cannot be served is closed, and tries again; the others notice nothing."""
        if len(self._connections) >= MOST_CONNECTIONS:
            connection.close()
            return
        self._connections.add(connection)
        try:
            threading.Thread(target=self._serve, args=(connection,), name="llmfleet-receive", daemon=True).start()
        except RuntimeError:  # no thread can be started
            self._connections.discard(connection)
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        use_any_core()
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(connection)
            connection.settimeout(self._timeout_s)
            responder = Responder(self._key, self._rank)
            connection.sendall(responder.reply(receive(connection, HELLO_BYTES)))
            self._receive(connection, responder.finish(receive(connection, PROOF_BYTES)))
        except (OSError, FrameError, HandshakeError) as error:
            log.warning("a data channel from a peer ended: %s", error)
        finally:
            self._connections.discard(connection)
            connection.close()

    def _receive(self, connection: socket.socket, session: Session) -> None:
        received = answered = 0
        while True:
            # A channel may be silent for days; within a frame it may not.
            _wait(connection, select.POLLIN)
            header = Header.parse(receive(connection, DATA_HEADER_BYTES), session.receive_key, received)
            verifier = Verifier(session.receive_key, received, header)
            received += 1
            reply = self._take(connection, header, verifier)
            if reply is not None:
                connection.sendall(reply.pack(session.send_key, answered))
                answered += 1

    def _take(self, connection: socket.socket, header: Header, verifier: Verifier) -> Header | None:
        migration = header.migration.hex()
        match header.kind:
            case DataKind.BLOCKS | DataKind.TAIL:
                placed = self._take_blocks(connection, header, verifier)
                kind = DataKind.REFUSED if placed is None else DataKind.ACKNOWLEDGED
                return Header(kind, self._rank, header.migration, header.epoch, placed or 0)
            case DataKind.HAND_OVER:
                if header.length > MOST_WORD_BYTES:
                    raise FrameError(f"a hand-over of {header.length} bytes; at most {MOST_WORD_BYTES} are accepted")
                word = receive(connection, header.length)
                verifier.update(word)
                verifier.check(receive(connection, MAC_BYTES))
                taken = self._sink.word(migration, header.epoch, bytes(word))
                return Header(DataKind.TAKEN if taken else DataKind.REFUSED, self._rank, header.migration, header.epoch)
            case DataKind.ENDED:
                self._sink.ended(migration, header.epoch)
                return None
        raise FrameError(f"a data frame of kind {header.kind.name} from a source")

    def _take_blocks(self, connection: socket.socket, header: Header, verifier: Verifier) -> int | None:
        if header.length != header.blocks * self._block_bytes or not header.length:
            raise FrameError(f"{header.blocks} blocks in {header.length} bytes; one has {self._block_bytes}")
        migration = header.migration.hex()
        place = (header.first_block, header.blocks)
        pages = self._sink.begin_write(migration, header.epoch, *place)
        if pages is None:
            _discard(connection, header.length, verifier)
            return None
        whole = False
        try:
            _fill(connection, pages)
            for page in pages:
                verifier.update(page)
            verifier.check(receive(connection, MAC_BYTES))
            whole = True
        finally:
            placed = self._sink.end_write(migration, *place, whole)
        return placed


def _fill(connection: socket.socket, pages: list[memoryview]) -> None:
    at, offset = 0, 0
    while at < len(pages):
        wanted = [pages[at][offset:], *pages[at + 1 : at + _MOST_BUFFERS]]
        count = connection.recvmsg_into(wanted)[0]
        if not count:
            raise ConnectionError("the peer closed the connection")
        while at < len(pages) and count >= len(pages[at]) - offset:
            count -= len(pages[at]) - offset
            at, offset = at + 1, 0
        offset += count


def _discard(connection: socket.socket, length: int, verifier: Verifier) -> None:
    scratch = memoryview(bytearray(min(length, _SCRATCH_BYTES)))
    while length:
        count = connection.recv_into(scratch[: min(length, len(scratch))])
        if not count:
            raise ConnectionError("the peer closed the connection")
        verifier.update(scratch[:count])
        length -= count
    verifier.check(receive(connection, MAC_BYTES))


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises OSError where the peer ends first, or is slower than the socket's timeout."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            count = connection.recv_into(view)
        except BlockingIOError:
            _wait(connection, select.POLLIN)
            continue
        if not count:
            raise ConnectionError("the peer closed the connection")
        view = view[count:]
    return bytes(data)


def _wait(connection: socket.socket, event: int, seconds: float | None = None) -> bool:
    """Whether it came to that in time. Not `select`: an engine has more than 1,024 files open."""
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def use_any_core() -> None:
    """OpenMP binds a CPU engine's main thread, and threads inherit that: data would wait for the model."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(threading.get_native_id(), range(os.cpu_count() or 1))
