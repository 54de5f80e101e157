"""From a document's model to its JSON Schema (2020-12), for those who read the document without our code.

In flows a model of something that is written with `to_wire`, such as the `Plan`, or a union of them; out flows the
schema of what is written: camelCase, and an absent field where Python has None. A field that cannot be None is always
written, so it is required even if it has a default. Further fields are allowed where the model ignores them: a newer
version may add some under the same `schemaVersion`.
"""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from llmfleet.api.meta import ApiModel


class _AsWritten(GenerateJsonSchema):
    """pydantic's generator for what `to_wire` writes."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Without the default: it is for whoever writes a document, and this is for those who read one."""
        return self.generate_inner(schema["schema"])

    def field_is_required(
        self,
        field: core_schema.ModelField | core_schema.DataclassField | core_schema.TypedDictField,
        total: bool,
    ) -> bool:
        inner: Any = field["schema"]
        while inner["type"] in ("default", "function-after", "function-wrap", "function-before"):
            inner = inner["schema"]
        return bool(inner["type"] != "nullable")

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def document_schema(model: type[ApiModel] | TypeAdapter[Any]) -> dict[str, Any]:
    """The JSON Schema of a document that `model` writes, with the models' own descriptions."""
    adapter = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    schema = adapter.json_schema(by_alias=True, mode="serialization", schema_generator=_AsWritten)
    return {"$schema": GenerateJsonSchema.schema_dialect} | {
        key: _readable(key, value) for key, value in schema.items()
    }


def _readable(key: str, value: Any) -> Any:
    """Without the line breaks that descriptions have in the source, and without rules for Kubernetes' API server."""
    if isinstance(value, dict):
        return {k: _readable(k, v) for k, v in value.items() if not k.startswith("x-kubernetes-")}
    if isinstance(value, list):
        return [_readable("", item) for item in value]
    return " ".join(value.split()) if key == "description" and isinstance(value, str) else value
