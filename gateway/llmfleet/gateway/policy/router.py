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
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from llmfleet.api import DemandReport, Part
from llmfleet.gateway.fleet import Engine, Fleet
from llmfleet.gateway.policy.choice import NO_HITS, SPILL_WITHIN, in_turn, least_latency, two_of
from llmfleet.gateway.policy.decision import decision_of
from llmfleet.gateway.policy.holding import LOOK_AGAIN_S
from llmfleet.gateway.policy.places import Places
from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.reports import EngineReport
from llmfleet.gateway.policy.reschedule import MoveCost, Stream, moves
from llmfleet.gateway.policy.sizes import Prediction, RequestShape, Usage
from llmfleet.gateway.policy.state import ServiceState
from llmfleet.gateway.policy.ticket import Ticket

HOLDERS = 2
"""Replicas that hold most of a prompt's prefix and are compared, whoever else is."""
_NO_WORK = Prediction(0.0, 0.0)


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
        demand = state.demand
        prediction = state.sizes.predict(shape) if shape.counted else _NO_WORK
        ticket = Ticket(state, shape, prediction, self._clock())
        if shape.counted:
            demand.arrived[ticket.bucket // len(demand.buckets.output_tokens)] += 1
        demand.waiting += 1
        return ticket

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
            replica = self._best_of(state, max(options, key=options.__getitem__), ticket, now)
        else:
            chain = ticket.shape.chain
            ticket._hits = state.prefixes.hits(chain) if chain else None
            if state.objective is None:
                replica = self._chosen(state, bucket, options, ticket, now)
            else:
                places = Places(state, options, ticket, now, batch=batch)
                if not places.any():
                    return None
                replica = places.instead_of(self._chosen(state, bucket, options, ticket, now), state.splits[bucket])
        if ticket.explains:
            ticket.decision = decision_of(state, ticket, options, replica, now)
        self._sequence += 1
        replica.last_used = self._sequence
        ticket._prefill = prediction.prompt_tokens - ticket.hit_tokens(replica)
        replica.send(ticket, ticket._prefill, now)
        state.remember(replica, ticket.shape.chain)
        replica.probing = replica.failures > 0
        ticket.replica = replica
        ticket._sent_s, ticket._load_s = now, replica.weigh(now, max(1, ticket.shape.sequences))
        state.demand.waiting -= 1
        state.demand.running += 1
        return replica.engine

    def _chosen(
        self, state: ServiceState, bucket: int, options: Mapping[str, float], ticket: Ticket, now: float
    ) -> Replica:
        split, objective = state.splits[bucket], state.objective
        name = ticket.due = split.pick(options)
        replica = self._best_of(state, name, ticket, now)
        if objective is None:
            other = state.less_pressed(name, options, now) if replica.unstarted else None
            if other is None:
                return replica
            split.instead(name, other)
            return self._best_of(state, other, ticket, now)
        if len(state.variants) < 2 or ticket.keeps(objective, replica, now):
            return replica
        # The bucket's own variants first, the one that is most behind its share before the others.
        others = sorted((one for one in options if one != name), key=split.credit, reverse=True)
        for other in (*others, *(one for one in state.variants if one not in options)):
            if state.ready(other, now):
                candidate = self._best_of(state, other, ticket, now)
                if ticket.keeps(objective, candidate, now, SPILL_WITHIN):
                    split.instead(name, other)
                    return candidate
        return replica

    def _best_of(self, state: ServiceState, name: str, ticket: Ticket, now: float) -> Replica:
        ready: Sequence[Replica] = state.ready(name, now)
        some = two_of(ready, self._drawn) if state.variants[name].shared else in_turn(ready, self._sequence)
        hits = NO_HITS
        if ticket._hits:
            holders = [one for one in ticket._hits.deepest(HOLDERS) if one not in some and one in ready]
            some = [*some, *holders]
            hits = {one: ticket.hit_tokens(one) for one in some}
        return least_latency(some, ticket.prediction.prompt_tokens, ticket.prediction.output_tokens, now, hits)

    def look_again_s(self, service_key: str) -> float | None:
        """Seconds until time alone may make a place for a request that waits; None: something has to happen first."""
        state = self._states.get(service_key)
        if state is None:
            return None
        ejected_s = self.retry_after(service_key)
        if state.objective is None or not state.replicas:
            return ejected_s
        return LOOK_AGAIN_S if ejected_s is None else min(LOOK_AGAIN_S, ejected_s)

    def started(self, ticket: Ticket) -> None:
        """The engine gave its first token (or the whole answer): it works."""
        replica = _running(ticket)
        if not ticket.started:
            ticket.started = True
            ticket._first_s = self._clock()
            replica.start(ticket, ticket._first_s)
        self._works(ticket._state, replica)

    def failed(self, ticket: Ticket) -> None:
        """The engine failed before its first token: it is ejected for a while, and the request waits again."""
        now = self._clock()
        self._eject(ticket, now)
        self._leave(ticket, now)
        ticket._state.demand.waiting += 1

    def completed(self, ticket: Ticket, usage: Usage | None, *, timed: bool = False) -> None:
        """The answer is complete, also one that `started` was not told of. Without `usage` the predicted size is
        counted and nothing is learnt.

        `timed`: `started` and this were called just when the engine gave its first and its last token.
        """
        state, demand = ticket._state, ticket._state.demand
        replica, now, sequences = _running(ticket), self._clock(), max(1, ticket.shape.sequences)
        timed = timed and ticket.started and not ticket._moved and now > ticket._sent_s
        self._works(state, replica)
        self._leave(ticket, now)
        if not ticket.shape.counted:
            return
        if usage is None:
            bucket = ticket.bucket
        else:
            answer = usage.completion_tokens / sequences
            bucket = state.sizes.learn(ticket.shape, usage)
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

    def rebalance(
        self, service_key: str, streams: Mapping[Ticket, int], high: Mapping[str, int]
    ) -> list[tuple[Ticket, Engine]]:
        """Streams of a service that should go on elsewhere, and where, the one that gains most first.

        `streams`: running requests of this gateway that could move now, with the tokens of their answers so far. Within
        a variant and revision only. `high`: requests of high priority by engine id.
        """
        state, now = self._states.get(service_key), self._clock()
        if state is None:
            return []
        state.forget_stale(now)
        groups: defaultdict[tuple[str, str], list[Stream[Ticket]]] = defaultdict(list)
        for ticket, answered in streams.items():
            replica, prediction = _running(ticket), ticket.prediction
            # Of an answer that is longer than was expected, half of what it has is a fair guess of what is to come.
            left = max(prediction.output_tokens - answered, answered / 2.0)
            stream = Stream(ticket, replica.engine.id, prediction.prompt_tokens + answered, left)
            groups[replica.engine.variant, replica.engine.revision].append(stream)
        return [
            (move.stream.name, state.replicas[move.to].engine)
            for (name, revision), own in groups.items()
            for move in moves(state.loads(name, revision, high, now), own, MoveCost())
        ]

    def moved(self, ticket: Ticket, engine: Engine) -> None:
        """A running request goes on at this engine, from which its tokens come from now on."""
        now, sequences = self._clock(), max(1, ticket.shape.sequences)
        started = ticket.started
        self._leave(ticket, now)
        # An engine that discovery has just lost still has its stream.
        replica = ticket._state.replicas.get(engine.id) or Replica(engine)
        ticket._prefill = ticket.prediction.prompt_tokens
        replica.send(ticket, ticket._prefill, now)
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
    def _works(state: ServiceState, replica: Replica) -> None:
        if replica.failures:
            replica.restore()
            state.failing.discard(replica)

    @staticmethod
    def _eject(ticket: Ticket, now: float) -> None:
        replica = _running(ticket)
        replica.eject(now)
        ticket._state.failing.add(replica)
        # It may have been restarted, and its cache with it.
        ticket._state.prefixes.forget(replica)

    @staticmethod
    def _leave(ticket: Ticket, now: float) -> None:
        replica = _running(ticket)
        replica.leave(ticket, ticket._prefill, now)
        replica.weigh(now, -max(1, ticket.shape.sequences))
        ticket.replica = None
        ticket.started = False
        ticket._state.demand.running -= 1


def _running(ticket: Ticket) -> Replica:
    if ticket.replica is None:
        raise RuntimeError("the ticket is not assigned to an engine")
    return ticket.replica
