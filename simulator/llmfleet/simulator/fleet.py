"""Arrivals through any router into modelled engines: the same traffic for the policy of the gateway and for its peers.

    arrivals --Chooser.send--> engine models --first token, end--> Chooser, outcomes
                  every `tick_ps`: Chooser.tick(now, engines)

`replay` runs the gateway's own policy with a plan. This is the part below it, for questions that compare: a *chooser*
is whatever names an engine for a request, and it is told what a gateway would see. Between two arrivals every engine
runs to the time of the later one. Nothing sleeps and no clock is read; a chooser that wants the time asks the fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from llmfleet.simulator.arrivals import Arrival
from llmfleet.simulator.engine import Engine, Job
from llmfleet.simulator.spec import PS_PER_MS, PS_PER_S, EngineSpec


class Chooser(Protocol):
    """A router as the fleet knows it."""

    def send(self, number: int, arrival: Arrival) -> str:
        """The engine that gets a request."""

    def first_token(self, number: int) -> None:
        """A request got its first token."""

    def finished(self, number: int) -> None:
        """A request got its last token."""

    def tick(self, fleet: ModelFleet) -> None:
        """Some time has passed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    engine: str
    """Where it ended."""
    ttft_ms: float
    """From its arrival to its first token."""
    total_ms: float
    """From its arrival to its last token."""
    preemptions: int
    moves: int
    """How often it was moved to another engine while it ran."""


class _Move(NamedTuple):
    to: str
    copied_ps: int
    gap_ps: int


class ModelFleet:
    """Engines side by side, and the time."""

    def __init__(self, specs: Mapping[str, EngineSpec], *, tick_ms: float = 500.0) -> None:
        """`tick_ms`: how often the chooser is told that time has passed."""
        self.engines = {name: Engine(spec) for name, spec in specs.items()}
        self.now_ps = 0
        self._tick_ps = round(tick_ms * PS_PER_MS)
        self._next_tick_ps = self._tick_ps
        self._jobs: dict[int, Job] = {}
        self._sent_ps: dict[int, int] = {}
        self._where: dict[int, str] = {}
        self._moving: dict[int, _Move] = {}
        self._moved: list[int] = []
        self._moves: dict[int, int] = {}
        self._outcomes: dict[int, Outcome] = {}

    def now_s(self) -> float:
        """The time, in seconds."""
        return self.now_ps / PS_PER_S

    def run(self, arrivals: Iterable[Arrival], chooser: Chooser) -> list[Outcome]:
        """Sends every arrival where the chooser says, until all are answered; outcomes in their order.

        Raises ValueError for arrivals out of order, and for a request that an engine's KV cache cannot hold.
        """
        number = -1
        for number, arrival in enumerate(arrivals):
            at_ps = round(arrival.at_s * PS_PER_S)
            if at_ps < self.now_ps:
                raise ValueError(f"arrivals[{number}].at_s: got {arrival.at_s:g}, before the one before it")
            self._advance(at_ps, chooser)
            name = chooser.send(number, arrival)
            job = self._jobs[number] = Job(number, arrival.input_tokens, arrival.output_tokens)
            self.engines[name].submit(job, at_ps)
            self._where[number], self._sent_ps[number] = name, at_ps
        while self._where:
            self._advance(self._next_tick_ps, chooser)
        return [self._outcomes[one] for one in range(number + 1)]

    def move(self, number: int, to: str, *, copy_ms: float, gap_ms: float) -> None:
        """A running request moves: its KV cache is copied while it decodes on, which takes `copy_ms`; then it stops,
        and goes on at the destination `gap_ms` later. If it cannot leave by then (preempted, done), it stays.

        The hand-over happens at the first tick after the copy. Raises ValueError for a request that is nowhere.
        """
        if number not in self._where:
            raise ValueError(f"request {number}: nowhere in the fleet")
        self._moving[number] = _Move(to, self.now_ps + round(copy_ms * PS_PER_MS), round(gap_ms * PS_PER_MS))

    def answered(self, number: int) -> int | None:
        """Tokens that a decoding request has got so far; None while it does not decode."""
        return self.engines[self._where[number]].answered(self._jobs[number])

    @property
    def moving(self) -> Mapping[int, str]:
        """Requests that are about to move, and where to."""
        return {number: move.to for number, move in self._moving.items()}

    def _hand_over(self) -> None:
        for number, move in list(self._moving.items()):
            if move.copied_ps > self.now_ps:
                continue
            del self._moving[number]
            job = self._jobs[number]
            stopped_ps = self.engines[self._where[number]].take_out(job)
            if stopped_ps is None:
                continue
            job.transfer_ps = max(0, stopped_ps - self.now_ps) + move.gap_ps
            self.engines[move.to].submit(job, self.now_ps)
            self._where[number] = move.to
            self._moves[number] = self._moves.get(number, 0) + 1
            self._moved.append(number)

    def moved(self) -> list[tuple[int, str]]:
        """Requests that have been handed over since this was last asked, and where they are."""
        moved, self._moved = self._moved, []
        return [(number, self._where[number]) for number in moved if number in self._where]

    def _advance(self, until_ps: int, chooser: Chooser) -> None:
        while self._next_tick_ps <= until_ps:
            self._run(self._next_tick_ps, chooser)
            self._next_tick_ps += self._tick_ps
            self._hand_over()
            chooser.tick(self)
        self._run(until_ps, chooser)

    def _run(self, until_ps: int, chooser: Chooser) -> None:
        events = []
        for engine in self.engines.values():
            if not engine.idle:
                events += engine.advance(until_ps)
        events.sort(key=lambda event: event.at_ps)
        for event in events:
            self.now_ps = event.at_ps
            job = event.job
            if not event.finished:
                chooser.first_token(job.name)
                continue
            chooser.finished(job.name)
            sent_ps = self._sent_ps.pop(job.name)
            self._moving.pop(job.name, None)
            self._outcomes[job.name] = Outcome(
                self._where.pop(job.name),
                (job.first_token_ps - sent_ps) / PS_PER_MS,
                (job.finished_ps - sent_ps) / PS_PER_MS,
                job.preemptions,
                self._moves.pop(job.name, 0),
            )
            del self._jobs[job.name]
        self.now_ps = until_ps
