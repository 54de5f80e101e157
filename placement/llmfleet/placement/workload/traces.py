"""Trace files: lines in, requests out, each with its time and size, in order.

Which form a file has shows in its first line:

| form | line | time |
|---|---|---|
| Azure LLM inference traces (CSV with header) | `TIMESTAMP,ContextTokens,GeneratedTokens` | a date and time |
| Mooncake traces (a JSON object per line) | `{"timestamp": 0, "input_length": 1, "output_length": 1}` | milliseconds |
| our own (CSV with header) | `arrival_s,input_tokens,output_tokens` | seconds |

Other columns and keys are ignored. A row that does not say when and how large, or that goes back in time, ends the
reading with an error: a load from which some requests were silently left out would be planned too small.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from llmfleet.api.llmservice import MOST_TOKENS


class TraceError(ValueError):
    """A trace that cannot be used. The message names file, line, field, value and what is accepted."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace: when it came, in seconds from any beginning, and its size in tokens."""

    at_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class _Form:
    """How one kind of trace names and writes what a request is."""

    time: str
    input_tokens: str
    output_tokens: str
    seconds: Callable[[Any], float | None]
    """Seconds of what stands in the time's field; None where it is no time."""
    times: str
    """What is accepted as a time, in words."""

    @property
    def fields(self) -> tuple[str, str, str]:
        return self.time, self.input_tokens, self.output_tokens


def requests_of(lines: Iterable[str], name: str) -> Iterator[Request]:
    """The requests of a trace file, one after the other, so that its size does not matter.

    `name`: how errors call the file. Raises TraceError for the first thing that cannot be used, no rows included.
    """
    rest = iter(lines)
    first = next(rest, "")
    rows = _objects(chain([first], rest), name) if first.lstrip().startswith("{") else _table(first, rest, name)
    before = -math.inf
    for place, form, row in rows:
        request = _request(row, form, place)
        if request.at_s < before:
            raise TraceError(
                f"{place}: {form.time}: got {_shown(row[form.time])}, {before - request.at_s:g} s before the row "
                "above it; accepted are rows in order of time"
            )
        before = request.at_s
        yield request
    if before == -math.inf:
        raise TraceError(f"{name}: no rows; accepted is at least one request")


def _table(header: str, rest: Iterator[str], name: str) -> Iterator[tuple[str, _Form, Mapping[str, Any]]]:
    """Rows of a CSV, the header of which is already read."""
    columns = [column.strip() for column in header.split(",")]
    reader = csv.DictReader(rest, fieldnames=columns)
    form = max((_AZURE, _OWN), key=lambda one: len({*one.fields} & {*columns}))
    missing = [field for field in form.fields if field not in columns]
    if len(missing) == len(form.fields):
        accepted = " or ".join(",".join(one.fields) for one in (_AZURE, _OWN))
        raise TraceError(
            f"{name}: line 1: got {_shown(header.strip())}; accepted are the columns {accepted}, or JSON objects with "
            f"{', '.join(_MOONCAKE.fields)}"
        )
    if missing:
        raise TraceError(f"{name}: line 1: no column {', '.join(missing)}; accepted are {', '.join(form.fields)}")
    try:
        for row in reader:
            yield f"{name}: line {reader.line_num + 1}", form, row
    except csv.Error as error:
        raise TraceError(f"{name}: line {reader.line_num + 2}: not CSV: {error}") from error


def _objects(lines: Iterable[str], name: str) -> Iterator[tuple[str, _Form, Mapping[str, Any]]]:
    """JSON objects, one per line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{place}: got {_shown(line.strip())}; accepted is a JSON object") from error
        if not isinstance(row, dict):
            raise TraceError(f"{place}: got {_shown(row)}; accepted is a JSON object")
        yield place, _MOONCAKE, row


def _request(row: Mapping[str, Any], form: _Form, place: str) -> Request:
    at_s = form.seconds(row.get(form.time))
    if at_s is None:
        raise TraceError(f"{place}: {form.time}: got {_shown(row.get(form.time))}; accepted is {form.times}")
    sizes = []
    for field in (form.input_tokens, form.output_tokens):
        tokens = _tokens(row.get(field))
        if tokens is None:
            raise TraceError(
                f"{place}: {field}: got {_shown(row.get(field))}; accepted are whole numbers from 1 to {MOST_TOKENS}"
            )
        sizes.append(tokens)
    return Request(at_s, *sizes)


def _tokens(value: Any) -> int | None:
    if isinstance(value, str):
        text = value.strip()
        value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        return None
    return value


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0.0 <= seconds < math.inf else None


def _milliseconds(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        return None
    return value / 1e3


def _date(value: Any) -> float | None:
    """Seconds since 1970; without a zone, as if in UTC, since only differences count."""
    try:
        moment = datetime.fromisoformat((value or "").strip())
    except ValueError:
        return None
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_AZURE = _Form("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date, "a time such as 2023-11-16 18:15:46.680590")
_MOONCAKE = _Form("timestamp", "input_length", "output_length", _milliseconds, "a number of milliseconds from 0")
_OWN = _Form("arrival_s", "input_tokens", "output_tokens", _seconds, "a number of seconds from 0")
