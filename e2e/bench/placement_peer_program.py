"""The peers' programs, run by the interpreter of the peers' own environment; nothing of ours is importable there.

    {"program", "shares", "rps", "throughput", "prices", "limit_s"} on standard input
    {"counts", "seconds", "cpu_seconds"} on standard output; counts is null where there is no answer

Two programs answer the same question. `aibrix`: the solver of the PyPI package as its own runner calls it, four slices
per bucket. `paper`: the program of arXiv 2404.14527, section 5.4, written here from the paper: every bucket in eight
slices, a binary per slice and type, an integer per type. Both are given to CBC by PuLP. Timed is what a caller would
wait for: building the program and solving it, not importing.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

_SLICES = 8


def aibrix(asked: dict[str, Any]) -> list[int] | None:
    """The published package; it takes tables by output and input tokens, of which it only needs that shapes agree."""
    from aibrix.gpu_optimizer.optimizer.solver.melange import (  # type: ignore[import-not-found]
        Config,
        SolverRunner,
    )

    types = [str(number) for number in range(len(asked["prices"]))]
    config = Config(
        gpu_info={
            name: {"cost": price, "tputs": [[row[number]] for row in asked["throughput"]]}
            for number, (name, price) in enumerate(zip(types, asked["prices"], strict=True))
        },
        workload_distribution=[[share] for share in asked["shares"]],
        total_request_rate=asked["rps"],
    )
    answer = SolverRunner(config).run()
    return None if answer is None else [answer[name] for name in types]


def paper(asked: dict[str, Any]) -> list[int] | None:
    """Mélange's program; an impossible pair of slice and type has no variable instead of an infinite load."""
    import pulp

    program = pulp.LpProblem("melange", pulp.LpMinimize)
    types = range(len(asked["prices"]))
    counts = [pulp.LpVariable(f"B_{j}", lowBound=0, cat="Integer") for j in types]
    load: list[list[Any]] = [[] for _ in types]
    for bucket, (share, row) in enumerate(zip(asked["shares"], asked["throughput"], strict=True)):
        for piece in range(_SLICES):
            here = {j: pulp.LpVariable(f"A_{bucket}_{piece}_{j}", cat="Binary") for j in types if row[j] > 0}
            if share > 0 or here:
                program += pulp.lpSum(here.values()) == 1
            for j, variable in here.items():
                load[j].append(share * asked["rps"] / _SLICES / row[j] * variable)
    for j in types:
        program += pulp.lpSum(load[j]) <= counts[j]
    program += pulp.lpSum(price * count for price, count in zip(asked["prices"], counts, strict=True))
    program.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=asked["limit_s"]))
    # "Optimal" is also said of what a time limit left behind; a value is all that is asked for here.
    if any(count.value() is None for count in counts):
        return None
    return [round(count.value()) for count in counts]


def _cpu_seconds() -> float:
    """Of this process and of the solvers that it started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def main() -> None:
    """One question, one answer."""
    asked = json.load(sys.stdin)
    solve = {"aibrix": aibrix, "paper": paper}[asked["program"]]
    solve({**asked, "shares": [1.0], "rps": 1.0, "throughput": [[1.0] * len(asked["prices"])]})  # imports, first start
    began, began_cpu = time.perf_counter(), _cpu_seconds()
    counts = solve(asked)
    seconds, cpu_seconds = time.perf_counter() - began, _cpu_seconds() - began_cpu
    json.dump({"counts": counts, "seconds": seconds, "cpu_seconds": cpu_seconds}, sys.stdout)


if __name__ == "__main__":
    main()
