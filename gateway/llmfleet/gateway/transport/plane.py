"""What all requests of one data plane share: fleet, policy, connections to engines, and the waiting rooms.

A request that finds no engine waits in its service's room, first come first served, until an engine appears (a new
fleet), recovers (an ejection ends, a probe succeeds), or its time is up. Rooms are bounded. Who waits is part of the
demand that the operator reads: that is how a service at zero replicas wakes.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving.moves import Moves
from llmfleet.gateway.policy import Router
from llmfleet.gateway.transport import errors
from llmfleet.gateway.transport.limits import Limits
from llmfleet.gateway.transport.upstream import EnginePool

if TYPE_CHECKING:
    from llmfleet.gateway.transport.exchange import Exchange

log = logging.getLogger("llmfleet.gateway")

_NO_ENGINE_RETRY_S = 5
"""Retry-After of a request that has waited in vain."""


class Plane:
    """The shared state. One event loop owns it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, router: Router, limits: Limits, metrics: GatewayMetrics
    ) -> None:
        self.loop = loop
        self.now = loop.time
        self.router = router
        self.limits = limits
        self.metrics = metrics
        self.pool = EnginePool(loop, limits.connect_s, limits.engine_idle_s)
        self.moves = Moves(router, metrics)
        self.fleet = Fleet()
        self.unmarked = Fleet()
        """As discovery gave it: without those engines leaving that were asked to by hand."""
        self.synced = False
        """Whether a fleet has come: before that, an unknown model may only be not known yet."""
        self.draining = False
        self._rooms: dict[str, dict[Exchange, None]] = {}
        self._alarms: dict[str, asyncio.TimerHandle] = {}

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot of the fleet, and serves who has waited for it."""
        self.unmarked = fleet
        self.fleet = fleet = self.moves.marked(fleet)
        self.synced = True
        self.router.update(fleet)
        self.prune()
        self.moves.update(fleet)
        for key, room in list(self._rooms.items()):
            if key in fleet.services:
                self.wake(key)
                continue
            for exchange in list(room):
                exchange.refuse(errors.unknown_model(exchange.model))

    def prune(self) -> None:
        """Closes connections to engines that are gone, and idle ones."""
        self.pool.prune({engine.id for service in self.fleet.services.values() for engine in service.engines})

    def wait(self, exchange: Exchange) -> bool:
        """Lets a request wait; False if the room is full."""
        room = self._rooms.setdefault(exchange.service_key, {})
        if len(room) >= self.limits.queue_length:
            return False
        room[exchange] = None
        self._note_waiting(exchange.service_key, len(room))
        self._set_alarm(exchange.service_key)
        return True

    def unwait(self, exchange: Exchange) -> None:
        """Removes a request from its room, if it is there."""
        room = self._rooms.get(exchange.service_key)
        if room is None or exchange not in room:
            return
        del room[exchange]
        self._note_waiting(exchange.service_key, len(room))
        if not room:
            del self._rooms[exchange.service_key]

    def wake(self, service_key: str) -> None:
        """Says that a waiting request of this service may find an engine now."""
        if service_key in self._rooms:
            self.loop.call_soon(self._serve, service_key)

    def _serve(self, service_key: str) -> None:
        for exchange in list(self._rooms.get(service_key, ())):
            if not exchange.dispatch():
                break
            self.unwait(exchange)
        if service_key in self._rooms:
            self._set_alarm(service_key)

    def _set_alarm(self, service_key: str) -> None:
        wait_s = self.router.retry_after(service_key)
        old = self._alarms.pop(service_key, None)
        if old is not None:
            old.cancel()
        if wait_s is not None:
            # A clock's grain later: at the very moment the engine might still be ejected.
            self._alarms[service_key] = self.loop.call_later(wait_s + 0.01, self._serve, service_key)

    def _note_waiting(self, service_key: str, waiting: int) -> None:
        namespace, _, service = service_key.partition("/")
        self.metrics.waiting.labels(namespace, service).set(waiting)

    def queue_full(self, service_key: str) -> errors.ApiError:
        """The answer to a request that may not even wait."""
        return errors.queue_full(service_key, self.limits.queue_length, _NO_ENGINE_RETRY_S)

    def no_engine(self, service_key: str, waited_s: float) -> errors.ApiError:
        """The answer to a request that has waited in vain."""
        ejected_s = self.router.retry_after(service_key)
        return errors.no_engine(service_key, waited_s, max(_NO_ENGINE_RETRY_S, math.ceil(ejected_s or 0.0)))

    def log_engine(self, engine: Engine | None, reason: str) -> None:
        """Notes what an engine did wrong."""
        if engine is not None:
            log.warning("engine %s (%s:%d, variant %s) %s", engine.id, engine.host, engine.port, engine.variant, reason)
