"""The poller against real HTTP servers that answer as a gateway's admin port does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from aiohttp import web

from llmfleet.api import DEMAND_PATH, Buckets, DemandReport, Part, ServiceDemand
from llmfleet.operator.gateways import DETAILED_SERVICES, GatewayPoller


class Gateway:
    """An admin port that asks for a token."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.report = DemandReport(instance_id="one").to_wire()
        self.hosts: list[str] = []
        self.details: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async def demand(request: web.Request) -> web.Response:
            self.hosts.append(request.headers["host"])
            self.details.append(request.query["detail"])
            if request.headers.get("authorization") != f"Bearer {self.token}":
                return web.Response(status=401)
            return web.json_response(self.report)

        app = web.Application()
        app.add_routes([web.get(DEMAND_PATH, demand)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        self.port = runner.addresses[0][1]
        try:
            yield
        finally:
            await runner.cleanup()


async def poll(poller: GatewayPoller) -> dict[str, DemandReport | None]:
    async with httpx2.AsyncClient(trust_env=False, timeout=5) as client:
        return await poller.poll(client)


def discard(reports: Mapping[str, DemandReport | None], detail: Part, now_s: float) -> None:
    """For pollers whose rounds a test asks for itself."""


async def test_every_address_of_a_name_is_asked_with_the_token_and_the_name(tmp_path: Path) -> None:
    gateway = Gateway("secret")
    token = tmp_path / "token"
    token.write_text("secret\n")
    async with gateway.serving():
        reports = await poll(GatewayPoller((gateway.url,), token, discard))
        answered = reports[f"http://127.0.0.1:{gateway.port}"]
    assert answered is not None
    assert answered.instance_id == "one"
    assert gateway.hosts == [f"localhost:{gateway.port}"]
    # `localhost` may have a second address, on which nobody listens here: it exists and does not answer.
    assert all(report is None for target, report in reports.items() if "127.0.0.1" not in target)


async def test_a_rotated_token_is_used_in_the_next_round(tmp_path: Path) -> None:
    gateway = Gateway("second")
    token = tmp_path / "token"
    token.write_text("first")
    async with gateway.serving():
        poller = GatewayPoller((gateway.url,), token, discard)
        target = f"http://127.0.0.1:{gateway.port}"
        assert (await poll(poller))[target] is None
        token.write_text("second")
        assert (await poll(poller))[target] is not None


async def test_details_are_asked_of_all_services_first_and_then_of_one_part_after_the_other(tmp_path: Path) -> None:
    gateway = Gateway("t")
    (tmp_path / "token").write_text("t")
    edges = Buckets(input_tokens=[1], output_tokens=[1])
    gateway.report = DemandReport(
        instance_id="one",
        services=[
            ServiceDemand(namespace="team", service=f"s{n}", buckets=edges, arrived=[0], completed=[0])
            for n in range(2 * DETAILED_SERVICES + 1)
        ],
    ).to_wire()
    asked: list[Part] = []

    def hear(reports: Mapping[str, DemandReport | None], detail: Part, now_s: float) -> None:
        asked.append(detail)
        if len(asked) == 5:
            raise EOFError

    async with gateway.serving():
        poller = GatewayPoller((gateway.url,), tmp_path / "token", hear, interval_s=0.0)
        with pytest.raises(EOFError):
            await poller.run()
    assert asked == [Part(0, 1), Part(0, 3), Part(1, 3), Part(2, 3), Part(0, 3)]
    assert gateway.details == [str(part) for part in asked]


async def test_a_gateway_that_answers_nonsense_or_nothing_is_there_without_a_report(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    gateway = Gateway("t")
    async with gateway.serving():
        poller = GatewayPoller((gateway.url,), token, discard)
        target = f"http://127.0.0.1:{gateway.port}"
        gateway.report = {"services": 3}
        assert (await poll(poller))[target] is None
    assert (await poll(poller))[target] is None


async def test_a_name_that_does_not_resolve_any_more_keeps_its_addresses() -> None:
    poller = GatewayPoller(("http://no-such-host.invalid:1",), None, discard)
    assert await poll(poller) == {}
    poller._addresses["http://no-such-host.invalid:1"] = ["http://127.0.0.1:1"]
    assert await poll(poller) == {"http://127.0.0.1:1": None}
