"""Full collections look at what is new, and forget no garbage for ever."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator

import pytest

from llmfleet.operator import garbage


class Cycle:
    """Refers to itself, so that only a collection can free it."""

    def __init__(self) -> None:
        self.me = self


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@contextlib.asynccontextmanager
async def collecting(clock: Clock) -> AsyncIterator[None]:
    task = asyncio.create_task(garbage.collect_garbage(clock))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "LOOK_INTERVAL_S", 0.001)


async def grow_old() -> None:
    """As many collections of the middle generation as make a full one due, and time for it."""
    for _ in range(garbage.OLD_ENOUGH):
        gc.collect(1)
    await asyncio.sleep(0.1)


async def test_what_survives_a_full_collection_is_not_visited_again() -> None:
    async with collecting(Clock()):
        kept = [[number] for number in range(10_000)]
        await grow_old()
        assert gc.get_freeze_count() >= len(kept)
        assert len(gc.get_objects(generation=2)) < 1_000


async def test_garbage_that_came_since_is_collected_when_enough_has_grown_old() -> None:
    async with collecting(Clock()):
        await grow_old()
        cycle = Cycle()
        gone = weakref.ref(cycle)
        gc.collect(1)
        del cycle
        await grow_old()
        assert gone() is None


async def test_what_became_garbage_after_it_was_frozen_is_collected_in_time() -> None:
    clock = Clock()
    async with collecting(clock):
        cycle = Cycle()
        gone = weakref.ref(cycle)
        await grow_old()
        del cycle
        await grow_old()
        assert gone() is not None, "it was frozen, or this test shows nothing"

        clock.now_s += garbage.THAW_INTERVAL_S
        await asyncio.sleep(0.1)
        assert gone() is None
        assert gc.get_freeze_count() > 0, "the survivors are frozen again"


async def test_afterwards_all_is_as_before() -> None:
    before = gc.get_threshold()
    async with collecting(Clock()):
        await grow_old()
        assert gc.get_threshold() != before
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
