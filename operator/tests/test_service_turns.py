"""Services are decided on one per turn of the event loop, however many wait and however many workers there are."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from llmfleet.operator.cache import Cache
from llmfleet.operator.controllers import WORKERS
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.metrics import Metrics
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.services import ServiceReconciler
from llmfleet.operator.workqueue import WorkQueue

SERVICES = 60
DECISION_S = 0.005


class Standby:
    leading, queue_depth, planning, newest_plan = False, 0, None, None

    def services(self) -> Any:
        return iter(())

    def profiles(self) -> Any:
        return iter(())


class Deciding(ServiceReconciler):
    """Decides nothing, and takes its time for it."""

    turns: list[int]
    turn = 0

    async def round(self, key: str) -> str:
        _keep_busy(DECISION_S)
        self.turns.append(self.turn)
        return "nothing"


def _keep_busy(seconds: float) -> None:
    time.sleep(seconds)


async def test_the_loop_takes_a_turn_between_two_decisions() -> None:
    cache, queue = Cache(), WorkQueue()
    applier: Any = None
    reconciler = Deciding(cache, PlanBook(), DeviceLedger(cache), applier, queue, Metrics(Standby()))
    reconciler.turns = []
    for number in range(SERVICES):
        queue.add(f"team/{number}")

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(reconciler.work()) for _ in range(WORKERS)]
        while len(reconciler.turns) < SERVICES:
            reconciler.turn += 1
            await asyncio.sleep(0)
        for worker in workers:
            worker.cancel()
    assert len(set(reconciler.turns)) == SERVICES
