"""What a hostile client tries: smuggled requests, injected headers and events, bytes that never end, any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import CHAT, PATIENCE_S, STREAM, events, eventually, gateway_for, post
from llmfleet.gateway.transport import Limits

BODY = json.dumps(CHAT).encode()
HIDDEN = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"


def headed(*lines: bytes, body: bytes = BODY) -> bytes:
    """A request whose framing headers are the test's own."""
    return b"\r\n".join((b"POST /v1/chat/completions HTTP/1.1", b"host: x", *lines)) + b"\r\n\r\n" + body


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@pytest.mark.parametrize(
    "smuggled",
    [
        headed(b"content-length: %d" % len(BODY), b"transfer-encoding: chunked", body=chunked(BODY) + HIDDEN),
        headed(b"transfer-encoding: chunked", b"content-length: 6", body=chunked(b"") + HIDDEN),
        headed(
            b"content-length: %d" % len(BODY), b"content-length: %d" % (len(BODY) + len(HIDDEN)), body=BODY + HIDDEN
        ),
        headed(b"content-length: %d, %d" % (len(BODY), len(BODY) + 9), body=BODY + HIDDEN),
        headed(b"content-length: +%d" % len(BODY)),
        headed(b"content-length: -1"),
        headed(b"content-length: 0x40"),
        headed(b"content-length : %d" % len(BODY)),
        headed(b"transfer-encoding: chunked, identity", body=chunked(BODY)),
        headed(b"transfer-encoding: xchunked", body=chunked(BODY)),
        headed(b"transfer-encoding : chunked", body=chunked(BODY)),
        headed(b"transfer-encoding: \x0bchunked", body=chunked(BODY)),
        headed(b"transfer-encoding: chunked", body=b"%x;\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
        headed(b"transfer-encoding: chunked", body=b"%x\r\n%bX\r\n0\r\n\r\n" % (len(BODY), BODY)),
        headed(b"transfer-encoding: chunked", body=b"fffffffffffffffff\r\n" + BODY),
        headed(b"x-folded: a", b" content-length: 3", b"content-length: %d" % len(BODY)),
        headed(b"content-length: %d" % len(BODY)).replace(b"host: x\r\n", b"host: x\n"),
        headed(b"x-cut: a\rcontent-length: 3", b"content-length: %d" % len(BODY)),
        headed(b"x-nul: a\x00b", b"content-length: %d" % len(BODY)),
        headed(b"x bad: a", b"content-length: %d" % len(BODY)),
    ],
)
async def test_framing_that_two_servers_could_read_differently_is_refused(smuggled: bytes) -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        reader, writer = await gateway.raw(smuggled)
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert engine.requests == []


async def test_chunks_of_a_client_reach_the_engine_as_one_body_with_a_length() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        cut = b"3\r\n%b\r\n%x\r\n%b\r\n0\r\nx-trailer: 1\r\n\r\n" % (BODY[:3], len(BODY) - 3, BODY[3:])
        reader, writer = await gateway.raw(headed(b"transfer-encoding: chunked", b"connection: close", body=cut))
        assert b"200 OK" in await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        [seen] = engine.requests
        assert (seen.raw, seen.headers["content-length"]) == (BODY, str(len(BODY)))
        assert not seen.headers.keys() & {"transfer-encoding", "x-trailer"}


@pytest.mark.parametrize("name", [b"x-request-id", b"x-kept"])
async def test_a_header_brings_no_other_with_it(name: bytes) -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        for value in (b"a\tx-injected: 1", b"a%0d%0ax-injected: 1", b"\xc3\xa9\x80", b"a" * 200):
            request = headed(name + b": " + value, b"content-length: %d" % len(BODY), b"connection: close")
            reader, writer = await gateway.raw(request)
            answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
            writer.close()
            head = answer.partition(b"\r\n\r\n")[0]
            names = [line.partition(b":")[0] for line in head.split(b"\r\n")[1:]]
            assert names.count(b"x-request-id") == 1
            assert b"x-injected" not in names
        assert not any("x-injected" in seen.headers for seen in engine.requests)


async def test_what_a_client_sends_cannot_end_or_add_an_event() -> None:
    evil = "x\n\ndata: [DONE]\n\ndata: {}"
    async with fake_engine(tokens=3, die_after=1) as engine, gateway_for(engine) as gateway:
        unknown = await gateway.chat(model=evil, stream=True)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        broken = await gateway.http.post("/v1/chat/completions", json=STREAM, headers={"x-request-id": "a-[DONE]"})
        told = events(broken.text)
        assert len(told) == 2
        assert told[1]["error"]["code"] == "engine_lost"
    async with fake_engine(tokens=2, token_text=evil) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True)
        assert [event["choices"][0]["delta"]["content"][: len(evil)] for event in events(answer.text)[:-1]] == [
            evil
        ] * 2


