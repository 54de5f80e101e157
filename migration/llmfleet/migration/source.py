"""The engine that a request leaves: one migration, from the first block to the end of the hold.

In flow what the scheduler, the data channel and the coordinator say; out flow effects for the plug-in to carry out. The
coordinator's answer is read off the state, so the same question twice has the same answer.

    COPYING ──freeze──► FREEZING ──cut──► HELD ──release, or its lease ends──► RELEASED
       │                   │
       │                   └─ended by itself──► FINISHED
       ├─ended by itself──► FINISHED
       └─cancel, lease, channel lost, lagging──► CANCELLED

Until the cut the request runs as if nothing had been asked. FREEZING cannot be cancelled: the next step cuts or the
request ends, and a stream whose cut nobody wants any more resumes like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from llmfleet.api import Reason, SourcePhase, TailFate

CAUGHT_UP_BLOCKS = 1
"""Full blocks that may still be on their way when the cut is asked: fewer are made while a message travels."""
STAGES_WITHOUT_PROGRESS = 3
"""So many stages in a row that end with no smaller lag than they began with end the copy."""


@dataclass(frozen=True)
class Source:
    """One migration at its source. Times are of the engine's own monotonic clock, in seconds."""

    lease_s: float
    lease_ends_s: float
    phase: SourcePhase = SourcePhase.COPYING
    full_blocks: int = 0
    """Blocks of the request that no step will change any more."""
    prefilled: bool = False
    """The request has given its first token."""
    sent_blocks: int = 0
    acknowledged_blocks: int = 0
    stage_lag_blocks: int | None = None
    """Lag when the running stage began."""
    stages_without_progress: int = 0
    tail: TailFate = TailFate.UNKNOWN
    reason: Reason | None = None
    """Why it is FINISHED or CANCELLED."""

    @property
    def lag_blocks(self) -> int:
        """Full blocks that the destination does not have yet."""
        return self.full_blocks - self.acknowledged_blocks

    @property
    def caught_up(self) -> bool:
        """Whether a cut now would leave little to copy."""
        return self.phase is SourcePhase.COPYING and self.prefilled and self.lag_blocks <= CAUGHT_UP_BLOCKS

    @property
    def over(self) -> bool:
        """Whether nothing of it is left to do."""
        return self.phase in (SourcePhase.RELEASED, SourcePhase.FINISHED, SourcePhase.CANCELLED)


@dataclass(frozen=True)
class Stepped:
    """The scheduler has planned a step: so many blocks of the request are full and stay as they are."""

    full_blocks: int
    prefilled: bool
    """It has given its first token."""


@dataclass(frozen=True)
class Acknowledged:
    """The destination has all blocks below this one in their places."""

    blocks: int


class SourceEvent(StrEnum):
    """What carries no figures."""

    ASKED = "asked"
    """The coordinator asked how it stands: it is alive."""
    FREEZE = "freeze"
    CUT = "cut"
    """The request ended by the lowered cap, and all its tokens are delivered."""
    ENDED = "ended"
    """The request ended by itself: stop, length, abort, error."""
    TAIL_TAKEN = "tail_taken"
    TAIL_REFUSED = "tail_refused"
    CHANNEL_LOST = "channel_lost"
    RELEASE = "release"
    CANCEL = "cancel"
    TICK = "tick"


class SourceEffect(StrEnum):
    SEND_BLOCKS = "send_blocks"
    """Those from `sent_blocks` before to `sent_blocks` now."""
    CAP = "cap"
    """Lower the length cap of the live request so that the next token is its last here."""
    SEND_TAIL = "send_tail"
    """The last partial block, what is full and not sent, the sampler's state, the token ids: and the word to begin."""
    FREE_BLOCKS = "free_blocks"
    """End the hold. Without a hold the scheduler frees a request's blocks itself."""
    TELL_DESTINATION = "tell_destination"
    """That nothing will come any more."""


SourceInput = Stepped | Acknowledged | SourceEvent


