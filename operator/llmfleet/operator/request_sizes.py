"""How long requests are within their buckets: what `Demand.sizes` asks for.

    DemandReports (cumulative sums by bucket) --record--> differences, added up --of--> BucketSizes by bucket

The sums of all gateways are added up; old requests fade as new ones come, not with time, so that a service without
traffic keeps what is known of it and gives its plan no reason to change. A gateway that is heard of for the first time
brings all that it has counted: how long requests are is no news that grows old within hours.

Until something is known of a bucket, what the plan in force was made with stands in, as its demand does.

Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from llmfleet.api import Buckets, BucketSizes, DemandReport, ServicePlan

REMEMBERED_REQUESTS = 1000.0
"""A bucket's sums never stand for more: of its newest request, one in a thousand is felt."""
_REMEMBERED_GATEWAYS = 256

_Series = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Service key and bucket edges."""
_Sums = tuple[float, float, float, float, float]
"""As in `SizeSums`, without the bucket."""


class RequestSizes:
    """Accumulates reports."""

    def __init__(self) -> None:
        self._heard: OrderedDict[str, dict[_Series, dict[int, _Sums]]] = OrderedDict()
        """What each gateway told last, by instance id."""
        self._sums: dict[_Series, dict[int, _Sums]] = {}

    def record(self, reports: Iterable[DemandReport]) -> None:
        """Takes in what gateways tell; services that are told without sizes stay as they are."""
        for report in reports:
            heard = self._heard.setdefault(report.instance_id, {})
            self._heard.move_to_end(report.instance_id)
            if len(self._heard) > _REMEMBERED_GATEWAYS:
                self._heard.popitem(last=False)
            for demand in report.services:
                if demand.sizes is not None:
                    series = _series(f"{demand.namespace}/{demand.service}", demand.buckets)
                    told: dict[int, _Sums] = {one[0]: one[1:] for one in demand.sizes if one[0] < demand.buckets.count}
                    self._add(series, told, heard.get(series, {}))
                    heard[series] = told

    def of(self, key: str, edges: Buckets, plan: ServicePlan | None) -> list[BucketSizes] | None:
        """What is known of one service's requests, by bucket; None where nothing is. `plan`: the one in force."""
        sums = self._sums.get(_series(key, edges), {})
        planned = plan.sizes if plan is not None and plan.buckets == edges else None
        if not sums and planned is None:
            return None
        return [
            _sizes(sums[bucket]) if bucket in sums else (BucketSizes() if planned is None else planned[bucket])
            for bucket in range(edges.count)
        ]

    def _add(self, series: _Series, told: Mapping[int, _Sums], before: Mapping[int, _Sums]) -> None:
        known = self._sums.setdefault(series, {}) if told else {}
        for bucket, now in told.items():
            old = before.get(bucket)
            # Fewer than before: the sums began anew.
            fresh = now if old is None or now[0] < old[0] else tuple(a - b for a, b in zip(now, old, strict=True))
            if fresh[0] <= 0 or min(fresh) < 0:
                continue
            added = [a + b for a, b in zip(known.get(bucket, (0.0,) * 5), fresh, strict=True)]
            share = min(1.0, REMEMBERED_REQUESTS / added[0])
            requests, inputs, inputs_squared, outputs, outputs_squared = (share * value for value in added)
            known[bucket] = (requests, inputs, inputs_squared, outputs, outputs_squared)


def _series(key: str, edges: Buckets) -> _Series:
    return key, tuple(edges.input_tokens), tuple(edges.output_tokens)


def _sizes(sums: _Sums) -> BucketSizes:
    requests, inputs, inputs_squared, outputs, outputs_squared = sums
    return BucketSizes(
        requests=requests,
        input_tokens=inputs,
        input_tokens_squared=inputs_squared,
        output_tokens=outputs,
        output_tokens_squared=outputs_squared,
    )
