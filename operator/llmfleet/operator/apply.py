"""Carrying actions out: each action is one call, each answer goes into the cache.

Server-side apply by the one field manager `llmfleet-operator`, forced: the fields that the operator renders are its
own, and a field that it no longer renders is taken away. The answer of a write is an observation like any other, so
the next reconcile sees what this one did before the watch shows it.

Before every write the Lease is asked (`Fence`). A call that the API server refuses for what is in it (400, 403, 422)
is `RefusedError`: trying again soon would be refused again, so it is told to the user of that one service. Everything
else that fails is tried again with back-off.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2
from lightkube import ApiError, AsyncClient
from lightkube.generic_resource import GenericNamespacedResource
from lightkube.types import PatchType

from llmfleet.api import (
    API_VERSION,
    Condition,
    Correction,
    GPUType,
    GPUTypeStatus,
    LLMService,
    LLMServiceStatus,
    ModelProfile,
)
from llmfleet.api.meta import LABEL_COMPONENT, LABEL_SERVICE
from llmfleet.operator.cache import Cache, observe
from llmfleet.operator.kinds import (
    CONFIG_MAPS,
    DEPLOYMENTS,
    EVENTS,
    GPU_TYPES,
    LLM_SERVICES,
    MODEL_PROFILES,
    PODS,
    WATCHED,
)
from llmfleet.operator.model import (
    FIELD_MANAGER,
    Action,
    AnnotatePod,
    ApplyConfigMap,
    ApplyDeployment,
    DeleteDeployment,
    EmitEvent,
    Manifest,
    ProvideMigration,
    WriteStatus,
)
from llmfleet.operator.provide import Provider

log = logging.getLogger(__name__)

CONDITION_MANAGER = f"{FIELD_MANAGER}-conditions"
"""Field manager of `Accepted` conditions, which stand in statuses that others write too."""
_REFUSALS = (400, 403, 422)
_NOT_AS_EXPECTED = (409, 422)
"""Answers to an apply whose uid or resourceVersion is not that of the live object: conflict, or immutable uid."""
_OF_NO_OBJECT = "1"
"""etcd's first revision, before any write: an apply with it creates, and is refused (409) where an object exists."""
_EVENT_REPEAT_S = 60.0
_REMEMBERED_EVENTS = 5_000
_WAITING_EVENTS = 10_000


class FencedError(Exception):
    """This process may not write now: its Lease is not renewed."""


class RefusedError(Exception):
    """The API server refuses what was sent, and would again."""


class NameTakenError(RefusedError):
    """An object of somebody else has the name. It is left alone."""


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """What an Event is about."""

    kind: str
    namespace: str | None
    name: str
    uid: str

    @classmethod
    def of(cls, resource: LLMService | ModelProfile) -> ObjectRef:
        """The reference of an object."""
        meta = resource.metadata
        return cls(resource.KIND, meta.namespace, meta.name, meta.uid)


