"""What a class is worth: one request in ten is high, on the same engine models and arrivals with classes off and on.

    arrivals, classes -> admission (WaitingRoom) -> Router with an objective -> engine models -> mean latency per class

With classes off all requests are standard, everything else is the same. While somebody waits, time goes in steps of
10 ms, a third of an engine's, and whoever is next is let in where there is a place; otherwise it goes from arrival to
arrival. Figures are means: of TTFT, which admission decides, and of the time from arrival to the last token as in
Llumnix (OSDI'24), in which it also counts how fast a full engine decodes, which admission alone does not change.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from e2e.bench.report import Report
from e2e.bench.routing_loads import ENGINE
from e2e.bench.routing_peers import Ours
from e2e.bench.routing_reschedule import our_knee
from e2e.bench.routing_ttft import ENGINES, SEEDS, arrivals
from llmfleet.api.llmservice import LatencyTarget, Objective
from llmfleet.gateway.keys import Priority
from llmfleet.gateway.policy import Claim, EngineReport, RequestShape, Ticket, Usage, WaitingRoom, expected_service
from llmfleet.gateway.policy.sizes import INITIAL_BYTES_PER_TOKEN
from llmfleet.simulator import Arrival
from llmfleet.simulator.arrivals import at_rate
from llmfleet.simulator.engine import Engine, Job
from llmfleet.simulator.spec import PS_PER_MS, PS_PER_S

NAMES = ("M-M cv 4",)
LOADS = (1.3,)
ONE_HIGH_IN = 10
_STEP_PS = 10 * PS_PER_MS
_REPORT_PS = 500 * PS_PER_MS
_OBJECTIVE = Objective(ttft=LatencyTarget(milliseconds=2000), tpot=LatencyTarget(milliseconds=100))
_PATIENCE_S = 1e6


class Means(NamedTuple):
    """Of one class in one run, in milliseconds."""

    total_ms: float
    ttft_ms: float


class _Fleet:
    """Engines behind one gateway's admission and routing."""

    def __init__(self) -> None:
        self.now_ps = 0
        self._reported_ps = 0
        self.engines = {name: Engine(ENGINE) for name in ENGINES}
        self.ours = Ours(ENGINES, lambda: self.now_ps / PS_PER_S, objective=_OBJECTIVE)
        self.room: WaitingRoom[int] = WaitingRoom()
        self.tickets: dict[int, Ticket] = {}
        self.claims: dict[int, Claim] = {}
        self.jobs: dict[int, Job] = {}

    def arrive(self, number: int, one: Arrival, priority: Priority) -> None:
        shape = RequestShape(round(one.input_tokens * INITIAL_BYTES_PER_TOKEN))
        ticket = self.tickets[number] = self.ours.router.admit(self.ours.key, shape)
        claim = Claim(priority, "", one.at_s + _PATIENCE_S, expected_service(ticket.prediction, 1))
        self.claims[number] = claim
        self.jobs[number] = Job(number, one.input_tokens, one.output_tokens)
        if self.room or not self._send(number):
            self.room.add(number, claim, self.now_ps / PS_PER_S)
        else:
            self.room.passed(claim)

    def _send(self, number: int) -> bool:
        batch = self.claims[number].priority is Priority.BATCH
        engine = self.ours.router.assign(self.tickets[number], batch=batch)
        if engine is not None:
            self.engines[engine.id].submit(self.jobs[number], self.now_ps)
        return engine is not None

    def serve(self) -> None:
        """Sends whoever waits and has a place."""
        full: set[int] = set()
        while (number := next((one for one in self.room.order() if self._next(one, full)), None)) is not None:
            self.room.admitted(number, self.now_ps / PS_PER_S)

    def _next(self, number: int, full: set[int]) -> bool:
        bucket = self.tickets[number].bucket
        if bucket in full:
            return False
        if not self._send(number):
            full.add(bucket)
            return False
        return True

    def advance(self, next_ps: int) -> None:
        """Goes one step on, or to the next arrival where nobody waits, and tells the policy what a gateway sees."""
        until_ps = self.now_ps + _STEP_PS if self.room else min(next_ps, self._reported_ps + _REPORT_PS)
        events = [e for engine in self.engines.values() if not engine.idle for e in engine.advance(until_ps)]
        for event in sorted(events, key=lambda event: event.at_ps):
            self.now_ps = max(self.now_ps, event.at_ps)
            job = event.job
            ticket = self.tickets[job.name]
            if event.finished:
                self.ours.router.completed(ticket, Usage(job.input_tokens, job.output_tokens))
            else:
                self.ours.router.started(ticket)
        self.now_ps = until_ps
        if self.now_ps >= self._reported_ps + _REPORT_PS:
            self._report()

    def _report(self) -> None:
        self._reported_ps = self.now_ps
        for name, engine in self.engines.items():
            spec, now_s = engine.spec, self.now_ps / PS_PER_S
            said = EngineReport(now_s, engine.waiting, engine.running, spec.kv_tokens, engine.kv_used_tokens)
            self.ours.router.report(name, said)


