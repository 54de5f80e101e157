"""Engines are asked how busy they are; whatever they answer, asking goes on and nothing else depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from gateway_testing.tables import fleet, table
from llmfleet.api import Reason
from llmfleet.api.fingerprint import Fingerprint
from llmfleet.api.migration_messages import (
    AnyAnswer,
    AnyAsk,
    Capabilities,
    EngineCapabilities,
    EngineLimits,
    GetLoad,
    Load,
    Refused,
)
from llmfleet.gateway import reports
from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.policy import EngineReport
from llmfleet.gateway.reports import MetricsSource, ReportScraper, parse_metrics
from llmfleet.migration.control_server import Peer, serve
from llmfleet.migration.tcp import ControlLimits

# As vLLM 0.32 writes them; comments and other metrics between them.
METRICS = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m{}"} 7.0
vllm:num_requests_waiting{engine="0",model_name="m{}"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_cpu_blocks="None",num_gpu_blocks="400"} 1.0
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="m"} 12.0
"""


def test_metrics_of_vllm_are_read() -> None:
    assert parse_metrics(METRICS, 5.0) == EngineReport(5.0, 3, 7, 6400, 1600)


def test_several_schedulers_of_one_engine_are_one_engine() -> None:
    both = METRICS + METRICS.replace(b'engine="0"', b'engine="1"').replace(b" 0.25", b" 0.75")
    assert parse_metrics(both, 5.0) == EngineReport(5.0, 6, 14, 12800, 6400)


def test_an_engine_that_does_not_say_its_cache_is_known_by_its_requests() -> None:
    some = b"\n".join(line for line in METRICS.splitlines() if b"cache" not in line)
    assert parse_metrics(some, 5.0) == EngineReport(5.0, 3, 7, 0, 0)


@pytest.mark.parametrize("text", [b"", b"<html>", b"vllm:num_requests_running 1.0\n", b"go_goroutines 8\n"])
def test_metrics_that_do_not_say_how_many_requests_there_are_are_no_report(text: bytes) -> None:
    assert parse_metrics(text, 0.0) is None


class Answers:
    """A server that says one thing to whoever asks, after `delay_s`."""

    def __init__(self, answer: bytes, delay_s: float = 0.0) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.asked: list[bytes] = []

    async def __aenter__(self) -> Engine:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return Engine(id="e", host="127.0.0.1", port=self._server.sockets[0].getsockname()[1], variant="fast")

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        await asyncio.sleep(self.delay_s)
        writer.write(self.answer)
        writer.close()


OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n"


def clock() -> float:
    return 42.0


@pytest.mark.parametrize(
    ("answer", "report"),
    [
        (OK + METRICS, EngineReport(42.0, 3, 7, 6400, 1600)),
        (b"HTTP/1.1 404 Not Found\r\n\r\n" + METRICS, None),
        (b"", None),
        (b"\x00\xff", None),
    ],
)
def test_an_answer_counts_only_if_it_is_one(answer: bytes, report: EngineReport | None) -> None:
    async def asked() -> EngineReport | None:
        async with Answers(answer) as engine:
            return await MetricsSource(engine).ask(clock)

    assert asyncio.run(asked()) == report


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "MOST_BYTES", 1000)

    async def asked() -> EngineReport | None:
        async with Answers(OK + b"x" * 5000) as engine:
            return await MetricsSource(engine).ask(clock)

    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        asyncio.run(asked())


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "SHORTEST_S", 0.01)
    monkeypatch.setattr(reports, "PER_ENGINE_S", 0.0)
    monkeypatch.setattr(reports, "DEADLINE_S", 0.05)


async def until(condition: Callable[[], bool]) -> None:
    deadline = asyncio.get_running_loop().time() + 5.0
    while not condition() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    assert condition()


