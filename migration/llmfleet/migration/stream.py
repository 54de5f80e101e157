"""The stream's owner: which engine's tokens the client gets, and what the end of an engine's answer means.

An engine's answer to the request is a *leg* of the stream, and legs are numbered by epoch. Tokens of the present leg
reach the client; a leg begins by repeating what was delivered, so the owner passes on only what is beyond that. The
next leg's request is submitted before the present one is cut, and its first token is the word to switch: no engine
begins it unless the other one was cut, or was given up by this owner.

    STREAMING ──begin──► GRANTED ──park──► PARKED ──freeze──► FREEZING ──next leg's first token──► STREAMING
        ▲                   │                │                   │                                (epoch + 1)
        └────── stays ──────┴────────────────┴───────────────────┘

From the moment at which the cut was asked, the end of the present leg says nothing: a cut looks to the client like an
answer that reached its length. The source tells which it was; where nobody can tell, the stream resumes, and an
answer that was complete ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class StreamPhase(StrEnum):
    STREAMING = "streaming"
    GRANTED = "granted"
    PARKED = "parked"
    FREEZING = "freezing"
    ENDED = "ended"


@dataclass(frozen=True)
class Stream:
    """One client's stream."""

    phase: StreamPhase = StreamPhase.STREAMING
    epoch: int = 1
    """Of the present leg."""
    delivered_tokens: int = 0
    next_leg_open: bool = False
    """The next leg's request is submitted."""
    leg_over: bool = False
    """The present leg has ended or broken and it is not known yet what follows."""


@dataclass(frozen=True)
class Tokens:
    """A leg has told all tokens below `upto`, those included that it repeated."""

    epoch: int
    upto: int


@dataclass(frozen=True)
class LegEnded:
    """A leg's answer is complete, as its engine says."""

    epoch: int


@dataclass(frozen=True)
class LegBroken:
    """A leg will bring nothing more: its engine died, or refused the request."""

    epoch: int


class StreamEvent(StrEnum):
    """What carries no figures."""

    BEGIN = "begin"
    """A coordinator asks for the next epoch."""
    PARK = "park"
    """Submit the request to the destination now."""
    FREEZE = "freeze"
    """The cut is about to be asked."""
    FINISHED = "finished"
    """The source says that its request ended by itself."""
    STAYS = "stays"
    """The migration is over before the source was asked for the cut."""
    RESUME = "resume"
    """The source was cut, or is lost, and the destination will not go on."""
    SOURCE_LOST = "source_lost"
    """The source answers no more; the destination is asked to begin with what it has."""
    DEADLINE = "deadline"
    """Nothing was heard of the migration for too long: its coordinator may be dead."""
    CLIENT_GONE = "client_gone"


class StreamEffect(StrEnum):
    DELIVER = "deliver"
    """Pass on what is beyond what was delivered."""
    SUBMIT_NEXT = "submit_next"
    """The original request, to the destination, under the migration's id."""
    CLOSE_NEXT = "close_next"
    CLOSE_PRESENT = "close_present"
    RESUME = "resume"
    """A leg of the next epoch at any engine, from the tokens delivered."""
    END_CLIENT = "end_client"
    AGREE = "agree"
    """To the cut."""
    REFUSE = "refuse"
    """To begin: another migration of this stream runs, or it has ended. To the cut: this migration was given up."""


StreamInput = Tokens | LegEnded | LegBroken | StreamEvent
Effects = tuple[StreamEffect, ...]


