"""Who reads too slowly at the control port is told the rest later."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from llmfleet.api.migration_messages import Journal
from llmfleet.engine.control import _Telling
from llmfleet.engine.journal import MOST_TOLD_TOKENS
from llmfleet.engine.metrics import Metrics


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
