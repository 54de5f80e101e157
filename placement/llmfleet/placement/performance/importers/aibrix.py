"""Profiles of AIBrix's GPU optimizer: the most requests per second that kept an objective, and no latency.

    {"tputs": [[...]], "indexes": [[output tokens], [input tokens]], "slos": {"percentile": 99, "e2e": 5.0}, ...}

Rows of `tputs` are answers, columns prompts, cells requests per second; 0 means that nothing kept the objective. What
can honestly be said of latency is the objective itself, in seconds there: at its percentile TTFT was at most `ttft`,
else at most `e2e`; TPOT at most `tpot`, else what `e2e` leaves to each further token. Percentiles above the objective's
are unknown and are put at an hour, so that no stricter objective is ever believed to be kept. A profile without `slos`
(older files) is refused unless the objective is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmfleet.api import MeasuredPoint, Percentiles
from llmfleet.placement.performance.importers.table import (
    Imported,
    ImportRefusedError,
    checked,
    mapping,
    number,
    repaired,
)

UNKNOWN_MS = 3_600_000.0
"""Stands for a percentile that the file says nothing about."""

_LEVELS = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}


@dataclass(frozen=True)
class KnownObjective:
    """The objective that throughput was measured under."""

    ttft_ms: float
    """TTFT was at most this."""
    tpot_ms: float
    """TPOT was at most this."""
    percentile: float
    """For this share of requests, 0-100; 50 where the mean was kept."""


def is_aibrix(document: Mapping[str, Any]) -> bool:
    """Whether an object looks like a profile."""
    return "tputs" in document and "indexes" in document


def read_aibrix(document: Mapping[str, Any], name: str, objective: KnownObjective | None) -> Imported:
    """All cells above zero. `objective`: for files that do not say theirs. Raises ImportRefusedError."""
    outputs, inputs = _indexes(document, name)
    rates = _matrix(document.get("tputs"), f"{name}: tputs", len(outputs), len(inputs))
    notes: list[str] = []
    points, empty = [], []
    for row, output_tokens in enumerate(outputs):
        kept = objective or _objective(document, name, output_tokens)
        for column, input_tokens in enumerate(inputs):
            rps = rates[row][column]
            if rps < 1e-6:
                empty.append(f"input {input_tokens} output {output_tokens}")
            else:
                points.append(_point(input_tokens, output_tokens, rps, kept))
    if not points:
        raise ImportRefusedError(f"{name}: tputs: every cell is 0; accepted is at least one above")
    if empty:
        notes.append(f"{name}: 0 requests/s, so no point, at {'; '.join(empty)}")
    notes.append(
        f"{name}: holds no latency; every point says only that its objective was kept, in flight are at most its "
        "rate times the longest time that the objective allows"
    )
    return Imported(repaired(points, notes), notes, f"AIBrix profile {document.get('gpu', '')}".strip())


def _point(input_tokens: int, output_tokens: int, rps: float, kept: KnownObjective) -> MeasuredPoint:
    longest_ms = kept.ttft_ms + (output_tokens - 1) * kept.tpot_ms
    return MeasuredPoint(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=max(1, math.floor(rps * longest_ms / 1e3)),
        requests=1,
        requests_per_second=rps,
        ttft_ms=_bounded(kept.ttft_ms, kept.percentile),
        tpot_ms=_bounded(kept.tpot_ms, kept.percentile),
    )


def _bounded(bound_ms: float, percentile: float) -> Percentiles:
    return Percentiles(**{name: bound_ms if level <= percentile else UNKNOWN_MS for name, level in _LEVELS.items()})


def _objective(document: Mapping[str, Any], name: str, output_tokens: int) -> KnownObjective:
    if "slos" not in document:
        raise ImportRefusedError(
            f"{name}: slos: missing, so the objective of its throughput is unknown; accepted is a file with slos.e2e, "
            "or with slos.ttft and slos.tpot, or the objective given beside it"
        )
    slos = mapping(document["slos"], f"{name}: slos")
    said = {
        field: number(slos, field, f"{name}: slos.", least=1e-6) for field in ("e2e", "ttft", "tpot") if field in slos
    }
    further = max(output_tokens - 1, 1)
    ttft, tpot = said.get("ttft", said.get("e2e")), said.get("tpot", said["e2e"] / further if "e2e" in said else None)
    if ttft is None or tpot is None:
        raise ImportRefusedError(f"{name}: slos: got {dict(slos)}; accepted is e2e, or ttft and tpot, in seconds")
    # AIBrix's percentile 0 is the mean, which says something about the median at best.
    percentile = number(slos, "percentile", f"{name}: slos.") or 50.0
    return KnownObjective(1e3 * ttft, 1e3 * tpot, percentile)


def _indexes(document: Mapping[str, Any], name: str) -> tuple[list[int], list[int]]:
    found = document["indexes"]
    if not isinstance(found, list) or len(found) != 2 or not all(isinstance(axis, list) and axis for axis in found):
        raise ImportRefusedError(f"{name}: indexes: got {found!r}; accepted is [[output tokens], [input tokens]]")
    axes = [
        [int(checked(value, f"{name}: indexes[{axis}][{i}]", least=1)) for i, value in enumerate(values)]
        for axis, values in enumerate(found)
    ]
    return axes[0], axes[1]


def _matrix(value: object, path: str, rows: int, columns: int) -> list[list[float]]:
    if not isinstance(value, list) or len(value) != rows:
        raise ImportRefusedError(f"{path}: accepted are {rows} rows, one for each of indexes[0]")
    for i, row in enumerate(value):
        if not isinstance(row, list) or len(row) != columns:
            raise ImportRefusedError(
                f"{path}[{i}]: got {row!r}; accepted are {columns} numbers, one for each of indexes[1]"
            )
    return [[checked(cell, f"{path}[{i}][{j}]") for j, cell in enumerate(row)] for i, row in enumerate(value)]
