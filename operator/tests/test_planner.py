"""The planning loop with the real planner process, and the book of what is decided."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from e2e.operator.objects import INPUT_EDGES, OUTPUT_EDGES, TPOT_MS, gpu_type, profile, service
from llmfleet.api import (
    Buckets,
    BucketSizes,
    FleetPolicySpec,
    GPUType,
    LLMService,
    ModelProfile,
    ObservedCell,
    ObservedVariant,
    Plan,
    PowerDomain,
    Refusal,
)
from llmfleet.operator import planner_protocol
from llmfleet.operator.plan_book import PlanBook
from llmfleet.operator.planner import AGED_EVERY_S, PLANNED_KINDS, FleetPlanner, Planned, PlannerError, PlannerProcess
from llmfleet.operator.planner_protocol import (
    Drop,
    Learn,
    MeasuredDemand,
    Put,
    Rejected,
    Solve,
    Solved,
    encode,
    frames,
    read_request,
    read_response,
)

TEAM = "team"


class StaticInputs:
    """Inputs that a test changes by hand."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Planned]] = {kind: {} for kind in PLANNED_KINDS}
        self.devices = {"fast": 8, "slow": 8}
        self.rates: dict[str, MeasuredDemand] = {}
        self.spec = FleetPolicySpec(debounce_seconds=0)
        self.broken: list[str] = []

    def put(self, *raw: dict[str, Any], generation: int = 1) -> None:
        for obj in raw:
            model = {m.KIND: m for m in (GPUType, LLMService, ModelProfile, PowerDomain)}[obj["kind"]]
            parsed = model.parse({**obj, "metadata": {**obj["metadata"], "generation": generation}})
            self.objects[obj["kind"]][parsed.key] = parsed

    def policy(self) -> FleetPolicySpec:
        return self.spec

    def keys(self, kind: str) -> list[str]:
        return list(self.objects[kind])

    def find(self, kind: str, key: str) -> Planned | None:
        return self.objects[kind].get(key)

    def unreadable(self) -> list[str]:
        return self.broken

    def inventory(self) -> dict[str, int]:
        return self.devices

    async def demand(self) -> dict[str, MeasuredDemand]:
        return self.rates


BROKEN_WORKER = """
import sys
from llmfleet.operator import planner_worker
from llmfleet.placement import plan as right

def one_replica_too_many(inputs, previous, warm):
    decided, warm = right(inputs, previous, warm)
    if not any(service.key == "team/other" for service in decided.services):
        return decided, warm
    (first, *rest) = decided.services
    (variant, *_) = first.variants
    many = first.model_copy(update={"variants": [variant.model_copy(update={"replicas": 99})]})
    return decided.model_copy(update={"services": [many, *rest]}), warm

planner_worker.plan = one_replica_too_many
planner_worker.main()
"""
"""A planner process whose solver goes wrong as soon as there is a service `other`."""


class Loop:
    """A planning loop, driven step by step."""

    def __init__(self, process: PlannerProcess | None = None) -> None:
        self.inputs = StaticInputs()
        self.inputs.put(
            gpu_type("fast", "example.com/fast", 4.0),
            gpu_type("slow", "example.com/slow", 0.6),
            profile(TEAM, {"fast": 10.0, "slow": 2.5}),
            service(TEAM, "chat", 3.0),
        )
        self.book = PlanBook()
        self.told: list[set[str]] = []
        self.process = process or PlannerProcess()
        self.planner = FleetPlanner(self.inputs, self.book, self.told.append, self.process)

    def change(self, kind: str, key: str) -> None:
        self.planner.mark(kind, key)

    def replicas(self, key: str) -> dict[str, int]:
        return self.book.services[key].plan.replicas


@asynccontextmanager
async def planning(process: PlannerProcess | None = None) -> AsyncIterator[Loop]:
    loop = Loop(process)
    try:
        yield loop
    finally:
        await loop.process.stop()


