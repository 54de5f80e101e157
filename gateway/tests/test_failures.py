"""Engines that fail, clients that leave or stall, requests that make no sense: an answer, and never a hang."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from gateway_testing.fake_engine import FakeEngine, fake_engine
from gateway_testing.harness import CHAT, PATIENCE_S, STREAM, Gateway, events, eventually, gateway_for, post, spoken
from gateway_testing.tables import table
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.keys import KeyRing
from llmfleet.gateway.transport import Limits

LABELS = {"namespace": "team", "service": "chat", "variant": "fast"}
MIB = 1024 * 1024


def error_of(text: str) -> dict[str, Any]:
    """The error of an answer, which has exactly OpenAI's fields."""
    document = json.loads(text)
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# Requests that are refused


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"model":"\xff"}', "not valid JSON"),
        (b"[1]", "must be a JSON object, got list"),
        (b'{"messages":[]}', "model must be the name of a model, got null"),
        (b'{"model":7}', "model must be the name of a model, got 7"),
        (b'{"model":"m","stream":"yes"}', 'stream must be true or false, got "yes"'),
        (b'{"model":"m","stream":true,"stream_options":3}', "stream_options must be an object, got 3"),
    ],
)
async def test_a_malformed_body_is_refused_by_name(body: bytes, named: str) -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        answer = await gateway.http.post("/v1/chat/completions", content=body)
        assert answer.status_code == 400
        assert named in error_of(answer.text)["message"]
        assert engine.requests == []
        assert gateway.plane.demand().services == []


async def test_an_unknown_model_is_refused() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(model="other")
        assert answer.status_code == 404
        assert error_of(answer.text)["code"] == "model_not_found"


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic right", "right"])
async def test_a_wrong_key_is_refused(header: str | None) -> None:
    async with fake_engine() as engine, gateway_for(engine, keys=KeyRing([b"right"])) as gateway:
        headers = {} if header is None else {"authorization": header}
        for path in ("/v1/chat/completions", "/v1/completions"):
            answer = await gateway.http.post(path, json=CHAT, headers=headers)
            assert answer.status_code == 401
            assert error_of(answer.text)["code"] == "invalid_api_key"
        assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 401
        assert engine.requests == []
        assert gateway.plane.demand().services == []
        right = await gateway.http.post("/v1/completions", json=CHAT, headers={"authorization": "Bearer right"})
        assert right.status_code == 200


async def test_a_service_whose_secret_is_missing_lets_nobody_in() -> None:
    async with fake_engine() as engine, gateway_for(engine, keys=KeyRing([])) as gateway:
        for header in ("Bearer x", "Bearer", ""):
            answer = await gateway.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": header})
            assert answer.status_code == 401


async def test_bodies_of_all_requests_are_bounded_and_let_go_however_requests_end() -> None:
    limits = Limits(all_bodies_bytes=100_000, queue_wait_s=PATIENCE_S)
    large = CHAT | {"padding": "x" * 60_000}
    async with fake_engine() as engine, gateway_for(limits=limits) as gateway:
        held = asyncio.ensure_future(gateway.http.post("/v1/chat/completions", json=large))
        await eventually(lambda: gateway.metric("llmfleet_gateway_request_body_bytes") > 60_000)
        over = await gateway.http.post("/v1/chat/completions", json=large)
        assert (over.status_code, over.json()["error"]["code"]) == (503, "too_much_at_once")
        assert over.headers["retry-after"] == "1"
        await eventually(lambda: 0 < gateway.metric("llmfleet_gateway_request_body_bytes") < 100_000)
        held.cancel()
        await eventually(lambda: gateway.metric("llmfleet_gateway_request_body_bytes") == 0)
        gateway.serve([engine])
        for _ in range(3):
            assert (await gateway.http.post("/v1/chat/completions", json=large)).status_code == 200
        assert gateway.metric("llmfleet_gateway_request_body_bytes") == 0


@pytest.mark.parametrize("framing", ["content-length", "chunked"])
async def test_an_oversized_body_is_refused_while_it_comes(framing: str) -> None:
    body = b'{"model":"m","x":"' + b"x" * 400_000 + b'"}'

    async def pieces() -> Any:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    async with fake_engine() as engine, gateway_for(engine, limits=Limits(body_bytes=100_000)) as gateway:
        content = body if framing == "content-length" else pieces()
        answer = await gateway.http.post("/v1/chat/completions", content=content)
        assert answer.status_code == 413
        assert "100000 bytes" in error_of(answer.text)["message"]
        assert engine.requests == []


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /v1/chat/completions HTTP/1.1\r\n\r\n", 405),
        (b"DELETE /v1/models HTTP/1.1\r\n\r\n", 405),
        (b"what is this\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000, 431),
        (post(CHAT, "transfer-encoding: chunked"), 400),
        (post(CHAT, "upgrade: h2c", "connection: upgrade"), 400),
    ],
)
async def test_what_is_no_request_for_this_gateway_is_refused(request_bytes: bytes, status: int) -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        reader, writer = await gateway.raw(request_bytes)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        assert head.startswith(b"HTTP/1.1 %d " % status)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        error_of((await reader.readexactly(length)).decode())
        writer.close()
        assert engine.requests == []


