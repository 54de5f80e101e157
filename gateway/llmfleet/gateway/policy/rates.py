"""How much a tenant may ask for: token buckets for requests and for tokens, and how many requests at once.

A bucket fills at its rate and holds what may come at once: for requests one second of its rate, at least one request;
for tokens one minute. Requests are paid for when they come. Tokens are not known then, so what is expected is paid and
corrected when the request ends; a bucket may be in debt meanwhile, and nobody passes until it is paid.

Each gateway counts for itself.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from llmfleet.gateway.keys import ApiKey


class Bucket:
    """A token bucket. Times are clock seconds."""

    __slots__ = ("_at_s", "_level", "burst", "per_second")

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self.per_second = per_second
        self.burst = burst
        self._level = burst
        self._at_s = now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until this amount (no more than a burst of it) may be taken; 0: it may be now."""
        self._level = min(self.burst, self._level + (now - self._at_s) * self.per_second)
        self._at_s = now
        if self._level >= amount:
            return 0.0
        # Less than a billionth lacks by rounding only, and would be waited for in vain.
        lacking = min(amount, self.burst) - self._level
        return lacking / self.per_second if lacking > 1e-9 * self.burst else 0.0

    def take(self, amount: float) -> None:
        """Takes an amount, by debt if need be; a negative one gives back."""
        self._level -= amount


@dataclass(frozen=True, slots=True)
class Exceeded:
    """A rate that is used up."""

    of: Literal["requests", "tokens", "requests at once"]
    wait_s: float
    """Seconds until there is some again; of requests at once nobody knows."""


AGAIN_S = 1.0
"""When to try again where too many requests run at once."""


class RateBook:
    """Buckets and counts of every tenant whose key has a bound, by service."""

    def __init__(self) -> None:
        self._tenants: dict[tuple[str, str], _Tenant] = {}

    def take(self, service_key: str, key: ApiKey, tokens: float, now: float) -> Exceeded | None:
        """Pays for a request with so many expected tokens, or says what is used up and takes nothing.

        Whoever has paid calls `settle` when the request has ended.
        """
        tenant = self._tenant(service_key, key, now)
        return None if tenant is None else tenant.take(tokens, now)

    def settle(self, service_key: str, key: ApiKey, tokens: float) -> None:
        """A request has ended: takes tokens that it has used beyond what it paid, or gives back (negative)."""
        tenant = self._tenants.get((service_key, key.tenant))
        if tenant is not None:
            tenant.settle(tokens)

    def keep(self, services: Collection[str]) -> None:
        """Forgets the tenants of all other services."""
        self._tenants = {name: tenant for name, tenant in self._tenants.items() if name[0] in services}

    def _tenant(self, service_key: str, key: ApiKey, now: float) -> _Tenant | None:
        bounds = (key.requests_per_second, key.tokens_per_minute, key.concurrent_requests)
        if bounds == (None, None, None):
            return None
        name = (service_key, key.tenant)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant()
        if tenant.bounds != bounds:
            tenant.bound(key, now)
        return tenant


class _Tenant:
    """Both buckets of one tenant, None where its key has no such rate, and how many of its requests run."""

    __slots__ = ("bounds", "requests", "running", "tokens")

    def __init__(self) -> None:
        self.bounds: tuple[float | None, float | None, int | None] = None, None, None
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self.running = 0

    def bound(self, key: ApiKey, now: float) -> None:
        """Its key has these rights from now on; what runs is still counted."""
        per_s, per_minute, _ = self.bounds = key.requests_per_second, key.tokens_per_minute, key.concurrent_requests
        self.requests = None if per_s is None else Bucket(per_s, max(1.0, per_s), now)
        self.tokens = None if per_minute is None else Bucket(per_minute / 60.0, per_minute, now)

    def take(self, tokens: float, now: float) -> Exceeded | None:
        at_once = self.bounds[2]
        if at_once is not None and self.running >= at_once:
            return Exceeded("requests at once", AGAIN_S)
        wait_s = 0.0 if self.tokens is None else self.tokens.wait_s(tokens, now)
        if wait_s > 0.0:
            return Exceeded("tokens", wait_s)
        wait_s = 0.0 if self.requests is None else self.requests.wait_s(1.0, now)
        if wait_s > 0.0:
            return Exceeded("requests", wait_s)
        if self.requests is not None:
            self.requests.take(1.0)
        if self.tokens is not None:
            self.tokens.take(tokens)
        self.running += 1
        return None

    def settle(self, tokens: float) -> None:
        # Requests that began before the key had a bound are not counted.
        self.running = max(0, self.running - 1)
        if self.tokens is not None:
            self.tokens.take(tokens)
