"""Results of `vllm bench serve --save-result` (and of the scripts it grew from).

One run is one object; several are a JSON list or one object per line (`--append-result`). Read are

    completed, request_throughput, total_input_tokens, total_output_tokens      (means: sizes of a run are one point)
    max_concurrency                       null where the run was open loop
    median_ttft_ms, p90_ttft_ms, ...      and the same of tpot, as far as `--metric-percentiles` asked for them
    ttfts, latencies, output_lens         with --save-detailed: all percentiles are then computed, in seconds there

An open-loop run has no concurrency of its own: it is counted at the mean number in flight by Little's law, rounded
down, so that its latency stands for a load no higher than it had.

What `--metadata tp=2 quantization=fp8` has put beside the figures is read too: it says which variant was measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llmfleet.api import MeasuredPoint, Percentiles
from llmfleet.placement.performance.importers.table import (
    Imported,
    ImportRefusedError,
    checked,
    combined,
    number,
    percentiles,
    repaired,
)

_UNEVEN = 1.1
_FACTS = {
    "tp": "tensor_parallel",
    "tp_size": "tensor_parallel",
    "tensor_parallel_size": "tensor_parallel",
    "pp": "pipeline_parallel",
    "pp_size": "pipeline_parallel",
    "pipeline_parallel_size": "pipeline_parallel",
    **{name: name for name in ("quantization", "kv_cache_dtype", "max_num_batched_tokens", "max_num_seqs")},
}
"""Names that people give to what tells variants apart."""


def is_vllm(document: Mapping[str, Any]) -> bool:
    """Whether an object looks like one run."""
    return "request_throughput" in document and any(name.endswith("_ttft_ms") for name in document)


def read_vllm(runs: list[Mapping[str, Any]], name: str) -> Imported:
    """All runs of a file. Raises ImportRefusedError with path and value."""
    notes: list[str] = []
    points = [
        _point(run, f"{name}[{index}]." if len(runs) > 1 else f"{name}: ", notes) for index, run in enumerate(runs)
    ]
    models = sorted({str(run["model_id"]) for run in runs if run.get("model_id")})
    if len(models) > 1:
        raise ImportRefusedError(f"{name}: model_id is {models}; accepted is one model")
    engine = Imported([], [], "vllm", models[0] if models else "")
    each = [replace(engine, run_with=_run_with(run)) for run in runs]
    return replace(combined(each), points=repaired(points, notes), notes=notes)


def _run_with(run: Mapping[str, Any]) -> dict[str, str]:
    """What `--metadata` says of the engine, under the names of this project."""
    found: dict[str, str] = {}
    for key, value in run.items():
        name = key.lstrip("-").replace("-", "_").lower()
        fact = _FACTS.get(name, name)
        if fact in _FACTS.values() and isinstance(value, str | int) and not isinstance(value, bool):
            found[fact] = str(value)
    return found


def _point(run: Mapping[str, Any], path: str, notes: list[str]) -> MeasuredPoint:
    completed = number(run, "completed", path, least=1)
    failed = checked(run.get("failed") or 0, f"{path}failed")
    if failed > 0.01 * completed:
        raise ImportRefusedError(
            f"{path}failed: {failed:g} of {completed + failed:g} requests; accepted are at most 1 %"
        )
    rps = number(run, "request_throughput", path, least=1e-6)
    inputs = number(run, "total_input_tokens", path, least=1) / completed
    outputs = number(run, "total_output_tokens", path, least=1) / completed
    lengths = run.get("input_lens")
    if isinstance(lengths, list) and lengths and max(lengths) > _UNEVEN * min(lengths):
        notes.append(f"{path}input_lens vary from {min(lengths)} to {max(lengths)}; their mean {inputs:.0f} is taken")
    ttft, tpot = _latency(run, "ttft", path, notes), _latency(run, "tpot", path, notes)
    return MeasuredPoint(
        input_tokens=max(1, math.floor(inputs)),
        output_tokens=max(1, math.floor(outputs)),
        concurrency=_concurrency(run, path, rps * (ttft.p50 + (outputs - 1) * tpot.p50) / 1e3, notes),
        requests=int(completed),
        requests_per_second=rps,
        ttft_ms=ttft,
        tpot_ms=tpot,
    )


def _concurrency(run: Mapping[str, Any], path: str, in_flight: float, notes: list[str]) -> int:
    said = run.get("max_concurrency")
    if said is None:
        found = max(1, math.floor(in_flight))
        notes.append(f"{path}max_concurrency is null (open loop); {found} in flight by Little's law")
        return found
    return int(checked(said, f"{path}max_concurrency", least=1))


def _latency(run: Mapping[str, Any], metric: str, path: str, notes: list[str]) -> Percentiles:
    detailed = _detailed(run, metric)
    if detailed is not None:
        levels = (50.0, 90.0, 95.0, 99.0, 100.0)
        return percentiles(dict(zip(levels, np.percentile(detailed, levels).tolist(), strict=True)), path, notes)
    known = {50.0: number(run, f"median_{metric}_ms", path)}
    for field, value in run.items():
        matched = re.fullmatch(rf"p(\d+(?:\.\d+)?)_{metric}_ms", field)
        if matched:
            known[float(matched.group(1))] = checked(value, f"{path}{field}")
    return percentiles(known, f"{path}{metric}", notes)


def _detailed(run: Mapping[str, Any], metric: str) -> list[float] | None:
    """Of single requests, in ms; None where the file has only their summary."""
    first, whole, lengths = (run.get(field) for field in ("ttfts", "latencies", "output_lens"))
    if not isinstance(first, list) or not first:
        return None
    if metric == "ttft":
        return [1e3 * value for value in first]
    if not (isinstance(whole, list) and isinstance(lengths, list) and len(first) == len(whole) == len(lengths)):
        return None
    rows = zip(first, whole, lengths, strict=True)
    return [1e3 * (total - start) / (length - 1) for start, total, length in rows if length > 1] or None
