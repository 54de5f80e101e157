"""What else than chat an engine is asked for, and what of a request does not reach it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_testing.fake_engine import fake_engine
from gateway_testing.harness import CHAT, Gateway, eventually, gateway_for
from llmfleet.gateway.policy import replicas
from llmfleet.gateway.transport.body import LONGEST_TOKEN_BYTES, Api, Completion, parse_completion
from llmfleet.gateway.transport.errors import ApiError
from llmfleet.gateway.transport.sse import says_nothing_yet

LABELS = {"namespace": "team", "service": "chat", "variant": "fast"}
TTFT = "llmfleet_gateway_time_to_first_token_seconds"


def official(gateway: Gateway) -> openai.AsyncOpenAI:
    """OpenAI's client, without retries of its own."""
    return openai.AsyncOpenAI(base_url=f"{gateway.http.base_url}/v1", api_key="k", max_retries=0)


async def test_the_official_client_gets_a_response() -> None:
    async with fake_engine(tokens=3) as engine, gateway_for(engine) as gateway, official(gateway) as client:
        answer = await client.responses.create(model="m", input="one two", max_output_tokens=9)
        assert answer.output_text == "tok tok tok "
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="prompt") == 3
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="completion") == 3


async def test_the_official_client_gets_a_response_as_a_stream_with_every_event() -> None:
    async with fake_engine(tokens=4) as engine, gateway_for(engine) as gateway, official(gateway) as client:
        stream = await client.responses.create(model="m", input=[{"role": "user", "content": "hi"}], stream=True)
        seen = [event.type async for event in stream]
        deltas = ["response.output_text.delta"] * 4
        assert seen == ["response.created", "response.in_progress", *deltas, "response.completed"]
        assert "stream_options" not in engine.requests[0].body
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="completion") == 4


async def test_the_first_token_of_a_response_is_not_the_event_that_says_it_was_created() -> None:
    async with fake_engine(tokens=2, interval_s=0.15) as engine, gateway_for(engine) as gateway:
        await gateway.http.post("/v1/responses", json={"model": "m", "input": "hi", "stream": True})
        assert gateway.metric(f"{TTFT}_sum", **LABELS) >= 0.3


async def test_a_response_whose_engine_dies_before_the_first_token_comes_from_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So that the ejection outlasts the second request however busy the machine is.
    monkeypatch.setattr(replicas, "EJECTION_FIRST_S", replicas.EJECTION_LONGEST_S)
    async with (
        fake_engine(tokens=2, die_after=2) as dying,
        fake_engine(tokens=2) as healthy,
        gateway_for(dying, healthy) as gateway,
        official(gateway) as client,
    ):
        for _ in range(2):
            stream = await client.responses.create(model="m", input="hi", stream=True)
            assert [event.type async for event in stream].count("response.created") == 1
        assert (len(dying.requests), len(healthy.requests)) == (1, 2)


async def test_a_response_that_continues_one_which_nobody_holds_is_refused_by_name() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway, official(gateway) as client:
        with pytest.raises(openai.NotFoundError, match=r'no response "resp_7"') as refusal:
            await client.responses.create(model="m", input="and then?", previous_response_id="resp_7")
        assert (refusal.value.param, refusal.value.code) == ("previous_response_id", "previous_response_not_found")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_7")
        assert engine.requests == []


async def test_the_official_client_gets_embeddings() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway, official(gateway) as client:
        answer = await client.embeddings.create(model="m", input=["one", "two"], encoding_format="float")
        assert [item.embedding for item in answer.data] == [[0.5, 0.0], [0.5, 1.0]]
        assert gateway.metric("llmfleet_gateway_tokens_total", **LABELS, kind="prompt") == 6
        assert gateway.demand().completed == [1, 0, 0, 0]


async def test_tokenizing_works_and_is_not_demand() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        there = await gateway.http.post("/tokenize", json={"model": "m", "prompt": "one two"})
        back = await gateway.http.post("/detokenize", json={"model": "m", "tokens": [1, 2]})
        assert (there.json()["tokens"], back.json()["prompt"]) == ([1, 2], "one two")
        assert [seen.path for seen in engine.requests] == ["/tokenize", "/detokenize"]
        assert gateway.plane.demand().services == []


async def test_tokenizing_waits_for_an_engine_and_is_seen_to() -> None:
    async with fake_engine() as engine, gateway_for() as gateway:
        asked = asyncio.ensure_future(gateway.http.post("/tokenize", json={"model": "m", "prompt": "one"}))
        await eventually(lambda: gateway.plane.demand().services != [])
        assert (gateway.demand().waiting, sum(gateway.demand().arrived)) == (1, 0)
        gateway.serve([engine])
        assert (await asked).status_code == 200


async def test_orders_that_only_an_owner_gives_do_not_reach_the_engine() -> None:
    headers = {"x-llmfleet-anything": "1", "x-vllm-priority": "-9", "x-data-parallel-rank": "3", "x-session-id": "s"}
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        for stream in (False, True):
            body = CHAT | {"kv_transfer_params": {"do_remote_prefill": True}, "vllm_xargs": {"a": 1}, "stream": stream}
            await gateway.http.post("/v1/chat/completions", json=body, headers=headers)
        for seen in engine.requests:
            assert b"kv_transfer" not in seen.raw
            assert seen.body["vllm_xargs"] == {"a": 1}
            assert seen.headers.keys() & headers.keys() == {"x-session-id"}
        assert engine.requests[1].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    "spelt",
    [
        b'{"model":"m","kv_transfer_params":{"a":1},"kv_transfer_params":{"b":2}}',
        b'{"model":"m","kv\\u005ftransfer_params":{"a":1}}',
        b'{"kv_transfer_params":null,"model":"m"}',
    ],
)
def test_kv_transfer_params_are_stripped_however_they_are_spelt(spelt: bytes) -> None:
    assert json.loads(parse_completion(spelt).body) == {"model": "m"}


