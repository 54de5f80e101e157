"""How long the slowest wait for their first token: our routing beside what others do, on the same engine models.

For each load: *round robin's knee* is the rate at which its P99 of TTFT is ten times that of requests that find an idle
engine. At 0.8 and 0.95 of it, and for each of five seeds, the same arrivals go through every router. A row holds round
robin's P99 over ours by seed: their median is the figure, their range the spread. Nobody can be better than idle
engines, whose P99 is in the note: a load whose P99 is the prefill of its own longest prompts leaves little to gain.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from e2e.bench.report import Report
from e2e.bench.routing_loads import ENGINE, azure, drawn
from e2e.bench.routing_peers import CacheAware, LeastLoaded, Ours, RoundRobin
from llmfleet.simulator import Arrival
from llmfleet.simulator.arrivals import at_rate
from llmfleet.simulator.fleet import Chooser, ModelFleet

ENGINES = tuple(f"e{number}" for number in range(8))
REQUESTS = 3000
SEEDS = 5
LOADS = (0.8, 0.95)
KNEE = 10.0
"""P99 of TTFT at the knee, in those of idle engines."""
NAMES = ("S-S", "M-M", "L-L", "S-L", "L-S", "M-M cv 2", "M-M cv 4", "M-M cv 8", "azure conv", "azure code")
_KNEE_SEEDS = 3
_BISECTIONS = 9

Make = Callable[[ModelFleet], Chooser]
ROUTERS: dict[str, Make] = {
    "ours": lambda fleet: Ours(ENGINES, fleet.now_s),
    "round robin": lambda _: RoundRobin(ENGINES),
    "cache_aware": lambda _: CacheAware(ENGINES),
    "least requests": lambda _: LeastLoaded(ENGINES),
}


def arrivals(name: str, seed: int) -> list[Arrival]:
    """The requests of a load, one a second in the mean."""
    kind, _, rest = name.partition(" ")
    if kind == "azure":
        return azure(rest, min(REQUESTS, 1500), seed)
    return drawn(kind, REQUESTS, seed, cv=float(rest.removeprefix("cv ")) if rest else 1.0)


def p99_ms(requests: Sequence[Arrival], make: Make) -> float:
    """P99 of TTFT."""
    fleet = ModelFleet(dict.fromkeys(ENGINES, ENGINE))
    return p99([one.ttft_ms for one in fleet.run(requests, make(fleet))])


def p99(values: Sequence[float]) -> float:
    """The value that one in a hundred reaches."""
    return sorted(values)[int(0.99 * len(values))]


def idle_p99_ms(requests: Sequence[Arrival]) -> float:
    """P99 of TTFT where every request finds an idle engine."""
    step = ENGINE.step
    times = []
    for one in requests:
        whole, rest = divmod(one.input_tokens, ENGINE.max_num_batched_tokens)
        chunks = [ENGINE.max_num_batched_tokens] * whole + ([rest] if rest else [])
        times.append(
            sum(step.overhead_ms + step.sequence_ms + max(step.weights_ms, step.token_ms * chunk) for chunk in chunks)
        )
    return p99(times)


def knee(name: str, make: Make = ROUTERS["round robin"]) -> float:
    """The rate at which a router's P99 of TTFT is `KNEE` times that of idle engines, in requests per second."""
    runs = [arrivals(name, seed) for seed in range(_KNEE_SEEDS)]
    limit_ms = KNEE * statistics.median(idle_p99_ms(run) for run in runs)
    low, high = 0.05, 80.0
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        reached = statistics.median(p99_ms(at_rate(run, middle), make) for run in runs)
        low, high = (middle, high) if reached < limit_ms else (low, middle)
    return low


@dataclass(frozen=True)
class Compared:
    """P99 of TTFT by router, seed by seed, at one load."""

    name: str
    load: float
    rate: float
    """Requests per second."""
    idle_ms: float
    p99_ms: dict[str, list[float]]


def compare(name: str) -> list[Compared]:
    """All routers at all loads."""
    rate = knee(name)
    found = []
    for load in LOADS:
        runs = [at_rate(arrivals(name, seed), load * rate) for seed in range(SEEDS)]
        found.append(
            Compared(
                name,
                load,
                load * rate,
                statistics.median(idle_p99_ms(run) for run in runs),
                {router: [p99_ms(run, make) for run in runs] for router, make in ROUTERS.items()},
            )
        )
    return found


def add_rows(report: Report, pool: ProcessPoolExecutor) -> None:
    """See above."""
    rows = [one for many in pool.map(compare, NAMES) for one in many]
    for one in rows:
        medians = ", ".join(f"{router} {statistics.median(values):.0f}" for router, values in one.p99_ms.items())
        report.add(
            f"p99_ttft_gain_{one.load:g}_{one.name.replace(' ', '_')}",
            "x",
            _ratios(one, "round robin"),
            target=2.0,
            at_most=False,
            note=f"{one.rate:.2f} requests/s on 8 engines; P99 in ms: {medians}, idle engines {one.idle_ms:.0f}",
        )
    for one in rows:
        report.add(
            f"p99_ttft_cache_aware_{one.load:g}_{one.name.replace(' ', '_')}",
            "x",
            _ratios(one, "cache_aware"),
            target=1.0,
            at_most=False,
        )


def _ratios(one: Compared, peer: str) -> list[float]:
    return [theirs / ours for theirs, ours in zip(one.p99_ms[peer], one.p99_ms["ours"], strict=True)]
