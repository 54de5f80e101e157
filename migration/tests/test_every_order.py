"""Every order of steps, messages, timers and a few faults of one migration: what RFC 2 promises holds in all of them.

A world is both engines, the stream's owner, the coordinator and all that is under way between them, with tokens and
blocks by ones and twos. Timers may go off at any moment, a message may be delivered before an older one; losing or
doubling one, or losing a party, is a fault, of which a world has a few. All worlds that can come about are visited.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from llmfleet.api import DestinationPhase, Reason, SourcePhase
from llmfleet.migration.coordinator import (
    Coordinator,
    CoordinatorEffect,
    CoordinatorPhase,
    DestinationIs,
    Heard,
    NoAnswer,
    OwnerSays,
    Refused,
    Result,
    SourceIs,
    coordinator_step,
)
from llmfleet.migration.destination import (
    Destination,
    DestinationEffect,
    DestinationEvent,
    DestinationInput,
    Placed,
    destination_step,
)
from llmfleet.migration.source import (
    Acknowledged,
    Source,
    SourceEffect,
    SourceEvent,
    SourceInput,
    Stepped,
    source_step,
)
from llmfleet.migration.stream import (
    LegBroken,
    LegEnded,
    Stream,
    StreamEffect,
    StreamEvent,
    StreamInput,
    StreamPhase,
    Tokens,
    stream_step,
)

ANSWER_TOKENS = 3
NOW_S, LEASE_S, LATER_S = 0.0, 1.0, 2.0

Message = tuple[str, object]
PARTIES: dict[type, str] = {SourceIs: "source", DestinationIs: "destination"}
"""Whom an answer is from."""


@dataclass(frozen=True)
class World:
    faults: int
    # the source engine and its leg of the stream
    source_alive: bool = True
    source: Source | None = None
    produced: int = 1
    capped: bool = False
    ended: str = ""
    """How its request ended: `cut`, `own`, `aborted`."""
    held: bool = False
    freed: int = 0
    leg_1_read: int = 0
    leg_1_open: bool = True
    # the destination engine and its leg
    destination_alive: bool = True
    destination: Destination | None = None
    admitted: int = 0
    given_back: int = 0
    leg_2: str = ""
    """`sent`, `parked`, `running`, `failed` (the owner has not read that yet), `closed`."""
    # between them
    to_destination: tuple[DestinationInput, ...] = ()
    to_source: tuple[SourceInput, ...] = ()
    channel: bool = True
    # the rest
    coordinator: Coordinator = field(default_factory=Coordinator)
    coordinator_alive: bool = True
    stream: Stream = field(default_factory=Stream)
    resumed: bool = False
    """The stream went on at some third engine, which always ends it well, and at once."""
    client: str = ""
    """`ended` or `gone`."""
    messages: frozenset[Message] = frozenset()
    at_once: bool = False
    """The coordinator does not wait for the copy: prefill here, decode there."""

    @property
    def done(self) -> bool:
        quiet_source = not self.source_alive or self.source is None or self.source.over
        quiet_destination = (
            not self.destination_alive
            or self.destination is None
            or self.destination.phase is not DestinationPhase.RESERVED
        )
        quiet_coordinator = not self.coordinator_alive or self.coordinator.phase is CoordinatorPhase.OVER
        return bool(self.client) and quiet_source and quiet_destination and quiet_coordinator and self.leg_2 != "parked"


def start(faults: int, *, at_once: bool) -> World:
    world = World(faults=faults, at_once=at_once, produced=0 if at_once else 1)
    world = owner(world, StreamEvent.BEGIN)
    return post(world, "destination", "prepare")


def post(world: World, to: str, message: object) -> World:
    """One question or answer is under way with each engine: a new question gives an unanswered one up."""
    about = PARTIES.get(type(message), to)
    others = frozenset(m for m in world.messages if PARTIES.get(type(m[1]), m[0]) != about)
    return replace(world, messages=others | {(to, message)})


def owner(world: World, event: StreamInput) -> World:
    stream, effects = stream_step(world.stream, event)
    world = replace(world, stream=stream)
    if event is StreamEvent.FREEZE:
        return coordinator(world, OwnerSays.AGREED if StreamEffect.AGREE in effects else OwnerSays.GAVE_UP)
    for effect in effects:
        match effect:
            case StreamEffect.SUBMIT_NEXT:
                world = replace(world, leg_2="sent")
            case StreamEffect.CLOSE_NEXT:
                world = close_leg_2(world)
            case StreamEffect.CLOSE_PRESENT:
                world = replace(world, leg_1_open=False) if world.leg_1_open else close_leg_2(world)
            case StreamEffect.RESUME:
                world = owner(replace(world, resumed=True), Tokens(stream.epoch, ANSWER_TOKENS))
                world = owner(world, LegEnded(stream.epoch))
            case StreamEffect.END_CLIENT:
                world = replace(world, client="ended")
    return world


def close_leg_2(world: World) -> World:
    parked = world.leg_2 == "parked"
    world = replace(world, leg_2="closed")
    return destination(world, DestinationEvent.GONE) if parked else world


def source(world: World, event: SourceInput, now_s: float = NOW_S) -> World:
    assert world.source is not None
    before = world.source
    after, effects = source_step(before, event, now_s)
    world = replace(world, source=after)
    for effect in effects:
        match effect:
            case SourceEffect.SEND_BLOCKS:
                world = replace(world, to_destination=(*world.to_destination, Placed(after.sent_blocks)))
            case SourceEffect.CAP:
                world = replace(world, capped=True)
            case SourceEffect.SEND_TAIL:
                assert world.ended == "cut"
                world = replace(world, to_destination=(*world.to_destination, DestinationEvent.TAIL), held=True)
            case SourceEffect.TELL_DESTINATION:
                world = replace(world, to_destination=(*world.to_destination, DestinationEvent.SOURCE_ENDED))
            case SourceEffect.FREE_BLOCKS:
                assert world.held
                world = replace(world, held=False, freed=world.freed + 1)
    return world


def destination(world: World, event: DestinationInput, now_s: float = NOW_S) -> World:
    assert world.destination is not None
    after, effects = destination_step(world.destination, event, now_s)
    world = replace(world, destination=after)
    for effect in effects:
        match effect:
            case DestinationEffect.ADMIT:
                assert world.leg_2 == "parked"
                world = replace(world, admitted=world.admitted + 1, leg_2="running")
            case DestinationEffect.GIVE_BACK:
                world = replace(world, given_back=world.given_back + 1)
            case DestinationEffect.ABORT_REQUEST | DestinationEffect.REFUSE_REQUEST:
                world = replace(world, leg_2="failed" if world.leg_2 != "closed" else "closed")
            case DestinationEffect.TAKE_TAIL:
                world = replace(world, to_source=(*world.to_source, SourceEvent.TAIL_TAKEN))
            case DestinationEffect.REFUSE_TAIL:
                world = replace(world, to_source=(*world.to_source, SourceEvent.TAIL_REFUSED))
    if isinstance(event, Placed):
        world = replace(world, to_source=(*world.to_source, Acknowledged(after.blocks)))
    return world


def coordinator(world: World, heard: Heard) -> World:
    after, effects = coordinator_step(world.coordinator, heard)
    world = replace(world, coordinator=after)
    asked = {
        CoordinatorEffect.ASK_PRECOPY: ("source", "precopy"),
        CoordinatorEffect.WATCH_SOURCE: ("source", SourceEvent.ASKED),
        CoordinatorEffect.WATCH_DESTINATION: ("destination", DestinationEvent.ASKED),
        CoordinatorEffect.ASK_FREEZE: ("source", SourceEvent.FREEZE),
        CoordinatorEffect.ASK_RESUME: ("destination", DestinationEvent.RESUME),
        CoordinatorEffect.ASK_RELEASE: ("source", SourceEvent.RELEASE),
        CoordinatorEffect.CANCEL_SOURCE: ("source", SourceEvent.CANCEL),
        CoordinatorEffect.CANCEL_DESTINATION: ("destination", DestinationEvent.CANCEL),
    }
    told = {
        CoordinatorEffect.OWNER_PARK: StreamEvent.PARK,
        CoordinatorEffect.OWNER_FREEZE: StreamEvent.FREEZE,
        CoordinatorEffect.OWNER_FINISHED: StreamEvent.FINISHED,
        CoordinatorEffect.OWNER_STAYS: StreamEvent.STAYS,
        CoordinatorEffect.OWNER_SOURCE_LOST: StreamEvent.SOURCE_LOST,
        CoordinatorEffect.OWNER_RESUME: StreamEvent.RESUME,
    }
    for effect in effects:
        world = post(world, *asked[effect]) if effect in asked else owner(world, told[effect])
    return world


def hear(world: World, to: str, message: object) -> World:
    """A question reaches an engine, or an answer the coordinator."""
    if to == "coordinator":
        assert isinstance(message, Heard)
        return coordinator(world, message) if world.coordinator_alive else world
    if to == "source":
        if not world.source_alive:
            return world
        if world.source is None:
            if message != "precopy" or world.ended:
                return post(world, "coordinator", SourceIs(SourcePhase.FINISHED, reason=Reason.UNKNOWN_REQUEST))
            world = replace(world, source=Source(lease_s=LEASE_S, lease_ends_s=LEASE_S))
            world = source(world, Stepped(world.produced, world.produced > 0))
        elif isinstance(message, SourceEvent):
            world = source(world, message)
        state = world.source
        assert state is not None
        return post(
            world, "coordinator", SourceIs(state.phase, state.caught_up or world.at_once, state.tail, state.reason)
        )
    if not world.destination_alive:
        return world
    if world.destination is None:
        if message != "prepare":
            return post(world, "coordinator", Refused(Reason.UNKNOWN_REQUEST))
        world = replace(world, destination=Destination(lease_s=LEASE_S, lease_ends_s=LEASE_S))
    elif isinstance(message, DestinationEvent):
        world = destination(world, message)
    there = world.destination
    assert there is not None
    return post(world, "coordinator", DestinationIs(there.phase, there.parked, there.reason))


def engines_move(world: World) -> Iterator[World]:
    if world.source_alive and not world.ended:
        if not world.leg_1_open:
            yield ended_at_source(world, "aborted")
        else:
            produced = world.produced + 1
            after = replace(world, produced=produced)
            if produced == ANSWER_TOKENS:
                yield ended_at_source(after, "own")
            elif world.capped:
                yield ended_at_source(after, "cut")
            else:
                yield source(after, Stepped(produced, True)) if world.source is not None else after
    if world.to_destination:
        first, rest = world.to_destination[0], world.to_destination[1:]
        after = replace(world, to_destination=rest)
        yield destination(after, first) if world.destination_alive and world.destination is not None else after
    if world.to_source:
        answer, others = world.to_source[0], world.to_source[1:]
        after = replace(world, to_source=others)
        yield source(after, answer) if world.source_alive and world.source is not None else after
    if world.leg_2 == "sent":
        if not world.destination_alive or world.destination is None:
            yield replace(world, leg_2="failed")
        elif world.destination.phase is DestinationPhase.RESERVED:
            yield destination(replace(world, leg_2="parked"), DestinationEvent.PARKED)
        else:
            yield destination(world, DestinationEvent.PARKED)


def ended_at_source(world: World, how: str) -> World:
    world = replace(world, ended=how)
    if world.source is None:
        return world
    return source(world, SourceEvent.CUT if how == "cut" else SourceEvent.ENDED)


def owner_reads(world: World) -> Iterator[World]:
    if world.client:
        return
    if world.leg_1_open:
        if world.leg_1_read < world.produced:
            yield owner(replace(world, leg_1_read=world.produced), Tokens(1, world.produced))
        elif world.ended in ("cut", "own"):
            yield owner(replace(world, leg_1_open=False), LegEnded(1))
        elif not world.source_alive:
            yield owner(replace(world, leg_1_open=False), LegBroken(1))
    if world.leg_2 == "running" and not world.client:
        if not world.destination_alive:
            yield owner(replace(world, leg_2="closed"), LegBroken(2))
        elif world.stream.epoch == 2 and world.stream.delivered_tokens == ANSWER_TOKENS:
            yield owner(replace(world, leg_2="closed"), LegEnded(2))
        else:
            yield owner(world, Tokens(2, ANSWER_TOKENS if world.stream.epoch == 2 else max(1, world.produced)))
    if world.leg_2 == "failed" or (world.leg_2 == "parked" and not world.destination_alive):
        yield owner(replace(world, leg_2="closed"), LegBroken(2))


def timers(world: World) -> Iterator[World]:
    if world.source_alive and world.source is not None and not world.source.over:
        yield source(world, SourceEvent.TICK, LATER_S)
    if world.destination_alive and world.destination is not None:
        yield destination(world, DestinationEvent.TICK, LATER_S)
    if world.coordinator_alive:
        yield coordinator(world, NoAnswer.SOURCE)
        yield coordinator(world, NoAnswer.DESTINATION)
    if not world.client:
        yield owner(world, StreamEvent.DEADLINE)


def faults(world: World) -> Iterator[World]:
    if not world.faults:
        return
    world = replace(world, faults=world.faults - 1)
    for message in world.messages:
        yield replace(world, messages=world.messages - {message})
        yield hear(world, *message)
    if world.channel:
        cut = replace(world, channel=False, to_destination=(), to_source=())
        yield source(cut, SourceEvent.CHANNEL_LOST) if world.source_alive and world.source is not None else cut
    if world.source_alive:
        yield replace(world, source_alive=False, held=False, to_source=())
    if world.destination_alive:
        yield replace(world, destination_alive=False, to_destination=())
        yield replace(world, destination=None, admitted=0, given_back=0, leg_2="failed" if world.leg_2 else "")
    if world.coordinator_alive:
        yield replace(world, coordinator_alive=False)
    if not world.client:
        yield owner(replace(world, client="gone"), StreamEvent.CLIENT_GONE)


def moves(world: World, *, with_timers: bool = True) -> Iterator[World]:
    for message in world.messages:
        yield hear(replace(world, messages=world.messages - {message}), *message)
    yield from engines_move(world)
    yield from owner_reads(world)
    if with_timers:
        yield from timers(world)
        yield from faults(world)


def forget(world: World) -> World:
    """The world without what nobody will look at any more, so that fewer worlds are told apart."""
    if world.source is not None and world.source.over:
        over = Source(lease_s=LEASE_S, lease_ends_s=LEASE_S, phase=world.source.phase, reason=world.source.reason)
        world = replace(world, source=over, to_source=())
    if world.destination is not None and world.destination.phase is not DestinationPhase.RESERVED:
        tail = tuple(event for event in world.to_destination if event is DestinationEvent.TAIL)
        world = replace(world, destination=replace(world.destination, blocks=0), to_destination=tail)
    if not world.leg_1_open:
        world = replace(world, leg_1_read=0)
    if world.coordinator.phase is CoordinatorPhase.OVER or not world.coordinator_alive:
        world = replace(world, messages=frozenset(m for m in world.messages if m[0] != "coordinator"))
    return world


def check(world: World) -> None:
    if world.client == "ended":
        assert world.stream.delivered_tokens == ANSWER_TOKENS, "the client was told the end before the last token"
    assert world.freed <= 1, "a hold was released twice"
    assert world.admitted + world.given_back <= 1, "a reservation was released twice"
    if world.destination is not None and world.destination_alive:
        ended = world.destination.phase is not DestinationPhase.RESERVED
        assert world.admitted + world.given_back == ended, "a reservation was not released"
    if world.source is not None and world.source_alive:
        assert world.held == (world.source.phase is SourcePhase.HELD), "a hold without its phase"
    if not world.capped and world.ended == "cut":
        raise AssertionError("cut without being asked")
    if world.leg_2 == "running" and world.stream.phase is StreamPhase.FREEZING and not world.stream.leg_over:
        assert world.ended == "cut" or not world.source_alive, "two engines write the stream"


def explored(faults: int, *, with_timers: bool = True, at_once: bool = False) -> dict[World, list[World]]:
    first = start(faults, at_once=at_once)
    found: dict[World, list[World]] = {}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        if world in found:
            continue
        check(world)
        follow = () if world.done else (forget(after) for after in moves(world, with_timers=with_timers))
        found[world] = [after for after in follow if after != world]
        queue.extend(found[world])
    return found


@pytest.mark.parametrize(("faults", "at_once"), [(0, False), (0, True), pytest.param(1, False, marks=pytest.mark.full)])
def test_every_stream_ends_well_and_nothing_is_left_behind(faults: int, at_once: bool) -> None:
    worlds = explored(faults, at_once=at_once)
    before: dict[World, list[World]] = {}
    for world, after in worlds.items():
        for one in after:
            before.setdefault(one, []).append(world)
    can_end = {world for world in worlds if world.done}
    queue = deque(can_end)
    while queue:
        for world in before.get(queue.popleft(), []):
            if world not in can_end:
                can_end.add(world)
                queue.append(world)
    stuck = [world for world in worlds if world not in can_end]
    assert not stuck, stuck[0]


def test_undisturbed_the_request_moves_with_its_cache_or_finishes_first() -> None:
    last = [world for world, after in explored(0, with_timers=False).items() if not after]
    assert {world.coordinator.result for world in last} == {Result.MOVED, Result.FINISHED, Result.STAYED}
    for world in last:
        assert world.done
        assert world.coordinator.phase is CoordinatorPhase.OVER
        assert not world.resumed
        if world.coordinator.result is Result.MOVED:
            assert (world.stream.epoch, world.freed, world.admitted) == (2, 1, 1)
        else:
            assert (world.stream.epoch, world.freed, world.admitted) == (1, 0, 0)
            assert world.coordinator.reason is not None
