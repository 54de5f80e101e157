"""What every llmfleet object shares: group and version, metadata, conditions, labels.

The models of this package are the only place where a field, its default and its documentation are written.
From them come the CRDs (`structural_schema`), the reference in `docs/`, and the validation of files that the
command line reads. Python names are snake_case with the unit in the name; on the wire they are camelCase, as
Kubernetes expects.

Unknown fields are ignored when an object is read (a newer CRD may carry fields that this version does not know);
the command line passes `extra="forbid"` so that a typing error in a file is not silently dropped.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

GROUP = "llmfleet.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"

LABEL_SERVICE = f"{GROUP}/service"
"""Name of the LLMService that a Deployment, pod or ConfigMap belongs to."""
LABEL_VARIANT = f"{GROUP}/variant"
"""Name of the variant that a Deployment or engine pod belongs to."""
LABEL_COMPONENT = f"{GROUP}/component"
"""What an object is: one of the COMPONENT_* values."""
LABEL_REVISION = f"{GROUP}/revision"
"""Weights of an engine pod: pods with the same value go on with each other's answers."""
COMPONENT_ENGINE = "engine"
COMPONENT_ROUTING = "routing"
ANNOTATION_DRAINING = f"{GROUP}/draining"
"""Present on an engine pod that gets no new requests because it is about to be removed."""
ANNOTATION_PLAN_ID = f"{GROUP}/plan-id"
ROUTING_KEY = "routing.json"
"""Key of the routing table in the service's ConfigMap."""
PLAN_KEY = "plan.json"
"""Key of the service's own part of the plan (`ServicePlan`) in the same ConfigMap: the operator's memory."""

MIGRATION_PORT_NAME = "migration"
"""Name of the container port at which the plug-in of an engine pod is asked for migrations; absent: it has none."""
PEER_KEY = "peer-key"
"""Key, in the Secret that a routing table names, of what a service's engines and gateways share."""

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""A DNS label, as Kubernetes wants it for names that become label values and parts of other names."""

Name = Annotated[str, Field(max_length=63, pattern=NAME_PATTERN)]


class ApiModel(BaseModel):
    """Base of every model: camelCase on the wire, immutable in Python."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    def to_wire(self) -> dict[str, Any]:
        """The object as it goes to the API server or a file: camelCase, absent instead of null."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Rule:
    """A rule in CEL that the API server checks at admission."""

    rule: str
    """CEL expression over `self`; an object for which it is false is refused."""
    message: str
    """What is accepted."""
    got: tuple[str, ...] = ()
    """What was given instead: a text with a %s for each of the CEL expressions that follow it."""
    field: str = ""
    """Path below `self` of the field to blame, such as `.max`; empty: `self`."""

    def to_wire(self) -> dict[str, str]:
        """The rule as an item of `x-kubernetes-validations`."""
        wire = {"rule": self.rule, "message": self.message}
        if self.got:
            # format(), because the API server takes string() and + for too costly: they have no bound on the length.
            text, *values = self.got
            wire["messageExpression"] = f"{json.dumps(f'{self.message}, got {text}')}.format([{', '.join(values)}])"
        if self.field:
            wire["fieldPath"] = self.field
        return wire


def cel(*rules: Rule) -> dict[str, Any]:
    """`json_schema_extra` for a model or field: rules that the API server checks at admission."""
    return {"x-kubernetes-validations": [rule.to_wire() for rule in rules]}


class UniqueBy:
    """Annotation of a list: no two items share these fields; without fields, no two items are equal.

    `Annotated[list[Volume], UniqueBy("name")]` is checked here for files, and by the API server, which then also
    merges the list by these fields under server-side apply. Fields are wire names, required or with a default.
    """

    def __init__(self, *fields: str) -> None:
        self._fields = fields

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._refuse_duplicates, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(schema)
        if not self._fields:
            return described | {"x-kubernetes-list-type": "set"}
        return described | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(self._fields)}

    def _refuse_duplicates(self, items: list[Any]) -> list[Any]:
        seen = set()
        for item in items:
            wire = item.to_wire() if isinstance(item, ApiModel) else item
            key = tuple(wire[field] for field in self._fields) if self._fields else wire
            if key in seen:
                described = ", ".join(map(str, key)) if isinstance(key, tuple) else key
                raise ValueError(f"duplicate {', '.join(self._fields) or 'item'}: {described}")
            seen.add(key)
        return items


class ObjectMeta(ApiModel):
    """The part of Kubernetes' ObjectMeta that llmfleet reads."""

    model_config = ConfigDict(extra="ignore")

    name: str
    namespace: str | None = None
    uid: str = ""
    generation: int = 0
    resource_version: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None


