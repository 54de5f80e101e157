"""Where the number of devices comes from when there is no cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from llmfleet.api import GPUType
from llmfleet.cli.devices import UNBOUNDED, devices, parse_inventory
from llmfleet.cli.manifests import Manifests
from llmfleet.cli.refused import RefusedError

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def gpu_type(name: str, *, status: dict[str, Any] | None = None, **spec: Any) -> GPUType:
    required = {"resourceName": f"example.com/{name}", "memoryGib": 24, "pricePerHour": {"onDemand": 1}}
    return GPUType.parse({"metadata": {"name": name}, "spec": required | spec, "status": status or {}}, strict=True)


def node(name: str, **allocatable: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "status": {
            "conditions": [{"type": "Ready", "status": "True"}],
            "allocatable": {f"example.com/{resource}": count for resource, count in allocatable.items()},
        },
    }


def test_stated_devices_count_and_what_may_be_provisioned_comes_on_top() -> None:
    types = [gpu_type("l4"), gpu_type("h100", provisionable={"devices": 3}), gpu_type("a100")]
    counted = devices(Manifests(gpu_types=types), "l4=8,h100=2", NOW)
    assert counted.count == {"l4": 8, "h100": 5, "a100": 0}


def test_nodes_are_counted_as_the_operator_counts_them_less_pods_of_others() -> None:
    foreign = {
        "metadata": {"name": "theirs", "namespace": "x"},
        "spec": {"nodeName": "n1", "containers": [{"resources": {"requests": {"example.com/l4": "1"}}}]},
        "status": {"phase": "Running"},
    }
    not_ready = node("n3", l4="100") | {"status": {"allocatable": {"example.com/l4": "100"}}}
    files = Manifests(
        gpu_types=[gpu_type("l4")], nodes=[node("n1", l4="4"), node("n2", l4="2"), not_ready], pods=[foreign]
    )
    assert devices(files, None, NOW).count == {"l4": 5}


def test_status_is_what_an_operator_saw_last() -> None:
    status = {"observedGeneration": 1, "allocatableDevices": 6, "foreignDevices": 2, "availableDevices": 4}
    types = [gpu_type("l4", status=status), gpu_type("new", provisionable={"devices": 1})]
    assert devices(Manifests(gpu_types=types), None, NOW).count == {"l4": 4, "new": 1}


def test_capacity_that_is_unavailable_counts_no_further_than_it_is_used() -> None:
    status = {"observedGeneration": 1, "allocatableDevices": 6, "availableDevices": 6, "fleetDevices": 2}
    blocked = gpu_type("l4", status=status | {"unavailableUntil": "2026-01-01T00:01:00Z"})
    assert devices(Manifests(gpu_types=[blocked]), None, NOW).count == {"l4": 2}
    over = datetime(2026, 1, 1, 0, 2, tzinfo=UTC)
    assert devices(Manifests(gpu_types=[blocked]), None, over).count == {"l4": 6}


def test_without_any_number_there_are_as_many_as_needed_and_that_is_said() -> None:
    counted = devices(Manifests(gpu_types=[gpu_type("l4")]), None, NOW)
    assert counted.count == {"l4": UNBOUNDED}
    assert "as many devices as needed" in counted.source


def test_an_inventory_file_says_the_same_as_the_option(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text("l4: 8\nh100: 2\n")
    assert parse_inventory(str(path), known=["h100", "l4"]) == parse_inventory("l4=8,h100=2", known=["h100", "l4"])


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ("l5=8", ["l5 is no GPUType", "known are l4"]),
        ("l4=-1", ["l4", '"-1"', "0 or more"]),
        ("l4=two", ["l4", '"two"']),
        ("l4=1,l4=2", ["named twice"]),
        ("nowhere.yaml", ["nowhere.yaml", "type=n"]),
    ],
)
def test_an_inventory_that_makes_no_sense_is_refused(stated: str, named: list[str]) -> None:
    with pytest.raises(RefusedError) as refused:
        parse_inventory(stated, known=["l4"])
    for text in named:
        assert text in str(refused.value)


@pytest.mark.parametrize("content", ["[1]", "l4: 1.5", "l4: true", "l4: {"])
def test_an_inventory_file_that_is_no_map_of_numbers_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text(content)
    with pytest.raises(RefusedError, match=r"inventory\.yaml"):
        parse_inventory(str(path), known=["l4"])
