"""The gateway as a process: settings that cannot work, the admin port, and the end on SIGTERM."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import textwrap
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import PATIENCE_S, STREAM, eventually
from llmfleet.api import DemandReport
from llmfleet.gateway.main import gateway
from llmfleet.gateway.settings import GatewaySettings, SettingsError
from llmfleet.gateway.transport import Limits, listening_socket


def settings(*engines: str, **changes: Any) -> GatewaySettings:
    """Settings for free ports of the loopback."""
    base: dict[str, Any] = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "engines": engines, "drain_s": 1.0}
    return GatewaySettings(**base | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"listen": "8080"}, "listen must be HOST:PORT"),
        ({"listen": "a:70000"}, "got 'a:70000'"),
        ({"admin_listen": "127.0.0.1"}, "admin-listen must be HOST:PORT"),
        ({"drain_s": -1}, "drain must be 0 or more"),
        ({"drain_s": math.nan}, "drain must be 0 or more"),
        ({"namespace": "x"}, "engines is for running without Kubernetes"),
        ({"engines": (), "routing_file": Path(__file__)}, "routing-file needs engines"),
        ({"admin_token_file": Path("/nowhere")}, "admin-token-file must be a readable file, got /nowhere"),
        ({"admin_token_file": Path(os.devnull)}, "admin-token-file must be a readable file"),
        ({"limits": Limits(idle_s=0)}, "limits.idle_s must be positive and finite, got 0"),
        ({"limits": Limits(queue_wait_s=math.inf)}, "limits.queue_wait_s must be positive and finite, got inf"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        settings("http://a", **changes)
    assert named in str(refusal.value)


async def test_without_engines_and_without_a_cluster_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    with pytest.raises(SettingsError, match="no Kubernetes to read the fleet from"):
        async with gateway(settings()):
            pass


def test_an_empty_admin_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    with pytest.raises(SettingsError, match="must hold a token"):
        settings("http://a", admin_token_file=tmp_path / "token")


async def test_an_address_that_is_taken_is_an_error_that_names_it() -> None:
    async with gateway(settings("http://127.0.0.1:1")) as first:
        taken = f"127.0.0.1:{first.api_port}"
        with pytest.raises(OSError, match=f"cannot listen on {taken}"):
            async with gateway(settings("http://127.0.0.1:1", listen=taken)):
                pass


async def test_a_host_that_does_not_exist_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match=r"cannot listen on 256\.1\.1\.1:8080: "):
        listening_socket("256.1.1.1", 8080)


async def test_demand_is_told_to_whoever_has_the_token_of_the_moment(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    async with (
        fake_engine() as engine,
        gateway(settings(engine.url, admin_token_file=token)) as gate,
        httpx.AsyncClient(timeout=PATIENCE_S) as http,
    ):
        await http.post(f"http://127.0.0.1:{gate.api_port}/v1/chat/completions", json=STREAM)
        url = f"http://127.0.0.1:{gate.admin_port}/v1/demand"

        async def ask(bearer: str | None) -> httpx.Response:
            return await http.get(url, headers={"authorization": f"Bearer {bearer}"} if bearer else {})

        report = DemandReport.model_validate((await ask("old")).json())
        assert sum(report.services[0].arrived) == sum(report.services[0].completed) == 1
        again = DemandReport.model_validate((await ask("old")).json())
        assert again.instance_id == report.instance_id
        for wrong in ("new", None, "ol", "oldd"):
            assert (await ask(wrong)).status_code == 401
        token.write_text("new\n")
        assert (await ask("old")).status_code == 401
        assert (await ask("new")).status_code == 200
        token.unlink()
        assert (await ask("new")).status_code == 401
        token.write_text("")
        assert (await ask("new")).status_code == 401
        assert (await http.get(url, headers={"authorization": "Bearer"})).status_code == 401
        figures = (await http.get(f"http://127.0.0.1:{gate.admin_port}/metrics")).text
        assert 'llmfleet_gateway_admin_refused_requests_total{code="invalid_admin_token"} 8.0' in figures


async def test_without_a_token_file_nobody_reads_the_demand() -> None:
    async with gateway(settings("http://127.0.0.1:1")) as gate, httpx.AsyncClient() as http:
        answer = await http.get(f"http://127.0.0.1:{gate.admin_port}/v1/demand", headers={"authorization": "Bearer x"})
        assert answer.status_code == 403


async def test_metrics_and_health_ask_for_nothing() -> None:
    async with fake_engine() as engine, gateway(settings(engine.url)) as gate, httpx.AsyncClient() as http:
        await http.post(f"http://127.0.0.1:{gate.api_port}/v1/chat/completions", json=STREAM)
        admin = f"http://127.0.0.1:{gate.admin_port}"
        labels = 'namespace="static",outcome="200",service="static",variant="static"'
        assert f"llmfleet_gateway_requests_total{{{labels}}} 1.0" in (await http.get(f"{admin}/metrics")).text
        assert (await http.get(f"{admin}/healthz")).status_code == 200
        assert (await http.get(f"{admin}/readyz")).status_code == 200
        for path in ("/health", "/readyz"):
            assert (await http.get(f"http://127.0.0.1:{gate.api_port}{path}")).status_code == 200
        # The admin's answers are not to be had where clients are.
        assert (await http.get(f"http://127.0.0.1:{gate.api_port}/metrics")).status_code == 404


_PROGRAM = textwrap.dedent(
    """
    import sys
    from llmfleet.gateway.main import run
    from llmfleet.gateway.settings import GatewaySettings
    run(GatewaySettings(listen="127.0.0.1:0", admin_listen="127.0.0.1:0", engines=(sys.argv[1],), drain_s=10.0,
                        log_format="json"))
    """
)


async def test_sigterm_lets_streams_finish_and_ends_the_process() -> None:
    async with fake_engine(tokens=8, interval_s=0.05) as engine:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _PROGRAM, engine.url, stderr=asyncio.subprocess.PIPE
        )
        try:
            assert process.stderr is not None
            started = (await asyncio.wait_for(process.stderr.readline(), PATIENCE_S)).decode()
            port = int(started.partition("serving on port ")[2].partition(",")[0])
            async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
                stream = asyncio.ensure_future(http.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=STREAM))
                await eventually(lambda: bool(engine.requests))
                process.send_signal(signal.SIGTERM)
                assert "[DONE]" in (await stream).text
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_an_engine_is_drained_by_whoever_has_the_admin_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame")
    async with (
        fake_engine() as one,
        fake_engine() as other,
        gateway(settings(one.url, other.url, admin_token_file=tmp_path / "token")) as gate,
        httpx.AsyncClient(timeout=PATIENCE_S) as http,
    ):
        admin = f"http://127.0.0.1:{gate.admin_port}/v1/engines"
        bearer = {"authorization": "Bearer sesame"}

        async def used() -> set[int]:
            one.requests.clear()
            other.requests.clear()
            for _ in range(6):
                await http.post(f"http://127.0.0.1:{gate.api_port}/v1/chat/completions", json=STREAM)
            return {engine.port for engine in (one, other) if engine.requests}

        for method, path in (("GET", ""), ("POST", f"/{one.url}/drain"), ("DELETE", f"/{one.url}/drain")):
            assert (await http.request(method, admin + path)).status_code == 401
        answer = await http.post(f"{admin}/{one.url}/drain", headers=bearer)
        assert answer.status_code == 202
        assert answer.json()["leaving"] == {"reason": "asked", "until": None}
        assert await used() == {other.port}
        listed = (await http.get(admin, headers=bearer)).json()["engines"]
        assert {engine["id"]: engine["leaving"] is None for engine in listed} == {one.url: False, other.url: True}
        assert (await http.delete(f"{admin}/{one.url}/drain", headers=bearer)).json()["leaving"] is None
        assert await used() == {one.port, other.port}
        listed = (await http.get(f"{admin}/{one.url}/requests", headers=bearer)).json()
        assert listed == {"requests": []}
        unknown = await http.post(f"{admin}/http://ghost:1/drain", headers=bearer)
        assert unknown.status_code == 404
        assert "'http://ghost:1'" in unknown.json()["error"]["message"]


async def test_running_requests_are_shown_and_moved_to_whoever_has_the_admin_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("sesame")
    async with (
        fake_engine(tokens=2, hang_after=1) as engine,
        gateway(settings(engine.url, admin_token_file=tmp_path / "token")) as gate,
        httpx.AsyncClient(timeout=PATIENCE_S) as http,
    ):
        admin, bearer = f"http://127.0.0.1:{gate.admin_port}/v1", {"authorization": "Bearer sesame"}
        url = f"http://127.0.0.1:{gate.api_port}/v1/chat/completions"
        async with http.stream("POST", url, json=STREAM, headers={"x-request-id": "mine/1"}) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            for method, path in (("GET", f"engines/{engine.url}/requests"), ("POST", "requests/mine/1/migrate")):
                assert (await http.request(method, f"{admin}/{path}")).status_code == 401
            listed = await http.get(f"{admin}/engines/{engine.url}/requests", headers=bearer)
            [shown] = listed.json()["requests"]
            assert (shown["id"], shown["engine"], shown["streamed"]) == ("mine/1", engine.url, True)
            assert (shown["can_move"], shown["moving"]) == (False, False)
            # One engine, and without the plug-in.
            refused = await http.post(f"{admin}/requests/mine/1/migrate", headers=bearer)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "cannot_move")
            for path in ("requests/mine/2/migrate", "requests/mine/1/migrate?to=ghost"):
                absent = await http.post(f"{admin}/{path}", headers=bearer)
                assert (absent.status_code, absent.json()["error"]["code"]) == (404, "not_found")
        ghost = await http.get(f"{admin}/engines/ghost/requests", headers=bearer)
        assert (ghost.status_code, ghost.json()["error"]["code"]) == (404, "engine_not_found")
