"""What somebody else has changed of a Deployment that the operator wrote.

    spec as applied (ANNOTATION_APPLIED) + live spec --drifts--> the fields that were applied and are otherwise now

Only what the operator applied is compared. What others add beside it (a sidecar, a label, an annotation, a field that
is not rendered) is theirs and stays, as server-side apply has it. The spec as applied is kept in an annotation of the
Deployment: what is to be set back then follows from the object alone, after a restart and for another version of the
operator too, which may render the same template in another way.

Two spellings of a quantity are one value. Whatever else the API server or an admission webhook writes differently from
what was applied is seen in the answer to the apply itself, and is no drift (`cache`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmfleet.operator.model import FIELD_MANAGER, Drift
from llmfleet.operator.quantity import quantity

_KEYS = {
    "containers": "name",
    "env": "name",
    "imagePullSecrets": "name",
    "ports": "containerPort",
    "topologySpreadConstraints": "topologyKey",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
"""Lists whose elements each have an owner, with the field that tells them apart (`x-kubernetes-list-map-keys` of the
Kubernetes API; a port's second key, its protocol, is always TCP here). Other lists have one owner."""
_QUANTITIES = frozenset({"limits", "requests", "sizeLimit"})


def read_applied(text: str | None) -> Mapping[str, Any] | None:
    """The spec in the annotation; None where there is none that can be read."""
    try:
        applied = json.loads(text or "null")
    except ValueError:
        return None
    return applied if isinstance(applied, dict) and isinstance(applied.get("template"), dict) else None


def drifts(applied: Mapping[str, Any], live: Mapping[str, Any]) -> tuple[Drift, ...]:
    """Every applied field that is otherwise in the live spec, but `replicas`, which the rollout decides anew."""
    compared = {name: part for name, part in applied.items() if name != "replicas"}
    return tuple(_differences("spec", "", compared, live))


def writers(managed_fields: Iterable[Mapping[str, Any]]) -> tuple[str | None, tuple[str, ...]]:
    """(when the operator last changed a field, field managers of others that have set a part of the spec since then,
    newest first), out of an object's `metadata.managedFields`. Who only removes a field is not named there."""
    applied_at = ""
    others: dict[str, str] = {}
    for entry in managed_fields:
        manager, time = entry.get("manager") or "", entry.get("time") or ""
        if manager == FIELD_MANAGER and entry.get("operation") == "Apply":
            applied_at = time
        elif manager != FIELD_MANAGER and "f:spec" in (entry.get("fieldsV1") or {}):
            others[manager] = max(time, others.get(manager, ""))
    since = [manager for manager, time in others.items() if time >= applied_at]
    return applied_at or None, tuple(sorted(since, key=lambda manager: others[manager], reverse=True))


def _differences(path: str, field: str, applied: Any, live: Any) -> Iterator[Drift]:
    if applied == live:  # nearly always, and found at once
        return
    if isinstance(applied, Mapping) and isinstance(live, Mapping):
        # The resources of a container have names of their own below `limits` and `requests`.
        below = field if field in _QUANTITIES else ""
        for name, part in applied.items():
            if name in live:
                yield from _differences(f"{path}.{name}", below or name, part, live[name])
            else:
                yield Drift(f"{path}.{name}", "", removed=bool(part))
    elif isinstance(applied, list) and isinstance(live, list) and field in _KEYS:
        key = _KEYS[field]
        there = {element.get(key): element for element in reversed(live)}
        for element in applied:
            name = element.get(key)
            where = f"{path}[{name}]"
            if name in there:
                yield from _differences(where, "", element, there[name])
            else:
                yield Drift(where, "", removed=True)
    elif isinstance(applied, list) and isinstance(live, list) and len(applied) == len(live):
        if any(True for one, other in zip(applied, live, strict=True) for _ in _differences(path, "", one, other)):
            yield Drift(path, _text(live))
    elif not (field in _QUANTITIES and _same_quantity(applied, live)):
        yield Drift(path, _text(live))


def _same_quantity(applied: Any, live: Any) -> bool:
    try:
        return quantity(applied) == quantity(live)
    except ValueError:
        return False


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
