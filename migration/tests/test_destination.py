"""What a destination makes of blocks, request and tail in any order, and of what comes too late."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import DestinationPhase, Reason
from llmfleet.migration.destination import (
    Destination,
    DestinationEffect,
    DestinationEvent,
    DestinationInput,
    Placed,
    destination_step,
)

ENDS_A_RESERVATION = (DestinationEffect.ADMIT, DestinationEffect.GIVE_BACK)


def run(*sequence: DestinationInput) -> tuple[Destination, list[DestinationEffect]]:
    destination = Destination(lease_s=10, lease_ends_s=10)
    effects: list[DestinationEffect] = []
    for event in sequence:
        destination, more = destination_step(destination, event, 0)
        effects.extend(more)
    return destination, effects


def test_it_runs_when_tail_and_request_are_there_in_whichever_order() -> None:
    parts: tuple[DestinationInput, ...] = (Placed(4), DestinationEvent.PARKED, DestinationEvent.TAIL)
    for order in itertools.permutations(parts):
        destination, effects = run(*order)
        assert destination.phase is DestinationPhase.RUNNING
        assert sorted(effects) == [DestinationEffect.ADMIT, DestinationEffect.TAKE_TAIL]
    assert run(Placed(4), DestinationEvent.TAIL)[0].phase is DestinationPhase.RESERVED


def test_a_lost_source_is_gone_on_from_only_where_the_request_is() -> None:
    assert run(Placed(4), DestinationEvent.RESUME) == run(Placed(4))
    assert run(Placed(4), DestinationEvent.PARKED, DestinationEvent.RESUME)[1] == [DestinationEffect.ADMIT]


def test_a_request_with_another_prompt_is_refused_before_anything_is_cut_for_it() -> None:
    destination, effects = run(Placed(4), DestinationEvent.OTHER, DestinationEvent.TAIL)
    assert (destination.phase, destination.reason) == (DestinationPhase.CANCELLED, Reason.UNKNOWN_REQUEST)
    assert effects == [
        DestinationEffect.REFUSE_REQUEST, DestinationEffect.GIVE_BACK, DestinationEffect.REFUSE_TAIL,
    ]  # fmt: skip


def test_a_request_that_waits_is_told_when_nothing_will_come() -> None:
    for end in (DestinationEvent.CANCEL, DestinationEvent.SOURCE_ENDED):
        effects = run(DestinationEvent.PARKED, end)[1]
        assert effects == [DestinationEffect.ABORT_REQUEST, DestinationEffect.GIVE_BACK]
        assert run(end)[1] == [DestinationEffect.GIVE_BACK]


def test_what_comes_after_the_lease_is_refused() -> None:
    expired, effects = destination_step(run(Placed(4))[0], DestinationEvent.TICK, 10)
    assert (expired.phase, expired.reason, effects) == (
        DestinationPhase.EXPIRED, Reason.EXPIRED, (DestinationEffect.GIVE_BACK,),
    )  # fmt: skip
    assert destination_step(expired, DestinationEvent.TAIL, 11)[1] == (DestinationEffect.REFUSE_TAIL,)
    assert destination_step(expired, DestinationEvent.PARKED, 11)[1] == (DestinationEffect.REFUSE_REQUEST,)


def test_blocks_that_arrive_keep_the_lease() -> None:
    later, _ = destination_step(run()[0], Placed(1), 9)
    assert destination_step(later, DestinationEvent.TICK, 18) == (later, ())


def test_a_tail_that_comes_twice_is_taken_twice_and_begun_once() -> None:
    sequence = (DestinationEvent.PARKED, DestinationEvent.TAIL, DestinationEvent.TAIL)
    assert run(*sequence)[1].count(DestinationEffect.TAKE_TAIL) == 2
    assert run(*sequence)[1].count(DestinationEffect.ADMIT) == 1


@given(st.lists(st.one_of(st.builds(Placed, st.integers(0, 40)), st.sampled_from(DestinationEvent)), max_size=20))
def test_whatever_it_is_told_the_reservation_ends_once(sequence: list[DestinationInput]) -> None:
    destination, effects = run(*sequence)
    ended = sum(effects.count(effect) for effect in ENDS_A_RESERVATION)
    assert ended == (destination.phase is not DestinationPhase.RESERVED)
