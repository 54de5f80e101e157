"""The gateway against a real API server, signed in as its own service account with the rights of `rbac.yaml`.

The pods have no node: the tests play the kubelet and write their status, so that readiness is under control and the
address can be that of a fake engine that really answers. One test uses kwok's pods.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from e2e.cluster import Cluster, ClusterError
from gateway_testing.fake_engine import FakeEngine, fake_engine
from gateway_testing.harness import CHAT, PATIENCE_S, eventually
from gateway_testing.tables import table
from llmfleet.api import RoutedVariant, RoutingTable
from llmfleet.api.meta import (
    ANNOTATION_DRAINING,
    LABEL_COMPONENT,
    LABEL_SERVICE,
    LABEL_VARIANT,
    MIGRATION_PORT_NAME,
    ROUTING_KEY,
)
from llmfleet.gateway.discovery import kubernetes
from llmfleet.gateway.fleet import Fleet as GatewayFleet
from llmfleet.gateway.main import Running, gateway
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.settings import GatewaySettings
from llmfleet.gateway.transport import Limits

pytestmark = pytest.mark.cluster

SYSTEM = "gateway-tests"
Json = dict[str, Any]


class Fleet:
    """A namespace with one service, as operator and kubelet would make it."""

    def __init__(self, cluster: Cluster, namespace: str, model: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.model = model

    async def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return await asyncio.to_thread(self.cluster.kubectl, "-n", self.namespace, *arguments, stdin=stdin)

    async def apply(self, *objects: Json) -> None:
        await self.kubectl("apply", "-f", "-", stdin="\n---\n".join(map(json.dumps, objects)))

    def routing(self, port: int, **changes: Any) -> RoutingTable:
        """A table with one variant whose engines listen on `port`."""
        routing = table({"fast": 1.0}, namespace=self.namespace, served_name=self.model, **changes)
        selector = {LABEL_SERVICE: "chat", LABEL_VARIANT: "fast"}
        variant = RoutedVariant(
            name="fast", replicas=1, selector=selector, port=port, latency=routing.variants[0].latency
        )
        return routing.model_copy(update={"variants": [variant]})

    async def publish(self, routing: RoutingTable | Json) -> None:
        """Writes the routing ConfigMap."""
        document = routing if isinstance(routing, dict) else routing.to_wire()
        await self.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "chat-routing", "labels": {LABEL_COMPONENT: "routing", LABEL_SERVICE: "chat"}},
                "data": {ROUTING_KEY: json.dumps(document)},
            }
        )

    async def pod(self, name: str, **spec: Any) -> None:
        """An engine pod; without a node it stays Pending until `set_ready`."""
        labels = {LABEL_COMPONENT: "engine", LABEL_SERVICE: "chat", LABEL_VARIANT: "fast"}
        container = {"name": "engine", "image": "none"}
        default = {"schedulerName": "nobody", "terminationGracePeriodSeconds": 30}
        await self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels, "finalizers": spec.pop("finalizers", [])},
                "spec": {"containers": [container], **default, **spec},
            }
        )

    async def set_ready(self, name: str, ready: bool = True) -> None:
        """Writes a pod's status as the kubelet would."""
        condition = {"type": "Ready", "status": "True" if ready else "False"}
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": [condition],
        }
        await self.kubectl("patch", "pod", name, "--subresource=status", "-p", json.dumps({"status": status}))

    async def secret(self, name: str, *keys: str) -> None:
        data = {f"key-{n}": base64.b64encode(key.encode() + b"\n").decode() for n, key in enumerate(keys)}
        await self.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data})


class Caller:
    """A client of the running gateway."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http = http
        self._model = model

    async def status(self, key: str | None = None) -> int:
        """Status of one request; 503 where no engine came at once."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        answer = await self._http.post("/v1/chat/completions", json=CHAT | {"model": self._model}, headers=headers)
        return answer.status_code

    async def becomes(self, status: int, key: str | None = None) -> None:
        """Waits until requests are answered so."""
        seen = 0

        async def as_wanted() -> bool:
            nonlocal seen
            seen = await self.status(key)
            return seen == status

        try:
            await eventually(as_wanted)
        except TimeoutError:
            raise AssertionError(f"requests should be answered with {status}, the last was with {seen}") from None


