"""List, then watch, for ever: the objects of one kind and label, as the API server has them.

Whoever listens gets the whole set after each list and single changes in between. When a watch ends with an error
(410 Gone, a restarted API server, a broken connection) everything is listed anew after a pause that grows to ten
seconds, with jitter; until that succeeds the last state stays in force. A watch without any news for a while is
indistinguishable from a dead connection, so it is done anew as well.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, Generic, TypeVar, cast

from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.resources.core_v1 import ConfigMap, Node, Pod

from llmfleet.api.meta import LABEL_COMPONENT
from llmfleet.gateway.metrics import GatewayMetrics

log = logging.getLogger("llmfleet.gateway")

R = TypeVar("R", ConfigMap, Pod, Node)
Key = tuple[str, str]
"""(namespace, name) of an object; the namespace of a node is empty."""

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0
_WATCH_S = 120
"""After this long the API server ends a watch, and lightkube resumes it where it was."""
_SILENCE_S = 150.0
_FORBIDDEN_PAUSE_S = 300.0
"""How often it is tried whether what was forbidden is allowed now."""
_FORBIDDEN = 403


class Reflector(Generic[R]):
    """Mirrors the objects of one kind; all of them, or those that carry one `llmfleet.io/component` label."""

    def __init__(
        self,
        client: AsyncClient,
        resource: type[R],
        component: str | None,
        namespace: str | None,
        replaced: Callable[[Mapping[Key, R]], None],
        changed: Callable[[Key, R | None], None],
        metrics: GatewayMetrics,
        *,
        without: str | None = None,
    ) -> None:
        """`namespace` None: all of them; of nodes there are no others. `replaced` gets all objects after each list;
        `changed` gets one that is new or different, or None for one that is gone. `without`: what is lost where the
        kind may not be read; where it is given, that is told once and borne."""
        self._client = client
        self._resource: type[R] = resource
        self._labels: Any = None if component is None else {LABEL_COMPONENT: component}
        self._where: Any = {} if resource is Node else {"namespace": namespace or "*"}
        self._without = without
        self._told = False
        self._replaced: Callable[[Mapping[Key, R]], None] = replaced
        self._changed: Callable[[Key, R | None], None] = changed
        self._failures = metrics.watch_failures.labels(resource.__name__)

    async def run(self) -> None:
        """Mirrors until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                version = await self._list()
                pause_s = _FIRST_PAUSE_S
                await self._watch(version)
            # Whatever goes wrong with the API server, a gateway that stopped watching would route to what is gone.
            except Exception as error:
                if self._without is not None and isinstance(error, ApiError) and error.status.code == _FORBIDDEN:
                    self._bear()
                    await asyncio.sleep(_FORBIDDEN_PAUSE_S)
                    continue
                self._failures.inc()
                log.warning("watching %ss: %s: %s", self._resource.__name__, type(error).__name__, error)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 2)

    def _bear(self) -> None:
        if not self._told:
            log.warning("%ss may not be read by this gateway: %s", self._resource.__name__, self._without)
        self._told = True

    async def _list(self) -> str:
        listing = self._client.list(self._resource, labels=self._labels, **self._where)
        objects = {key_of(obj): obj async for obj in listing}
        self._replaced(objects)
        return listing.resourceVersion

    async def _watch(self, version: str) -> None:
        watch = self._client.watch(
            self._resource,
            labels=self._labels,
            resource_version=version,
            server_timeout=_WATCH_S,
            **self._where,
        )
        async with aclosing(cast("AsyncGenerator[tuple[str, R], None]", watch)) as events:
            while True:
                try:
                    async with asyncio.timeout(_SILENCE_S):
                        kind, obj = await anext(events)
                except TimeoutError:
                    return
                self._changed(key_of(obj), None if kind == "DELETED" else obj)


def key_of(obj: ConfigMap | Pod | Node) -> Key:
    """(namespace, name) of an object of the API server."""
    meta = obj.metadata
    namespace = "" if isinstance(obj, Node) else (meta.namespace if meta is not None else None)
    if meta is None or namespace is None or meta.name is None:
        raise ValueError(f"the API server sent a {type(obj).__name__} without namespace or name")
    return namespace, meta.name