def source_step(source: Source, event: SourceInput, now_s: float) -> tuple[Source, tuple[SourceEffect, ...]]:
    """What an event makes of a migration, and what has to be done. Events that come late change nothing."""
    if event is SourceEvent.TICK:
        return _expired(source) if now_s >= source.lease_ends_s else (source, ())
    source = replace(source, lease_ends_s=now_s + source.lease_s)
    match source.phase:
        case SourcePhase.COPYING:
            return _copying(source, event)
        case SourcePhase.FREEZING if event is SourceEvent.CUT:
            return replace(source, phase=SourcePhase.HELD), (SourceEffect.SEND_TAIL,)
        case SourcePhase.FREEZING if event is SourceEvent.CHANNEL_LOST:
            return replace(source, tail=TailFate.REFUSED), ()
        case SourcePhase.FREEZING if event is SourceEvent.ENDED:
            return _over(source, SourcePhase.FINISHED, Reason.FINISHED), (SourceEffect.TELL_DESTINATION,)
        case SourcePhase.HELD:
            return _held(source, event)
    return source, ()


def _copying(source: Source, event: SourceInput) -> tuple[Source, tuple[SourceEffect, ...]]:
    match event:
        case Stepped(full_blocks, prefilled):
            full_blocks = max(full_blocks, source.acknowledged_blocks)
            return _next_stage(replace(source, full_blocks=full_blocks, prefilled=prefilled))
        case Acknowledged(blocks):
            known = min(max(blocks, source.acknowledged_blocks), source.sent_blocks)
            return _next_stage(replace(source, acknowledged_blocks=known))
        case SourceEvent.FREEZE:
            return replace(source, phase=SourcePhase.FREEZING), (SourceEffect.CAP,)
        case SourceEvent.ENDED:
            return _over(source, SourcePhase.FINISHED, Reason.FINISHED), (SourceEffect.TELL_DESTINATION,)
        case SourceEvent.CANCEL:
            return _over(source, SourcePhase.CANCELLED, Reason.CANCELLED), (SourceEffect.TELL_DESTINATION,)
        case SourceEvent.CHANNEL_LOST:
            return _over(source, SourcePhase.CANCELLED, Reason.PEER_LOST), ()
    return source, ()


def _next_stage(source: Source) -> tuple[Source, tuple[SourceEffect, ...]]:
    """Begins a stage when the one before has arrived: it takes what has become full meanwhile."""
    if source.acknowledged_blocks < source.sent_blocks or source.full_blocks <= source.sent_blocks:
        return source, ()
    lag = source.full_blocks - source.sent_blocks
    without = 0
    if source.stage_lag_blocks is not None and lag >= source.stage_lag_blocks and lag > CAUGHT_UP_BLOCKS:
        without = source.stages_without_progress + 1
    if without >= STAGES_WITHOUT_PROGRESS:
        return _over(source, SourcePhase.CANCELLED, Reason.LAGGING), (SourceEffect.TELL_DESTINATION,)
    begun = replace(source, sent_blocks=source.full_blocks, stage_lag_blocks=lag, stages_without_progress=without)
    return begun, (SourceEffect.SEND_BLOCKS,)


def _held(source: Source, event: SourceInput) -> tuple[Source, tuple[SourceEffect, ...]]:
    match event:
        case SourceEvent.TAIL_TAKEN:
            return replace(source, tail=TailFate.TAKEN), ()
        case SourceEvent.TAIL_REFUSED | SourceEvent.CHANNEL_LOST if source.tail is TailFate.UNKNOWN:
            return replace(source, tail=TailFate.REFUSED), ()
        case SourceEvent.RELEASE:
            return replace(source, phase=SourcePhase.RELEASED), (SourceEffect.FREE_BLOCKS,)
    return source, ()


def _expired(source: Source) -> tuple[Source, tuple[SourceEffect, ...]]:
    match source.phase:
        case SourcePhase.COPYING:
            return _over(source, SourcePhase.CANCELLED, Reason.EXPIRED), (SourceEffect.TELL_DESTINATION,)
        case SourcePhase.HELD:
            return replace(source, phase=SourcePhase.RELEASED), (SourceEffect.FREE_BLOCKS,)
    return source, ()


def _over(source: Source, phase: SourcePhase, reason: Reason) -> Source:
    return replace(source, phase=phase, reason=reason)
