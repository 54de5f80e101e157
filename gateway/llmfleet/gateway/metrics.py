"""Request and token metrics by service and variant, for Prometheus.

Label values are names of services and variants from the routing tables, never something that a client sent.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_GAP_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
_DURATION_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class VariantMetrics:
    """The metrics of one (service, variant), with their labels bound once."""

    __slots__ = (
        "_labels",
        "_outcomes",
        "_requests",
        "completion_tokens",
        "duration_s",
        "prompt_tokens",
        "retries",
        "tpot_s",
        "ttft_s",
    )

    def __init__(self, metrics: GatewayMetrics, namespace: str, service: str, variant: str) -> None:
        labels = (namespace, service, variant)
        self.ttft_s = metrics.ttft_s.labels(*labels)
        self.tpot_s = metrics.tpot_s.labels(*labels)
        self.duration_s = metrics.duration_s.labels(*labels)
        self.prompt_tokens = metrics.tokens.labels(*labels, "prompt")
        self.completion_tokens = metrics.tokens.labels(*labels, "completion")
        self.retries = metrics.retries.labels(*labels)
        self._labels = labels
        self._requests = metrics.requests
        self._outcomes: dict[str, Counter] = {}

    def outcome(self, outcome: str) -> None:
        """Counts a request that has ended."""
        counter = self._outcomes.get(outcome)
        if counter is None:
            counter = self._outcomes[outcome] = self._requests.labels(*self._labels, outcome)
        counter.inc()


class GatewayMetrics:
    """Every metric of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        variant = ("namespace", "service", "variant")
        self.requests = Counter(
            "llmfleet_gateway_requests",
            "Requests by outcome: the HTTP status, `client_gone`, or `engine_lost` in mid-stream",
            (*variant, "outcome"),
            registry=self.registry,
        )
        self.refused = Counter(
            "llmfleet_gateway_refused_requests",
            "Requests that were refused before a service was found, by error code",
            ("code",),
            registry=self.registry,
        )
        self.admin_refused = Counter(
            "llmfleet_gateway_admin_refused_requests",
            "Questions for the demand that were refused, by error code: a wrong or missing token",
            ("code",),
            registry=self.registry,
        )
        self.ttft_s = Histogram(
            "llmfleet_gateway_time_to_first_token_seconds",
            "From the request's last byte to the stream's first, queueing included",
            variant,
            buckets=_TTFT_S,
            registry=self.registry,
        )
        self.tpot_s = Histogram(
            "llmfleet_gateway_time_per_output_token_seconds",
            "Mean time per token after the first, per streamed request",
            variant,
            buckets=_TPOT_S,
            registry=self.registry,
        )
        self.duration_s = Histogram(
            "llmfleet_gateway_request_duration_seconds",
            "From the request's last byte to the answer's last",
            variant,
            buckets=_DURATION_S,
            registry=self.registry,
        )
        self.tokens = Counter(
            "llmfleet_gateway_tokens",
            "Tokens of completed requests, as the engines report them",
            (*variant, "kind"),
            registry=self.registry,
        )
        self.retries = Counter(
            "llmfleet_gateway_engine_failures",
            "Requests that an engine failed before its first token, so that they went elsewhere",
            variant,
            registry=self.registry,
        )
        self.migrations = Counter(
            "llmfleet_gateway_migrations",
            "Streams that were to move to another engine, by how that ended and why",
            ("result", "reason"),
            registry=self.registry,
        )
        self.gap_s = Histogram(
            "llmfleet_gateway_migration_gap_seconds",
            "From the last that a client got from one engine to the first that it got from the next",
            buckets=_GAP_S,
            registry=self.registry,
        )
        self.leaving_engines = Gauge(
            "llmfleet_gateway_leaving_engines", "Engines that leave and are not gone", registry=self.registry
        )
        self.leaving_requests = Gauge(
            "llmfleet_gateway_leaving_requests",
            "Requests of this gateway that run on engines that leave",
            registry=self.registry,
        )
        self.connections = Gauge(
            "llmfleet_gateway_client_connections", "Open client connections", registry=self.registry
        )
        self.waiting = Gauge(
            "llmfleet_gateway_waiting_requests",
            "Requests that wait for an engine",
            ("namespace", "service"),
            registry=self.registry,
        )
        self.rejected_objects = Counter(
            "llmfleet_gateway_rejected_objects",
            "Objects of the API server that could not be used, so that their last good state was kept",
            ("kind", "namespace", "name"),
            registry=self.registry,
        )
        self.watch_failures = Counter(
            "llmfleet_gateway_watch_failures",
            "Lists and watches that the API server ended with an error",
            ("kind",),
            registry=self.registry,
        )
        self._variants: dict[tuple[str, str, str], VariantMetrics] = {}

    def variant(self, namespace: str, service: str, variant: str) -> VariantMetrics:
        """The metrics of one variant of one service."""
        key = (namespace, service, variant)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = VariantMetrics(self, *key)
        return found
