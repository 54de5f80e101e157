"""Which pods are a service's engines, and which of them leave, indexed so that one change costs one look-up.

A pod becomes an engine when it has an address and is Ready. It leaves when it is deleted or marked as draining, or when
its node is about to go, or its variant has gone from the routing table; it gets no new requests then, and stays an
engine with what it runs until it has ended. One that ceases to be Ready for another reason is no engine until it is
Ready again: its running requests finish on the connections that they have.

A node is left only for engines that stay: where all of a service are on nodes that are about to go, to leave them would
be an outage that the cluster has not had yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lightkube.resources.core_v1 import Pod

from llmfleet.api import RoutedVariant, RoutingTable
from llmfleet.api.meta import ANNOTATION_DRAINING, LABEL_REVISION, LABEL_SERVICE, LABEL_VARIANT, MIGRATION_PORT_NAME
from llmfleet.gateway.discovery.reflector import Key
from llmfleet.gateway.fleet import Engine, Leaving, LeavingReason

Shelf = tuple[str, str | None]
"""(namespace, value of the service label): where a pod is looked for."""


@dataclass(frozen=True, slots=True)
class EnginePod:
    """What matters of a pod that may be an engine."""

    uid: str
    namespace: str
    address: str
    labels: Mapping[str, str]
    ready: bool
    leaving: Leaving | None = None
    """Why it leaves of itself, whatever its node does."""
    node: str = ""
    port: int = RoutedVariant.model_fields["port"].default
    """Where its OpenAI server is, by its own word; a routing table that has the pod's variant knows better."""
    control_port: int | None = None
    """Where its migration plug-in is asked."""

    @property
    def shelf(self) -> Shelf:
        """Where the pod is kept."""
        return self.namespace, self.labels.get(LABEL_SERVICE)


def engine_pod(pod: Pod) -> EnginePod | None:
    """What matters of a pod; None where it cannot be an engine (any more): it has no address, or has ended."""
    meta, spec, status = pod.metadata, pod.spec, pod.status
    if meta is None or meta.uid is None or meta.namespace is None or status is None or not status.podIP:
        return None
    if status.phase in ("Succeeded", "Failed"):
        return None
    leaving = None
    if meta.deletionTimestamp is not None:
        # Kubernetes writes down when the grace period ends, not when it began.
        leaving = Leaving(LeavingReason.DELETED, meta.deletionTimestamp.timestamp())
    elif ANNOTATION_DRAINING in (meta.annotations or {}):
        leaving = Leaving(LeavingReason.DRAINING)
    containers = spec.containers if spec is not None else ()
    ports = {port.name: port.containerPort for container in containers for port in container.ports or ()}
    return EnginePod(
        meta.uid,
        meta.namespace,
        status.podIP,
        dict(meta.labels or {}),
        ready=any(c.type == "Ready" and c.status == "True" for c in status.conditions or ()),
        leaving=leaving,
        node=(spec.nodeName if spec is not None else None) or "",
        port=ports.get("http", RoutedVariant.model_fields["port"].default),
        control_port=ports.get(MIGRATION_PORT_NAME),
    )


class PodIndex:
    """The engines' pods."""

    def __init__(self, node_leaving: Callable[[str], Leaving | None] = lambda node: None) -> None:
        """`node_leaving` says why the engines of a node should be left."""
        self._node_leaving = node_leaving
        self._pods: dict[Key, EnginePod] = {}
        self._shelves: defaultdict[Shelf, dict[Key, EnginePod]] = defaultdict(dict)

    def keys(self) -> set[Key]:
        """The pods that are known."""
        return set(self._pods)

    def put(self, key: Key, pod: EnginePod | None) -> set[Shelf]:
        """Takes in a pod, or forgets it. Gives the shelves that are different now."""
        old = self._pods.pop(key, None)
        if pod is not None and not pod.ready:
            # What leaves may still run what it was given while it was Ready; what was not Ready was given nothing.
            served = old is not None and old.uid == pod.uid
            pod = pod if served and pod.leaving is not None else None
        if pod is not None:
            self._pods[key] = pod
        if old == pod:
            return set()
        if old is not None:
            del self._shelves[old.shelf][key]
        if pod is not None:
            self._shelves[pod.shelf][key] = pod
        return {known.shelf for known in (old, pod) if known is not None}

    def on_node(self, node: str) -> set[Shelf]:
        """The shelves with pods of a node."""
        return {pod.shelf for pod in self._pods.values() if pod.node == node}

    def engines(self, table: RoutingTable) -> tuple[Engine, ...]:
        """The engines of a service, by pod name: each pod once, for the first variant whose selector matches. Pods of
        the service that match none are what is left of variants that the plan has no more."""
        found: dict[Key, Engine] = {}
        for variant in table.variants:
            for shelf in shelves_of(variant, table.namespace):
                for key, pod in self._on(shelf).items():
                    if key not in found and variant.selector.items() <= pod.labels.items():
                        found[key] = self._engine(key, pod, variant.name, variant.port, pod.leaving)
        for key, pod in self._shelves.get((table.namespace, table.service), {}).items():
            if key not in found:
                leaving = pod.leaving or Leaving(LeavingReason.DRAINING)
                found[key] = self._engine(key, pod, pod.labels.get(LABEL_VARIANT, ""), pod.port, leaving)
        engines = tuple(engine for _, engine in sorted(found.items()))
        if any(engine.leaving is None for engine in engines):
            return engines
        return tuple(replace(engine, leaving=None) if _only_its_node_goes(engine) else engine for engine in engines)

    def _engine(self, key: Key, pod: EnginePod, variant: str, port: int, leaving: Leaving | None) -> Engine:
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        return Engine(
            id=f"{pod.uid}@{pod.address}:{port}",
            host=pod.address,
            port=port,
            variant=variant,
            control=None if pod.control_port is None else f"{host}:{pod.control_port}",
            leaving=leaving or self._node_leaving(pod.node),
            revision=pod.labels.get(LABEL_REVISION, ""),
            pod=key,
        )

    def _on(self, shelf: Shelf) -> Mapping[Key, EnginePod]:
        namespace, service = shelf
        if service is not None:
            return self._shelves.get(shelf, {})
        return {key: pod for key, pod in self._pods.items() if key[0] == namespace}


def _only_its_node_goes(engine: Engine) -> bool:
    return engine.leaving is not None and engine.leaving.reason in (LeavingReason.CORDONED, LeavingReason.TAINTED)


def shelves_of(variant: RoutedVariant, namespace: str) -> set[Shelf]:
    """Where a variant's pods are. A selector without the service label means every pod of the namespace."""
    return {(namespace, variant.selector.get(LABEL_SERVICE))}
