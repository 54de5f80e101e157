"""Files, folders and standard input become objects, or one error that says where and why.

In flow paths as `-f` gives them: YAML or JSON files, folders (their *.yaml, *.yml and *.json, not what is below), or
`-` for standard input. Out flow `Manifests`: the llmfleet objects, checked as strictly as the API server checks them,
and raw Nodes and Pods, of which only the inventory is counted. Objects of other APIs may stand beside them, because
people keep a Namespace or a Secret in the same file; they are passed over. What can only be a mistake is refused: an
unknown kind or version of our own group, an unknown field, a key given twice, an object given twice.

`kubectl get -o yaml` writes what is read here, so a cluster's objects can be planned from a file.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmfleet.api import (
    API_VERSION,
    GROUP,
    KINDS,
    FleetPolicy,
    GPUType,
    LLMService,
    ModelProfile,
    PowerDomain,
    Resource,
)
from llmfleet.api.structural_schema import structural_schema
from llmfleet.cli.refused import RefusedError, shown

_BY_KIND = {kind.KIND: kind for kind in KINDS}
_SUFFIXES = (".yaml", ".yml", ".json")
_ERRORS_SHOWN = 3


@dataclass
class Manifests:
    """What was read, in the order in which it was read."""

    services: list[LLMService] = field(default_factory=list)
    profiles: list[ModelProfile] = field(default_factory=list)
    gpu_types: list[GPUType] = field(default_factory=list)
    power_domains: list[PowerDomain] = field(default_factory=list)
    policy: FleetPolicy | None = None
    nodes: list[dict[str, Any]] = field(default_factory=list)
    pods: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Document:
    """One object and where it stands."""

    place: str
    content: Any


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: times stay text, and a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_manifests(paths: Iterable[str], *, namespace: str = "default") -> Manifests:
    """Reads every object of the paths. `namespace` is that of namespaced objects that name none.

    Raises RefusedError for the first thing that cannot be used.
    """
    manifests = Manifests()
    places: dict[tuple[str, str], str] = {}
    for document in _documents(paths):
        obj = document.content
        if not isinstance(obj, dict) or not isinstance(obj.get("kind"), str) or not obj.get("apiVersion"):
            raise RefusedError(f"{document.place}: not a Kubernetes object: apiVersion and kind are required")
        match obj["apiVersion"], obj["kind"]:
            case "v1", "Node":
                manifests.nodes.append(obj)
            case "v1", "Pod":
                manifests.pods.append(obj)
            case version, kind if str(version).split("/")[0] == GROUP:
                resource = _resource(document.place, str(version), kind, obj, namespace)
                place = places.setdefault((kind, resource.key), document.place)
                if place != document.place:
                    raise RefusedError(f"{document.place}: {kind} {resource.key} is given twice, first in {place}")
                _add(manifests, resource)
    return manifests


def describe(error: ValidationError, kind: type[Resource]) -> str:
    """A validation error in one line: field, value, what is accepted; the first few of them."""
    found = [_describe_one(dict(item), kind) for item in error.errors(include_url=False)]
    rest = len(found) - _ERRORS_SHOWN
    return "; ".join(found[:_ERRORS_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")


def _documents(paths: Iterable[str]) -> Iterator[_Document]:
    for path in _files(paths):
        name = "standard input" if path == "-" else path
        try:
            text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RefusedError(f"{name}: cannot be read: {_reason(error)}") from error
        try:
            documents = [(i, d) for i, d in enumerate(yaml.load_all(text, Loader=_Loader), start=1) if d is not None]
        except yaml.YAMLError as error:
            raise RefusedError(f"{name}: not valid YAML: {_one_line(error)}") from error
        for number, content in documents:
            place = f"{name}, document {number}"
            if isinstance(content, dict) and isinstance(content.get("items"), list):
                for item_number, item in enumerate(content["items"], start=1):
                    yield _Document(f"{place}, item {item_number}", item)
            else:
                yield _Document(place, content)


def _files(paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        if path != "-" and Path(path).is_dir():
            inside = sorted(str(file) for file in Path(path).iterdir() if file.suffix in _SUFFIXES)
            if not inside:
                raise RefusedError(f"{path}: the folder has no file that ends in {', '.join(_SUFFIXES)}")
            yield from inside
        else:
            yield path


def _resource(place: str, version: str, kind: str, obj: dict[str, Any], namespace: str) -> Resource:
    if version != API_VERSION:
        raise RefusedError(f"{place}: apiVersion is {version}; accepted is {API_VERSION}")
    model = _BY_KIND.get(kind)
    if model is None:
        raise RefusedError(f"{place}: kind is {kind}; accepted are {', '.join(sorted(_BY_KIND))}")
    metadata = obj.get("metadata")
    if model.NAMESPACED and isinstance(metadata, dict):
        obj = obj | {"metadata": metadata | {"namespace": metadata.get("namespace") or namespace}}
    try:
        return model.parse(obj, strict=True)
    except ValidationError as error:
        name = metadata.get("name") if isinstance(metadata, dict) else None
        raise RefusedError(f"{place}: {kind} {name or '(no name)'}: {describe(error, model)}") from error


def _add(manifests: Manifests, resource: Resource) -> None:
    match resource:
        case LLMService():
            manifests.services.append(resource)
        case ModelProfile():
            manifests.profiles.append(resource)
        case GPUType():
            manifests.gpu_types.append(resource)
        case PowerDomain():
            manifests.power_domains.append(resource)
        case FleetPolicy():
            manifests.policy = resource


def _describe_one(error: dict[str, Any], kind: type[Resource]) -> str:
    field_path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    match error["type"]:
        case "missing":
            return f"{field_path} is required"
        case "extra_forbidden":
            known = _fields_at(kind, error["loc"][:-1])
            return f"{field_path} is no field" + (f"; accepted are {', '.join(known)}" if known else "")
        case "value_error":
            return f"{field_path}: {str(error['msg']).removeprefix('Value error, ')}"
        case "name_rule":
            return f"{field_path} is {shown(error['input'])}: {error['msg']}"
        case _:
            message = str(error["msg"]).removeprefix("Input should be ")
            return f"{field_path} is {shown(error['input'])}; accepted is {message[:1].lower()}{message[1:]}"


def _fields_at(kind: type[Resource], loc: tuple[str | int, ...]) -> list[str]:
    """The fields that the object at a place may have."""
    node = structural_schema(kind)
    for part in loc:
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return sorted(node.get("properties", {}))


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "not UTF-8 text"


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
