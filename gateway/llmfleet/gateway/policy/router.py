"""The policy as the transport sees it: a request is admitted, assigned, and ends.

    admit -> assign -> started -> completed
               |  ^       |
               |  +-------+-- failed (the engine is to blame) or unassigned (nobody is): assign again
               +-- None: no engine; the transport waits and asks again
    and at any point: abandoned; while it runs: moved to another engine (elsewhere says which)

The variant comes from the table x of the plan, through the bucket's `Split`, with two corrections. A variant's share
counts only as far as its planned replicas are there (two of four ready: half of it, the rest goes to the others), so
that a plan that is still being carried out does not overload its first replica. And a variant whose replicas hold
many requests without a first token, a queue that the plan did not foresee, is passed over while another of the
bucket's variants has clearly less. If none of a bucket's variants has an engine, every engine of the service counts:
late is better than never.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from llmfleet.api import DemandReport, Part, ServiceDemand, VariantLoad
from llmfleet.api.routing import RoutedVariant
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.policy.demand import DemandCount
from llmfleet.gateway.policy.replicas import Replica, least_latency
from llmfleet.gateway.policy.sizes import Prediction, RequestShape, SizeModel, Usage
from llmfleet.gateway.policy.split import Split

PRESSED_UNSTARTED = 8.0
"""Requests without a first token per replica from which a variant counts as pressed."""
PRESSED_RATIO = 2.0
"""A pressed variant is passed over if another has less than 1/this of its unstarted requests per replica."""


_NO_WORK = Prediction(0.0, 0.0)


class _Variant:
    __slots__ = ("replicas", "spec")

    def __init__(self, spec: RoutedVariant, replicas: list[Replica]) -> None:
        self.spec = spec
        self.replicas = replicas

    def available(self, now: float) -> list[Replica]:
        return [
            replica
            for replica in self.replicas
            if replica.engine.leaving is None and (replica.failures == 0 or replica.available(now))
        ]


class _ServiceState:
    """One service with everything that was learnt about it."""

    def __init__(self, service: Service) -> None:
        self.demand = DemandCount(service.table.buckets)
        self.sizes = SizeModel(service.table.buckets)
        self.splits: defaultdict[int, Split[str]] = defaultdict(Split)
        self.replicas: dict[str, Replica] = {}
        self._load_before_s: defaultdict[str, float] = defaultdict(float)
        """What engines that are gone have had, in request seconds by variant."""
        self.take(service)

    def take(self, service: Service) -> None:
        """Adopts a new table or engine list; in-flight counts and health of engines that stay are kept."""
        table = service.table
        self.service = service
        if table.buckets != self.demand.buckets:
            self.demand.rebucket(table.buckets)
            self.sizes = SizeModel(table.buckets)
            self.splits.clear()
        known = self.replicas
        self.replicas = {}
        for engine in service.engines:
            replica = self.replicas[engine.id] = known.get(engine.id) or Replica(engine)
            replica.engine = engine
        for gone in known.keys() - self.replicas.keys():
            self._load_before_s[known[gone].engine.variant] += known[gone].load_s
        by_variant: defaultdict[str, list[Replica]] = defaultdict(list)
        for replica in self.replicas.values():
            by_variant[replica.engine.variant].append(replica)
        self.variants = {spec.name: _Variant(spec, by_variant[spec.name]) for spec in table.variants}
        self.routes: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
        for route in table.routes:
            if route.fraction > 0.0 and route.variant in self.variants:
                self.routes[route.bucket].append((route.variant, route.fraction))
        for split in self.splits.values():
            split.forget(self.variants)

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


class Ticket:
    """One admitted request on its way through the policy. Opaque to the transport but for the read-only parts."""

    __slots__ = ("_first_s", "_load_s", "_moved", "_sent_s", "_state", "prediction", "replica", "shape", "started")

    def __init__(self, state: _ServiceState, shape: RequestShape, prediction: Prediction) -> None:
        self._state = state
        self.shape = shape
        self.prediction = prediction
        self.replica: Replica | None = None
        """Where it runs; None while it waits."""
        self.started = False
        """Whether its first token has come."""
        self._sent_s = 0.0
        self._first_s = 0.0
        self._load_s = 0.0
        """What its engine's `load_s` was when it was sent."""
        self._moved = False
        """Whether more than one engine worked on it, so that its times are nobody's."""