class Condition(ApiModel):
    """A status condition of the standard Kubernetes kind."""

    type: str = Field(max_length=63)
    """Name of the condition in CamelCase."""
    status: Literal["True", "False", "Unknown"]
    """Whether the condition holds."""
    reason: str = Field(max_length=63)
    """Machine-readable cause in CamelCase."""
    message: str = Field(default="", max_length=4096)
    """What happened, to which field or object, and what to do about it."""
    observed_generation: int = Field(default=0, ge=0)
    """Generation of the spec that this condition speaks of."""
    last_transition_time: datetime
    """When `status` last changed."""


CONDITION_ACCEPTED = "Accepted"
"""Of every kind but LLMService: the object parses, and counts."""
Conditions = Annotated[list[Condition], UniqueBy("type"), Field(default_factory=list, max_length=16)]


class Resource(ApiModel):
    """Base of the custom resources. Subclasses set the class variables that the CRD is generated from."""

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ()
    NAMESPACED: ClassVar[bool] = True
    PRINTER_COLUMNS: ClassVar[tuple[PrinterColumn, ...]] = ()
    NAME_RULE: ClassVar[tuple[str, str] | None] = None
    """A regular expression that metadata.name must match, and the message that says so."""

    api_version: str = API_VERSION
    kind: str = ""
    metadata: ObjectMeta

    @property
    def key(self) -> str:
        """`namespace/name`, or the bare name of a cluster-scoped object."""
        meta = self.metadata
        return f"{meta.namespace}/{meta.name}" if self.NAMESPACED else meta.name

    @classmethod
    def parse(cls, obj: dict[str, Any], *, strict: bool = False) -> Self:
        """Reads an object as the API server or a file gives it.

        Raises pydantic.ValidationError, whose errors name field, value and what is accepted. `strict` also refuses
        what the API server would: unknown fields, numbers written as text, names that break NAME_RULE. Of the
        metadata it reads only what llmfleet knows, so the output of `kubectl get -o yaml` is a valid file.
        """
        if not strict:
            return cls.model_validate(obj)
        metadata = obj.get("metadata")
        if isinstance(metadata, dict):
            known = {field.alias for field in ObjectMeta.model_fields.values()}
            obj = obj | {"metadata": {name: value for name, value in metadata.items() if name in known}}
        resource = cls.model_validate_json(json.dumps(obj), strict=True, extra="forbid")
        if cls.NAME_RULE is not None and not re.fullmatch(cls.NAME_RULE[0], resource.metadata.name):
            error = InitErrorDetails(
                type=PydanticCustomError("name_rule", "{rule}", {"rule": cls.NAME_RULE[1]}),
                loc=("metadata", "name"),
                input=resource.metadata.name,
            )
            raise ValidationError.from_exception_data(cls.KIND, [error])
        return resource


class PrinterColumn(BaseModel):
    """One column of `kubectl get`. `priority` 1 shows it only with `-o wide`."""

    model_config = ConfigDict(frozen=True)

    name: str
    type: Literal["string", "integer", "number", "boolean", "date"]
    json_path: str
    priority: int = 0
    description: str = ""
