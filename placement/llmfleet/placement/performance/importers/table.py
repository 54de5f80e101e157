"""What every importer shares: reading fields by path, completing percentiles, and repairing cells downwards.

* A **percentile** that the file lacks is taken from the next higher one it has (`at_least`), so never optimistic.
* **Contradictions** are repaired towards the worse and said: percentiles that fall are raised to the one below; a
  larger request that is said to be completed more often than a smaller one at the same concurrency counts as often.
* **Corners**: a run counts for a bucket if its sizes are those of the bucket's upper corner or up to a quarter above
  them: it was measured with requests no smaller than it will stand for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmfleet.api import Buckets, MeasuredPoint, Percentiles

_LEVELS = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
_ABOVE_CORNER = 1.25
_MOST_NAMED = 4


class ImportRefusedError(ValueError):
    """A file that cannot be imported; the message has the path of the field, its value and what is accepted."""


@dataclass(frozen=True)
class Imported:
    """What one file gave."""

    points: list[MeasuredPoint]
    """Measured points, by size and concurrency."""
    notes: list[str] = field(default_factory=list)
    """What was filled in, repaired or left out, in words."""
    engine: str = ""
    """Engine or tool that the file names."""
    model: str = ""
    """Model that the file names; empty if it names none."""
    run_with: Mapping[str, str] = field(default_factory=dict)
    """What the file says of the engine, as far as it tells variants apart: `tensor_parallel`, `quantization`, ..."""


def number(document: Mapping[str, Any], name: str, path: str, *, least: float = 0.0) -> float:
    """A finite number of at least `least`. Raises ImportRefusedError."""
    if name not in document:
        raise ImportRefusedError(f"{path}{name}: missing; accepted is a number of at least {least:g}")
    return checked(document[name], f"{path}{name}", least=least)


def checked(value: object, path: str, *, least: float = 0.0) -> float:
    """The value, if it is a finite number of at least `least`. Raises ImportRefusedError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        raise ImportRefusedError(f"{path}: got {value!r}; accepted is a finite number of at least {least:g}")
    return float(value)


def mapping(value: object, path: str) -> Mapping[str, Any]:
    """The value, if it is an object. Raises ImportRefusedError."""
    if not isinstance(value, Mapping):
        raise ImportRefusedError(f"{path}: got {type(value).__name__}; accepted is an object")
    return value


def percentiles(known: Mapping[float, float], path: str, notes: list[str]) -> Percentiles:
    """A full distribution out of the levels (0-100) that are known, in ms.

    Raises ImportRefusedError if none at or above 90 is known: a tail cannot be invented from a median.
    """
    ordered = sorted(known.items())
    if not ordered or ordered[-1][0] < 90:
        have = ", ".join(f"p{level:g}" for level, _ in ordered) or "none"
        raise ImportRefusedError(f"{path}: percentiles known are {have}; accepted is at least one from p90 upwards")
    raised: dict[float, float] = {}
    so_far = 0.0
    for level, value in ordered:
        if value < so_far:
            notes.append(f"{path}: p{level:g} of {value:g} ms is below a lower percentile; {so_far:g} ms is taken")
        so_far = max(so_far, value)
        raised[level] = so_far
    found, filled = {}, []
    for name, level in _LEVELS.items():
        higher = [value for have, value in raised.items() if have >= level]
        found[name] = min(higher) if higher else so_far
        if level not in raised:
            filled.append(name)
    if filled:
        notes.append(
            f"{path}: {', '.join(filled)} not in the file; the next higher percentile, or the highest, is taken"
        )
    return Percentiles(**found)


def repaired(points: Sequence[MeasuredPoint], notes: list[str]) -> list[MeasuredPoint]:
    """Points by size and concurrency, one of each, none claiming more than a smaller request was seen to get."""
    best: dict[tuple[int, int, int], MeasuredPoint] = {}
    for point in points:
        key = (point.input_tokens, point.output_tokens, point.concurrency)
        if key in best:
            notes.append(
                f"{_named(point)} was measured more than once; the run with fewer requests per second is taken"
            )
            point = min(best[key], point, key=lambda one: one.requests_per_second)
        best[key] = point
    ordered = [best[key] for key in sorted(best)]
    for i, point in enumerate(ordered):
        smaller = [
            one.requests_per_second
            for one in ordered[:i]
            if one.concurrency == point.concurrency
            and one.input_tokens <= point.input_tokens
            and one.output_tokens <= point.output_tokens
        ]
        least = min(smaller, default=point.requests_per_second)
        if point.requests_per_second > least:
            notes.append(
                f"{_named(point)}: {point.requests_per_second:g} requests/s is more than the {least:g} of a smaller "
                f"request; {least:g} is taken"
            )
            ordered[i] = point.model_copy(update={"requests_per_second": least})
    return ordered


def combined(results: Sequence[Imported]) -> Imported:
    """Several files of one engine and model as one. Raises ImportRefusedError where they name different ones."""
    models = sorted({one.model for one in results if one.model})
    if len(models) > 1:
        raise ImportRefusedError(f"the files name the models {', '.join(models)}; accepted are results of one model")
    notes = [note for one in results for note in one.notes]
    points = repaired([point for one in results for point in one.points], notes)
    engines = sorted({one.engine for one in results if one.engine})
    run_with: dict[str, str] = {}
    for one in results:
        for fact, value in one.run_with.items():
            if run_with.setdefault(fact, value) != value:
                raise ImportRefusedError(
                    f"the files say {fact} {run_with[fact]} and {value}; accepted are results of one engine"
                )
    return Imported(points, notes, ", ".join(engines), "".join(models), run_with)


def at_corners(imported: Imported, buckets: Buckets) -> Imported:
    """The points moved to the upper corners of buckets that they may stand for; others are left out and said.

    Raises ImportRefusedError if none is left.
    """
    moved, lost = [], []
    for point in imported.points:
        corner = (_edge(buckets.input_tokens, point.input_tokens), _edge(buckets.output_tokens, point.output_tokens))
        if None in corner:
            lost.append(point)
        else:
            moved.append(point.model_copy(update={"input_tokens": corner[0], "output_tokens": corner[1]}))
    notes = list(imported.notes)
    if lost:
        shown = "; ".join(_named(point) for point in lost[:_MOST_NAMED])
        more = f" and {len(lost) - _MOST_NAMED} more" if len(lost) > _MOST_NAMED else ""
        notes.append(f"left out, at most a quarter above no bucket's corner: {shown}{more}")
    if not moved:
        raise ImportRefusedError(
            f"no run fits a bucket: accepted are sizes of the corners of input {buckets.input_tokens} and output "
            f"{buckets.output_tokens}, or up to a quarter more; {notes[-1]}"
        )
    return replace(imported, points=repaired(moved, notes), notes=notes)


def _edge(edges: list[int], tokens: int) -> int | None:
    fitting = [edge for edge in edges if edge <= tokens <= _ABOVE_CORNER * edge]
    return max(fitting, default=None)


def _named(point: MeasuredPoint) -> str:
    return f"input {point.input_tokens} output {point.output_tokens} concurrency {point.concurrency}"
