"""Mélange's instance (arXiv 2404.14527): one service, 60 size buckets, four GPU types at the paper's prices.

    histogram(trace) * requests per second, throughput(objective) -> Problem of our solver

The paper's profiles are not published, so throughputs are those of the roofline (`placement/performance`) for the same
model, Llama-2-7B in 16 bits, one device per replica: the most requests per second of one size, over the requests in
flight that fit into memory, at which the time per output token stays within the objective. As in the paper, that is the
only objective, a mean, without headroom. Sizes come from the Azure traces of 2023 (`simulator/traces`), since the
paper's data sets are not free to redistribute.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pulp

from llmfleet.api import Buckets
from llmfleet.placement.highs import Deadline
from llmfleet.placement.performance.architecture import architecture_of
from llmfleet.placement.performance.hardware import CATALOGUE
from llmfleet.placement.performance.model import FloatArray
from llmfleet.placement.performance.roofline import Roofline
from llmfleet.placement.solver import Limits, Problem, Service, Solution, solve

INPUT_TOKENS = (25, 100, 250, 500, 1000, 2000, 4000, 8000, 12000, 16000)
OUTPUT_TOKENS = (25, 100, 250, 500, 1000, 2000)
BUCKETS = Buckets(input_tokens=list(INPUT_TOKENS), output_tokens=list(OUTPUT_TOKENS))
PRICES = {"l4": 0.70, "a10g": 1.01, "a100-sxm-80gb": 3.67, "h100-sxm": 7.516}
"""Per hour, the paper's table 1; names are those of the hardware catalogue."""
TPOT_MS = (40.0, 120.0)
"""The paper's objectives."""
Trace = Literal["conv", "code"]
TRACES: tuple[Trace, ...] = ("conv", "code")
_TRACES = Path(__file__).parents[2] / "simulator" / "traces"
_LLAMA_2_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
_CONCURRENCIES = np.unique(np.geomspace(1, 512, 64).astype(int)).astype(float)
_UNSEEN_RPS = 1e-9
"""A bucket below this rate is empty."""
_PROVEN = 1e-6
TOLERANCE = 1e-6
"""Relative, of capacity: what HiGHS and CBC call feasible."""
_PATIENCE_S = 120.0


@cache
def histogram(trace: Trace) -> FloatArray:
    """Share of the trace's requests in each bucket, shape (buckets,)."""
    counts = np.zeros(BUCKETS.count)
    with (_TRACES / f"azure_{trace}_2023.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            counts[BUCKETS.index(int(row["input_tokens"]), int(row["output_tokens"]))] += 1
    shares: FloatArray = counts / counts.sum()
    return shares


@cache
def throughput(tpot_ms: float) -> FloatArray:
    """Requests per second of one device, shape (buckets, types); 0 where it misses the objective or has no memory."""
    sizes = np.array([BUCKETS.edges(bucket) for bucket in range(BUCKETS.count)], dtype=np.float64)
    prompts, answers = sizes[:, :1], sizes[:, 1:]
    columns = []
    for name in PRICES:
        model = Roofline(architecture_of(_LLAMA_2_7B), CATALOGUE[name])
        at = model.predict(prompts, answers, _CONCURRENCIES[None, :])
        rps = 1e3 * _CONCURRENCIES[None, :] / (at.ttft_ms + (answers - 1) * at.tpot_ms)
        kept = (at.tpot_ms <= tpot_ms) & (model.places(prompts + answers) >= _CONCURRENCIES[None, :])
        columns.append(np.where(kept, rps, 0.0).max(axis=1))
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Instance:
    """Demand and speed; the GPU types are those of `PRICES`, in this order."""

    rates: FloatArray
    """Requests per second, shape (buckets,)."""
    throughput: FloatArray
    """Of one device, shape (buckets, types)."""

    def problem(self, only: str | None = None) -> Problem:
        """For our solver, as many devices of each type as anybody could want; with `only`, of this type alone."""
        columns = [index for index, name in enumerate(PRICES) if only in (None, name)]
        busy = self.rates > _UNSEEN_RPS
        table = self.throughput[busy][:, columns]
        service = Service(
            key="one",
            priority=0,
            rates=self.rates[busy],
            throughput=table,
            cost=np.array(list(PRICES.values()))[columns],
            use=np.zeros((0, len(columns))),
        )
        return Problem((service,), (), np.zeros(0))

    def singles(self) -> list[str]:
        """Types that could serve every request alone."""
        busy = self.throughput[self.rates > _UNSEEN_RPS]
        return [name for column, name in enumerate(PRICES) if (busy[:, column] > 0).all()]

    def serves_all(self, replicas: Sequence[int]) -> bool:
        """Whether these devices, by type, serve every request: the routing program, by itself and from scratch."""
        program = pulp.LpProblem("check", pulp.LpMinimize)
        busiest = program.add_variable("busiest", 0)
        load: list[list[tuple[pulp.LpVariable, float]]] = [[] for _ in PRICES]
        for b in np.flatnonzero(self.rates > _UNSEEN_RPS).tolist():
            shares = []
            for v in np.flatnonzero(self.throughput[b] > 0).tolist():
                share = program.add_variable(f"x_{b}_{v}", 0, 1)
                shares.append((share, 1.0))
                load[v].append((share, float(self.rates[b] / self.throughput[b, v])))
            program.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(shares), pulp.LpConstraintEQ, rhs=1.0))
        for terms, count in zip(load, replicas, strict=True):
            row = pulp.LpAffineExpression([*terms, (busiest, -float(count))])
            program.addConstraint(pulp.LpConstraint(row, pulp.LpConstraintLE, rhs=0.0))
        program.setObjective(pulp.LpAffineExpression([(busiest, 1.0)]))
        program.solve(pulp.HiGHS(msg=False, threads=1))
        return bool(program.status == pulp.LpStatusOptimal and busiest.varValue <= 1 + TOLERANCE)


def instance(trace: Trace, rps: float, tpot_ms: float) -> Instance:
    """One cell. Requests that no type serves within the objective are left out, for everybody: there are a handful of
    the largest sizes."""
    rates = histogram(trace) * rps
    table = throughput(tpot_ms)
    return Instance(np.where((table > 0).any(axis=1), rates, 0.0), table)


def cost(replicas: Sequence[int]) -> float:
    """Per hour."""
    return float(np.dot(list(PRICES.values()), replicas))


def solved(problem: Problem) -> Solution:
    """Our answer. The solver is asked for a proven optimum."""
    return solve(problem, Limits(gap=0.0), Deadline(time.monotonic, time.monotonic() + _PATIENCE_S))


def proven(found: Solution) -> bool:
    """Whether an answer serves everything and is the cheapest that does."""
    return found.gap_cost is not None and found.gap_cost <= _PROVEN and not any(found.unserved)
