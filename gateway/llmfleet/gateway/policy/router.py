"""The policy as the transport sees it: a request is admitted, assigned, and ends.

    admit -> assign -> started -> completed
               |  ^       |
               |  +-------+-- failed (the engine is to blame) or unassigned (nobody is): assign again
               +-- None: no engine; the transport waits and asks again
    and at any point: abandoned; while it runs: moved to another engine (elsewhere says which)

The variant comes from the table x of the plan, through the bucket's `Split`, its shares corrected by what is there
(`state`); the replica is the one with the least predicted latency (`choice`). Where even that is predicted to break the
objective and a replica of another variant is predicted to keep it, the request *spills over*; the split is charged for
it. Without an objective a variant whose replicas hold many requests without a first token is passed over while another
of the bucket's variants has clearly less.

With an objective a request is held back (`holding`) where every replica that may get it has enough to do: `assign`
gives None, and the split is not charged.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from llmfleet.api import DemandReport, Part
from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.policy.choice import NO_HITS, keeps, least_latency, two_of
from llmfleet.gateway.policy.holding import LOOK_AGAIN_S, has_place
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.reports import EngineReport
from llmfleet.gateway.policy.sizes import Prediction, RequestShape, Usage
from llmfleet.gateway.policy.split import Split
from llmfleet.gateway.policy.state import ServiceState

SPILL_WITHIN = 0.8
"""Share of the objective within which a request must be predicted to stay elsewhere: what is spilled must not come
back."""
_NO_WORK = Prediction(0.0, 0.0)


class Ticket:
    """One admitted request on its way through the policy. Opaque to the transport but for the read-only parts."""

    __slots__ = (
        "_first_s",
        "_load_s",
        "_moved",
        "_sent_s",
        "_state",
        "arrived_s",
        "prediction",
        "replica",
        "shape",
        "started",
    )

    def __init__(self, state: ServiceState, shape: RequestShape, prediction: Prediction, arrived_s: float) -> None:
        self._state = state
        self.arrived_s = arrived_s
        """Clock time at which it was admitted."""
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

    @property
    def bucket(self) -> int:
        """Bucket of its predicted size. Where one request of a bucket finds no engine, no other does."""
        prediction = self.prediction
        return self._state.demand.buckets.index(prediction.prompt_tokens, prediction.output_tokens)


class Router:
    """All services of the fleet. Not thread-safe: one event loop owns it."""

    def __init__(self, clock: Callable[[], float], instance_id: str) -> None:
        """`clock` gives monotonic seconds; `instance_id` must differ whenever counts start from zero."""
        self._clock = clock
        self._started_s = clock()
        self._instance_id = instance_id
        self._states: dict[str, ServiceState] = {}
        self._sequence = 0
        self._drawn = random.Random(instance_id)

    def update(self, fleet: Fleet) -> None:
        """Adopts a snapshot. Counts of services that are gone are dropped with them."""
        for key, service in fleet.services.items():
            state = self._states.get(key)
            if state is None:
                self._states[key] = ServiceState(service)
            elif state.service is not service:
                state.take(service)
        for key in self._states.keys() - fleet.services.keys():
            del self._states[key]

    def report(self, engine_id: str, report: EngineReport) -> None:
        """Takes in what an engine says of itself. Of an engine that is not in the fleet nothing is kept."""
        for state in self._states.values():
            if (replica := state.replicas.get(engine_id)) is not None:
                state.hear(replica, report)

    def prompt_tokens(self, service_key: str, shape: RequestShape) -> float:
        """Estimated length of a prompt. Raises KeyError for a service that is not in the fleet."""
        return self._states[service_key].sizes.prompt_tokens(shape) if shape.counted else 0.0

    def admit(self, service_key: str, shape: RequestShape) -> Ticket:
        """Counts an arrival. Raises KeyError for a service that is not in the fleet."""
        state = self._states[service_key]
        prediction = state.sizes.predict(shape) if shape.counted else _NO_WORK
        if shape.counted:
            state.demand.arrived[state.demand.buckets.input_index(prediction.prompt_tokens)] += 1
        state.demand.waiting += 1
        return Ticket(state, shape, prediction, self._clock())

    def assign(self, ticket: Ticket, *, batch: bool = False) -> Engine | None:
        """The engine that a waiting request should go to; None while there is none that has a place for it.

        `batch`: it may only have what would be idle otherwise.
        """
        state, now = ticket._state, self._clock()
        state.forget_stale(now)
        prediction = ticket.prediction
        bucket = ticket.bucket
        options = state.options(bucket, now)
        if not options:
            return None
        if not ticket.shape.counted:
            replica = self._best_of(state, max(options, key=options.__getitem__), prediction, now)
        elif state.service.table.objective is None:
            replica = self._chosen(state, bucket, options, prediction, now)
        else:
            places = _Places(state, options, ticket, now, batch=batch)
            if not places.any():
                return None
            replica = places.instead_of(self._chosen(state, bucket, options, prediction, now), state.splits[bucket])
        self._sequence += 1
        replica.last_used = self._sequence
        replica.send(ticket, prediction.prompt_tokens, now)
        replica.probing = replica.failures > 0
        ticket.replica = replica
        ticket._sent_s, ticket._load_s = now, replica.weigh(now, max(1, ticket.shape.sequences))
        state.demand.waiting -= 1
        state.demand.running += 1
        return replica.engine

    def _chosen(
        self, state: ServiceState, bucket: int, options: Mapping[str, float], prediction: Prediction, now: float
    ) -> Replica:
        split, objective = state.splits[bucket], state.service.table.objective
        name = split.pick(options)
        replica = self._best_of(state, name, prediction, now)
        if objective is None:
            other = state.less_pressed(name, options, now) if replica.unstarted else None
            if other is None:
                return replica
            split.instead(name, other)
            return self._best_of(state, other, prediction, now)
        if len(state.variants) < 2 or keeps(objective, replica, prediction, now):
            return replica
        # The bucket's own variants first, the one that is most behind its share before the others.
        others = sorted((one for one in options if one != name), key=split.credit, reverse=True)
        for other in (*others, *(one for one in state.variants if one not in options)):
            if state.ready(other, now):
                candidate = self._best_of(state, other, prediction, now)
                if keeps(objective, candidate, prediction, now, SPILL_WITHIN):
                    split.instead(name, other)
                    return candidate
        return replica

    def _best_of(self, state: ServiceState, name: str, prediction: Prediction, now: float) -> Replica:
        ready: Sequence[Replica] = state.ready(name, now)
        if state.variants[name].shared:
            ready = two_of(ready, NO_HITS, self._drawn)
        return least_latency(ready, prediction.prompt_tokens, prediction.output_tokens, now)

    def look_again_s(self, service_key: str) -> float | None:
        """Seconds until time alone may make a place for a request that waits; None: something has to happen first."""
        state = self._states.get(service_key)
        if state is None:
            return None
        ejected_s = self.retry_after(service_key)
        if state.service.table.objective is None or not state.replicas:
            return ejected_s
        return LOOK_AGAIN_S if ejected_s is None else min(LOOK_AGAIN_S, ejected_s)

    def started(self, ticket: Ticket) -> None:
        """The engine gave its first token (or the whole answer): it works."""
        replica = _running(ticket)
        if not ticket.started:
            ticket.started = True
            ticket._first_s = self._clock()
            replica.start(ticket, ticket._first_s)
        if replica.failures:
            replica.restore()
            ticket._state.failing.discard(replica)

    def failed(self, ticket: Ticket) -> None:
        """The engine failed before its first token: it is ejected for a while, and the request waits again."""
        now = self._clock()
        self._eject(ticket, now)
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

    def unassigned(self, ticket: Ticket) -> None:
        """The engine is not to go on with the request, of which nothing has come: it waits again."""
        self._leave(ticket, self._clock())
        ticket._state.demand.waiting += 1

    def elsewhere(
        self, ticket: Ticket, tried: Collection[str] = (), coming: Mapping[str, int] | None = None
    ) -> Engine | None:
        """The engine that a running request should move to; None where there is none.

        Of its service and revision, not among the ids `tried`; of its own variant where one is left, since KV seldom
        fits another. `coming`: requests that move to an engine already and are not counted there yet.
        """
        state, now, coming = ticket._state, self._clock(), coming or {}
        source = _running(ticket).engine
        best: tuple[tuple[bool, bool, float, int], Engine] | None = None
        for name in state.variants:
            for replica in state.ready(name, now):
                engine = replica.engine
                if engine.id == source.id or engine.id in tried or engine.revision != source.revision:
                    continue
                more = coming.get(engine.id, 0)
                pace_ms = replica.pace_ms + replica.latency.tpot_ms_per_running * more
                full = replica.room_tokens < ticket.prediction.prompt_tokens
                rank = (name != source.variant, full, pace_ms, replica.in_flight + more)
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
        replica.send(ticket, ticket.prediction.prompt_tokens, now)
        if started:
            replica.start(ticket, now)
        replica.weigh(now, sequences)
        ticket.replica, ticket.started, ticket._moved = replica, started, True
        ticket._state.demand.running += 1

    def engine_lost(self, ticket: Ticket) -> None:
        """The engine died under a running request that may go on elsewhere: it is ejected for a while."""
        self._eject(ticket, self._clock())

    def broke(self, ticket: Ticket) -> None:
        """The engine died after its first token; the request cannot be repeated and ends."""
        now = self._clock()
        self._eject(ticket, now)
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
    def _eject(ticket: Ticket, now: float) -> None:
        replica = _running(ticket)
        replica.eject(now)
        ticket._state.failing.add(replica)

    @staticmethod
    def _leave(ticket: Ticket, now: float) -> None:
        replica = _running(ticket)
        replica.leave(ticket, ticket.prediction.prompt_tokens, now)
        replica.weigh(now, -max(1, ticket.shape.sequences))
        ticket.replica = None
        ticket.started = False
        ticket._state.demand.running -= 1


class _Places:
    """Where there is a place for a request: on the variants that may get it, or, where waiting for these is predicted
    to break the objective, on any that is predicted to keep it."""

    __slots__ = ("_batch", "_now", "_objective", "_options", "_prediction", "_state", "_variants", "_waited_ms")

    def __init__(
        self, state: ServiceState, options: Mapping[str, float], ticket: Ticket, now: float, *, batch: bool
    ) -> None:
        """Raises ValueError where the service has no objective: then nothing is held back."""
        objective = state.service.table.objective
        if objective is None:
            raise ValueError("the service has no objective")
        self._state = state
        self._options = options
        self._prediction = ticket.prediction
        self._objective = objective
        self._now = now
        self._batch = batch
        self._waited_ms = (now - ticket.arrived_s) * 1e3
        self._variants: Collection[str] = options

    def _free(self, name: str) -> Iterator[Replica]:
        prediction, now = self._prediction, self._now
        for replica in self._state.ready(name, now):
            if has_place(replica, prediction, self._objective, now, batch=self._batch) and (
                name in self._options or keeps(self._objective, replica, prediction, now, SPILL_WITHIN)
            ):
                yield replica

    def any(self) -> bool:
        """Whether there is one."""
        if self._any():
            return True
        if self._batch or len(self._state.variants) == len(self._options) or not self._late():
            return False
        self._variants = self._state.variants
        return self._any()

    def _any(self) -> bool:
        return any(True for name in self._variants for _ in self._free(name))

    def _late(self) -> bool:
        size, now = self._prediction, self._now
        replicas = (replica for name in self._options for replica in self._state.ready(name, now))
        least_ms = min(replica.ttft_ms(size.prompt_tokens, size.output_tokens, now) for replica in replicas)
        return self._waited_ms + least_ms > self._objective.ttft.milliseconds

    def instead_of(self, replica: Replica, split: Split[str]) -> Replica:
        """The replica if it has a place; else the best of its variant that has, or of another one."""
        prediction = self._prediction
        if has_place(replica, prediction, self._objective, self._now, batch=self._batch):
            return replica
        chosen = replica.engine.variant
        names = sorted(self._variants, key=lambda one: (one != chosen, one not in self._options, -split.credit(one)))
        for name in names:
            free = list(self._free(name))
            if free:
                if name != chosen:
                    split.instead(chosen, name)
                return least_latency(free, prediction.prompt_tokens, prediction.output_tokens, self._now)
        return replica


def _running(ticket: Ticket) -> Replica:
    if ticket.replica is None:
        raise RuntimeError("the ticket is not assigned to an engine")
    return ticket.replica
