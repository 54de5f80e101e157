"""What moving running requests is worth: the same engine models and arrivals, rescheduling off and on.

At 0.8, 0.95 and 1.2 of *our own* knee (routing without moves), paired by seed. A move takes as long as its KV cache
takes over 64 Gbit/s, then a gap of 30 ms; nobody else waits meanwhile. Figures are on / off: below 1 moving pays.
Beyond the knee every engine is full and nothing should be lost by trying.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from e2e.bench.report import Report
from e2e.bench.routing_loads import ENGINE
from e2e.bench.routing_peers import Ours
from e2e.bench.routing_ttft import ENGINES, SEEDS, arrivals, knee, p99
from llmfleet.simulator.arrivals import at_rate
from llmfleet.simulator.fleet import ModelFleet

NAMES = ("M-M", "azure conv")
LOADS = (0.8, 0.95, 1.2)


class Seen(NamedTuple):
    """One run."""

    ttft_ms: float
    """P99."""
    tpot_ms: float
    """P99 over answers of more than 8 tokens."""
    moves: int


def run(name: str, rate: float, seed: int, *, moves: bool) -> Seen:
    """One run of our routing at a rate, in requests per second."""
    requests = at_rate(arrivals(name, seed), rate)
    fleet = ModelFleet(dict.fromkeys(ENGINES, ENGINE))
    outcomes = fleet.run(requests, Ours(ENGINES, fleet.now_s, moves=moves))
    tpot_ms = [
        (outcome.total_ms - outcome.ttft_ms) / (request.output_tokens - 1)
        for request, outcome in zip(requests, outcomes, strict=True)
        if request.output_tokens > 8
    ]
    return Seen(p99([one.ttft_ms for one in outcomes]), p99(tpot_ms), sum(one.moves for one in outcomes))


def pair(job: tuple[str, float, int]) -> tuple[Seen, Seen]:
    """Off and on."""
    return run(*job, moves=False), run(*job, moves=True)


def our_knee(name: str) -> float:
    """The rate at which our routing's P99 of TTFT is ten times that of idle engines."""
    return knee(name, lambda fleet: Ours(ENGINES, fleet.now_s))


def add_rows(report: Report, pool: ProcessPoolExecutor) -> None:
    """See above."""
    knees = dict(zip(NAMES, pool.map(our_knee, NAMES), strict=True))
    cells = [(name, load) for name in NAMES for load in LOADS]
    jobs = [(name, load * knees[name], seed) for name, load in cells for seed in range(SEEDS)]
    pairs = list(pool.map(pair, jobs))
    for number, (name, load) in enumerate(cells):
        runs = pairs[number * SEEDS : (number + 1) * SEEDS]
        moved = statistics.median(on.moves for _, on in runs)
        for what, field in (("ttft", 0), ("tpot", 1)):
            off_ms, on_ms = (statistics.median(one[side][field] for one in runs) for side in (0, 1))
            report.add(
                f"reschedule_p99_{what}_{load:g}_{name.replace(' ', '_')}",
                "x",
                [on[field] / off[field] for off, on in runs],
                target=1.0 if load < 1.0 else 1.01,
                note=f"{load * knees[name]:.2f} requests/s; {off_ms:.0f} ms off, {on_ms:.0f} on, {moved:.0f} moves",
            )
