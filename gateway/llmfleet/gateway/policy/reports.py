"""What an engine says of itself, and what of it is not ours.

    EngineReport, own requests there at that moment --others_of--> Others: what stands there of other gateways

A gateway knows its own requests exactly and at once; a report knows all requests, a little late. So a report is not
used as it is: what this gateway had on the engine when the report was made is taken out of it, and what remains, the
others' share, stands beside the own count until the next report. Requests that this gateway sends in between are thus
seen at once and never twice.
"""

from __future__ import annotations

from dataclasses import dataclass

FRESH_S = 3.0
"""Age at which a report counts no more: others' requests have come and gone since, own ones are known anyway."""


@dataclass(frozen=True, slots=True)
class EngineReport:
    """How busy an engine says it is."""

    at_s: float
    """The gateway's clock when it was asked."""
    waiting: int
    """Requests in its queue."""
    running: int
    """Requests in its batch."""
    kv_tokens: int = 0
    """Tokens that its KV cache holds; 0: it did not say."""
    kv_used_tokens: int = 0
    """Tokens of it that are in use."""


@dataclass(frozen=True, slots=True)
class Others:
    """What an engine has of others."""

    in_flight: float = 0.0
    """Requests."""
    queue_tokens: float = 0.0
    """Prompt tokens that have no first token yet."""
    kv_tokens: float = 0.0
    """KV cache in use that own prompts do not explain: others' requests, and the answers so far of all."""


NOBODY = Others()


def others_of(report: EngineReport, *, in_flight: int, held_tokens: float, mean_prompt_tokens: float) -> Others:
    """The others' share of a report.

    `in_flight`: own requests that were there; `held_tokens`: prompt tokens of those that had their first token;
    `mean_prompt_tokens`: of a request of this service. A report says how many wait, not whose they are: others wait in
    proportion to how many they are.
    """
    total = report.waiting + report.running
    others = max(0, total - in_flight)
    waiting = report.waiting * others / total if total else 0.0
    return Others(others, waiting * mean_prompt_tokens, max(0.0, report.kv_used_tokens - held_tokens))
