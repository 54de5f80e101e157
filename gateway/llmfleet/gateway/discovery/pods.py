"""Which pods are engines that may get new requests, indexed so that one change costs one look-up.

A pod is usable if it has an address, is Ready, is not being deleted and is not marked as draining. Its running
requests are not touched when it ceases to be: they finish on the connections that they have.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lightkube.resources.core_v1 import Pod

from llmfleet.api import RoutedVariant, RoutingTable
from llmfleet.api.meta import ANNOTATION_DRAINING, LABEL_SERVICE
from llmfleet.gateway.discovery.reflector import Key
from llmfleet.gateway.fleet import Engine

Shelf = tuple[str, str | None]
"""(namespace, value of the service label): where a pod is looked for."""


@dataclass(frozen=True, slots=True)
class EnginePod:
    """What matters of a usable pod."""

    uid: str
    namespace: str
    address: str
    labels: Mapping[str, str]

    @property
    def shelf(self) -> Shelf:
        """Where the pod is kept."""
        return self.namespace, self.labels.get(LABEL_SERVICE)


def usable(pod: Pod) -> EnginePod | None:
    """The pod as an engine; None if it may not get new requests now."""
    meta, status = pod.metadata, pod.status
    if meta is None or meta.uid is None or meta.namespace is None or status is None or not status.podIP:
        return None
    if meta.deletionTimestamp is not None or ANNOTATION_DRAINING in (meta.annotations or {}):
        return None
    if not any(c.type == "Ready" and c.status == "True" for c in status.conditions or ()):
        return None
    return EnginePod(meta.uid, meta.namespace, status.podIP, dict(meta.labels or {}))


class PodIndex:
    """The usable pods."""

    def __init__(self) -> None:
        self._pods: dict[Key, EnginePod] = {}
        self._shelves: defaultdict[Shelf, dict[Key, EnginePod]] = defaultdict(dict)

    def keys(self) -> set[Key]:
        """The pods that are known."""
        return set(self._pods)

    def put(self, key: Key, pod: EnginePod | None) -> set[Shelf]:
        """Takes in a pod, or forgets it. Gives the shelves that are different now."""
        old = self._pods.pop(key, None)
        if pod is not None:
            self._pods[key] = pod
        if old == pod:
            return set()
        if old is not None:
            del self._shelves[old.shelf][key]
        if pod is not None:
            self._shelves[pod.shelf][key] = pod
        return {known.shelf for known in (old, pod) if known is not None}

    def engines(self, table: RoutingTable) -> tuple[Engine, ...]:
        """The engines of a service, by pod name: each pod once, for the first variant whose selector matches."""
        found: dict[Key, Engine] = {}
        for variant in table.variants:
            for shelf in shelves_of(variant, table.namespace):
                for key, pod in self._on(shelf).items():
                    if key not in found and variant.selector.items() <= pod.labels.items():
                        engine_id = f"{pod.uid}@{pod.address}:{variant.port}"
                        found[key] = Engine(engine_id, pod.address, variant.port, variant.name)
        return tuple(engine for _, engine in sorted(found.items()))

    def _on(self, shelf: Shelf) -> Mapping[Key, EnginePod]:
        namespace, service = shelf
        if service is not None:
            return self._shelves.get(shelf, {})
        return {key: pod for key, pod in self._pods.items() if key[0] == namespace}


def shelves_of(variant: RoutedVariant, namespace: str) -> set[Shelf]:
    """Where a variant's pods are. A selector without the service label means every pod of the namespace."""
    return {(namespace, variant.selector.get(LABEL_SERVICE))}