def stream_step(stream: Stream, event: StreamInput) -> tuple[Stream, Effects]:
    """What an event makes of a stream, and what has to be done. Events of other legs, and late ones, change nothing."""
    if stream.phase is StreamPhase.ENDED:
        return stream, (StreamEffect.REFUSE,) if event in (StreamEvent.BEGIN, StreamEvent.FREEZE) else ()
    match event:
        case Tokens(epoch, upto) if epoch == stream.epoch:
            return _deliver(stream, upto)
        case Tokens(epoch, upto) if epoch == stream.epoch + 1 and stream.next_leg_open:
            present = () if stream.leg_over else (StreamEffect.CLOSE_PRESENT,)
            stream, effects = _deliver(_on_next_leg(stream), upto)
            return stream, (*present, *effects)
        case LegEnded(epoch) if epoch == stream.epoch:
            if stream.phase is StreamPhase.FREEZING:
                return replace(stream, leg_over=True), ()
            return _end(stream)
        case LegBroken(epoch) if epoch == stream.epoch:
            if stream.phase in (StreamPhase.PARKED, StreamPhase.FREEZING) and stream.next_leg_open:
                return replace(stream, leg_over=True), ()
            return _resume(stream)
        case LegBroken(epoch) | LegEnded(epoch) if epoch == stream.epoch + 1 and stream.next_leg_open:
            stream = replace(stream, next_leg_open=False)
            return _resume(stream) if stream.leg_over and stream.phase is StreamPhase.PARKED else (stream, ())
        case StreamEvent.BEGIN:
            if stream.phase is StreamPhase.STREAMING:
                return replace(stream, phase=StreamPhase.GRANTED), ()
            return stream, (StreamEffect.REFUSE,)
        case StreamEvent.PARK if stream.phase is StreamPhase.GRANTED:
            return replace(stream, phase=StreamPhase.PARKED, next_leg_open=True), (StreamEffect.SUBMIT_NEXT,)
        case StreamEvent.FREEZE:
            if stream.phase in (StreamPhase.PARKED, StreamPhase.FREEZING) and not stream.leg_over:
                return replace(stream, phase=StreamPhase.FREEZING), (StreamEffect.AGREE,)
            return stream, (StreamEffect.REFUSE,)
        case StreamEvent.FINISHED if stream.phase is StreamPhase.FREEZING:
            return _end(stream) if stream.leg_over else _stay(stream)
        case StreamEvent.SOURCE_LOST if stream.phase in (StreamPhase.PARKED, StreamPhase.FREEZING):
            closed = () if stream.leg_over else (StreamEffect.CLOSE_PRESENT,)
            return replace(stream, leg_over=True), closed
        case StreamEvent.STAYS if stream.phase is not StreamPhase.STREAMING:
            return _resume(stream) if stream.leg_over else _stay(stream)
        case StreamEvent.RESUME | StreamEvent.DEADLINE if stream.phase is not StreamPhase.STREAMING:
            undecided = stream.phase is StreamPhase.FREEZING or stream.leg_over
            return _resume(stream) if undecided else _stay(stream)
        case StreamEvent.CLIENT_GONE:
            closed = () if stream.leg_over else (StreamEffect.CLOSE_PRESENT,)
            return replace(stream, phase=StreamPhase.ENDED, next_leg_open=False), (*_close_next(stream), *closed)
    return stream, ()


def _deliver(stream: Stream, upto: int) -> tuple[Stream, Effects]:
    if upto <= stream.delivered_tokens:
        return stream, ()
    return replace(stream, delivered_tokens=upto), (StreamEffect.DELIVER,)


def _on_next_leg(stream: Stream) -> Stream:
    return replace(stream, phase=StreamPhase.STREAMING, epoch=stream.epoch + 1, next_leg_open=False, leg_over=False)


def _stay(stream: Stream) -> tuple[Stream, Effects]:
    return replace(stream, phase=StreamPhase.STREAMING, next_leg_open=False), _close_next(stream)


def _end(stream: Stream) -> tuple[Stream, Effects]:
    ended = replace(stream, phase=StreamPhase.ENDED, next_leg_open=False)
    return ended, (*_close_next(stream), StreamEffect.END_CLIENT)


def _resume(stream: Stream) -> tuple[Stream, Effects]:
    closed = () if stream.leg_over else (StreamEffect.CLOSE_PRESENT,)
    return _on_next_leg(stream), (*_close_next(stream), *closed, StreamEffect.RESUME)


def _close_next(stream: Stream) -> Effects:
    return (StreamEffect.CLOSE_NEXT,) if stream.next_leg_open else ()
