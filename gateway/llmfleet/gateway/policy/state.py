"""One service as the policy knows it: its table, its replicas, and what its requests have shown.

    Service (a new table, other engines) --take--> replicas that stay keep their counts, health and reports
    bucket, now --options--> the variants that may get a request, weighed
    reports --hear--> replicas; those that have grown old are forgotten

A variant's share of a bucket counts only as far as its planned replicas are there (two of four ready: half of it, the
rest goes to the others), so that a plan that is still being carried out does not overload its first replica. If none
of a bucket's variants has an engine, every engine of the service counts: late is better than never.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from llmfleet.api import ServiceDemand, VariantLoad
from llmfleet.api.routing import RoutedVariant
from llmfleet.gateway.fleet import Service
from llmfleet.gateway.policy.demand import DemandCount
from llmfleet.gateway.policy.prefix import BLOCK_CHARS, MOST_REMEMBERED, Chain, PrefixMemory
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.reports import EngineReport
from llmfleet.gateway.policy.reschedule import ReplicaLoad
from llmfleet.gateway.policy.sizes import SizeModel
from llmfleet.gateway.policy.split import Split

PRESSED_UNSTARTED = 8.0
"""Requests without a first token per replica from which a variant counts as pressed."""
PRESSED_RATIO = 2.0
"""A pressed variant is passed over if another has less than 1/this of its unstarted requests per replica."""
SHARED = 0.1
"""Others' requests per own one from which replicas count as shared."""


class VariantState:
    """A variant's replicas."""

    __slots__ = ("open", "replicas", "shared", "spec")

    def __init__(self, spec: RoutedVariant, replicas: list[Replica]) -> None:
        self.spec = spec
        self.replicas = replicas
        self.open = [replica for replica in replicas if replica.engine.leaving is None]
        """Those that may get new requests: engines that leave only finish what they have."""
        self.shared = False
        """Whether others, too, send to these replicas."""

    def note_shared(self) -> None:
        """After a change of reports. A few that a report knows and this gateway does not have just ended or moved."""
        others = sum(one.others.in_flight for one in self.replicas)
        self.shared = others > SHARED * sum(one.in_flight for one in self.replicas)

    def weight(self, fraction: float, ready: int) -> float:
        """A bucket's fraction as far as replicas are there."""
        return fraction * min(1.0, ready / max(1, self.spec.replicas))


