"""What the planning loop is given from the cache, and what is said of what the gateways told."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.operator.objects import service
from llmfleet.api import DemandReport
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.fleet import Fleet
from llmfleet.operator.ledger import DeviceLedger
from llmfleet.operator.planner import PlanBook


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
