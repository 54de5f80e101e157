"""What the API server will see of the models: complete, small, and with no keyword it does not know."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import ConfigDict, Field

from llmfleet.api import KINDS, GPUType, LLMService, Resource
from llmfleet.api.meta import ApiModel, Rule, UniqueBy, cel
from llmfleet.api.structural_schema import UnstructuralError, custom_resource_definition, structural_schema

ROOT = Path(__file__).resolve().parents[2]
LARGEST_CRD_BYTES = 30 * 1024
KEYWORDS = {
    *("type", "format", "description", "default", "enum", "pattern", "minLength", "maxLength", "required"),
    *("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minItems", "maxItems", "items"),
    *("minProperties", "maxProperties", "properties"),
    *("additionalProperties", "x-kubernetes-validations", "x-kubernetes-preserve-unknown-fields"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}


class Item(ApiModel):
    """An item."""

    model_config = ConfigDict(json_schema_extra=cel(Rule("self.size > 1", "size must exceed 1")))

    name: str = Field(max_length=10)
    """Name of the item,
    on two lines."""
    size: float = Field(default=2, gt=0, lt=100)
    raw: dict[str, Any] | None = None


class SampleSpec(ApiModel):
    """What a sample is."""

    item: Item = Field(default_factory=lambda: Item(name="a"))
    items: Annotated[list[Item], UniqueBy("name")] = Field(default_factory=list, max_length=3)
    words: list[str] = Field(default_factory=lambda: ["x", "y"])
    mode: Literal["only"] = "only"
    count: int | None = None
    must: int


class SampleStatus(ApiModel):
    """What was seen."""

    seen: int = 0


class Sample(Resource):
    """A sample.

    Second paragraph.
    """

    KIND: ClassVar[str] = "Sample"
    PLURAL: ClassVar[str] = "samples"
    spec: SampleSpec
    status: SampleStatus = Field(default_factory=SampleStatus)


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    schema: dict[str, Any] = structural_schema(Sample)
    return schema


@pytest.fixture(scope="module")
def spec(sample: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = sample["properties"]["spec"]["properties"]
    return properties


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from nodes(schema[keyword], f"{path}.{keyword}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_has_a_type_and_only_keywords_that_kubernetes_knows(kind: type[Resource]) -> None:
    for path, node in nodes(structural_schema(kind)):
        assert "type" in node, path
        assert node.keys() <= KEYWORDS, path


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_spec_and_status_says_what_it_means(kind: type[Resource]) -> None:
    schema = structural_schema(kind)
    for part in schema["properties"].keys() & {"spec", "status"}:
        for path, node in nodes(schema["properties"][part]):
            is_a_field = not path.endswith((".items", ".additionalProperties"))
            assert not is_a_field or node.get("description"), f"{kind.KIND}.{part}{path} has no docstring"


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_of_every_rule_says_what_was_given_unless_nothing_was(kind: type[Resource]) -> None:
    for path, node in nodes(structural_schema(kind)):
        for rule in node.get("x-kubernetes-validations", ()):
            assert "messageExpression" in rule or " is required where " in rule["message"], (path, rule)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crd_stays_below_thirty_kib(kind: type[Resource]) -> None:
    path = ROOT / "crds" / f"{kind.PLURAL}.llmfleet.io.yaml"
    assert path.stat().st_size < LARGEST_CRD_BYTES


def test_the_checked_in_files_are_current() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "crds" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_an_optional_field_is_absent_and_never_null(spec: dict[str, Any]) -> None:
    assert spec["count"] == {"type": "integer", "format": "int64"}


def test_exclusive_bounds_take_the_boolean_form(spec: dict[str, Any]) -> None:
    size = spec["item"]["properties"]["size"]
    assert (size["minimum"], size["exclusiveMinimum"]) == (0, True)
    assert (size["maximum"], size["exclusiveMaximum"]) == (100, True)


def test_defaults_of_factories_are_written_and_empty_ones_are_not(spec: dict[str, Any]) -> None:
    assert spec["words"]["default"] == ["x", "y"]
    assert "default" not in spec["items"]


def test_a_default_that_a_rule_looks_at_is_complete() -> None:
    traffic = structural_schema(LLMService)["properties"]["spec"]["properties"]["traffic"]
    assert traffic["default"] == {"mode": "observe", "burstiness": 1.0, "prefixCacheHitShare": 0.0}


def test_only_fields_without_default_are_required(sample: dict[str, Any]) -> None:
    assert sample["properties"]["spec"]["required"] == ["must"]
    assert sample["required"] == ["spec"]


def test_a_free_form_map_keeps_what_it_does_not_know(spec: dict[str, Any]) -> None:
    raw = spec["item"]["properties"]["raw"]
    assert raw == {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def test_a_single_literal_becomes_an_enum_of_one(spec: dict[str, Any]) -> None:
    assert spec["mode"]["enum"] == ["only"]


def test_rules_and_list_keys_reach_items_of_lists(spec: dict[str, Any]) -> None:
    assert spec["items"]["x-kubernetes-list-map-keys"] == ["name"]
    assert spec["items"]["items"]["x-kubernetes-validations"][0]["rule"] == "self.size > 1"


def test_status_is_a_subresource_without_defaults(sample: dict[str, Any]) -> None:
    assert "default" not in sample["properties"]["status"]
    assert "default" not in sample["properties"]["status"]["properties"]["seen"]
    assert custom_resource_definition(Sample)["spec"]["versions"][0]["subresources"] == {"status": {}}


def test_docstrings_lose_the_line_breaks_of_the_source_but_keep_paragraphs(
    sample: dict[str, Any], spec: dict[str, Any]
) -> None:
    assert spec["item"]["properties"]["name"]["description"] == "Name of the item, on two lines."
    assert sample["description"] == "A sample.\n\nSecond paragraph."


def test_limits_on_the_name_are_a_rule_over_the_whole_object() -> None:
    rule = structural_schema(GPUType)["x-kubernetes-validations"][0]["rule"]
    pattern = re.fullmatch(r"self\.metadata\.name\.matches\('(.*)'\)", rule)
    assert pattern is not None
    assert re.fullmatch(pattern[1], "a" * 40)
    assert not re.fullmatch(pattern[1], "a" * 41)


def test_names_and_scope_come_from_the_class() -> None:
    crd = custom_resource_definition(GPUType)
    assert crd["metadata"]["name"] == "gputypes.llmfleet.io"
    assert crd["spec"]["scope"] == "Cluster"
    assert crd["spec"]["names"]["shortNames"] == ["gput"]
    assert crd["spec"]["names"]["categories"] == ["llmfleet"]
    wide = [c["name"] for c in crd["spec"]["versions"][0]["additionalPrinterColumns"] if c.get("priority")]
    assert wide == ["Spot", "UnavailableUntil"]


def test_a_union_is_refused_with_the_field_that_has_it() -> None:
    class UnionSpec(ApiModel):
        """A union."""

        either: int | str = 1

    class Union(Resource):
        """A union."""

        KIND: ClassVar[str] = "Union"
        spec: UnionSpec

    with pytest.raises(UnstructuralError, match=r"Union\.spec\.either.*anyOf"):
        structural_schema(Union)


class Tree(ApiModel):
    """A tree."""

    children: list[Tree] = Field(default_factory=list)


def test_a_recursive_model_is_refused_with_its_name() -> None:
    class Forest(Resource):
        """A forest."""

        KIND: ClassVar[str] = "Forest"
        spec: Tree

    with pytest.raises(UnstructuralError, match="Tree contains itself"):
        structural_schema(Forest)
