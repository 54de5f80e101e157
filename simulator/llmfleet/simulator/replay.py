"""Arrivals through a plan's routing into modelled engines: what each request would have seen.

    arrivals --Router (the gateway's own policy, on our clock)--> engines, one model per replica --> Served

The policy is the code that runs in the gateway, with the routing table that the operator would write. It learns what
it learns there and no more: the prompt's bytes, and the answer's length once the answer is complete. Between two
arrivals every engine runs to the time of the later one; first tokens and ends are told to the policy in the order in
which they happen. Nothing sleeps and no clock is read.

There may be several gateways, each with a policy of its own, that take turns at the arrivals and know nothing of each
other; who wants to hear what an operator would be told gets their reports every few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from llmfleet.api import ALL_SERVICES, DemandReport, Plan, RoutedVariant, RoutingTable
from llmfleet.gateway.fleet import Engine as Address
from llmfleet.gateway.fleet import Fleet, Service
from llmfleet.gateway.policy import RequestShape, Router, Ticket, Usage
from llmfleet.gateway.policy.sizes import INITIAL_BYTES_PER_TOKEN
from llmfleet.simulator.arrivals import Arrival
from llmfleet.simulator.engine import FOREVER_PS, Engine, Event, Job
from llmfleet.simulator.spec import PS_PER_MS, PS_PER_S, EngineSpec

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
    """Which replica had it, `<variant>-<n>`."""
    ttft_ms: float
    """Time to first token, from its arrival at the gateway."""
    tpot_ms: float | None
    """Mean time per token after the first; None for an answer of one token."""
    preemptions: int


def routing_table(plan: Plan, key: str, *, context_length: int) -> RoutingTable:
    """The table that gateways get once all planned replicas of service `key` serve.

    Raises ValueError where the plan has no such service.
    """
    service = plan.service(key)
    if service is None:
        raise ValueError(f"service: got {key!r}; the plan has {', '.join(one.key for one in plan.services) or 'none'}")
    return RoutingTable(
        plan_id=plan.plan_id,
        namespace=service.namespace,
        service=service.service,
        served_name=service.service,
        context_length=context_length,
        buckets=service.buckets,
        variants=[
            RoutedVariant(name=one.name, replicas=one.replicas, selector={}, latency=one.latency)
            for one in service.variants
        ],
        routes=service.routes,
    )


def replay(
    table: RoutingTable,
    engines: Mapping[str, EngineSpec],
    arrivals: Iterable[Arrival],
    *,
    gateways: int = 1,
    hear: Hear | None = None,
) -> list[Served]:
    """Sends every arrival through the table's policy to the replicas that it was made for, until all are answered.

    engines: the model of a replica, by variant. hear: called with each round of the gateways' reports, in all detail.
    Raises ValueError for a variant without a model, for a table without replicas, for arrivals out of order, and for a
    request that an engine's KV cache cannot hold.
    """
    return _Replay(table, engines, gateways, hear).run(arrivals)


class _Replay:
    def __init__(
        self, table: RoutingTable, engines: Mapping[str, EngineSpec], gateways: int, hear: Hear | None
    ) -> None:
        if missing := [one.name for one in table.variants if one.replicas > 0 and one.name not in engines]:
            raise ValueError(f"engines: no model of variant {', '.join(missing)}; got {', '.join(engines) or 'none'}")
        self._variant_of: dict[str, str] = {}
        self._engines: dict[str, Engine] = {}
        for variant in table.variants:
            for number in range(variant.replicas):
                name = f"{variant.name}-{number}"
                self._variant_of[name] = variant.name
                self._engines[name] = Engine(engines[variant.name])
        if not self._engines:
            raise ValueError(f"table: {table.service} has no replicas; accepted is at least one")
        service = Service(
            table,
            tuple(
                Address(id=name, host="", port=0, variant=self._variant_of[name])  # nobody is called
                for name in self._engines
            ),
        )
        self._key = service.key
        self._now_ps = 0
        self._routers = [
            Router(lambda: self._now_ps / PS_PER_S, instance_id=f"gateway-{number}") for number in range(gateways)
        ]
        for router in self._routers:
            router.update(Fleet([service]))
        self._hear = hear
        self._heard = 0
        self._tickets: dict[int, tuple[Ticket, Arrival, str]] = {}
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
        shape = RequestShape(prompt_bytes=round(arrival.input_tokens * INITIAL_BYTES_PER_TOKEN))
        router = self._router_of(number)
        ticket = router.admit(self._key, shape)
        address = router.assign(ticket)
        assert address is not None  # no engine ever fails here
        self._engines[address.id].submit(Job(number, arrival.input_tokens, arrival.output_tokens), self._now_ps)
        self._tickets[number] = (ticket, arrival, address.id)

    def _router_of(self, number: int) -> Router:
        return self._routers[number % len(self._routers)]

    def _advance(self, until_ps: int) -> None:
        while self._hear is not None and (self._tickets or until_ps < FOREVER_PS):
            at_ps = self._heard * _REPORT_EVERY_PS
            if at_ps > until_ps:
                break
            self._run(at_ps)
            self._now_ps = at_ps
            reports = {f"gateway-{n}": router.demand(ALL_SERVICES) for n, router in enumerate(self._routers)}
            self._hear(reports, at_ps / PS_PER_S)
            self._heard += 1
        self._run(until_ps)

    def _run(self, until_ps: int) -> None:
        events: list[Event] = []
        for engine in self._engines.values():
            events += engine.advance(until_ps)
        # Stable: at one moment in the order of the engines, in one engine in its own.
        events.sort(key=lambda event: event.at_ps)
        for event in events:
            self._now_ps = event.at_ps
            ticket, arrival, engine_name = self._tickets[event.job.name]
            if not event.finished:
                self._router_of(event.job.name).started(ticket)
                continue
            self._router_of(event.job.name).completed(
                ticket, Usage(arrival.input_tokens, arrival.output_tokens), timed=True
            )
            del self._tickets[event.job.name]
            self._served[event.job.name] = self._outcome(event.job, arrival, engine_name)

    def _outcome(self, job: Job, arrival: Arrival, engine_name: str) -> Served:
        later = job.output_tokens - 1
        return Served(
            at_s=arrival.at_s,
            input_tokens=job.input_tokens,
            output_tokens=job.output_tokens,
            variant=self._variant_of[engine_name],
            engine=engine_name,
            ttft_ms=(job.first_token_ps - job.arrived_ps) / PS_PER_MS,
            tpot_ms=(job.finished_ps - job.first_token_ps) / PS_PER_MS / later if later else None,
            preemptions=job.preemptions,
        )
