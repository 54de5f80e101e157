"""Raw Kubernetes JSON to what the core reads. Pure and tolerant: an absent field reads as its zero value.

Objects come from the API server, which has validated them, but by way of caches and versions that may lack a field.
A pod without a parsable creation time reads as created at the epoch: it then counts as old, which can only make the
operator ask a question sooner. Only name and namespace must be there (KeyError).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from llmfleet.api.meta import ANNOTATION_DRAINING, COMPONENT_ENGINE, LABEL_COMPONENT, LABEL_SERVICE, LABEL_VARIANT
from llmfleet.operator.drift import drifts, read_applied, writers
from llmfleet.operator.model import (
    ANNOTATION_APPLIED,
    ANNOTATION_CONTENT,
    ANNOTATION_DELETION_COST,
    ANNOTATION_INPUTS,
    LABEL_GPU_TYPE,
    LABEL_PIPELINE_PARALLEL,
    LABEL_TENSOR_PARALLEL,
    ForeignUse,
    ObservedConfigMap,
    ObservedDeployment,
    ObservedNode,
    ObservedPod,
)
from llmfleet.operator.quantity import quantity

ENGINE_CONTAINER = "engine"
"""Name of the serving container of an engine pod."""
MESSAGE_CHARACTERS = 1500
"""Length to which an engine's last words are kept, from the end."""

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def timestamp(text: object) -> datetime:
    """An RFC 3339 time as aware UTC; the epoch when it is absent or malformed."""
    if isinstance(text, datetime):
        return text.astimezone(UTC)
    if not isinstance(text, str):
        return EPOCH
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return EPOCH
    return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def is_engine(obj: Mapping[str, Any]) -> bool:
    """Whether a pod or Deployment is one of ours."""
    labels = _at(obj, "metadata").get("labels") or {}
    return labels.get(LABEL_COMPONENT) == COMPONENT_ENGINE and LABEL_SERVICE in labels and LABEL_VARIANT in labels


def pod_from_object(obj: Mapping[str, Any]) -> ObservedPod:
    """An engine pod."""
    metadata, spec, status = _at(obj, "metadata"), _at(obj, "spec"), _at(obj, "status")
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or ()}
    engine = _named(status.get("containerStatuses"), ENGINE_CONTAINER)
    resource_name, devices = _device_request(_named(spec.get("containers"), ENGINE_CONTAINER))
    return ObservedPod(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        service=labels.get(LABEL_SERVICE, ""),
        variant=labels.get(LABEL_VARIANT, ""),
        gpu_type=labels.get(LABEL_GPU_TYPE, ""),
        template_hash=annotations.get(ANNOTATION_INPUTS, ""),
        created_at=timestamp(metadata.get("creationTimestamp")),
        scheduled=bool(spec.get("nodeName")),
        ready=conditions.get("Ready", {}).get("status") == "True",
        terminating=bool(metadata.get("deletionTimestamp")),
        draining=ANNOTATION_DRAINING in annotations,
        deletion_cost=_int(annotations.get(ANNOTATION_DELETION_COST)),
        phase=status.get("phase") or "Pending",
        waiting_reason=_at(_at(engine, "state"), "waiting").get("reason") or "",
        message=_message(status, engine, conditions),
        restarts=_int(engine.get("restartCount")),
        node=spec.get("nodeName") or "",
        resource_name=resource_name,
        devices=devices,
    )


def deployment_from_object(obj: Mapping[str, Any]) -> ObservedDeployment:
    """The Deployment of a variant."""
    metadata, spec, status = _at(obj, "metadata"), _at(obj, "spec"), _at(obj, "status")
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    replicas = spec.get("replicas")
    applied = read_applied(annotations.get(ANNOTATION_APPLIED))
    applied_at, edited_by = writers(metadata.get("managedFields") or ())
    return ObservedDeployment(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        service=labels.get(LABEL_SERVICE, ""),
        variant=labels.get(LABEL_VARIANT, ""),
        gpu_type=labels.get(LABEL_GPU_TYPE, ""),
        tensor_parallel=max(1, _int(labels.get(LABEL_TENSOR_PARALLEL))),
        pipeline_parallel=max(1, _int(labels.get(LABEL_PIPELINE_PARALLEL))),
        replicas=1 if replicas is None else _int(replicas),
        template=_at(spec, "template") if applied is None else applied["template"],
        recorded=applied is not None,
        applied_replicas=None if applied is None else applied.get("replicas"),
        drift=() if applied is None else drifts(applied, spec),
        edited_by=edited_by,
        applied_at=None if applied_at is None else timestamp(applied_at),
        input_hash=annotations.get(ANNOTATION_INPUTS, ""),
        content_hash=annotations.get(ANNOTATION_CONTENT, ""),
        generation=_int(metadata.get("generation")),
        observed_generation=_int(status.get("observedGeneration")),
        status_replicas=_int(status.get("replicas")),
        updated_replicas=_int(status.get("updatedReplicas")),
        ready_replicas=_int(status.get("readyReplicas")),
        surge=_at(_at(spec, "strategy"), "rollingUpdate").get("maxSurge", 1) not in (0, "0", "0%"),
        failure=next(
            (
                str(condition.get("message") or condition.get("reason") or "")
                for condition in status.get("conditions") or ()
                if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True"
            ),
            "",
        ),
        terminating=bool(metadata.get("deletionTimestamp")),
    )


