"""One request against an engine that misbehaves in ways a healthy vLLM cannot be made to.

What a healthy one does is tested against a real one in e2e/tests/test_engine_server.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llmfleet.api import Buckets
from llmfleet.cli.profiling import ProfileSettings, profile_engine
from llmfleet.cli.profiling.engine import MeasuredEngine
from llmfleet.cli.refused import RefusedError

TOKEN = {"choices": [{"index": 0, "text": "x"}]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}}


@asynccontextmanager
async def answering(body: str, status: str = "200 OK") -> AsyncIterator[str]:
    """A server on loopback with one answer for every request; yields its address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def stream(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


async def complete(body: str, status: str = "200 OK") -> None:
    async with answering(body, status) as url, MeasuredEngine(url, api_key="sesame") as engine:
        request = await engine.complete("tiny", [1, 2, 3], 2)
        assert request.started_s < request.first_token_s <= request.finished_s


async def test_a_stream_of_the_right_size_is_accepted() -> None:
    await complete(stream(TOKEN, TOKEN, usage(3, 2)))


@pytest.mark.parametrize(
    ("counted", "message"),
    [((4, 2), "counted 4 input and 2 output tokens"), ((3, 1), "counted 3 input and 1 output tokens")],
)
async def test_other_sizes_than_asked_for_are_refused(counted: tuple[int, int], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        await complete(stream(TOKEN, TOKEN, usage(*counted)))


async def test_an_error_inside_a_stream_is_refused_with_its_text() -> None:
    with pytest.raises(RefusedError, match=r"broke off an answer: .*engine is dead"):
        await complete(stream(TOKEN, {"error": {"message": "engine is dead", "code": 500}}))


async def test_a_stream_without_usage_is_refused() -> None:
    with pytest.raises(RefusedError, match="without tokens or without their number"):
        await complete(stream(TOKEN, TOKEN))


async def test_an_error_answer_is_refused_with_status_and_text_but_without_the_key() -> None:
    with pytest.raises(RefusedError, match="POST /v1/completions with 401: no such key") as refused:
        await complete("no such key", status="401 Unauthorized")
    assert "sesame" not in str(refused.value)


async def test_nobody_listening_is_refused() -> None:
    async with answering("") as url:
        pass
    settings = ProfileSettings(url, "l4", Buckets(input_tokens=[8], output_tokens=[8]))
    with pytest.raises(RefusedError, match=f"{url} does not answer"):
        await profile_engine(settings, progress=lambda line: None)


@pytest.mark.parametrize(
    ("served", "wanted", "message"),
    [
        (["a", "b"], None, "serves 2 models, say which: a, b"),
        (["a", "b"], "c", "does not serve 'c'; it serves a, b"),
    ],
)
async def test_the_model_must_be_clear(served: list[str], wanted: str | None, message: str) -> None:
    async with (
        answering(json.dumps({"data": [{"id": name} for name in served]})) as url,
        MeasuredEngine(url, api_key=None) as engine,
    ):
        with pytest.raises(RefusedError, match=message):
            await engine.served_model(wanted)


async def test_a_bucket_beyond_the_context_is_refused_before_anything_is_measured() -> None:
    async with answering(json.dumps({"data": [{"id": "tiny", "max_model_len": 100}]})) as url:
        settings = ProfileSettings(url, "l4", Buckets(input_tokens=[64], output_tokens=[8, 64]))
        with pytest.raises(RefusedError, match=r"64 input and 64 output tokens, 128 together; .* holds 100"):
            await profile_engine(settings, progress=lambda line: None)
