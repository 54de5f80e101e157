"""From a resource class to its CustomResourceDefinition, as a dictionary.

pydantic describes a model in JSON Schema; the API server accepts only a *structural* schema, a subset of OpenAPI 3.0
in which every node says its type and nothing is shared. What differs, and is bridged here:

    JSON Schema of pydantic              structural schema
    $ref into $defs                      the definition in place (a field's own description wins, a list's likewise)
    anyOf [X, null]                      X: an absent field is absent, never null
    exclusiveMinimum: 0                  minimum: 0, exclusiveMinimum: true
    const                                enum of one
    default_factory                      its value, so that defaults are visible in the stored object
    dict[str, Any]                       x-kubernetes-preserve-unknown-fields
    title                                dropped

Rules in CEL, list types and map keys travel as `x-kubernetes-*` keywords that the models carry themselves. A keyword
that is not known to be accepted is an error here rather than a surprise at `kubectl apply`.

`status` has no defaults in the schema: it is what was observed, and nothing is observed by default.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, NoDefault
from pydantic_core import core_schema

from llmfleet.api.meta import GROUP, VERSION, PrinterColumn, Resource, Rule, cel

CATEGORY = "llmfleet"
"""`kubectl get llmfleet` lists every object of every kind."""

_KEPT = frozenset(
    {
        *("type", "format", "pattern", "enum", "minLength", "maxLength"),
        *("minimum", "maximum", "minItems", "maxItems", "minProperties", "maxProperties", "required"),
        *("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
    }
)


class UnstructuralError(ValueError):
    """A model uses something that a structural schema cannot express."""


class _WithoutNulls(GenerateJsonSchema):
    """pydantic's generator, less nulls and titles, plus the values of default factories."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def get_default_value(self, schema: core_schema.WithDefaultSchema) -> Any:
        """The default as it appears on the wire. Null and the empty list or map mean "absent": no default."""
        value = super().get_default_value(schema)
        if value is NoDefault and "default_factory" in schema:
            value = schema["default_factory"]()  # type: ignore[call-arg]
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return NoDefault if value in (None, [], {}) else value


def custom_resource_definition(kind: type[Resource]) -> dict[str, Any]:
    """The CustomResourceDefinition of a kind, ready for `kubectl apply`.

    Raises UnstructuralError, naming the field, if the model cannot be written as a structural schema.
    """
    has_status = "status" in kind.model_fields
    version: dict[str, Any] = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": structural_schema(kind)},
        "additionalPrinterColumns": [_column(column) for column in kind.PRINTER_COLUMNS],
    }
    if has_status:
        version["subresources"] = {"status": {}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind.KIND,
                "listKind": f"{kind.KIND}List",
                "plural": kind.PLURAL,
                "singular": kind.KIND.lower(),
                "shortNames": list(kind.SHORT_NAMES),
                "categories": [CATEGORY],
            },
            "scope": "Namespaced" if kind.NAMESPACED else "Cluster",
            "versions": [version],
        },
    }


def structural_schema(kind: type[Resource]) -> dict[str, Any]:
    """The structural schema of a kind's whole object. Raises UnstructuralError."""
    raw = kind.model_json_schema(by_alias=True, schema_generator=_WithoutNulls)
    definitions = raw.pop("$defs", {})
    parts = {
        name: _structural(raw["properties"][name], definitions, f"{kind.KIND}.{name}", defaults=name != "status")
        for name in raw["properties"]
        if name not in ("apiVersion", "kind", "metadata")
    }
    schema: dict[str, Any] = {
        "type": "object",
        "description": _one_line(raw["description"]),
        "required": [name for name in raw["required"] if name in parts],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            **parts,
        },
    }
    if not schema["required"]:
        del schema["required"]
    if kind.NAME_RULE is not None:
        pattern, message = kind.NAME_RULE
        rule = Rule(f"self.metadata.name.matches('{pattern}')", message, got=("%s", "self.metadata.name"))
        schema |= cel(rule)
    return schema


def _structural(
    node: dict[str, Any], definitions: dict[str, Any], path: str, *, defaults: bool, seen: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One node with everything below it. `seen` are the definitions around it: one inside itself has no end."""
    node = dict(node)
    if "$ref" in node:
        name = node.pop("$ref").removeprefix("#/$defs/")
        if name in seen:
            raise UnstructuralError(f"{path}: {name} contains itself")
        node = {**definitions[name], **node}
        seen = (*seen, name)

    def inner(child: dict[str, Any], suffix: str) -> dict[str, Any]:
        return _structural(child, definitions, path + suffix, defaults=defaults, seen=seen)

    schema: dict[str, Any] = {}
    for keyword, value in node.items():
        match keyword:
            case "title":
                pass
            case "description":
                schema["description"] = _one_line(value)
            case "default":
                if defaults:
                    schema["default"] = value
            case "const":
                schema["enum"] = [value]
            case "exclusiveMinimum":
                schema |= {"minimum": value, "exclusiveMinimum": True}
            case "exclusiveMaximum":
                schema |= {"maximum": value, "exclusiveMaximum": True}
            case "properties":
                schema["properties"] = {name: inner(child, f".{name}") for name, child in value.items()}
            case "items":
                # What a list holds is said once, by the list.
                schema["items"] = {k: v for k, v in inner(value, "[]").items() if k != "description"}
            case "additionalProperties" if value is True:
                schema["x-kubernetes-preserve-unknown-fields"] = True
            case "additionalProperties" if isinstance(value, dict):
                schema["additionalProperties"] = inner(value, ".*")
            case _ if keyword in _KEPT:
                schema[keyword] = deepcopy(value)
            case _:
                raise UnstructuralError(f"{path}: a structural schema has no {keyword}: {value!r}")
    if "type" not in schema:
        raise UnstructuralError(f"{path}: a structural schema needs a type, got {node!r}")
    if schema["type"] == "integer" and "maximum" not in schema:
        schema["format"] = "int64"
    if schema.get("default") == {} and "x-kubernetes-validations" in schema:
        # The API server checks the rules on this default before it fills in the defaults below it.
        fields = schema["properties"].items()
        schema["default"] = {name: field["default"] for name, field in fields if "default" in field}
    return {"type": schema.pop("type"), **schema}


def _column(column: PrinterColumn) -> dict[str, Any]:
    written: dict[str, Any] = {"name": column.name, "type": column.type, "jsonPath": column.json_path}
    if column.priority:
        written["priority"] = column.priority
    if column.description:
        written["description"] = column.description
    return written


def _one_line(text: str) -> str:
    """A docstring without the line breaks that only the source's width asked for; paragraphs stay apart."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
