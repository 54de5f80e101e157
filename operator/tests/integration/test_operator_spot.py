"""A spot pool is interrupted on a real control plane: what is left serves, and the plan moves on without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.operator.objects import gpu_type, profile, service
from e2e.operator.rig import Json, Operator, PodRecorder, Rig, serves

pytestmark = [pytest.mark.cluster, pytest.mark.long(110), pytest.mark.xdist_group("operator-cluster")]

POOL = "llmfleet.test/pool"
INTERRUPTED = "llmfleet.test/interrupted"
ENOUGH = 4
"""Replicas that hold the demand."""


@pytest.fixture
def nodes(rig: Rig) -> Iterator[dict[str, str]]:
    """A node of each pool by the pool's name: on demand, and two of spot capacity."""
    names = sorted(node["metadata"]["name"] for node in rig.list("Node"))
    pools = dict(zip(("od", "a", "b"), names, strict=False))
    for pool, name in pools.items():
        rig.cluster.kubectl("label", "node", name, f"{POOL}={pool}", "--overwrite")
    yield pools
    for name in names:
        rig.cluster.kubectl("label", "node", name, f"{POOL}-")
    rig.cluster.kubectl("patch", "node", pools["a"], "--type=merge", "-p", '{"spec": {"taints": null}}')


def pool(name: str, where: str, **spec: Any) -> Json:
    return gpu_type(name, "example.com/slow", 0.6, nodeSelector={POOL: where}, **spec)


def spot(where: str) -> Json:
    prices = {"onDemand": 0.6, "spot": 0.2}
    return pool(f"slow{where}", where, capacityClass="spot", pricePerHour=prices, sameHardwareAs="slow")


def test_an_interrupted_pool_is_survived_and_then_planned_without(
    rig: Rig, operator: Operator, team: str, nodes: dict[str, str]
) -> None:
    rig.apply(pool("slow", "od"), spot("a"), spot("b"), profile(team, {"slow": 2.5}))
    rig.apply(service(team, "chat", 7.0, spot={}))
    rig.wait_ready(team, "chat")
    assert rig.replicas(team) == {"chat-slowa": ENOUGH, "chat-slowb": ENOUGH}
    recorder = PodRecorder(rig, team)
    rig.wait(
        "the recorder sees the engines", lambda: len(recorder.states[-1]) == 2 * ENOUGH if recorder.states else None
    )
    seen = len(recorder.states)

    rig.cluster.kubectl("taint", "node", nodes["a"], f"{INTERRUPTED}=true:NoExecute")

    # Beside a single spot pool everything would have to be there on demand as well.
    rig.wait("all is on demand", lambda: rig.replicas(team) == {"chat-slow": ENOUGH})
    rig.wait_ready(team, "chat")
    left = [sum(serves(one) for one in state.values()) for state in recorder.states[seen - 1 :]]
    assert left[0] == 2 * ENOUGH
    assert min(left) == ENOUGH, f"engines that serve, over time: {left}"
    placed = {one["spec"].get("nodeName") for one in recorder.states[-1].values() if serves(one)}
    assert placed == {nodes["od"]}
