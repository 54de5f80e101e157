"""The one shape in which every benchmark reports: rows of medians, printed as a table and written as JSON.

    report = Report("gateway")
    report.add("added_latency_p50", "us", runs, target=None, peer="vllm-router", peer_runs=theirs)
    report.write()

A row never disappears: not when it misses its target, not when it could not be measured (its value is then null and
its note says why), and not when the machine was busy. The load is looked at once, before the benchmark adds its own,
and every row of a busy run says so.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]
# Above this, what is measured competes with somebody else's work.
_BUSY_LOAD_PER_CORE = 0.4


@dataclass(frozen=True)
class Row:
    """One figure. value: the median of `runs` measurements, in `unit`; spread: the smallest and the largest.
    ratio: value / peer_value, from the same run on the same work. ok: whether the target was met, None without one.
    """

    name: str
    value: float | None
    unit: str
    peer: str | None
    peer_value: float | None
    ratio: float | None
    target: float | None
    ok: bool | None
    runs: int
    spread: tuple[float, float] | None
    note: str


class Report:
    """The rows of one area, which names the file `build/bench/<area>.json`."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.load_average = os.getloadavg()
        self.rows: list[Row] = []

    @property
    def busy(self) -> bool:
        return self.load_average[0] > _BUSY_LOAD_PER_CORE * (os.cpu_count() or 1)

    def add(
        self,
        name: str,
        unit: str,
        runs: Sequence[float],
        *,
        target: float | None = None,
        at_most: bool = True,
        peer: str | None = None,
        peer_runs: Sequence[float] = (),
        note: str = "",
    ) -> Row:
        """Add a figure from its measurements; none at all means that it could not be measured.

        `at_most` says whether the target is an upper bound. A missing measurement never meets a target.
        """
        value = _median(runs)
        peer_value = _median(peer_runs)
        met = value is not None and target is not None and (value <= target if at_most else value >= target)
        notes = [note] if note else []
        if self.busy:
            notes.append(f"busy machine: load {self.load_average[0]:.1f} on {os.cpu_count()} cores before the start")
        row = Row(
            name=name,
            value=value,
            unit=unit,
            peer=peer,
            peer_value=peer_value,
            ratio=value / peer_value if value is not None and peer_value else None,
            target=target,
            ok=None if target is None else met,
            runs=len(runs),
            spread=(min(runs), max(runs)) if runs else None,
            note="; ".join(notes),
        )
        self.rows.append(row)
        return row

    def write(self, directory: Path = _CHECKOUT / "build" / "bench") -> Path:
        """Print the table, write the JSON and return its path."""
        document = {
            "area": self.area,
            "commit": commit(),
            "cpu_model": cpu_model(),
            "load_average": self.load_average,
            "rows": [asdict(row) for row in self.rows],
        }
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.area}.json"
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{self.area} at {document['commit']} on {document['cpu_model']}, load {self.load_average[0]:.1f}")
        print(self._table())
        return path

    def _table(self) -> str:
        heads = ("name", "value", "unit", "spread", "runs", "target", "ok", "peer", "ratio", "note")
        lines = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def _cells(row: Row) -> tuple[str, ...]:
    spread = "-" if row.spread is None else f"{row.spread[0]:.4g}..{row.spread[1]:.4g}"
    peer = "-" if row.peer is None else f"{row.peer} {_number(row.peer_value)}"
    ok = {True: "yes", False: "MISSED", None: "-"}[row.ok]
    figures = (row.name, _number(row.value), row.unit, spread, str(row.runs), _number(row.target), ok)
    return (*figures, peer, _number(row.ratio), row.note)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _median(runs: Sequence[float]) -> float | None:
    return statistics.median(runs) if runs else None


def commit() -> str:
    """The commit measured, marked where the working tree differs from it; `unknown` outside a git checkout."""
    command = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def cpu_model() -> str:
    """What the kernel calls the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return "unknown"