async def test_a_plan_comes_back_and_names_the_services_that_changed() -> None:
    async with planning() as loop:
        assert await loop.planner.plan_once()
        assert loop.replicas("team/chat") == {"slow": 2}
        assert loop.told == [{"team/chat"}]

        loop.inputs.put(service(TEAM, "other", 3.0))
        loop.change("LLMService", "team/other")
        assert await loop.planner.plan_once()
        assert loop.told[1:] == [{"team/other"}]
        assert loop.book.services["team/chat"].plan_id != loop.book.services["team/other"].plan_id


async def test_a_solve_with_unchanged_inputs_is_left_out() -> None:
    async with planning() as loop:
        assert await loop.planner.plan_once()
        assert not await loop.planner.plan_once()
        loop.inputs.devices = {"fast": 8, "slow": 1}
        assert await loop.planner.plan_once()
        assert loop.replicas("team/chat") == {"fast": 1}


async def test_a_power_domain_binds_from_the_next_solve_until_it_is_gone() -> None:
    async with planning() as loop:
        slow = gpu_type("slow", "example.com/slow", 0.6)
        slow["spec"]["watts"] = {"idle": 10, "peak": 100}
        domain = {
            "kind": "PowerDomain",
            "metadata": {"name": "rack"},
            "spec": {"gpuTypes": ["slow"], "budgetWatts": 150},
        }
        loop.inputs.put(slow, domain)
        assert await loop.planner.plan_once()
        assert loop.replicas("team/chat") == {"fast": 1}
        del loop.inputs.objects["PowerDomain"]["rack"]
        loop.change("PowerDomain", "rack")
        assert await loop.planner.plan_once()
        assert loop.replicas("team/chat") == {"slow": 2}


async def test_a_deleted_service_leaves_the_book_and_a_refused_one_says_why() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        del loop.inputs.objects["LLMService"]["team/chat"]
        loop.inputs.put(service(TEAM, "bad", 3.0, profile_name="absent"))
        loop.change("LLMService", "team/chat")
        loop.change("LLMService", "team/bad")
        await loop.planner.plan_once()
        assert loop.told[1] == {"team/chat", "team/bad"}
        assert loop.book.desired("team/chat") is None
        refusal = loop.book.desired("team/bad")
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, refusal.generation) == ("ProfileNotFound", 1)

        loop.inputs.put(service(TEAM, "bad", 4.0, profile_name="absent"), generation=2)
        loop.change("LLMService", "team/bad")
        await loop.planner.plan_once()
        assert loop.told[2] == {"team/bad"}
        assert loop.book.refusals["team/bad"].generation == 2


async def test_a_changed_spec_with_the_same_plan_is_told_with_its_generation() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        loop.inputs.put(service(TEAM, "chat", 3.0, engine={"args": ["--seed=1"]}), generation=2)
        loop.change("LLMService", "team/chat")
        await loop.planner.plan_once()
        assert loop.told[1:] == [{"team/chat"}]
        assert loop.book.services["team/chat"].generation == 2


def slower(factor: float) -> ObservedVariant:
    """Requests of the smallest bucket on engines of type slow, with 2 in flight."""
    edges = Buckets(input_tokens=list(INPUT_EDGES), output_tokens=list(OUTPUT_EDGES))
    cell = ObservedCell(0, 300, 2.0, 300 * 100, 300 * 30.0, 300 * 50, 300 * 50 * TPOT_MS * factor)
    return ObservedVariant(service="team/chat", variant="slow", buckets=edges, cells=[cell])