async def test_a_prompt_that_cannot_fit_is_refused_before_an_engine_sees_it() -> None:
    context = 4096  # of the harness's table
    async with fake_engine() as engine, gateway_for(engine) as gateway:

        async def ask(path: str, body: dict[str, Any]) -> httpx.Response:
            return await gateway.http.post(path, json={"model": "m"} | body)

        fits, long = "x" * context * LONGEST_TOKEN_BYTES, "x" * (context + 1) * LONGEST_TOKEN_BYTES
        refused: tuple[tuple[str, dict[str, Any], str], ...] = (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
            ("/v1/completions", {"prompt": ["a", long]}, "prompt"),
            ("/v1/completions", {"prompt": [7] * (context + 1)}, "prompt"),
            ("/v1/completions", {"prompt": [[7], [7] * (context + 1)]}, "prompt"),
            ("/v1/responses", {"input": [{"role": "user", "content": long}]}, "input"),
        )
        for path, body, param in refused:
            refusal = await ask(path, body)
            error = refusal.json()["error"]
            assert (refusal.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
            assert str(context + 1) in error["message"]
            assert str(context) in error["message"]
        assert engine.requests == []
        served: tuple[tuple[str, dict[str, Any]], ...] = (
            ("/v1/completions", {"prompt": [fits, fits]}),
            ("/v1/completions", {"prompt": [[7] * context] * 2}),
            ("/v1/completions", {"prompt": long, "truncate_prompt_tokens": 9}),
            ("/v1/responses", {"input": long, "truncation": "auto"}),
            ("/v1/embeddings", {"input": long}),
        )
        for path, body in served:
            assert (await ask(path, body)).status_code == 200


async def test_what_has_no_stream_says_so() -> None:
    async with fake_engine() as engine, gateway_for(engine) as gateway:
        refusal = await gateway.http.post("/v1/embeddings", json={"model": "m", "input": "x", "stream": True})
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "stream")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_FIELDS = st.sampled_from(
    [
        "model",
        "messages",
        "prompt",
        "input",
        "instructions",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "max_output_tokens",
        "previous_response_id",
        "kv_transfer_params",
        "truncation",
        "truncate_prompt_tokens",
        "service_tier",
        "priority",
    ]
)


def read(raw: bytes, api: Api) -> Completion | ApiError:
    try:
        return parse_completion(raw, api)
    except ApiError as error:
        return error


@given(st.dictionaries(_FIELDS, _JSON, max_size=8), st.sampled_from(Api), st.booleans())
def test_any_json_is_read_or_refused_by_name(document: dict[str, Any], api: Api, named: bool) -> None:
    if named:
        document["model"] = "m"
    result = read(json.dumps(document).encode(), api)
    if isinstance(result, ApiError):
        assert result.status in (400, 404)
        assert result.message
        return
    sent = json.loads(result.body)
    document.pop("kv_transfer_params", None)
    if result.strip_usage:
        assert sent["stream_options"]["include_usage"] is True
        document["stream_options"] = sent["stream_options"]
    # Not `==`: NaN is not itself.
    assert json.dumps(sent) == json.dumps(document)


@given(st.binary(max_size=64), st.sampled_from(Api))
def test_any_bytes_are_read_or_refused(raw: bytes, api: Api) -> None:
    result = read(raw, api)
    assert isinstance(result, Completion) or result.status == 400


@given(st.integers(0, 60), st.integers(0, 3), st.binary(max_size=3) | st.sampled_from([rb"\ud800", b"NaN", b"[" * 900]))
def test_json_is_what_the_standard_library_takes_for_it(at: int, without: int, put: bytes) -> None:
    whole = b'{"model":"m","prompt":"h\\u00e9\\ud83d\\ude00 x","n":1,"t":-1.5e-3,"s":[true,null]}'
    raw = whole[:at] + put + whole[at + without :]
    try:
        is_object = isinstance(json.loads(raw.decode()), dict)
    except (ValueError, RecursionError):
        is_object = False
    result = read(raw, Api.COMPLETIONS)
    assert (isinstance(result, ApiError) and result.code == "invalid_json") is not is_object


@pytest.mark.parametrize(
    ("events", "so"),
    [
        (b'event: response.created\ndata: {"a":"event: x"}\n\n', True),
        (b"event: response.created\ndata: {}\n\nevent: response.in_progress\r\ndata: {}\r\n\r\n", True),
        (b"event: response.created\ndata: {}\n\nevent: response.output_item.added\ndata: {}\n\n", False),
        (b"event: response.created.more\ndata: {}\n\n", False),
        (b'data: {"choices":[]}\n\n', False),
    ],
)
def test_events_before_prefill_are_known_by_their_names(events: bytes, so: bool) -> None:
    assert says_nothing_yet(events) is so
