"""Routers side by side: ours, and what others do, behind one interface and on the same engine models.

    Ours         the gateway's own `Router`, fed by reports of the engines as its scraper would feed it
    RoundRobin   each engine in turn
    LeastLoaded  the engine with the fewest requests in flight
    CacheAware   vllm-router's policy of that name

cache_aware is written from its description, not from its code (options and defaults of vllm-router 0.1.15 as
docs.gpustack.ai, "Model Deployment Routing", lists them): where the busiest engine has more than 64 requests over the
idlest and more than 1.5 times as many, the least loaded one; else the engine whose past requests share the longest
prefix, if that is more than 0.3 of the prompt; else the engine with the smallest record of past prompts. Prompts here
share nothing, so the second rule never applies.

Every router sees arrivals, first tokens and ends of its own requests. Ours hears reports besides, every half second and
a tick old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from e2e.bench.routing_loads import FIT
from llmfleet.api import Buckets, Route, RoutedVariant, RoutingTable
from llmfleet.api.llmservice import Objective
from llmfleet.gateway.fleet import Engine, Fleet, Service
from llmfleet.gateway.policy import EngineReport, RequestShape, Router, Ticket, Usage
from llmfleet.gateway.policy.reschedule import MoveCost
from llmfleet.gateway.policy.sizes import INITIAL_BYTES_PER_TOKEN
from llmfleet.simulator import Arrival
from llmfleet.simulator.fleet import ModelFleet

BUCKETS = Buckets(input_tokens=[64, 256, 1024, 6000], output_tokens=[64, 256, 1024, 6000])


class _Counting:
    """Names of engines, and what each has in flight of this router's."""

    def __init__(self, engines: Sequence[str]) -> None:
        self.in_flight = dict.fromkeys(engines, 0)
        self._where: dict[int, str] = {}

    def pick(self, arrival: Arrival) -> str:
        raise NotImplementedError

    def send(self, number: int, arrival: Arrival) -> str:
        name = self._where[number] = self.pick(arrival)
        self.in_flight[name] += 1
        return name

    def first_token(self, number: int) -> None:
        pass

    def finished(self, number: int) -> None:
        self.in_flight[self._where.pop(number)] -= 1

    def tick(self, fleet: ModelFleet) -> None:
        pass


class RoundRobin(_Counting):
    """Each engine in turn."""

    def __init__(self, engines: Sequence[str]) -> None:
        super().__init__(engines)
        self._names = list(engines)
        self._turn = 0

    def pick(self, arrival: Arrival) -> str:
        self._turn += 1
        return self._names[self._turn % len(self._names)]


class LeastLoaded(_Counting):
    """The engine with the fewest requests in flight; of equal ones the first."""

    def pick(self, arrival: Arrival) -> str:
        return min(self.in_flight, key=self.in_flight.__getitem__)


class CacheAware(_Counting):
    """vllm-router's cache_aware for prompts that share nothing."""

    def __init__(self, engines: Sequence[str]) -> None:
        super().__init__(engines)
        self._recorded = dict.fromkeys(engines, 0)

    def pick(self, arrival: Arrival) -> str:
        busiest, idlest = max(self.in_flight.values()), min(self.in_flight.values())
        unbalanced = busiest - idlest > 64 and busiest > 1.5 * idlest
        name = min(
            self.in_flight if unbalanced else self._recorded,
            key=(self.in_flight if unbalanced else self._recorded).__getitem__,
        )
        self._recorded[name] += arrival.input_tokens
        return name


class Ours:
    """The gateway's policy: one service, one variant, every bucket to it."""

    def __init__(
        self,
        engines: Sequence[str],
        clock: Callable[[], float],
        *,
        moves: bool = False,
        objective: Objective | None = None,
    ) -> None:
        """`objective`: requests are held back, so that `send` is not for them (`routing_priority`)."""
        table = RoutingTable(
            plan_id="bench",
            namespace="bench",
            service="chat",
            served_name="chat",
            context_length=12_000,
            buckets=BUCKETS,
            variants=[RoutedVariant(name="a", replicas=len(engines), selector={}, latency=FIT)],
            routes=[Route(bucket=bucket, variant="a", fraction=1.0) for bucket in range(BUCKETS.count)],
            objective=objective,
        )
        self._clock = clock
        self._moves = moves
        self.router = Router(clock, "bench")
        self._engines = {name: Engine(id=name, host="", port=0, variant="a") for name in engines}
        service = Service(table, tuple(self._engines.values()))
        self.key = service.key
        self.router.update(Fleet([service]))
        self.tickets: dict[int, tuple[Ticket, Arrival]] = {}

    def send(self, number: int, arrival: Arrival) -> str:
        ticket = self.router.admit(self.key, RequestShape(round(arrival.input_tokens * INITIAL_BYTES_PER_TOKEN)))
        engine = self.router.assign(ticket)
        assert engine is not None  # none ever fails
        self.tickets[number] = ticket, arrival
        return engine.id

    def first_token(self, number: int) -> None:
        self.router.started(self.tickets[number][0])

    def finished(self, number: int) -> None:
        ticket, arrival = self.tickets.pop(number)
        self.router.completed(ticket, Usage(arrival.input_tokens, arrival.output_tokens))

    def tick(self, fleet: ModelFleet) -> None:
        for number, name in fleet.moved():
            if number in self.tickets:
                self.router.moved(self.tickets[number][0], self._engines[name])
        for name, engine in fleet.engines.items():
            self.router.report(
                name,
                EngineReport(
                    self._clock(), engine.waiting, engine.running, engine.spec.kv_tokens, engine.kv_used_tokens
                ),
            )
        if not self._moves:
            return
        moving = fleet.moving
        streams = {}
        for number, (ticket, _) in self.tickets.items():
            if number not in moving and ticket.started and (answered := fleet.answered(number)) is not None:
                streams[ticket] = answered
        numbers = {ticket: number for number, (ticket, _) in self.tickets.items()}
        busy = {*moving.values()}
        for ticket, target in self.router.rebalance(self.key, streams, {}):
            if target.id not in busy:
                copy_ms = MoveCost().copy_ms_per_token * (ticket.prediction.prompt_tokens + streams[ticket])
                fleet.move(numbers[ticket], target.id, copy_ms=copy_ms, gap_ms=MoveCost().gap_ms)
