"""Engine pods get the plug-in where it can be of use, and start as before where it cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmfleet.api import Configuration, GPUType, LLMService
from llmfleet.api.meta import LABEL_REVISION
from llmfleet.migration.engine_arguments import SCHEDULERS, WORKERS, read_settings
from llmfleet.operator.engine_variant import Variant
from llmfleet.operator.migration import is_equipped, peer_key_secret, why_not
from llmfleet.operator.model import PluginPackage
from llmfleet.operator.overlay import merge_overlays
from llmfleet.operator.render import inputs_hash, render_template

PACKAGE = PluginPackage("llmfleet-engine-0123", b"")
SLOW = Variant("slow", "slow", 1)


def gpu_type(resource: str = "example.com/slow", **spec: Any) -> GPUType:
    body = {"resourceName": resource, "memoryGib": 24, "pricePerHour": {"onDemand": 1}, **spec}
    return GPUType.parse({"metadata": {"name": "slow"}, "spec": body})


def llm_service(model: dict[str, Any] | None = None, **spec: Any) -> LLMService:
    body = {
        "model": {"name": "org/model", "contextLength": 4096, **(model or {})},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        **spec,
    }
    return LLMService.parse({"metadata": {"name": "chat", "namespace": "ns", "uid": "0123456789"}, "spec": body})


def template(service: LLMService, kind: GPUType | None = None, variant: Variant = SLOW) -> dict[str, Any]:
    return render_template(service, kind or gpu_type(), variant, PACKAGE)


def engine(service: LLMService, kind: GPUType | None = None, variant: Variant = SLOW) -> dict[str, Any]:
    container = template(service, kind, variant)["spec"]["containers"][0]
    assert isinstance(container, dict)
    return container


def test_the_engines_own_command_comes_whole_behind_the_launcher() -> None:
    service = llm_service(engine={"command": ["/venv/bin/vllm", "serve"], "args": ["--seed=1"]})
    plain = render_template(service, gpu_type(), SLOW)["spec"]["containers"][0]
    with_it = engine(service)
    assert with_it["command"][:3] == ["/venv/bin/python3", "-m", "llmfleet.engine.launch"]
    assert with_it["command"][-1] == "--"
    assert with_it["args"] == [*plain["command"], *plain["args"]]
    handlers = [container["lifecycle"]["preStop"]["exec"]["command"] for container in (with_it, plain)]
    assert handlers[0] == [*handlers[1][:-1], "http://127.0.0.1:7069/metrics", handlers[1][-1]]


def test_the_launcher_is_given_arguments_that_the_plug_in_reads_back() -> None:
    command = engine(llm_service())["command"]
    words = json.loads(command[command.index("--arguments") + 1])
    assert words[words.index("--scheduler-cls") + 1] == SCHEDULERS[False]
    assert words[words.index("--worker-cls") + 1] == WORKERS["cpu"]
    settings = read_settings(json.loads(words[words.index("--additional-config") + 1]))
    assert settings.listen == "$(LLMFLEET_POD_IP):7070"
    assert settings.peer_key_file == command[command.index("--peer-key-file") + 1] == "/llmfleet/peer-key"
    assert settings.data_listen == "$(LLMFLEET_POD_IP):7071"


def test_the_control_port_has_a_name_and_every_rank_a_port() -> None:
    ports = {
        port["name"]: port["containerPort"] for port in engine(llm_service(), variant=Variant("s", "slow", 2))["ports"]
    }
    assert ports == {"http": 8000, "migration": 7070, "plug-in-metrics": 7069, "blocks-0": 7071, "blocks-1": 7072}


def test_plug_in_and_key_are_mounted_read_only_and_the_key_may_be_missing() -> None:
    rendered = template(llm_service())
    mount = rendered["spec"]["containers"][0]["volumeMounts"][-1]
    assert mount == {"name": "llmfleet", "mountPath": "/llmfleet", "readOnly": True}
    volume = rendered["spec"]["volumes"][-1]
    code, key = volume["projected"]["sources"]
    assert code == {"configMap": {"name": PACKAGE.name, "items": [{"key": "plug-in.zip", "path": "plug-in.zip"}]}}
    assert key["secret"]["name"] == peer_key_secret(llm_service()) == "chat-peer-key-01234567"
    assert key["secret"]["optional"] is True


def test_a_pod_with_the_plug_in_is_as_restricted_as_one_without() -> None:
    service = llm_service()
    plain, with_it = render_template(service, gpu_type(), SLOW)["spec"], template(service)["spec"]
    assert with_it["securityContext"] == plain["securityContext"]
    assert with_it["containers"][0]["securityContext"] == plain["containers"][0]["securityContext"]
    assert {next(iter(volume.keys() - {"name"})) for volume in with_it["volumes"]} == {"emptyDir", "projected"}
    assert "initContainers" not in with_it


def test_a_python_path_of_the_overlay_stays_behind_ours() -> None:
    overlay = {"env": [{"name": "PYTHONPATH", "value": "/opt/mine"}, {"name": "A", "value": "b"}]}
    env = {variable["name"]: variable for variable in engine(llm_service(podOverlay=overlay))["env"]}
    assert env["PYTHONPATH"]["value"] == "/llmfleet/plug-in.zip:/opt/mine"
    assert env["A"]["value"] == "b"
    assert env["LLMFLEET_POD_IP"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


FP8 = Configuration.model_validate({"name": "fp8", "quantization": "fp8", "weightsGib": 8})
FROM_SECRET = {"name": "PYTHONPATH", "valueFromSecret": {"name": "s", "key": "k"}}
AT_OURS = {
    "volumes": [{"name": "mine", "configMap": {"name": "c"}}],
    "volumeMounts": [{"name": "mine", "mountPath": "/llmfleet/mine"}],
}


@pytest.mark.parametrize(
    ("spec", "kind", "variant", "reason", "said"),
    [
        ({}, gpu_type("nvidia.com/gpu"), SLOW, "DeviceMemory", "nvidia.com/gpu"),
        ({}, gpu_type("gpu.intel.com/i915"), SLOW, "DeviceMemory", "gpu.intel.com/i915"),
        ({}, gpu_type(), Variant("s", "slow", 1, 2), "PipelineStages", "2 pipeline stages"),
        ({"engine": {"command": ["/start.sh"]}}, gpu_type(), SLOW, "EngineCommand", "'/start.sh'"),
        ({"engine": {"args": ["--scheduler_cls=x.Y"]}}, gpu_type(), SLOW, "EngineArguments", "--scheduler_cls=x.Y"),
        ({"engine": {"args": ["--worker-cls", "x.Y"]}}, gpu_type(), SLOW, "EngineArguments", "--worker-cls"),
        ({"engine": {"args": ["--additional-config.a=1"]}}, gpu_type(), SLOW, "EngineArguments", "--additional-config"),
        ({"engine": {"args": ["--distributed-executor-backend", "ray"]}}, gpu_type(), SLOW, "EngineArguments", "'ray'"),
        ({"podOverlay": {"env": [FROM_SECRET]}}, gpu_type(), SLOW, "PodOverlay", "PYTHONPATH"),
        ({"podOverlay": AT_OURS}, gpu_type(), SLOW, "PodOverlay", "/llmfleet/mine"),
        ({"podOverlay": {"volumes": [{"name": "llmfleet", "emptyDir": {}}]}}, gpu_type(), SLOW, "PodOverlay", "name"),
    ],
)
def test_where_it_could_be_of_no_use_or_in_the_way_the_pod_is_as_without_it(
    spec: dict[str, Any], kind: GPUType, variant: Variant, reason: str, said: str
) -> None:
    service = llm_service(**spec)
    found = why_not(service, kind, variant, merge_overlays(None, service.spec.pod_overlay, ""))
    assert found is not None
    assert found[0] == reason
    assert said in found[1]
    assert template(service, kind, variant) == render_template(service, kind, variant)


def test_the_executor_that_the_plug_in_would_choose_is_no_obstacle() -> None:
    args = ["--distributed-executor-backend=uni"]
    assert is_equipped(template(llm_service(engine={"args": args})))


def test_off_means_pods_without_it_and_is_a_change_of_the_pods() -> None:
    off = llm_service(engine={"migration": "off"})
    assert not is_equipped(template(off))
    assert inputs_hash(off, gpu_type(), SLOW) != inputs_hash(llm_service(), gpu_type(), SLOW)


def test_auto_is_no_change_of_the_pods_that_an_older_operator_made() -> None:
    """The figure is that of the version before this one."""
    assert inputs_hash(llm_service(), gpu_type(), SLOW) == "7f66474dc87369ea"


def test_pods_of_the_same_weights_have_the_same_revision() -> None:
    def revision(service: LLMService, variant: Variant = SLOW) -> str:
        return str(template(service, variant=variant)["metadata"]["labels"][LABEL_REVISION])

    same = revision(llm_service())
    assert revision(llm_service(engine={"args": ["--seed=7"]}), Variant("fast", "fast", 2)) == same
    others = {
        revision(llm_service({"revision": "v2"})),
        revision(llm_service({"name": "org/other"})),
        revision(llm_service({"source": "pvc", "claim": "c", "name": "org/model"})),
        revision(llm_service(), Variant("slow-fp8", "slow", 1, 1, FP8)),
    }
    assert len(others | {same}) == 5
