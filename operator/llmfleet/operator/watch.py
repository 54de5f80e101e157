"""Watching through kopf, with its traps avoided, and listing through lightkube, which kopf cannot replace.

kopf does one thing here: it keeps a watch per kind open and calls `on.event`. Everything that makes kopf write
(finalizers, annotations of progress and last-seen state, events) is off, and nothing is indexed by it (its indices
cost N^2/2 wake-ups at start).

It runs in a thread with an event loop of its own, for three reasons. When one of its watches fails for good it ends
*every* task of its loop, also those it did not start, and replaces the loop's signal handlers; in a thread of its own
it can end and be started again while leases are renewed and services reconciled. And a storm of events, each costing
kopf about half a millisecond, delays no lease renewal. Records cross over in `Inbox`, many at a time.

Three things kopf cannot say, so the operator asks the API server itself (`Lister`):

* *That a list is complete.* Handlers are not told, and an empty kind has no events at all. So the first fill of the
  cache is our own list, and nothing is decided before every kind is in.
* *What vanished while a watch was broken.* After a list anew kopf reports what exists, never what is gone.
* *That a watch is dead.* If our list holds what the watch should have shown a while ago, the watch is dead, and kopf
  is started again. (kopf's own probe only shows that its web server runs.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterator, Mapping
from typing import Any

import kopf
import uvloop
from lightkube import AsyncClient
from lightkube.config.kubeconfig import KubeConfig
from lightkube.generic_resource import GenericNamespacedResource

from llmfleet.operator.cache import Cache, Observation, observe
from llmfleet.operator.kinds import WATCHED, WatchedKind

log = logging.getLogger(__name__)
# It warns at each start that it handles no signals in this thread, which is as it should be.
logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)

LIST_CHUNK = 50
"""Objects per page of a list. A page is parsed in one piece, in which no other thread gets a turn: ten milliseconds."""
RESYNC_S = 300.0
"""How often every kind is listed to find what the watches missed."""
RELIST_RESYNC_S = 3.0
"""How long after kopf listed anew the vanished objects are looked for."""
DEAD_AFTER_S = 30.0
"""How late an object may be seen by a watch after a list has shown it."""
RESTART_S = 1.0
_DRAIN_SLICE_S = 0.010


class Inbox:
    """Hands observations from kopf's thread to the reconciler's loop in slices of at most ten milliseconds."""

    def __init__(self, cache: Cache, loop: asyncio.AbstractEventLoop) -> None:
        self._cache = cache
        self._loop = loop
        self._waiting: deque[Observation] = deque()
        self._scheduled = False
        self._lock = threading.Lock()

    def put(self, observation: Observation) -> None:
        """Called in kopf's thread."""
        self._waiting.append(observation)
        with self._lock:
            if self._scheduled:
                return
            self._scheduled = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        end = time.monotonic() + _DRAIN_SLICE_S
        while time.monotonic() < end:
            with self._lock:
                if not self._waiting:
                    self._scheduled = False
                    return
            self._cache.apply(self._waiting.popleft())
        self._loop.call_soon(self._drain)


class Lister:
    """Lists kinds into the cache: at start, and later to find what the watches missed."""

    def __init__(self, client: AsyncClient, cache: Cache) -> None:
        self._client = client
        self._cache = cache

    async def fill(self, watched: WatchedKind) -> int:
        """Lists one kind and drops what is gone. Returns the highest resourceVersion among the objects, which a
        living watch shows sooner or later too. Raises httpx2.HTTPError."""
        before = self._cache.snapshot(watched.kind)
        uids: list[str] = []
        newest = 0
        number = 0
        labels = dict[str, Any](watched.labels) or None
        resource = watched.resource
        listing: AsyncIterable[Mapping[str, Any]]
        if issubclass(resource, GenericNamespacedResource):
            listing = self._client.list(resource, namespace="*", chunk_size=LIST_CHUNK, labels=labels)
        else:
            listing = self._client.list(resource, chunk_size=LIST_CHUNK, labels=labels)
        async for raw in listing:
            meta = raw["metadata"]
            uids.append(meta["uid"])
            version = int(meta["resourceVersion"])
            newest = max(newest, version)
            key = f"{meta['namespace']}/{meta['name']}" if watched.namespaced else meta["name"]
            if not self._cache.knows(watched.kind, key, meta["uid"], version):
                self._cache.apply(observe(watched.kind, raw))
            number += 1
            if number % 5 == 0:
                await asyncio.sleep(0)
        missed = self._cache.retain(watched.kind, before, uids)
        if missed:
            log.info("found missed deletions", extra={"kind": watched.kind, "count": missed})
        return newest