class Applier:
    """Executes actions against the API server."""

    def __init__(self, client: AsyncClient, cache: Cache, may_write: Callable[[], bool]) -> None:
        self._client = client
        self._cache = cache
        self._may_write = may_write
        self._provider = Provider(client)
        self._recorder = EventRecorder()
        self._events: deque[Manifest] = deque(maxlen=_WAITING_EVENTS)
        self._has_events = asyncio.Event()

    async def execute(self, service: LLMService, actions: Iterable[Action]) -> None:
        """Carries actions out in order; the first failure ends the round.

        Raises FencedError, RefusedError, NotProvidedError, lightkube.ApiError for other answers of the API server and
        httpx2.TransportError when it cannot be reached.
        """
        for action in actions:
            await self._execute_one(service, action)

    async def _execute_one(self, service: LLMService, action: Action) -> None:
        match action:
            case ProvideMigration(secret, package):
                self._fence()
                await self._provider.provide(service, secret, package)
            case ApplyDeployment(manifest):
                await self._apply(service, "Deployment", DEPLOYMENTS, manifest)
            case ApplyConfigMap(manifest):
                await self._apply(service, "ConfigMap", CONFIG_MAPS, manifest)
            case AnnotatePod(namespace, name, annotations):
                await self._annotate(namespace, name, annotations)
            case DeleteDeployment(namespace, name, uid):
                await self._delete(namespace, name, uid)
            case WriteStatus(namespace, name, status):
                await self.write_status(namespace, name, status)
            case EmitEvent(type_, reason, message):
                self.emit(ObjectRef.of(service), type_, reason, message)

    async def write_status(self, namespace: str, name: str, status: LLMServiceStatus) -> None:
        """Replaces an LLMService's status. A service that is gone (404) is no error."""
        await self.patch_status(namespace, name, status.to_wire())

    async def patch_status(self, namespace: str, name: str, status: Mapping[str, Any]) -> None:
        """Replaces an LLMService's status with raw JSON, also where the object itself does not parse."""
        body = _envelope(LLMService.KIND, name, namespace) | {"status": status}
        await self._replace_status(LLM_SERVICES.Status, LLMService.KIND, name, body, namespace=namespace)

    async def write_gpu_type_status(self, name: str, status: GPUTypeStatus) -> None:
        """Replaces what was observed in a GPUType's status."""
        observed = status.model_copy(update={"last_accepted": None})
        body = _envelope(GPUType.KIND, name) | {"status": observed.to_wire()}
        await self._replace_status(GPU_TYPES.Status, GPUType.KIND, name, body)

    async def write_profile_status(
        self, namespace: str, name: str, corrections: Sequence[Correction], condition: Condition | None
    ) -> None:
        """Replaces what was learnt in a ModelProfile's status."""
        status = {
            "corrections": [one.to_wire() for one in corrections],
            "conditions": [] if condition is None else [condition.to_wire()],
        }
        body = _envelope(ModelProfile.KIND, name, namespace) | {"status": status}
        await self._replace_status(MODEL_PROFILES.Status, ModelProfile.KIND, name, body, namespace=namespace)

    async def write_accepted(
        self, kind: str, namespace: str | None, name: str, condition: Condition, last_accepted: str | None
    ) -> None:
        """Sets the condition and `lastAccepted` in the status of a custom resource, and leaves the rest of it alone."""
        status = {"conditions": [condition.to_wire()]} | ({"lastAccepted": last_accepted} if last_accepted else {})
        body = _envelope(kind, name, namespace) | {"status": status}
        where = {"namespace": namespace} if namespace else {}
        resource = next(watched.resource for watched in WATCHED if watched.kind == kind)
        await self._replace_status(resource.Status, kind, name, body, CONDITION_MANAGER, **where)

    async def _replace_status(
        self, resource: Any, kind: str, name: str, body: dict[str, Any], manager: str = FIELD_MANAGER, **where: Any
    ) -> None:
        """Server-side apply of a status; an object that is gone (404) is no error."""
        self._fence()
        try:
            raw = await self._client.patch(
                resource, name, body, patch_type=PatchType.APPLY, field_manager=manager, force=True, **where
            )
        except ApiError as error:
            if error.status.code != 404:
                about = "/".join((*where.values(), name))
                raise _classified(error, f"status of {kind} {about}") from error
            return
        self._cache.apply(observe(kind, raw, own=True))

    def emit(self, ref: ObjectRef, type_: str, reason: str, message: str) -> None:
        """Has an Event posted, or counted up if the same was posted before; soon after, it says nothing."""
        about = {"kind": ref.kind, "object": f"{ref.namespace}/{ref.name}" if ref.namespace else ref.name}
        log.info("event", extra={**about, "type": type_, "reason": reason, "about": message})
        event = self._recorder.next(ref, type_, reason, message, datetime.now(UTC))
        if event is not None:
            if len(self._events) == _WAITING_EVENTS:
                log.warning("dropping an event: too many wait")
            self._events.append(event)
            self._has_events.set()

    async def post_events(self) -> None:
        """Posts Events for ever, one at a time. They are news, not state: they wait behind nothing, nothing waits
        for them, and one that cannot be posted is logged and let go."""
        while True:
            await self._has_events.wait()
            event = self._events.popleft()
            if not self._events:
                self._has_events.clear()
            if self._may_write():
                await self._post(event)

    async def _post(self, event: Manifest) -> None:
        try:
            await self._client.patch(
                EVENTS,
                event["metadata"]["name"],
                event,
                namespace=event["metadata"]["namespace"],
                patch_type=PatchType.APPLY,
                field_manager=FIELD_MANAGER,
                force=True,
            )
        except httpx2.HTTPError as error:
            log.warning("cannot post an event", extra={"reason": event["reason"], "cause": str(error)})

    async def _apply(
        self, service: LLMService, kind: str, resource: type[GenericNamespacedResource], manifest: Manifest
    ) -> None:
        """Forced, but only on the very object that the cache knows, or on none: force would take over whatever else
        has the name. Where that is not so any more, a look at the live object decides. Raises NameTakenError."""
        meta = manifest["metadata"]
        name, namespace = meta["name"], meta["namespace"]
        known = self._cache.uid(kind, f"{namespace}/{name}")
        self._fence()
        try:
            try:
                raw = await self._force(resource, manifest, known)
            except ApiError as error:
                if error.status.code not in _NOT_AS_EXPECTED:
                    raise
                live = await self._live(resource, namespace, name)
                uid = None if live is None else live["metadata"]["uid"]
                if uid == known:
                    raise
                if live is not None and not is_ours(live, manifest, service):
                    raise NameTakenError(
                        f"{kind} {namespace}/{name} exists and is not of LLMService {service.key}: it is left alone; "
                        f"delete or rename it, or give the LLMService another name"
                    ) from error
                raw = await self._force(resource, manifest, uid)
        except ApiError as error:
            raise _classified(error, f"{kind} {namespace}/{name}") from error
        log.info("applied", extra={"kind": kind, "object": f"{namespace}/{name}"})
        self._cache.apply(observe(kind, raw, own=True))

    async def _force(self, resource: type[GenericNamespacedResource], manifest: Manifest, uid: str | None) -> Any:
        """Forced server-side apply on the object with this uid; with None, only where there is no such object."""
        meta = manifest["metadata"]
        condition = {"resourceVersion": _OF_NO_OBJECT} if uid is None else {"uid": uid}
        return await self._client.patch(
            resource,
            meta["name"],
            {**manifest, "metadata": {**meta, **condition}},
            namespace=meta["namespace"],
            patch_type=PatchType.APPLY,
            field_manager=FIELD_MANAGER,
            force=True,
        )

    async def _live(self, resource: type[GenericNamespacedResource], namespace: str, name: str) -> Any | None:
        try:
            return await self._client.get(resource, name, namespace=namespace)
        except ApiError as error:
            if error.status.code == 404:
                return None
            raise

    async def _annotate(self, namespace: str, name: str, annotations: Mapping[str, str | None]) -> None:
        self._fence()
        try:
            raw = await self._client.patch(
                PODS,
                name,
                {"metadata": {"annotations": dict(annotations)}},
                namespace=namespace,
                patch_type=PatchType.MERGE,
                field_manager=FIELD_MANAGER,
            )
        except ApiError as error:
            if error.status.code != 404:
                raise _classified(error, f"Pod {namespace}/{name}") from error
            return
        log.info("annotated", extra={"kind": "Pod", "object": f"{namespace}/{name}", "annotations": dict(annotations)})
        self._cache.apply(observe("Pod", raw, own=True))

    async def _delete(self, namespace: str, name: str, uid: str) -> None:
        # lightkube's delete carries no preconditions, so the uid is compared with a fresh read. Between the two the
        # object could only be replaced by one that this operator itself, the only writer of its kind, creates.
        self._fence()
        try:
            live = await self._client.get(DEPLOYMENTS, name, namespace=namespace)
            if live["metadata"]["uid"] != uid:
                return
            await self._client.delete(DEPLOYMENTS, name, namespace=namespace)
        except ApiError as error:
            if error.status.code != 404:
                raise _classified(error, f"Deployment {namespace}/{name}") from error
            return
        log.info("deleted", extra={"kind": "Deployment", "object": f"{namespace}/{name}"})

    def _fence(self) -> None:
        if not self._may_write():
            raise FencedError("the lease is not renewed")


