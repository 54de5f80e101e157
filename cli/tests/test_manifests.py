"""Files are read as strictly as the API server reads objects, and each refusal says where, what and what instead."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from llmfleet.cli.manifests import read_manifests
from llmfleet.cli.refused import RefusedError

GPU_TYPE = """apiVersion: llmfleet.io/v1alpha1
kind: GPUType
metadata: {name: l4}
spec: {resourceName: nvidia.com/gpu, memoryGib: 24, pricePerHour: {onDemand: 0.7}}
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A copy of fleet.yaml that a test may change."""
    copy = tmp_path / "fleet.yaml"
    copy.write_text(Path(__file__).with_name("fleet.yaml").read_text())
    return copy


def refusal(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(RefusedError) as refused:
        read_manifests([str(path)])
    return str(refused.value)


def test_objects_of_every_kind_are_sorted_and_others_are_passed_over(fleet: Path) -> None:
    manifests = read_manifests([str(fleet)])
    assert [service.key for service in manifests.services] == ["team/chat"]
    assert [profile.key for profile in manifests.profiles] == ["team/small"]
    assert [gpu_type.key for gpu_type in manifests.gpu_types] == ["slow", "fast"]
    assert manifests.policy is None


def test_a_folder_is_read_without_what_is_below_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GPU_TYPE)
    (tmp_path / "notes.md").write_text("not: [yaml")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.yaml").write_text(GPU_TYPE)
    assert [gpu_type.key for gpu_type in read_manifests([str(tmp_path)]).gpu_types] == ["l4"]


def test_json_and_lists_are_read(tmp_path: Path) -> None:
    items = [yaml.safe_load(GPU_TYPE)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    assert [gpu_type.key for gpu_type in read_manifests([str(path)]).gpu_types] == ["l4"]


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(GPU_TYPE))
    assert [gpu_type.key for gpu_type in read_manifests(["-"]).gpu_types] == ["l4"]


def test_what_kubectl_writes_is_read_back(tmp_path: Path) -> None:
    obj = yaml.safe_load(GPU_TYPE)
    obj["metadata"] |= {"creationTimestamp": "2026-01-01T00:00:00Z", "uid": "u", "managedFields": [{"manager": "m"}]}
    obj["status"] = {"allocatableDevices": 3, "observedGeneration": 1}
    path = tmp_path / "live.yaml"
    path.write_text("---\n" + yaml.safe_dump(obj).replace("'2026-01-01T00:00:00Z'", "2026-01-01T00:00:00Z"))
    assert read_manifests([str(path)]).gpu_types[0].status.allocatable_devices == 3


def test_an_object_without_namespace_gets_the_asked_one(fleet: Path) -> None:
    fleet.write_text(fleet.read_text().replace(", namespace: team", ""))
    assert read_manifests([str(fleet)], namespace="other").services[0].key == "other/chat"
    assert read_manifests([str(fleet)]).services[0].key == "default/chat"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("onDemand: 0.7", "onDemand: -1"), ["spec.pricePerHour.onDemand", "-1", "greater than or equal to 0"]),
        (("memoryGib: 24", "memoryGib: 24GB"), ["spec.memoryGib", '"24GB"', "valid number"]),
        (("memoryGib: 24, ", ""), ["spec.memoryGib is required"]),
        (("memoryGib: 24", "memoryGiB: 24"), ["spec.memoryGiB is no field", "memoryGib"]),
        (("{onDemand: 0.7}", "{onDemand: 0.7, spt: 1}"), ["spec.pricePerHour.spt is no field", "onDemand, spot"]),
        (("spec: {", "spec: {capacityClass: spot, "), ["spec", "pricePerHour.spot is required"]),
        (("spec: {", "spec: {capacityClass: cheap, "), ["spec.capacityClass", '"cheap"', "'onDemand' or 'spot'"]),
        (("name: l4", "name: L4"), ["metadata.name", '"L4"', "DNS label of at most 40"]),
        (("v1alpha1", "v2"), ["apiVersion is llmfleet.io/v2", "llmfleet.io/v1alpha1"]),
        (("kind: GPUType", "kind: GPU"), ["kind is GPU", "FleetPolicy, GPUType, LLMService, ModelProfile"]),
        (("kind: GPUType\n", ""), ["apiVersion and kind are required"]),
        (("memoryGib: 24", "memoryGib: 24, memoryGib: 48"), ["line 4", "'memoryGib' is given twice"]),
        (("spec: {", "spec: {{"), ["not valid YAML", "line 5"]),
    ],
)
def test_a_mistake_is_refused_with_place_field_value_and_what_is_accepted(
    tmp_path: Path, change: tuple[str, str], named: list[str]
) -> None:
    path = tmp_path / "mistake.yaml"
    before, after = change
    assert before in GPU_TYPE
    message = refusal(path, GPU_TYPE.replace(before, after))
    assert message.startswith(str(path))
    for text in named:
        assert text in message
    assert "\n" not in message


def test_the_document_is_counted(tmp_path: Path) -> None:
    message = refusal(tmp_path / "two.yaml", f"{GPU_TYPE}---\n{GPU_TYPE.replace('l4', 'L40')}")
    assert "document 2: GPUType L40" in message


def test_an_object_given_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GPU_TYPE)
    (tmp_path / "b.yaml").write_text(GPU_TYPE)
    with pytest.raises(RefusedError, match=r"b\.yaml.*GPUType l4 is given twice, first in .*a\.yaml"):
        read_manifests([str(tmp_path)])


def test_many_mistakes_are_cut_short(tmp_path: Path) -> None:
    message = refusal(tmp_path / "many.yaml", GPU_TYPE.replace("spec: {", "spec: {a: 1, b: 1, c: 1, d: 1, e: 1, "))
    assert message.endswith("and 2 more")


@pytest.mark.parametrize("missing", ["nowhere.yaml", "empty"])
def test_a_path_that_holds_nothing_is_refused(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RefusedError, match=missing):
        read_manifests([str(tmp_path / missing)])
