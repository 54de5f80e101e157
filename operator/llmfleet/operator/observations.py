"""What gateways tell of engines, added up into what the engines did: requests, their times, and the load around them.

    rounds of DemandReports --record--> differences by service, variant, bucket and load --take--> ObservedVariant

Reports are cumulative, so what happened between two rounds is a difference. A gateway knows of its own requests only,
while an engine works on everyone's: what was around a request is what its own gateway had there during its stay, and
what the others had there on average between the two rounds, which are a few seconds apart.

So a round counts only where all is known of it, and else teaches nothing, since half of the load would make every
engine look slow:

* A round in which a gateway did not answer is passed over: the next one is compared with the one before it.
* Where a gateway is gone since the round before, or one answers that has been there for longer and was not heard,
  what it had in the engines meanwhile is not known. The next round begins anew.
* The same holds for gateways that take turns at one address, and for services that some gateway tells nothing of.

Pure: the caller's clock, no I/O. What was not taken yet is lost with the process: minutes of what goes on anyway.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmfleet.api import Buckets, DemandReport, ObservedCell, ObservedSums, ObservedVariant, Part, VariantLoad

_Series = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Service key and bucket edges."""
_Slot = tuple[str, int, int]
"""Variant, bucket, octave."""


@dataclass(frozen=True, slots=True)
class _Told:
    """What one gateway has told of one service."""

    sums: Mapping[_Slot, ObservedSums]
    loads: Mapping[str, VariantLoad]


_NOTHING = _Told({}, {})


@dataclass(frozen=True, slots=True)
class _Round:
    """What every gateway told of one service in one round, by instance id."""

    at_s: float
    told: Mapping[str, _Told]


class EngineObserver:
    """Takes rounds in, gives observations out."""

    def __init__(self) -> None:
        self._rounds: dict[_Series, _Round] = {}
        self._seen: defaultdict[tuple[_Series, str], dict[tuple[int, int], ObservedCell]] = defaultdict(dict)

    def record(
        self, reports: Mapping[str, DemandReport | None], detail: Part, now_s: float, *, take_turns: bool = False
    ) -> None:
        """One round: every gateway that exists, by any stable name, None where it did not answer, and the part of the
        services of which details were asked for. `take_turns`: more gateways than these were heard at the same
        addresses; `now_s`: seconds of one monotonic clock."""
        if not reports or take_turns or any(report is None for report in reports.values()):
            return
        answers = {report.instance_id: report for report in reports.values() if report is not None}
        told: defaultdict[_Series, dict[str, _Told]] = defaultdict(dict)
        untold: set[_Series] = set()
        for instance, report in answers.items():
            for demand in report.services:
                key = f"{demand.namespace}/{demand.service}"
                series = (key, tuple(demand.buckets.input_tokens), tuple(demand.buckets.output_tokens))
                if demand.observed is not None and demand.loads is not None:
                    told[series][instance] = _told(demand.observed, demand.loads, demand.buckets)
                elif detail.holds(key):
                    untold.add(series)
        for series in {series for series in self._rounds if detail.holds(series[0])} - told.keys():
            del self._rounds[series]
        for series, some in told.items():
            before = self._rounds.pop(series, None)
            if series in untold:
                continue
            self._rounds[series] = _Round(now_s, {instance: some.get(instance, _NOTHING) for instance in answers})
            if before is not None and _comparable(before, answers, now_s):
                self._compare(series, before, self._rounds[series])

    def take(self) -> list[ObservedVariant]:
        """What was seen since the last time, by service and variant."""
        seen, self._seen = self._seen, defaultdict(dict)
        return [
            ObservedVariant(
                service=series[0],
                variant=variant,
                buckets=Buckets(input_tokens=list(series[1]), output_tokens=list(series[2])),
                cells=[cell for _, cell in sorted(cells.items())],
            )
            for (series, variant), cells in sorted(seen.items())
        ]

    def give_back(self, observed: Iterable[ObservedVariant]) -> None:
        """Takes in again what could not be made use of."""
        for one in observed:
            series = (one.service, tuple(one.buckets.input_tokens), tuple(one.buckets.output_tokens))
            for cell in one.cells:
                self._add(series, one.variant, cell)

    def _compare(self, series: _Series, before: _Round, after: _Round) -> None:
        elapsed_s = after.at_s - before.at_s
        had = {
            instance: _had(before.told.get(instance, _NOTHING).loads, told.loads)
            for instance, told in after.told.items()
        }
        for instance, told in after.told.items():
            old = before.told.get(instance, _NOTHING).sums
            for slot, sums in told.sums.items():
                fresh, variant = _difference(sums, old.get(slot)), slot[0]
                engines = _engines(variant, after)
                if fresh is None or engines == 0:
                    continue
                others_s = sum(load_s.get(variant, 0.0) for other, load_s in had.items() if other != instance)
                self._add(
                    series,
                    variant,
                    ObservedCell(
                        bucket=fresh.bucket,
                        requests=fresh.requests,
                        concurrency=max(1.0, fresh.load / fresh.requests + others_s / elapsed_s / engines),
                        input_tokens=fresh.input_tokens,
                        ttft_ms=fresh.ttft_ms,
                        decoded_tokens=fresh.decoded_tokens,
                        decode_ms=fresh.decode_ms,
                    ),
                )

    def _add(self, series: _Series, variant: str, cell: ObservedCell) -> None:
        cells, slot = self._seen[series, variant], (cell.bucket, round(math.log2(cell.concurrency)))
        old = cells.get(slot)
        if old is not None:
            requests = old.requests + cell.requests
            cell = ObservedCell(
                bucket=cell.bucket,
                requests=requests,
                concurrency=(old.concurrency * old.requests + cell.concurrency * cell.requests) / requests,
                input_tokens=old.input_tokens + cell.input_tokens,
                ttft_ms=old.ttft_ms + cell.ttft_ms,
                decoded_tokens=old.decoded_tokens + cell.decoded_tokens,
                decode_ms=old.decode_ms + cell.decode_ms,
            )
        cells[slot] = cell


