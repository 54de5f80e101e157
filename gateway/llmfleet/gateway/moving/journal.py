"""The token journal of one engine, for this gateway's own streams there.

In flow an engine's `journal` events; out flow, when the engine has died, the tokens of each stream. An engine tells its
journal in the step that makes the tokens, before they are text, so that it is seldom behind what the client has got.
Where it is, the engine that goes on makes the missing tokens anew.

Which requests are followed changes with every request that begins or ends: changes are collected and said together.
"""

from __future__ import annotations

import asyncio
import logging
from array import array

from llmfleet.api.migration_messages import MOST_REQUESTS, Capabilities, EngineCapabilities, Journal
from llmfleet.migration.control import ControlConnection, Subscription
from llmfleet.migration.ports import NoAnswerError

log = logging.getLogger("llmfleet.gateway")

_COLLECT_S = 0.02
_ASK_S = 5.0
_AGAIN_S = 1.0
"""Between attempts to subscribe."""


class TokenJournal:
    """Tokens of the requests that are followed. Runs from the first one until `close`."""

    def __init__(self, control: ControlConnection) -> None:
        self.capabilities: EngineCapabilities | None = None
        """What the engine last said of itself; None: it has not been reached."""
        self.ended = asyncio.Event()
        """Set while nothing is heard: what has been told is all there is."""
        self.ended.set()
        self._control = control
        self._tokens: dict[str, array[int]] = {}
        self._lagging = False
        self._new: set[str] = set()
        self._gone: set[str] = set()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def follow(self, request: str) -> None:
        """A stream begins at the engine, under this `X-Request-Id`."""
        self._tokens[request] = array("I")
        self._new.add(request)
        self._news.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def forget(self, request: str) -> None:
        """It has ended, or is elsewhere."""
        if self._tokens.pop(request, None) is None:
            return
        if request in self._new:
            self._new.discard(request)
        else:
            self._gone.add(request)
            self._news.set()

    def tokens(self, request: str) -> tuple[list[int], bool]:
        """The answer's tokens so far, and whether the engine said that it is further than it told."""
        return list(self._tokens.get(request, ())), self._lagging

    async def close(self) -> None:
        """No more of it. What was told stays."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except NoAnswerError as error:
                log.info("no token journal: %s", error)
            self.ended.set()
            await asyncio.sleep(_AGAIN_S)
            # A new subscription tells everything again.
            self._new, self._gone = set(self._tokens), set()
            while not self._new:
                self._news.clear()
                await self._news.wait()

    async def _follow(self) -> None:
        """One subscription, until it ends."""
        answer = await self._control.ask(Capabilities(), _ASK_S)
        if isinstance(answer, EngineCapabilities):
            self.capabilities = answer
        first = self._taken(self._new)
        if not first:
            return
        subscription = await self._control.subscribe(first, _ASK_S)
        if not isinstance(subscription, Subscription):
            log.warning("no token journal of %s: %s (%s)", self._control.name, subscription.reason, subscription.detail)
            return
        self.ended.clear()
        saying = asyncio.create_task(self._say(subscription))
        try:
            async for journal in subscription:
                self._take(journal)
        finally:
            saying.cancel()
            await asyncio.gather(saying, return_exceptions=True)

    async def _say(self, subscription: Subscription) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(_COLLECT_S)
            self._news.clear()
            try:
                while gone := self._taken(self._gone):
                    await subscription.remove(gone, _ASK_S)
                while new := self._taken(self._new):
                    await subscription.add(new, _ASK_S)
            except NoAnswerError as error:
                log.info("token journal of %s: %s", self._control.name, error)
                return

    @staticmethod
    def _taken(names: set[str]) -> list[str]:
        """As many of these as one message holds."""
        return [names.pop() for _ in range(min(len(names), MOST_REQUESTS))]

    def _take(self, journal: Journal) -> None:
        self._lagging = journal.lagging
        for entry in journal.entries:
            known = self._tokens.get(entry.request)
            if known is None:
                continue
            if entry.index == len(known):
                known.extend(entry.ids)
            elif entry.index < len(known):
                known[entry.index :] = array("I", entry.ids)
