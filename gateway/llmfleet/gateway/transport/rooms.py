"""The waiting rooms: where requests are while there is no place for them on an engine, a room per service.

    enter -> (a place) sent
       |        ^
       +-> waits +-- served in the room's order, whenever a place may have become free
             |
             +-> its time is up, its service is gone, or somebody with more right to the room comes: refused

Order, fairness and predictions are `policy.admission`'s, places are the router's. A request that arrives while others
wait does not overtake them. Who waits is part of the demand that the operator reads: that is how a service at zero
replicas wakes.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from llmfleet.gateway.policy.admission import Claim, WaitingRoom
from llmfleet.gateway.transport import errors
from llmfleet.gateway.transport.limits import Limits

if TYPE_CHECKING:
    from llmfleet.gateway.metrics import GatewayMetrics
    from llmfleet.gateway.policy import Router
    from llmfleet.gateway.transport.exchange import Exchange

NO_ENGINE_RETRY_S = 5
"""Retry-After of a request that has waited in vain."""


class Rooms:
    """The rooms of one data plane. One event loop owns them."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, router: Router, limits: Limits, metrics: GatewayMetrics
    ) -> None:
        self._loop = loop
        self._router = router
        self._limits = limits
        self._metrics = metrics
        self._rooms: dict[str, WaitingRoom[Exchange]] = {}
        self._alarms: dict[str, asyncio.TimerHandle] = {}
        self._woken: set[str] = set()

    def enter(self, exchange: Exchange) -> errors.ApiError | None:
        """Sends a new request at once if it may go before everybody else, or lets it wait, or says why neither."""
        key, claim = exchange.service_key, exchange.claim
        room = self._room(key)
        if not room and exchange.dispatch():
            room.passed(claim)
            return None
        now = self._loop.time()
        wait_s = room.predicted_wait_s(claim)
        if wait_s is not None and now + wait_s > claim.deadline_s:
            return errors.too_late(key, wait_s, claim.deadline_s - now)
        if len(room) >= self._limits.queue_length:
            victim = room.victim(claim)
            full = errors.queue_full(key, self._limits.queue_length, math.ceil(wait_s or NO_ENGINE_RETRY_S))
            if victim is None:
                return full
            victim.refuse(full)
        self._add(exchange, claim)
        if len(room) > 1:
            self.wake(key)
        return None

    def again(self, exchange: Exchange) -> None:
        """Sends a request whose engine failed it to another, or lets it wait: it was charged already, and whoever has
        waited longest has waited less than it."""
        if not exchange.dispatch():
            self._add(exchange, exchange.claim._replace(service=0.0, deadline_s=-math.inf))

    def _add(self, exchange: Exchange, claim: Claim) -> None:
        key = exchange.service_key
        room = self._room(key)
        room.add(exchange, claim, self._loop.time())
        self._note(key, room)
        self._set_alarm(key)

    def _room(self, service_key: str) -> WaitingRoom[Exchange]:
        room = self._rooms.get(service_key)
        if room is None:
            room = self._rooms[service_key] = WaitingRoom()
        return room

    def leave(self, exchange: Exchange) -> None:
        """Forgets a request that waits no more; does nothing if it did not."""
        room = self._rooms.get(exchange.service_key)
        if room is not None and exchange in room:
            room.remove(exchange)
            self._note(exchange.service_key, room)

    def settle(self, exchange: Exchange, service: float) -> None:
        """Charges a request that was sent what it took, in weighted tokens, instead of what was expected."""
        room = self._rooms.get(exchange.service_key)
        if room is not None:
            room.settled(exchange.claim, service)

    def close(self, service_key: str) -> None:
        """The service is gone, and everything that was counted for it."""
        for exchange in list(self._rooms.get(service_key, ())):
            exchange.refuse(errors.unknown_model(exchange.model))
        self._rooms.pop(service_key, None)
        alarm = self._alarms.pop(service_key, None)
        if alarm is not None:
            alarm.cancel()

    def keep(self, services: frozenset[str]) -> None:
        """These services are there now: the others' rooms close, and who waits in theirs may find a place."""
        for key in list(self._rooms):
            if key in services:
                self.wake(key)
            else:
                self.close(key)

    def wake(self, service_key: str) -> None:
        """Says that there may be a place for somebody of this service."""
        if self._rooms.get(service_key) and service_key not in self._woken:
            self._woken.add(service_key)
            self._loop.call_soon(self._serve, service_key)

    def _serve(self, service_key: str) -> None:
        self._woken.discard(service_key)
        room = self._rooms.get(service_key)
        if room is None:
            return
        full: set[object] = set()
        while any(self._serve_one(room, exchange, full) for exchange in room.order()):
            pass
        self._note(service_key, room)
        if room:
            self._set_alarm(service_key)

    def _serve_one(self, room: WaitingRoom[Exchange], exchange: Exchange, full: set[object]) -> bool:
        """Whether there was a place. `full`: sizes of requests for which there is none, asked for once only."""
        if exchange.size in full:
            return False
        if not exchange.dispatch():
            full.add(exchange.size)
            return False
        room.admitted(exchange, self._loop.time())
        return True

    def _set_alarm(self, service_key: str) -> None:
        wait_s = self._router.look_again_s(service_key)
        old = self._alarms.pop(service_key, None)
        if old is not None:
            old.cancel()
        if wait_s is not None:
            # A clock's grain later: at the very moment the engine might still be ejected.
            self._alarms[service_key] = self._loop.call_later(wait_s + 0.01, self._serve, service_key)

    def _note(self, service_key: str, room: WaitingRoom[Exchange]) -> None:
        namespace, _, service = service_key.partition("/")
        self._metrics.waiting.labels(namespace, service).set(len(room))
