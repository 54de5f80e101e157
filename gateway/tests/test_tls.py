"""TLS to clients: who has no ingress for it, and what happens when the certificate is renewed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import CHAT, PATIENCE_S, Gateway, eventually
from llmfleet.gateway.main import gateway as gateway_process
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.policy import Router
from llmfleet.gateway.settings import GatewaySettings, SettingsError
from llmfleet.gateway.transport import AsyncioDataPlane, Certificate, Limits, TlsError


def certify(folder: Path, name: str = "gateway") -> tuple[Path, Path]:
    """A fresh certificate for 127.0.0.1, and its key."""
    chain, key = folder / "tls.crt", folder / "tls.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", chain],
        check=True, capture_output=True,
    )  # fmt: skip
    return chain, key


def trusting(chain: Path) -> ssl.SSLContext:
    """What a client needs to believe this certificate."""
    return ssl.create_default_context(cafile=chain)


@contextlib.asynccontextmanager
async def tls_gateway(
    folder: Path, *fakes: object, limits: Limits | None = None
) -> AsyncIterator[tuple[Gateway, Certificate]]:
    """A data plane that speaks TLS, and its certificate."""
    certificate = Certificate(*certify(folder))
    metrics = GatewayMetrics()
    plane = AsyncioDataPlane(Router(time.monotonic, "test"), limits or Limits(), metrics)
    port = await plane.start("127.0.0.1", 0, certificate.context)
    client = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{port}", timeout=PATIENCE_S, verify=trusting(folder / "tls.crt")
    )
    async with client:
        gateway = Gateway(plane, port, client, metrics)
        gateway.serve(fakes)  # type: ignore[arg-type]
        try:
            yield gateway, certificate
        finally:
            async with asyncio.timeout(PATIENCE_S):
                await plane.drain(PATIENCE_S)


async def served_name(gateway: Gateway, trusted: ssl.SSLContext) -> str:
    """The subject of the certificate that a new connection gets."""
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, ssl=trusted)
    try:
        subject = writer.get_extra_info("peercert")["subject"]
        return str(dict(field[0] for field in subject)["commonName"])
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_the_official_client_gets_answers_and_streams_over_tls(tmp_path: Path) -> None:
    async with fake_engine(tokens=3) as engine, tls_gateway(tmp_path, engine) as (gateway, _):
        transport = openai.DefaultAsyncHttpxClient(verify=trusting(tmp_path / "tls.crt"))
        client = openai.AsyncOpenAI(base_url=f"{gateway.http.base_url}/v1", api_key="k", http_client=transport)
        whole = await client.chat.completions.create(model="m", messages=CHAT["messages"])
        assert whole.choices[0].message.content == "tok tok tok "
        stream = await client.chat.completions.create(model="m", messages=CHAT["messages"], stream=True)
        pieces = [event.choices[0].delta.content or "" async for event in stream if event.choices]
        assert "".join(pieces) == "tok 0tok 1tok 2"
        await client.close()


async def test_only_http_1_1_and_no_old_tls_is_agreed_on(tmp_path: Path) -> None:
    async with tls_gateway(tmp_path) as (gateway, _):
        trusted = trusting(tmp_path / "tls.crt")
        trusted.set_alpn_protocols(["h2", "http/1.1"])
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, ssl=trusted)
        spoken = writer.get_extra_info("ssl_object")
        assert spoken.selected_alpn_protocol() == "http/1.1"
        assert spoken.version() in ("TLSv1.2", "TLSv1.3")
        writer.close()


async def test_a_renewed_certificate_is_served_and_open_connections_live_on(tmp_path: Path) -> None:
    async with fake_engine(tokens=1) as engine, tls_gateway(tmp_path, engine) as (gateway, certificate):
        assert await served_name(gateway, trusting(tmp_path / "tls.crt")) == "gateway"
        assert (await gateway.chat()).status_code == 200
        assert not certificate.renew()
        certify(tmp_path, "renewed")
        assert certificate.renew()
        assert await served_name(gateway, trusting(tmp_path / "tls.crt")) == "renewed"
        # The client trusts the old certificate only: it is answered on the connection that it has.
        assert (await gateway.chat()).status_code == 200


async def test_files_that_do_not_belong_together_leave_the_last_certificate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llmfleet.gateway")
    async with tls_gateway(tmp_path) as (gateway, certificate):
        trusted = trusting(tmp_path / "tls.crt")
        (tmp_path / "other").mkdir()
        chain, key = certify(tmp_path / "other", "renewed")
        watching = asyncio.create_task(certificate.watch(0.01))
        (tmp_path / "tls.crt").write_bytes(chain.read_bytes())
        await eventually(lambda: "the last certificate stays in force" in caplog.text)
        assert await served_name(gateway, trusted) == "gateway"
        (tmp_path / "tls.key").write_bytes(key.read_bytes())
        await eventually(lambda: "new connections get the certificate" in caplog.text)
        assert await served_name(gateway, trusting(chain)) == "renewed"
        assert caplog.text.count("stays in force") <= 2, "said once per defect, not with every look"
        watching.cancel()


async def test_whoever_fails_the_handshake_is_no_connection(tmp_path: Path) -> None:
    async with fake_engine() as engine, tls_gateway(tmp_path, engine, limits=Limits(connections=1)) as (gateway, _):
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
        assert (await gateway.chat()).status_code == 200
        assert gateway.metric("llmfleet_gateway_client_connections") == 1


async def test_a_request_that_is_refused_halfway_is_told_why(tmp_path: Path) -> None:
    async with tls_gateway(tmp_path) as (gateway, _):
        trusted = trusting(tmp_path / "tls.crt")
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, ssl=trusted)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n{")
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert head.startswith(b"HTTP/1.1 413 ")
        assert json.loads(await reader.readexactly(length))["error"]["code"] == "request_too_large"
        writer.close()


def test_what_is_no_certificate_is_refused_by_name(tmp_path: Path) -> None:
    chain, key = certify(tmp_path)
    with pytest.raises(TlsError, match="No such file"):
        Certificate(tmp_path / "nowhere.crt", key)
    with pytest.raises(TlsError, match="tls-cert and tls-key must be a PEM certificate chain and its unencrypted key"):
        Certificate(key, chain)
    subprocess.run(
        ["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:x", "-out", tmp_path / "locked"], check=True
    )
    with pytest.raises(TlsError, match="the key is encrypted"):
        Certificate(chain, tmp_path / "locked")


async def test_the_process_serves_tls_and_refuses_half_of_it(tmp_path: Path) -> None:
    chain, key = certify(tmp_path)
    base = {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0", "engines": ("http://127.0.0.1:1",), "drain_s": 0.0}
    with pytest.raises(SettingsError, match="tls-cert needs tls-key"):
        GatewaySettings(**base, tls_cert=chain)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="tls-key needs tls-cert"):
        GatewaySettings(**base, tls_key=key)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="No such file"):
        async with gateway_process(GatewaySettings(**base, tls_cert=tmp_path / "no", tls_key=key)):  # type: ignore[arg-type]
            pass
    settings = GatewaySettings(**base, tls_cert=chain, tls_key=key)  # type: ignore[arg-type]
    async with gateway_process(settings) as running, httpx.AsyncClient(verify=trusting(chain)) as client:
        assert (await client.get(f"https://127.0.0.1:{running.api_port}/health")).json() == {"status": "ok"}
