"""An OpenAI-compatible engine that misbehaves on demand: a raw asyncio server, so that every byte is under control.

A test sets `behaviour` (or a queue of behaviours for the next requests) and reads what happened: the requests as they
arrived, which connections they came on, how many bytes could be written, which requests were aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Behaviour:
    """How one request is answered."""

    tokens: int = 5
    delay_s: float = 0.0
    """Before the answer's head."""
    interval_s: float = 0.0
    """Between tokens."""
    status: int = 200
    die_after: int | None = None
    """Reset the connection after this many tokens, with `split_events` in the middle of the next; 0: after the head."""
    reset: bool = False
    """Reset the connection before anything is answered."""
    hang: bool = False
    """Read the request and never answer."""
    leave_after: int | None = None
    """Close the connection in good order after this many tokens."""
    hang_after: int | None = None
    """Go silent after this many tokens, connection open."""
    split_events: bool = False
    """Cut every event in the middle, with a pause between the halves."""
    chunked: bool = True
    """False: no framing, the body ends with the connection."""
    close_after: bool = False
    """Close the connection after the answer without having announced it."""
    stale: bool = False
    """Close the connection instead of answering a second request on it, as if it had just been idle for too long."""
    token_text: str = "tok "
    garbage: bool = False
    """Answer with something that is not HTTP."""
    coalesce: bool = False
    """All events in one write, one chunk each."""
    usage: bool = True
    """Tell the usage when asked."""


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    raw: bytes
    connection: int
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the connection ended before the answer was complete."""
    written_bytes: int = 0
    finished: bool = False


class FakeEngine:
    """One engine on a free port of the loopback."""

    def __init__(self) -> None:
        self.behaviour = Behaviour()
        self.next_behaviours: list[Behaviour] = []
        self.requests: list[Seen] = []
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(self, **changes: Any) -> None:
        """Every request from now on."""
        self.behaviour = replace(Behaviour(), **changes)

    def behave_next(self, **changes: Any) -> None:
        """One more request; those after it follow `behave`."""
        self.next_behaviours.append(replace(Behaviour(), **changes))

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port, limit=64 * 1024 * 1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        number = self.connections
        try:
            while await self._serve_one(number, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _serve_one(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        request_line, *lines = head.decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines if line)
        headers = {name.lower(): value for name, value in pairs}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(request_line.split(" ")[1], headers, json.loads(raw or b"{}"), raw, number)
        self.requests.append(seen)
        how = self.next_behaviours.pop(0) if self.next_behaviours else self.behaviour
        answer = asyncio.ensure_future(self._answer(seen, how, writer))
        watch = asyncio.ensure_future(reader.read(1))
        done, _ = await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
        if watch in done and answer not in done:
            seen.aborted.set()
            answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer
            return False
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await watch
        try:
            keep = answer.result()
        except ConnectionError:
            seen.aborted.set()
            return False
        return keep

    async def _answer(self, seen: Seen, how: Behaviour, writer: asyncio.StreamWriter) -> bool:
        """True if the connection may be used again."""
        await asyncio.sleep(how.delay_s)
        if how.stale and sum(other.connection == seen.connection for other in self.requests) > 1:
            return False
        if how.hang:
            await asyncio.Event().wait()
        if how.reset:
            return False
        if how.garbage:
            writer.write(b"this is not HTTP\r\n\r\n")
            await writer.drain()
            return False
        if how.status != 200:
            body = json.dumps({"object": "error", "message": f"status {how.status}", "code": how.status}).encode()
            await self._write(seen, writer, _head(how.status, "application/json", len(body)) + body)
        elif seen.path in _ON_CPU or seen.path == "/v1/embeddings":
            body = json.dumps(_ON_CPU.get(seen.path) or _embedding(seen)).encode()
            await self._write(seen, writer, _head(200, "application/json", len(body)) + body)
        elif seen.body.get("stream"):
            if not await self._stream(seen, how, writer):
                return False
        else:
            await self._whole(seen, how, writer)
        seen.finished = True
        return how.chunked and not how.close_after

    async def _whole(self, seen: Seen, how: Behaviour, writer: asyncio.StreamWriter) -> None:
        if seen.path == "/v1/responses":
            body = json.dumps(_response(seen, how, completed=True)).encode()
            await self._write(seen, writer, _head(200, "application/json", len(body)) + body)
            return
        text = how.token_text * how.tokens
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps(
            {
                "id": seen.headers.get("x-request-id", ""),
                "object": "chat.completion",
                "created": 1,
                "model": seen.body.get("model"),
                "choices": [choice],
                "usage": self._usage(seen, how),
            }
        ).encode()
        if how.die_after is not None:
            await self._write(seen, writer, _head(200, "application/json", len(body)) + body[: len(body) // 2])
            writer.transport.abort()
            raise ConnectionResetError
        await self._write(seen, writer, _head(200, "application/json", len(body)) + body)

    async def _stream(self, seen: Seen, how: Behaviour, writer: asyncio.StreamWriter) -> bool:
        def framed(event: bytes) -> bytes:
            return b"%x\r\n%b\r\n" % (len(event), event) if how.chunked else event

        await self._write(seen, writer, _head(200, "text/event-stream; charset=utf-8", None, chunked=how.chunked))
        batch = b""
        for index, event in enumerate(self._events(seen, how)):
            if how.die_after is not None and index >= how.die_after:
                if how.split_events:
                    await self._write(seen, writer, framed(event[: len(event) // 2]))
                await asyncio.sleep(0.02)
                writer.transport.abort()
                return False
            if how.leave_after is not None and index >= how.leave_after:
                writer.close()
                await writer.wait_closed()
                return False
            if how.hang_after is not None and index >= how.hang_after:
                await asyncio.Event().wait()
            if how.coalesce:
                batch += framed(event)
            elif how.split_events:
                middle = len(event) // 2
                await self._write(seen, writer, framed(event[:middle]))
                await asyncio.sleep(0.005)
                await self._write(seen, writer, framed(event[middle:]))
                await asyncio.sleep(0.005)
            else:
                await self._write(seen, writer, framed(event))
            if how.interval_s:
                await asyncio.sleep(how.interval_s)
        await self._write(seen, writer, batch + (b"0\r\n\r\n" if how.chunked else b""))
        return True

    def _events(self, seen: Seen, how: Behaviour) -> list[bytes]:
        if seen.path == "/v1/responses":
            return _response_events(seen, how)
        base = {"id": seen.headers.get("x-request-id", ""), "object": "chat.completion.chunk", "created": 1}
        base["model"] = str(seen.body.get("model"))
        choices: list[dict[str, Any]] = [
            {"index": 0, "delta": {"content": f"{how.token_text}{number}"}, "finish_reason": None}
            for number in range(how.tokens)
        ]
        if choices:
            choices[-1]["finish_reason"] = "stop"
        documents: list[dict[str, Any]] = [base | {"choices": [choice]} for choice in choices]
        if how.usage and (seen.body.get("stream_options") or {}).get("include_usage"):
            documents.append(base | {"choices": [], "usage": self._usage(seen, how)})
        lines = [json.dumps(document, separators=(",", ":")) for document in documents]
        return [f"data: {line}\n\n".encode() for line in (*lines, "[DONE]")]

    @staticmethod
    def _usage(seen: Seen, how: Behaviour) -> dict[str, int]:
        prompt = sum(len(str(m["content"]).split()) for m in seen.body.get("messages", []))
        return {"prompt_tokens": prompt, "completion_tokens": how.tokens, "total_tokens": prompt + how.tokens}

    @staticmethod
    async def _write(seen: Seen, writer: asyncio.StreamWriter, data: bytes) -> None:
        if data:
            writer.write(data)
            await writer.drain()
            seen.written_bytes += len(data)


_ON_CPU = {
    "/tokenize": {"count": 2, "max_model_len": 4096, "tokens": [1, 2], "token_strs": None},
    "/detokenize": {"prompt": "one two"},
}


def _embedding(seen: Seen) -> dict[str, Any]:
    given = seen.body["input"]
    inputs = given if isinstance(given, list) else [given]
    data = [{"index": n, "object": "embedding", "embedding": [0.5, float(n)]} for n in range(len(inputs))]
    usage = {"prompt_tokens": 3 * len(inputs), "total_tokens": 3 * len(inputs), "completion_tokens": 0}
    return {"id": "embd-1", "object": "list", "created": 1, "model": seen.body["model"], "data": data, "usage": usage}


def _response(seen: Seen, how: Behaviour, *, completed: bool) -> dict[str, Any]:
    content = {"type": "output_text", "text": how.token_text * how.tokens, "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [content]}
    used = {"input_tokens": 3, "output_tokens": how.tokens, "total_tokens": 3 + how.tokens}
    return {
        "id": "resp_" + seen.headers.get("x-request-id", ""),
        "object": "response",
        "created_at": 1,
        "model": seen.body["model"],
        "output": [message] if completed else [],
        "parallel_tool_calls": True,
        "status": "completed" if completed else "in_progress",
        "tool_choice": "auto",
        "tools": [],
        "usage": used if completed else None,
    }


def _response_events(seen: Seen, how: Behaviour) -> list[bytes]:
    """As vLLM has them: named, numbered, two before prefill, no [DONE] at the end."""
    begun = _response(seen, how, completed=False)
    where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    documents: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        *({"type": "response.output_text.delta", "delta": how.token_text, **where} for _ in range(how.tokens)),
        {"type": "response.completed", "response": _response(seen, how, completed=True)},
    ]
    lines = [json.dumps(document | {"sequence_number": n}) for n, document in enumerate(documents)]
    return [f"event: {d['type']}\ndata: {line}\n\n".encode() for d, line in zip(documents, lines, strict=True)]


def _head(status: int, content_type: str, length: int | None, chunked: bool = True) -> bytes:
    framing = f"content-length: {length}\r\n" if length is not None else "transfer-encoding: chunked\r\n"
    if length is None and not chunked:
        framing = "connection: close\r\n"
    return f"HTTP/1.1 {status} X\r\nserver: fake\r\ncontent-type: {content_type}\r\n{framing}\r\n".encode()


@contextlib.asynccontextmanager
async def fake_engine(**behaviour: Any) -> AsyncIterator[FakeEngine]:
    """A running engine."""
    engine = FakeEngine()
    engine.behave(**behaviour)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
