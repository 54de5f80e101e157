"""What the owner of a client's stream passes on, and what it takes an engine's end for."""

from __future__ import annotations

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

TO_THE_CUT = (StreamEvent.BEGIN, StreamEvent.PARK, StreamEvent.FREEZE)


def run(*sequence: StreamInput) -> tuple[Stream, list[StreamEffect]]:
    stream = Stream()
    effects: list[StreamEffect] = []
    for event in sequence:
        stream, more = stream_step(stream, event)
        effects.extend(more)
    return stream, effects


def test_an_engine_that_ends_after_the_cut_was_asked_does_not_end_the_client() -> None:
    assert StreamEffect.END_CLIENT not in run(Tokens(1, 5), *TO_THE_CUT, LegEnded(1))[1]
    assert run(Tokens(1, 5), *TO_THE_CUT, LegEnded(1), StreamEvent.FINISHED)[1][-1] is StreamEffect.END_CLIENT
    assert run(Tokens(1, 5), LegEnded(1))[1][-1] is StreamEffect.END_CLIENT


def test_what_the_next_leg_repeats_is_not_delivered_again() -> None:
    before = (Tokens(1, 5), *TO_THE_CUT, LegEnded(1))
    stream, effects = run(*before, Tokens(2, 5))
    assert (stream.epoch, stream.phase, stream.delivered_tokens) == (2, StreamPhase.STREAMING, 5)
    assert effects.count(StreamEffect.DELIVER) == 1
    assert run(*before, Tokens(2, 5), Tokens(2, 6))[1].count(StreamEffect.DELIVER) == 2


def test_a_leg_that_was_left_is_not_heard_any_more() -> None:
    moved = (Tokens(1, 5), *TO_THE_CUT, LegEnded(1), Tokens(2, 6))
    stream, effects = run(*moved)
    assert run(*moved, Tokens(1, 9), LegEnded(1), LegBroken(1)) == (stream, effects)


def test_one_migration_at_a_time() -> None:
    assert run(StreamEvent.BEGIN, StreamEvent.BEGIN)[1] == [StreamEffect.REFUSE]
    assert run(StreamEvent.BEGIN, StreamEvent.STAYS, StreamEvent.BEGIN)[1] == []
    assert run(LegEnded(1), StreamEvent.BEGIN)[1][-1] is StreamEffect.REFUSE


def test_an_owner_that_gave_a_migration_up_does_not_agree_to_its_cut() -> None:
    given_up = (StreamEvent.BEGIN, StreamEvent.PARK, StreamEvent.DEADLINE)
    assert run(*given_up, StreamEvent.FREEZE)[1][-2:] == [StreamEffect.CLOSE_NEXT, StreamEffect.REFUSE]
    assert run(*given_up, StreamEvent.FREEZE)[0].phase is StreamPhase.STREAMING


def test_a_broken_engine_is_left_for_another_with_what_was_delivered() -> None:
    stream, effects = run(Tokens(1, 5), LegBroken(1))
    assert (stream.epoch, stream.delivered_tokens) == (2, 5)
    assert effects[-1] is StreamEffect.RESUME


def test_a_source_that_dies_while_the_destination_is_ready_is_waited_for_until_the_deadline() -> None:
    waiting = (Tokens(1, 5), StreamEvent.BEGIN, StreamEvent.PARK, LegBroken(1))
    assert StreamEffect.RESUME not in run(*waiting)[1]
    assert run(*waiting, Tokens(2, 6))[0].epoch == 2
    assert run(*waiting, StreamEvent.DEADLINE)[1][-2:] == [StreamEffect.CLOSE_NEXT, StreamEffect.RESUME]


def test_a_client_that_leaves_closes_both_legs() -> None:
    effects = run(*TO_THE_CUT, StreamEvent.CLIENT_GONE)[1]
    assert {StreamEffect.CLOSE_NEXT, StreamEffect.CLOSE_PRESENT} <= set(effects)