@pytest.mark.usefixtures("hurried")
def test_every_engine_of_the_fleet_is_asked_again_and_again_and_no_other() -> None:
    async def scraped() -> None:
        heard: list[tuple[str, EngineReport]] = []
        server = Answers(OK + METRICS)
        async with server as engine:
            scraper = ReportScraper(lambda name, report: heard.append((name, report)), clock)
            scraper.update(fleet(table(), [engine]))
            await until(lambda: len(heard) >= 3)
            scraper.update(fleet(table(), []))
            await asyncio.sleep(0.05)
            asked = len(server.asked)
            await asyncio.sleep(0.1)
            assert len(server.asked) == asked
            await scraper.close()
        assert set(heard) == {("e", EngineReport(42.0, 3, 7, 6400, 1600))}

    asyncio.run(scraped())


@pytest.mark.usefixtures("hurried")
def test_an_engine_that_says_nothing_in_time_is_asked_less_and_holds_nobody_up() -> None:
    async def scraped() -> None:
        heard: list[str] = []
        mute, quick = Answers(OK + METRICS, delay_s=0.2), Answers(OK + METRICS)
        async with mute as one, quick as other:
            scraper = ReportScraper(lambda name, _: heard.append(name), clock)
            named = [Engine(name, engine.host, engine.port, "fast") for name, engine in (("m", one), ("q", other))]
            scraper.update(fleet(table(), named))
            await until(lambda: heard.count("q") >= 20)
            await scraper.close()
            assert "m" not in heard
            assert 1 <= len(mute.asked) < len(quick.asked) / 2
            await asyncio.sleep(0.25)

    asyncio.run(scraped())


KEY = b"k" * 32


class Nothing:
    """A meter that counts nothing."""

    def answered(self, kind: str, refused: Reason | None) -> None: ...

    def connection_refused(self, reason: Reason) -> None: ...


def plugin(load: AnyAnswer) -> Callable[[AnyAsk, Peer], Awaitable[AnyAnswer]]:
    fingerprint = Fingerprint(
        vllm_version="0.32.0", model="m", model_hash="1", dtype="float32", kv_dtype="auto", block_size=32, layout="l",
        attention_backend="a", instruction_set="i", tp=1,
    )  # fmt: skip
    limits = EngineLimits(lease_s=1.0, incoming=1, outgoing=1, incoming_tokens=1, incoming_kv_share=1)

    async def answer(ask: AnyAsk, _: Peer) -> AnyAnswer:
        if isinstance(ask, Capabilities):
            return EngineCapabilities(
                instance="0" * 32, fingerprint=fingerprint, transports=["tcp"], data=["127.0.0.1:1"], limits=limits
            )
        return load if isinstance(ask, GetLoad) else Refused(reason=Reason.MALFORMED)

    return answer


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("load", "report"),
    [
        (
            Load(
                blocks_total=100, blocks_free=60, blocks_reserved=10, blocks_held=0, running=5, waiting=2, step_ms=1,
                incoming=0, outgoing=0,
            ),
            EngineReport(42.0, 2, 5, 3200, 1280),
        ),
        (Refused(reason=Reason.MALFORMED), EngineReport(42.0, 3, 7, 6400, 1600)),
    ],
    ids=["over control", "over metrics where control says nothing"],
)  # fmt: skip
def test_an_engine_with_the_plug_in_is_asked_over_its_control_port(load: AnyAnswer, report: EngineReport) -> None:
    async def scraped() -> None:
        heard: list[EngineReport] = []
        control = await serve("127.0.0.1:0", KEY, plugin(load), ControlLimits(), Nothing())
        async with Answers(OK + METRICS) as engine:
            engine = replace(engine, control=f"127.0.0.1:{control.port}")
            scraper = ReportScraper(lambda _, report: heard.append(report), clock)
            [service] = fleet(table(), [engine]).services.values()
            scraper.update(Fleet([replace(service, peer_key=KEY)]))
            await until(lambda: bool(heard))
            await scraper.close()
        await control.close()
        assert heard[0] == report

    asyncio.run(scraped())
