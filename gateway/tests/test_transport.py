"""Requests and streams through a real data plane to a real (fake) engine: what passes, and what is counted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import (
    CHAT,
    PATIENCE_S,
    STREAM,
    Gateway,
    engine_at,
    events,
    eventually,
    gateway_for,
    post,
    spoken,
)
from gateway_testing.tables import table
from llmfleet.api import Buckets
from llmfleet.gateway.fleet import Fleet, Service
from llmfleet.gateway.keys import KeyRing
from llmfleet.gateway.transport import Limits

LABELS = {"namespace": "team", "service": "chat", "variant": "fast"}


def official(gateway: Gateway) -> openai.AsyncOpenAI:
    """OpenAI's client, without retries of its own."""
    return openai.AsyncOpenAI(base_url=f"{gateway.http.base_url}/v1", api_key="k", max_retries=0)


async def test_the_official_client_gets_an_answer() -> None:
    async with fake_engine(tokens=3) as engine, gateway_for(engine) as gateway, official(gateway) as client:
        answer = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        assert answer.choices[0].message.content == "tok tok tok "
        assert [model.id async for model in client.models.list()] == ["m"]


async def test_the_official_client_gets_a_stream() -> None:
    async with fake_engine(tokens=4) as engine, gateway_for(engine) as gateway, official(gateway) as client:
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["tok 0", "tok 1", "tok 2", "tok 3"]


async def test_the_official_client_sees_a_lost_engine_as_an_error() -> None:
    async with (
        fake_engine(tokens=9, die_after=2) as engine,
        gateway_for(engine) as gateway,
        official(gateway) as client,
    ):
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        seen = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match="answer is incomplete"):
            await anext(stream)
    assert seen == ["tok 0", "tok 1"]


@pytest.mark.parametrize("how", [{}, {"split_events": True}, {"coalesce": True}, {"chunked": False}])
async def test_a_stream_arrives_whole_however_the_engine_frames_it(how: dict[str, Any]) -> None:
    async with fake_engine(tokens=20, **how) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True)
    assert spoken(answer.text) == [f"tok {number}" for number in range(20)]
    assert events(answer.text)[-1] == "[DONE]"
    assert answer.headers["content-type"].startswith("text/event-stream")


async def test_tokens_pass_as_they_come() -> None:
    async with (
        fake_engine(tokens=3, hang_after=1) as engine,
        gateway_for(engine) as gateway,
        gateway.http.stream("POST", "/v1/chat/completions", json=STREAM) as answer,
    ):
        first = await anext(answer.aiter_text())
    assert spoken(first) == ["tok 0"]


async def test_usage_is_asked_for_and_taken_out_again() -> None:
    async with fake_engine(tokens=6) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True)
        assert engine.requests[0].body["stream_options"] == {"include_usage": True}
        assert "usage" not in answer.text
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="completion") == 6
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="prompt") == 3
        assert gateway.metric("llmfleet_gateway_time_to_first_token_seconds_count", **LABELS) == 1
        assert gateway.metric("llmfleet_gateway_time_per_output_token_seconds_count", **LABELS) == 1


async def test_usage_that_the_client_asked_for_stays() -> None:
    async with fake_engine(tokens=6) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert events(answer.text)[-2]["usage"]["completion_tokens"] == 6


async def test_other_stream_options_are_kept() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat(stream=True, stream_options={"include_usage": False, "other": 1})
        assert engine.requests[0].body["stream_options"] == {"include_usage": True, "other": 1}
    assert "usage" not in answer.text


async def test_an_engine_that_tells_no_usage_is_counted_by_events() -> None:
    async with fake_engine(tokens=7, usage=False) as engine, gateway_for(engine) as gateway:
        await gateway.chat(stream=True)
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="completion") == 7


async def test_the_body_reaches_the_engine_as_the_client_wrote_it() -> None:
    body = b'{ "model" : "m",\n "messages": [{"role":"user","content":"\\u00e9 \xc3\xa9"}], "x_unknown": 1.50 }\n'
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        await gateway.http.post("/v1/chat/completions", content=body)
        assert engine.requests[0].raw == body


async def test_demand_is_counted_by_real_size() -> None:
    buckets = Buckets(input_tokens=[2, 100], output_tokens=[4, 100])
    async with fake_engine(tokens=6) as engine, gateway_for(engine, routing=table(buckets=buckets)) as gateway:
        await gateway.chat(stream=True)
        await gateway.chat()
        demand = gateway.demand()
    assert sum(demand.arrived) == 2
    assert demand.completed == [0, 0, 0, 2]
    assert (demand.waiting, demand.running) == (0, 0)


