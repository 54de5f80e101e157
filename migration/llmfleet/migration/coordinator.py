"""The course of one migration: what is asked of whom, and what an answer or its absence leads to.

In flow what source and destination say of themselves; out flow the next question and words to the stream's owner. It
is a program without memory that matters: when it dies, leases end at both engines and the owner's deadline at the
stream.

    PREPARING ► OPENING ► COPYING ► PARKING ► FREEZING ► HANDING_OVER ► RELEASING ► OVER
                                                 └──source lost──► RECOVERING ──────►┘
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from llmfleet.api import DestinationPhase, Reason, SourcePhase, TailFate


class CoordinatorPhase(StrEnum):
    PREPARING = "preparing"
    OPENING = "opening"
    COPYING = "copying"
    PARKING = "parking"
    FREEZING = "freezing"
    HANDING_OVER = "handing_over"
    RECOVERING = "recovering"
    RELEASING = "releasing"
    OVER = "over"


class Result(StrEnum):
    """How a migration ended."""

    MOVED = "moved"
    """The destination goes on with all of the KV cache."""
    RESUMED = "resumed"
    """An engine goes on from the tokens delivered and computes what KV it lacks."""
    STAYED = "stayed"
    FINISHED = "finished"
    """The request ended by itself at the source."""
    FAILED = "failed"
    """No engine goes on: the stream's owner tries another one, or tells its client. Never the end of a migration whose
    source still runs."""


@dataclass(frozen=True)
class Coordinator:
    """One migration as its coordinator sees it: it begins when the destination has been asked to prepare."""

    phase: CoordinatorPhase = CoordinatorPhase.PREPARING
    result: Result | None = None
    reason: Reason | None = None
    """Why it is not MOVED."""


@dataclass(frozen=True)
class SourceIs:
    """The source's answer to any question."""

    phase: SourcePhase
    caught_up: bool = False
    tail: TailFate = TailFate.UNKNOWN
    reason: Reason | None = None


@dataclass(frozen=True)
class DestinationIs:
    """The destination's answer to any question."""

    phase: DestinationPhase
    parked: bool = False
    reason: Reason | None = None


@dataclass(frozen=True)
class Refused:
    """Whoever was asked will not."""

    reason: Reason


class OwnerSays(StrEnum):
    """The stream's owner on being told that the cut comes."""

    AGREED = "agreed"
    """From now on it takes the end of the source's answer for nothing."""
    GAVE_UP = "gave_up"
    """It had waited too long, or the stream has ended: a cut now would look like the answer's end."""


class NoAnswer(StrEnum):
    """A question was repeated until its deadline."""

    SOURCE = "source"
    DESTINATION = "destination"


class CoordinatorEffect(StrEnum):
    ASK_PRECOPY = "ask_precopy"
    WATCH_SOURCE = "watch_source"
    """Ask for its state, to be answered when it differs from the last answer."""
    WATCH_DESTINATION = "watch_destination"
    ASK_FREEZE = "ask_freeze"
    ASK_RESUME = "ask_resume"
    """Of the destination: begin with what is there, from the tokens delivered."""
    ASK_RELEASE = "ask_release"
    CANCEL_SOURCE = "cancel_source"
    CANCEL_DESTINATION = "cancel_destination"
    OWNER_PARK = "owner_park"
    OWNER_FREEZE = "owner_freeze"
    """It answers with an `OwnerSays`."""
    OWNER_FINISHED = "owner_finished"
    OWNER_STAYS = "owner_stays"
    OWNER_SOURCE_LOST = "owner_source_lost"
    OWNER_RESUME = "owner_resume"


Heard = SourceIs | DestinationIs | Refused | NoAnswer | OwnerSays
Effects = tuple[CoordinatorEffect, ...]

BEFORE_THE_CUT = (
    CoordinatorPhase.PREPARING, CoordinatorPhase.OPENING, CoordinatorPhase.COPYING, CoordinatorPhase.PARKING,
)  # fmt: skip


