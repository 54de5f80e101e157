"""The engine that a request comes to: one migration, from the reservation to the request's admission.

The reservation is made before anything is copied and ends in exactly one of three ways: the request takes it over, the
migration is cancelled, or its lease ends. Blocks, the request itself (submitted by the stream's owner, parsed, waiting)
and the tail come by different ways and in any order.

    RESERVED ──tail and request both there──► RUNNING
       │  └────request there and `resume`───► RUNNING   (with the blocks that have come; the rest is computed)
       ├─cancel, source's word, request gone─► CANCELLED
       └─lease ends──────────────────────────► EXPIRED
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from llmfleet.api import DestinationPhase, Reason


@dataclass(frozen=True)
class Destination:
    """One migration at its destination. Times are of the engine's own monotonic clock, in seconds."""

    lease_s: float
    lease_ends_s: float
    phase: DestinationPhase = DestinationPhase.RESERVED
    blocks: int = 0
    """Blocks in their places, without a gap."""
    parked: bool = False
    """The owner's request is here and waits."""
    complete: bool = False
    """The tail is here and verified, on all ranks."""
    reason: Reason | None = None
    """Why it is CANCELLED or EXPIRED."""


@dataclass(frozen=True)
class Placed:
    """All blocks below this one are in their places."""

    blocks: int


class DestinationEvent(StrEnum):
    """What carries no figures."""

    ASKED = "asked"
    """The coordinator asked how it stands: it is alive."""
    PARKED = "parked"
    """The owner's request has come to the scheduler."""
    TAIL = "tail"
    """The tail has come, and is what the source said it is."""
    RESUME = "resume"
    """Begin with the blocks that are here: the source is lost, its tokens are known from the owner."""
    OTHER = "other"
    """What came in place of the owner's request has another prompt."""
    GONE = "gone"
    """The owner's request went away: its client or its owner did."""
    SOURCE_ENDED = "source_ended"
    """The source says that nothing will come any more."""
    CANCEL = "cancel"
    TICK = "tick"


class DestinationEffect(StrEnum):
    ADMIT = "admit"
    """The request takes the reservation over and runs."""
    GIVE_BACK = "give_back"
    """The reserved blocks return to the pool."""
    ABORT_REQUEST = "abort_request"
    """The waiting request is answered with an error: its owner has the stream elsewhere."""
    TAKE_TAIL = "take_tail"
    """Tell the source that the tail is here."""
    REFUSE_TAIL = "refuse_tail"
    REFUSE_REQUEST = "refuse_request"
    """The request came too late: run from its first token it might end up another one."""


DestinationInput = Placed | DestinationEvent
Effects = tuple[DestinationEffect, ...]


def destination_step(destination: Destination, event: DestinationInput, now_s: float) -> tuple[Destination, Effects]:
    """What an event makes of a migration, and what has to be done. Events that come late change nothing."""
    if destination.phase is not DestinationPhase.RESERVED:
        return destination, _too_late(destination, event)
    if event is DestinationEvent.TICK:
        if now_s < destination.lease_ends_s:
            return destination, ()
        return _let_go(destination, DestinationPhase.EXPIRED, Reason.EXPIRED)
    destination = replace(destination, lease_ends_s=now_s + destination.lease_s)
    match event:
        case Placed(blocks):
            return replace(destination, blocks=max(blocks, destination.blocks)), ()
        case DestinationEvent.PARKED:
            return _run_when_ready(replace(destination, parked=True), ())
        case DestinationEvent.TAIL:
            return _run_when_ready(replace(destination, complete=True), (DestinationEffect.TAKE_TAIL,))
        case DestinationEvent.RESUME if destination.parked:
            return replace(destination, phase=DestinationPhase.RUNNING), (DestinationEffect.ADMIT,)
        case DestinationEvent.OTHER:
            over, effects = _let_go(destination, DestinationPhase.CANCELLED, Reason.UNKNOWN_REQUEST)
            return over, (DestinationEffect.REFUSE_REQUEST, *effects)
        case DestinationEvent.GONE:
            return _let_go(replace(destination, parked=False), DestinationPhase.CANCELLED, Reason.CANCELLED)
        case DestinationEvent.SOURCE_ENDED if not destination.complete:
            return _let_go(destination, DestinationPhase.CANCELLED, Reason.FINISHED)
        case DestinationEvent.CANCEL:
            return _let_go(destination, DestinationPhase.CANCELLED, Reason.CANCELLED)
    return destination, ()


def _run_when_ready(destination: Destination, effects: Effects) -> tuple[Destination, Effects]:
    if destination.parked and destination.complete:
        return replace(destination, phase=DestinationPhase.RUNNING), (*effects, DestinationEffect.ADMIT)
    return destination, effects


def _let_go(destination: Destination, phase: DestinationPhase, reason: Reason) -> tuple[Destination, Effects]:
    waits = (DestinationEffect.ABORT_REQUEST,) if destination.parked else ()
    return replace(destination, phase=phase, reason=reason, parked=False), (*waits, DestinationEffect.GIVE_BACK)


def _too_late(destination: Destination, event: DestinationInput) -> Effects:
    match event:
        case DestinationEvent.TAIL:
            again = destination.phase is DestinationPhase.RUNNING and destination.complete
            return (DestinationEffect.TAKE_TAIL,) if again else (DestinationEffect.REFUSE_TAIL,)
        case DestinationEvent.PARKED if destination.phase is not DestinationPhase.RUNNING:
            return (DestinationEffect.REFUSE_REQUEST,)
    return ()
