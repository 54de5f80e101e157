"""What a source makes of its request's progress, and of being told things late or twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api import Reason, SourcePhase, TailFate
from llmfleet.migration.source import (
    STAGES_WITHOUT_PROGRESS,
    Acknowledged,
    Source,
    SourceEffect,
    SourceEvent,
    SourceInput,
    Stepped,
    source_step,
)

events = st.one_of(
    st.builds(Stepped, st.integers(0, 40), st.booleans()),
    st.builds(Acknowledged, st.integers(0, 40)),
    st.sampled_from(SourceEvent),
)


def run(*sequence: SourceInput) -> tuple[Source, list[SourceEffect]]:
    source = Source(lease_s=10, lease_ends_s=10)
    effects: list[SourceEffect] = []
    for event in sequence:
        source, more = source_step(source, event, 0)
        effects.extend(more)
    return source, effects


def test_a_stage_begins_when_the_one_before_has_arrived() -> None:
    source, effects = run(Stepped(8, True), Stepped(9, True), Acknowledged(4), Stepped(10, True))
    assert (source.sent_blocks, effects) == (8, [SourceEffect.SEND_BLOCKS])
    source, effects = run(Stepped(8, True), Stepped(10, True), Acknowledged(8))
    assert (source.sent_blocks, len(effects)) == (10, 2)
    assert source.lag_blocks == 2
    assert not source.caught_up


def test_a_copy_that_falls_no_less_behind_in_three_stages_is_ended() -> None:
    sequence: list[SourceInput] = [Stepped(4, True)]
    for stage in range(1, STAGES_WITHOUT_PROGRESS + 1):
        assert run(*sequence)[0].phase is SourcePhase.COPYING
        sequence += [Stepped(4 * stage + 4, True), Acknowledged(4 * stage)]
    source, effects = run(*sequence)
    assert (source.phase, source.reason) == (SourcePhase.CANCELLED, Reason.LAGGING)
    assert effects[-1] is SourceEffect.TELL_DESTINATION


def test_what_was_sent_stays_valid_when_the_request_is_preempted() -> None:
    source, _ = run(Stepped(8, True), Acknowledged(8), Stepped(0, True), Stepped(3, True))
    assert (source.lag_blocks, source.caught_up, source.phase) == (0, True, SourcePhase.COPYING)
    assert run(Stepped(8, True), Acknowledged(8), Stepped(0, True), Stepped(12, True))[0].sent_blocks == 12


def test_only_blocks_that_were_sent_can_be_acknowledged() -> None:
    assert run(Stepped(8, True), Acknowledged(20))[0].acknowledged_blocks == 8


@given(st.lists(events, max_size=30))
def test_whatever_it_is_told_it_caps_once_and_frees_what_it_holds_once(sequence: list[SourceInput]) -> None:
    source, effects = run(*sequence)
    assert effects.count(SourceEffect.CAP) <= 1
    assert effects.count(SourceEffect.SEND_TAIL) <= effects.count(SourceEffect.CAP)
    assert effects.count(SourceEffect.FREE_BLOCKS) == (source.phase is SourcePhase.RELEASED)
    assert (SourceEffect.SEND_TAIL in effects) == (source.phase in (SourcePhase.HELD, SourcePhase.RELEASED))
    if source.over:
        again, more = source_step(source, SourceEvent.TICK, 1e9)
        assert (again, more) == (source, ())
        for event in SourceEvent:
            assert source_step(source, event, 0)[1] == ()


def test_a_hold_ends_with_its_lease_and_a_cut_that_was_asked_for_waits_for_its_step() -> None:
    held, _ = run(Stepped(1, True), SourceEvent.FREEZE, SourceEvent.CUT)
    assert source_step(held, SourceEvent.TICK, 9.9) == (held, ())
    released, effects = source_step(held, SourceEvent.TICK, 10.0)
    assert (released.phase, effects) == (SourcePhase.RELEASED, (SourceEffect.FREE_BLOCKS,))
    freezing, _ = run(Stepped(1, True), SourceEvent.FREEZE, SourceEvent.CANCEL)
    assert source_step(freezing, SourceEvent.TICK, 11.0) == (freezing, ())


def test_a_channel_that_is_lost_after_the_freeze_is_known_at_the_cut() -> None:
    source, _ = run(Stepped(8, True), SourceEvent.FREEZE, SourceEvent.CHANNEL_LOST, SourceEvent.CUT)
    assert (source.phase, source.tail) == (SourcePhase.HELD, TailFate.REFUSED)