def coordinator_step(coordinator: Coordinator, heard: Heard) -> tuple[Coordinator, Effects]:
    """What an answer leads to. Answers to questions of an earlier phase change nothing."""
    phase = coordinator.phase
    if phase in BEFORE_THE_CUT:
        return _before_the_cut(coordinator, heard)
    match phase, heard:
        case CoordinatorPhase.FREEZING, SourceIs(phase=SourcePhase.FREEZING | SourcePhase.COPYING):
            return coordinator, (CoordinatorEffect.WATCH_SOURCE,)
        case CoordinatorPhase.FREEZING, SourceIs(phase=SourcePhase.HELD | SourcePhase.RELEASED) as source:
            if source.tail is TailFate.REFUSED:
                return _resumed(coordinator, Reason.PEER_LOST)
            return _go(coordinator, CoordinatorPhase.HANDING_OVER, CoordinatorEffect.WATCH_DESTINATION)
        case CoordinatorPhase.FREEZING, SourceIs(phase=SourcePhase.FINISHED):
            over = replace(coordinator, phase=CoordinatorPhase.OVER, result=Result.FINISHED, reason=Reason.FINISHED)
            return over, (CoordinatorEffect.OWNER_FINISHED, CoordinatorEffect.CANCEL_DESTINATION)
        case CoordinatorPhase.FREEZING, SourceIs(phase=SourcePhase.CANCELLED, reason=reason):
            return _stays(coordinator, reason or Reason.CANCELLED)
        case CoordinatorPhase.FREEZING, NoAnswer.SOURCE | Refused():
            effects = (CoordinatorEffect.OWNER_SOURCE_LOST, CoordinatorEffect.ASK_RESUME)
            return replace(coordinator, phase=CoordinatorPhase.RECOVERING, reason=Reason.PEER_LOST), effects
        case CoordinatorPhase.HANDING_OVER, DestinationIs(phase=DestinationPhase.RUNNING):
            moved = replace(coordinator, phase=CoordinatorPhase.RELEASING, result=Result.MOVED)
            return moved, (CoordinatorEffect.ASK_RELEASE,)
        case CoordinatorPhase.HANDING_OVER, DestinationIs(phase=DestinationPhase.RESERVED):
            effects = (CoordinatorEffect.WATCH_SOURCE, CoordinatorEffect.WATCH_DESTINATION)
            return coordinator, effects
        case CoordinatorPhase.HANDING_OVER, DestinationIs(reason=reason):
            return _resumed(coordinator, reason or Reason.PEER_LOST)
        case CoordinatorPhase.HANDING_OVER, NoAnswer.DESTINATION | Refused() | SourceIs(tail=TailFate.REFUSED):
            return _resumed(coordinator, Reason.PEER_LOST)
        case CoordinatorPhase.RECOVERING, DestinationIs(phase=DestinationPhase.RUNNING):
            return replace(coordinator, phase=CoordinatorPhase.OVER, result=Result.RESUMED), ()
        case CoordinatorPhase.RECOVERING, DestinationIs() | NoAnswer.DESTINATION | Refused():
            return _resumed(coordinator, Reason.PEER_LOST)
        case CoordinatorPhase.RELEASING, SourceIs() | NoAnswer.SOURCE | Refused():
            return replace(coordinator, phase=CoordinatorPhase.OVER), ()
    return coordinator, ()


def _before_the_cut(coordinator: Coordinator, heard: Heard) -> tuple[Coordinator, Effects]:
    match coordinator.phase, heard:
        case _, NoAnswer():
            return _stays(coordinator, Reason.PEER_LOST)
        case _, Refused(reason):
            return _stays(coordinator, reason)
        case _, DestinationIs(phase=DestinationPhase.CANCELLED | DestinationPhase.EXPIRED, reason=reason):
            return _stays(coordinator, reason or Reason.CANCELLED)
        case _, SourceIs(phase=SourcePhase.FINISHED | SourcePhase.CANCELLED, reason=reason):
            return _stays(coordinator, reason or Reason.CANCELLED)
        case CoordinatorPhase.PREPARING, DestinationIs(phase=DestinationPhase.RESERVED):
            return _go(coordinator, CoordinatorPhase.OPENING, CoordinatorEffect.ASK_PRECOPY)
        case ((CoordinatorPhase.OPENING | CoordinatorPhase.COPYING), SourceIs(caught_up=False)):
            return _go(coordinator, CoordinatorPhase.COPYING, CoordinatorEffect.WATCH_SOURCE)
        case ((CoordinatorPhase.OPENING | CoordinatorPhase.COPYING), SourceIs(caught_up=True)):
            effects = (CoordinatorEffect.OWNER_PARK, CoordinatorEffect.WATCH_DESTINATION)
            return replace(coordinator, phase=CoordinatorPhase.PARKING), effects
        case CoordinatorPhase.PARKING, DestinationIs(parked=True):
            return coordinator, (CoordinatorEffect.OWNER_FREEZE,)
        case CoordinatorPhase.PARKING, OwnerSays.AGREED:
            return _go(coordinator, CoordinatorPhase.FREEZING, CoordinatorEffect.ASK_FREEZE)
        case CoordinatorPhase.PARKING, OwnerSays.GAVE_UP:
            return _stays(coordinator, Reason.CANCELLED)
        case CoordinatorPhase.PARKING, DestinationIs(parked=False):
            return coordinator, (CoordinatorEffect.WATCH_DESTINATION,)
    return coordinator, ()


def _go(coordinator: Coordinator, phase: CoordinatorPhase, effect: CoordinatorEffect) -> tuple[Coordinator, Effects]:
    return replace(coordinator, phase=phase), (effect,)


def _stays(coordinator: Coordinator, reason: Reason) -> tuple[Coordinator, Effects]:
    over = replace(coordinator, phase=CoordinatorPhase.OVER, result=Result.STAYED, reason=reason)
    return over, (
        CoordinatorEffect.OWNER_STAYS, CoordinatorEffect.CANCEL_SOURCE, CoordinatorEffect.CANCEL_DESTINATION,
    )  # fmt: skip


def _resumed(coordinator: Coordinator, reason: Reason) -> tuple[Coordinator, Effects]:
    """The hold is released first: its full blocks then are in the source's prefix cache, should the stream go there."""
    over = replace(coordinator, phase=CoordinatorPhase.RELEASING, result=Result.RESUMED, reason=reason)
    return over, (
        CoordinatorEffect.ASK_RELEASE, CoordinatorEffect.CANCEL_DESTINATION, CoordinatorEffect.OWNER_RESUME,
    )  # fmt: skip