class Watches:
    """kopf in its thread, started again whenever it ends."""

    def __init__(self, inbox: Inbox, cache: Cache) -> None:
        self._inbox = inbox
        self._cache = cache
        self._loop = asyncio.get_running_loop()
        self._stop_flag = threading.Event()
        self._thread: threading.Thread | None = None
        self._kopf_loop: asyncio.AbstractEventLoop | None = None
        self._beat_at = time.monotonic()
        self.relisted: dict[str, float] = {}
        """Kinds that kopf listed anew, with the time when it began."""
        self.seen: dict[str, int] = {watched.kind: 0 for watched in WATCHED}
        """Highest resourceVersion that came through each kind's watch."""
        self.restarts = 0

    async def run(self) -> None:
        """Keeps kopf running until cancelled."""
        try:
            while True:
                ended: asyncio.Future[BaseException | None] = self._loop.create_future()
                self._stop_flag = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(ended, self._stop_flag), name="kopf", daemon=True
                )
                self._thread.start()
                cause = await ended
                log.error("the watches ended and are started again", extra={"cause": repr(cause)})
                self.restarts += 1
                await asyncio.sleep(RESTART_S)
        finally:
            self._stop_flag.set()

    def join(self) -> None:
        """Waits for kopf's thread, which `run` has told to end. Blocks."""
        if self._thread is not None:
            self._thread.join(timeout=10)

    def restart(self) -> None:
        """Ends kopf, which `run` then starts again."""
        self._stop_flag.set()

    def silent_s(self) -> float:
        """Seconds since kopf's event loop last took a turn. Asks it for the next sign of life."""
        loop = self._kopf_loop
        if loop is not None:
            # Closed between the two lines when kopf has just ended.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._beat)
        return time.monotonic() - self._beat_at

    def _beat(self) -> None:
        self._beat_at = time.monotonic()

    def _run(self, ended: asyncio.Future[BaseException | None], stop_flag: threading.Event) -> None:
        cause: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self._kopf_loop = runner.get_loop()
                self._beat()
                runner.run(
                    kopf.operator(
                        registry=self._registry(),
                        settings=kopf_settings(),
                        standalone=True,
                        clusterwide=True,
                        stop_flag=stop_flag,
                    )
                )
        except BaseException as error:
            cause = error
        finally:
            self._kopf_loop = None
            # The reconciler's loop is closed when the whole process is about to end.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(_resolve, ended, cause)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(login)
        for watched in WATCHED:
            kopf.on.event(watched.group, watched.version, watched.plural, registry=registry, id=watched.kind)(
                self._handler(watched.kind)
            )
        return registry

    def _handler(self, kind: str) -> Callable[..., Any]:
        async def on_event(event: Any, **_: Any) -> None:
            raw = event["object"]
            meta = raw["metadata"]
            version = int(meta["resourceVersion"])
            self.seen[kind] = max(self.seen[kind], version)
            if event["type"] is None:
                self.relisted.setdefault(kind, time.monotonic())
            deleted = event["type"] == "DELETED"
            namespace = meta.get("namespace")
            key = f"{namespace}/{meta['name']}" if namespace else meta["name"]
            if deleted or not self._cache.knows(kind, key, meta["uid"], version):
                self._inbox.put(observe(kind, raw, deleted=deleted))

        return on_event


