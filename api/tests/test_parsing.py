"""How objects are read: leniently from the API server, which has checked them, and strictly from files."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llmfleet.api import FleetPolicy, GPUType, LLMService, ModelProfile, Resource
from llmfleet.api.pod import PodOverlay


def gpu_type(**spec: Any) -> dict[str, Any]:
    required = {"resourceName": "nvidia.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": 0.7}}
    return {
        "apiVersion": "llmfleet.io/v1alpha1",
        "kind": "GPUType",
        "metadata": {"name": "l4"},
        "spec": required | spec,
    }


def profile(**spec: Any) -> dict[str, Any]:
    required = {
        "model": "org/model",
        "weightsGib": 1,
        "kvKibPerToken": 1,
        "buckets": {"inputTokens": [10, 20], "outputTokens": [10]},
    }
    return {"kind": "ModelProfile", "metadata": {"name": "p"}, "spec": required | spec}


def refusal(kind: type[Resource], obj: dict[str, Any], *, strict: bool = True) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        kind.parse(obj, strict=strict)
    error = caught.value.errors()[0]
    return ".".join(map(str, error["loc"])), error["msg"]


def test_an_unknown_field_is_ignored_from_the_server_and_refused_in_a_file() -> None:
    obj = gpu_type(memoryGiB=24)
    assert GPUType.parse(obj).spec.memory_gib == 24
    assert refusal(GPUType, obj)[0] == "spec.memoryGiB"


def test_a_number_written_as_text_is_refused_in_a_file_as_the_server_would() -> None:
    assert refusal(GPUType, gpu_type(memoryGib="24"))[0] == "spec.memoryGib"


def test_metadata_that_only_kubernetes_reads_is_accepted_in_a_file() -> None:
    obj = gpu_type()
    obj["metadata"] |= {"managedFields": [{}], "creationTimestamp": "2026-01-01T00:00:00Z"}
    parsed = GPUType.parse(obj, strict=True)
    assert parsed.metadata.creation_timestamp is not None


@pytest.mark.parametrize("name", ["Upper", "-dash", "a" * 41, "dot.ted", "new\n"])
def test_a_name_that_cannot_become_a_label_is_refused(name: str) -> None:
    obj = gpu_type()
    obj["metadata"]["name"] = name
    field, message = refusal(GPUType, obj)
    assert field == "metadata.name"
    assert "DNS label" in message


def test_the_policy_has_one_name() -> None:
    assert refusal(FleetPolicy, {"metadata": {"name": "other"}})[0] == "metadata.name"
    assert FleetPolicy.parse({"metadata": {"name": "default"}}, strict=True).spec.utilization_target == 0.9


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_json_cannot_hold_are_refused(number: float) -> None:
    assert refusal(GPUType, gpu_type(memoryGib=number))[0] == "spec.memoryGib"


def test_spot_capacity_needs_a_spot_price() -> None:
    assert "pricePerHour.spot is required" in refusal(GPUType, gpu_type(capacityClass="spot"))[1]


def test_a_spot_device_costs_its_spot_price() -> None:
    spot = gpu_type(capacityClass="spot", pricePerHour={"onDemand": 1.0, "spot": 0.4})
    assert GPUType.parse(spot).spec.device_price_per_hour == 0.4
    assert GPUType.parse(gpu_type(pricePerHour={"onDemand": 1.0, "spot": 0.4})).spec.device_price_per_hour == 1.0


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "duplicate name: A"),
        (
            {"volumes": [{"name": "v", "emptyDir": {}}, {"name": "v", "secret": {"secretName": "s"}}]},
            "duplicate name: v",
        ),
        (
            {"volumeMounts": [{"name": "v", "mountPath": "/a"}, {"name": "w", "mountPath": "/a"}]},
            "duplicate mountPath: /a",
        ),
        ({"imagePullSecrets": ["s", "s"]}, "duplicate item: s"),
        ({"volumes": [{"name": "v", "emptyDir": {}, "hostPath": {"path": "/"}}]}, "exactly one of"),
        ({"env": [{"name": "A"}]}, "exactly one of value and valueFromSecret"),
    ],
)
def test_an_ambiguous_overlay_is_refused(overlay: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PodOverlay.model_validate(overlay)


def test_two_measurements_of_one_variant_are_refused() -> None:
    latency = {"p50": 1, "p90": 1, "p95": 1, "p99": 1, "max": 1}
    point: dict[str, Any] = {"inputTokens": 10, "outputTokens": 10, "concurrency": 1}
    point |= {"requests": 9, "requestsPerSecond": 1.0}
    point |= {"ttftMs": latency, "tpotMs": latency}
    explicit = {"gpuType": "l4", "tensorParallel": 1, "points": [point]}
    by_default = {"gpuType": "l4", "points": [point]}
    _, message = refusal(ModelProfile, profile(measurements=[explicit, by_default]))
    assert "duplicate gpuType, tensorParallel, pipelineParallel, configuration: l4, 1, 1, default" in message
    assert refusal(ModelProfile, profile(measurements=[explicit | {"points": [point, point]}]))[1].endswith("10, 10, 1")


@pytest.mark.parametrize("edges", [[], [20, 10], [10, 10], [0, 10]])
def test_bucket_edges_ascend(edges: list[int]) -> None:
    field, _ = refusal(ModelProfile, profile(buckets={"inputTokens": edges, "outputTokens": [10]}))
    assert field.startswith("spec.buckets")


def test_the_wire_form_is_read_back_as_the_same_object() -> None:
    service = LLMService.parse(
        {
            "kind": "LLMService",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": {
                "model": {"name": "org/model", "contextLength": 4096},
                "profile": "p",
                "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50, "percentile": 99}},
                "gpuTypes": ["l4", "h100"],
            },
        },
        strict=True,
    )
    wire = service.to_wire()
    assert LLMService.parse(wire) == service
    assert wire["spec"]["objective"]["ttft"]["percentile"] == 95
    assert "max" not in wire["spec"]["replicas"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "name"), "--trust-remote-code"),
        (("model", "name"), "org/-model"),
        (("model", "revision"), "--port"),
        (("model", "servedName"), "-x"),
        (("model", "servedName"), "two words"),
        (("traffic", "requestsPerSecond"), 1e308),
        (("traffic", "sizes"), [{"inputTokens": 1, "outputTokens": 1, "share": 1e308}]),
        (("podOverlay", "runAsUser"), 2**31),
    ],
)
def test_values_that_would_break_the_engine_or_the_solve_are_refused(path: tuple[str, str], value: object) -> None:
    spec = {
        "model": {"name": "org/model", "contextLength": 4096},
        "profile": "llama-3.1-8b",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
    }
    obj = {"metadata": {"name": "chat", "namespace": "ns"}, "spec": spec}
    assert LLMService.parse(obj, strict=True).spec.profile == "llama-3.1-8b"
    section, field = path
    spec[section] = {**spec.get(section, {}), field: value}  # type: ignore[dict-item]
    with pytest.raises(ValidationError, match=field):
        LLMService.parse(obj, strict=True)


@pytest.mark.parametrize("name", ["cpu", "Nvidia.com/gpu", "nvidia.com/", "nvidia.com/gpu/one"])
def test_a_resource_that_is_no_extended_one_is_refused(name: str) -> None:
    spec = {"resourceName": name, "memoryGib": 24, "pricePerHour": {"onDemand": 1}}
    with pytest.raises(ValidationError, match="resourceName"):
        GPUType.parse({"metadata": {"name": "l4"}, "spec": spec}, strict=True)
