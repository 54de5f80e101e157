"""What owners are told of many requests at once comes in events that are not too large for anybody."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmfleet.api.migration_messages import MOST_REQUESTS, Journal
from llmfleet.engine.control import MOST_TOLD_TOKENS, _Telling, batches
from llmfleet.engine.metrics import Metrics


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 50), st.integers(1, 3 * MOST_TOLD_TOKENS))))
def test_every_token_is_told_once_and_in_order(news: dict[str, tuple[int, int]]) -> None:
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
    assert [len(Journal(entries=entries).entries) for entries in events] == [MOST_REQUESTS, 1]


class Reader:
    """A subscriber that takes so many events and then no more for a while."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.told: list[Journal] = []

    def publish(self, journal: Journal) -> bool:
        if len(self.told) >= self.room:
            return False
        self.told.append(journal)
        return True


async def test_a_reader_that_is_full_in_the_middle_is_told_the_rest_later() -> None:
    migrations: Any = SimpleNamespace(monitor=threading.RLock(), metrics=Metrics())
    reader: Any = Reader(room=1)
    telling = _Telling(migrations, reader, asyncio.get_running_loop())
    count = 2 * MOST_TOLD_TOKENS + 5
    telling.subscriber.pending = {"a": (0, list(range(count))), "b": (7, [1, 2])}
    assert not telling._tell(lagging=False)
    telling.subscriber.pending.setdefault("b", (9, []))[1].extend([3])
    reader.room = 10
    assert telling._tell(lagging=True)
    told: dict[str, list[int]] = {"a": [], "b": []}
    for journal in reader.told:
        for entry in journal.entries:
            assert entry.index == len(told[entry.request]) + (7 if entry.request == "b" else 0)
            told[entry.request] += entry.ids
    assert told == {"a": list(range(count)), "b": [1, 2, 3]}
    assert [journal.lagging for journal in reader.told][:2] == [False, True]