async def resync(lister: Lister, watches: Watches) -> None:
    """Looks for ever for what the watches missed: soon after kopf listed anew, and now and then in any case."""
    resynced_at = time.monotonic()
    while True:
        await asyncio.sleep(1.0)
        now = time.monotonic()
        relisted = [kind for kind, began in list(watches.relisted.items()) if now - began >= RELIST_RESYNC_S]
        due = [watched for watched in WATCHED if watched.kind in relisted]
        if now - resynced_at >= RESYNC_S:
            due, resynced_at = list(WATCHED), now
        for kind in relisted:
            del watches.relisted[kind]
        if due and not await _check(lister, watches, due):
            watches.restart()


async def _check(lister: Lister, watches: Watches, due: list[WatchedKind]) -> bool:
    """Lists kinds, then gives their watches time to show as much. False when one did not."""
    newest: dict[str, int] = {}
    for watched in due:
        try:
            newest[watched.kind] = await lister.fill(watched)
        except Exception as error:
            log.warning("cannot list", extra={"kind": watched.kind, "cause": repr(error)})
    end = time.monotonic() + DEAD_AFTER_S
    while behind := [kind for kind, version in newest.items() if watches.seen[kind] < version]:
        if time.monotonic() >= end:
            log.error("watches show less than lists; kopf is started again", extra={"kinds": behind})
            return False
        await asyncio.sleep(1.0)
    return True


def _resolve(future: asyncio.Future[BaseException | None], cause: BaseException | None) -> None:
    if not future.done():
        future.set_result(cause)


def login(**_: Any) -> kopf.ConnectionInfo:
    """The same server and credentials as lightkube's. kopf asks again when a token has expired."""
    config = KubeConfig.from_env().get()
    if config is None or config.user is None:
        raise kopf.PermanentError("no user in the kubeconfig's current context")
    cluster, user = config.cluster, config.user

    def path(name: str | None) -> str | None:
        return str(config.abs_file(name)) if name else None

    token = user.token
    if user.token_file:
        with open(user.token_file) as file:
            token = file.read().strip()
    return kopf.ConnectionInfo(
        server=cluster.server,
        ca_path=path(cluster.certificate_auth),
        ca_data=cluster.certificate_auth_data,
        insecure=cluster.insecure,
        token=token,
        username=user.username,
        password=user.password,
        certificate_path=path(user.client_cert),
        certificate_data=user.client_cert_data,
        private_key_path=path(user.client_key),
        private_key_data=user.client_key_data,
    )


def kopf_settings() -> kopf.OperatorSettings:
    """kopf as a watcher and nothing else."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.persistence.finalizer = "llmfleet.io/finalizer"
    settings.persistence.progress_storage = _NoProgress()
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.networking.request_timeout = 60
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = _Endless()
    settings.watching.chunk_size = LIST_CHUNK
    settings.process.ultimate_exiting_timeout = None
    for watched in WATCHED:
        if watched.labels:
            selector = ",".join(f"{name}={value}" for name, value in watched.labels)
            settings.watching.label_selectors[watched.group, watched.version, watched.plural] = selector
    return settings


class _Endless:
    """Back-off without an end: an API server that is away, or refuses for a moment while it starts, is waited for.
    The delays stay short, so that its return is noticed soon."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.2, 0.5, 1.0)
        while True:
            yield 2.0


class _NoDiffBase(kopf.DiffBaseStorage):
    """Nothing is stored and nothing compared: there are no handlers of changes, and copying every object to find
    its essence would be most of the cost of an event."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("kopf must not write")


class _NoProgress(kopf.ProgressStorage):
    """Nothing is stored: event handlers have no progress."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        raise AssertionError("kopf must not write")

    def purge(self, **_: Any) -> None:
        raise AssertionError("kopf must not write")

    def touch(self, **_: Any) -> None:
        raise AssertionError("kopf must not write")

    def clear(self, *, essence: Any) -> Any:
        return essence
