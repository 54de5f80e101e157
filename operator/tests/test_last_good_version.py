"""A type or profile that stops parsing opens nothing: services stay planned by the version that did, also new ones."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.operator.objects import gpu_type, profile, service
from llmfleet.api import GPUType, ModelProfile, Plan, Refusal
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.fleet import Fleet
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.planner import PLANNED_KINDS, FleetPlanner, PlannerProcess

Json = dict[str, Any]
TEAM = "team"


class Cluster:
    """Objects as the API server has them, one operator's cache of them, and its planning loop."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Json] = {}
        self.process = PlannerProcess()
        self.start()

    def start(self, in_force: Plan | None = None) -> None:
        """A new operator; the ConfigMaps tell it what is in force."""
        self.cache, self.book = Cache(), PlanBook(restored=in_force)
        self.fleet = Fleet(self.cache, self.book, DeviceLedger(self.cache), measures_demand=False)
        self.planner = FleetPlanner(self.fleet, self.book, lambda changed: None, self.process)
        self.cache.on_change = lambda observation, _: (
            self.planner.mark(observation.kind, observation.key) if observation.kind in PLANNED_KINDS else None
        )
        for (kind, _), obj in self.objects.items():
            self.cache.apply(observe(kind, obj))

    def put(self, *objects: Json) -> None:
        for obj in objects:
            kind, name = obj["kind"], obj["metadata"]["name"]
            before = self.objects.get((kind, name), {"metadata": {"resourceVersion": "0"}})
            version = int(before["metadata"]["resourceVersion"]) + 1
            meta = {**obj["metadata"], "uid": name, "resourceVersion": str(version), "generation": version}
            self.objects[kind, name] = {**obj, "metadata": meta}
            self.cache.apply(observe(kind, self.objects[kind, name]))

    async def replicas(self) -> dict[str, dict[str, int]]:
        self.fleet.mark_inventory()
        await self.planner.plan_once()
        return {key: planned.plan.replicas for key, planned in self.book.services.items()}


def node() -> Json:
    ready = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"example.com/l4": "8"}}
    return {"kind": "Node", "metadata": {"name": "n"}, "status": ready}


def broken_profile() -> Json:
    broken = profile(TEAM, {"l4": 10.0})
    broken["spec"]["measurements"] = "lost"
    return broken


BROKEN = {GPUType.KIND: gpu_type("l4", "example.com/l4", -1.0), ModelProfile.KIND: broken_profile()}

REFUSED = {GPUType.KIND: "UnknownGPUType", ModelProfile.KIND: "ProfileNotFound"}


@pytest.mark.parametrize("kind", sorted(BROKEN))
async def test_services_stay_planned_by_the_last_version_that_parsed_until_a_restart_and_then_keep_their_plan(
    kind: str,
) -> None:
    cluster = Cluster()
    try:
        cluster.put(node(), gpu_type("l4", "example.com/l4", 1.0), profile(TEAM, {"l4": 10.0}))
        cluster.put(service(TEAM, "chat", 3.0))
        before = await cluster.replicas()
        assert before == {"team/chat": {"l4": 1}}

        cluster.put(BROKEN[kind], service(TEAM, "later", 3.0))
        assert await cluster.replicas() == before | {"team/later": {"l4": 1}}
        assert cluster.book.refusals == {}

        in_force = cluster.book.in_force()
        await cluster.process.stop()
        cluster.start(in_force)
        assert await cluster.replicas() == {}
        refusal = cluster.book.desired("team/chat")
        assert isinstance(refusal, Refusal)
        assert refusal.reason == REFUSED[kind]
        kept = {key: plan.replicas for key, plan in cluster.book.plans().items()}
        assert kept == {"team/chat": {"l4": 1}, "team/later": {"l4": 1}}
    finally:
        await cluster.process.stop()