async def test_an_engines_own_refusal_reaches_the_client() -> None:
    async with fake_engine(status=400) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True)
        assert answer.status_code == 400
        assert answer.json()["message"] == "status 400"
        assert len(engine.requests) == 1
        assert sum(gateway.demand().completed) == 0


# Engines that fail before the first byte


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "fault", [{"reset": True}, {"status": 503}, {"status": 502}, {"garbage": True}, {"die_after": 0}]
)
async def test_a_failure_before_the_first_byte_is_invisible(fault: dict[str, Any], stream: bool) -> None:
    async with fake_engine(**fault) as broken, fake_engine() as works, gateway_for(broken, works) as gateway:
        for _ in range(4):
            answer = await gateway.chat(stream=stream)
            assert answer.status_code == 200
            assert "tok" in answer.text
        # On a slow machine the ejection may be over before the last request.
        assert gateway.metric("llmfleet_gateway_engine_failures_total", **LABELS) == len(broken.requests) >= 1
        assert len(works.requests) == 4


async def test_an_engine_that_does_not_listen_is_avoided() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        async with fake_engine() as works, gateway_for(works) as gateway:
            refusing = Engine("refusing", "127.0.0.1", taken.getsockname()[1], "fast")
            working = Engine("working", "127.0.0.1", works.port, "fast")
            gateway.plane.update(Fleet([Service(table(replicas={"fast": 2}), (refusing, working))]))
            answers = await asyncio.gather(*(gateway.chat() for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}


async def test_an_engine_that_hangs_is_left_for_another() -> None:
    limits = Limits(first_byte_s=0.5)
    async with fake_engine(hang=True) as hangs, fake_engine() as works:
        async with gateway_for(hangs, works, limits=limits) as gateway:
            assert (await gateway.chat(stream=True)).status_code == 200
        await asyncio.wait_for(hangs.requests[0].aborted.wait(), PATIENCE_S)


async def test_engines_that_all_hang_end_in_a_timeout() -> None:
    async with fake_engine(hang=True) as first, fake_engine(hang=True) as second:
        async with gateway_for(first, second, limits=Limits(first_byte_s=0.1)) as gateway:
            answer = await gateway.chat(stream=True)
        assert answer.status_code == 504
        assert error_of(answer.text)["code"] == "engine_timeout"


async def test_a_request_that_kills_engines_is_not_tried_on_all_of_them() -> None:
    fakes = [FakeEngine() for _ in range(4)]
    for fake in fakes:
        fake.behave(reset=True)
        await fake.start()
    try:
        async with gateway_for(*fakes) as gateway:
            answer = await gateway.chat()
        assert answer.status_code == 502
        assert error_of(answer.text)["code"] == "engine_failed"
        assert sum(len(fake.requests) for fake in fakes) == 2
    finally:
        for fake in fakes:
            await fake.stop()


async def test_a_500_is_the_requests_fault_and_ejects_nobody() -> None:
    async with fake_engine(status=500) as engine, gateway_for(engine) as gateway:
        assert (await gateway.chat()).status_code == 500
        engine.behave()
        assert (await gateway.chat()).status_code == 200
        assert gateway.metric("llmfleet_gateway_engine_failures_total", **LABELS) == 0


async def test_the_only_engine_recovers_and_serves_who_has_waited() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        engine.behave_next(status=503)
        answers = await asyncio.gather(*(gateway.chat() for _ in range(3)))
        assert {answer.status_code for answer in answers} == {200}


async def test_a_request_waits_until_the_only_engine_may_be_tried_again() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        engine.behave_next(status=503)
        assert (await gateway.chat()).status_code == 200
        assert len(engine.requests) == 2


async def test_no_engine_in_time_is_a_503_with_retry_after() -> None:
    async with gateway_for(limits=Limits(queue_wait_s=0.05)) as gateway:
        answer = await gateway.chat()
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0
        assert error_of(answer.text)["code"] == "no_engine_available"
        demand = gateway.demand()
        assert (sum(demand.arrived), demand.waiting) == (1, 0)


async def test_the_queue_is_bounded() -> None:
    async with gateway_for(limits=Limits(queue_wait_s=0.3, queue_length=2)) as gateway:
        answers = await asyncio.gather(*(gateway.chat() for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [429, 429, 429, 503, 503]
    assert all(answer.headers["retry-after"] for answer in answers)


async def test_a_service_that_vanishes_refuses_who_waits_for_it() -> None:
    async with gateway_for() as gateway:
        asked = asyncio.ensure_future(gateway.chat())
        await eventually(lambda: bool(gateway.plane.demand().services))
        gateway.plane.update(Fleet())
        assert (await asked).status_code == 404


# Engines that fail in mid-stream


@pytest.mark.parametrize(
    "fault", [{"die_after": 3}, {"hang_after": 3}, {"leave_after": 3}, {"leave_after": 3, "chunked": False}]
)
async def test_an_engine_lost_in_mid_stream_becomes_the_last_event(fault: dict[str, Any]) -> None:
    async with fake_engine(tokens=9, **fault) as engine, gateway_for(engine, limits=Limits(idle_s=0.2)) as gateway:
        answer = await gateway.chat(stream=True)
        assert spoken(answer.text) == ["tok 0", "tok 1", "tok 2"]
        assert error_of(json.dumps(events(answer.text)[-1]))["code"] == "engine_lost"
        assert "[DONE]" not in answer.text
        demand = gateway.demand()
        assert (sum(demand.completed), demand.running) == (0, 0)
        await eventually(lambda: engine.requests[0].aborted.is_set() or not engine.requests[0].finished)


async def test_a_client_never_sees_half_an_event() -> None:
    async with fake_engine(tokens=9, split_events=True, die_after=3) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True)
    assert spoken(answer.text) == ["tok 0", "tok 1", "tok 2"]
    assert events(answer.text)[-1]["error"]["code"] == "engine_lost"


async def test_a_large_answer_that_breaks_off_is_not_passed_off_as_whole() -> None:
    async with fake_engine(tokens=2000, token_text="x" * 3000, die_after=0) as engine, gateway_for(engine) as gateway:
        reader, writer = await gateway.raw(post(CHAT))
        text = await asyncio.wait_for(_read_until_lost(reader), PATIENCE_S)
        writer.close()
    assert text.startswith(b"HTTP/1.1 200 OK")
    assert not text.endswith(b"0\r\n\r\n")


async def _read_until_lost(reader: asyncio.StreamReader) -> bytes:
    text = b""
    try:
        while data := await reader.read(65536):
            text += data
    except ConnectionError:
        pass
    return text


# Clients


@pytest.mark.parametrize("how", [{"tokens": 100, "hang_after": 2}, {"hang": True}])
async def test_a_client_that_leaves_stops_its_engine(how: dict[str, Any]) -> None:
    async with fake_engine(**how) as engine, gateway_for(engine) as gateway:
        _, writer = await gateway.raw(post(STREAM))
        await eventually(lambda: bool(engine.requests))
        await asyncio.sleep(0.02)
        writer.close()
        await asyncio.wait_for(engine.requests[0].aborted.wait(), PATIENCE_S)
        await eventually(lambda: gateway.demand().running == 0)
        assert gateway.metric("llmfleet_gateway_requests_total", **LABELS, outcome="client_gone") == 1


async def test_a_client_that_leaves_while_it_waits_is_no_demand_any_more() -> None:
    async with gateway_for() as gateway:
        _, writer = await gateway.raw(post(CHAT))
        await eventually(lambda: bool(gateway.plane.demand().services) and gateway.demand().waiting == 1)
        writer.close()
        await eventually(lambda: gateway.demand().waiting == 0)


async def test_a_client_that_does_not_read_is_not_buffered_for_and_slows_nobody() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        engine.behave_next(tokens=2000, token_text="x" * 50_000)  # 100 MB
        loop = asyncio.get_running_loop()
        stalled = await _stalled_client(gateway)
        await eventually(lambda: bool(engine.requests) and engine.requests[0].written_bytes > MIB)
        answers = await asyncio.gather(*(gateway.chat(stream=True) for _ in range(10)))
        assert all(len(spoken(answer.text)) == 5 for answer in answers)
        await asyncio.sleep(0.5)
        written = engine.requests[0].written_bytes
        assert written < 24 * MIB
        assert not engine.requests[0].finished
        # It reads again, and gets everything.
        received = 0
        while received < 100_000_000:
            received += len(await asyncio.wait_for(loop.sock_recv(stalled, MIB), PATIENCE_S))
        await eventually(lambda: engine.requests[0].finished)
        stalled.close()


async def test_a_client_that_never_reads_again_is_given_up() -> None:
    limits = Limits(idle_s=0.3)
    async with (
        fake_engine(tokens=2000, token_text="x" * 50_000) as engine,
        gateway_for(engine, limits=limits) as gateway,
    ):
        with await _stalled_client(gateway):
            await eventually(lambda: bool(engine.requests) and engine.requests[0].aborted.is_set())
        assert gateway.metric("llmfleet_gateway_requests_total", **LABELS, outcome="client_stalled") == 1


async def test_a_client_that_reads_slowly_is_borne_with() -> None:
    async with (
        fake_engine(tokens=400, token_text="x" * 50_000) as engine,
        gateway_for(engine, limits=Limits(idle_s=1.0)) as gateway,
    ):
        with await _stalled_client(gateway) as slow:
            loop = asyncio.get_running_loop()
            for _ in range(25):
                await asyncio.sleep(0.1)
                assert await asyncio.wait_for(loop.sock_recv(slow, 50_000), PATIENCE_S)
            assert not engine.requests[0].aborted.is_set()
            assert gateway.demand().running == 1


async def _stalled_client(gateway: Gateway) -> socket.socket:
    """A client that has asked for a stream and does not read it."""
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    stalled.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(stalled, ("127.0.0.1", gateway.port))
    await loop.sock_sendall(stalled, post(STREAM))
    return stalled
