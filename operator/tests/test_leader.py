"""Who may take the Lease, and who may write. The election itself is tested on a real API server."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import httpx2
import pytest
from lightkube import ApiError, AsyncClient
from lightkube.models.meta_v1 import Status

from llmfleet.operator.leader import LeaderElector, LeadershipLostError, LeaseRecord, LeaseTimings


def record(holder: str, duration_s: float = 8) -> LeaseRecord:
    return LeaseRecord(holder, duration_s, transitions=0, acquired_at="", resource_version="1")


def test_a_lease_is_free_when_nobody_holds_it_or_it_has_stood_still_for_its_duration() -> None:
    assert record("").free_for("me", 0)
    assert record("me").free_for("me", 0)
    assert not record("other").free_for("me", 7.9)
    assert record("other").free_for("me", 8)


def test_two_leaders_never_write_at_once() -> None:
    timings = LeaseTimings()
    assert timings.renew_deadline_s < timings.duration_s
    assert timings.renew_s + timings.request_timeout_s < timings.renew_deadline_s


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class LeaseApi:
    """The Lease as an API server keeps it, which can be made unreachable."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.away = False
        self._versions = itertools.count(1)

    async def get(self, resource: Any, name: str, namespace: str) -> dict[str, Any]:
        self._check()
        if self.lease is None:
            raise _api_error(404)
        return self.lease

    async def create(self, lease: dict[str, Any]) -> dict[str, Any]:
        self._check()
        if self.lease is not None:
            raise _api_error(409)
        return self._store(lease)

    async def replace(self, lease: dict[str, Any]) -> dict[str, Any]:
        self._check()
        if self.lease is None or lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise _api_error(409)
        return self._store(lease)

    def take_over(self, holder: str) -> None:
        assert self.lease is not None
        self._store({**self.lease, "spec": {**self.lease["spec"], "holderIdentity": holder}})

    def _check(self) -> None:
        if self.away:
            raise httpx2.ConnectError("away")

    def _store(self, lease: dict[str, Any]) -> dict[str, Any]:
        metadata = {**dict(lease["metadata"]), "resourceVersion": str(next(self._versions))}
        self.lease = {**lease, "metadata": metadata}
        return self.lease


def _api_error(code: int) -> ApiError:
    response = httpx2.Response(code, json=Status(code=code, message=str(code)).to_dict())
    return ApiError(request=httpx2.Request("GET", "https://api"), response=response)


QUICK = LeaseTimings(renew_s=0.001, retry_s=0.001)


def elector(api: LeaseApi, identity: str, clock: Clock) -> LeaderElector:
    client: AsyncClient = api  # type: ignore[assignment]
    return LeaderElector(client, "ns", identity, QUICK, clock)


async def test_the_first_candidate_leads_and_the_second_waits_until_the_lease_stands_still() -> None:
    api, clock = LeaseApi(), Clock()
    first, second = elector(api, "first", clock), elector(api, "second", clock)
    await first.acquire()
    assert first.holds

    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    clock.now_s += 9
    await asyncio.wait_for(waiting, 5)
    assert second.holds
    assert not first.holds
    with pytest.raises(LeadershipLostError, match="second"):
        await asyncio.wait_for(first.keep(), 5)


async def test_a_leader_that_cannot_renew_does_not_write_and_goes_on_when_the_api_server_is_back() -> None:
    api, clock = LeaseApi(), Clock()
    leader = elector(api, "leader", clock)
    await leader.acquire()
    keeping = asyncio.create_task(leader.keep())
    api.away = True
    clock.now_s += 60
    await asyncio.sleep(0.02)
    assert not leader.holds
    assert not keeping.done()

    api.away = False
    for _ in range(200):
        if leader.holds:
            break
        await asyncio.sleep(0.01)
    assert leader.holds
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_leader_that_comes_back_to_another_holder_ends() -> None:
    api, clock = LeaseApi(), Clock()
    leader = elector(api, "leader", clock)
    await leader.acquire()
    api.take_over("other")
    with pytest.raises(LeadershipLostError, match="other"):
        await asyncio.wait_for(leader.keep(), 5)
    assert not leader.holds


async def test_a_released_lease_can_be_taken_at_once() -> None:
    api, clock = LeaseApi(), Clock()
    first, second = elector(api, "first", clock), elector(api, "second", clock)
    await first.acquire()
    await first.release()
    assert not first.holds
    await asyncio.wait_for(second.acquire(), 5)
    assert second.holds
    assert api.lease is not None
    assert api.lease["spec"]["leaseTransitions"] == 1


async def test_a_candidate_looks_again_at_the_moment_at_which_the_lease_is_free() -> None:
    api = LeaseApi()
    await elector(api, "first", Clock()).acquire()
    assert api.lease is not None
    api.lease["spec"]["leaseDurationSeconds"] = 0.2
    client: AsyncClient = api  # type: ignore[assignment]
    second = LeaderElector(client, "ns", "second", LeaseTimings(retry_s=60))
    await asyncio.wait_for(second.acquire(), 10)
    assert second.holds
