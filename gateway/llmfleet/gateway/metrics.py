"""Request and token metrics by service and variant, for Prometheus.

Label values are names of services and variants from the routing tables, never something that a client sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llmfleet.gateway.tallies import VariantTallies

_GAP_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0)
_VARIANT = ("namespace", "service", "variant")


class RequestMetrics(Collector):
    """The metrics of requests, out of their tallies by variant."""

    def __init__(self) -> None:
        self._variants: dict[tuple[str, str, str], VariantTallies] = {}

    def variant(self, namespace: str, service: str, variant: str) -> VariantTallies:
        """What is counted of one variant of one service."""
        key = (namespace, service, variant)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = VariantTallies()
        return found

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        requests = CounterMetricFamily(
            "llmfleet_gateway_requests",
            "Requests by outcome: the HTTP status, `client_gone`, or `engine_lost` in mid-stream",
            labels=(*_VARIANT, "outcome"),
        )
        ttft_s = HistogramMetricFamily(
            "llmfleet_gateway_time_to_first_token_seconds",
            "From the request's last byte to the stream's first, queueing included",
            labels=_VARIANT,
        )
        tpot_s = HistogramMetricFamily(
            "llmfleet_gateway_time_per_output_token_seconds",
            "Mean time per token after the first, per streamed request",
            labels=_VARIANT,
        )
        duration_s = HistogramMetricFamily(
            "llmfleet_gateway_request_duration_seconds",
            "From the request's last byte to the answer's last",
            labels=_VARIANT,
        )
        tokens = CounterMetricFamily(
            "llmfleet_gateway_tokens",
            "Tokens of completed requests, as the engines report them",
            labels=(*_VARIANT, "kind"),
        )
        retries = CounterMetricFamily(
            "llmfleet_gateway_engine_failures",
            "Requests that an engine failed before its first token, so that they went elsewhere",
            labels=_VARIANT,
        )
        for labels, tallies in self._variants.items():
            for outcome, count in tallies.outcomes.items():
                requests.add_metric((*labels, outcome), count)
            for family, spread in (
                (ttft_s, tallies.ttft_s),
                (tpot_s, tallies.tpot_s),
                (duration_s, tallies.duration_s),
            ):
                buckets = [("+Inf" if edge == math.inf else str(edge), count) for edge, count in spread.cumulative()]
                family.add_metric(labels, buckets, spread.total)
            tokens.add_metric((*labels, "prompt"), tallies.prompt_tokens)
            tokens.add_metric((*labels, "completion"), tallies.completion_tokens)
            retries.add_metric(labels, tallies.retries)
        return requests, ttft_s, tpot_s, duration_s, tokens, retries


class GatewayMetrics:
    """Every metric of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.of_requests = RequestMetrics()
        self.registry.register(self.of_requests)
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
        self.bodies_bytes = Gauge(
            "llmfleet_gateway_request_body_bytes", "Bodies of the requests that are here", registry=self.registry
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