@pytest.fixture(scope="session")
def account(control_plane: Cluster) -> Iterator[Path]:
    """A kubeconfig with the gateway's own rights, in a namespace that no other test knows."""
    control_plane.kubectl("create", "namespace", SYSTEM)
    yield _sign_in(control_plane)
    control_plane.kubectl("delete", "-f", "-", stdin=_rbac())
    control_plane.kubectl("delete", "namespace", SYSTEM, "--wait=false")


def _sign_in(cluster: Cluster) -> Path:
    cluster.kubectl("apply", "-f", "-", stdin=_rbac())
    return cluster.service_account_kubeconfig(SYSTEM, "llmfleet-gateway")


def _rbac() -> str:
    return (
        (Path(__file__).parents[1] / "rbac.yaml")
        .read_text()
        .replace("namespace: llmfleet-system", f"namespace: {SYSTEM}")
    )


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngine]:
    async with fake_engine() as running:
        yield running


@pytest.fixture
def service(control_plane: Cluster, namespace: str) -> Fleet:
    return Fleet(control_plane, namespace, f"model-{namespace}")


@asynccontextmanager
async def running(kubeconfig: Path, model: str, namespace: str | None = None) -> AsyncIterator[tuple[Caller, Running]]:
    """A gateway that finds its fleet in the cluster. Requests wait only for a moment."""
    settings = GatewaySettings(
        listen="127.0.0.1:0",
        admin_listen="127.0.0.1:0",
        kubeconfig=kubeconfig,
        namespace=namespace,
        drain_s=1.0,
        limits=Limits(queue_wait_s=0.05),
    )
    async with gateway(settings) as gate, httpx.AsyncClient(timeout=PATIENCE_S) as http:
        http.base_url = f"http://127.0.0.1:{gate.api_port}"

        async def is_ready() -> bool:
            return (await http.get("/readyz")).status_code == 200

        await eventually(is_ready)
        yield Caller(http, model), gate


async def test_requests_reach_a_pod_while_it_is_ready(account: Path, service: Fleet, engine: FakeEngine) -> None:
    await service.publish(service.routing(engine.port))
    await service.pod("one")
    async with running(account, service.model) as (caller, _):
        await caller.becomes(503)
        await service.set_ready("one")
        await caller.becomes(200)
        await service.set_ready("one", False)
        await caller.becomes(503)


async def test_a_draining_pod_and_one_that_is_being_deleted_get_no_new_requests(
    account: Path, service: Fleet, engine: FakeEngine
) -> None:
    await service.publish(service.routing(engine.port))
    await service.pod("one", finalizers=["llmfleet.io/test"])
    await service.set_ready("one")
    async with running(account, service.model) as (caller, _):
        await caller.becomes(200)
        await service.kubectl("annotate", "pod", "one", f"{ANNOTATION_DRAINING}=true")
        await caller.becomes(503)
        await service.kubectl("annotate", "pod", "one", f"{ANNOTATION_DRAINING}-")
        await caller.becomes(200)
        await service.kubectl("delete", "pod", "one", "--wait=false")
        await caller.becomes(503)
    await service.kubectl("patch", "pod", "one", "-p", json.dumps({"metadata": {"finalizers": None}}))


async def test_pods_that_no_selector_names_get_nothing(account: Path, service: Fleet, engine: FakeEngine) -> None:
    await service.publish(service.routing(engine.port))
    await service.pod("one")
    await service.set_ready("one")
    async with running(account, service.model) as (caller, _):
        await caller.becomes(200)
        await service.kubectl("label", "pod", "one", f"{LABEL_VARIANT}=other", "--overwrite")
        await caller.becomes(503)
        await service.kubectl("label", "pod", "one", f"{LABEL_VARIANT}=fast", f"{LABEL_SERVICE}=mine", "--overwrite")
        assert await caller.status() == 503


