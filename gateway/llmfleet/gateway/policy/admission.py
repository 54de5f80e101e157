"""Who is next: the order of requests that wait in the gateway, and what waiting would cost a further one.

    Claim (class, tenant, deadline, expected service) -> add -> order -> admitted -> settled
                                                          |
                                                          +-- predicted wait, victim of a full room

Requests wait here and not in engines' queues, where nobody can reorder them. Order is

1. by **class**: all of `high` before `standard` before `batch`;
2. within a class by **tenant**: the one with the least service so far. Service is tokens, an answer's counting double,
   because they take a step each (virtual token counter; Sheng et al., "Fairness in Serving Large Language Models",
   OSDI'24). A request's expected service is charged when it is admitted and corrected when it ends. A tenant that
   begins to wait is lifted to the least counter of those who wait, or, where nobody does, to that of who was admitted
   last: idle time cannot be saved up;
3. within a tenant by **urgency**: the earliest deadline, then the earliest arrival.

*Bound.* Let U be the largest single charge. Who is admitted has the least counter of those who wait, so right after it
a waiting tenant's counter is above the least by at most U, and lifting changes that for nobody. The counters of two
tenants that wait all the time between two moments differ by at most U at either, so their service differs by at most
2 U over the interval, however long (theorem 4.4 there, with expected for known lengths). A correction moves a counter
by what the expectation was wrong, so U grows by the largest sum of corrections that are outstanding at once. A tenant
with less service than another is before it, so nobody starves within a class; between classes the order is strict, and
keys say who may claim which.

All of this is about order. Whether there is a place on an engine is `holding`'s and the router's to say; whoever asks
takes the first request in this order for which there is one, so no place stays empty while anybody waits for it.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Hashable, Iterator
from typing import Generic, NamedTuple, TypeVar

from llmfleet.gateway.keys import Priority
from llmfleet.gateway.policy.sizes import Prediction

T = TypeVar("T", bound=Hashable)

OUTPUT_WEIGHT = 2.0
"""Service of an answer's token, in prompt tokens."""
_RATE_MEMORY_S = 10.0
"""Time of waiting after which a served request counts 1/e in the rate at which the room is served."""

_LEAST_SEEN_S = 0.1
"""Time of waiting that must have been seen before anybody is refused by a prediction."""


class Claim(NamedTuple):
    """What a request brings to the queue."""

    priority: Priority
    tenant: str
    """Name of its API key; empty where no key is asked for."""
    deadline_s: float
    """Clock time by which its first token should come, in seconds."""
    service: float
    """Expected service: prompt tokens and OUTPUT_WEIGHT for each token of the answers."""


def service_of(prompt_tokens: float, output_tokens: float) -> float:
    """Service in weighted tokens, as a tenant's counter has it."""
    return prompt_tokens + OUTPUT_WEIGHT * output_tokens


def expected_service(prediction: Prediction, sequences: int) -> float:
    """Service that a request is expected to take; `sequences`: answers that it asks for."""
    return service_of(prediction.prompt_tokens, prediction.output_tokens * sequences)


class _Tenant(Generic[T]):
    """One tenant in one class."""

    __slots__ = ("counter", "queue", "waiting_service")

    def __init__(self) -> None:
        self.counter = 0.0
        self.queue: list[tuple[float, int, T]] = []  # by deadline, then arrival
        self.waiting_service = 0.0


class _Class(Generic[T]):
    """One priority class: tenants, and who of them waits."""

    __slots__ = ("last_counter", "tenants", "waiting")

    def __init__(self) -> None:
        self.tenants: dict[str, _Tenant[T]] = {}
        self.waiting: dict[str, _Tenant[T]] = {}
        self.last_counter = 0.0
        """Counter of who was admitted last, after it was charged."""

    def lifted(self, name: str) -> _Tenant[T]:
        """The tenant; if it does not wait already, its counter without what it might have saved up."""
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = _Tenant()
        if not tenant.queue:
            waiting = self.waiting
            least = min(other.counter for other in waiting.values()) if waiting else self.last_counter
            if tenant.counter < least:
                tenant.counter = least
        return tenant

    def charge(self, tenant: _Tenant[T], service: float) -> None:
        tenant.counter += service
        self.last_counter = tenant.counter

    def ordered(self) -> list[tuple[str, _Tenant[T]]]:
        return sorted(self.waiting.items(), key=lambda item: (item[1].counter, item[0]))


