"""What engines were seen to do, over all gateways, and what profiles learn from it.

    DemandReports --operator--> ObservedVariant --placement.learning--> Learnt --operator--> ModelProfile.status

The operator adds up what gateways tell; what it means is found where the models are, in the planner's process.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from llmfleet.api.meta import ApiModel
from llmfleet.api.modelprofile import Buckets, Correction


class ObservedCell(NamedTuple):
    """Requests of one bucket with about the same load around them, over all gateways; on the wire a list of numbers."""

    bucket: Annotated[int, Field(ge=0)]
    """Index as in `Buckets.index`."""
    requests: Annotated[int, Field(ge=1)]
    """How many."""
    concurrency: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    """Requests in the engine, averaged over the stay of each of these, and then over them."""
    input_tokens: Annotated[int, Field(ge=0)]
    """Their prompts, added up."""
    ttft_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Their times to first token, added up."""
    decoded_tokens: Annotated[int, Field(ge=0)]
    """Their tokens after the first, added up."""
    decode_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Their times from first to last token, added up."""


class ObservedVariant(ApiModel):
    """What was seen of one variant of one service."""

    service: str
    """`namespace/name`."""
    variant: str
    """Name of the variant, as the plan has it."""
    buckets: Buckets
    """Edges that the cells refer to; cells of edges that the profile does not have any more teach nothing."""
    cells: list[ObservedCell]
    """What was seen."""


class Learnt(ApiModel):
    """What one profile is to say from now on."""

    profile: str
    """`namespace/name`."""
    corrections: list[Correction] = Field(default_factory=list)
    """All of its corrections, by variant."""
    dropped: list[str] = Field(default_factory=list)
    """What was not learnt, and why, in words."""
