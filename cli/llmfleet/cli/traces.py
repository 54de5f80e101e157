"""`llmfleet plan --trace`: the requests of a trace file in place of a service's own traffic.

What the trace says counts as observed demand, by bucket of the service's profile, and wins over `spec.traffic`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmfleet.api import LLMService, ModelProfile
from llmfleet.cli.refused import RefusedError
from llmfleet.placement import Demand, PlanInputs
from llmfleet.placement.workload import Histogram, TraceError, TraceSizes, requests_of, trace_sizes

SYNTAX = "SERVICE=FILE or SERVICE=FILE,rps=R, such as team/chat=requests.csv,rps=20"
"""What an option may be, for messages."""
_OPTION = re.compile(r"(?P<service>[^=,]+)=(?P<file>.+?)(,rps=(?P<rps>[^,]*))?")
_MOST_RPS = 1e6


@dataclass(frozen=True)
class _Option:
    """One option, read but not yet looked up."""

    text: str
    service: str
    path: Path
    rps: float | None


def with_traces(inputs: PlanInputs, options: Iterable[str]) -> tuple[PlanInputs, list[str]]:
    """The inputs with the demand of these traces, and what the user should know about each.

    Raises RefusedError for an option, a service or a file that cannot be used.
    """
    demand, notes = dict(inputs.demand), []
    traced: dict[str, LLMService] = {}
    profiles = {profile.key: profile for profile in inputs.profiles}
    for option in map(_parsed, options):
        service = _service(inputs, option)
        if service.key in traced:
            raise RefusedError(f"--trace {option.text}: {service.key} has a trace already; accepted is one for each")
        traced[service.key] = _observing(service)
        sizes = read_sizes(option.path)
        histogram = _histogram(sizes, option)
        profile = profiles.get(f"{service.metadata.namespace}/{service.spec.profile}")
        if profile is not None:  # else the service is refused, which says more
            buckets = profile.spec.buckets
            demand[service.key] = Demand(rps=histogram.on(buckets).rps.tolist(), sizes=sizes.by_bucket(buckets))
            notes.append(_note(service, profile, sizes, histogram, option))
    services = [traced.get(service.key, service) for service in inputs.services]
    return PlanInputs.model_validate({**dict(inputs), "services": services, "demand": demand}), notes


def read_sizes(path: Path) -> TraceSizes:
    """The sizes of a trace file's requests. Raises RefusedError with file, line and field."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return trace_sizes(requests_of(lines, str(path)))
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path}: cannot be read: not UTF-8 text") from error
    except TraceError as error:
        raise RefusedError(str(error)) from error


def _parsed(text: str) -> _Option:
    match = _OPTION.fullmatch(text.strip())
    if match is None:
        raise RefusedError(f"--trace {text}: accepted is {SYNTAX}")
    rps = None
    if match["rps"] is not None:
        try:
            rps = float(match["rps"])
        except ValueError:
            rps = math.nan
        if not 0 < rps <= _MOST_RPS:
            raise RefusedError(
                f"--trace {text}: rps is {match['rps']!r}; accepted are requests per second, more than 0 and at most "
                f"{_MOST_RPS:g}"
            )
    return _Option(text, match["service"].strip(), Path(match["file"]), rps)


def _service(inputs: PlanInputs, option: _Option) -> LLMService:
    found = [one for one in inputs.services if option.service in (one.key, one.metadata.name)]
    if len(found) == 1:
        return found[0]
    keys = ", ".join(sorted(service.key for service in found or inputs.services))
    if found:
        raise RefusedError(
            f"--trace {option.text}: several LLMServices are called {option.service!r}: say which of {keys}"
        )
    raise RefusedError(f"--trace {option.text}: there is no LLMService {option.service!r}; there are {keys}")


def _observing(service: LLMService) -> LLMService:
    traffic = service.spec.traffic.model_copy(update={"mode": "observe"})
    return service.model_copy(update={"spec": service.spec.model_copy(update={"traffic": traffic})})


def _histogram(sizes: TraceSizes, option: _Option) -> Histogram:
    try:
        return Histogram.of_trace(sizes, option.rps)
    except ValueError as error:
        raise RefusedError(
            f"{option.path}: {error}, or a rate such as --trace {option.service}={option.path},rps=1"
        ) from error


def _note(service: LLMService, profile: ModelProfile, sizes: TraceSizes, histogram: Histogram, option: _Option) -> str:
    """How much there is, and what of it the service cannot take as it is."""
    buckets, context_length = profile.spec.buckets, service.spec.model.context_length
    rps = float(histogram.rps.sum())
    parts = [
        f"{service.key}: {sizes.requests} requests in {sizes.seconds:.0f} s of {option.path}, planned at {rps:.4g} "
        "requests per second"
    ]
    if too_long := float(histogram.rps[histogram.exceed_context(context_length)].sum()):
        parts.append(
            f"{too_long / rps:.2%} exceed spec.model.contextLength {context_length}: the engine will refuse them"
        )
    if outside := float(histogram.rps[histogram.exceed_buckets(buckets)].sum()):
        last = f"({buckets.input_tokens[-1]}, {buckets.output_tokens[-1]})"
        parts.append(
            f"{outside / rps:.2%} lie above the last bucket {last} of ModelProfile {profile.metadata.name} and are "
            "planned as it"
        )
    return "; ".join(parts)
