"""The fleet as the API server tells it: routing tables, engine pods, nodes that go, keys.

    ConfigMaps  llmfleet.io/component=routing   --> RoutingTable --+
    Pods        llmfleet.io/component=engine    --> Engine --------+--> Service --> Fleet, pushed
    Nodes       cordons, announced ends         --> Leaving -------+
    Secrets     those that the tables name      --> KeyRing -------+
                                                --> peer key ------+

Tables, pods and nodes are watched; Secrets are fetched one by one and refreshed, because watching them would need the
right to read all of them. Changes are gathered for a moment, then only the services that they touch are built anew.

Nothing here fails open, and nothing falls silent. A table that cannot be understood leaves the last good one in
force; a Secret that does not exist lets nobody in; one that cannot be read *now* leaves the last keys in force. While
the API server is away, the last fleet stays. Nodes are a comfort: where they may not be read, engines are left when
their pods are deleted.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lightkube import AsyncClient, KubeConfig
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.resources.core_v1 import ConfigMap, Node, Pod, Secret
from pydantic import ValidationError

from llmfleet.api import RoutingTable
from llmfleet.api.meta import COMPONENT_ENGINE, COMPONENT_ROUTING, PEER_KEY, ROUTING_KEY
from llmfleet.gateway.discovery.events import PodEvents
from llmfleet.gateway.discovery.keys import read_keys
from llmfleet.gateway.discovery.nodes import NodeIndex
from llmfleet.gateway.discovery.pods import PodIndex, Shelf, engine_pod, shelves_of
from llmfleet.gateway.discovery.reflector import Key, Reflector
from llmfleet.gateway.fleet import ANY_MODEL, Fleet, Service
from llmfleet.gateway.keys import KeyRing
from llmfleet.gateway.metrics import GatewayMetrics
from llmfleet.gateway.settings import DRAIN_TAINTS, SettingsError
from llmfleet.migration.handshake import LEAST_KEY_BYTES

log = logging.getLogger("llmfleet.gateway")

_NOT_FOUND = 404
_GATHER_S = 0.02
"""How long changes are gathered before a fleet is built."""
SECRET_REFRESH_S = 15.0
"""How often the API keys are read again, and peer keys that were not there."""
PEER_KEY_REFRESH_S = 300.0
"""How often peer keys are read again: engines keep the one that they started with."""


class KubernetesDiscovery:
    """Watches one namespace or all, and pushes a `Fleet` with every change."""

    def __init__(
        self,
        push: Callable[[Fleet], None],
        metrics: GatewayMetrics,
        *,
        namespace: str | None = None,
        kubeconfig: Path | None = None,
        drain_taints: Collection[str] = DRAIN_TAINTS,
    ) -> None:
        """`drain_taints`: keys of taints that announce a node's end. Raises SettingsError if there is no cluster to
        talk to."""
        self._push = push
        self._metrics = metrics
        self._namespace = namespace
        self._config = _config(kubeconfig)
        self._tables: dict[Key, RoutingTable] = {}
        self._nodes = NodeIndex(drain_taints)
        self._pods = PodIndex(self._nodes.leaving)
        self._rings: dict[Key, KeyRing] = {}
        self._peer_keys: dict[Key, bytes | None] = {}
        self._peer_keys_read_s = 0.0
        self._complaints: dict[Key, list[str]] = {}
        self._services: dict[Key, Service] = {}
        self._readers: dict[Shelf, set[Key]] = {}
        self._stale: set[Key] = set()
        self._listed: set[str] = set()
        self._building: asyncio.TimerHandle | None = None
        self._secret_wanted = asyncio.Event()
        self.events = PodEvents()

    async def run(self) -> None:
        """Watches until cancelled."""
        client = AsyncClient(config=self._config)
        where = self._namespace
        tables = Reflector(
            client, ConfigMap, COMPONENT_ROUTING, where, self.take_all_tables, self.take_table, self._metrics
        )
        pods = Reflector(client, Pod, COMPONENT_ENGINE, where, self.take_all_pods, self.take_pod, self._metrics)
        nodes = Reflector(
            client, Node, None, None, self.take_all_nodes, self.take_node, self._metrics,
            without="streams leave a cordoned node only when their pod is deleted",
        )  # fmt: skip
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(nodes.run())
                tasks.create_task(tables.run())
                tasks.create_task(pods.run())
                tasks.create_task(self._keep_secrets(client))
                tasks.create_task(self.events.run(client))
        finally:
            if self._building is not None:
                self._building.cancel()
            await client.close()

    # Routing tables

    def take_table(self, key: Key, config_map: ConfigMap | None) -> None:
        """A routing ConfigMap is new, different or gone."""
        old = self._tables.get(key)
        if config_map is None:
            table = None
            self._tables.pop(key, None)
        else:
            table = self._parse(key, config_map)
            if table is None or table == old:
                return
            self._tables[key] = table
        for known, add in ((old, False), (table, True)):
            for shelf in _shelves(known):
                readers = self._readers.setdefault(shelf, set())
                (readers.add if add else readers.discard)(key)
        self._touch({key})
        peers = _peer_secret_of(table) if table is not None else None
        new_peers = peers is not None and peers not in self._peer_keys
        if table is not None and (new_peers or _secret_of(table) not in self._rings):
            self._secret_wanted.set()

    def _parse(self, key: Key, config_map: ConfigMap) -> RoutingTable | None:
        text = (config_map.data or {}).get(ROUTING_KEY)
        try:
            if text is None:
                raise ValueError(f"has no key {ROUTING_KEY}")
            table = RoutingTable.model_validate_json(text)
            check_table(table, key[0])
        except ValueError as error:
            self._metrics.rejected_objects.labels("ConfigMap", *key).inc()
            reason = _first_line(error)
            kept = "its last good table stays in force" if key in self._tables else "it is left out"
            log.error("ConfigMap %s/%s is no routing table, %s: %s", *key, kept, reason)
            return None
        return table

    def take_all_tables(self, config_maps: Mapping[Key, ConfigMap]) -> None:
        """The routing ConfigMaps are these."""
        for key in self._tables.keys() - config_maps.keys():
            self.take_table(key, None)
        for key, config_map in config_maps.items():
            self.take_table(key, config_map)
        self._listed.add("tables")
        self._secret_wanted.set()
        self._touch(set())

    # Pods

    def take_pod(self, key: Key, pod: Pod | None) -> None:
        """An engine pod is new, different or gone."""
        for shelf in self._pods.put(key, engine_pod(pod) if pod is not None else None):
            self._touch(self._reading(shelf))

    def take_all_pods(self, pods: Mapping[Key, Pod]) -> None:
        """The engine pods are these."""
        for key in self._pods.keys() - pods.keys():
            self.take_pod(key, None)
        for key, pod in pods.items():
            self.take_pod(key, pod)
        self._listed.add("pods")
        self._touch(set())

    def _reading(self, shelf: Shelf) -> set[Key]:
        return self._readers.get(shelf, set()) | self._readers.get((shelf[0], None), set())

    # Nodes

    def take_node(self, key: Key, node: Node | None) -> None:
        """A node is new, different or gone."""
        if self._nodes.put(key[1], node):
            for shelf in self._pods.on_node(key[1]):
                self._touch(self._reading(shelf))

    def take_all_nodes(self, nodes: Mapping[Key, Node]) -> None:
        """The nodes are these."""
        for name in self._nodes.names() - {name for _, name in nodes}:
            self.take_node(("", name), None)
        for key, node in nodes.items():
            self.take_node(key, node)

    # Secrets

    async def _keep_secrets(self, client: AsyncClient) -> None:
        while True:
            try:
                async with asyncio.timeout(SECRET_REFRESH_S):
                    await self._secret_wanted.wait()
                wanted = self._named_secrets() - self._rings.keys()
            except TimeoutError:
                wanted = self._named_secrets()
            self._secret_wanted.clear()
            for key in wanted:
                await self._refresh(client, key)
            await self._keep_peer_keys(client)
            for key in self._rings.keys() - self._named_secrets():
                del self._rings[key]
                self._complaints.pop(key, None)
            if "tables" in self._listed:
                self._listed.add("secrets")
                self._touch(set())

    def _named_secrets(self) -> set[Key]:
        return {secret for table in self._tables.values() if (secret := _secret_of(table)) is not None}

    async def _keep_peer_keys(self, client: AsyncClient) -> None:
        named = {secret for table in self._tables.values() if (secret := _peer_secret_of(table)) is not None}
        now_s = asyncio.get_running_loop().time()
        again = now_s - self._peer_keys_read_s > PEER_KEY_REFRESH_S
        if again:
            self._peer_keys_read_s = now_s
        for key in named:
            if again or self._peer_keys.get(key) is None:
                await self._refresh_peer_key(client, key)
        for key in self._peer_keys.keys() - named:
            del self._peer_keys[key]

    async def _refresh_peer_key(self, client: AsyncClient, key: Key) -> None:
        known = self._peer_keys.get(key)
        try:
            found = peer_key_of(await client.get(Secret, key[1], namespace=key[0]))
            problem = "" if found is not None else f"has no {PEER_KEY}"
        except Exception as error:
            gone = isinstance(error, ApiError) and error.status.code == _NOT_FOUND
            found, problem = (None if gone else known), f"{type(error).__name__}: {error}"
        if problem and (known is not None or key not in self._peer_keys):
            log.warning("Secret %s/%s, without which no request of its service moves: %s", *key, problem)
        self._peer_keys[key] = found
        if known != found:
            self._touch({name for name, table in self._tables.items() if _peer_secret_of(table) == key})

    async def _refresh(self, client: AsyncClient, key: Key) -> None:
        try:
            ring = self._read(key, await client.get(Secret, key[1], namespace=key[0]))
        except Exception as error:
            if isinstance(error, ApiError) and error.status.code == 404:
                ring = KeyRing([])
                log.error("Secret %s/%s does not exist: nobody may use the services that name it", *key)
            else:
                ring = self._rings.get(key, KeyRing([]))
                log.warning("reading Secret %s/%s: %s: %s", *key, type(error).__name__, error)
        if self._rings.get(key) != ring:
            self._rings[key] = ring
            self._touch({name for name, table in self._tables.items() if _secret_of(table) == key})

    def _read(self, key: Key, secret: Secret) -> KeyRing:
        ring, complaints = read_keys(secret.data or {})
        if self._complaints.get(key, []) != complaints:
            self._complaints[key] = complaints
            for complaint in complaints:
                self._metrics.rejected_objects.labels("Secret", *key).inc()
                log.error("Secret %s/%s: %s: it opens nothing; other entries do", *key, complaint)
        return ring

    # The fleet

    def _touch(self, tables: set[Key]) -> None:
        self._stale |= tables
        if self._building is None and self._listed >= {"tables", "pods", "secrets"}:
            self._building = asyncio.get_running_loop().call_later(_GATHER_S, self._build)

    def _build(self) -> None:
        self._building = None
        for key in self._stale:
            table = self._tables.get(key)
            if table is None:
                self._services.pop(key, None)
                continue
            secret = _secret_of(table)
            ring = None if secret is None else self._rings.get(secret, KeyRing([]))
            peers = _peer_secret_of(table)
            peer_key = None if peers is None else self._peer_keys.get(peers)
            self._services[key] = Service(table, self._pods.engines(table), ring, peer_key)
        self._stale.clear()
        self._push(Fleet(self._services.values()))


def check_table(table: RoutingTable, namespace: str) -> None:
    """What the schema cannot say. Raises ValueError naming field and value."""
    if table.namespace != namespace:
        # Otherwise whoever may write ConfigMaps in one namespace could route to the pods of another.
        raise ValueError(f"namespace must be that of the ConfigMap, {namespace!r}, got {table.namespace!r}")
    if table.served_name == ANY_MODEL:
        raise ValueError(f"servedName must be the name of a model, got {ANY_MODEL!r}")
    names = [variant.name for variant in table.variants]
    if len(set(names)) != len(names):
        raise ValueError(f"variants must have different names, got {names}")
    for variant in table.variants:
        if not variant.selector:
            raise ValueError(f"variant {variant.name!r}: selector must not be empty")
    for route in table.routes:
        if route.variant not in names:
            raise ValueError(f"routes: variant must be one of {names}, got {route.variant!r}")
        if route.bucket >= table.buckets.count:
            raise ValueError(f"routes: bucket must be below {table.buckets.count}, got {route.bucket}")


def peer_key_of(secret: Secret) -> bytes | None:
    """The peer key in a Secret, without white space around it; None where there is none that peers would accept."""
    try:
        key = base64.b64decode((secret.data or {}).get(PEER_KEY, "")).strip()
    except binascii.Error:
        return None
    return key if len(key) >= LEAST_KEY_BYTES else None


def _shelves(table: RoutingTable | None) -> set[Shelf]:
    if table is None:
        return set()
    of_variants = {shelf for variant in table.variants for shelf in shelves_of(variant, table.namespace)}
    return of_variants | {(table.namespace, table.service)}


def _peer_secret_of(table: RoutingTable) -> Key | None:
    return None if table.peer_key_secret is None else (table.namespace, table.peer_key_secret)


def _secret_of(table: RoutingTable) -> Key | None:
    return None if table.api_keys_secret is None else (table.namespace, table.api_keys_secret)


def _first_line(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg']}, got {str(first['input'])[:100]!r}"
    return str(error)


def _config(kubeconfig: Path | None) -> KubeConfig:
    # lightkube alone would prefer the pod's service account to a KUBECONFIG that somebody has set.
    file = kubeconfig or os.environ.get("KUBECONFIG")
    try:
        return KubeConfig.from_file(file) if file else KubeConfig.from_env()
    except ConfigError as error:
        raise SettingsError(
            f"no Kubernetes to read the fleet from ({error}): give kubeconfig, set KUBECONFIG, run in a pod, or name "
            f"engines"
        ) from None