@pytest.mark.parametrize("part", ["head", "body"])
async def test_a_request_that_dribbles_in_is_ended_though_bytes_keep_coming(part: str) -> None:
    request = post(CHAT)
    begin = 10 if part == "head" else request.index(b"\r\n\r\n") + 6
    async with fake_engine() as engine, gateway_for(engine, limits=Limits(client_idle_s=0.15)) as gateway:
        reader, writer = await gateway.raw(request[:begin])
        closed = asyncio.ensure_future(reader.read())
        with contextlib.suppress(ConnectionError):
            for byte in request[begin : begin + 40]:
                if closed.done():
                    break
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
        assert closed.done()
        writer.close()
        assert engine.requests == []


async def test_a_connection_too_many_is_told_so_and_closed() -> None:
    async with fake_engine() as engine, gateway_for(engine, limits=Limits(connections=2)) as gateway:
        idle = [await gateway.raw(b"") for _ in range(2)]
        reader, writer = await gateway.raw(post(CHAT))
        answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"too_many_connections" in answer
        for _, one in (*idle, (reader, writer)):
            one.close()
        await eventually(lambda: gateway.metric("llmfleet_gateway_client_connections") == 0)
        assert (await gateway.chat()).status_code == 200
        assert len(engine.requests) == 1


async def _survives(raw: bytes) -> list[dict[str, Any]]:
    """Sends bytes, waits for an end, and asks properly afterwards. Gives what the event loop complained about."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    async with fake_engine() as engine, gateway_for(engine, limits=Limits(client_idle_s=0.05)) as gateway:
        reader, writer = await gateway.raw(raw)
        with contextlib.suppress(ConnectionError):
            writer.write_eof()
            await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        assert (await gateway.chat()).status_code == 200
        assert all(seen.raw in raw for seen in engine.requests[:-1]), "nothing that was not sent"
    return complaints


_PIECES = st.sampled_from(
    [
        *(b"POST ", b"GET ", b"/v1/chat/completions", b"/v1/models", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2.0", b"\r\n"),
        *(b"\n", b"\r", b"\r\n\r\n", b"host: x", b"content-length: 5", b"content-length: 99999999999999999999", b"{}"),
        *(b"transfer-encoding: chunked", b"0\r\n\r\n", b"5\r\nabcde\r\n", b"connection: upgrade", b"upgrade: h2c"),
        *(b"expect: 100-continue", b"authorization: Bearer ", b"x-llmfleet-deadline-ms: 5", b"\x00", b"\xff" * 5, BODY),
        *(post(CHAT), post(STREAM), post(b'{"model":"m","stream":true}'), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(_PIECES | st.binary(max_size=6), min_size=1, max_size=12).map(b"".join))
def test_no_bytes_crash_or_hang_the_gateway(raw: bytes) -> None:
    assert asyncio.run(asyncio.wait_for(_survives(raw), PATIENCE_S)) == []