async def test_a_table_that_cannot_be_understood_leaves_the_last_good_one(
    account: Path, service: Fleet, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    good = service.routing(engine.port)
    await service.publish(good)
    await service.pod("one")
    await service.set_ready("one")
    wire = good.to_wire()
    unknown_variant = wire["routes"] + [{"bucket": 0, "variant": "ghost", "fraction": 0.5}]
    async with running(account, service.model) as (caller, gate):
        await caller.becomes(200)
        for broken, named in (
            (wire | {"schemaVersion": 99}, "schemaVersion"),
            (wire | {"namespace": "kube-system"}, "namespace must be that of the ConfigMap"),
            (wire | {"routes": unknown_variant}, "variant must be one of ['fast'], got 'ghost'"),
        ):
            with caplog.at_level(logging.ERROR):
                await service.publish(broken)
                await eventually(lambda named=named: named in caplog.text)  # type: ignore[misc]
            assert await caller.status() == 200
        async with httpx.AsyncClient() as http:
            metrics = (await http.get(f"http://127.0.0.1:{gate.admin_port}/metrics")).text
        labels = f'kind="ConfigMap",name="chat-routing",namespace="{service.namespace}"'
        assert f"llmfleet_gateway_rejected_objects_total{{{labels}}} 3.0" in metrics
        await service.kubectl("delete", "configmap", "chat-routing")
        await caller.becomes(404)


async def test_a_new_table_moves_the_traffic(account: Path, service: Fleet, engine: FakeEngine) -> None:
    async with fake_engine() as other:
        await service.publish(service.routing(engine.port))
        await service.pod("one")
        await service.set_ready("one")
        async with running(account, service.model) as (caller, _):
            await caller.becomes(200)
            assert other.requests == []
            await service.publish(service.routing(other.port))

            async def moved() -> bool:
                assert await caller.status() == 200
                return bool(other.requests)

            await eventually(moved)


async def test_keys_follow_their_secret_and_its_absence_lets_nobody_in(
    account: Path, service: Fleet, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "SECRET_REFRESH_S", 0.2)
    await service.publish(service.routing(engine.port, api_keys_secret="keys"))
    await service.pod("one")
    await service.set_ready("one")
    async with running(account, service.model) as (caller, _):
        await caller.becomes(401, "first")
        assert await caller.status() == 401
        await service.secret("keys", "first", "second")
        await caller.becomes(200, "first")
        assert await caller.status("second") == 200
        assert await caller.status("third") == 401
        assert await caller.status() == 401
        await service.secret("keys", "third")
        await service.kubectl("patch", "secret", "keys", "-p", json.dumps({"data": {"key-1": None}}))
        await caller.becomes(401, "first")
        assert await caller.status("third") == 200
        await service.kubectl("delete", "secret", "keys")
        await caller.becomes(401, "third")


async def test_only_the_asked_namespace_is_served(account: Path, service: Fleet, engine: FakeEngine) -> None:
    await service.publish(service.routing(engine.port))
    await service.pod("one")
    await service.set_ready("one")
    async with running(account, service.model, namespace="default") as (caller, _):
        assert await caller.status() == 404
    async with running(account, service.model, namespace=service.namespace) as (caller, _):
        assert await caller.status() == 200


async def test_kwoks_ready_pods_are_found(
    account: Path, control_plane: Cluster, service: Fleet, engine: FakeEngine
) -> None:
    [node] = await asyncio.to_thread(control_plane.add_kwok_nodes, 1, prefix=f"node-{service.namespace}")
    try:
        await service.publish(service.routing(engine.port))
        await service.pod("one", nodeName=node, schedulerName="default-scheduler")
        await service.kubectl("wait", "--for=condition=Ready", "pod/one", "--timeout=60s")
        found: list[str] = []
        discovery = kubernetes.KubernetesDiscovery(
            lambda fleet: found.extend(e.host for s in fleet.services.values() for e in s.engines),
            GatewayMetrics(),
            namespace=service.namespace,
            kubeconfig=account,
        )
        task = asyncio.create_task(discovery.run())
        await eventually(lambda: bool(found))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert found[0] == await service.kubectl("get", "pod", "one", "-o", "jsonpath={.status.podIP}")
    finally:
        await asyncio.to_thread(control_plane.kubectl, "delete", "node", node)


async def test_engines_of_a_cordoned_node_leave_and_their_service_has_its_peer_key(
    account: Path, control_plane: Cluster, service: Fleet, engine: FakeEngine
) -> None:
    nodes = await asyncio.to_thread(control_plane.add_kwok_nodes, 2, prefix=f"node-{service.namespace}")
    try:
        key = {"peer-key": base64.b64encode(b"k" * 64).decode()}
        await service.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "peers"}, "data": key})
        await service.publish(service.routing(engine.port).model_copy(update={"peer_key_secret": "peers"}))
        for name, on in zip(("one", "two"), nodes, strict=True):
            await service.pod(name, nodeName=on, schedulerName="default-scheduler")
        fleets: list[GatewayFleet] = []
        discovery = kubernetes.KubernetesDiscovery(
            fleets.append, GatewayMetrics(), namespace=service.namespace, kubeconfig=account
        )

        def reasons() -> list[str]:
            engines = [engine for found in fleets[-1].services.values() for engine in found.engines] if fleets else []
            return sorted(engine.leaving.reason if engine.leaving else "stays" for engine in engines)

        task = asyncio.create_task(discovery.run())
        await eventually(lambda: reasons() == ["stays", "stays"])
        await asyncio.to_thread(control_plane.kubectl, "cordon", nodes[0])
        await eventually(lambda: reasons() == ["cordoned", "stays"])
        assert [found.peer_key for found in fleets[-1].services.values()] == [b"k" * 64]
        await asyncio.to_thread(control_plane.kubectl, "uncordon", nodes[0])
        await eventually(lambda: reasons() == ["stays", "stays"])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    finally:
        await asyncio.to_thread(control_plane.kubectl, "delete", "node", *nodes)


