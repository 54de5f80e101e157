"""The control port: a thread with an event loop of its own that answers coordinators and owners.

It is not the scheduler's thread, so an engine that takes no steps answers, and one whose steps are long answers at
once. What is asked is done by `Migrations`; here it is only waited for changes that somebody asked to be told of, and
time is made to go by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from llmfleet.api import Reason, SourcePhase
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    DestinationStatus,
    Freeze,
    Journal,
    Refused,
    SourceStatus,
    Status,
    Subscribe,
    Subscribed,
    Unsubscribe,
)
from llmfleet.engine.channel import use_any_core
from llmfleet.engine.journal import Subscriber, batches
from llmfleet.engine.metrics import Metrics
from llmfleet.migration.control_server import Peer, serve

if TYPE_CHECKING:
    from llmfleet.engine.migrations import Migrations

log = logging.getLogger("vllm.llmfleet")

TICK_S = 0.25
MOST_FOLLOWED = 65_536
"""Requests that one peer may be told of."""
_START_S = 10.0
_AGAIN_S = 0.05
"""After so long a peer that read too slowly is tried again."""


class Control:
    """The control port of one engine."""

    def __init__(self, listen: str, key: bytes, metrics: Metrics) -> None:
        self._listen = listen
        self._metrics = metrics
        self._key = key
        self._loop = asyncio.new_event_loop()
        self._changes: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        """By migration, as long as somebody waits for it."""
        self._subscriptions: dict[Peer, _Telling] = {}
        self._listening = threading.Event()
        self._stop = asyncio.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, migrations: Migrations) -> None:
        """Listens when it returns. Raises OSError where it cannot."""
        self._thread = threading.Thread(target=self._run, args=(migrations,), name="llmfleet-control", daemon=True)
        self._thread.start()
        if not self._listening.wait(_START_S) or self._error is not None:
            raise OSError(f"the control port {self._listen} cannot be opened: {self._error}")

    def stop(self) -> None:
        """Ends the thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(_START_S)

    def changed(self, migration: str) -> None:
        """Something about it is other than before. Any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._wake, migration)

    def _wake(self, migration: str) -> None:
        event = self._changes.pop(migration, None)
        if event is not None:
            event.set()

    def _run(self, migrations: Migrations) -> None:
        use_any_core()
        try:
            self._loop.run_until_complete(self._serve(migrations))
        except BaseException as error:
            self._error = error
            log.exception("the control port %s is closed", self._listen)
        finally:
            self._listening.set()
            self._loop.close()

    async def _serve(self, migrations: Migrations) -> None:
        async def handle(ask: AnyAsk, peer: Peer) -> AnyAnswer:
            return await self._handle(migrations, ask, peer)

        server = await serve(self._listen, self._key, handle, meter=self._metrics)
        try:
            self._listening.set()
            while not self._stop.is_set():
                try:
                    migrations.tick()
                except Exception:
                    log.exception("leases could not be looked after; tried again")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), TICK_S)
        finally:
            await server.close()

    async def _handle(self, migrations: Migrations, ask: AnyAsk, peer: Peer) -> AnyAnswer:
        match ask:
            case Status(seen=int()):
                return await self._until(migrations, ask, lambda answer: answer.revision != ask.seen)
            case Freeze():
                return await self._until(migrations, ask, lambda answer: answer.phase is not SourcePhase.FREEZING)
            case Subscribe():
                told = self._subscriptions.get(peer) or self._subscribe(migrations, peer)
                followed = told.subscriber.told.keys() | ask.requests
                if len(followed) > MOST_FOLLOWED:
                    detail = f"requests: {len(followed)} would be followed; at most {MOST_FOLLOWED} are"
                    return Refused(reason=Reason.TOO_LARGE, field="requests", detail=detail)
                migrations.subscribe(told.subscriber, ask.requests)
                return Subscribed(requests=len(told.subscriber.told))
            case Unsubscribe():
                known = self._subscriptions.get(peer)
                if known is None:
                    return Subscribed(requests=0)
                migrations.unsubscribe(known.subscriber, ask.requests)
                return Subscribed(requests=len(known.subscriber.told))
        return migrations.answer(ask)

    async def _until(
        self, migrations: Migrations, ask: Status | Freeze, done: Callable[[SourceStatus | DestinationStatus], bool]
    ) -> AnyAnswer:
        """Answers when it is so, or when the asker would not wait longer."""
        ends_s = self._loop.time() + ask.wait_s
        while True:
            # Before the answer is made, so that no change falls between.
            changed = self._changes.setdefault(ask.migration, asyncio.Event())
            answer = migrations.answer(ask)
            if not isinstance(answer, SourceStatus | DestinationStatus) or done(answer):
                return answer
            try:
                await asyncio.wait_for(changed.wait(), ends_s - self._loop.time())
            except TimeoutError:
                return answer

    def _subscribe(self, migrations: Migrations, peer: Peer) -> _Telling:
        told = self._subscriptions[peer] = _Telling(migrations, peer, self._loop)
        task = self._loop.create_task(told.run())
        task.add_done_callback(lambda _: self._subscriptions.pop(peer, None))
        return told


class _Telling:
    """Tells one peer what its requests got."""

    def __init__(self, migrations: Migrations, peer: Peer, loop: asyncio.AbstractEventLoop) -> None:
        self._migrations = migrations
        self._peer = peer
        self._loop = loop
        self._news = asyncio.Event()
        self.subscriber = Subscriber(self._wake)

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._news.set)

    async def run(self) -> None:
        """Until the peer is gone."""
        gone = self._loop.create_task(self._peer.closed.wait())
        lagging = False
        while not gone.done():
            news = self._loop.create_task(self._news.wait())
            await asyncio.wait([gone, news], return_when=asyncio.FIRST_COMPLETED)
            news.cancel()
            self._news.clear()
            lagging = not self._tell(lagging)
            if lagging:
                self._migrations.metrics.lagging()
                await asyncio.wait([gone], timeout=_AGAIN_S)
                self._news.set()
        self._migrations.unsubscribe(self.subscriber)

    def _tell(self, lagging: bool) -> bool:
        with self._migrations.monitor:
            taken = self.subscriber.take()
        if not taken:
            return True
        for entries in batches(taken):
            if not self._peer.publish(Journal(entries=entries, lagging=lagging)):
                with self._migrations.monitor:
                    self.subscriber.put_back(taken)
                return False
            for entry in entries:
                index, ids = taken.pop(entry.request)
                if len(ids) > len(entry.ids):
                    taken[entry.request] = (index + len(entry.ids), ids[len(entry.ids) :])
        return True
