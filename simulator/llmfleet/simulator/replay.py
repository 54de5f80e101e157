"""Arrivals through a plan's routing into modelled engines: what each request would have seen.

    arrivals --Router (the gateway's own policy, on our clock)--> engines, one model per replica --> Served

The policy is the code that runs in the gateway, with the routing table that the operator would write. It learns what
it learns there and no more: the prompt's bytes, and the answer's length once the answer is complete. Between two
arrivals every engine runs to the time of the later one; first tokens and ends are told to the policy in the order in
which they happen. Nothing sleeps and no clock is read.

A plan may have replicas that only prefill and only decode. Then a request of theirs is routed twice: to one that
prefills, and when its prompt is computed, by a policy of the same kind with the table of the second stage, to one that
decodes, where its KV cache arrives as fast as the plan reckons. No gateway does this yet.

There may be several gateways, each with a policy of its own, that take turns at the arrivals and know nothing of each
other; who wants to hear what an operator would be told gets their reports every few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from llmfleet.api import (
    ALL_SERVICES,
    DemandReport,
    Plan,
    PlannedVariant,
    Route,
    RoutedVariant,
    RoutingTable,
    ServicePlan,
)
from llmfleet.gateway.fleet import Engine as Address
from llmfleet.gateway.fleet import Fleet, Service
from llmfleet.gateway.policy import RequestShape, Router, Ticket, Usage
from llmfleet.gateway.policy.sizes import INITIAL_BYTES_PER_TOKEN
from llmfleet.simulator.arrivals import Arrival
from llmfleet.simulator.engine import FOREVER_PS, Engine, Event, Job
from llmfleet.simulator.spec import PS_PER_MS, PS_PER_S, EngineSpec, ps

Hear: TypeAlias = Callable[[Mapping[str, DemandReport], float], None]
"""Takes a round of demand reports by gateway, and the simulated time in seconds."""
_REPORT_EVERY_PS = 2 * PS_PER_S


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one request."""

    at_s: float
    """When it arrived."""
    input_tokens: int
    output_tokens: int
    variant: str
    engine: str
    """Which replica had it, `<variant>-<n>`; the one that decoded it, where another has computed its prompt."""
    ttft_ms: float
    """Time to first token, from its arrival at the gateway."""
    tpot_ms: float | None
    """Mean time per token after the first; None for an answer of one token."""
    preemptions: int


def routing_table(plan: Plan, key: str, *, context_length: int) -> RoutingTable:
    """The table that gateways get once all planned replicas of service `key` serve.

    Raises ValueError where the plan has no such service, or has replicas in it that serve one stage only.
    """
    service = _service(plan, key)
    if apart := [one.name for one in service.variants if one.role is not None]:
        raise ValueError(f"service {key}: {', '.join(apart)} serve one stage only, which one table cannot say")
    return _table(plan, service, service.variants, service.routes, context_length)


@dataclass(frozen=True)
class SecondStage:
    """How requests go on whose prompt a replica has computed that does no more."""

    table: RoutingTable
    """Where they are decoded."""
    prefill: frozenset[str]
    """Variants that compute prompts only."""
    transfer_ms_per_token: float
    """Of the prompt, until its KV cache is there."""


def staged_tables(
    plan: Plan, key: str, *, context_length: int, kv_bytes_per_token: float
) -> tuple[RoutingTable, SecondStage | None]:
    """The tables of both stages of service `key`, the second None where all replicas serve whole requests.

    Raises ValueError where the plan has no such service.
    """
    service = _service(plan, key)
    decode = [one for one in service.variants if one.role == "decode"]
    if not decode:
        return routing_table(plan, key, context_length=context_length), None
    names = {one.name for one in decode}
    first = [route for route in service.routes if route.variant not in names]
    second = [route for route in service.routes if route.variant in names]
    share: dict[int, float] = {}
    for route in second:
        share[route.bucket] = share.get(route.bucket, 0.0) + route.fraction
    second = [one.model_copy(update={"fraction": one.fraction / share[one.bucket]}) for one in second]
    slowest = min(one.kv_transfer_gb_per_second for one in decode if one.kv_transfer_gb_per_second is not None)
    return (
        _table(plan, service, [one for one in service.variants if one not in decode], first, context_length),
        SecondStage(
            _table(plan, service, decode, second, context_length),
            frozenset(one.name for one in service.variants if one.role == "prefill"),
            kv_bytes_per_token / (slowest * 1e6),
        ),
    )


