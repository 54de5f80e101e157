"""Demand: requests per second by size bucket, from what was observed or from what the user expects.

An observed histogram counts once it is there, unless the service insists on its own figures (`mode: expected`).
Without either the demand is zero, and the service keeps its fewest replicas. This is the one place where a workload
enters a plan: whoever wants to plan for another one (a trace) hands it in as `PlanInputs.demand`, and what is
forecast comes on top (`ahead`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from llmfleet.api import Buckets, BucketSizes, LLMService, ServiceForecast, ServicePlan
from llmfleet.api.llmservice import Traffic
from llmfleet.api.plan import PlannedForecast
from llmfleet.placement.inputs import Demand, PlanInputs
from llmfleet.placement.workload.ahead import demand_ahead
from llmfleet.placement.workload.histogram import FloatArray, Histogram
from llmfleet.placement.workload.sizes import mean_tokens, planned_sizes, settled, stated_sizes


@dataclass(frozen=True)
class BucketDemand:
    """What has to be served."""

    rps: FloatArray
    """Requests per second, shape (buckets,)."""
    tokens: FloatArray
    """Mean tokens of a request, input and output together, shape (buckets,). Exact where the sizes are written in
    the service, or where their sums were observed; else the middle of the bucket."""
    sizes: FloatArray
    """(input tokens, output tokens) that stand for a bucket's requests, shape (buckets, 2); see `planned_sizes`."""
    seen: list[BucketSizes] | None
    """What these come from (`known_sizes`); None where all are corners."""
    observed: bool
    """Whether it was measured, rather than written by the user."""
    warnings: list[str]
    """What the user should know about the figures."""
    said: FloatArray
    """`rps` without what is only forecast, shape (buckets,)."""
    forecast: PlannedForecast | None = None
    """What of it is forecast; None where that is nothing."""


def bucket_demand(
    service: LLMService,
    buckets: Buckets,
    observed: Demand | None,
    forecast: ServiceForecast | None = None,
    within_s: float = 0.0,
) -> BucketDemand:
    """The demand that a plan has to serve: that of now, and what is forecast until `within_s` seconds later."""
    now = _now(service, buckets, observed)
    if forecast is None:
        return now
    rps = demand_ahead(forecast, now.rps, within_s)
    more, end_s = float((rps - now.rps).sum()), forecast.points[-1].after_seconds
    if end_s < within_s:
        warning = (
            f"the forecast ends after {end_s:g} s, and a replica started now serves after {within_s:g} s "
            "(spec.engine.startupSeconds and the node's): what comes between is not known"
        )
        now = replace(now, warnings=[*now.warnings, warning])
    if more <= 0:
        return now
    planned = PlannedForecast(within_seconds=within_s, percentile=forecast.percentile, rps=more)
    return replace(now, rps=rps, forecast=planned)


def _now(service: LLMService, buckets: Buckets, observed: Demand | None) -> BucketDemand:
    traffic = service.spec.traffic
    known = known_sizes(service, buckets, observed)
    sizes = planned_sizes(buckets, known)
    if traffic.mode == "observe" and observed is not None:
        seen = Histogram.observed(buckets, observed.rps)
        tokens = mean_tokens(buckets, known, seen.mean_tokens)
        return BucketDemand(seen.rps, tokens, sizes, known, True, [], seen.rps)
    expected, warnings = _expected(service, traffic, buckets)
    planned = expected.on(buckets)
    return BucketDemand(planned.rps, planned.mean_tokens, sizes, known, False, warnings, planned.rps)


def known_sizes(service: LLMService, buckets: Buckets, observed: Demand | None) -> list[BucketSizes] | None:
    """How long a service's requests are, as far as anybody knows; None where nobody does.

    What is written down counts only where the user insists on it (`mode: expected`). Elsewhere gateways will say before
    long how long requests are, at first as if nothing was known: a plan that began with less would take a turn through
    more replicas.
    """
    traffic = service.spec.traffic
    if traffic.mode == "observe":
        return None if observed is None else observed.sizes
    return None if traffic.sizes is None else stated_sizes(buckets, traffic.sizes)


def settled_demand(inputs: PlanInputs, in_force: Mapping[str, ServicePlan]) -> PlanInputs:
    """The inputs with the sizes to plan with (`settled`). `in_force`: plans that services run by, by key."""
    buckets = {profile.key: profile.spec.buckets for profile in inputs.profiles}
    changed = dict(inputs.demand)
    for service in inputs.services:
        demand, before = inputs.demand.get(service.key), in_force.get(service.key)
        edges = buckets.get(f"{service.metadata.namespace}/{service.spec.profile}")
        if demand is None or before is None or demand.sizes is None or before.buckets != edges:
            continue
        sizes = settled(before.buckets, demand.sizes, before.sizes)
        changed[service.key] = demand.model_copy(update={"sizes": sizes})
    return inputs.model_copy(update={"demand": changed})


def _expected(service: LLMService, traffic: Traffic, buckets: Buckets) -> tuple[Histogram, list[str]]:
    """What the user wrote down, no cells where it is not enough, and what is odd about it."""
    if traffic.requests_per_second is None or traffic.sizes is None:
        warnings = []
        if traffic.requests_per_second:
            warnings.append(
                "spec.traffic.sizes is absent, so spec.traffic.requestsPerSecond cannot be planned for; "
                "demand counts once requests arrive"
            )
        return Histogram.expected([], 0.0), warnings
    expected = Histogram.expected(traffic.sizes, traffic.requests_per_second)
    warnings = []
    context_length = service.spec.model.context_length
    for size, too_long, outside in zip(
        traffic.sizes, expected.exceed_context(context_length), expected.exceed_buckets(buckets), strict=True
    ):
        if too_long:
            warnings.append(
                f"spec.traffic.sizes: {size.input_tokens} + {size.output_tokens} tokens exceed "
                f"spec.model.contextLength {context_length}; the engine will refuse such requests"
            )
        if outside:
            warnings.append(
                f"spec.traffic.sizes: {size.input_tokens} input and {size.output_tokens} output tokens lie above the "
                f"last bucket ({buckets.input_tokens[-1]}, {buckets.output_tokens[-1]}) of ModelProfile "
                f"{service.spec.profile} and are planned as it"
            )
    return expected, warnings
