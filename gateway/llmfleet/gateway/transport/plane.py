"""What all requests of one data plane share: fleet, policy, rates, connections to engines, and the waiting rooms."""

from __future__ import annotations

import asyncio
import logging
import math
import os

from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.moving.moves import Moves
from llmfleet.gateway.policy import RateBook, Router
from llmfleet.gateway.transport import errors
from llmfleet.gateway.transport.limits import Limits
from llmfleet.gateway.transport.rooms import NO_ENGINE_RETRY_S, Rooms
from llmfleet.gateway.transport.upstream import EnginePool

log = logging.getLogger("llmfleet.gateway")

_IDS_DRAWN = 64
"""At once: the kernel's random numbers cost a call, however few they are."""


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
        self.bodies_bytes = 0
        """Of the requests that are here."""
        metrics.bodies_bytes.set_function(lambda: self.bodies_bytes)
        self.rooms = Rooms(loop, router, limits, metrics)
        self.rates = RateBook()
        self._ids: list[bytes] = []

    def engine_request_id(self) -> bytes:
        """A request's id for one engine: never one that a client chose, since engines' plug-ins find requests by it."""
        if not self._ids:
            drawn = os.urandom(16 * _IDS_DRAWN).hex().encode()
            self._ids = [drawn[begin : begin + 32] for begin in range(0, len(drawn), 32)]
        return self._ids.pop()

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot of the fleet, and serves who has waited for it."""
        self.unmarked = fleet
        self.fleet = fleet = self.moves.marked(fleet)
        self.synced = True
        self.router.update(fleet)
        self.prune()
        self.moves.update(fleet)
        self.rooms.keep(frozenset(fleet.services))
        self.rates.keep(fleet.services)

    def prune(self) -> None:
        """Closes connections to engines that are gone, and idle ones."""
        self.pool.prune({engine.id for service in self.fleet.services.values() for engine in service.engines})

    def no_engine(self, service_key: str, waited_s: float) -> errors.ApiError:
        """The answer to a request that has waited in vain."""
        ejected_s = self.router.retry_after(service_key)
        return errors.no_engine(service_key, waited_s, max(NO_ENGINE_RETRY_S, math.ceil(ejected_s or 0.0)))

    def log_engine(self, engine: Engine | None, reason: str) -> None:
        """Notes what an engine did wrong."""
        if engine is not None:
            log.warning("engine %s (%s:%d, variant %s) %s", engine.id, engine.host, engine.port, engine.variant, reason)
