"""The operator's own figures for Prometheus.

What is counted as it happens (reconciles, errors, durations) are ordinary metrics. What is a *state* (replicas by
service and variant, queue depth, the newest plan) is read from the caches when Prometheus asks: so a deleted service
leaves no stale series behind, and nothing has to remember to set a gauge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from llmfleet.api import DemandReport, LLMService, ModelProfile, Plan
from llmfleet.operator.corrections import observed_factors
from llmfleet.operator.loop_lag import WINDOW_S, Lag, SlidingMaximum
from llmfleet.operator.planner import PlanningState

_PLAN_STATUSES = ("optimal", "feasible", "partial")


class FleetView(Protocol):
    """What the state metrics are read from."""

    @property
    def leading(self) -> bool:
        """Whether this replica acts."""

    @property
    def queue_depth(self) -> int:
        """Keys that wait for a worker."""

    @property
    def planning(self) -> PlanningState | None:
        """Figures of the planning loop; None on a standby."""

    @property
    def newest_plan(self) -> Plan | None:
        """Head of the newest plan."""

    def services(self) -> Iterator[LLMService]:
        """Every service, with its status."""

    def profiles(self) -> Iterator[ModelProfile]:
        """Every ModelProfile, with what it has learnt."""


class Metrics:
    """All metrics of one operator process."""

    def __init__(self, view: FleetView, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.registry = CollectorRegistry()
        self.reconciles = Counter(
            "llmfleet_operator_reconcile", "Reconciles of services, by result.", ["result"], registry=self.registry
        )
        self.reconcile_seconds = Histogram(
            "llmfleet_operator_reconcile_seconds",
            "Duration of one reconcile with its writes.",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
        )
        self.plan_seconds = Histogram(
            "llmfleet_operator_plan_seconds",
            "Duration of one solve with its transfers.",
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 60),
        )
        self._gateways = Gauge(
            "llmfleet_operator_gateways",
            "Gateways that are asked for demand, by whether they answered the last time.",
            ["answered"],
            registry=self.registry,
        )
        self._loop_lag_seconds = Histogram(
            "llmfleet_operator_event_loop_lag_seconds",
            "How late the event loop was, sampled a hundred times a second.",
            registry=self.registry,
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
        )
        self._longest_loop_lag = SlidingMaximum(WINDOW_S)
        Gauge(
            "llmfleet_operator_event_loop_lag_max_seconds",
            f"Longest lag of the event loop in the last {WINDOW_S:.0f} seconds.",
            registry=self.registry,
        ).set_function(self._longest_loop_lag.get)
        self._longest_own_lag = SlidingMaximum(WINDOW_S)
        Gauge(
            "llmfleet_operator_event_loop_lag_own_max_seconds",
            f"Longest lag of the last {WINDOW_S:.0f} seconds less the time for which the process waited for a core.",
            registry=self.registry,
        ).set_function(self._longest_own_lag.get)
        self._longest_lag_cpu = {threads: SlidingMaximum(WINDOW_S) for threads in ("loop", "all")}
        lag_cpu = Gauge(
            "llmfleet_operator_event_loop_lag_cpu_max_seconds",
            f"Most CPU time within one lag of the last {WINDOW_S:.0f} seconds, of the loop's thread or of all threads.",
            ["threads"],
            registry=self.registry,
        )
        for threads, longest in self._longest_lag_cpu.items():
            lag_cpu.labels(threads).set_function(longest.get)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.registry.register(_State(view, now))

    def observe_gateways(self, reports: Mapping[str, DemandReport | None]) -> None:
        """Takes one round of `gateways.GatewayPoller`."""
        silent = sum(report is None for report in reports.values())
        self._gateways.labels("false").set(silent)
        self._gateways.labels("true").set(len(reports) - silent)

    def observe_loop_lag(self, lag: Lag) -> None:
        """Takes one sample of `loop_lag.watch_lag`."""
        self._loop_lag_seconds.observe(lag.seconds)
        self._longest_loop_lag.add(lag.seconds)
        self._longest_own_lag.add(lag.own_s)
        self._longest_lag_cpu["loop"].add(lag.loop_cpu_s)
        self._longest_lag_cpu["all"].add(lag.process_cpu_s)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, view: FleetView, now: Callable[[], datetime]) -> None:
        self._view, self._now = view, now

    def collect(self) -> Iterator[Metric]:
        view = self._view
        build = GaugeMetricFamily("llmfleet_operator_build_info", "Version of the operator.", labels=["version"])
        build.add_metric([version("llmfleet")], 1)
        yield build
        yield GaugeMetricFamily("llmfleet_operator_leader", "1 on the replica that acts.", value=int(view.leading))
        yield GaugeMetricFamily(
            "llmfleet_operator_queue_depth", "Services that wait for a reconcile.", value=view.queue_depth
        )
        yield from self._planning()
        yield from self._replicas()
        yield self._corrections()

    def _planning(self) -> Iterator[Metric]:
        planning, plan = self._view.planning, self._view.newest_plan
        if planning is None:
            return
        yield GaugeMetricFamily(
            "llmfleet_operator_plan_failures", "Solves that gave no plan since the start.", value=planning.failures
        )
        yield GaugeMetricFamily(
            "llmfleet_operator_plans_rejected",
            "Plans since the start that broke a constraint and were dropped: bugs.",
            value=planning.rejected,
        )
        yield GaugeMetricFamily(
            "llmfleet_operator_planner_resident_bytes", "Memory of the planner.", value=planning.planner_rss_bytes
        )
        if plan is None:
            return
        yield GaugeMetricFamily(
            "llmfleet_operator_last_plan_timestamp_seconds",
            "When the last plan was made.",
            value=planning.last_success_at,
        )
        yield GaugeMetricFamily("llmfleet_fleet_cost_per_hour", "Cost of the planned fleet.", value=plan.cost_per_hour)
        if plan.gap_cost is not None:
            yield GaugeMetricFamily(
                "llmfleet_operator_plan_gap", "Proven relative gap of the plan's cost.", value=plan.gap_cost
            )
        status = GaugeMetricFamily(
            "llmfleet_operator_plan_status", "1 for the newest plan's status.", labels=["status"]
        )
        for name in _PLAN_STATUSES:
            status.add_metric([name], int(plan.status == name))
        yield status

    def _replicas(self) -> Iterator[Metric]:
        labels = ["namespace", "service", "variant"]
        desired = GaugeMetricFamily("llmfleet_service_replicas_desired", "Replicas of the plan.", labels=labels)
        ready = GaugeMetricFamily("llmfleet_service_replicas_ready", "Ready replicas.", labels=labels)
        cost = GaugeMetricFamily("llmfleet_service_cost_per_hour", "Cost of the plan.", labels=labels[:2])
        short = GaugeMetricFamily(
            "llmfleet_service_unserved_requests_per_second", "Demand that the plan cannot serve.", labels=labels[:2]
        )
        for service in self._view.services():
            name = [service.metadata.namespace or "", service.metadata.name]
            for variant in service.status.variants:
                desired.add_metric([*name, variant.name], variant.desired)
                ready.add_metric([*name, variant.name], variant.ready)
            if service.status.cost_per_hour is not None:
                cost.add_metric(name, service.status.cost_per_hour)
            short.add_metric(name, service.status.unserved_requests_per_second)
        yield from (desired, ready, cost, short)

    def _corrections(self) -> Metric:
        labels = ["namespace", "profile", "gpu_type", "tensor_parallel", "pipeline_parallel", "configuration", "metric"]
        factor = GaugeMetricFamily(
            "llmfleet_profile_observed_latency_ratio",
            "Times the latency of the profile that engines were seen to take in the last day, the most over all loads.",
            labels=labels,
        )
        for profile in self._view.profiles():
            name = [profile.metadata.namespace or "", profile.metadata.name]
            for one, metric, value in observed_factors(profile.status.corrections, self._now()):
                layout = [str(one.tensor_parallel), str(one.pipeline_parallel), one.configuration]
                factor.add_metric([*name, one.gpu_type, *layout, metric], value)
        return factor
