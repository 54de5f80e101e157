"""Where requests go and what that is worth: `make bench-routing`. Engine models in simulated time behind the gateway's
own policy. Each module says what its rows are; names and targets are in `docs/benchmarks.md`."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

from e2e.bench import routing_priority, routing_reschedule, routing_split, routing_ttft
from e2e.bench.report import Report


def main() -> None:
    report = Report("routing")
    print("routing_split ...", flush=True)
    routing_split.add_rows(report)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        print("routing_ttft ...", flush=True)
        routing_ttft.add_rows(report, pool)
        print("routing_reschedule ...", flush=True)
        routing_reschedule.add_rows(report, pool)
        print("routing_priority ...", flush=True)
        routing_priority.add_rows(report, pool)
    report.write()


if __name__ == "__main__":
    main()