class Router:
    """All services of the fleet. Not thread-safe: one event loop owns it."""

    def __init__(self, clock: Callable[[], float], instance_id: str) -> None:
        """`clock` gives monotonic seconds; `instance_id` must differ whenever counts start from zero."""
        self._clock = clock
        self._started_s = clock()
        self._instance_id = instance_id
        self._states: dict[str, _ServiceState] = {}
        self._sequence = 0

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot. Counts of services that are gone are dropped with them."""
        for key, service in fleet.services.items():
            state = self._states.get(key)
            if state is None:
                self._states[key] = _ServiceState(service)
            elif state.service is not service:
                state.take(service)
        for key in self._states.keys() - fleet.services.keys():
            del self._states[key]

    def admit(self, service_key: str, shape: RequestShape) -> Ticket:
        """Counts an arrival. Raises KeyError for a service that is not in the fleet."""
        state = self._states[service_key]
        prediction = state.sizes.predict(shape) if shape.counted else _NO_WORK
        if shape.counted:
            state.demand.arrived[state.demand.buckets.input_index(prediction.prompt_tokens)] += 1
        state.demand.waiting += 1
        return Ticket(state, shape, prediction)

    def assign(self, ticket: Ticket) -> Engine | None:
        """The engine that a waiting request should go to; None while there is none."""
        state, now = ticket._state, self._clock()
        prediction = ticket.prediction
        bucket = state.demand.buckets.index(prediction.prompt_tokens, prediction.output_tokens)
        candidates = {name: variant.available(now) for name, variant in state.variants.items()}
        weights: dict[str, float] = {}
        for name, fraction in state.routes.get(bucket, ()):
            if ready := len(candidates[name]):
                weights[name] = fraction * min(1.0, ready / max(1, state.variants[name].spec.replicas))
        if not weights:
            weights = {name: float(len(ready)) for name, ready in candidates.items() if ready}
        if not weights:
            return None
        if ticket.shape.counted:
            name = state.splits[bucket].pick(weights, _pressed(weights, candidates))
        else:
            name = max(weights, key=weights.__getitem__)
        latency = state.variants[name].spec.latency
        replica = least_latency(candidates[name], latency, prediction.prompt_tokens, prediction.output_tokens)
        self._sequence += 1
        replica.last_used = self._sequence
        replica.in_flight += 1
        replica.unstarted += 1
        replica.unstarted_tokens += prediction.prompt_tokens
        replica.probing = replica.failures > 0
        ticket.replica = replica
        ticket._sent_s, ticket._load_s = now, replica.weigh(now, max(1, ticket.shape.sequences))
        ticket._state.demand.waiting -= 1
        ticket._state.demand.running += 1
        return replica.engine

    def started(self, ticket: Ticket) -> None:
        """The engine gave its first token (or the whole answer): it works."""
        replica = _running(ticket)
        if not ticket.started:
            ticket.started = True
            ticket._first_s = self._clock()
            replica.unstarted -= 1
            replica.unstarted_tokens -= ticket.prediction.prompt_tokens
        replica.restore()

    def failed(self, ticket: Ticket) -> None:
        """The engine failed before its first token: it is ejected for a while, and the request waits again."""
        now = self._clock()
        _running(ticket).eject(now)
        self._leave(ticket, now)
        ticket._state.demand.waiting += 1

    def completed(self, ticket: Ticket, usage: Usage | None, *, timed: bool = False) -> None:
        """The answer is complete. Without `usage` the predicted size is counted and nothing is learnt.

        `timed`: `started` and this were called just when the engine gave its first and its last token.
        """
        state, prediction, demand = ticket._state, ticket.prediction, ticket._state.demand
        replica, now, sequences = _running(ticket), self._clock(), max(1, ticket.shape.sequences)
        timed = timed and ticket.started and not ticket._moved and now > ticket._sent_s
        self._leave(ticket, now)
        if not ticket.shape.counted:
            return
        if usage is None:
            bucket = demand.buckets.index(prediction.prompt_tokens, prediction.output_tokens)
        else:
            answer = usage.completion_tokens / sequences
            bucket = demand.buckets.index(usage.prompt_tokens, answer)
            state.sizes.learn(ticket.shape, usage)
            demand.sizes.add(bucket, usage.prompt_tokens, math.ceil(answer))
            if timed and sequences == 1:
                demand.observed.add(
                    replica.engine.variant,
                    bucket,
                    usage,
                    load=(replica.load_s - ticket._load_s) / (now - ticket._sent_s),
                    ttft_s=ticket._first_s - ticket._sent_s,
                    decode_s=now - ticket._first_s,
                )
        demand.completed[bucket] += 1

    def elsewhere(
        self, ticket: Ticket, tried: Collection[str] = (), coming: Mapping[str, int] | None = None
    ) -> Engine | None:
        """The engine that a running request should move to; None where there is none.

        Of its service and revision, not among the ids `tried`; of its own variant where one is left, since KV seldom
        fits another. `coming`: requests that move to an engine already and are not counted there yet.
        """
        state, now, coming = ticket._state, self._clock(), coming or {}
        source = _running(ticket).engine
        best: tuple[tuple[bool, float, int], Engine] | None = None
        for name, variant in state.variants.items():
            latency = variant.spec.latency
            for replica in variant.available(now):
                engine = replica.engine
                if engine.id == source.id or engine.id in tried or engine.revision != source.revision:
                    continue
                running = replica.in_flight + coming.get(engine.id, 0)
                tpot_ms = latency.tpot_base_ms + latency.tpot_ms_per_running * running
                rank = (name != source.variant, tpot_ms, running)
                if best is None or rank < best[0]:
                    best = rank, engine
        return None if best is None else best[1]

    def moved(self, ticket: Ticket, engine: Engine) -> None:
        """A running request goes on at this engine, from which its tokens come from now on."""
        now, sequences = self._clock(), max(1, ticket.shape.sequences)
        started = ticket.started
        self._leave(ticket, now)
        # An engine that discovery has just lost still has its stream.
        replica = ticket._state.replicas.get(engine.id) or Replica(engine)
        replica.in_flight += 1
        if not started:
            replica.unstarted += 1
            replica.unstarted_tokens += ticket.prediction.prompt_tokens
        replica.weigh(now, sequences)
        ticket.replica, ticket.started, ticket._moved = replica, started, True
        ticket._state.demand.running += 1

    def engine_lost(self, ticket: Ticket) -> None:
        """The engine died under a running request that may go on elsewhere: it is ejected for a while."""
        _running(ticket).eject(self._clock())

    def broke(self, ticket: Ticket) -> None:
        """The engine died after its first token; the request cannot be repeated and ends."""
        now = self._clock()
        _running(ticket).eject(now)
        self._leave(ticket, now)
        ticket._state.demand.abandoned += 1

    def abandoned(self, ticket: Ticket) -> None:
        """The request ends without an answer, and no engine is to blame for it."""
        if ticket.replica is None:
            ticket._state.demand.waiting -= 1
        else:
            # An abandoned probe has shown nothing: the next request probes.
            ticket.replica.probing = False
            self._leave(ticket, self._clock())
        ticket._state.demand.abandoned += 1

    def retry_after(self, service_key: str) -> float | None:
        """Seconds until an ejected engine of the service may be probed; None if none is ejected."""
        state = self._states.get(service_key)
        waits = [] if state is None else [r.retry_at for r in state.replicas.values() if r.failures and not r.probing]
        return max(0.0, min(waits) - self._clock()) if waits else None

    def ejected(self, service_key: str) -> int:
        """Engines of the service that are ejected now."""
        state = self._states.get(service_key)
        return 0 if state is None else sum(r.failures > 0 for r in state.replicas.values())

    def demand(self, detail: Part | None = None) -> DemandReport:
        """Cumulative demand of every service that has seen traffic, and sizes, observations and loads of those that
        `detail` holds."""
        now = self._clock()
        seen = [(key, state) for key, state in sorted(self._states.items()) if state.demand.seen]
        return DemandReport(
            instance_id=self._instance_id,
            uptime_seconds=now - self._started_s,
            services=[state.report(now, detail=detail is not None and detail.holds(key)) for key, state in seen],
        )

    @staticmethod
    def _leave(ticket: Ticket, now: float) -> None:
        replica = _running(ticket)
        replica.in_flight -= 1
        replica.weigh(now, -max(1, ticket.shape.sequences))
        if not ticket.started:
            replica.unstarted -= 1
            replica.unstarted_tokens -= ticket.prediction.prompt_tokens
        ticket.replica = None
        ticket.started = False
        ticket._state.demand.running -= 1


def _running(ticket: Ticket) -> Replica:
    if ticket.replica is None:
        raise RuntimeError("the ticket is not assigned to an engine")
    return ticket.replica


def _pressed(weights: dict[str, float], candidates: dict[str, list[Replica]]) -> list[str]:
    if len(weights) < 2:
        return []
    unstarted = {name: sum(r.unstarted for r in candidates[name]) / len(candidates[name]) for name in weights}
    ceiling = max(PRESSED_UNSTARTED, PRESSED_RATIO * min(unstarted.values()))
    return [name for name, waiting in unstarted.items() if waiting > ceiling]
