"""The published schema of a document says what is written, no more and no less."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from pydantic import Field

from llmfleet.api import Plan
from llmfleet.api.document_schema import document_schema
from llmfleet.api.meta import ApiModel


class Part(ApiModel):
    """A part
    in two lines."""

    some_count: int = Field(default=3, ge=1)
    """How many."""
    watts_or_none: float | None = None
    """Absent where not known."""


class Whole(ApiModel):
    """A document."""

    parts: list[Part] = Field(default_factory=list)
    """Its parts."""


def test_what_is_always_written_is_required_and_what_may_be_absent_is_not() -> None:
    schema = document_schema(Whole)
    assert schema["required"] == ["parts"]
    part = schema["$defs"]["Part"]
    assert part["required"] == ["someCount"]
    assert part["properties"]["wattsOrNone"]["type"] == "number"
    assert part["properties"]["someCount"] == {"type": "integer", "minimum": 1, "description": "How many."}
    assert part["description"] == "A part in two lines."


@pytest.mark.parametrize("part", [Part(), Part(some_count=1, watts_or_none=2.5)])
def test_a_written_document_is_valid(part: Part) -> None:
    jsonschema.validate(Whole(parts=[part]).to_wire(), document_schema(Whole))


@pytest.mark.parametrize(
    "document",
    [{}, {"parts": [{}]}, {"parts": [{"someCount": 0}]}, {"parts": [{"someCount": 1, "wattsOrNone": None}]}],
)
def test_a_document_that_nobody_writes_is_not(document: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, document_schema(Whole))


def test_the_schema_of_the_plan_is_one_that_validators_accept_and_leaves_room_for_more_fields() -> None:
    schema = document_schema(Plan)
    jsonschema.Draft202012Validator.check_schema(schema)
    smallest = Plan(plan_id="0", status="optimal", stopped_by="gap", solve_seconds=0.1, cost_per_hour=0.0).to_wire()
    jsonschema.validate(smallest, schema)
    jsonschema.validate(copy.deepcopy(smallest) | {"later": 1}, schema)
    assert "x-kubernetes" not in str(schema)
