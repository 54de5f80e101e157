"""A data plane on a free port, in front of fake engines."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from gateway_testing.fake_engine import FakeEngine
from gateway_testing.tables import table
from llmfleet.api import RoutingTable, ServiceDemand
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.keys import KeyRing
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.policy import Router
from llmfleet.gateway.transport import AsyncioDataPlane, Limits

PATIENCE_S = 30.0
"""How long a test waits for something that should happen at once."""
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "one two three"}]}
STREAM: dict[str, Any] = CHAT | {"stream": True}


def engine_at(fake: FakeEngine, variant: str = "fast") -> Engine:
    """The engine as discovery would describe it."""
    return Engine(id=f"uid-{fake.port}", host="127.0.0.1", port=fake.port, variant=variant)


@dataclass
class Gateway:
    """A running data plane and a client for it."""

    plane: AsyncioDataPlane
    port: int
    http: httpx.AsyncClient
    metrics: GatewayMetrics

    def serve(
        self, fakes: Sequence[FakeEngine], *, routing: RoutingTable | None = None, keys: KeyRing | None = None
    ) -> None:
        """Pushes a fleet of one service."""
        self.plane.update(Fleet([Service(routing or table(), tuple(map(engine_at, fakes)), keys)]))

    async def chat(self, **changes: Any) -> httpx.Response:
        """One chat completion, read to its end."""
        return await self.http.post("/v1/chat/completions", json=CHAT | changes)

    async def raw(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of its own that has sent `request`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        await writer.drain()
        return reader, writer

    def demand(self) -> ServiceDemand:
        """Demand of the only service."""
        [demand] = self.plane.demand().services
        return demand

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value, 0 where there is none."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def gateway_for(
    *fakes: FakeEngine,
    routing: RoutingTable | None = None,
    keys: KeyRing | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[Gateway]:
    """A data plane that serves model `m` with these engines."""
    metrics = GatewayMetrics()
    plane = AsyncioDataPlane(Router(time.monotonic, "test"), limits or Limits(), metrics)
    port = await plane.start("127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as http:
        gateway = Gateway(plane, port, http, metrics)
        gateway.serve(fakes, routing=routing, keys=keys)
        try:
            yield gateway
        finally:
            await plane.drain(0.0)
            await asyncio.sleep(0)


def post(body: dict[str, Any] | bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    """A request as bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(raw)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + raw


def events(text: str) -> list[Any]:
    """The data of a stream's events, JSON decoded, `[DONE]` as it is."""
    payloads = [block.removeprefix("data: ") for block in text.split("\n\n") if block]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def spoken(text: str) -> list[str]:
    """The tokens of a streamed chat completion."""
    chunks = [event for event in events(text) if event != "[DONE]" and event.get("choices")]
    return [chunk["choices"][0]["delta"]["content"] for chunk in chunks]


async def eventually(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Waits until something is so. Raises TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            so = condition()
            if so if isinstance(so, bool) else await so:
                return
            await asyncio.sleep(0.01)
