"""Which replica acts: a `coordination.k8s.io` Lease, held by one, watched by the others.

kopf's peering is a keep-alive among operators, not an election, so the election is here, and it comes before kopf
starts: a standby watches nothing and holds no cache.

The rules are those of client-go. A candidate does not compare clocks: it notes when it last saw the record change,
and takes the Lease when the record has stood still for the lease's own duration. Every write carries the
resourceVersion that was read, so of two candidates one gets a conflict.

Two things differ from client-go, both on purpose:

* An API server that is away is not a lost election. Nobody can take the Lease then either, so the leader stops
  writing (`holds` turns false once the last renewal is older than `renew_deadline_s`), keeps trying, and goes on if
  the record still names it when the server is back. Only a record that names somebody else ends it.
* Every write of the operator asks `holds` first. A process that was frozen wakes up with a stale Lease and must not
  finish what it had begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import GenericNamespacedResource

from llmfleet.operator.kinds import LEASES

log = logging.getLogger(__name__)

LEASE_NAME = "llmfleet-operator"


class LeadershipLostError(Exception):
    """Another replica holds the Lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimings:
    """A standby acts at most `duration_s` + `retry_s` after its leader died, plus the time to fill its caches: it may
    have seen the last renewal as late as its next look."""

    duration_s: int = 8
    """A record that has not changed for this long is free."""
    renew_s: float = 2.0
    """How often the leader renews."""
    renew_deadline_s: float = 5.0
    """A leader whose last renewal is older does not write; below `duration_s`, so that two never do."""
    retry_s: float = 1.0
    """How often a standby looks, and a leader tries again."""
    request_timeout_s: float = 2.0
    """Limit on one call, so that a hanging one does not use up the deadline."""


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """The part of a Lease that the election reads."""

    holder: str
    duration_s: float
    transitions: int
    acquired_at: str
    resource_version: str

    @classmethod
    def parse(cls, lease: dict[str, Any]) -> LeaseRecord:
        """Reads a Lease as the API server gives it; absent fields mean that nobody holds it."""
        spec = lease.get("spec") or {}
        return cls(
            holder=spec.get("holderIdentity") or "",
            duration_s=spec.get("leaseDurationSeconds") or 0,
            transitions=spec.get("leaseTransitions") or 0,
            acquired_at=spec.get("acquireTime") or "",
            resource_version=lease["metadata"]["resourceVersion"],
        )

    def free_for(self, identity: str, unchanged_s: float) -> bool:
        """Whether `identity` may take the Lease after it has seen the record stand still for `unchanged_s`."""
        return not self.holder or self.holder == identity or unchanged_s >= self.duration_s


class LeaderElector:
    """One candidate. `acquire` waits for the Lease, `keep` holds it, `release` gives it up at once."""

    def __init__(
        self,
        client: AsyncClient,
        namespace: str,
        identity: str,
        timings: LeaseTimings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._identity = identity
        self._timings = timings or LeaseTimings()
        self._clock = clock
        self._record: LeaseRecord | None = None
        self._seen_at = clock()
        self._renewed_at: float | None = None

    @property
    def holds(self) -> bool:
        """Whether this process may write now."""
        return self._renewed_at is not None and self._clock() - self._renewed_at < self._timings.renew_deadline_s

    async def acquire(self) -> None:
        """Returns as soon as this candidate holds the Lease, however long that takes."""
        log.info("waiting for the lease", extra={"lease": self._lease, "identity": self._identity})
        while True:
            with self._tolerating_outage():
                await self._observe()
                unchanged_s = self._clock() - self._seen_at
                if (self._record is None or self._record.free_for(self._identity, unchanged_s)) and (
                    await self._write(self._identity)
                ):
                    log.info("became leader", extra={"lease": self._lease, "identity": self._identity})
                    return
            await asyncio.sleep(self._next_look_s())

    def _next_look_s(self) -> float:
        """Until a candidate looks again: not later than the record is free, if nobody renews it."""
        timings = self._timings
        if self._record is None:
            return timings.retry_s
        free_in_s = self._record.duration_s - (self._clock() - self._seen_at)
        # One that was free before could not be taken: that is tried again at the usual pace.
        just_free = -timings.retry_s / 10 < free_in_s <= 0
        return max(0.0, min(free_in_s, timings.retry_s)) if free_in_s > 0 or just_free else timings.retry_s

    async def keep(self) -> None:
        """Renews for ever. Raises LeadershipLostError when another replica holds the Lease."""
        while True:
            await asyncio.sleep(self._timings.renew_s if self.holds else self._timings.retry_s)
            with self._tolerating_outage():
                if await self._write(self._identity):
                    continue
                await self._observe()
                if self._record is not None and self._record.holder != self._identity:
                    self._renewed_at = None
                    raise LeadershipLostError(f"lease {self._lease} is held by {self._record.holder!r}")

    async def release(self) -> None:
        """Gives the Lease up, so that a standby need not wait for it to expire. Failing is no error: it expires."""
        if self._renewed_at is None:
            return
        self._renewed_at = None
        with self._tolerating_outage():
            if await self._write(""):
                log.info("released the lease", extra={"lease": self._lease})

    @property
    def _lease(self) -> str:
        return f"{self._namespace}/{LEASE_NAME}"

    async def _observe(self) -> None:
        """Reads the record, and notes when it was last seen to change."""
        try:
            async with asyncio.timeout(self._timings.request_timeout_s):
                lease = await self._client.get(LEASES, LEASE_NAME, namespace=self._namespace)
        except ApiError as error:
            if error.status.code != 404:
                raise
            self._record = None
            return
        record = LeaseRecord.parse(lease)
        if record != self._record:
            self._record, self._seen_at = record, self._clock()

    async def _write(self, holder: str) -> bool:
        """Writes the record over the one that was read; False if somebody else was faster."""
        # Taken before the call: a renewal counts from when it was asked for, not from when the answer came.
        asked_at = self._clock()
        try:
            async with asyncio.timeout(self._timings.request_timeout_s):
                lease: GenericNamespacedResource = LEASES.from_dict(self._manifest(holder))
                if self._record is None:
                    written = await self._client.create(lease)
                else:
                    written = await self._client.replace(lease)
        except ApiError as error:
            if error.status.code in (404, 409):
                return False
            raise
        self._record, self._seen_at = LeaseRecord.parse(written), asked_at
        if holder:
            self._renewed_at = asked_at
        return True

    def _manifest(self, holder: str) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        old = self._record
        metadata = {"name": LEASE_NAME, "namespace": self._namespace}
        spec: dict[str, Any] = {"leaseDurationSeconds": self._timings.duration_s, "renewTime": now}
        if old is not None:
            metadata["resourceVersion"] = old.resource_version
        if holder:
            same = old is not None and old.holder == holder
            spec["holderIdentity"] = holder
            spec["acquireTime"] = old.acquired_at if old is not None and same else now
        spec["leaseTransitions"] = old.transitions + int(bool(holder) and old.holder != holder) if old else 0
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}

    @contextlib.contextmanager
    def _tolerating_outage(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.HTTPError, TimeoutError) as error:
            log.warning("cannot reach the lease", extra={"lease": self._lease, "cause": repr(error)})