async def test_what_was_learnt_beside_a_solve_is_planned_with_once_the_profile_says_it() -> None:
    async with planning() as loop:
        with pytest.raises(PlannerError, match="not ready"):
            await loop.planner.learn([slower(2.0)], {}, at=0.0)
        await loop.planner.plan_once()
        loop.inputs.devices = {"fast": 7, "slow": 8}
        solved, [learnt] = await asyncio.gather(
            loop.planner.plan_once(), loop.planner.learn([slower(2.0)], {"team/tiny": []}, at=time.time())
        )
        assert solved
        [correction] = learnt.corrections
        assert round(correction.tpot[0].log_ratio, 2) == 0.69

        def promised_ms() -> float:
            predicted = loop.book.services["team/chat"].plan.predicted
            assert predicted is not None
            return predicted.tpot_ms

        before_ms = promised_ms()
        tiny = profile(TEAM, {"fast": 10.0, "slow": 2.5}) | {"status": {"corrections": [correction.to_wire()]}}
        loop.inputs.put(tiny)
        loop.change("ModelProfile", "team/tiny")
        await loop.planner.plan_once()
        assert promised_ms() > 1.8 * before_ms


async def test_time_alone_is_a_new_input_every_few_hours() -> None:
    async with planning() as loop:
        now = [0.0]
        loop.planner = FleetPlanner(loop.inputs, loop.book, loop.told.append, loop.process, now=lambda: now[0])
        assert await loop.planner.plan_once()
        now[0] = AGED_EVERY_S - 1
        assert not await loop.planner.plan_once()
        now[0] = AGED_EVERY_S
        assert await loop.planner.plan_once()


async def test_a_planner_that_died_is_started_again_and_told_everything() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        first = loop.process.pid
        await loop.process.stop()
        loop.inputs.put(service(TEAM, "other", 3.0))
        loop.change("LLMService", "team/other")

        assert await loop.planner.plan_once()

        assert loop.process.pid not in (None, first)
        assert loop.replicas("team/chat") == {"slow": 2}
        assert loop.replicas("team/other") == {"slow": 2}
        # The plan in force went along, so nothing changed for the service that was planned before.
        assert loop.told[1] == {"team/other"}


async def test_a_planner_that_does_not_answer_is_killed_and_the_last_plan_stays() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        pid = loop.process.pid
        with pytest.raises(PlannerError, match="no plan within"):
            await loop.process.answer(0.05)
        assert not loop.process.running
        assert loop.replicas("team/chat") == {"slow": 2}
        loop.inputs.devices = {"fast": 8, "slow": 1}
        assert await loop.planner.plan_once()
        assert loop.process.pid != pid
        assert loop.replicas("team/chat") == {"fast": 1}


async def test_a_solve_that_raises_is_told_and_the_planner_lives_on() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        pid = loop.process.pid
        loop.inputs.rates = {"team/chat": MeasuredDemand(rps=[-1.0])}
        loop.inputs.put(service(TEAM, "chat", 3.0, traffic={"mode": "observe"}), generation=2)
        loop.change("LLMService", "team/chat")
        with pytest.raises(PlannerError, match="the planner failed"):
            await loop.planner.plan_once()
        loop.inputs.rates = {}
        assert await loop.planner.plan_once()
        assert loop.process.pid == pid


async def test_a_plan_in_steps_goes_on_by_itself_until_it_has_arrived_and_then_rests() -> None:
    async with planning() as loop:
        loop.inputs.spec = FleetPolicySpec(debounce_seconds=0, max_starts_per_plan=1)
        loop.inputs.put(service(TEAM, "chat", 6.0), gpu_type("fast", "example.com/fast", 0.1))
        await loop.planner.plan_once()
        assert set(loop.replicas("team/chat")) == {"fast"}
        loop.inputs.put(gpu_type("fast", "example.com/fast", 40.0), generation=2)
        loop.change("GPUType", "fast")
        slow = [0]
        while await loop.planner.plan_once():
            slow.append(loop.replicas("team/chat")["slow"])
            assert slow[-1] - slow[-2] <= 1
        assert set(loop.replicas("team/chat")) == {"slow"}
        assert len(slow) > 3


