"""What the planning loop is given from the cache, and what is said of what the gateways told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from e2e.operator.objects import profile, service
from llmfleet.api import DemandReport, ServiceDemand, ServicePlan, SizeSums
from llmfleet.api.meta import COMPONENT_ENGINE, LABEL_COMPONENT, LABEL_SERVICE, LABEL_VARIANT
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.fleet import Fleet
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.plan_book import PlanBook


def fleet_of(cache: Cache) -> Fleet:
    return Fleet(cache, PlanBook(), DeviceLedger(cache), measures_demand=True)


def stored(version: int, metadata: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    raw = service("team", "chat", 3.0, **spec)
    return {**raw, "metadata": {**raw["metadata"], "uid": "u", "resourceVersion": str(version), **(metadata or {})}}


def test_a_service_that_stops_parsing_is_named_as_unreadable_until_it_parses_again_or_is_deleted() -> None:
    cache = Cache()
    fleet = fleet_of(cache)
    cache.apply(observe("LLMService", stored(1)))
    assert fleet.unreadable() == []
    cache.apply(observe("LLMService", stored(2, priority=5000)))
    assert (fleet.find("LLMService", "team/chat"), fleet.unreadable()) == (None, ["team/chat"])
    cache.apply(observe("LLMService", stored(3)))
    assert fleet.unreadable() == []
    cache.apply(observe("LLMService", stored(4, {"deletionTimestamp": "2026-01-01T00:00:00Z"}, priority=5000)))
    assert fleet.unreadable() == []


def test_an_address_at_which_gateways_answer_in_turns_is_complained_of_once(caplog: pytest.LogCaptureFixture) -> None:
    fleet = fleet_of(Cache())
    for turn in range(12):
        fleet.record_demand({"http://10.0.0.1:8081": DemandReport(instance_id=str(turn % 3))}, 2.0 * turn)
    complaints = [record for record in caplog.records if "answer in turns" in record.message]
    assert [record.__dict__["gateway"] for record in complaints] == ["http://10.0.0.1:8081"]


@pytest.mark.parametrize(
    ("age_s", "ready", "held"),
    [(200, False, True), (2000, False, False), (200, True, False)],
    ids=["while its first engine starts", "not beyond the start-up deadline", "not once an engine is ready"],
)
async def test_a_woken_service_keeps_its_demand(
    monkeypatch: pytest.MonkeyPatch, age_s: float, ready: bool, held: bool
) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    cache = Cache()
    fleet = Fleet(cache, PlanBook(), DeviceLedger(cache), measures_demand=True, now=lambda: now)
    cache.apply(observe("LLMService", stored(1, traffic={"mode": "observe"})))
    cache.apply(observe("ModelProfile", {**profile("team", {"a": 1.0}), **_identity("team", "tiny")}))
    edges = cache.profiles["team/tiny"].spec.buckets
    planned = ServicePlan(
        namespace="team",
        service="chat",
        buckets=edges,
        variants=[],
        routes=[],
        demand=[0.5] * edges.count,
        unserved_rps=0,
        cost_per_hour=0,
    )
    monkeypatch.setattr(PlanBook, "plans", lambda book: {"team/chat": planned})
    created = (now - timedelta(seconds=age_s)).isoformat()
    cache.apply(observe("Pod", _engine_pod(created, ready)))
    for at_s in (0.0, 100.0, 200.0):
        fleet.record_demand({"g": DemandReport(instance_id="i")}, at_s)
    assert (await fleet.demand())["team/chat"].rps == [0.5 if held else 0.0] * edges.count


async def test_demand_says_how_long_requests_are_once_a_gateway_has_told() -> None:
    cache = Cache()
    fleet = fleet_of(cache)
    cache.apply(observe("LLMService", stored(1, traffic={"mode": "observe"})))
    cache.apply(observe("ModelProfile", {**profile("team", {"a": 1.0}), **_identity("team", "tiny")}))
    edges = cache.profiles["team/tiny"].spec.buckets
    counts = ServiceDemand(
        namespace="team",
        service="chat",
        buckets=edges,
        arrived=[0] * len(edges.input_tokens),
        completed=[0] * edges.count,
    )
    fleet.record_demand({"g": DemandReport(instance_id="i", services=[counts])}, 0.0)
    assert (await fleet.demand())["team/chat"].sizes is None
    told = counts.model_copy(update={"sizes": [SizeSums(1, 2, 100, 5000, 60, 1800)]})
    fleet.record_demand({"g": DemandReport(instance_id="i", services=[told])}, 2.0)
    sizes = (await fleet.demand())["team/chat"].sizes
    assert sizes is not None
    assert [one.requests for one in sizes] == [0, 2, 0, 0, 0, 0]
    assert (sizes[1].input_tokens, sizes[1].output_tokens_squared) == (100, 1800)


def _identity(namespace: str, name: str) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "name": name, "uid": "u", "resourceVersion": "1"}}


def _engine_pod(created: str, ready: bool) -> dict[str, Any]:
    identity = _identity("team", "chat-a-0")["metadata"]
    labels = {LABEL_COMPONENT: COMPONENT_ENGINE, LABEL_SERVICE: "chat", LABEL_VARIANT: "a"}
    return {
        "metadata": {**identity, "labels": labels, "creationTimestamp": created},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]},
    }
