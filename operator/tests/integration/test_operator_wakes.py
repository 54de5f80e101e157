"""From zero and back, with a real gateway: a waiting request is demand, and demand is only told to whom it is due."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.operator.launch import open_url
from e2e.operator.objects import gpu_type, policy, profile, service
from e2e.operator.rig import Gateway, Rig

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]

WINDOW_S = 4
REFUSED = 'llmfleet_gateway_admin_refused_requests_total{code="invalid_admin_token"}'
SILENT = 'llmfleet_operator_gateways{answered="false"}'


class WaitingRequest:
    """A completion that was sent, and whose answer nobody has read yet."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    @property
    def answered(self) -> bool:
        """Whether a byte of an answer, or the connection's end, has come."""
        return bool(select.select([self._connection.sock], [], [], 0)[0])


@contextlib.contextmanager
def request(gateway: Gateway, model: str) -> Iterator[WaitingRequest]:
    """A request in flight; the client leaves at the end of the context."""
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=10)
    body = json.dumps({"model": model, "prompt": "Is anybody there?", "max_tokens": 8})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    try:
        yield WaitingRequest(connection)
    finally:
        connection.close()


def models(gateway: Gateway) -> set[str]:
    with open_url(f"{gateway.url}/v1/models") as answer:
        return {model["id"] for model in json.load(answer)["data"]}


def engines(rig: Rig, team: str) -> int:
    return sum(rig.replicas(team).values())


def test_a_waiting_request_wakes_a_service_and_without_demand_it_goes_back_to_zero(
    rig: Rig, team: str, tmp_path: Path
) -> None:
    operators_token = tmp_path / "token"
    operators_token.write_text("not the gateway's")
    with rig.gateway() as gateway, rig.operator(gateway=gateway, token_file=operators_token) as operator:
        rig.apply(
            policy(demandWindowSeconds=WINDOW_S, replanIntervalSeconds=1),
            gpu_type("slow", "example.com/slow", 0.6),
            profile(team, {"slow": 2.5}),
            service(team, "chat", 0, traffic={"mode": "observe"}),
        )
        rig.wait_ready(team, "chat")
        assert rig.condition(team, "chat", "Ready")["reason"] == "ScaledToZero"
        assert engines(rig, team) == 0
        rig.wait("the gateway knows the service", lambda: "chat" in models(gateway))

        with request(gateway, "chat") as waiting:
            waits = f'llmfleet_gateway_waiting_requests{{namespace="{team}",service="chat"}}'
            rig.wait("the request waits", lambda: gateway.metrics().get(waits) == 1)
            refused = gateway.metrics()[REFUSED]
            rig.wait("a wrong token is refused again", lambda: gateway.metrics()[REFUSED] > refused)
            assert operator.metrics()[SILENT] == 1
            said = operator.said("no demand from a gateway")
            assert said is not None
            assert "401" in said["cause"]
            assert engines(rig, team) == 0, "demand that nobody may read"

            operators_token.write_text(gateway.token_file.read_text())
            rig.wait("the service has an engine", lambda: engines(rig, team) == 1)
            rig.wait("it says so", lambda: rig.condition(team, "chat", "Ready").get("reason") == "Ready")
            assert operator.metrics()[SILENT] == 0
            # kwok's pods say that they are Ready and answer nobody.
            assert not waiting.answered

        rig.wait("the engine is gone", lambda: engines(rig, team) == 0)
        rig.wait("it says so", lambda: rig.condition(team, "chat", "Ready").get("reason") == "ScaledToZero")
