"""What mixing GPU types saves: the `saving_*` rows of `make bench-placement`.

    add_rows(report)
    python -m e2e.bench.placement_saving             only these rows, with a line per cell

For both Azure traces, both of Mélange's objectives and 1 to 32 requests per second: the cheapest mix against the
cheapest single type, both to a proven optimum, with the same four types at one device per replica, in one precision.
Only types that serve every request of the trace within the objective count as single ones, as in the paper. The
figures that the paper prints (its tables 3 to 8) have a mean of 16.6 % against the best single type. Sizes and speeds
are other ones there, so this figure stands beside it and runs no race.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from e2e.bench.placement_melange import PRICES, TPOT_MS, TRACES, Trace, cost, instance, proven, solved
from e2e.bench.report import Report

RATES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PUBLISHED_PERCENT = 16.6
"""Mean of the 36 cells in Mélange's tables 3 to 8, each against its best single type."""


@dataclass(frozen=True)
class Cell:
    """One trace, objective and rate."""

    trace: Trace
    tpot_ms: float
    rps: float
    mix: tuple[int, ...]
    """Devices by type."""
    best: str
    """The best single type."""
    best_cost: float
    proofs: list[bool]
    """Of the mix and of every single type: whether it is a proven optimum that serves everything."""

    @property
    def saving_percent(self) -> float:
        """Of the cost of the best single type."""
        return 100 * (1 - cost(self.mix) / self.best_cost)


def measured(trace: Trace, tpot_ms: float, rps: float) -> Cell:
    """Solves one cell and its single types."""
    cell = instance(trace, rps, tpot_ms)
    mix = solved(cell.problem())
    proofs = [proven(mix) and cell.serves_all(mix.replicas[0])]
    singles = {}
    for name in cell.singles():
        found = solved(cell.problem(only=name))
        counts = [found.replicas[0][0] if other == name else 0 for other in PRICES]
        proofs.append(proven(found) and cell.serves_all(counts))
        singles[name] = cost(counts)
    best = min(singles, key=lambda name: singles[name])
    return Cell(trace, tpot_ms, rps, mix.replicas[0], best, singles[best], proofs)


def add_rows(report: Report) -> None:
    """Adds the rows of docs/benchmarks.md."""
    cells = [measured(trace, tpot, rps) for trace in TRACES for tpot in TPOT_MS for rps in RATES]
    for cell in cells:
        print(_line(cell), flush=True)
    savings = [cell.saving_percent for cell in cells]
    none = sum(value < 1e-6 for value in savings)
    report.add(
        "saving_mean",
        "%",
        [fmean(savings)],
        peer="Melange as published",
        peer_runs=[PUBLISHED_PERCENT],
        note=f"{len(cells)} cells, {min(savings):.1f} to {max(savings):.1f}, nothing saved in {none}",
    )
    for trace in TRACES:
        for tpot_ms in TPOT_MS:
            part = [cell.saving_percent for cell in cells if (cell.trace, cell.tpot_ms) == (trace, tpot_ms)]
            note = f"{min(part):.1f} to {max(part):.1f}"
            report.add(f"saving_mean_{trace}_{tpot_ms:.0f}_ms", "%", [fmean(part)], note=note)
    proofs = [proof for cell in cells for proof in cell.proofs]
    share = 100 * sum(proofs) / len(proofs)
    note = f"{len(proofs)} programs of {len(cells)} cells"
    report.add("saving_cells_proven", "%", [share], target=100, at_most=False, note=note)


def _line(cell: Cell) -> str:
    mix = ", ".join(f"{count} {name}" for name, count in zip(PRICES, cell.mix, strict=True) if count)
    return (
        f"{cell.trace}, {cell.tpot_ms:.0f} ms, {cell.rps:.0f} req/s: ${cost(cell.mix):.3f} with {mix}; "
        f"{cell.best} alone ${cell.best_cost:.3f}: {cell.saving_percent:.1f} % saved"
    )


def main() -> None:
    """These rows alone."""
    report = Report("placement_saving")
    add_rows(report)
    report.write()


if __name__ == "__main__":
    main()
