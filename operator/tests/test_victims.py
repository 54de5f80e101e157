"""Who leaves first when a variant shrinks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from llmfleet.operator.model import ObservedPod
from llmfleet.operator.victims import VICTIM_COST, choose_victims

UNFIT = frozenset({"cordoned"})
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def pod(name: str, **fields: Any) -> ObservedPod:
    serving = {"template_hash": "new", "created_at": NOW, "scheduled": True, "ready": True, "phase": "Running"}
    return ObservedPod(
        namespace="ns", name=name, uid=name, service="chat", variant="l4", gpu_type="l4", **{**serving, **fields}
    )


@pytest.mark.parametrize(
    "leaves",
    [
        {"scheduled": False, "ready": False, "phase": "Pending"},
        {"ready": False, "phase": "Pending"},
        {"ready": False},
        {"draining": True, "deletion_cost": VICTIM_COST},
        {"node": "cordoned"},
        {"template_hash": "old"},
        {"created_at": NOW + timedelta(minutes=1)},
    ],
)
def test_each_reason_to_leave_outweighs_a_pod_without_any(leaves: dict[str, Any]) -> None:
    pods = [pod("a"), pod("m", **leaves), pod("z")]
    assert [victim.name for victim in choose_victims(pods, 1, "new", UNFIT)] == ["m"]


def test_a_pod_that_serves_outlives_one_that_does_not_whatever_its_template() -> None:
    pods = [pod("old-but-serving", template_hash="old"), pod("new-but-loading", ready=False)]
    assert [victim.name for victim in choose_victims(pods, 1, "new", UNFIT)] == ["new-but-loading"]


def test_a_pod_on_a_cordoned_node_leaves_before_one_of_an_old_template_and_after_one_that_leaves_already() -> None:
    marked = pod("c-marked", draining=True, deletion_cost=VICTIM_COST)
    pods = [pod("a-old", template_hash="old"), pod("b-cordoned", node="cordoned"), marked]
    assert [victim.name for victim in choose_victims(pods, 3, "new", UNFIT)] == ["c-marked", "b-cordoned", "a-old"]
