"""The gateway of the benchmark, with everything on that costs a request something.

    python -m e2e.bench.gateway_front PORT ENGINE_PORT...      serves until it is ended

Engines of two variants with a latency objective, a routing table that splits every bucket between the two, an API key
with rates, and the engines' metrics scraped as always: what a gateway in a cluster has, without the cluster.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from e2e.bench.gateway_engine import MODEL
from e2e.bench.gateway_load import KEY
from llmfleet.api import Buckets, LatencyCoefficients, Route, RoutedVariant, RoutingTable
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.keys import ApiKey, KeyRing, key_digest
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.policy import Router
from llmfleet.gateway.reports import ReportScraper
from llmfleet.gateway.transport import AsyncioDataPlane, Limits

_VARIANTS = ("fast", "slow")
_BUCKETS = Buckets(input_tokens=[128, 512, 2048, 8192, 32768], output_tokens=[64, 256, 1024, 4096])
_LATENCY = LatencyCoefficients(
    ttft_base_ms=50.0, ttft_ms_per_input_token=0.1, tpot_base_ms=20.0, tpot_ms_per_running=0.1
)
_RATE = 1e9
"""Requests per second and tokens per minute of the key: it is counted, and never used up."""


def _fleet(ports: list[int]) -> Fleet:
    table = RoutingTable(
        plan_id="bench",
        namespace="bench",
        service="bench",
        served_name=MODEL,
        context_length=32768 + 4096,
        objective=Objective(ttft=LatencyTarget(milliseconds=5000), tpot=LatencyTarget(milliseconds=500)),
        buckets=_BUCKETS,
        variants=[
            RoutedVariant(name=name, replicas=len(ports) // 2, selector={}, latency=_LATENCY) for name in _VARIANTS
        ],
        routes=[
            Route(bucket=bucket, variant=name, fraction=0.5) for bucket in range(_BUCKETS.count) for name in _VARIANTS
        ],
    )
    engines = tuple(
        Engine(f"http://127.0.0.1:{port}", "127.0.0.1", port, _VARIANTS[index % 2]) for index, port in enumerate(ports)
    )
    rights = ApiKey("bench", requests_per_second=_RATE, tokens_per_minute=_RATE)
    return Fleet([Service(table, engines, KeyRing.of({key_digest(KEY.encode()) or b"": rights}))])


async def _serve(port: int, engine_ports: list[int]) -> None:
    router = Router(time.monotonic, "bench")
    plane = AsyncioDataPlane(router, Limits(), GatewayMetrics())
    scraper = ReportScraper(router.report, time.monotonic)
    fleet = _fleet(engine_ports)
    plane.update(fleet)
    scraper.update(fleet)
    await plane.start("127.0.0.1", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), [int(port) for port in sys.argv[2:]]))
