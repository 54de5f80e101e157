"""The work queue: each key once, by one worker at a time, later when it fails."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from llmfleet.operator.workqueue import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_key_that_is_added_many_times_is_worked_on_once() -> None:
    queue = WorkQueue()
    for _ in range(1000):
        queue.add("a")
    queue.add("b")
    assert len(queue) == 2
    assert [await queue.get(), await queue.get()] == ["a", "b"]


async def test_a_key_that_changes_while_it_is_worked_on_comes_again_afterwards_and_not_before() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert await queue.get() == "a"
    queue.add("a")
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert await queue.get() == "a"
    queue.done("a")
    assert len(queue) == 0


async def test_a_failed_key_comes_back_later_each_time_and_at_once_after_a_success() -> None:
    clock = Clock()
    queue = WorkQueue(clock)
    delays = []
    for _ in range(12):
        queue.add("a")
        assert await queue.get() == "a"
        delays.append(queue.failed("a"))
        assert len(queue) == 0
        clock.now_s += delays[-1]
    assert delays[0] <= FIRST_BACKOFF_S * 1.25
    assert all(later > earlier for earlier, later in itertools.pairwise(delays[:6]))
    assert max(delays) <= LONGEST_BACKOFF_S * 1.25
    assert await queue.get() == "a"
    queue.done("a")
    queue.add("a")
    assert await queue.get() == "a"
    assert queue.failed("a") <= FIRST_BACKOFF_S * 1.25


async def test_the_earliest_of_several_delays_counts_and_the_others_are_forgotten() -> None:
    clock = Clock()
    queue = WorkQueue(clock)
    queue.add_after("a", 10)
    queue.add_after("a", 1)
    queue.add_after("a", 5)
    clock.now_s = 1.0
    assert await queue.get() == "a"
    queue.done("a")
    clock.now_s = 20.0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await queue.get()


async def test_a_waiting_worker_is_woken_by_a_new_key() -> None:
    queue = WorkQueue()
    queue.add_after("later", 60)
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("now")
    assert await asyncio.wait_for(worker, 5) == "now"


async def test_no_two_workers_have_the_same_key() -> None:
    queue = WorkQueue()
    active: set[str] = set()
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        while True:
            key = await queue.get()
            assert key not in active
            active.add(key)
            await asyncio.sleep(0)
            active.discard(key)
            rounds += 1
            queue.done(key)

    workers = [asyncio.create_task(work()) for _ in range(4)]
    for number in range(200):
        queue.add(f"key-{number % 3}")
        await asyncio.sleep(0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(queue) == 0
    for worker in workers:
        worker.cancel()
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert rounds >= 3