async def test_connections_to_engines_are_used_again() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        for _ in range(3):
            await gateway.chat()
            await gateway.chat(stream=True)
        assert len(engine.requests) == 6
        assert engine.connections == 1


@pytest.mark.parametrize("how", [{"close_after": True}, {"stale": True}])
async def test_a_connection_that_the_engine_has_closed_is_replaced_silently(how: dict[str, Any]) -> None:
    async with fake_engine(**how) as engine, gateway_for(engine) as gateway:
        for _ in range(3):
            assert (await gateway.chat()).status_code == 200
        assert engine.connections == 3
        assert gateway.metric("llmfleet_gateway_engine_failures_total", **LABELS) == 0


async def test_the_same_client_connection_serves_request_after_request() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        reader, writer = await gateway.raw(post(CHAT) + post(STREAM) + post(CHAT, "connection: close"))
        text = (await asyncio.wait_for(reader.read(), PATIENCE_S)).decode()
        writer.close()
        assert text.count("HTTP/1.1 200 OK") == 3
        assert text.count("[DONE]") == 1
        assert text.endswith("}")


async def test_an_http_1_0_client_gets_a_stream_that_ends_with_the_connection() -> None:
    async with fake_engine(tokens=3) as engine, gateway_for(engine) as gateway:
        reader, writer = await gateway.raw(post(STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = (await asyncio.wait_for(reader.read(), PATIENCE_S)).decode().partition("\r\n\r\n")
        writer.close()
    assert "transfer-encoding" not in head
    assert spoken(body) == ["tok 0", "tok 1", "tok 2"]


async def test_a_client_that_expects_100_continue_is_told_to() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        head, _, body = post(CHAT, "expect: 100-continue", "connection: close").partition(b"\r\n\r\n")
        reader, writer = await gateway.raw(head + b"\r\n\r\n")
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert b"200 OK" in await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


async def test_a_large_answer_passes_through() -> None:
    async with fake_engine(tokens=1000, token_text="x" * 3000) as engine, gateway_for(engine) as gateway:
        answer = await gateway.chat()
    assert len(answer.json()["choices"][0]["message"]["content"]) == 3_000_000


async def test_credentials_and_hop_by_hop_headers_do_not_reach_the_engine() -> None:
    headers = {
        "authorization": "Bearer secret",
        "x-api-key": "secret",
        "cookie": "a=secret",
        "connection": "x-private",
        "x-private": "secret",
        "te": "trailers",
        "accept-encoding": "gzip",
        "x-kept": "yes",
    }
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        answer = await gateway.http.post("/v1/chat/completions", json=CHAT, headers=headers)
        seen = engine.requests[0].headers
    assert seen["x-kept"] == "yes"
    assert seen["host"] == f"127.0.0.1:{engine.port}"
    assert "secret" not in json.dumps(seen)
    assert not seen.keys() & {"authorization", "te", "x-private", "accept-encoding", "connection"}
    assert "server" not in answer.headers


async def test_a_clients_request_id_is_echoed_and_engines_get_one_that_nobody_can_guess() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        headers = {"x-request-id": "abc-1"}
        answers = [await gateway.http.post("/v1/chat/completions", json=CHAT, headers=headers) for _ in range(2)]
        made = await gateway.chat()
        assert [answer.headers["x-request-id"] for answer in answers] == ["abc-1", "abc-1"]
        assert len(made.headers["x-request-id"]) == 32
        sent = {request.headers["x-request-id"] for request in engine.requests}
        assert len(sent) == 3
        assert all(len(one) == 32 for one in sent)
        assert not sent & {"abc-1", made.headers["x-request-id"]}


async def test_models_are_those_that_the_key_opens() -> None:
    async with fake_engine() as engine, gateway_for() as gateway:
        running = (engine_at(engine),)
        gateway.plane.update(
            Fleet(
                [
                    Service(table(service="open", served_name="open"), running),
                    Service(table(service="mine", served_name="mine"), running, KeyRing([b"key-1"])),
                    Service(table(service="theirs", served_name="theirs"), running, KeyRing([b"key-2"])),
                ]
            )
        )
        listed = await gateway.http.get("/v1/models", headers={"authorization": "Bearer key-1"})
        assert [model["id"] for model in listed.json()["data"]] == ["mine", "open"]
        anonymous = await gateway.http.get("/v1/models")
        assert [model["id"] for model in anonymous.json()["data"]] == ["open"]


async def test_one_name_in_two_namespaces_is_told_apart_by_the_key() -> None:
    async with fake_engine() as ours, fake_engine() as theirs, gateway_for() as gateway:
        gateway.plane.update(
            Fleet(
                [
                    Service(table(namespace="a"), (engine_at(theirs),), KeyRing([b"their-key"])),
                    Service(table(namespace="b"), (engine_at(ours),), KeyRing([b"our-key"])),
                ]
            )
        )
        answer = await gateway.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer our-key"})
        assert answer.status_code == 200
        assert (len(ours.requests), len(theirs.requests)) == (1, 0)


async def test_an_open_service_takes_no_name_from_one_with_keys() -> None:
    async with fake_engine() as ours, fake_engine() as intruder, gateway_for() as gateway:
        gateway.plane.update(
            Fleet(
                [
                    Service(table(namespace="a"), (engine_at(intruder),)),
                    Service(table(namespace="b"), (engine_at(ours),), KeyRing([b"our-key"])),
                ]
            )
        )
        await gateway.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer our-key"})
        assert (len(ours.requests), len(intruder.requests)) == (1, 0)


async def test_requests_wait_for_an_engine_and_are_served_when_it_comes() -> None:
    async with fake_engine() as engine, gateway_for() as gateway:
        asked = [asyncio.ensure_future(gateway.chat()) for _ in range(3)]
        await eventually(lambda: gateway.plane.demand().services != [] and gateway.demand().waiting == 3)
        assert sum(gateway.demand().arrived) == 3
        gateway.serve([engine])
        assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200, 200, 200]
        assert gateway.demand().waiting == 0


async def test_the_split_follows_the_table_on_the_wire() -> None:
    async with fake_engine() as fast, fake_engine() as slow, gateway_for() as gateway:
        gateway.plane.update(
            Fleet([Service(table({"fast": 0.75, "slow": 0.25}), (engine_at(fast), engine_at(slow, "slow")))])
        )
        for _ in range(20):
            await gateway.chat()
        assert (len(fast.requests), len(slow.requests)) == (15, 5)


async def test_draining_finishes_running_streams_and_takes_no_new_ones() -> None:
    async with fake_engine(tokens=10, interval_s=0.03) as engine, gateway_for(engine) as gateway:
        running = asyncio.ensure_future(gateway.chat(stream=True))
        await eventually(lambda: gateway.plane.demand().services != [] and gateway.demand().running == 1)
        drain = asyncio.ensure_future(gateway.plane.drain(10.0))
        await asyncio.sleep(0.05)
        assert not gateway.plane.ready()
        with pytest.raises(OSError, match=r".*"):
            await asyncio.open_connection("127.0.0.1", gateway.port)
        assert len(spoken((await running).text)) == 10
        await asyncio.wait_for(drain, PATIENCE_S)


async def test_draining_ends_what_does_not_finish() -> None:
    async with fake_engine(tokens=9, hang_after=1) as engine, gateway_for(engine) as gateway:
        reader, writer = await gateway.raw(post(STREAM))
        await reader.readuntil(b"tok 0")
        await asyncio.wait_for(gateway.plane.drain(0.1), PATIENCE_S)
        await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()
        await asyncio.wait_for(engine.requests[0].aborted.wait(), PATIENCE_S)


async def test_an_idle_client_connection_is_closed() -> None:
    async with fake_engine() as engine, gateway_for(engine, limits=Limits(client_idle_s=0.05)) as gateway:
        reader, writer = await gateway.raw(b"")
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
        writer.close()


async def test_a_client_is_idle_from_its_answer_on_however_late_the_requests_own_deadline_was() -> None:
    async with fake_engine() as engine, gateway_for(engine, limits=Limits(client_idle_s=0.2)) as gateway:
        reader, writer = await gateway.raw(post(CHAT))
        await reader.readuntil(b"\r\n\r\n")
        assert b"tok" in await asyncio.wait_for(reader.read(), PATIENCE_S)
        writer.close()


async def test_an_answer_that_takes_longer_than_a_client_may_be_idle_is_waited_for() -> None:
    limits = Limits(client_idle_s=0.05)
    async with fake_engine(tokens=4, interval_s=0.1) as engine, gateway_for(engine, limits=limits) as gateway:
        assert len(spoken((await gateway.chat(stream=True)).text)) == 4
