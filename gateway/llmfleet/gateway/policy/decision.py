"""Why a request went where it went, as data.

    request, the options that it had, the replica that it got --decision_of--> Decision --text--> one line of JSON

Made only for requests that ask for it: it looks at every replica, where the decision itself looks at a few.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from llmfleet.gateway.policy.replicas import Replica
from llmfleet.gateway.policy.state import ServiceState
from llmfleet.gateway.policy.ticket import Ticket

MOST_REPLICAS = 4
"""Of the variant that was chosen: the one that got the request, and the next best. A header has little room."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a replica was predicted to give."""

    engine: str
    ttft_ms: float
    tpot_ms: float
    running: float
    """Requests there, others' too."""
    prefix_tokens: float
    """Of the prompt, which it should have in its prefix cache."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision, just before it was carried out."""

    bucket: int
    prompt_tokens: float
    output_tokens: float
    """Expected."""
    weights: Mapping[str, float]
    """The bucket's variants that had an engine, by the plan's fraction as far as replicas were there."""
    due: str
    """The variant whose turn it was by the plan."""
    variant: str
    """The one that got it. Another than was due: the request would have broken the objective there, or stood in a
    queue."""
    candidates: tuple[Candidate, ...]
    """Replicas of that variant: first the one that got it, then the best of the others."""

    def text(self) -> str:
        """As compact JSON, numbers to a tenth."""
        return json.dumps(_rounded(asdict(self)), separators=(",", ":"))


def decision_of(
    state: ServiceState, ticket: Ticket, options: Mapping[str, float], chosen: Replica, now: float
) -> Decision:
    """The decision for a request that is about to go to `chosen`."""
    size = ticket.prediction

    def candidate(replica: Replica) -> Candidate:
        prefix = ticket.hit_tokens(replica)
        ttft_ms = replica.ttft_ms(size.prompt_tokens - prefix, size.output_tokens, now)
        running = replica.in_flight + replica.others.in_flight
        return Candidate(replica.engine.id, ttft_ms, replica.pace_ms, running, prefix)

    def total_ms(one: Candidate) -> float:
        return one.ttft_ms + size.output_tokens * one.tpot_ms

    variant = chosen.engine.variant
    others = sorted((candidate(one) for one in state.ready(variant, now) if one is not chosen), key=total_ms)
    return Decision(
        bucket=ticket.bucket,
        prompt_tokens=size.prompt_tokens,
        output_tokens=size.output_tokens,
        weights=dict(options),
        due=ticket.due or variant,
        variant=variant,
        candidates=(candidate(chosen), *others[: MOST_REPLICAS - 1]),
    )


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 3 if value < 1 else 1) if isinstance(value, float) else value
