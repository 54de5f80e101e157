"""All of this gateway's requests by engine, and the way from one engine to another.

In flow the fleet, and from each request where it runs; out flow migrations: away from engines that leave (`drains`), on
from engines that died (`resume`), and to where streams lose less time (`rebalance`). All need the migration plug-in at
both ends: engines have it that have a control port, in a service with a peer key.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from llmfleet.gateway.fleet import Engine, Fleet, Leaving, LeavingReason, Service
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving.drains import Drain, DrainNews
from llmfleet.gateway.moving.journal import TokenJournal
from llmfleet.gateway.moving.owner import MovingStream
from llmfleet.gateway.moving.rebalance import Rebalance
from llmfleet.gateway.moving.resume import resume
from llmfleet.gateway.policy import Router, Ticket
from llmfleet.migration.control import ControlConnection, connect
from llmfleet.migration.ports import Delivered

log = logging.getLogger("llmfleet.gateway")

CUTS_AT_ONCE = 4
"""Of the migrations away from an engine: so many are cut side by side, however many are copied."""


class Moved(Protocol):
    """A request, as those who move it see it."""

    @property
    def ticket(self) -> Ticket: ...

    @property
    def engine(self) -> Engine | None:
        """Where it runs; None: nowhere."""

    @property
    def engine_request(self) -> str:
        """Its `X-Request-Id` there."""

    @property
    def client_request(self) -> str:
        """The id that its client has of it."""

    @property
    def service_key(self) -> str: ...

    @property
    def finished(self) -> bool: ...

    @property
    def streamed(self) -> bool: ...

    @property
    def begun(self) -> bool:
        """Whether the client has got anything."""

    @property
    def can_move(self) -> bool:
        """Whether another engine can go on with it."""

    @property
    def high(self) -> bool:
        """Whether its priority is high."""

    def answered_tokens(self) -> int:
        """About how much of the answer has come."""

    def remaining_tokens(self) -> float:
        """About how much of the answer is still to come."""

    def most_tokens(self) -> int:
        """About how long prompt and answer may become."""

    def body(self) -> dict[str, Any]:
        """What the client asked."""

    def told_logprobs(self) -> int | None:
        """Tokens whose log probabilities the client has; None: it asked for none."""

    def owner(self) -> MovingStream:
        """The owner of its stream; the same one as long as the request lasts."""

    def restart(self) -> None:
        """Begins anew at another engine. Only where nothing has come yet."""

    def give_up(self, reason: str) -> None:
        """Ends its answer with an error."""


class EngineLink:
    """An engine's control port, and its journal."""

    def __init__(self, engine: Engine, address: str, key: bytes) -> None:
        """Raises ValueError for a bad address."""
        self.address = address, key
        self.control: ControlConnection = connect(address, key, engine.id)
        self.journal = TokenJournal(self.control)
        self.gate = asyncio.Semaphore(CUTS_AT_ONCE)
        """For migrations away from here, from the request's submission elsewhere to its end."""

    async def close(self) -> None:
        await self.journal.close()
        await self.control.close()