def run(name: str, rate: float, seed: int, *, classes: bool) -> tuple[Means, Means]:
    """One run at a rate, in requests per second: (the tenth that may be high, the others)."""
    requests = at_rate(arrivals(name, seed), rate)
    fleet = _Fleet()
    coming = [round(one.at_s * PS_PER_S) for one in requests]
    number = 0
    while number < len(requests) or fleet.room or any(not engine.idle for engine in fleet.engines.values()):
        while number < len(requests) and coming[number] <= fleet.now_ps:
            high = classes and number % ONE_HIGH_IN == 0
            fleet.arrive(number, requests[number], Priority.HIGH if high else Priority.STANDARD)
            number += 1
        fleet.serve()
        fleet.advance(coming[number] if number < len(requests) else fleet.now_ps + _REPORT_PS)
    return _means(fleet, requests, high=True), _means(fleet, requests, high=False)


def _means(fleet: _Fleet, requests: list[Arrival], *, high: bool) -> Means:
    numbers = [number for number in range(len(requests)) if (number % ONE_HIGH_IN == 0) is high]
    arrived_ps = {number: requests[number].at_s * PS_PER_S for number in numbers}
    total = statistics.fmean(fleet.jobs[number].finished_ps - arrived_ps[number] for number in numbers)
    ttft = statistics.fmean(fleet.jobs[number].first_token_ps - arrived_ps[number] for number in numbers)
    return Means(total / PS_PER_MS, ttft / PS_PER_MS)


Pair = tuple[tuple[Means, Means], tuple[Means, Means]]


def pair(job: tuple[str, float, int]) -> Pair:
    """Off and on."""
    return run(*job, classes=False), run(*job, classes=True)


def add_rows(report: Report, pool: ProcessPoolExecutor) -> None:
    """See above."""
    knees = dict(zip(NAMES, pool.map(our_knee, NAMES), strict=True))
    cells = [(name, load) for name in NAMES for load in LOADS]
    pairs = list(pool.map(pair, [(name, load * knees[name], seed) for name, load in cells for seed in range(SEEDS)]))
    for number, (name, load) in enumerate(cells):
        runs = pairs[number * SEEDS : (number + 1) * SEEDS]
        for what, field in (("ttft", 1), ("latency", 0)):
            row = f"{what}_{load:g}_{name.replace(' ', '_')}"
            report.add(
                f"priority_high_{row}",
                "x",
                [off[0][field] / on[0][field] for off, on in runs],
                target=1.5,
                at_most=False,
                note=f"{load * knees[name]:.2f} requests/s; {_told(runs, 0, field)}",
            )
            report.add(
                f"priority_others_{row}",
                "%",
                [100.0 * (on[1][field] / off[1][field] - 1.0) for off, on in runs],
                target=10.0,
                note=_told(runs, 1, field),
            )


def _told(runs: list[Pair], which: int, field: int) -> str:
    off_ms, on_ms = (statistics.median(one[side][which][field] for one in runs) for side in (0, 1))
    return f"mean {off_ms:.0f} ms with classes off, {on_ms:.0f} on"
