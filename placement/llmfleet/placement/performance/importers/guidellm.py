"""Reports of guidellm (`benchmarks.json`): one closed-loop or open-loop run per item of `benchmarks`.

    config.strategy.type_, .streams                        `concurrent` has its streams in flight, `synchronous` one
    metrics.requests_per_second.successful.mean
    metrics.request_concurrency.successful.mean            what was in flight, where the strategy is another
    metrics.prompt_token_count / output_token_count .successful.mean
    metrics.time_to_first_token_ms.successful.percentiles.p50 ... p99, .max
    metrics.inter_token_latency_ms.successful...           TPOT of this project: without the first token

(guidellm's own `time_per_output_token_ms` includes the first token and is not read.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmfleet.api import MeasuredPoint, Percentiles
from llmfleet.placement.performance.importers.table import (
    Imported,
    ImportRefusedError,
    checked,
    mapping,
    number,
    percentiles,
    repaired,
)

_LEVELS = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}


def is_guidellm(document: Mapping[str, Any]) -> bool:
    """Whether an object looks like a report."""
    return isinstance(document.get("benchmarks"), list)


def read_guidellm(document: Mapping[str, Any], name: str) -> Imported:
    """All runs of a report. Raises ImportRefusedError with path and value."""
    notes: list[str] = []
    runs = document["benchmarks"]
    if not runs:
        raise ImportRefusedError(f"{name}: benchmarks: empty; accepted is at least one run")
    points = [
        _point(mapping(run, f"{name}: benchmarks[{i}]"), f"{name}: benchmarks[{i}].", notes)
        for i, run in enumerate(runs)
    ]
    return Imported(repaired(points, notes), notes, "guidellm")


def _point(run: Mapping[str, Any], path: str, notes: list[str]) -> MeasuredPoint:
    metrics = mapping(run.get("metrics"), f"{path}metrics")
    path = f"{path}metrics."
    ttft, requests = _latency(metrics, "time_to_first_token_ms", path, notes)
    tpot, _ = _latency(metrics, "inter_token_latency_ms", path, notes)
    return MeasuredPoint(
        input_tokens=max(1, math.floor(_mean(metrics, "prompt_token_count", path, least=1))),
        output_tokens=max(1, math.floor(_mean(metrics, "output_token_count", path, least=1))),
        concurrency=_concurrency(run, metrics, path, notes),
        requests=requests,
        requests_per_second=_mean(metrics, "requests_per_second", path, least=1e-6),
        ttft_ms=ttft,
        tpot_ms=tpot,
    )


def _successful(metrics: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    return mapping(mapping(metrics.get(name), f"{path}{name}").get("successful"), f"{path}{name}.successful")


def _mean(metrics: Mapping[str, Any], name: str, path: str, *, least: float) -> float:
    return number(_successful(metrics, name, path), "mean", f"{path}{name}.successful.", least=least)


def _latency(metrics: Mapping[str, Any], name: str, path: str, notes: list[str]) -> tuple[Percentiles, int]:
    summary = _successful(metrics, name, path)
    path = f"{path}{name}.successful."
    levels = mapping(summary.get("percentiles"), f"{path}percentiles")
    known = {level: number(levels, field, f"{path}percentiles.") for field, level in _LEVELS.items() if field in levels}
    known[100.0] = number(summary, "max", path)
    return percentiles(known, path.removesuffix("."), notes), int(number(summary, "count", path, least=1))


def _concurrency(run: Mapping[str, Any], metrics: Mapping[str, Any], path: str, notes: list[str]) -> int:
    config = run.get("config")
    strategy = config.get("strategy") if isinstance(config, Mapping) else None
    kind = strategy.get("type_") if isinstance(strategy, Mapping) else None
    if kind == "synchronous":
        return 1
    if kind == "concurrent" and isinstance(strategy, Mapping):
        where = path.replace("metrics.", "config.strategy.")
        return int(checked(strategy.get("streams"), f"{where}streams", least=1))
    found = max(1, math.floor(_mean(metrics, "request_concurrency", path, least=0)))
    notes.append(
        f"{path}request_concurrency: {found} in flight on average (strategy {kind or 'unknown'}, no closed loop)"
    )
    return found