async def test_a_short_service_is_told_the_limits_in_conflict() -> None:
    async with planning() as loop:
        loop.inputs.devices = {"fast": 0, "slow": 1}
        await loop.planner.plan_once()
        named = loop.book.services["team/chat"].plan.conflict
        assert named == ["inventory 0 of GPUType fast", "inventory 1 of GPUType slow"]


async def test_a_plan_that_breaks_a_constraint_is_dropped_counted_and_said_and_the_last_one_stays() -> None:
    async with planning(PlannerProcess((sys.executable, "-c", BROKEN_WORKER))) as loop:
        await loop.planner.plan_once()
        before = loop.book.services["team/chat"]
        pid = loop.process.pid

        loop.inputs.put(service(TEAM, "other", 3.0))
        loop.change("LLMService", "team/other")
        assert await loop.planner.plan_once()
        assert loop.planner.state.rejected == 1
        assert loop.planner.state.solves == 1
        assert loop.book.services == {"team/chat": before}
        assert loop.told[1:] == [{"team/other"}]
        refusal = loop.book.desired("team/other")
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, refusal.generation) == ("PlanRejected", 1)
        assert "devices of GPUType slow: 101, allowed is at most 8" in refusal.message
        assert loop.book.desired("team/chat") == before

        # A new spec of the first service is not planned either, and says so; its engines run by the plan in force.
        loop.inputs.put(service(TEAM, "chat", 9.0), generation=2)
        loop.change("LLMService", "team/chat")
        assert await loop.planner.plan_once()
        refusal = loop.book.desired("team/chat")
        assert isinstance(refusal, Refusal)
        assert (refusal.reason, refusal.generation) == ("PlanRejected", 2)
        assert loop.book.plans()["team/chat"] == before.plan
        assert loop.planner.state.rejected == 2

        # The planner lives on, and starts from the plan in force as soon as it can.
        del loop.inputs.objects["LLMService"]["team/other"]
        loop.change("LLMService", "team/other")
        assert await loop.planner.plan_once()
        assert loop.process.pid == pid
        assert loop.replicas("team/chat") == {"slow": 5}
        assert loop.book.refusals == {}


async def test_what_a_new_planner_was_told_is_in_force_outlives_a_rejected_plan() -> None:
    async with planning(PlannerProcess((sys.executable, "-c", BROKEN_WORKER))) as loop:
        await loop.planner.plan_once()
        before = loop.book.plans()
        await loop.process.stop()
        loop.inputs.put(service(TEAM, "other", 3.0))
        await loop.planner.plan_once()
        assert loop.planner.state.rejected == 1

        # Refused, it goes on by a plan that this planner process never made.
        del loop.inputs.objects["LLMService"]["team/other"]
        loop.change("LLMService", "team/other")
        for key in loop.inputs.objects.pop("ModelProfile"):
            loop.change("ModelProfile", key)
        loop.inputs.objects["ModelProfile"] = {}
        await loop.planner.plan_once()
        assert loop.book.refusals["team/chat"].reason == "ProfileNotFound"
        assert loop.book.plans() == before


def test_the_restored_plan_is_in_force_for_the_solver_but_desired_by_nobody() -> None:
    book = PlanBook()
    plan = Plan(
        plan_id="p",
        status="feasible",
        gap_cost=None,
        stopped_by="gap",
        solve_seconds=0,
        cost_per_hour=0,
    )
    book.restored = plan
    assert book.in_force() == plan
    assert book.desired("team/chat") is None


async def test_a_service_that_is_refused_is_still_in_force_by_its_last_plan() -> None:
    async with planning() as loop:
        assert await loop.planner.plan_once()
        before = loop.book.plans()
        assert before["team/chat"].replicas == {"slow": 2}
        for key in loop.inputs.objects.pop("ModelProfile"):
            loop.change("ModelProfile", key)
        loop.inputs.objects["ModelProfile"] = {}
        assert await loop.planner.plan_once()
        assert loop.book.refusals["team/chat"].reason == "ProfileNotFound"
        assert loop.book.plans() == before


