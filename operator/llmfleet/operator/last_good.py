"""The last version of an object that parsed, kept in its own status: it outlives the process that understood it.

    object that parses       --remember--> status.lastAccepted, written together with its `Accepted` condition
    object that does not any more --recall--> that version, which goes on to count in whatever process

The object's own status and no store of ours: it is read with the object before anything is planned, it is gone with
the object, its size is the object's, and nobody needs a right that he did not have. It holds the generation and the
spec as this version of the operator read it, its defaults included, as JSON in one string: such an object has a line
more for people who look at it, and not all of its spec again.

Of an LLMService nothing is kept. What is in force of it is its plan, which is in its routing ConfigMap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from llmfleet.api.meta import Resource

LARGEST_BYTES = 2**19
"""Specs beyond it are not kept: etcd takes one and a half MiB, and the object itself is in there too."""

R = TypeVar("R", bound=Resource)


def remember(value: Resource, stored: str | None) -> str | None:
    """`status.lastAccepted` of an object that parses. `stored` is what it is now, and stays while the generation does.
    None where the spec is too large to be kept."""
    head = f'{{"generation":{value.metadata.generation},'
    if stored is not None and stored.startswith(head):
        return stored
    spec = json.dumps(value.to_wire()["spec"], separators=(",", ":"), ensure_ascii=False)
    return f'{head}"spec":{spec}}}' if len(spec.encode()) <= LARGEST_BYTES else None


def recall(model: type[R], raw: Mapping[str, Any]) -> R | None:
    """The version that the status of a raw object holds; None where it holds none that this operator understands."""
    try:
        kept = json.loads(raw["status"]["lastAccepted"])
        version = {**raw, "metadata": {**raw["metadata"], "generation": kept["generation"]}, "spec": kept["spec"]}
        return parse_spec(model, version)
    except (ValidationError, TypeError, ValueError, KeyError):
        return None


def parse_spec(model: type[R], raw: Mapping[str, Any]) -> R:
    """An object by its spec. A status that another version wrote is no reason to refuse it: it is written anew.

    Raises pydantic.ValidationError, which speaks of the spec alone.
    """
    try:
        return model.parse(dict(raw))
    except ValidationError:
        return model.parse({name: part for name, part in raw.items() if name != "status"})
