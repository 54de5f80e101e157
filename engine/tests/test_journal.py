"""Every token is told once, in order, to whoever asked for it, however slowly it listens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api.migration_messages import MOST_REQUESTS
from llmfleet.api.migration_messages import Journal as Event
from llmfleet.engine.journal import MOST_TOLD_TOKENS, Journal, Subscriber, batches


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["told", "put_back", "wait"])), max_size=30),
    st.integers(0, 10),
)
def test_a_subscriber_is_told_every_token_once_whenever_it_joins_and_however_often_it_cannot_be_told(
    steps: list[tuple[int, str]], joins: int
) -> None:
    journal = Journal()
    heard: list[int] = []
    tokens: list[int] = []
    subscriber = Subscriber(lambda: None)
    for step, (count, listening) in enumerate(steps):
        if step == joins:
            journal.subscribe(subscriber, ["mine"])
        tokens += range(len(tokens), len(tokens) + count)
        journal.stepped(("other", "mine"), tokens)
        if listening == "wait":
            continue
        taken = subscriber.take()
        if listening == "put_back":
            subscriber.put_back(taken)
            continue
        for index, ids in taken.values():
            assert index == len(heard)
            heard += ids
    if len(steps) > joins:
        heard += [token for _, ids in subscriber.take().values() for token in ids]
        assert heard == tokens


def test_what_comes_while_a_batch_could_not_be_told_follows_it() -> None:
    journal, subscriber = Journal(), Subscriber(lambda: None)
    journal.subscribe(subscriber, ["a", "b"])
    journal.stepped(("a",), [1, 2])
    taken = subscriber.take()
    journal.stepped(("a",), [1, 2, 3])
    journal.stepped(("b",), [9])
    subscriber.put_back(taken)
    assert subscriber.take() == {"a": (0, [1, 2, 3]), "b": (0, [9])}


def test_only_those_who_asked_are_woken_and_nobody_after_leaving() -> None:
    woken: list[str] = []
    journal = Journal()
    one, other = Subscriber(lambda: woken.append("one")), Subscriber(lambda: woken.append("other"))
    journal.subscribe(one, ["a"])
    journal.subscribe(other, ["b"])
    journal.stepped(("a",), [1])
    journal.unsubscribe(one, ["a"])
    journal.stepped(("a",), [1, 2])
    assert woken == ["one"]
    journal.unsubscribe(other)
    assert not journal.followed


def test_a_request_that_has_the_name_of_an_older_one_is_told_from_its_first_token() -> None:
    journal = Journal()
    subscriber = Subscriber(lambda: None)
    journal.subscribe(subscriber, ["mine"])
    journal.stepped(["mine"], [1, 2, 3])
    assert subscriber.take() == {"mine": (0, [1, 2, 3])}
    journal.stepped(["mine"], [1, 2, 3, 4])
    journal.began(["mine"])
    journal.stepped(["mine"], [7])
    assert subscriber.take() == {"mine": (0, [7])}


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 50), st.integers(1, 3 * MOST_TOLD_TOKENS))))
def test_news_are_cut_into_events_that_are_not_too_large_for_anybody(news: dict[str, tuple[int, int]]) -> None:
    taken = {name: (index, list(range(count))) for name, (index, count) in news.items()}
    told: dict[str, list[int]] = {name: [] for name in taken}
    for entries in batches(taken):
        assert 0 < sum(len(entry.ids) for entry in entries) <= MOST_TOLD_TOKENS
        for entry in entries:
            assert entry.index == taken[entry.request][0] + len(told[entry.request])
            told[entry.request] += entry.ids
    assert told == {name: ids for name, (_, ids) in taken.items()}


def test_more_requests_than_an_event_may_have_are_told_in_several() -> None:
    events = list(batches({f"r{number}": (0, [1]) for number in range(MOST_REQUESTS + 1)}))
    assert [len(Event(entries=entries).entries) for entries in events] == [MOST_REQUESTS, 1]
