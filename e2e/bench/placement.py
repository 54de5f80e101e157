"""Everything about plans: `make bench-placement`. Each module says what its rows are; names and targets are in
`docs/benchmarks.md`."""

from __future__ import annotations

from e2e.bench import (
    placement_capacity,
    placement_fleets,
    placement_peers,
    placement_prediction,
    placement_promise,
    placement_promise_apart,
    placement_promise_calibrated,
    placement_promise_heldout,
    placement_saving,
    placement_spot,
)
from e2e.bench.report import Report


def main() -> None:
    report = Report("placement")
    for part in (
        placement_fleets,
        placement_peers,
        placement_saving,
        placement_prediction,
        placement_capacity,
        placement_promise,
        placement_promise_apart,
        placement_promise_heldout,
        placement_promise_calibrated,
        placement_spot,
    ):
        print(f"{part.__name__.rpartition('.')[2]} ...", flush=True)
        part.add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
