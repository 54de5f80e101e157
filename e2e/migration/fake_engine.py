"""An engine as its HTTP clients see it, with a migration's cut and hand-over at the command of a test.

It streams as vLLM does: one event per token, the role of a chat message with its first token, the usage last, and in
the Responses API events of the response itself before any token. Its answer is the same whichever engine gives it, so
that two of them can go on for each other. It misbehaves as vLLM does too: a cut looks like an answer that reached its
length, and what was held back for a stop string comes out then; what a resumed leg repeats comes in one delta; a
connection may break anywhere.

Real engines need half a minute to start, and cannot be made to break at a chosen byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from e2e.migration.answer import Api
from e2e.migration.leg import REQUEST_ID
from llmfleet.migration.ports import migration_of

TOKENS = 12
"""Of its answer."""
_INTERVAL_S = 0.001


class Broken(Exception):
    """The connection is to break."""


@dataclass
class Running:
    """A request. most: tokens that it may make, set by a cut. broken: its connection is to break. told: it began with
    so many. resumed: set when it is handed over."""

    api: Api
    body: Mapping[str, Any]
    most: int = TOKENS
    broken: bool = False
    gone: bool = False
    """Its client went away."""
    told: int = 0
    resumed: asyncio.Future[int] | None = None
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Something changed."""


