"""The gateways' cumulative counts to request rates by service and bucket: what `PlanInputs.demand` asks for.

Arrivals are counted over a sliding window; the count at the window's start is interpolated between the two nearest
polls, so that a missed poll loses nothing. What a request's answer will be long is unknown when it arrives, so
arrivals carry only the input bucket and are spread over output buckets by what completed lately, else by the plan in
force, else by the sizes that the user gave, else evenly.

Failure never reads as silence:

* A gateway that is asked and does not answer keeps its last known rate for as long as it is asked: it is Ready, or a
  person named it, so its clients are there. Its counts are cumulative, so once it answers again nothing is missing.
* While no gateway answers, time stands still here: all estimates stay as they are, for as long as it lasts.
* A gateway that is gone (no longer asked) ages out of the window, while its successor's arrivals come in: their sum
  stays right through a rolling restart. One that comes back with the same instance id, after it was not Ready for a
  moment, goes on where it was: what it had counted before is no news.
* Of a gateway that is heard of for the first time, the counts so far are a rate only where they began within the
  window, or since the gateways were last asked, and then they began with zero when it started. Else they are a
  baseline: it may have been not Ready, or unreachable, for as long as it likes.
* Several gateways behind one address (a Service with one IP) answer in turns. Each is followed by its own id, so
  nothing counts twice, but what a turn missed is only seen at the next: such addresses are named (`shared`).
* Until one whole window has been seen, after a start of the operator, the demand of the plan in force stands in.

Requests in flight hold a service up: with L of them the rate is at least L per window. So a service without
replicas wakes by its first waiting request, and one is not put to sleep under a request longer than the window.
While a service's first engines start (`starting`) its demand is no less than what they are started for: an engine takes
longer to start than clients wait, and would be taken away again before it ever answered.

The only state is what the gateways can tell again; losing it costs one window of the plan's own demand.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmfleet.api import Buckets, DemandReport, LLMService, ServicePlan

SHAPE_WINDOWS = 5
"""Time constant, in windows, with which completed requests are forgotten for the split over output buckets."""
SAMPLES_PER_WINDOW = 12
"""Samples that are kept per gateway and window; polls in between replace the newest one."""

_Counts = tuple[int, ...]
_Series = tuple[str, _Counts, _Counts]
"""Service key and bucket edges: counts of other edges are another series."""


@dataclass(slots=True)
class _Sample:
    at_s: float
    arrived: dict[_Series, _Counts]


@dataclass(slots=True)
class _Gateway:
    """What one gateway process (one `instanceId`) said."""

    instance_id: str
    samples: deque[_Sample]
    completed: dict[_Series, _Counts]
    in_flight: dict[_Series, int] = field(default_factory=dict)
    asked: bool = True
    takes_turns: bool = False
    """Not asked only because others answered at its address."""

    @property
    def last_s(self) -> float:
        return self.samples[-1].at_s


class DemandEstimator:
    """Accumulates reports; all times are seconds of one monotonic clock that the caller reads."""

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._clock_s = -math.inf
        self._started_s = math.inf
        self._gateways: dict[str, _Gateway] = {}
        self._gone: list[_Gateway] = []
        self._shared: set[str] = set()
        self._completed: dict[_Series, list[float]] = {}
        self._seen_s: dict[_Series, float] = {}

    @property
    def shared(self) -> frozenset[str]:
        """Names among those asked behind which more than one gateway was heard in turns."""
        return frozenset(self._shared)

    def record(self, reports: Mapping[str, DemandReport | None], now_s: float) -> None:
        """One round of polls: every gateway that exists, by any stable name, None where it did not answer."""
        answered = {name: report for name, report in reports.items() if report is not None}
        self._shared &= reports.keys()
        if not answered:
            return
        elapsed_s = max(0.0, now_s - self._clock_s)
        news_s = max(self.window_s, elapsed_s if math.isfinite(elapsed_s) else 0.0)
        self._clock_s = max(self._clock_s, now_s)
        self._started_s = min(self._started_s, now_s)
        self._forget_completions(elapsed_s)
        for name, gateway in list(self._gateways.items()):
            gateway.asked = name in reports
            if not gateway.asked:
                self._gone.append(self._gateways.pop(name))
        # One gateway under two names is still one.
        by_instance = {report.instance_id: name for name, report in reversed(answered.items())}
        for name, report in answered.items():
            if by_instance[report.instance_id] != name:
                continue
            self._record_one(name, report, news_s)
        self._gone = [gateway for gateway in self._gone if gateway.last_s > self._clock_s - self.window_s]

    def estimate(
        self,
        services: Iterable[LLMService],
        buckets: Mapping[str, Buckets],
        plans: Mapping[str, ServicePlan],
        starting: Collection[str] = (),
    ) -> dict[str, list[float]]:
        """Requests per second by bucket, by service key.

        `buckets` are the edges of each service's profile, `plans` the plans in force, both by service key; `starting`
        are the keys of services that have no Ready engine yet but one that may still become so in time. A service
        is absent where nothing was measured, so that the values of its own traffic specification count.
        """
        return {
            service.key: rates
            for service in services
            if (edges := buckets.get(service.key)) is not None
            and (rates := self._estimate_one(service, edges, plans.get(service.key), service.key in starting))
            is not None
        }

    def _estimate_one(
        self, service: LLMService, edges: Buckets, plan: ServicePlan | None, starting: bool
    ) -> list[float] | None:
        series = _series(service.key, edges)
        measured = self._measured_rates(series, service, edges, plan)
        specified = service.spec.traffic.requests_per_second
        if plan is not None and (starting or self._clock_s - self._started_s < self.window_s):
            stand_in = _rebucket(plan.demand, plan.buckets, edges)
            return stand_in if sum(stand_in) >= sum(measured) else measured
        seen_s = self._clock_s - self._seen_s.get(series, math.inf)
        if specified is not None and seen_s < self.window_s and sum(measured) <= specified:
            return None
        return measured

    def _measured_rates(
        self, series: _Series, service: LLMService, edges: Buckets, plan: ServicePlan | None
    ) -> list[float]:
        """What the gateways' counts say, by bucket, no less than what requests in flight ask for."""
        by_input, in_flight = self._measured(series, len(edges.input_tokens))
        floor, total = in_flight / self.window_s, sum(by_input)
        if total < floor:
            mix = by_input if total > 0 else self._input_mix(series, service, edges, plan)
            by_input = [floor * part / sum(mix) for part in mix]
        return self._spread(by_input, series, service, edges, plan)

    def _record_one(self, name: str, report: DemandReport, news_s: float) -> None:
        """Takes in one report. A gateway that is new here and started no more than `news_s` seconds ago began with
        zero counts then; of an older one, or one that does not say, the first counts are only a baseline."""
        arrived: dict[_Series, _Counts] = {}
        completed: dict[_Series, _Counts] = {}
        in_flight: dict[_Series, int] = {}
        for demand in report.services:
            edges = demand.buckets
            if len(demand.arrived) != len(edges.input_tokens) or len(demand.completed) != edges.count:
                continue
            series = _series(f"{demand.namespace}/{demand.service}", edges)
            arrived[series], completed[series] = tuple(demand.arrived), tuple(demand.completed)
            in_flight[series] = demand.waiting + demand.running
            if in_flight[series] or any(demand.arrived):
                self._seen_s.setdefault(series, self._clock_s)
        gateway = self._gateways.get(name)
        if gateway is not None and gateway.instance_id != report.instance_id:
            gateway.asked = False
            # A process never takes its id up again: one that is back under this name was only not reached.
            if any(gone.instance_id == report.instance_id for gone in self._gone):
                self._shared.add(name)
            gateway.takes_turns = name in self._shared
            self._gone.append(gateway)
            gateway = None
        if gateway is None:
            gateway = self._taken_from_elsewhere(report.instance_id)
            if gateway is not None:
                gateway.asked, gateway.takes_turns = True, False
                self._gateways[name] = gateway
        if gateway is None:
            samples = deque([_Sample(self._clock_s, arrived)])
            if report.uptime_seconds is not None and report.uptime_seconds <= news_s:
                samples.appendleft(_Sample(self._clock_s - report.uptime_seconds, {}))
            self._gateways[name] = _Gateway(report.instance_id, samples, completed, in_flight)
            for series, counts in completed.items():
                self._add_completions(series, counts)
            return
        for series, counts in completed.items():
            before = gateway.completed.get(series)
            self._add_completions(series, _difference(counts, before))
        gateway.completed, gateway.in_flight = completed, in_flight
        _append(gateway.samples, _Sample(self._clock_s, _shared(arrived, gateway.samples[-1].arrived)), self.window_s)

    def _taken_from_elsewhere(self, instance_id: str) -> _Gateway | None:
        """A gateway that is known under another name or was gone, no longer kept there."""
        for name, gateway in self._gateways.items():
            if gateway.instance_id == instance_id:
                return self._gateways.pop(name)
        for index, gateway in enumerate(self._gone):
            if gateway.instance_id == instance_id:
                return self._gone.pop(index)
        return None

    def _measured(self, series: _Series, inputs: int) -> tuple[list[float], int]:
        """(arrivals per second by input bucket, requests in flight), over all gateways."""
        rates, in_flight = [0.0] * inputs, 0
        for gateway in (*self._gateways.values(), *self._gone):
            end_s = gateway.last_s if gateway.asked else self._clock_s
            in_flight += gateway.in_flight.get(series, 0) if gateway.asked or gateway.takes_turns else 0
            first = _count_at(gateway.samples, series, end_s - self.window_s, inputs)
            last = gateway.samples[-1].arrived.get(series, (0,) * inputs)
            for index, (start, end) in enumerate(zip(first, last, strict=True)):
                rates[index] += max(0.0, end - start) / self.window_s
        return rates, in_flight

    def _spread(
        self,
        by_input: Sequence[float],
        series: _Series,
        service: LLMService,
        edges: Buckets,
        plan: ServicePlan | None,
    ) -> list[float]:
        """Splits arrivals of each input bucket over the output buckets."""
        columns = len(edges.output_tokens)
        sources = (
            self._completed.get(series),
            _rebucket(plan.demand, plan.buckets, edges) if plan is not None else None,
            _sizes(service, edges),
        )
        rates: list[float] = []
        for row, rate in enumerate(by_input):
            shape = [1.0] * columns
            for source in sources:
                candidate = source[row * columns : (row + 1) * columns] if source is not None else []
                if sum(candidate) > 0:
                    shape = list(candidate)
                    break
            rates += [rate * part / sum(shape) for part in shape]
        return rates

    def _input_mix(
        self, series: _Series, service: LLMService, edges: Buckets, plan: ServicePlan | None
    ) -> Sequence[float]:
        """Where requests are put that are in flight but arrived before the window: the best known input mix."""
        columns = len(edges.output_tokens)
        sources: tuple[Sequence[float] | None, ...] = (
            self._arrived_ever(series, len(edges.input_tokens)),
            _rows(self._completed.get(series), columns),
            _rows(_rebucket(plan.demand, plan.buckets, edges) if plan is not None else None, columns),
            _rows(_sizes(service, edges), columns),
        )
        return next((mix for mix in sources if mix is not None and sum(mix) > 0), [1.0] * len(edges.input_tokens))

    def _arrived_ever(self, series: _Series, inputs: int) -> list[float]:
        total = [0.0] * inputs
        for gateway in self._gateways.values():
            for index, count in enumerate(gateway.samples[-1].arrived.get(series, ())):
                total[index] += count
        return total

    def _add_completions(self, series: _Series, counts: Sequence[float]) -> None:
        if any(counts):
            before = self._completed.get(series, [0.0] * len(counts))
            self._completed[series] = [old + new for old, new in zip(before, counts, strict=True)]

    def _forget_completions(self, elapsed_s: float) -> None:
        keep = math.exp(-elapsed_s / (SHAPE_WINDOWS * self.window_s)) if math.isfinite(elapsed_s) else 1.0
        for counts in self._completed.values():
            counts[:] = [count * keep for count in counts]


