"""The gateway before two real vLLMs, as its clients see it and as whoever drains an engine does.

In: a `Pair`, and a gateway's ports. Out: clients of the gateway, and what its admin port says. Which engine has the
requests is decided by letting the other one leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp

from e2e.migration import cases
from e2e.migration.leg import Call
from e2e.migration.owner import StreamOwner, Transcript
from e2e.migration.pair import Member, Pair

TOKEN = "sesame"
"""Of the admin port."""


def engine_argument(member: Member) -> str:
    """An engine as `--engine` has it."""
    return f"{member.url}#control={member.control}"


class Front:
    """One gateway."""

    def __init__(self, pair: Pair, session: aiohttp.ClientSession, api_port: int, admin_port: int) -> None:
        self.pair = pair
        self.session = session
        self.url, self._admin = f"http://127.0.0.1:{api_port}", f"http://127.0.0.1:{admin_port}"

    def client(self, call: Call, request: str = "-") -> StreamOwner:
        """A client of the gateway, for whom nothing moves."""
        return StreamOwner(self.session, {"gateway": self.url}, cases.apart(call), request=request, engine="gateway")

    async def begun(
        self, calls: Sequence[Call], deltas: int, names: Sequence[str] | None = None
    ) -> tuple[list[asyncio.Task[Transcript]], list[StreamOwner]]:
        """All of them at once, once every stream has so many deltas. `names`: of the requests."""
        clients = [self.client(*each) for each in zip(calls, names or ["-"] * len(calls), strict=True)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        for client, call in zip(clients, calls, strict=True):
            if call.streamed:
                assert await client.arrived(deltas)
        return tasks, clients

    async def only(self, member: Member) -> None:
        """The other engine leaves, and what runs there with it."""
        (other,) = (one for one in self.pair.members if one is not member)
        await self.stay(member)
        await self._ask("POST", f"/v1/engines/{other.url}/drain")

    async def stay(self, member: Member) -> None:
        """It gets new requests."""
        await self._ask("DELETE", f"/v1/engines/{member.url}/drain")

    async def requests(self) -> dict[str, int]:
        """Those that run, by engine."""
        listed = await self._ask("GET", "/v1/engines")
        return {one["id"]: one["requests"] for one in listed["engines"]}

    async def names(self, member: Member) -> set[str]:
        """Of the requests that run there."""
        listed = await self._ask("GET", f"/v1/engines/{member.url}/requests")
        return {one["id"] for one in listed["requests"]}

    async def migrate(self, request: str, member: Member) -> Any:
        """Move one request there. The outcome, or the error: it may have ended."""
        return await self._ask("POST", f"/v1/requests/{request}/migrate?to={member.url}", refusable=True)

    async def empty(self, member: Member) -> None:
        """Until nothing runs there. The admin port has nothing to wait for: it is asked again."""
        while (await self.requests())[member.url]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)

    async def metric(self, line: str) -> float:
        """The sum of all samples whose lines begin so."""
        return sum(float(one.rpartition(" ")[2]) for one in await self.samples(line))

    async def samples(self, line: str) -> list[str]:
        """Lines of metrics that begin so."""
        async with self.session.get(f"{self._admin}/metrics") as answer:
            return [one for one in (await answer.text()).splitlines() if one.startswith(line)]

    async def _ask(self, method: str, path: str, *, refusable: bool = False) -> Any:
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with self.session.request(method, self._admin + path, headers=headers) as answer:
            assert answer.ok or refusable, await answer.text()
            return await answer.json()
