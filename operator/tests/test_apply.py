"""Events are posted once, refusals are told, and nothing is written without the Lease."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import pytest
from lightkube import ApiError, AsyncClient

from llmfleet.api import Condition, LLMService, LLMServiceStatus
from llmfleet.operator.apply import Applier, EventRecorder, FencedError, ObjectRef, RefusedError, is_ours
from llmfleet.operator.cache import Cache
from llmfleet.operator.model import AnnotatePod, ApplyDeployment
from llmfleet.operator.services import refused_status

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SERVICE = ObjectRef("LLMService", "team", "chat", "uid")


def test_a_repeated_event_is_counted_up_and_not_within_a_minute() -> None:
    recorder = EventRecorder()
    first = recorder.next(SERVICE, "Warning", "NoInventory", "nothing there", NOW)
    assert first is not None
    assert first["count"] == 1
    assert recorder.next(SERVICE, "Warning", "NoInventory", "nothing there", NOW + timedelta(seconds=30)) is None
    later = recorder.next(SERVICE, "Warning", "NoInventory", "nothing there", NOW + timedelta(seconds=90))
    assert later is not None
    assert later["count"] == 2
    assert later["metadata"] == first["metadata"]
    assert later["firstTimestamp"] == first["firstTimestamp"]
    assert later["lastTimestamp"] > first["lastTimestamp"]


def test_an_event_keeps_its_name_over_a_restart_and_shares_it_with_no_other() -> None:
    name = EventRecorder().next(SERVICE, "Warning", "A", "x", NOW)
    again = EventRecorder().next(SERVICE, "Warning", "A", "x", NOW)
    other = EventRecorder().next(SERVICE, "Warning", "A", "y", NOW)
    assert name is not None
    assert again is not None
    assert other is not None
    assert name["metadata"] == again["metadata"] != other["metadata"]


def test_events_of_cluster_scoped_objects_live_in_the_default_namespace() -> None:
    event = EventRecorder().next(ObjectRef("GPUType", None, "l4", "u"), "Warning", "InvalidSpec", "m", NOW)
    assert event is not None
    assert event["metadata"]["namespace"] == "default"
    assert "namespace" not in event["involvedObject"]


def llm_service(*conditions: Condition) -> LLMService:
    raw = {
        "metadata": {"name": "chat", "namespace": "team", "uid": "u", "generation": 3},
        "spec": {
            "model": {"name": "org/model", "contextLength": 4096},
            "profile": "tiny",
            "objective": {"ttft": {"milliseconds": 1000}, "tpot": {"milliseconds": 50}},
        },
    }
    return LLMService.parse(raw).model_copy(update={"status": LLMServiceStatus(conditions=list(conditions))})


def condition(type_: str, status: Any, since: datetime) -> Condition:
    return Condition(type=type_, status=status, reason="R", last_transition_time=since)


def test_a_refusal_makes_ready_false_keeps_planned_and_moves_the_transition_time_only_once() -> None:
    before = llm_service(condition("Planned", "True", NOW), condition("Ready", "True", NOW))
    later = NOW + timedelta(hours=1)

    refused = refused_status(before.status, before, "ApplyRefused", "exceeded quota", later)
    assert {c.type: c.status for c in refused.conditions} == {
        "Planned": "True",
        "EnginesReady": "False",
        "Ready": "False",
    }
    ready = next(c for c in refused.conditions if c.type == "Ready")
    assert (ready.message, ready.observed_generation, ready.last_transition_time) == ("exceeded quota", 3, later)

    after = before.model_copy(update={"status": refused})
    assert refused_status(refused, after, "ApplyRefused", "exceeded quota", later + timedelta(hours=1)) == refused


class AnsweringClient:
    """Answers everything with one response."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.patches = 0

    async def patch(self, *_: Any, **__: Any) -> Any:
        self.patches += 1
        return await self.get()

    async def get(self, *_: Any, **__: Any) -> Any:
        response = httpx2.Response(self.code, json={"code": self.code, "message": "no such luck"})
        raise ApiError(request=httpx2.Request("PATCH", "https://api"), response=response)


def applier(client: AnsweringClient, *, may_write: bool = True) -> Applier:
    typed: AsyncClient = client  # type: ignore[assignment]
    return Applier(typed, Cache(), may_write=lambda: may_write)


OURS = {"llmfleet.io/component": "engine", "llmfleet.io/service": "chat"}


@pytest.mark.parametrize(
    ("meta", "ours"),
    [
        ({}, False),
        ({"labels": OURS}, True),
        ({"labels": {**OURS, "llmfleet.io/service": "other"}}, False),
        ({"labels": {"llmfleet.io/service": "chat"}}, False),
        ({"ownerReferences": [{"uid": "u"}]}, True),
        ({"ownerReferences": [{"uid": "another"}]}, False),
    ],
)
def test_an_object_is_ours_by_its_owner_or_by_the_labels_that_it_is_found_by(meta: Any, ours: bool) -> None:
    manifest = {"metadata": {"name": "chat-l4", "namespace": "team", "labels": OURS}}
    assert is_ours({"metadata": meta}, manifest, llm_service()) is ours


DEPLOYMENT = ApplyDeployment({"metadata": {"name": "chat-l4", "namespace": "team"}})


@pytest.mark.parametrize("code", [400, 403, 422])
async def test_what_the_api_server_would_refuse_again_is_told_with_the_object_and_its_words(code: int) -> None:
    with pytest.raises(RefusedError, match=r"Deployment team/chat-l4 .* no such luck"):
        await applier(AnsweringClient(code)).execute(llm_service(), [DEPLOYMENT])


@pytest.mark.parametrize("code", [409, 429, 500, 503])
async def test_what_may_work_later_is_passed_on_for_a_retry(code: int) -> None:
    with pytest.raises(ApiError):
        await applier(AnsweringClient(code)).execute(llm_service(), [DEPLOYMENT])


async def test_a_pod_that_is_gone_needs_no_mark() -> None:
    client = AnsweringClient(404)
    await applier(client).execute(llm_service(), [AnnotatePod("team", "p", {"a": "b"})])
    assert client.patches == 1


async def test_without_the_lease_nothing_is_sent() -> None:
    client = AnsweringClient(200)
    with pytest.raises(FencedError):
        await applier(client, may_write=False).execute(llm_service(), [DEPLOYMENT])
    assert client.patches == 0
