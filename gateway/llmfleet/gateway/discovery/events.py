"""What becomes of an engine's streams when it leaves, as Events on its pod.

In flow news of drains; out flow Events, posted one after the other. Nothing waits for them: where they cannot be posted
(the right to create Events is missing, the API server is away) that is in the log, once, and the gateway goes on.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from datetime import UTC, datetime

from lightkube import AsyncClient
from lightkube.models.core_v1 import EventSource, ObjectReference
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Event

from llmfleet.gateway.moving.drains import DrainNews

log = logging.getLogger("llmfleet.gateway")

COMPONENT = "llmfleet-gateway"
_MOST_WAITING = 256
"""News that wait to be posted; more are left out: they are news, not state."""


class PodEvents:
    """Posts news of drains. `tell` may be called before `run`."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[DrainNews] = asyncio.Queue(_MOST_WAITING)
        self._said = False

    def tell(self, news: DrainNews) -> None:
        """Has it posted, soon."""
        if news.engine.pod is not None and not self._waiting.full():
            self._waiting.put_nowait(news)

    async def run(self, client: AsyncClient) -> None:
        """Posts until cancelled."""
        while True:
            event = as_event(await self._waiting.get(), datetime.now(UTC))
            try:
                await client.create(event)
                self._said = False
            except Exception as error:
                if not self._said:
                    log.warning("Events on pods cannot be posted: %s: %s", type(error).__name__, error)
                self._said = True


def as_event(news: DrainNews, now: datetime) -> Event:
    """The Event on the engine's pod. Raises ValueError for an engine without one."""
    if news.engine.pod is None:
        raise ValueError(f"engine {news.engine.id} has no pod")
    namespace, name = news.engine.pod
    return Event(
        metadata=ObjectMeta(name=f"{name[:200]}.{secrets.token_hex(8)}", namespace=namespace),
        involvedObject=ObjectReference(
            apiVersion="v1", kind="Pod", namespace=namespace, name=name, uid=news.engine.id.partition("@")[0]
        ),
        type="Warning" if news.warning else "Normal",
        reason=news.reason,
        message=news.message[:1024],
        firstTimestamp=now,
        lastTimestamp=now,
        count=1,
        source=EventSource(component=COMPONENT),
        reportingComponent=COMPONENT,
    )