class Moves:
    """One event loop owns it."""

    def __init__(self, router: Router, metrics: GatewayMetrics) -> None:
        self.router = router
        self.metrics = metrics
        self.coming: defaultdict[str, int] = defaultdict(int)
        """By engine: requests on their way there."""
        self.moving: set[Moved] = set()
        """Requests for which a coordinator is at work."""
        self.tell: Callable[[DrainNews], None] = lambda news: None
        """Whom news of drains are told."""
        self._fleet = Fleet()
        self._asked: dict[str, Leaving] = {}
        self._running: defaultdict[str, set[Moved]] = defaultdict(set)
        self._links: dict[str, EngineLink] = {}
        self._drains: dict[str, Drain] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._rebalancing = False
        metrics.leaving_engines.set_function(lambda: len(self._leaving()))
        metrics.leaving_requests.set_function(lambda: sum(len(self.running(engine)) for engine in self._leaving()))

    # The fleet

    def marked(self, fleet: Fleet) -> Fleet:
        """The fleet with those engines leaving that were asked to by hand."""
        known = {engine.id for service in fleet.services.values() for engine in service.engines}
        self._asked = {engine: leaving for engine, leaving in self._asked.items() if engine in known}
        if not self._asked:
            return fleet
        return Fleet(self._marked(service) for service in fleet.services.values())

    def _marked(self, service: Service) -> Service:
        if not any(engine.id in self._asked and engine.leaving is None for engine in service.engines):
            return service
        marked = (replace(engine, leaving=engine.leaving or self._asked.get(engine.id)) for engine in service.engines)
        return replace(service, engines=tuple(marked))

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot, in which `marked` engines leave."""
        self._fleet = fleet
        engines = self.engines()
        for engine_id in self._links.keys() - engines.keys():
            self._spawn(self._links.pop(engine_id).close())
        for engine in engines.values():
            if engine.leaving is not None:
                self._drain(engine)
        if not self._rebalancing and any(service.peer_key is not None for service in self.services()):
            self._rebalancing = True
            self._spawn(Rebalance(self).run())

    def services(self) -> Iterable[Service]:
        """Every service of the fleet."""
        return self._fleet.services.values()

    def engines(self) -> Mapping[str, Engine]:
        """Every engine of the fleet by id."""
        return {engine.id: engine for service in self._fleet.services.values() for engine in service.engines}

    def engines_of(self, service_key: str) -> Collection[str]:
        """Ids of a service's engines."""
        return {engine.id for engine in self._fleet.services[service_key].engines}

    def _leaving(self) -> list[str]:
        return [engine.id for engine in self.engines().values() if engine.leaving is not None]

    def ask_to_leave(self, engine_id: str) -> None:
        """The engine gets no new requests from this gateway, and its streams move away, once the fleet is updated."""
        self._asked[engine_id] = Leaving(LeavingReason.ASKED)

    def ask_to_stay(self, engine_id: str) -> None:
        """What was asked of it by hand holds no more."""
        self._asked.pop(engine_id, None)

    # Where requests run

    def sent(self, request: Moved) -> None:
        """A request is at its engine from now on."""
        engine = request.engine
        assert engine is not None
        self._running[engine.id].add(request)
        if request.can_move and request.streamed and (link := self.link(request.service_key, engine)) is not None:
            link.journal.follow(request.engine_request)
        if engine.leaving is not None:
            self._drain(engine)

    def left(self, request: Moved) -> None:
        """It is not there any more."""
        engine = request.engine
        if engine is None or (there := self._running.get(engine.id)) is None:
            return
        there.discard(request)
        if not there:
            del self._running[engine.id]
        if (link := self._links.get(engine.id)) is not None:
            link.journal.forget(request.engine_request)

    def running(self, engine_id: str) -> tuple[Moved, ...]:
        """The requests of this gateway at an engine."""
        return tuple(self._running.get(engine_id, ()))

    # The plug-in

    def link(self, service_key: str, engine: Engine) -> EngineLink | None:
        """The way to an engine's plug-in; None: it has none."""
        service = self._fleet.services.get(service_key)
        if engine.control is None or service is None or service.peer_key is None:
            return None
        known = self._links.get(engine.id)
        if known is not None and known.address == (engine.control, service.peer_key):
            return known
        try:
            link = EngineLink(engine, engine.control, service.peer_key)
        except ValueError as error:
            log.warning("engine %s: control: %s; its streams cannot move", engine.id, error)
            return None
        if known is not None:
            self._spawn(known.close())
        self._links[engine.id] = link
        return link

    def delivered(self, request: Moved) -> Delivered:
        """The tokens of its answer so far, as the journal of its engine has them.

        Of those that the client does not have yet the log probabilities are lost with the engine: where it asked for
        them, they are made anew.
        """
        link = self._links.get(request.engine.id) if request.engine is not None else None
        if link is None:
            return Delivered([], lagged=True)
        tokens, lagging = link.journal.tokens(request.engine_request)
        return Delivered(tokens[: request.told_logprobs()], lagging or not tokens)

    # Moving

    def resume(self, request: Moved) -> None:
        """Its engine goes on no more: another one is to."""
        owner = request.owner()
        owner.resuming(self._spawn(resume(self, request, owner)))

    def _drain(self, engine: Engine) -> None:
        if not self._running.get(engine.id):
            return
        drain = self._drains.get(engine.id)
        if drain is None or drain.over:
            self._drains[engine.id] = Drain(self, engine)
            drain = self._drains[engine.id]
            self._spawn(drain.run())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("moving streams failed", exc_info=error)

    async def close(self) -> None:
        """Ends all that is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for link in self._links.values():
            await link.close()
        self._links.clear()
