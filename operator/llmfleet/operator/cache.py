"""What the operator knows of the cluster: plain dictionaries of small records, kept current by list and watch.

    raw JSON --observe()--> Observation --Cache.apply()--> dictionaries, and one call of `on_change`

`observe` is pure and may run in any thread: it turns an object into the record that the core reads and drops the
rest, so that memory follows the number of *our* objects. Of a pod of others only the devices that it holds are kept,
and nothing if it holds none. `Cache` belongs to the event loop of the reconciler.

Observations come from three sources: watches, lists, and the answers to our own writes (so that a reconcile sees what
the one before it did). They overtake each other, so the cache compares: resourceVersions of one kind only ever grow,
also from an object to its successor of the same name (they are integers by API convention since Kubernetes 1.35, and
were before that in fact); a deletion counts only for the uid that it names; and an object that was deleted does not
come back under its uid.

What the platform team writes (types, profiles, power domains, the policy) bounds what services may have, so a version
of it that does not parse opens nothing: the last one that did stays where it is (`invalid`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from pydantic import ValidationError

from llmfleet.api import (
    POLICY_NAME,
    FleetPolicy,
    FleetPolicySpec,
    GPUType,
    LLMService,
    ModelProfile,
    PowerDomain,
)
from llmfleet.operator.invalid import (
    Bound,
    InvalidObject,
    explain,
    invalid_object,
    policy_of,
    still_in_force,
)
from llmfleet.operator.kinds import WATCHED
from llmfleet.operator.last_good import parse_spec
from llmfleet.operator.model import (
    Drift,
    ForeignUse,
    ObservedConfigMap,
    ObservedDeployment,
    ObservedNode,
    ObservedPod,
)
from llmfleet.operator.parse import (
    configmap_from_object,
    deployment_from_object,
    foreign_use_from_object,
    is_engine,
    node_from_object,
    pod_from_object,
)

_REMEMBERED_DELETIONS = 20_000
_CUSTOM_KINDS = {model.KIND: model for model in (FleetPolicy, GPUType, LLMService, ModelProfile, PowerDomain)}


Value: TypeAlias = (
    Bound
    | LLMService
    | InvalidObject
    | ObservedNode
    | ObservedPod
    | ForeignUse
    | ObservedDeployment
    | ObservedConfigMap
)


@dataclass(frozen=True, slots=True)
class Observation:
    """One object at one version; `value` None means that it is gone or holds nothing that matters."""

    kind: str
    key: str
    """`namespace/name`, or the bare name of a cluster-scoped object."""
    uid: str
    version: int
    value: Value | None
    deleted: bool = False
    own: bool = False
    """It is the answer to a write of this process."""


def observe(kind: str, raw: Mapping[str, Any], *, deleted: bool = False, own: bool = False) -> Observation:
    """Reads a raw object. Never raises for what a user wrote: a custom resource that does not parse becomes an
    `InvalidObject`."""
    meta = raw["metadata"]
    namespace, name = meta.get("namespace"), meta["name"]
    return Observation(
        kind=kind,
        key=f"{namespace}/{name}" if namespace else name,
        uid=meta.get("uid", ""),
        version=int(meta.get("resourceVersion") or 0),
        value=None if deleted else _value(kind, raw),
        deleted=deleted,
        own=own,
    )


def _value(kind: str, raw: Mapping[str, Any]) -> Value | None:
    if kind in _CUSTOM_KINDS:
        return _custom(_CUSTOM_KINDS[kind], raw)
    if kind == "Node":
        return node_from_object(raw)
    if kind == "Deployment":
        return deployment_from_object(raw)
    if kind == "ConfigMap":
        return configmap_from_object(raw)
    return pod_from_object(raw) if is_engine(raw) else foreign_use_from_object(raw)


def _custom(model: type[Bound | LLMService], raw: Mapping[str, Any]) -> Value:
    try:
        return parse_spec(model, raw)
    except ValidationError as error:
        return invalid_object(model, raw, explain(model.KIND, error))


OnChange: TypeAlias = Callable[[Observation, "Value | None"], None]
"""Called after each change with what was observed and the value before it."""


@dataclass(slots=True)
class _Versions:
    """uid and version of each known object of one kind."""

    known: dict[str, tuple[str, int]] = field(default_factory=dict)
    newest: int = 0


class Cache:
    """The dictionaries. Reading them is free; only `apply` and `retain` change them."""

    def __init__(self) -> None:
        self.services: dict[str, LLMService] = {}
        """By `namespace/name`."""
        self.invalid: dict[tuple[str, str], InvalidObject] = {}
        """By kind and key. What stays in force of them is also where it would be if they parsed."""
        self.profiles: dict[str, ModelProfile] = {}
        self.gpu_types: dict[str, GPUType] = {}
        self.power_domains: dict[str, PowerDomain] = {}
        self.nodes: dict[str, ObservedNode] = {}
        self.unfit_nodes: set[str] = set()
        """Nodes that are cordoned or NotReady."""
        self.foreign: dict[str, ForeignUse] = {}
        """By pod key."""
        self.pods: dict[str, dict[str, ObservedPod]] = {}
        """By service key, then by pod name."""
        self.deployments: dict[str, dict[str, ObservedDeployment]] = {}
        """By service key, then by name."""
        self.routing: dict[str, ObservedConfigMap] = {}
        """By service key."""
        self.policy: FleetPolicySpec = FleetPolicySpec()
        self.on_change: OnChange = lambda observation, before: None
        self._versions = {watched.kind: _Versions() for watched in WATCHED}
        self._values: dict[tuple[str, str], Value] = {}
        self._deleted: OrderedDict[str, None] = OrderedDict()
        self._written_otherwise: dict[str, frozenset[Drift]] = {}
        """By uid of a Deployment, what the answer to its last apply held otherwise than was applied."""

    def find(self, kind: str, key: str) -> Value | None:
        """What is kept of an object; None where there is none."""
        return self._values.get((kind, key))

    def newest(self, kind: str) -> int:
        """Highest resourceVersion seen of any object of this kind."""
        return self._versions[kind].newest

    def knows(self, kind: str, key: str, uid: str, version: int) -> bool:
        """Whether the cache holds this object at this version or a later one. Safe to ask from any thread: it only
        saves the work of reading an object again, and `apply` decides."""
        known = self._versions[kind].known.get(key)
        return known is not None and known[0] == uid and known[1] >= version

    def uid(self, kind: str, key: str) -> str | None:
        """uid of an object; None where there is none that is known."""
        known = self._versions[kind].known.get(key)
        return None if known is None else known[0]

    def snapshot(self, kind: str) -> dict[str, str]:
        """uid by key of the objects now known of one kind."""
        return {key: uid for key, (uid, _) in self._versions[kind].known.items()}

    def apply(self, observation: Observation) -> bool:
        """Takes an observation in, unless it is stale. Returns whether anything changed."""
        versions = self._versions[observation.kind]
        versions.newest = max(versions.newest, observation.version)
        known = versions.known.get(observation.key)
        if observation.deleted:
            self._remember_deletion(observation.uid)
            if known is None or known[0] != observation.uid:
                return False
            del versions.known[observation.key]
            return self._store(observation)
        # The answer to an apply that changed nothing has the version that is known, and tells what the apply left so.
        newest_before = observation.version if observation.own else observation.version - 1
        if observation.uid in self._deleted or (known is not None and known[1] > newest_before):
            return False
        slot = (observation.kind, observation.key)
        if observation.value is None and slot not in self._values:
            return False
        versions.known[observation.key] = (observation.uid, observation.version)
        return self._store(observation)

    def retain(self, kind: str, before: Mapping[str, str], listed: Iterable[str]) -> int:
        """Drops the objects of `before` (a snapshot from before a list was asked for) that the list does not hold:
        their deletion was missed. Returns how many there were."""
        uids = set(listed)
        gone = [(key, uid) for key, uid in before.items() if uid not in uids]
        return sum(self.apply(Observation(kind, key, uid, 0, None, deleted=True)) for key, uid in gone)

    def _remember_deletion(self, uid: str) -> None:
        self._deleted[uid] = None
        if len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)

    def _store(self, observation: Observation) -> bool:
        slot = (observation.kind, observation.key)
        before = self._values.pop(slot, None)
        if isinstance(observation.value, InvalidObject):
            observation = replace(observation, value=still_in_force(observation.value, before))
        if isinstance(observation.value, ObservedDeployment):
            observation = replace(observation, value=self._without_inherent_drift(observation.value, observation.own))
        elif isinstance(before, ObservedDeployment):
            self._written_otherwise.pop(before.uid, None)
        if before is not None:
            self._unindex(observation.kind, observation.key, before)
        if observation.value is not None:
            self._values[slot] = observation.value
            self._index(observation.kind, observation.key, observation.value)
        if before == observation.value:
            return False
        self.on_change(observation, before)
        return True

    def _without_inherent_drift(self, deployment: ObservedDeployment, own: bool) -> ObservedDeployment:
        """Less what the API server, or a webhook in it, made of the apply itself: to apply it again would change
        nothing. After a restart that is learnt by applying once."""
        if own:
            self._written_otherwise[deployment.uid] = frozenset(deployment.drift)
        inherent = self._written_otherwise.get(deployment.uid)
        if not inherent:
            return deployment
        return replace(deployment, drift=tuple(drift for drift in deployment.drift if drift not in inherent))

    def _index(self, kind: str, key: str, value: Value) -> None:
        match value:
            case InvalidObject():
                self.invalid[kind, key] = value
                if value.in_force is not None:
                    self._index(kind, key, value.in_force)
                if (kind, key) == (FleetPolicy.KIND, POLICY_NAME):
                    self.policy = policy_of(value)
            case LLMService():
                self.services[key] = value
            case ModelProfile():
                self.profiles[key] = value
            case GPUType():
                self.gpu_types[key] = value
            case PowerDomain():
                self.power_domains[key] = value
            case FleetPolicy() if key == POLICY_NAME:
                self.policy = value.spec
            case ObservedNode():
                self.nodes[key] = value
                if not (value.ready and value.schedulable):
                    self.unfit_nodes.add(key)
            case ForeignUse():
                self.foreign[key] = value
            case ObservedPod():
                self.pods.setdefault(value.key, {})[value.name] = value
            case ObservedDeployment():
                self.deployments.setdefault(value.key, {})[value.name] = value
            case ObservedConfigMap():
                self.routing[value.key] = value

    def _unindex(self, kind: str, key: str, value: Value) -> None:
        match value:
            case InvalidObject():
                self.invalid.pop((kind, key), None)
                if value.in_force is not None:
                    self._unindex(kind, key, value.in_force)
                elif (kind, key) == (FleetPolicy.KIND, POLICY_NAME):
                    self.policy = FleetPolicySpec()
            case LLMService():
                self.services.pop(key, None)
            case ModelProfile():
                self.profiles.pop(key, None)
            case GPUType():
                self.gpu_types.pop(key, None)
            case PowerDomain():
                self.power_domains.pop(key, None)
            case FleetPolicy() if key == POLICY_NAME:
                self.policy = FleetPolicySpec()
            case ObservedNode():
                self.nodes.pop(key, None)
                self.unfit_nodes.discard(key)
            case ForeignUse():
                self.foreign.pop(key, None)
            case ObservedPod():
                _drop(self.pods, value.key, value.name)
            case ObservedDeployment():
                _drop(self.deployments, value.key, value.name)
            case ObservedConfigMap():
                self.routing.pop(value.key, None)


def _drop(index: dict[str, dict[str, Any]], key: str, name: str) -> None:
    members = index.get(key)
    if members is not None and members.pop(name, None) is not None and not members:
        del index[key]