async def test_a_pod_is_told_of_streams_that_cannot_leave_it(account: Path, service: Fleet) -> None:
    key = {"peer-key": base64.b64encode(b"k" * 64).decode()}
    await service.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "peers"}, "data": key})
    async with fake_engine() as engine:
        await service.publish(service.routing(engine.port).model_copy(update={"peer_key_secret": "peers"}))
        # Nobody is asked at that port: a request for several answers stays of itself.
        ports = [{"name": MIGRATION_PORT_NAME, "containerPort": 1}]
        await service.pod("one", containers=[{"name": "engine", "image": "none", "ports": ports}])
        await service.set_ready("one")
        async with running(account, service.model) as (caller, gate):
            await caller.becomes(200)
            engine.behave(hang_after=1)
            url = f"http://127.0.0.1:{gate.api_port}/v1/chat/completions"
            several = CHAT | {"model": service.model, "stream": True, "n": 2}
            async with httpx.AsyncClient(timeout=PATIENCE_S) as http, http.stream("POST", url, json=several) as answer:
                lines = answer.aiter_lines()
                await anext(lines)
                await service.kubectl("annotate", "pod", "one", f"{ANNOTATION_DRAINING}=true")

                async def told() -> bool:
                    found = await service.kubectl("get", "events", "-o", "json")
                    return any(
                        (event["type"], event["reason"], event["involvedObject"]["name"])
                        == ("Warning", "StreamsStay", "one")
                        and event["involvedObject"]["uid"]
                        for event in json.loads(found)["items"]
                    )

                await eventually(told)


async def test_an_outage_of_the_api_server_is_survived(engine: FakeEngine) -> None:
    with Cluster.start("control-plane") as cluster:
        cluster.kubectl("create", "namespace", SYSTEM)
        service = Fleet(cluster, SYSTEM, "m")
        await service.publish(service.routing(engine.port))
        await service.pod("one")
        await service.set_ready("one")
        async with running(_sign_in(cluster), "m") as (caller, _):
            await caller.becomes(200)
            await asyncio.to_thread(cluster.stop_api_server)
            for _ in range(10):
                assert await caller.status() == 200
                await asyncio.sleep(0.2)
            await asyncio.to_thread(cluster.start_api_server)
            await service.set_ready("one", False)
            await caller.becomes(503)
            await service.set_ready("one")
            await caller.becomes(200)


def test_the_gateways_rights_are_the_least(account: Path, control_plane: Cluster) -> None:
    def may(verb: str, resource: str) -> bool:
        try:
            said = control_plane.kubectl("--kubeconfig", account, "auth", "can-i", verb, resource, "-A")
        except ClusterError:
            return False
        return said.strip() == "yes"

    watched = ("configmaps", "nodes", "pods")
    allowed = {(verb, kind) for kind in watched for verb in ("list", "watch")} | {
        ("get", "secrets"),
        ("create", "events"),
    }
    for kind in (*watched, "secrets", "events"):
        for verb in ("get", "list", "watch", "create", "update", "patch", "delete"):
            assert may(verb, kind) == ((verb, kind) in allowed), (verb, kind)
