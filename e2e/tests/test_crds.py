"""The generated CRDs as the real API server understands them."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import Cluster, ClusterError
from llmfleet.api import KINDS, GPUType, LLMService

pytestmark = pytest.mark.cluster

CRDS = Path(__file__).resolve().parents[2] / "crds"
SERVED_DEADLINE_S = 30
SERVICE = {
    "apiVersion": "llmfleet.io/v1alpha1",
    "kind": "LLMService",
    "metadata": {"name": "chat"},
    "spec": {
        "model": {"name": "org/model", "contextLength": 4096},
        "profile": "model",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
    },
}


@pytest.fixture(scope="module")
def fleet(control_plane: Cluster) -> Cluster:
    """The shared control plane with llmfleet's CRDs, current ones."""
    control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", CRDS)
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", CRDS)
    return control_plane


def apply(cluster: Cluster, namespace: str, document: dict[str, Any], *options: str) -> dict[str, Any]:
    text = yaml.safe_dump(document)
    answer = cluster.kubectl("apply", "--server-side", "-n", namespace, "-o", "json", *options, "-f", "-", stdin=text)
    stored: dict[str, Any] = json.loads(answer)
    return stored


def with_spec(**changes: Any) -> dict[str, Any]:
    return SERVICE | {"spec": {**SERVICE["spec"], **changes}}  # type: ignore[dict-item]


def until_served(cluster: Cluster, document: dict[str, Any], as_wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Waits until the API server answers by the CRD that it was given last: it changes over in the background."""
    deadline = time.monotonic() + SERVED_DEADLINE_S
    while not as_wanted(apply(cluster, "default", document, "--dry-run=server")["spec"]):
        assert time.monotonic() < deadline, f"the API server still serves the former CRD after {SERVED_DEADLINE_S} s"
        time.sleep(0.1)


def test_every_kind_is_served_under_its_short_name_and_its_category(fleet: Cluster) -> None:
    served = fleet.kubectl("api-resources", "--api-group=llmfleet.io", "--no-headers", "-o", "wide")
    rows = {line.split()[0]: line.split() for line in served.splitlines()}
    assert set(rows) == {kind.PLURAL for kind in KINDS}
    for kind in KINDS:
        assert rows[kind.PLURAL][1] == ",".join(kind.SHORT_NAMES)
        assert rows[kind.PLURAL][3] == str(kind.NAMESPACED).lower()
        assert rows[kind.PLURAL][-1] == "llmfleet"


def test_defaults_are_stored_and_are_those_of_the_models(fleet: Cluster, namespace: str) -> None:
    stored = apply(fleet, namespace, SERVICE)
    assert stored["spec"]["objective"]["ttft"]["percentile"] == 95
    assert stored["spec"]["traffic"] == {"mode": "observe", "burstiness": 1, "prefixCacheHitShare": 0}
    assert stored["spec"]["replicas"] == {"min": 0}
    assert "status" not in stored
    assert LLMService.parse(stored).spec == LLMService.parse(SERVICE, strict=True).spec


def test_an_unknown_field_is_refused_when_strict_and_dropped_otherwise(fleet: Cluster, namespace: str) -> None:
    misspelt = with_spec(priorty=5)
    with pytest.raises(ClusterError, match=r"spec\.priorty"):
        apply(fleet, namespace, misspelt)
    text = json.dumps(misspelt)
    path = f"/apis/llmfleet.io/v1alpha1/namespaces/{namespace}/llmservices"
    stored = json.loads(fleet.kubectl("create", f"--raw={path}", "-f", "-", stdin=text))
    assert "priorty" not in stored["spec"]


def test_a_volume_source_keeps_what_only_kubernetes_knows(fleet: Cluster, namespace: str) -> None:
    source = {"secretName": "s", "items": [{"key": "a", "path": "b", "mode": 256}]}
    volumes = [{"name": "v", "secret": source}]
    stored = apply(fleet, namespace, with_spec(podOverlay={"volumes": volumes}))
    assert stored["spec"]["podOverlay"]["volumes"] == volumes


def test_lists_with_keys_are_merged_by_them(fleet: Cluster, namespace: str) -> None:
    apply(fleet, namespace, with_spec(podOverlay={"env": [{"name": "A", "value": "1"}]}), "--field-manager=one")
    only_env = {key: SERVICE[key] for key in ("apiVersion", "kind", "metadata")}
    added = only_env | {"spec": {"podOverlay": {"env": [{"name": "B", "value": "2"}]}}}
    stored = apply(fleet, namespace, added, "--field-manager=two")
    assert [variable["name"] for variable in stored["spec"]["podOverlay"]["env"]] == ["A", "B"]


def test_kubectl_get_shows_what_was_decided_and_why(fleet: Cluster, namespace: str) -> None:
    apply(fleet, namespace, SERVICE)
    now = "2026-01-01T00:00:00Z"
    status = {
        "conditions": [
            {"type": "Ready", "status": "False", "reason": "EnginesStarting", "lastTransitionTime": now},
        ],
        "replicas": "l4 1/2",
        "costPerHour": 1.4,
        "costPerMillionTokens": 0.35,
        "nextBestCostPerHour": 2.1,
        "planId": "abc",
    }
    patch = json.dumps({"status": status})
    fleet.kubectl("patch", "llms", "chat", "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    header, row = fleet.kubectl("get", "llms", "-n", namespace, "-o", "wide").splitlines()
    assert header.split() == [
        "NAME", "READY", "REPLICAS", "COST/H", "COST/MTOK", "REASON", "NEXTBEST/H", "PLAN", "AGE",
    ]  # fmt: skip
    assert row.split()[:-1] == ["chat", "False", "l4", "1/2", "1.4", "0.35", "EnginesStarting", "2.1", "abc"]


def test_an_object_survives_an_upgrade_of_its_crd_in_place(fleet: Cluster, namespace: str) -> None:
    """The CRD of a version before a field existed, an object of that time, then today's CRD on top."""
    current = yaml.safe_load((CRDS / "gputypes.llmfleet.io.yaml").read_text())
    older = copy.deepcopy(current)
    spec = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["capacityClass"]
    spec["x-kubernetes-validations"] = [r for r in spec["x-kubernetes-validations"] if "spot" not in r["rule"]]
    older["spec"]["versions"][0]["additionalPrinterColumns"] = []
    name = f"old-{namespace}"
    gpu_type = {
        "apiVersion": "llmfleet.io/v1alpha1",
        "kind": "GPUType",
        "metadata": {"name": name},
        "spec": {"resourceName": "example.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": 1}},
    }
    try:
        fleet.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(older))
        until_served(fleet, gpu_type, lambda spec: "capacityClass" not in spec)
        before = apply(fleet, namespace, gpu_type)
        fleet.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(current))
        until_served(fleet, gpu_type, lambda spec: "capacityClass" in spec)
        upgraded = json.loads(fleet.kubectl("get", "gput", name, "-o", "json"))
        assert upgraded["metadata"]["uid"] == before["metadata"]["uid"]
        assert GPUType.parse(upgraded).spec == GPUType.parse(gpu_type, strict=True).spec
        changed = gpu_type | {"spec": {**gpu_type["spec"], "limit": 3}}  # type: ignore[dict-item]
        assert apply(fleet, namespace, changed)["spec"]["capacityClass"] == "onDemand"
    finally:
        fleet.kubectl("apply", "--server-side", "--force-conflicts", "-f", CRDS)
        fleet.kubectl("delete", "gput", name, "--ignore-not-found")
