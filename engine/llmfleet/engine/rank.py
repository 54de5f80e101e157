"""What the plug-in has beside each worker: the KV cache of one tensor-parallel rank, and its data channels.

    scheduler's process                              worker's process
    Migrations ──send_blocks, send_tail, ...──► RankAgent ═══data═══► the same rank of another engine
               ◄─begin_write, acknowledged, ...─┘

Where the worker lives in the scheduler's process, as it does on one GPU, these are plain calls. Else `rank_process.py`
carries them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmfleet.engine.channel import DataLink, DataServer
from llmfleet.engine.memory import HostMemory
from llmfleet.migration.ports import host_and_port


@dataclass(frozen=True)
class Arithmetic:
    """What a rank's KV cache and results depend on: parts of the fingerprint that only the worker knows."""

    layout: str
    attention_backend: str
    instruction_set: str


@dataclass(frozen=True)
class RankDescription:
    """What the scheduler's side must know of a rank."""

    block_bytes: int
    data_port: int
    arithmetic: Arithmetic


class RankPort(Protocol):
    """A rank as the scheduler's side uses it. Nothing here waits for another engine."""

    @property
    def description(self) -> RankDescription: ...

    def send_blocks(self, address: str, migration: str, epoch: int, first: int, block_ids: Sequence[int]) -> None: ...

    def send_tail(
        self, address: str, migration: str, epoch: int, first: int, block_ids: Sequence[int], word: bytes | None
    ) -> None:
        """The last blocks and, from one rank only, the word to begin."""

    def send_ended(self, address: str, migration: str, epoch: int) -> None: ...

    def generator_state(self, request_id: str) -> bytes | None: ...

    def close(self) -> None: ...


class RankEvents(Protocol):
    """The scheduler's side as a rank tells it things. Any thread."""

    def begin_write(self, rank: int, migration: str, epoch: int, first: int, count: int) -> list[int] | None: ...

    def end_write(self, rank: int, migration: str, first: int, count: int, whole: bool) -> int | None: ...

    def word(self, migration: str, epoch: int, payload: bytes) -> bool: ...

    def ended(self, migration: str, epoch: int) -> None: ...

    def acknowledged(self, rank: int, migration: str, epoch: int, blocks: int) -> None: ...

    def taken(self, migration: str, epoch: int) -> None: ...

    def refused(self, migration: str, epoch: int) -> None: ...

    def lost(self, address: str) -> None: ...


class RankAgent:
    """One rank: a `RankPort`."""

    def __init__(
        self,
        rank: int,
        memory: HostMemory,
        generator_state: Callable[[str], bytes | None],
        arithmetic: Arithmetic,
        data_listen: str,
        key: bytes,
        timeout_s: float,
    ) -> None:
        """`data_listen`: rank 0's address; other ranks listen at the ports after it, or all where the kernel likes."""
        self._rank = rank
        self._memory = memory
        self.generator_state = generator_state
        self._key = key
        self._timeout_s = timeout_s
        self._links: dict[str, DataLink] = {}
        self.events: RankEvents | None = None
        """Set once the scheduler is there: until then nobody can have been told of this rank."""
        port = host_and_port(data_listen)[1]
        listen = f"{data_listen.rpartition(':')[0]}:{port + rank}" if port else data_listen
        self._server = DataServer(listen, key, rank, memory, self, timeout_s)
        self.description = RankDescription(memory.block_bytes, self._server.port, arithmetic)

    def send_blocks(self, address: str, migration: str, epoch: int, first: int, block_ids: Sequence[int]) -> None:
        self._link(address).send_blocks(migration, epoch, first, block_ids)

    def send_tail(
        self, address: str, migration: str, epoch: int, first: int, block_ids: Sequence[int], word: bytes | None
    ) -> None:
        self._link(address).send_tail(migration, epoch, first, block_ids, word)

    def send_ended(self, address: str, migration: str, epoch: int) -> None:
        self._link(address).send_ended(migration, epoch)

    def close(self) -> None:
        """End all channels."""
        self._server.close()
        for link in list(self._links.values()):
            link.close()

    def _link(self, address: str) -> DataLink:
        link = self._links.get(address)
        if link is None or link.closed:
            link = DataLink(address, self._key, self._rank, self._memory, self, self._timeout_s)
            self._links[address] = link
        return link

    # What the data channels tell

    def begin_write(self, migration: str, epoch: int, first: int, count: int) -> list[memoryview] | None:
        if self.events is None:
            return None
        block_ids = self.events.begin_write(self._rank, migration, epoch, first, count)
        return None if block_ids is None else self._memory.pages(block_ids)

    def end_write(self, migration: str, first: int, count: int, whole: bool) -> int | None:
        assert self.events is not None, "end_write follows begin_write"
        return self.events.end_write(self._rank, migration, first, count, whole)

    def word(self, migration: str, epoch: int, payload: bytes) -> bool:
        return self.events is not None and self.events.word(migration, epoch, payload)

    def ended(self, migration: str, epoch: int) -> None:
        if self.events is not None:
            self.events.ended(migration, epoch)

    def acknowledged(self, migration: str, epoch: int, blocks: int) -> None:
        if self.events is not None:
            self.events.acknowledged(self._rank, migration, epoch, blocks)

    def taken(self, migration: str, epoch: int) -> None:
        if self.events is not None:
            self.events.taken(migration, epoch)

    def refused(self, migration: str, epoch: int) -> None:
        if self.events is not None:
            self.events.refused(migration, epoch)

    def lost(self, link: DataLink) -> None:
        if self._links.get(link.address) is link:
            del self._links[link.address]
        if self.events is not None:
            self.events.lost(link.address)
