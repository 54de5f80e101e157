"""What a pod and its node say of an engine: when it serves, where it can be asked to hand over, and when it leaves."""

from __future__ import annotations

import asyncio
import base64
import logging
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from lightkube import AsyncClient
from lightkube.core.exceptions import ApiError
from lightkube.models.meta_v1 import Status
from lightkube.resources.core_v1 import Node, Pod, Secret

from gateway_testing.harness import eventually
from gateway_testing.tables import FIT, table
from llmfleet.api import RoutedVariant, RoutingTable
from llmfleet.api.meta import ANNOTATION_DRAINING, LABEL_REVISION, LABEL_SERVICE, LABEL_VARIANT
from llmfleet.gateway.discovery import reflector
from llmfleet.gateway.discovery.kubernetes import peer_key_of
from llmfleet.gateway.discovery.nodes import NodeIndex
from llmfleet.gateway.discovery.pods import PodIndex, engine_pod
from llmfleet.gateway.discovery.reflector import Reflector
from llmfleet.gateway.fleet import Engine, Leaving, LeavingReason
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.settings import DRAIN_TAINTS, GatewaySettings, SettingsError

ENDS = datetime(2026, 11, 22, 3, 0, tzinfo=UTC)


def pod(name: str = "one", *, ready: bool = True, ip: str = "10.0.0.5", variant: str = "fast", **meta: Any) -> Pod:
    labels = {LABEL_SERVICE: "chat", LABEL_VARIANT: variant, LABEL_REVISION: "r1"}
    ports = [{"name": "http", "containerPort": 8000}, {"name": "migration", "containerPort": 7070}]
    made = Pod.from_dict(
        {
            "metadata": {"name": name, "namespace": "team", "uid": f"uid-{name}", "labels": labels, **meta},
            "spec": {"nodeName": f"node-of-{name}", "containers": [{"name": "engine", "ports": ports}]},
            "status": {
                "phase": "Running",
                "podIP": ip,
                "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            },
        }
    )
    return cast(Pod, made)


def node(name: str, *taints: str, cordoned: bool = False) -> Node:
    marks = [{"key": key, "effect": "NoSchedule"} for key in taints]
    made = Node.from_dict({"metadata": {"name": name}, "spec": {"unschedulable": cordoned, "taints": marks}})
    return cast(Node, made)


def routing() -> RoutingTable:
    selector = {LABEL_SERVICE: "chat", LABEL_VARIANT: "fast"}
    fast = RoutedVariant(name="fast", replicas=1, selector=selector, latency=FIT)
    return table().model_copy(update={"variants": [fast]})


class Index:
    """Pods and nodes as discovery keeps them."""

    def __init__(self, *pods: Pod, taints: tuple[str, ...] = DRAIN_TAINTS) -> None:
        self.nodes = NodeIndex(taints)
        self._pods = PodIndex(self.nodes.leaving)
        for one in pods:
            self.take(one)

    def take(self, one: Pod) -> None:
        assert one.metadata is not None
        self._pods.put(("team", one.metadata.name or ""), engine_pod(one))

    def gone(self, name: str) -> None:
        self._pods.put(("team", name), None)

    def engines(self) -> dict[str, Engine]:
        return {engine.id.partition("@")[0].removeprefix("uid-"): engine for engine in self._pods.engines(routing())}

    def reasons(self) -> dict[str, str | None]:
        return {name: one.leaving.reason if one.leaving else None for name, one in self.engines().items()}


def test_a_pod_with_the_plug_in_says_its_control_port_and_its_revision() -> None:
    engine = Index(pod()).engines()["one"]
    assert (engine.host, engine.port, engine.control, engine.revision) == ("10.0.0.5", 8000, "10.0.0.5:7070", "r1")
    assert Index(pod(ip="fd00::5")).engines()["one"].control == "[fd00::5]:7070"


def test_a_pod_without_the_plug_in_is_an_engine_without_a_control_port() -> None:
    plain = pod()
    assert plain.spec is not None
    plain.spec.containers[0].ports = None
    engine = Index(plain).engines()["one"]
    assert (engine.port, engine.control) == (8000, None)


def test_a_deleted_pod_leaves_until_its_grace_ends_and_stays_until_it_is_gone() -> None:
    index = Index(pod(), pod("two"))
    index.take(pod(deletionTimestamp=ENDS.isoformat()))
    assert index.engines()["one"].leaving == Leaving(LeavingReason.DELETED, ENDS.timestamp())
    index.take(pod(deletionTimestamp=ENDS.isoformat(), ready=False))
    assert index.reasons() == {"one": "deleted", "two": None}
    index.gone("one")
    assert index.reasons() == {"two": None}


def test_a_pod_that_never_served_is_no_engine_when_it_is_deleted() -> None:
    index = Index(pod(ready=False))
    index.take(pod(ready=False, deletionTimestamp=ENDS.isoformat()))
    assert index.engines() == {}


def test_another_pod_of_the_same_name_does_not_inherit_that_it_served() -> None:
    index = Index(pod())
    index.take(pod(ready=False, uid="another", deletionTimestamp=ENDS.isoformat()))
    assert index.engines() == {}


def test_a_pod_that_has_ended_or_is_not_ready_is_no_engine() -> None:
    ended = pod()
    assert ended.status is not None
    ended.status.phase = "Failed"
    assert Index(ended).engines() == {}
    index = Index(pod())
    index.take(pod(ready=False))
    assert index.engines() == {}


def test_a_pod_that_the_operator_takes_away_leaves() -> None:
    index = Index(pod(annotations={ANNOTATION_DRAINING: "true"}), pod("two"))
    assert index.reasons() == {"one": "draining", "two": None}


def test_what_is_left_of_a_variant_that_the_plan_has_no_more_leaves() -> None:
    index = Index(pod(), pod("old", variant="slow"))
    assert index.reasons() == {"one": None, "old": "draining"}
    assert index.engines()["old"].variant == "slow"
    assert index.engines()["old"].id == "uid-old@10.0.0.5:8000"


def test_engines_of_a_cordoned_node_leave_and_come_back_with_it() -> None:
    index = Index(pod(), pod("two"))
    assert index.nodes.put("node-of-one", node("node-of-one", cordoned=True))
    assert index.reasons() == {"one": "cordoned", "two": None}
    assert index.nodes.put("node-of-one", node("node-of-one"))
    assert not index.nodes.put("node-of-one", node("node-of-one"))
    assert index.reasons() == {"one": None, "two": None}


@pytest.mark.parametrize("taint", ["aws-node-termination-handler/spot-itn", "karpenter.sh/disrupted"])
def test_a_taint_that_announces_an_end_counts_and_others_do_not(taint: str) -> None:
    index = Index(pod(), pod("two"))
    index.nodes.put("node-of-one", node("node-of-one", "example.com/gpu", taint, cordoned=True))
    index.nodes.put("node-of-two", node("node-of-two", "example.com/gpu"))
    assert index.reasons() == {"one": "tainted", "two": None}


def test_the_taints_are_a_setting() -> None:
    index = Index(pod(), pod("two"), taints=("example.com/ends",))
    index.nodes.put("node-of-one", node("node-of-one", "example.com/ends"))
    index.nodes.put("node-of-two", node("node-of-two", "karpenter.sh/disrupted"))
    assert index.reasons() == {"one": "tainted", "two": None}
    with pytest.raises(SettingsError, match=r"drain-taint must be the key of a taint.*'a=b:NoSchedule'"):
        GatewaySettings(drain_taints=("a=b:NoSchedule",))


def test_where_every_node_goes_engines_serve_on_until_their_pods_are_deleted() -> None:
    index = Index(pod(), pod("two"))
    for name in ("node-of-one", "node-of-two"):
        index.nodes.put(name, node(name, cordoned=True))
    assert index.reasons() == {"one": None, "two": None}
    index.take(pod(deletionTimestamp=ENDS.isoformat()))
    assert index.reasons() == {"one": "deleted", "two": None}


def test_a_peer_key_is_as_its_secret_has_it_and_a_short_one_is_none() -> None:
    def secret(content: bytes) -> Secret:
        return Secret(data={"peer-key": base64.b64encode(content).decode()})

    assert peer_key_of(secret(b"k" * 64 + b"\n")) == b"k" * 64
    assert peer_key_of(secret(b"k" * 31)) is None
    assert peer_key_of(Secret(data={"peer-key": "%"})) is None
    assert peer_key_of(Secret()) is None


class Forbidding:
    """An API server that lets this gateway read no nodes."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def list(self, _: Any, **options: Any) -> Forbidding:
        self.asked.append(options)
        return self

    def __aiter__(self) -> Forbidding:
        return self

    async def __anext__(self) -> Node:
        raise ApiError(status=Status(code=403, message="nodes is forbidden"))


async def test_nodes_that_may_not_be_read_are_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reflector, "_FORBIDDEN_PAUSE_S", 0.01)
    client, metrics = Forbidding(), GatewayMetrics()
    nodes = Reflector(
        cast(AsyncClient, client),
        Node,
        None,
        "team",
        lambda _: None,
        lambda *_: None,
        metrics,
        without="streams leave later",
    )
    with caplog.at_level(logging.WARNING):
        task = asyncio.create_task(nodes.run())
        await eventually(lambda: len(client.asked) > 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [record.getMessage() for record in caplog.records] == [
        "Nodes may not be read by this gateway: streams leave later"
    ]
    assert "namespace" not in client.asked[0]
    assert metrics.registry.get_sample_value("llmfleet_gateway_watch_failures_total", {"kind": "Node"}) == 0