class FakeEngine:
    """Answers `text`, a token a character, as far as `allow` lets it. held_back: characters that it keeps back."""

    def __init__(self, held_back: int = 0) -> None:
        self.text = "abcdefghijkl"
        self.held_back = held_back
        self.requests: dict[str, Running] = {}
        self.allowed = 0
        self.url = ""
        self._news = asyncio.Event()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeEngine]:
        """Serve on loopback."""
        app = web.Application()
        for api in Api:
            app.router.add_post(api, self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for one in self.requests.values():
                one.broken = True
                one.moved.set()
            await runner.cleanup()

    async def has(self, request: str) -> None:
        """Wait until it has a request, and a parked one waits."""
        while True:
            one = self.requests.get(request)
            if one is not None and (migration_of(request) is None or one.resumed is not None):
                return
            self._news.clear()
            await self._news.wait()

    async def has_any(self) -> None:
        """Wait until it has a request."""
        while not self.requests:
            self._news.clear()
            await self._news.wait()

    def allow(self, tokens: int) -> None:
        """Requests may have made so many tokens by now."""
        self.allowed = tokens
        for one in self.requests.values():
            one.moved.set()

    def cut(self, request: str, tokens: int) -> None:
        """The answer is cut after so many tokens."""
        self.requests[request].most = tokens
        self.requests[request].moved.set()

    def hand_over(self, request: str, tokens: int) -> None:
        """The parked request begins, so many tokens being delivered already."""
        resumed = self.requests[request].resumed
        assert resumed is not None
        resumed.set_result(tokens)

    def break_off(self, request: str) -> None:
        """The connection of this request breaks."""
        one = self.requests[request]
        one.broken = True
        if one.resumed is not None and not one.resumed.done():
            one.resumed.cancel()
        one.moved.set()

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        api, body = Api(http.path), await http.json()
        name = http.headers.get(REQUEST_ID) or body["request_id"]
        one = self.requests[name] = Running(api, body)
        self._news.set()
        if body.get("model") != "m":
            return web.json_response({"error": {"message": f"no model {body.get('model')}"}}, status=404)
        try:
            return await self._answer(http, name, one)
        except Broken:
            assert http.transport is not None
            http.transport.abort()
            raise
        except asyncio.CancelledError:
            one.gone = True
            raise

    async def _answer(self, http: web.Request, name: str, one: Running) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        streamed = bool(one.body.get("stream"))
        if streamed:
            await response.prepare(http)
            for event in _opening(one.api):
                await _write(response, event)
        if migration_of(name) is not None:
            one.resumed = asyncio.get_running_loop().create_future()
            self._news.set()
            try:
                one.told = await one.resumed
            except asyncio.CancelledError:
                if one.broken:
                    raise Broken from None
                raise
        begun, made, said, finished = one.told, 0, 0, False
        async for made in self._made(one):
            finished = made == min(one.most, TOKENS)
            upto = made if finished else max(said, made - self.held_back)
            new = range(0 if made == begun + 1 else made - 1, made)
            if streamed:
                for event in _deltas(one, self.text[said:upto], new, finished):
                    await _write(response, event)
            said = upto
        if not streamed:
            return web.json_response(_whole(one, self.text[:made], made))
        for event in _closing(one, self.text[:made], made, finished):
            await _write(response, event)
        return response

    async def _made(self, one: Running) -> AsyncIterator[int]:
        """How many tokens there are after each that is made."""
        made = one.told
        while made < min(one.most, TOKENS):
            while made >= self.allowed and made < one.most and not one.broken:
                one.moved.clear()
                await one.moved.wait()
            if one.broken:
                raise Broken
            if made < one.most:
                made += 1
                yield made
                await asyncio.sleep(_INTERVAL_S)


async def _write(response: web.StreamResponse, event: Any) -> None:
    data = event if isinstance(event, str) else json.dumps(event, separators=(",", ":"))
    await response.write(f"data: {data}\n\n".encode())


def _logprob(place: int) -> float:
    return -0.125 * (place + 1)


def _opening(api: Api) -> Iterator[Any]:
    if api is Api.RESPONSES:
        yield {"type": "response.created", "response": {"status": "in_progress"}}
        yield {"type": "response.in_progress", "response": {"status": "in_progress"}}


def _deltas(one: Running, text: str, tokens: range, finished: bool) -> Iterator[Any]:
    """Events of tokens that were made at once: one, or with the first of a resumed leg all that it repeats."""
    ids = [100 + place for place in tokens]
    values = [_logprob(place) for place in tokens]
    end = {"finish_reason": "length" if finished else None}
    match one.api:
        case Api.COMPLETIONS:
            logprobs = {"token_logprobs": values, "text_offset": list(tokens)}
            yield _chunk({"text": text, "logprobs": logprobs, "token_ids": ids, **end})
        case Api.CHAT:
            if tokens.start == 0:
                yield _chunk({"delta": {"role": "assistant", "content": ""}})
            logprobs = {"content": [{"logprob": value} for value in values]}
            delta: dict[str, Any] = {"content": text}
            if one.body.get("tools"):
                name: dict[str, Any] = (
                    {"id": f"call-{id(one)}", "function": {"name": "look"}} if tokens.start == 0 else {}
                )
                call = {"index": 0, **name}
                call["function"] = {**call.get("function", {}), "arguments": text}
                delta = {"tool_calls": [call]}
            yield _chunk({"delta": delta, "logprobs": logprobs, "token_ids": ids, **end})
        case Api.RESPONSES:
            if tokens.start == 0:
                yield {"type": "response.output_item.added", "output_index": 0, "item": {"id": f"msg-{id(one)}"}}
            place = {"output_index": 0, "content_index": 0, "item_id": f"msg-{id(one)}"}
            yield {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []}


def _closing(one: Running, text: str, made: int, finished: bool) -> Iterator[Any]:
    if one.api is Api.RESPONSES:
        yield {"type": "response.completed", "response": _whole(one, text, made)}
        return
    if not finished:
        yield _chunk({"text": "", "delta": {}, "finish_reason": "length"})
    yield {"choices": [], "usage": _usage(made)}
    yield "[DONE]"


def _whole(one: Running, text: str, made: int) -> dict[str, Any]:
    if one.api is Api.RESPONSES:
        content = [{"text": text, "logprobs": None}]
        output = [{"type": "message", "id": f"msg-{id(one)}", "content": content}]
        return {"status": "completed", "output": output, "usage": _usage(made)}
    values = [_logprob(place) for place in range(made)]
    ids = [100 + place for place in range(made)]
    choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "token_ids": ids}
    if one.api is Api.COMPLETIONS:
        choice |= {"text": text, "logprobs": {"token_logprobs": values, "text_offset": list(range(made))}}
    else:
        message: dict[str, Any] = {"content": text}
        if one.body.get("tools"):
            message = {"tool_calls": [{"function": {"name": "look", "arguments": text}}]}
        choice |= {"message": message, "logprobs": {"content": [{"logprob": value} for value in values]}}
    return {"choices": [choice], "usage": _usage(made)}


def _chunk(choice: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": None, **choice}]}


def _usage(made: int) -> dict[str, Any]:
    return {"completion_tokens": made, "prompt_tokens_details": {"cached_tokens": made}}