def _service(plan: Plan, key: str) -> ServicePlan:
    service = plan.service(key)
    if service is None:
        raise ValueError(f"service: got {key!r}; the plan has {', '.join(one.key for one in plan.services) or 'none'}")
    return service


def _table(
    plan: Plan, service: ServicePlan, variants: Sequence[PlannedVariant], routes: list[Route], context_length: int
) -> RoutingTable:
    return RoutingTable(
        plan_id=plan.plan_id,
        namespace=service.namespace,
        service=service.service,
        served_name=service.service,
        context_length=context_length,
        buckets=service.buckets,
        variants=[
            RoutedVariant(name=one.name, replicas=one.replicas, selector={}, latency=one.latency) for one in variants
        ],
        routes=routes,
    )


def replay(
    table: RoutingTable,
    engines: Mapping[str, EngineSpec],
    arrivals: Iterable[Arrival],
    *,
    gateways: int = 1,
    hear: Hear | None = None,
    second: SecondStage | None = None,
) -> list[Served]:
    """Sends every arrival through the table's policy to the replicas that it was made for, until all are answered.

    engines: the model of a replica, by variant. hear: called with each round of the gateways' reports, in all detail.
    second: where requests go on, whose prompt is computed by replicas that do no more.
    Raises ValueError for a variant without a model, for a table without replicas, for arrivals out of order, and for a
    request that an engine's KV cache cannot hold.
    """
    return _Replay(table, engines, gateways, hear, second).run(arrivals)


class _Pool:
    """The replicas of one table, and a policy for each gateway."""

    def __init__(
        self, table: RoutingTable, engines: Mapping[str, EngineSpec], gateways: int, clock: Callable[[], float]
    ) -> None:
        if missing := [one.name for one in table.variants if one.replicas > 0 and one.name not in engines]:
            raise ValueError(f"engines: no model of variant {', '.join(missing)}; got {', '.join(engines) or 'none'}")
        self.variant_of: dict[str, str] = {}
        self.engines: dict[str, Engine] = {}
        for variant in table.variants:
            for number in range(variant.replicas):
                name = f"{variant.name}-{number}"
                self.variant_of[name] = variant.name
                self.engines[name] = Engine(engines[variant.name])
        if not self.engines:
            raise ValueError(f"table: {table.service} has no replicas; accepted is at least one")
        service = Service(
            table,
            tuple(
                Address(id=name, host="", port=0, variant=self.variant_of[name])  # nobody is called
                for name in self.engines
            ),
        )
        self._key = service.key
        self.routers = [Router(clock, instance_id=f"gateway-{number}") for number in range(gateways)]
        for router in self.routers:
            router.update(Fleet([service]))
        self.tickets: dict[int, tuple[Ticket, Arrival, str]] = {}

    def router_of(self, number: int) -> Router:
        return self.routers[number % len(self.routers)]

    def send(self, number: int, arrival: Arrival) -> str:
        """Routes a request; the engine that it goes to."""
        router = self.router_of(number)
        ticket = router.admit(self._key, RequestShape(round(arrival.input_tokens * INITIAL_BYTES_PER_TOKEN)))
        address = router.assign(ticket)
        assert address is not None  # no engine ever fails here
        self.tickets[number] = (ticket, arrival, address.id)
        return address.id

    def events(self, until_ps: int) -> list[Event]:
        """What happens until then, in order of time."""
        events: list[Event] = []
        for engine in self.engines.values():
            events += engine.advance(until_ps)
        # Stable: at one moment in the order of the engines, in one engine in its own.
        events.sort(key=lambda event: event.at_ps)
        return events

    def told(self, event: Event) -> tuple[Arrival, str] | None:
        """Tells the policy; the request and its engine where the event is its last."""
        number = event.job.name
        ticket, arrival, engine_name = self.tickets[number]
        if not event.finished:
            self.router_of(number).started(ticket)
            return None
        # Of a prompt that was computed for others too, a gateway would learn this a little later.
        usage = Usage(arrival.input_tokens, arrival.output_tokens)
        self.router_of(number).completed(ticket, usage, timed=True)
        del self.tickets[number]
        return arrival, engine_name


