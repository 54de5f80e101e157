"""Trace files as arrivals. What forms a file may have is `llmfleet.placement.workload.traces`' to say: a plan for a
trace and its replay read the same requests."""

from __future__ import annotations

from pathlib import Path

from llmfleet.placement.workload import requests_of
from llmfleet.simulator.arrivals import Arrival


def read_trace(path: Path) -> list[Arrival]:
    """The requests of a trace file. Raises ValueError with file, line and field for what cannot be used."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return [Arrival(one.at_s, one.input_tokens, one.output_tokens) for one in requests_of(lines, str(path))]