class ServiceState:
    """One service with everything that was learnt about it."""

    def __init__(self, service: Service) -> None:
        self.demand = DemandCount(service.table.buckets)
        self.sizes = SizeModel(service.table.buckets)
        self.splits: defaultdict[int, Split[str]] = defaultdict(Split)
        self.replicas: dict[str, Replica] = {}
        self.prefixes: PrefixMemory[Replica] = PrefixMemory()
        self.failing: set[Replica] = set()
        """Replicas that failed last."""
        self._stale_s = math.inf  # when the first of the reports grows too old
        self._load_before_s: defaultdict[str, float] = defaultdict(float)  # request seconds of engines that are gone
        self._options: dict[int, Mapping[str, float]] = {}  # by bucket, while nothing fails
        self.take(service)

    def take(self, service: Service) -> None:
        """Adopts a new table or engine list; in-flight counts and health of engines that stay are kept."""
        table = service.table
        self.service = service
        self.objective = table.objective
        if table.buckets != self.demand.buckets:
            self.demand.rebucket(table.buckets)
            self.sizes = SizeModel(table.buckets)
            self.splits.clear()
        known = self.replicas
        self.replicas = {}
        by_variant: defaultdict[str, list[Replica]] = defaultdict(list)
        fits = {spec.name: spec.latency for spec in table.variants}
        for engine in service.engines:
            replica = known.get(engine.id) or Replica(engine)
            replica.adopt(engine, fits.get(engine.variant))
            self.replicas[engine.id] = replica
            by_variant[engine.variant].append(replica)
        for gone in known.keys() - self.replicas.keys():
            self._load_before_s[known[gone].engine.variant] += known[gone].load_s
            self.prefixes.forget(known[gone])
        self.failing = {replica for replica in self.failing if self.replicas.get(replica.engine.id) is replica}
        self.variants = {spec.name: VariantState(spec, by_variant[spec.name]) for spec in table.variants}
        self._note_shared()
        self.routes: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
        for route in table.routes:
            if route.fraction > 0.0 and route.variant in self.variants:
                self.routes[route.bucket].append((route.variant, route.fraction))
        self._options.clear()
        for split in self.splits.values():
            split.forget(self.variants)

    def remember(self, replica: Replica, chain: Chain) -> None:
        """A prompt goes to a replica, which keeps as much as its KV cache holds."""
        if chain:
            held = replica.kv_tokens * self.sizes.bytes_per_token / BLOCK_CHARS
            self.prefixes.sent(replica, chain, int(held) if held else MOST_REMEMBERED)

    # Who may get a request

    def ready(self, name: str, now: float) -> list[Replica]:
        """Replicas of a variant that may get a request now."""
        replicas = self.variants[name].open
        return [one for one in replicas if one.available(now)] if self.failing else replicas

    def options(self, bucket: int, now: float) -> Mapping[str, float]:
        """Variants that may get a request of a bucket, with their weights; empty while there is no engine."""
        if self.failing:
            return self._weighed(bucket, now)
        known = self._options.get(bucket)
        if known is None:
            known = self._options[bucket] = self._weighed(bucket, now)
        return known

    def _weighed(self, bucket: int, now: float) -> Mapping[str, float]:
        ready = {name: len(self.ready(name, now)) for name in self.variants}
        planned = {
            name: self.variants[name].weight(fraction, ready[name])
            for name, fraction in self.routes.get(bucket, ())
            if ready[name]
        }
        return planned or {name: float(count) for name, count in ready.items() if count}

    def less_pressed(self, name: str, options: Mapping[str, float], now: float) -> str | None:
        """Where a request goes instead if variant `name` has a queue that the plan did not foresee while another of
        the options has clearly less; None if it has none, or all have."""
        if len(options) < 2:
            return None
        unstarted = {}
        for option in options:
            replicas = self.ready(option, now)
            unstarted[option] = sum(replica.unstarted for replica in replicas) / len(replicas)
        if unstarted[name] <= max(PRESSED_UNSTARTED, PRESSED_RATIO * min(unstarted.values())):
            return None
        return min(unstarted, key=unstarted.__getitem__)

    def loads(self, name: str, revision: str, high: Mapping[str, int], now: float) -> list[ReplicaLoad]:
        """A variant's replicas of one revision, as the rescheduler sees them. `high`: requests of high priority by
        engine id."""
        variant = self.variants.get(name)
        return [
            ReplicaLoad(
                id=one.engine.id,
                running=one.in_flight + one.others.in_flight,
                waiting=one.unstarted,
                kv_tokens=one.kv_tokens,
                demand_tokens=one.kv_tokens - one.room_tokens if one.kv_tokens else 0.0,
                slope_ms=one.latency.tpot_ms_per_running,
                stay_ms=self.sizes.mean_output_tokens * one.pace_ms,
                high=high.get(one.engine.id, 0),
                open=one.engine.leaving is None and one.available(now),
            )
            for one in (variant.replicas if variant is not None else ())
            if one.engine.revision == revision
        ]

    # What engines say

    def hear(self, replica: Replica, report: EngineReport) -> None:
        """Takes in what an engine of the service says."""
        replica.hear(report, self.sizes.mean_prompt_tokens)
        self._stale_s = min(self._stale_s, replica.fresh_until_s)
        if (variant := self.variants.get(replica.engine.variant)) is not None:
            variant.note_shared()

    def forget_stale(self, now: float) -> None:
        """Drops reports that are too old."""
        if now < self._stale_s:
            return
        self._stale_s = math.inf
        for replica in self.replicas.values():
            replica.forget_stale(now)
            if replica.fresh_until_s > now:
                self._stale_s = min(self._stale_s, replica.fresh_until_s)
        self._note_shared()

    def _note_shared(self) -> None:
        for variant in self.variants.values():
            variant.note_shared()

    # What is reported

    def report(self, now: float, *, detail: bool) -> ServiceDemand:
        """What was demanded; `detail`: and of which size, and what engines took for it."""
        counts = self.demand.report(self.service.table.namespace, self.service.table.service)
        if not detail:
            return counts
        loads = {
            name: VariantLoad(
                engines=len(variant.replicas),
                request_seconds=self._load_before_s[name] + sum(replica.weigh(now) for replica in variant.replicas),
            )
            for name, variant in self.variants.items()
        }
        # A copy is not validated, which would take ten times as long as all of this.
        return counts.model_copy(
            update={"sizes": self.demand.sizes.report(), "observed": self.demand.observed.report(), "loads": loads}
        )