class WaitingRoom(Generic[T]):
    """Requests of one service that wait, and what each tenant has been served."""

    __slots__ = ("_arrivals", "_claims", "_classes", "_rate", "_served_at", "_waited_s")

    def __init__(self) -> None:
        self._classes: dict[Priority, _Class[T]] = {priority: _Class() for priority in sorted(Priority, reverse=True)}
        self._claims: dict[T, tuple[Claim, tuple[float, int, T]]] = {}
        self._arrivals = 0
        self._rate = 0.0
        self._served_at: float | None = None  # since when nobody was served while somebody waited
        self._waited_s = 0.0

    def __len__(self) -> int:
        return len(self._claims)

    def __contains__(self, item: T) -> bool:
        return item in self._claims

    def __iter__(self) -> Iterator[T]:
        return iter(self._claims)

    def add(self, item: T, claim: Claim, now: float) -> None:
        """Lets a request wait. Raises ValueError if it does already."""
        if item in self._claims:
            raise ValueError(f"{item!r} waits already")
        if not self._claims:
            self._served_at = now
        group = self._classes[claim.priority]
        tenant = group.lifted(claim.tenant)
        self._arrivals += 1
        entry = (claim.deadline_s, self._arrivals, item)
        insort(tenant.queue, entry)
        tenant.waiting_service += claim.service
        group.waiting[claim.tenant] = tenant
        self._claims[item] = claim, entry

    def order(self) -> Iterator[T]:
        """Those who wait, the next one first. Begin anew after a change."""
        for group in self._classes.values():
            for _, tenant in group.ordered():
                for _, _, item in tenant.queue:
                    yield item

    def admitted(self, item: T, now: float) -> None:
        """A waiting request goes to an engine: it waits no more and is charged."""
        claim = self.remove(item)
        group = self._classes[claim.priority]
        group.charge(group.tenants[claim.tenant], claim.service)
        self._served(claim.service, now)

    def passed(self, claim: Claim) -> None:
        """A request went to an engine without waiting: it is charged all the same."""
        group = self._classes[claim.priority]
        group.charge(group.lifted(claim.tenant), claim.service)

    def settled(self, claim: Claim, service: float) -> None:
        """An admitted request has ended: its tenant is charged what it took instead of what was expected."""
        self._classes[claim.priority].tenants[claim.tenant].counter += service - claim.service

    def remove(self, item: T) -> Claim:
        """Forgets a waiting request without charging it, and gives its claim. Raises KeyError if it does not wait."""
        claim, entry = self._claims.pop(item)
        group = self._classes[claim.priority]
        tenant = group.tenants[claim.tenant]
        tenant.queue.remove(entry)
        tenant.waiting_service -= claim.service
        if not tenant.queue:
            tenant.waiting_service = 0.0
            del group.waiting[claim.tenant]
        return claim

    def victim(self, claim: Claim) -> T | None:
        """Who gives way to a further request where no more may wait; None: the further request itself.

        Somebody of the lowest class. Within a class the tenant with the most requests waiting loses its last one, so
        that nobody can fill the room alone; the further request counts as its tenant's last.
        """
        for priority, group in reversed(self._classes.items()):
            if priority > claim.priority:
                return None
            if not group.waiting:
                continue
            longest = max(group.waiting.values(), key=lambda tenant: len(tenant.queue))
            if priority == claim.priority:
                own = group.waiting.get(claim.tenant)
                if len(longest.queue) <= (len(own.queue) if own else 0) + 1:
                    return None
            return longest.queue[-1][2]
        return None

    def predicted_wait_s(self, claim: Claim) -> float | None:
        """How long a further request would wait, in seconds; None while nothing was seen that would say so.

        Service that comes before it, divided by the rate at which those who waited were served: all of higher
        classes, of its own class what its tenant has before it and what each other tenant gets until the counters meet.
        """
        rate = self.rate
        if rate <= 0.0:
            return None
        ahead = 0.0
        for priority, group in self._classes.items():
            if priority > claim.priority:
                ahead += sum(tenant.waiting_service for tenant in group.waiting.values())
            elif priority == claim.priority:
                ahead += _ahead_in(group, claim)
        return ahead / rate

    @property
    def rate(self) -> float:
        """Service per second of waiting, over the last ten seconds in which somebody waited; 0 while too little was
        seen."""
        if self._waited_s < _LEAST_SEEN_S:
            return 0.0
        return self._rate / (1.0 - math.exp(-self._waited_s / _RATE_MEMORY_S))

    def _served(self, service: float, now: float) -> None:
        """Notes one service. Time counts only while somebody waits: an empty room says nothing of engines."""
        if self._served_at is not None and now > self._served_at:
            passed_s = now - self._served_at
            self._waited_s += passed_s
            self._rate *= math.exp(-passed_s / _RATE_MEMORY_S)
        self._served_at = now
        self._rate += service / _RATE_MEMORY_S


def _ahead_in(group: _Class[T], claim: Claim) -> float:
    own = group.waiting.get(claim.tenant)
    before = 0.0 if own is None else own.waiting_service
    counter = group.lifted(claim.tenant).counter
    ahead = before
    for name, tenant in group.waiting.items():
        if name != claim.tenant:
            ahead += min(tenant.waiting_service, max(0.0, counter + before - tenant.counter))
    return ahead
