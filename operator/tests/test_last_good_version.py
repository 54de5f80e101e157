"""A type or profile that stops parsing opens nothing: services stay planned by the version that did, also new ones."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.operator.objects import gpu_type, profile, service
from llmfleet.api import GPUType, ModelProfile, Plan, Refusal
from llmfleet.operator.accepted import verdict
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.fleet import Fleet
from llmfleet.operator.invalid import Bound, InvalidObject
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.parse import EPOCH
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

    def report(self) -> None:
        """What the operator writes into the statuses."""
        for (kind, name), obj in self.objects.items():
            value = self.cache.find(kind, f"{TEAM}/{name}" if "namespace" in obj["metadata"] else name)
            if isinstance(value, Bound | InvalidObject) and (found := verdict(value, self.cache.gpu_types, EPOCH)):
                self.objects[kind, name] = {**obj, "status": {"lastAccepted": found.last_accepted}}

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


@pytest.mark.parametrize("kind", sorted(BROKEN))
async def test_services_are_planned_by_the_last_version_that_parsed_also_after_a_restart(kind: str) -> None:
    cluster = Cluster()
    try:
        cluster.put(node(), gpu_type("l4", "example.com/l4", 1.0), profile(TEAM, {"l4": 10.0}))
        cluster.put(service(TEAM, "chat", 3.0))
        before = await cluster.replicas()
        assert before == {"team/chat": {"l4": 1}}

        cluster.put(BROKEN[kind], service(TEAM, "later", 3.0))
        assert await cluster.replicas() == before | {"team/later": {"l4": 1}}
        cluster.report()

        in_force = cluster.book.in_force()
        await cluster.process.stop()
        cluster.start(in_force)
        cluster.put(service(TEAM, "last", 3.0))
        assert await cluster.replicas() == before | {"team/later": {"l4": 1}, "team/last": {"l4": 1}}
        assert cluster.book.refusals == {}
    finally:
        await cluster.process.stop()


async def test_what_needs_a_type_or_profile_that_nobody_ever_understood_is_refused_and_keeps_its_plan() -> None:
    cluster = Cluster()
    try:
        cluster.put(node(), gpu_type("l4", "example.com/l4", 1.0), profile(TEAM, {"l4": 10.0}))
        cluster.put(service(TEAM, "chat", 3.0))
        assert await cluster.replicas() == {"team/chat": {"l4": 1}}
        cluster.put(BROKEN[ModelProfile.KIND])
        in_force = cluster.book.in_force()
        await cluster.process.stop()
        # Nothing was reported: as of an operator that was updated to one that understands less.
        cluster.start(in_force)
        assert await cluster.replicas() == {}
        refusal = cluster.book.desired("team/chat")
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "ProfileNotFound"
        assert {key: plan.replicas for key, plan in cluster.book.plans().items()} == {"team/chat": {"l4": 1}}
    finally:
        await cluster.process.stop()
