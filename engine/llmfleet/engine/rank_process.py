"""A rank whose worker is in a process of its own: `rank.py`'s calls over two local connections, one per direction.

The worker listens on a Unix socket that has vLLM's instance id and the rank in its name; both sides prove the peer key.
Calls in one direction never wait for one in the other, so that a scheduler that sends and a rank that asks for blocks
at the same time do not hold each other up. When the connections end, the other process is dead, and vLLM ends the
engine.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from llmfleet.engine.rank import RankAgent, RankDescription, RankEvents


def _address(instance_id: str, rank: int) -> str:
    return f"\0llmfleet-{instance_id}-{rank}"


class RankProcess:
    """The worker's end: what the scheduler calls is done by the agent, what the agent tells goes to the scheduler."""

    def __init__(self, agent: RankAgent, instance_id: str, rank: int, key: bytes) -> None:
        self._agent = agent
        self._listener = Listener(_address(instance_id, rank), "AF_UNIX", authkey=key)
        threading.Thread(target=self._serve, name="llmfleet-rank", daemon=True).start()

    def _serve(self) -> None:
        commands = self._listener.accept()
        calls = self._listener.accept()
        self._listener.close()
        commands.send(self._agent.description)
        self._agent.events = _Caller(calls)
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, arguments, wants_answer = commands.recv()
                answer = getattr(self._agent, name)(*arguments)
                if wants_answer:
                    commands.send(answer)
        self._agent.close()


class _Caller:
    """`RankEvents` over a connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with self._lock:
                try:
                    self._connection.send((name, arguments))
                    return self._connection.recv()
                except (EOFError, OSError):
                    return None  # the scheduler is gone, and the engine with it

        return call


class RemoteRank:
    """The scheduler's end: a `RankPort`."""

    def __init__(self, instance_id: str, rank: int, key: bytes) -> None:
        """Raises OSError where no worker listens: each does before there is a scheduler."""
        address = _address(instance_id, rank)
        self._commands = Client(address, "AF_UNIX", authkey=key)
        self._calls = Client(address, "AF_UNIX", authkey=key)
        self._commanding = threading.Lock()
        self.description: RankDescription = self._commands.recv()

    def attach(self, events: RankEvents) -> None:
        """From now on the rank's news go there."""
        threading.Thread(target=self._listen, args=(events,), name="llmfleet-rank", daemon=True).start()

    def send_blocks(self, address: str, migration: str, epoch: int, first: int, block_ids: Sequence[int]) -> None:
        self._command("send_blocks", address, migration, epoch, first, list(block_ids))

    def send_tail(
        self, address: str, migration: str, epoch: int, first: int, block_ids: Sequence[int], word: bytes | None
    ) -> None:
        self._command("send_tail", address, migration, epoch, first, list(block_ids), word)

    def send_ended(self, address: str, migration: str, epoch: int) -> None:
        self._command("send_ended", address, migration, epoch)

    def generator_state(self, request_id: str) -> bytes | None:
        with self._commanding:
            self._commands.send(("generator_state", (request_id,), True))
            state: bytes | None = self._commands.recv()
            return state

    def close(self) -> None:
        for connection in (self._commands, self._calls):
            with contextlib.suppress(OSError):
                connection.close()

    def _command(self, name: str, *arguments: Any) -> None:
        with self._commanding, contextlib.suppress(OSError):
            self._commands.send((name, arguments, False))

    def _listen(self, events: RankEvents) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, arguments = self._calls.recv()
                self._calls.send(getattr(events, name)(*arguments))