async def test_a_service_that_no_longer_parses_is_in_force_by_its_last_plan_until_it_is_gone() -> None:
    async with planning() as loop:
        assert await loop.planner.plan_once()
        before = loop.book.plans()["team/chat"]
        del loop.inputs.objects["LLMService"]["team/chat"]
        loop.inputs.put(service(TEAM, "other", 3.0))
        loop.inputs.broken = ["team/chat"]
        loop.inputs.devices = {"fast": 8, "slow": 2}
        loop.change("LLMService", "team/chat")
        loop.change("LLMService", "team/other")
        assert await loop.planner.plan_once()
        assert loop.book.desired("team/chat") is None
        assert loop.book.plans()["team/chat"] == before
        assert loop.replicas("team/other") == {"fast": 1}

        # A planner that is started anew is told of it by the plan in force.
        await loop.process.stop()
        assert await loop.planner.plan_once()
        assert loop.book.plans()["team/chat"] == before

        loop.inputs.broken = []
        assert await loop.planner.plan_once()
        assert "team/chat" not in loop.book.plans()
        assert loop.replicas("team/other") == {"slow": 2}


@pytest.fixture
def plan_without_gap() -> Plan:
    return Plan(
        plan_id="p", status="feasible", gap_cost=None, stopped_by="time_limit", solve_seconds=1, cost_per_hour=2.5
    )


def test_every_message_survives_the_wire(plan_without_gap: Plan) -> None:
    requests: list[Put | Drop | Solve | Learn] = [
        Put(kind="LLMService", key="a/b", object=service("a", "b", 1.0)),
        Drop(kind="GPUType", key="l4"),
        Solve(
            inventory={"l4": 3},
            demand={"a/b": MeasuredDemand(rps=[0.5], sizes=[BucketSizes(requests=1.0)])},
            policy=FleetPolicySpec(),
            previous=plan_without_gap,
        ),
        Solve(inventory={}, demand={}, policy=FleetPolicySpec(), unreadable=["c/d"]),
        Learn(observed=[slower(1.5)], corrections={"a/p": []}, at=1.5),
    ]
    stream = io.BytesIO(b"".join(encode(request) for request in requests))
    assert [read_request(stream) for _ in requests] == requests
    assert read_request(stream) is None

    solved = Solved(plan=plan_without_gap, gone=["x/y"], busy_s=0.1, rss_bytes=1)
    assert planner_protocol.RESPONSE.validate_json(encode(solved)[4:]) == solved
    rejected = Rejected(violations=["load of a/b l4: 3, allowed is at most 2"], count=12)
    assert planner_protocol.RESPONSE.validate_json(encode(rejected)[4:]) == rejected


async def test_a_plan_of_many_services_comes_in_parts_and_is_whole_again(plan_without_gap: Plan) -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        (one,) = loop.book.services.values()
    services = [one.plan.model_copy(update={"service": f"s{number}"}) for number in range(50)]
    kept = [one.plan.model_copy(update={"service": f"k{number}"}) for number in range(7)]
    whole = plan_without_gap.model_copy(update={"services": services, "kept": kept})
    solved = Solved(plan=whole, gone=["x/y"], busy_s=0.1, rss_bytes=1)
    sent = list(frames(solved))
    assert len(sent) > 2
    assert max(map(len, sent)) < sum(map(len, sent)) / 2

    stream = asyncio.StreamReader()
    stream.feed_data(b"".join(sent))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    others = asyncio.create_task(count_turns())
    assert await read_response(stream) == solved
    others.cancel()
    assert turns >= len(sent) - 1, "between two parts the event loop has a turn"


def test_the_planner_process_imports_neither_kopf_nor_a_kubernetes_client() -> None:
    code = (
        "import json, sys, llmfleet.operator.planner_worker\n"
        "print(json.dumps([m for m in sys.modules if m in ('kopf', 'lightkube', 'aiohttp', 'prometheus_client')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout) == []