class _Replay:
    def __init__(
        self,
        table: RoutingTable,
        engines: Mapping[str, EngineSpec],
        gateways: int,
        hear: Hear | None,
        second: SecondStage | None,
    ) -> None:
        self._now_ps = 0

        def clock() -> float:
            return self._now_ps / PS_PER_S

        self._first = _Pool(table, engines, gateways, clock)
        self._second = None if second is None else _Pool(second.table, engines, gateways, clock)
        self._stage = second
        self._hear = hear
        self._heard = 0
        self._served: dict[int, Served] = {}

    def run(self, arrivals: Iterable[Arrival]) -> list[Served]:
        number = -1
        for number, arrival in enumerate(arrivals):
            at_ps = round(arrival.at_s * PS_PER_S)
            if at_ps < self._now_ps:
                raise ValueError(f"arrivals[{number}].at_s: got {arrival.at_s:g}, before the one before it")
            self._advance(at_ps)
            self._now_ps = at_ps
            self._send(number, arrival)
        self._advance(FOREVER_PS)
        return [self._served[one] for one in range(number + 1)]

    def _send(self, number: int, arrival: Arrival) -> None:
        name = self._first.send(number, arrival)
        answer = 1 if self._prefills(name) else arrival.output_tokens
        self._first.engines[name].submit(Job(number, arrival.input_tokens, answer), self._now_ps)

    def _prefills(self, engine_name: str) -> bool:
        return self._stage is not None and self._first.variant_of[engine_name] in self._stage.prefill

    def _hand_over(self, number: int, arrival: Arrival) -> None:
        """A prompt is computed: its request goes to where it is decoded."""
        assert self._second is not None
        assert self._stage is not None
        name = self._second.send(number, arrival)
        transfer_ps = ps(self._stage.transfer_ms_per_token * arrival.input_tokens)
        job = Job(number, arrival.input_tokens, arrival.output_tokens, transfer_ps=transfer_ps)
        self._second.engines[name].submit(job, self._now_ps)

    def _advance(self, until_ps: int) -> None:
        while self._hear is not None and (self._in_flight or until_ps < FOREVER_PS):
            at_ps = self._heard * _REPORT_EVERY_PS
            if at_ps > until_ps:
                break
            self._run(at_ps)
            self._now_ps = at_ps
            routers = self._first.routers
            reports = {f"gateway-{n}": router.demand(ALL_SERVICES) for n, router in enumerate(routers)}
            self._hear(reports, at_ps / PS_PER_S)
            self._heard += 1
        self._run(until_ps)

    @property
    def _in_flight(self) -> bool:
        return bool(self._first.tickets or (self._second is not None and self._second.tickets))

    def _run(self, until_ps: int) -> None:
        for event in self._first.events(until_ps):
            if self._second is not None:
                # What the second stage does until then is known before anybody else comes to it.
                self._run_pool(self._second, event.at_ps)
            self._now_ps = event.at_ps
            ended = self._first.told(event)
            if ended is None:
                continue
            arrival, engine_name = ended
            if self._prefills(engine_name):
                self._hand_over(event.job.name, arrival)
            else:
                self._served[event.job.name] = self._outcome(self._first, event.job, arrival, engine_name)
        if self._second is not None:
            self._run_pool(self._second, until_ps)

    def _run_pool(self, pool: _Pool, until_ps: int) -> None:
        for event in pool.events(until_ps):
            self._now_ps = event.at_ps
            ended = pool.told(event)
            if ended is not None:
                self._served[event.job.name] = self._outcome(pool, event.job, *ended)

    @staticmethod
    def _outcome(pool: _Pool, job: Job, arrival: Arrival, engine_name: str) -> Served:
        later = job.output_tokens - 1
        return Served(
            at_s=arrival.at_s,
            input_tokens=job.input_tokens,
            output_tokens=job.output_tokens,
            variant=pool.variant_of[engine_name],
            engine=engine_name,
            ttft_ms=(job.first_token_ps - round(arrival.at_s * PS_PER_S)) / PS_PER_MS,
            tpot_ms=(job.finished_ps - job.first_token_ps) / PS_PER_MS / later if later else None,
            preemptions=job.preemptions,
        )
