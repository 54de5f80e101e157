"""Whether requests go where the plan says, and what a decision costs.

*Split*: 1,000 requests of mixed sizes (Llumnix's M-M) through the gateway's policy, a plan of three variants with
another row of fractions for each bucket, nothing in flight and no reports, so that nothing is corrected. The plan's
share of a variant is the mean of its fractions over the buckets that the requests were routed by; total variation is
half the sum of the differences. Per bucket it is in the note, where few requests cannot be split any finer.

*Cost*: CPU time of `Router.assign` alone among 64 engines of one variant, with about eight requests on each and fresh
reports from other gateways, or without.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Mapping

from e2e.bench.report import Report
from e2e.bench.routing_loads import FIT, drawn
from e2e.bench.routing_peers import BUCKETS
from llmfleet.api import Route, RoutedVariant, RoutingTable
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.policy import EngineReport, RequestShape, Router, Usage
from llmfleet.gateway.policy.sizes import INITIAL_BYTES_PER_TOKEN

_SEEDS = 5
_REQUESTS = 1000
_ENGINES = 64

Shares = defaultdict[str, float]
"""Requests by variant."""


def table(fractions: dict[int, dict[str, float]], replicas: dict[str, int]) -> RoutingTable:
    """A table of these rows."""
    return RoutingTable(
        plan_id="bench",
        namespace="bench",
        service="chat",
        served_name="chat",
        context_length=12_000,
        buckets=BUCKETS,
        variants=[
            RoutedVariant(name=name, replicas=count, selector={}, latency=FIT) for name, count in replicas.items()
        ],
        routes=[
            Route(bucket=bucket, variant=name, fraction=share)
            for bucket, row in fractions.items()
            for name, share in row.items()
        ],
    )


def service(routing: RoutingTable) -> Service:
    """With all replicas there."""
    return Service(
        routing,
        tuple(
            Engine(id=f"{variant.name}-{number}", host="", port=0, variant=variant.name)
            for variant in routing.variants
            for number in range(variant.replicas)
        ),
    )


def split(seed: int) -> tuple[float, dict[int, float]]:
    """Total variation in percent, over all and by bucket."""
    chance = random.Random(seed)
    fractions: dict[int, dict[str, float]] = {}
    for bucket in range(BUCKETS.count):
        parts = [chance.random() for _ in range(3)]
        fractions[bucket] = {name: part / sum(parts) for name, part in zip("abc", parts, strict=True)}
    routed = service(table(fractions, {"a": 4, "b": 3, "c": 2}))
    router = Router(time.monotonic, "bench")
    router.update(Fleet([routed]))
    due: defaultdict[int, Shares] = defaultdict(lambda: defaultdict(float))
    got: defaultdict[int, Shares] = defaultdict(lambda: defaultdict(float))
    for one in drawn("M-M", _REQUESTS, seed):
        ticket = router.admit(routed.key, RequestShape(round(one.input_tokens * INITIAL_BYTES_PER_TOKEN)))
        bucket = BUCKETS.index(ticket.prediction.prompt_tokens, ticket.prediction.output_tokens)
        engine = router.assign(ticket)
        assert engine is not None
        router.completed(ticket, Usage(one.input_tokens, one.output_tokens))
        got[bucket][engine.variant] += 1
        for name, share in fractions[bucket].items():
            due[bucket][name] += share
    whole_due: Shares = added(due)
    whole_got: Shares = added(got)
    return variation(whole_due, whole_got), {bucket: variation(due[bucket], got[bucket]) for bucket in sorted(due)}


def added(by_bucket: Mapping[int, Shares]) -> Shares:
    """All buckets together."""
    whole: Shares = defaultdict(float)
    for shares in by_bucket.values():
        for name, requests in shares.items():
            whole[name] += requests
    return whole


def variation(due: Shares, got: Shares) -> float:
    """Total variation between two splits of as many requests, in percent."""
    return 50.0 * sum(abs(due[name] - got[name]) for name in {*due, *got}) / sum(got.values())


def assign_us(*, reports: bool) -> float:
    """Microseconds per decision."""
    routed = service(table({bucket: {"a": 1.0} for bucket in range(BUCKETS.count)}, {"a": _ENGINES}))
    router = Router(time.monotonic, "bench")
    router.update(Fleet([routed]))
    if reports:
        for engine in routed.engines:
            router.report(engine.id, EngineReport(time.monotonic(), 0, 20, 100_000, 30_000))
    running = []
    spent_ns = 0
    for number in range(4000):
        ticket = router.admit(routed.key, RequestShape(200 + number * 37 % 9000, max_output_tokens=200))
        begun = time.thread_time_ns()
        router.assign(ticket)
        spent_ns += time.thread_time_ns() - begun
        router.started(ticket)
        running.append(ticket)
        if len(running) > 8 * _ENGINES:
            router.completed(running.pop(0), Usage(100, 100))
    return spent_ns / 4000 / 1e3


def add_rows(report: Report) -> None:
    """See above."""
    splits = [split(seed) for seed in range(_SEEDS)]
    worst = {bucket: max(by[bucket] for _, by in splits if bucket in by) for _, some in splits for bucket in some}
    note = "by bucket, worst of five plans: " + ", ".join(f"{bucket}: {worst[bucket]:.1f}" for bucket in sorted(worst))
    report.add("split_total_variation", "%", [whole for whole, _ in splits], target=2.0, note=note)
    report.add("assign_64_engines", "us", [assign_us(reports=False) for _ in range(5)], target=15.0)
    report.add("assign_64_engines_shared", "us", [assign_us(reports=True) for _ in range(5)], target=15.0)