def _series(key: str, edges: Buckets) -> _Series:
    return key, tuple(edges.input_tokens), tuple(edges.output_tokens)


def _append(samples: deque[_Sample], sample: _Sample, window_s: float) -> None:
    """Keeps about SAMPLES_PER_WINDOW samples, and one from before the window."""
    if len(samples) > 1 and sample.at_s - samples[-2].at_s < window_s / SAMPLES_PER_WINDOW:
        samples.pop()
    samples.append(sample)
    while len(samples) > 2 and samples[1].at_s <= sample.at_s - window_s:
        samples.popleft()


def _shared(arrived: dict[_Series, _Counts], before: dict[_Series, _Counts]) -> dict[_Series, _Counts]:
    """`arrived`, or the very object of before where nothing arrived: idle services cost no memory."""
    return before if arrived == before else arrived


def _count_at(samples: Sequence[_Sample], series: _Series, at_s: float, inputs: int) -> Sequence[float]:
    """The cumulative counts at a time, interpolated; the first sample's where the time lies before it."""
    none = (0,) * inputs
    after = next((i for i, sample in enumerate(samples) if sample.at_s >= at_s), len(samples) - 1)
    later = samples[after]
    counts = later.arrived.get(series, none)
    if after == 0:
        return counts
    earlier = samples[after - 1]
    span_s = later.at_s - earlier.at_s
    share = min(1.0, (at_s - earlier.at_s) / span_s) if span_s > 0 else 1.0
    return [a + (b - a) * share for a, b in zip(earlier.arrived.get(series, none), counts, strict=True)]


def _difference(now: Sequence[int], before: Sequence[int] | None) -> list[float]:
    """What came on top; all of it where the counts began anew."""
    if before is None or any(a < b for a, b in zip(now, before, strict=True)):
        return [float(count) for count in now]
    return [float(a - b) for a, b in zip(now, before, strict=True)]


def _rows(cells: Sequence[float] | None, columns: int) -> list[float] | None:
    """Sums over the output buckets."""
    return [sum(cells[i : i + columns]) for i in range(0, len(cells), columns)] if cells is not None else None


def _rebucket(demand: Sequence[float], old: Buckets, new: Buckets) -> list[float]:
    """Demand by the buckets of another profile: each old bucket goes where its upper corner falls."""
    moved = [0.0] * new.count
    for bucket, rate in enumerate(demand[: old.count]):
        moved[new.index(*old.edges(bucket))] += rate
    return moved


def _sizes(service: LLMService, edges: Buckets) -> list[float] | None:
    """Weights by bucket of the sizes that the user gave."""
    if service.spec.traffic.sizes is None:
        return None
    weights = [0.0] * edges.count
    for size in service.spec.traffic.sizes:
        weights[edges.index(size.input_tokens, size.output_tokens)] += size.share
    return weights
