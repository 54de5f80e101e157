"""Routing tables and fleets for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmfleet.api import Buckets, LatencyCoefficients, Route, RoutedVariant, RoutingTable
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.keys import KeyRing

FIT = LatencyCoefficients(ttft_base_ms=50, ttft_ms_per_input_token=0.1, tpot_base_ms=20, tpot_ms_per_running=1)
BUCKETS = Buckets(input_tokens=[100, 1000], output_tokens=[10, 100])


def table(
    fractions: Mapping[str, float] | None = None,
    *,
    replicas: Mapping[str, int] | None = None,
    fits: Mapping[str, LatencyCoefficients] | None = None,
    buckets: Buckets = BUCKETS,
    namespace: str = "team",
    service: str = "chat",
    served_name: str = "m",
    api_keys_secret: str | None = None,
) -> RoutingTable:
    """A table with the same fractions in every bucket."""
    fractions = {"fast": 1.0} if fractions is None else fractions
    replicas = replicas or dict.fromkeys(fractions, 1)
    return RoutingTable(
        plan_id="p1",
        namespace=namespace,
        service=service,
        served_name=served_name,
        api_keys_secret=api_keys_secret,
        context_length=4096,
        buckets=buckets,
        variants=[
            RoutedVariant(
                name=name, replicas=count, selector={"llmfleet.io/variant": name}, latency=(fits or {}).get(name, FIT)
            )
            for name, count in replicas.items()
        ],
        routes=[
            Route(bucket=bucket, variant=name, fraction=fraction)
            for bucket in range(buckets.count)
            for name, fraction in fractions.items()
        ],
    )


def engines(replicas: Mapping[str, int]) -> tuple[Engine, ...]:
    """`replicas` engines of each variant, named `<variant>-<n>`."""
    return tuple(
        Engine(id=f"{variant}-{number}", host="127.0.0.1", port=1, variant=variant)
        for variant, count in replicas.items()
        for number in range(count)
    )


def fleet(routing: RoutingTable, running: Sequence[Engine], keys: KeyRing | None = None) -> Fleet:
    """A fleet of one service."""
    return Fleet([Service(routing, tuple(running), keys)])