def configmap_from_object(obj: Mapping[str, Any]) -> ObservedConfigMap:
    """The routing ConfigMap of a service."""
    metadata = _at(obj, "metadata")
    return ObservedConfigMap(
        namespace=metadata["namespace"],
        name=metadata["name"],
        service=(metadata.get("labels") or {}).get(LABEL_SERVICE, ""),
        data=dict(obj.get("data") or {}),
        content_hash=(metadata.get("annotations") or {}).get(ANNOTATION_CONTENT, ""),
    )


def node_from_object(obj: Mapping[str, Any]) -> ObservedNode:
    """A node, with its extended resources."""
    metadata, spec, status = _at(obj, "metadata"), _at(obj, "spec"), _at(obj, "status")
    ready = any(c.get("type") == "Ready" and c.get("status") == "True" for c in status.get("conditions") or ())
    return ObservedNode(
        name=metadata["name"],
        ready=ready and not metadata.get("deletionTimestamp"),
        schedulable=not spec.get("unschedulable"),
        labels=dict(metadata.get("labels") or {}),
        taints=tuple(dict(taint) for taint in spec.get("taints") or ()),
        allocatable=_extended(status.get("allocatable")),
    )


def foreign_use_from_object(obj: Mapping[str, Any]) -> ForeignUse | None:
    """What a pod that is not ours holds on its node; None when it is ours, unscheduled, finished or holds nothing.

    As the scheduler counts it: the larger of the sum over containers (with restartable init containers, which keep
    running) and any single ordinary init container.
    """
    spec = _at(obj, "spec")
    if is_engine(obj) or not spec.get("nodeName") or _at(obj, "status").get("phase") in ("Succeeded", "Failed"):
        return None
    init = spec.get("initContainers") or ()
    sidecars = [container for container in init if container.get("restartPolicy") == "Always"]
    running = _sum(_requests(container) for container in (*(spec.get("containers") or ()), *sidecars))
    peaks = [_requests(container) for container in init if container not in sidecars]
    names = {*running, *(name for peak in peaks for name in peak)}
    requests = {name: max(running.get(name, 0), *(peak.get(name, 0) for peak in peaks), 0) for name in sorted(names)}
    return ForeignUse(node=spec["nodeName"], requests=requests) if any(requests.values()) else None


def _at(obj: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    return obj.get(field) or {}


def _int(value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        return 0


def _named(items: Iterable[Mapping[str, Any]] | None, name: str) -> Mapping[str, Any]:
    return next((item for item in items or () if item.get("name") == name), {})


def _extended(resources: Mapping[str, Any] | None) -> dict[str, int]:
    """Extended resources (their names have a domain) as whole devices."""
    whole = {}
    for name, amount in (resources or {}).items():
        if "/" in name:
            try:
                whole[name] = int(quantity(amount))
            except ValueError:
                continue
    return whole


def _requests(container: Mapping[str, Any]) -> dict[str, int]:
    resources = _at(container, "resources")
    return _extended({**_at(resources, "limits"), **_at(resources, "requests")})


def _device_request(engine: Mapping[str, Any]) -> tuple[str, int]:
    """Resource and number of an engine's devices. An engine requests exactly one extended resource."""
    return next(iter(_requests(engine).items()), ("", 0))


def _sum(amounts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for amount in amounts:
        for name, value in amount.items():
            total[name] = total.get(name, 0) + value
    return total


def _message(status: Mapping[str, Any], engine: Mapping[str, Any], conditions: Mapping[Any, Mapping[str, Any]]) -> str:
    """Why the container cannot start, else the engine's last words, else why the pod has no node or was evicted.

    The text of CrashLoopBackOff says only how long the back-off is, so there the last words count.
    """
    state, last = _at(engine, "state"), _at(engine, "lastState")
    waiting = _at(state, "waiting")
    candidates = (
        waiting.get("message") if waiting.get("reason") != "CrashLoopBackOff" else None,
        _at(state, "terminated").get("message"),
        _at(last, "terminated").get("message"),
        waiting.get("message"),
        conditions.get("PodScheduled", {}).get("message"),
        status.get("message"),
        _at(state, "terminated").get("reason") or _at(last, "terminated").get("reason"),
    )
    return next((str(text).strip()[-MESSAGE_CHARACTERS:] for text in candidates if text), "")