class EventRecorder:
    """Which Event to post, with its count. An Event's name follows from what it says, so a repetition finds the one
    before it, also after a restart."""

    def __init__(self) -> None:
        self._posted: OrderedDict[str, tuple[datetime, datetime, int]] = OrderedDict()

    def next(self, ref: ObjectRef, type_: str, reason: str, message: str, now: datetime) -> Manifest | None:
        """The Event to apply; None when the same was posted less than a minute ago."""
        text = "\0".join((ref.kind, ref.uid, type_, reason, message))
        name = f"{ref.name[:200]}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        first, last, count = self._posted.get(name, (now, None, 0))
        if last is not None and (now - last).total_seconds() < _EVENT_REPEAT_S:
            return None
        self._posted[name] = (first, now, count + 1)
        self._posted.move_to_end(name)
        if len(self._posted) > _REMEMBERED_EVENTS:
            self._posted.popitem(last=False)
        # Events of cluster-scoped objects live in the namespace `default`, where kubectl looks for them.
        namespace = ref.namespace or "default"
        involved = {"apiVersion": API_VERSION, "kind": ref.kind, "name": ref.name, "uid": ref.uid}
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": involved | ({"namespace": ref.namespace} if ref.namespace else {}),
            "type": type_,
            "reason": reason,
            "message": message[:1024],
            "firstTimestamp": _seconds(first),
            "lastTimestamp": _seconds(now),
            "count": count + 1,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
        }


def is_ours(live: Mapping[str, Any], manifest: Manifest, service: LLMService) -> bool:
    """Whether a live object is the one that the manifest describes: it belongs to the service by ownerReference, or by
    the labels that the operator finds it by (it outlived a service of the same name)."""
    meta, wanted = live["metadata"], manifest["metadata"]["labels"]
    labels = meta.get("labels") or {}
    owned = any(owner.get("uid") == service.metadata.uid for owner in meta.get("ownerReferences") or ())
    return owned or all(labels.get(label) == wanted[label] for label in (LABEL_COMPONENT, LABEL_SERVICE))


def _seconds(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _envelope(kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata}


def _classified(error: ApiError, what: str) -> Exception:
    if error.status.code in _REFUSALS:
        return RefusedError(f"{what} was refused by the API server: {error.status.message}")
    return error
