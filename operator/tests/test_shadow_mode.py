"""Shadow mode without a cluster: the planning loop proposes, the book keeps what is in force, status says both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from e2e.operator.objects import service
from llmfleet.api import FleetPolicySpec
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.model import Action, ApplyConfigMap, PlannedService, Shadow, WriteStatus
from llmfleet.operator.planner_protocol import Solve
from llmfleet.operator.reconcile import plan_in_force, reconcile

from .test_planner import TEAM, Loop, planning
from .test_status_conditions import UP, carried_out, llm_service, observed, plan, pod, summary

SHADOW = FleetPolicySpec(debounce_seconds=0, mode="shadow")


def proposal(loop: Loop, key: str = "team/chat") -> Shadow:
    desired = loop.book.desired(key)
    assert isinstance(desired, Shadow)
    return desired


async def test_in_shadow_mode_a_plan_is_proposed_and_what_is_in_force_stays() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        before = loop.book.plans()
        apply = loop.inputs.spec
        loop.inputs.spec = SHADOW
        assert await loop.planner.plan_once()
        assert loop.told[1] == {"team/chat"}
        assert proposal(loop).proposed.plan == before["team/chat"]

        loop.inputs.put(service(TEAM, "chat", 9.0), service(TEAM, "other", 3.0), generation=2)
        loop.change("LLMService", "team/chat")
        loop.change("LLMService", "team/other")
        assert await loop.planner.plan_once()
        assert loop.told[2] == {"team/chat", "team/other"}
        assert loop.book.plans() == before
        chat = proposal(loop)
        assert chat.proposed.plan.replicas == {"slow": 5}
        assert chat.proposed.generation == 2
        assert chat.in_force is not None
        assert (chat.in_force.plan, chat.in_force.generation) == (before["team/chat"], 1)
        assert proposal(loop, "team/other").in_force is None

        loop.inputs.spec = apply
        assert await loop.planner.plan_once()
        assert loop.told[3] == {"team/chat", "team/other"}
        assert loop.replicas("team/chat") == {"slow": 5}
        assert loop.book.desired("team/other") == loop.book.services["team/other"]


async def test_each_proposal_starts_from_what_is_in_force_and_not_from_the_last_proposal() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        loop.inputs.spec = SHADOW.model_copy(update={"switching_cost_fraction": 1.0})
        loop.inputs.devices = {"fast": 8, "slow": 0}
        assert await loop.planner.plan_once()
        assert proposal(loop).proposed.plan.replicas == {"fast": 1}
        # Were `fast` in force, leaving it would cost more than it saves.
        loop.inputs.devices = {"fast": 8, "slow": 8}
        assert await loop.planner.plan_once()
        assert proposal(loop).proposed.plan.replicas == {"slow": 2}


async def test_a_new_planner_in_shadow_mode_is_told_what_is_in_force_and_applies_nothing() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        before = loop.book.plans()
        loop.inputs.spec = SHADOW
        loop.inputs.put(service(TEAM, "chat", 9.0), generation=2)
        loop.change("LLMService", "team/chat")
        await loop.planner.plan_once()
        await loop.process.stop()
        assert await loop.planner.plan_once()
        assert loop.book.plans() == before
        assert loop.book.in_force() is not None
        assert proposal(loop).proposed.plan.replicas == {"slow": 5}


async def test_a_plan_that_comes_back_after_the_mode_became_shadow_is_not_applied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        before = loop.book.plans()
        loop.inputs.put(service(TEAM, "chat", 9.0), generation=2)
        loop.change("LLMService", "team/chat")
        send = loop.process.send

        async def send_and_change_the_mode(messages: Any) -> None:
            sent = list(messages)
            await send(sent)
            if any(isinstance(message, Solve) for message in sent):
                loop.inputs.spec = SHADOW

        monkeypatch.setattr(loop.process, "send", send_and_change_the_mode)
        assert not await loop.planner.plan_once()
        assert loop.book.plans() == before
        assert await loop.planner.plan_once()
        assert loop.book.plans() == before
        shown = proposal(loop)
        assert shown.proposed.plan.replicas == {"slow": 5}
        assert shown.in_force is not None
        assert shown.in_force.plan.replicas == {"slow": 2}


async def test_what_is_deleted_in_shadow_mode_is_in_force_no_longer_and_what_is_refused_still_is() -> None:
    async with planning() as loop:
        loop.inputs.put(service(TEAM, "other", 3.0))
        await loop.planner.plan_once()
        before = loop.book.plans()
        loop.inputs.spec = SHADOW
        await loop.planner.plan_once()
        del loop.inputs.objects["LLMService"]["team/other"]
        loop.inputs.put(service(TEAM, "chat", 9.0, profile_name="absent"), generation=2)
        loop.change("LLMService", "team/other")
        loop.change("LLMService", "team/chat")
        await loop.planner.plan_once()
        assert loop.told[2] == {"team/chat", "team/other"}
        assert loop.book.desired("team/chat") == loop.book.refusals["team/chat"]
        assert loop.book.desired("team/other") is None
        assert loop.book.plans() == {"team/chat": before["team/chat"]}

        loop.inputs.spec = FleetPolicySpec(debounce_seconds=0)
        await loop.planner.plan_once()
        assert loop.book.refusals["team/chat"].reason == "ProfileNotFound"
        assert loop.book.plans() == {"team/chat": before["team/chat"]}
        assert loop.book.services == {}


async def test_a_service_that_is_deleted_while_there_is_no_planner_is_in_force_no_longer() -> None:
    async with planning() as loop:
        await loop.planner.plan_once()
        await loop.process.stop()
        del loop.inputs.objects["LLMService"]["team/chat"]
        loop.change("LLMService", "team/chat")
        loop.inputs.put(service(TEAM, "other", 3.0))
        await loop.planner.plan_once()
        assert set(loop.book.plans()) == {"team/other"}
        assert "team/chat" in loop.told[1]


def shown(actions: list[Action]) -> None:
    """Nothing was done but to say something."""
    assert {type(action).__name__ for action in actions} <= {"WriteStatus", "EmitEvent"}


def test_a_service_without_plan_gets_none_and_says_what_would_be() -> None:
    after, actions = carried_out(Shadow(proposed=plan(2, generation=1), in_force=None), observed())
    shown(actions)
    status = after.service.status
    assert summary(status) == {
        "Planned": ("False", "ShadowMode"),
        "EnginesReady": ("False", "NoPlan"),
        "Ready": ("False", "ShadowMode"),
        "Shadow": ("True", "PlanNotApplied"),
    }
    message = next(c.message for c in status.conditions if c.type == "Shadow")
    assert message == "FleetPolicy mode is shadow: there would be 2 x l4 at 2 per hour, not nothing"
    assert (status.plan_id, status.variants, status.cost_per_hour) == ("", [], None)


def test_a_service_that_runs_stays_ready_by_the_plan_in_force_whatever_would_be() -> None:
    in_force = plan(2, generation=1)
    state, _ = carried_out(in_force, observed())
    state = replace(state, pods=[pod(state, name, **UP) for name in ("a", "b")])
    state, _ = carried_out(in_force, state)
    before = state.service.status
    state = replace(state, service=llm_service(generation=2).model_copy(update={"status": before}))

    after, actions = carried_out(Shadow(proposed=plan(7, generation=2), in_force=in_force), state)
    shown(actions)
    status = after.service.status
    assert summary(status) == summary(before) | {"Shadow": ("True", "PlanNotApplied")}
    assert {c.type: c.observed_generation for c in status.conditions} == {
        "Planned": 1,
        "EnginesReady": 1,
        "Ready": 1,
        "Shadow": 2,
    }
    assert status.variants == before.variants
    events = [action for action in actions if type(action).__name__ == "EmitEvent"]
    assert [(event.type, event.reason) for event in events] == [("Normal", "PlanNotApplied")]  # type: ignore[union-attr]

    same, _ = carried_out(Shadow(proposed=plan(2, generation=2, unserved_rps=1), in_force=in_force), after)
    found = next(c for c in same.service.status.conditions if c.type == "Shadow")
    assert found.reason == "PlanUnchanged"
    assert found.message.endswith("2 x l4 at 2 per hour would stay, and some demand would go unserved")


def test_after_a_restart_in_shadow_mode_the_plan_in_force_is_the_one_that_the_config_map_remembers() -> None:
    state, _ = carried_out(plan(2, generation=1), observed())
    desired = Shadow(proposed=plan(7, generation=1), in_force=None)
    found = plan_in_force(desired, state)
    assert isinstance(found, PlannedService)
    assert found.plan.replicas == {"l4": 2}
    actions = reconcile(desired, state)
    shown(list(actions))
    (status,) = (action.status for action in actions if isinstance(action, WriteStatus))
    assert next(c.observed_generation for c in status.conditions if c.type == "Planned") == 1


def test_back_in_mode_apply_the_plan_is_carried_out_and_the_condition_gone() -> None:
    state, _ = carried_out(plan(2, generation=1), observed())
    state, _ = carried_out(Shadow(proposed=plan(3, generation=1), in_force=plan(2, generation=1)), state)
    assert "Shadow" in summary(state.service.status)
    state, actions = carried_out(plan(3, generation=1), state)
    assert any(isinstance(action, ApplyConfigMap) for action in actions)
    assert state.deployments[0].replicas == 3
    assert "Shadow" not in summary(state.service.status)


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        ({"mode": "shadow"}, "shadow"),
        ({"mode": "shadow", "optimalityGap": 7}, "shadow"),
        ({"mode": "canary"}, "shadow"),
        ({"mode": 1}, "shadow"),
        ({"optimalityGap": 7}, "apply"),
        ({"mode": "apply", "optimalityGap": 7}, "apply"),
        ({}, "apply"),
        ("nonsense", "apply"),
    ],
)
def test_a_policy_that_parses_no_more_applies_nothing_if_it_names_another_mode(spec: Any, mode: str) -> None:
    cache = Cache()
    for version, written in (("1", {}), ("2", spec)):
        meta = {"name": "default", "uid": "u", "resourceVersion": version}
        cache.apply(observe("FleetPolicy", {"kind": "FleetPolicy", "metadata": meta, "spec": written}))
    assert cache.policy.mode == mode
    cache.apply(observe("FleetPolicy", {"metadata": {**meta, "name": "another"}, "spec": {"mode": "canary"}}))
    assert cache.policy.mode == mode
    cache.apply(observe("FleetPolicy", {"metadata": {**meta, "resourceVersion": "2"}}, deleted=True))
    assert cache.policy.mode == "apply"
