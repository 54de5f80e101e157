"""The map of sizes: which variant answers a request of which size most cheaply, and where such requests go.

In flow the inputs, the plan and a service; out flows one `SizeCell` per size bucket. The price of a request is that of
the share of a replica that it keeps busy, so it says what a mix could save before whole replicas and inventory count
(Mélange's figure 5, arXiv 2404.14527, is this map). A plan may differ from it: a replica that is there anyway and has
room takes what another variant would take more cheaply.
"""

from __future__ import annotations

from pydantic import Field

from llmfleet.api import Plan, Refusal
from llmfleet.api.meta import ApiModel
from llmfleet.placement.checks import Catalogue, prepare
from llmfleet.placement.inputs import PlanInputs

_SECONDS_PER_HOUR = 3600
_REQUESTS = 1000


class SizeCell(ApiModel):
    """One size bucket."""

    input_tokens: int
    """Its upper edge over the prompt."""
    output_tokens: int
    """Its upper edge over the answer."""
    demand_rps: float
    """Requests per second that fall into it."""
    cost_per_thousand_requests: dict[str, float] = Field(default_factory=dict)
    """Price of a thousand such requests on each variant that serves them within the objective, cheapest first."""
    share: dict[str, float] = Field(default_factory=dict)
    """Where the plan sends them: fraction by variant; together less than 1 where some are not served."""

    @property
    def cheapest(self) -> str | None:
        """The variant with the lowest price, None where none serves them."""
        return next(iter(self.cost_per_thousand_requests), None)


def size_map(plan: Plan, inputs: PlanInputs, key: str) -> list[SizeCell]:
    """The map of one service: row by row, input edges ascending, within a row output edges. Empty where the service is
    refused. Raises KeyError where the inputs do not have it."""
    service = next((service for service in inputs.services if service.key == key), None)
    if service is None:
        raise KeyError(key)
    prepared = prepare(service, inputs, Catalogue(inputs))
    if isinstance(prepared, Refusal):
        return []
    share: dict[int, dict[str, float]] = {}
    planned = plan.service(key)
    for route in [] if planned is None else planned.routes:
        share.setdefault(route.bucket, {})[route.variant] = route.fraction
    target = inputs.policy.utilization_target
    cells = []
    for bucket in range(prepared.buckets.count):
        input_tokens, output_tokens = prepared.buckets.edges(bucket)
        prices = {
            variant.name: variant.cost_per_replica_hour * _REQUESTS / (rps * target * _SECONDS_PER_HOUR)
            for variant, rps in zip(prepared.variants, prepared.throughput[bucket].tolist(), strict=True)
            if rps > 0 and variant.role is None
        }
        cells.append(
            SizeCell(
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                demand_rps=float(prepared.demand.rps[bucket]),
                cost_per_thousand_requests=dict(sorted(prices.items(), key=lambda item: (item[1], item[0]))),
                share=share.get(bucket, {}),
            )
        )
    return cells
