"""Asks engines how busy they are, and tells the policy.

    Fleet --update--> one task per engine: ask, wait, ask ... --EngineReport--> Router.report

An engine with the migration plug-in is asked over its control port; another, and one whose control port is silent, by
vLLM's own metrics over HTTP. Every wait is drawn between half of the interval and one and a half of it, so that neither
gateways nor engines fall into step; the interval grows with the number of engines, so that all of them together cost
this process a bounded share of its time. An engine that does not answer is asked less and less often. Nothing depends
on an answer: without reports the policy goes by what this gateway itself has sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
from collections.abc import Callable
from typing import Protocol

from llmfleet.api.migration_messages import Capabilities, EngineCapabilities, GetLoad, Load
from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.policy import EngineReport
from llmfleet.migration.control import ControlConnection
from llmfleet.migration.ports import NoAnswerError

log = logging.getLogger("llmfleet.gateway")

SHORTEST_S, LONGEST_S = 0.5, 2.0
"""Bounds of the interval at which an answering engine is asked. The longer one is less than what a report lasts."""
PER_ENGINE_S = 0.02
"""Interval per engine of the fleet."""
SILENT_LONGEST_S = 30.0
"""Longest interval at which a silent engine is asked."""
DEADLINE_S = 1.0
"""Time for an answer: a later one says nothing of now."""
MOST_BYTES = 4 * 2**20
"""Of an answer with metrics."""

_METRIC = re.compile(
    rb"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc|cache_config_info)"
    rb"(?:\{([^\n]*)\})? ([^\s]+)",
    re.MULTILINE,
)
_BLOCKS = re.compile(rb'num_gpu_blocks="(\d+)"')
_BLOCK_TOKENS = re.compile(rb'block_size="(\d+)"')


class Source(Protocol):
    """A way to ask one engine."""

    async def ask(self, now: Callable[[], float]) -> EngineReport | None:
        """A report; None where there is none. Raises OSError, TimeoutError, ValueError or NoAnswerError."""

    async def close(self) -> None:
        """Ends what it holds."""


class ControlSource:
    """The plug-in's control port."""

    def __init__(self, address: str, key: bytes) -> None:
        """Raises ValueError for a bad address."""
        self._connection = ControlConnection(address, key)
        self._block_tokens = 0

    async def ask(self, now: Callable[[], float]) -> EngineReport | None:
        """See Source."""
        if not self._block_tokens:
            capabilities = await self._connection.ask(Capabilities(), DEADLINE_S)
            if not isinstance(capabilities, EngineCapabilities):
                return None
            self._block_tokens = capabilities.fingerprint.block_size
        at_s = now()
        load = await self._connection.ask(GetLoad(), DEADLINE_S)
        if not isinstance(load, Load):
            return None
        tokens = self._block_tokens
        used = load.blocks_total - load.blocks_free
        return EngineReport(at_s, load.waiting, load.running, load.blocks_total * tokens, used * tokens)

    async def close(self) -> None:
        """See Source."""
        await self._connection.close()


class MetricsSource:
    """vLLM's metrics, on the port of its API."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ask(self, now: Callable[[], float]) -> EngineReport | None:
        """See Source."""
        at_s = now()
        async with asyncio.timeout(DEADLINE_S):
            reader, writer = await asyncio.open_connection(self._engine.host, self._engine.port)
            try:
                # In 1.0 the answer comes whole and ends with the connection.
                writer.write(b"GET /metrics HTTP/1.0\r\nHost: " + self._engine.authority + b"\r\n\r\n")
                answer = bytearray()
                while len(answer) <= MOST_BYTES and (data := await reader.read(2**16)):
                    answer += data
            finally:
                writer.close()
        if len(answer) > MOST_BYTES:
            raise ValueError(f"/metrics is longer than {MOST_BYTES} bytes")
        head, _, text = bytes(answer).partition(b"\r\n\r\n")
        return parse_metrics(text, at_s) if head.split(b" ", 2)[1:2] == [b"200"] else None

    async def close(self) -> None:
        """See Source."""


def parse_metrics(text: bytes, at_s: float) -> EngineReport | None:
    """What vLLM's metrics say of its load; None where they do not say how many requests it has.

    Several schedulers in one engine (data parallel) are counted together. Raises ValueError for figures that are none.
    """
    requests: dict[bytes, float] = {}
    usages: list[float] = []
    blocks = block_tokens = 0
    for name, labels, value in _METRIC.findall(text):
        if name == b"cache_config_info":
            if (count := _BLOCKS.search(labels)) and (size := _BLOCK_TOKENS.search(labels)):
                blocks, block_tokens = blocks + int(count[1]), int(size[1])
        elif name == b"kv_cache_usage_perc":
            usages.append(float(value))
        else:
            requests[name] = requests.get(name, 0.0) + float(value)
    if len(requests) < 2:
        return None
    kv_tokens = blocks * block_tokens
    used = sum(usages) / len(usages) if usages else 0.0
    return EngineReport(
        at_s,
        int(requests[b"num_requests_waiting"]),
        int(requests[b"num_requests_running"]),
        kv_tokens if usages else 0,
        round(kv_tokens * used),
    )


class ReportScraper:
    """Asks the engines of a fleet until it is closed. One event loop owns it."""

    def __init__(self, report: Callable[[str, EngineReport], None], now: Callable[[], float]) -> None:
        """`report` takes an engine's id and what it said; `now` is the clock of the policy."""
        self._report = report
        self._now = now
        self._tasks: dict[str, tuple[tuple[Engine, bytes | None], asyncio.Task[None]]] = {}
        self._interval_s = SHORTEST_S

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot of the fleet: asks its engines and no others."""
        wanted = {
            engine.id: (engine, service.peer_key) for service in fleet.services.values() for engine in service.engines
        }
        for name, (asked, task) in list(self._tasks.items()):
            if name not in wanted or _address(*wanted[name]) != _address(*asked):
                task.cancel()
                del self._tasks[name]
        for name, (engine, key) in wanted.items():
            if name not in self._tasks:
                self._tasks[name] = (engine, key), asyncio.create_task(self._ask(engine, key))
        self._interval_s = min(LONGEST_S, max(SHORTEST_S, PER_ENGINE_S * len(wanted)))

    async def close(self) -> None:
        """Ends all asking."""
        tasks = [task for _, task in self._tasks.values()]
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, engine: Engine, key: bytes | None) -> None:
        sources: list[Source] = [MetricsSource(engine)]
        if engine.control is not None and key is not None:
            with contextlib.suppress(ValueError):  # a bad address is no reason to ask nothing
                sources.insert(0, ControlSource(engine.control, key))
        silent = 0
        try:
            while True:
                wait_s = self._interval_s if not silent else min(SILENT_LONGEST_S, self._interval_s * 2.0**silent)
                await asyncio.sleep(wait_s * (0.5 + random.random()))
                try:
                    report = await sources[0].ask(self._now)
                except (OSError, TimeoutError, ValueError, NoAnswerError) as error:
                    log.debug("engine %s does not say how busy it is: %s", engine.id, error)
                    report = None
                if report is not None:
                    silent = 0
                    self._report(engine.id, report)
                else:
                    silent = min(silent + 1, 10)
                    sources.append(sources.pop(0))
        finally:
            for source in sources:
                await source.close()


def _address(engine: Engine, key: bytes | None) -> tuple[str, int, str | None, bytes | None]:
    return engine.host, engine.port, engine.control, key
