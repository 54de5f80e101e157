"""What an engine counts of migrations, for Prometheus (`docs/metrics.md`).

vLLM's own metrics are served by its API server, another process than the one in which requests live; so these have a
port of their own (`metrics_listen`), or none.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from llmfleet.api import DestinationPhase, Reason, SourcePhase, TailFate
from llmfleet.migration.ports import host_and_port

_PREFIX = "llmfleet_migration"


class Metrics:
    """Counters of one engine."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, help_: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"{_PREFIX}_{name}", help_, labels, registry=self._registry)

        self._outgoing = counter("outgoing", "Requests that were to leave, by how it ended", ("outcome", "reason"))
        self._incoming = counter("incoming", "Requests that were to come, by how it ended", ("outcome", "reason"))
        self._sent = counter("sent_bytes", "KV cache and sampler state sent")
        self._received = counter("received_bytes", "KV cache and sampler state received")
        self._recomputed = counter("recomputed_tokens", "Tokens whose KV cache did not come and was computed")
        self._asks = counter("asks", "Questions of coordinators and owners, by kind and reason of refusal",
                             ("kind", "refused"))  # fmt: skip
        self._connections = counter("refused_connections", "Control connections that were closed, by reason",
                                    ("reason",))  # fmt: skip
        self._lagging = counter("journal_lagging", "Batches of token ids that a slow owner got late")
        self._stages = Histogram(
            f"{_PREFIX}_stages", "Stages of the copy of a request that left", buckets=(1, 2, 3, 4, 6, 8, 12, 16),
            registry=self._registry,
        )  # fmt: skip
        self._hand_over = Histogram(
            f"{_PREFIX}_hand_over_seconds", "From the cut until the destination has all",
            buckets=(0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 1),
            registry=self._registry,
        )  # fmt: skip

    def serve(self, listen: str, blocks: Callable[[], tuple[int, int]], requests: Callable[[], int]) -> None:
        """Answers at `host:port`. `blocks`: reserved and held ones; `requests`: all that the engine has. Both are asked
        at each scrape. Raises OSError."""
        present = Gauge(f"{_PREFIX}_requests", "Requests that run, wait, come or leave", registry=self._registry)
        present.set_function(requests)
        reserved = Gauge(f"{_PREFIX}_reserved_blocks", "Blocks for requests on their way here", registry=self._registry)
        reserved.set_function(lambda: blocks()[0])
        held = Gauge(
            f"{_PREFIX}_held_blocks", "Blocks of requests that left, not released yet", registry=self._registry
        )
        held.set_function(lambda: blocks()[1])
        host, port = host_and_port(listen)
        start_http_server(port, host or "0.0.0.0", self._registry)

    def left(self, phase: SourcePhase, tail: TailFate, reason: Reason | None, stages: int) -> None:
        """A migration is over at its source."""
        outcome = f"{phase}_{tail}" if phase is SourcePhase.RELEASED else phase
        self._outgoing.labels(outcome, reason or "").inc()
        self._stages.observe(stages)

    def came(self, phase: DestinationPhase, reason: Reason | None) -> None:
        """A migration is over at its destination."""
        self._incoming.labels(phase, reason or "").inc()

    def sent(self, size: int) -> None:
        self._sent.inc(size)

    def received(self, size: int) -> None:
        self._received.inc(size)

    def recomputed(self, tokens: int) -> None:
        self._recomputed.inc(tokens)

    def handed_over(self, seconds: float) -> None:
        self._hand_over.observe(seconds)

    def lagging(self) -> None:
        self._lagging.inc()

    # `llmfleet.migration.control_server.Meter`

    def answered(self, kind: str, refused: Reason | None) -> None:
        self._asks.labels(kind, refused or "").inc()

    def connection_refused(self, reason: Reason) -> None:
        self._connections.labels(reason).inc()