def _told(observed: Mapping[str, Sequence[ObservedSums]], loads: Mapping[str, VariantLoad], buckets: Buckets) -> _Told:
    sums = {
        (variant, one.bucket, one.octave): one
        for variant, some in observed.items()
        for one in some
        if one.bucket < buckets.count
    }
    return _Told(sums, loads)


def _comparable(before: _Round, answers: Mapping[str, DemandReport], now_s: float) -> bool:
    """Whether all that gateways had in engines between the two rounds is known."""
    elapsed_s = now_s - before.at_s
    new = [report for instance, report in answers.items() if instance not in before.told]
    return (
        elapsed_s > 0
        and before.told.keys() <= answers.keys()
        and all(report.uptime_seconds is not None and report.uptime_seconds <= elapsed_s for report in new)
    )


def _had(before: Mapping[str, VariantLoad], after: Mapping[str, VariantLoad]) -> dict[str, float]:
    """Request seconds by variant; all of them where they began anew."""
    found = {}
    for variant, load in after.items():
        old_s = before[variant].request_seconds if variant in before else 0.0
        found[variant] = load.request_seconds - (old_s if old_s <= load.request_seconds else 0.0)
    return found


def _difference(after: ObservedSums, before: ObservedSums | None) -> ObservedSums | None:
    """What came on top; all of it where the sums began anew, None where nothing came."""
    if before is None or after.requests < before.requests:
        return after
    more = ObservedSums(
        bucket=after.bucket,
        octave=after.octave,
        requests=after.requests - before.requests,
        load=after.load - before.load,
        input_tokens=after.input_tokens - before.input_tokens,
        ttft_ms=after.ttft_ms - before.ttft_ms,
        decoded_tokens=after.decoded_tokens - before.decoded_tokens,
        decode_ms=after.decode_ms - before.decode_ms,
    )
    return more if more.requests > 0 and min(more) >= 0 else None


def _engines(variant: str, last: _Round) -> int:
    return max((told.loads[variant].engines for told in last.told.values() if variant in told.loads), default=0)
