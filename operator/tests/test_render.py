"""The engine pod as rendered: restricted, drained before it ends, and changed only by what the user changes."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from llmfleet.api import GPUType, LLMService
from llmfleet.api.llmservice import RESERVED_ENGINE_ARGS
from llmfleet.operator.engine_variant import Variant
from llmfleet.operator.model import ANNOTATION_CONTENT, ANNOTATION_INPUTS
from llmfleet.operator.overlay import DEVICE_COUNT_ARGS, FILE_ARGS, UNREACHABLE_ARGS, InvalidSpec
from llmfleet.operator.parse import deployment_from_object
from llmfleet.operator.render import (
    PRE_STOP,
    deployment,
    deployment_name,
    inputs_hash,
    render_template,
)

L4 = Variant("l4", "l4", 1)


def gpu_type(**spec: Any) -> GPUType:
    body = {"resourceName": "nvidia.com/gpu", "memoryGib": 24, "pricePerHour": {"onDemand": 1}, **spec}
    return GPUType.parse({"metadata": {"name": "l4"}, "spec": body})


def llm_service(model: dict[str, Any] | None = None, **spec: Any) -> LLMService:
    body = {
        "model": {"name": "org/model", "contextLength": 4096, **(model or {})},
        "profile": "p",
        "objective": {"ttft": {"milliseconds": 500}, "tpot": {"milliseconds": 50}},
        **spec,
    }
    return LLMService.parse({"metadata": {"name": "chat", "namespace": "ns", "uid": "u-1"}, "spec": body})


def pod_spec(service: LLMService, kind: GPUType | None = None, variant: Variant = L4) -> dict[str, Any]:
    spec = render_template(service, kind or gpu_type(), variant)["spec"]
    assert isinstance(spec, dict)
    return spec


def engine(service: LLMService, kind: GPUType | None = None, variant: Variant = L4) -> dict[str, Any]:
    container = pod_spec(service, kind, variant)["containers"][0]
    assert isinstance(container, dict)
    return container


def manifest(service: LLMService, replicas: int = 1, surge: bool = True) -> dict[str, Any]:
    return deployment(
        service,
        L4,
        template=render_template(service, gpu_type(), L4),
        inputs=inputs_hash(service, gpu_type(), L4),
        replicas=replicas,
        surge=surge,
        max_unavailable=1,
        startup_deadline_seconds=1800,
    )


def refused(overlay: dict[str, Any] | None = None, args: list[str] | None = None) -> InvalidSpec:
    spec: dict[str, Any] = {"podOverlay": overlay or {}, "engine": {"args": args or []}}
    with pytest.raises(InvalidSpec) as caught:
        render_template(llm_service(**spec), gpu_type(), L4)
    return caught.value


def test_the_default_pod_meets_every_rule_of_pod_security_restricted() -> None:
    spec = pod_spec(llm_service())
    container = spec["containers"][0]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    assert all("hostPath" not in volume for volume in spec["volumes"])


def test_shared_memory_is_backed_by_memory_and_grows_with_the_devices() -> None:
    for devices in (1, 4):
        spec = pod_spec(llm_service(), variant=Variant("l4", "l4", devices))
        shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{2 * devices}Gi"}
        assert {"name": "shm", "mountPath": "/dev/shm"} in spec["containers"][0]["volumeMounts"]
        assert spec["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": str(devices)}
        assert spec["containers"][0]["resources"]["requests"] == {"nvidia.com/gpu": str(devices)}


def test_the_model_is_given_by_position_to_serve_and_by_option_to_the_module() -> None:
    assert engine(llm_service())["args"][0] == "org/model"
    module = {"command": ["/venv/bin/python3", "-m", "vllm.entrypoints.openai.api_server"]}
    assert engine(llm_service(engine=module))["args"][:2] == ["--model", "org/model"]


def test_the_operators_arguments_come_before_the_users() -> None:
    args = engine(llm_service({"revision": "v1", "servedName": "m"}, engine={"args": ["--enforce-eager"]}))["args"]
    assert args == [
        "org/model",
        *("--served-model-name", "m", "--revision", "v1", "--max-model-len", "4096"),
        *("--tensor-parallel-size", "1", "--host", "0.0.0.0", "--port", "8000"),
        "--enforce-eager",
    ]


def test_weights_come_from_the_hub_a_claim_or_a_path() -> None:
    secret = {"name": "hf", "key": "token"}
    hub = engine(llm_service({"claim": "cache", "tokenSecret": secret}))
    env = {variable["name"]: variable for variable in hub["env"]}
    assert env["HF_HOME"]["value"] == "/weights"
    assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": secret}
    assert {"name": "weights", "mountPath": "/weights"} in hub["volumeMounts"]
    assert pod_spec(llm_service({"claim": "cache"}))["securityContext"]["fsGroup"] == 1000

    claim = engine(llm_service({"source": "pvc", "name": "llama/8b", "claim": "models"}))
    assert claim["args"][0] == "/weights/llama/8b"
    assert {"name": "weights", "mountPath": "/weights", "readOnly": True} in claim["volumeMounts"]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in claim["env"]

    path = engine(llm_service({"source": "path", "name": "/models/tiny"}))
    assert path["args"][0] == "/models/tiny"
    assert not [mount for mount in path["volumeMounts"] if mount["name"] == "weights"]


def test_probes_follow_the_startup_deadline() -> None:
    container = engine(llm_service(engine={"startupDeadlineSeconds": 61}))
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 61
    assert startup["httpGet"] == container["readinessProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    live = container["livenessProbe"]
    assert live["periodSeconds"] * live["failureThreshold"] >= 60


def test_pre_stop_uses_the_engines_own_interpreter_and_leaves_time_to_end() -> None:
    def pre_stop(command: list[str]) -> list[str]:
        service = llm_service(engine={"command": command, "terminationGracePeriodSeconds": 100})
        handler = engine(service)["lifecycle"]["preStop"]["exec"]["command"]
        assert isinstance(handler, list)
        return handler

    assert pre_stop(["vllm", "serve"])[0] == "python3"
    assert pre_stop(["/opt/venv/bin/python3.12", "-m", "x"])[0] == "/opt/venv/bin/python3.12"
    assert pre_stop(["/opt/python-wrapper", "serve"])[0] == "python3"
    assert pre_stop(["vllm", "serve"])[3:] == ["90", "http://127.0.0.1:8000/metrics"]


def pre_stop_asks(answers: dict[str, list[str]], *unreachable: str) -> list[str]:
    """Runs the very script against these answers by path, one after the other, the last for ever: what it asked."""
    asked: list[str] = []

    class Metrics(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            lines = answers[self.path]
            body = lines[min(asked.count(self.path), len(lines) - 1)]
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Metrics) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in answers]
        done = subprocess.run([sys.executable, "-c", PRE_STOP, "60", *unreachable, *urls], timeout=120, check=False)
        server.shutdown()
        thread.join()
    assert done.returncode == 0
    return asked


def test_pre_stop_waits_until_nothing_runs_and_nothing_waits() -> None:
    answers = [
        "# TYPE vllm:num_requests_running gauge\n"
        f'vllm:num_requests_running{{engine="0",model_name="a b"}} {running}.0\n'
        f'vllm:num_requests_waiting{{engine="0",model_name="a b"}} {waiting}.0\n'
        'vllm:num_requests_waiting_by_reason{reason="x"} 7.0\n'
        for running, waiting in [(2, 1), (0, 1), (1, 0), (0, 0), (0, 0)]
    ]
    # An engine that serves without its plug-in does not listen at the plug-in's port.
    nobody = "http://127.0.0.1:9/metrics"
    assert pre_stop_asks({"/metrics": answers}, nobody) == ["/metrics"] * 5


def test_pre_stop_goes_by_the_plug_in_where_vllms_gauges_stay_as_the_last_step_left_them() -> None:
    present = [f"llmfleet_migration_requests {count}.0\n" for count in (1, 0)]
    stale = ["vllm:num_requests_running 1.0\n"]
    assert pre_stop_asks({"/plug-in": present, "/vllm": stale}) == ["/plug-in"] * 3


def test_pre_stop_ends_when_the_engine_is_gone() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        url = f"http://127.0.0.1:{server.server_port}/metrics"
    assert subprocess.run([sys.executable, "-c", PRE_STOP, "60", url], timeout=30, check=False).returncode == 0


def test_the_deployment_belongs_to_its_service_and_can_be_read_back() -> None:
    made = manifest(llm_service(), replicas=3)
    assert made["metadata"]["name"] == "chat-l4"
    owner = made["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == (
        "LLMService",
        "u-1",
        True,
        True,
    )
    seen = deployment_from_object(made)
    assert (seen.service, seen.variant, seen.gpu_type, seen.tensor_parallel, seen.replicas) == (
        "chat",
        "l4",
        "l4",
        1,
        3,
    )
    assert seen.template_hash == seen.input_hash == inputs_hash(llm_service(), gpu_type(), L4)
    assert seen.surge
    selector = made["spec"]["selector"]["matchLabels"]
    assert selector.items() <= made["spec"]["template"]["metadata"]["labels"].items()
    assert made["spec"]["progressDeadlineSeconds"] > made["spec"]["minReadySeconds"]


def test_without_room_the_old_pod_goes_first() -> None:
    rolling = manifest(llm_service(), surge=False)["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 0, "maxUnavailable": 1}
    assert not deployment_from_object(manifest(llm_service(), surge=False)).surge


def test_the_content_hash_changes_with_the_replicas_and_not_with_the_servers_defaults() -> None:
    def content(made: dict[str, Any]) -> str:
        return str(made["metadata"]["annotations"][ANNOTATION_CONTENT])

    assert content(manifest(llm_service(), replicas=1)) != content(manifest(llm_service(), replicas=2))
    live = dict(render_template(llm_service(), gpu_type(), L4))
    live["spec"] = {**live["spec"], "dnsPolicy": "ClusterFirst"}
    again = deployment(
        llm_service(),
        L4,
        template=live,
        inputs=inputs_hash(llm_service(), gpu_type(), L4),
        replicas=1,
        surge=True,
        max_unavailable=1,
        startup_deadline_seconds=1800,
    )
    assert content(again) == content(manifest(llm_service(), replicas=1))


def test_ordinary_names_of_deployments_are_readable() -> None:
    assert deployment_name("chat", "l4") == "chat-l4"
    assert deployment_name("chat-prod", "l4") == "chat-prod-l4"
    assert deployment_name("chat", "l4-tp2") == "chat--l4-tp2"


_NAMES = st.text("ab-", min_size=1, max_size=8).filter(lambda name: name.strip("-") == name)


@given(_NAMES, _NAMES, _NAMES, _NAMES)
@example("a", "b-c", "a-b", "c")
@example("a", "b--c", "a--b", "c")
@example("a--b", "c-d", "a", "b--c-d")
def test_no_two_services_share_the_name_of_a_deployment(service: str, variant: str, other: str, another: str) -> None:
    assume((service, variant) != (other, another))
    assert deployment_name(service, variant) != deployment_name(other, another)


@given(
    st.from_regex(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True),
    st.from_regex(r"[a-z0-9]{1,40}(-tp8)?", fullmatch=True),
)
def test_names_fit_and_stay_apart(service: str, variant: str) -> None:
    name = deployment_name(service, variant)
    assert len(name) <= 63
    assert name == name.strip("-")
    assert name == deployment_name(service, variant)
    assert name != deployment_name(service, f"{variant}x")


def test_whatever_reaches_the_pod_changes_the_inputs_hash_and_nothing_else_does() -> None:
    base = inputs_hash(llm_service(), gpu_type(), L4)
    same = (
        inputs_hash(llm_service(priority=900, replicas={"min": 2}, apiKeysSecret="keys"), gpu_type(), L4),
        inputs_hash(llm_service(), gpu_type(limit=3, pricePerHour={"onDemand": 9}), L4),
    )
    changed = (
        inputs_hash(llm_service({"contextLength": 8192}), gpu_type(), L4),
        inputs_hash(llm_service({"servedName": "other"}), gpu_type(), L4),
        inputs_hash(llm_service(engine={"args": ["--enforce-eager"]}), gpu_type(), L4),
        inputs_hash(llm_service(engine={"image": "vllm:2"}), gpu_type(), L4),
        inputs_hash(llm_service(engine={"terminationGracePeriodSeconds": 7}), gpu_type(), L4),
        inputs_hash(llm_service(podOverlay={"labels": {"a": "b"}}), gpu_type(), L4),
        inputs_hash(llm_service(), gpu_type(nodeSelector={"a": "b"}), L4),
        inputs_hash(llm_service(), gpu_type(podOverlay={"runAsUser": 5}), L4),
        inputs_hash(llm_service(), gpu_type(), Variant("l4-tp2", "l4", 2)),
    )
    assert set(same) == {base}
    assert len({base, *changed}) == 1 + len(changed)
    assert render_template(llm_service(), gpu_type(), L4)["metadata"]["annotations"][ANNOTATION_INPUTS] == base


def test_the_services_overlay_wins_over_the_gpu_types() -> None:
    kind = gpu_type(
        nodeSelector={"accelerator": "l4"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        podOverlay={
            "env": [{"name": "A", "value": "type"}, {"name": "B", "value": "type"}, {"name": "HOME", "value": "/x"}],
            "volumes": [{"name": "data", "emptyDir": {}}],
            "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            "resources": {"requests": {"cpu": "1", "memory": "1Gi"}},
            "runtimeClassName": "nvidia",
            "runAsUser": 7,
            "labels": {"team": "type", "cost": "1"},
        },
    )
    service = llm_service(
        podOverlay={
            "env": [{"name": "A", "valueFromSecret": {"name": "s", "key": "k"}}],
            "volumeMounts": [{"name": "data", "mountPath": "/data", "readOnly": True}],
            "tolerations": [{"key": "gpu", "operator": "Exists"}, {"key": "spot", "operator": "Exists"}],
            "resources": {"requests": {"cpu": "2"}, "limits": {"memory": "2Gi"}},
            "imagePullSecrets": ["registry"],
            "runAsUser": 0,
            "labels": {"team": "service"},
            "annotations": {"example.com/note": "hello"},
        }
    )
    template = render_template(service, kind, L4)
    spec, container = template["spec"], template["spec"]["containers"][0]
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["A"]["valueFrom"] == {"secretKeyRef": {"name": "s", "key": "k"}}
    assert (env["B"]["value"], env["HOME"]["value"]) == ("type", "/x")
    mounts = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/data"]
    assert mounts == [{"name": "data", "mountPath": "/data", "readOnly": True}]
    assert [toleration["key"] for toleration in spec["tolerations"]] == ["gpu", "spot"]
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "1Gi", "nvidia.com/gpu": "1"}
    assert spec["securityContext"]["runAsUser"] == 0
    assert spec["securityContext"]["runAsNonRoot"] is False
    assert spec["runtimeClassName"] == "nvidia"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["nodeSelector"] == {"accelerator": "l4"}
    assert template["metadata"]["labels"]["team"] == "service"
    assert template["metadata"]["labels"]["cost"] == "1"
    assert template["metadata"]["annotations"]["example.com/note"] == "hello"


def test_the_hosts_libraries_may_be_mounted_beside_the_operators_mounts() -> None:
    paths = ["/usr", "/lib", "/lib64", "/etc/alternatives", "/tmp/venv", "/opt/cache/llmfleet"]
    volumes = [{"name": f"v{i}", "hostPath": {"path": path}} for i, path in enumerate(paths)]
    mounts = [{"name": f"v{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(paths)]
    container = engine(llm_service(podOverlay={"volumes": volumes, "volumeMounts": mounts}))
    assert set(paths) <= {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("flag", [*RESERVED_ENGINE_ARGS, *FILE_ARGS, *DEVICE_COUNT_ARGS, *UNREACHABLE_ARGS])
def test_reserved_arguments_are_refused_in_every_spelling(flag: str) -> None:
    spellings = [[flag], [flag, "1"], [f"{flag}=1"], [f"{flag}.x", "1"], ["--enforce-eager", flag]]
    if flag.startswith("--"):
        spellings += [[flag.replace("-", "_").replace("__", "--", 1)], [flag[:-1]]]
    else:
        spellings += [[f"{flag}4"], *([[flag[:-1]]] if len(flag) > 2 else [])]
    for args in spellings:
        error = refused(args=args)
        assert error.reason == "InvalidEngineArgs"
        assert error.where.startswith("LLMService ns/chat: spec.engine.args[")
        assert error.value in args
        assert error.accepted


def test_a_second_model_by_position_is_refused() -> None:
    assert refused(args=["org/other"]).where == "LLMService ns/chat: spec.engine.args[0]"
    assert refused(args=["--enforce-eager", "--", "org/other"]).where == "LLMService ns/chat: spec.engine.args[1]"


def test_a_file_of_arguments_is_refused_with_what_to_write_instead() -> None:
    error = refused(args=["--config", "/data/engine.yaml"])
    assert "the file's options one by one" in str(error)


def test_ordinary_arguments_pass_with_their_values() -> None:
    args = ["--block-size", "32", "--model-loader-extra-config={}", "--max-num-seqs", "8", "--port-like", "-O3"]
    args += ["--seed", "-1", "--config-format", "hf", "-cc.pass_config", "{}", "--hf-overrides.rope", "0.5"]
    assert engine(llm_service(engine={"args": args}))["args"][-len(args) :] == args


def volume(name: str = "v", **source: Any) -> dict[str, Any]:
    return {"volumes": [{"name": name, **(source or {"emptyDir": {}})}]}


def mount(path: str, name: str = "v", **fields: Any) -> dict[str, Any]:
    return {**volume(), "volumeMounts": [{"name": name, "mountPath": path, **fields}]}


BROKEN_OVERLAYS: list[tuple[dict[str, Any], str]] = [
    ({"env": [{"name": "VLLM_API_KEY", "value": "k"}]}, "env[0].name"),
    ({"env": [{"name": "VLLM_PORT", "value": "1"}]}, "env[0].name"),
    (volume("shm"), "volumes[0].name"),
    (volume("weights"), "volumes[0].name"),
    (volume("Not_A_Label"), "volumes[0].name"),
    (volume(hostPath={}), "volumes[0].hostPath.path"),
    (volume(secret={"name": "x"}), "volumes[0].secret.secretName"),
    (volume(persistentVolumeClaim={}), "volumes[0].persistentVolumeClaim.claimName"),
    (volume(configMap={"name": 3}), "volumes[0].configMap.name"),
    (mount("/data", name="missing"), "volumeMounts[/data].name"),
    (mount("/data", name="shm"), "volumeMounts[0].name"),
    (mount("/dev/shm"), "volumeMounts[0].mountPath"),
    (mount("/dev/shm/"), "volumeMounts[0].mountPath"),
    (mount("/dev/shm/x"), "volumeMounts[0].mountPath"),
    (mount("/dev"), "volumeMounts[0].mountPath"),
    (mount("/tmp"), "volumeMounts[0].mountPath"),
    (mount("/home"), "volumeMounts[0].mountPath"),
    (mount("/weights/x"), "volumeMounts[0].mountPath"),
    (mount("/proc/self"), "volumeMounts[0].mountPath"),
    (mount("/sys/fs/cgroup"), "volumeMounts[0].mountPath"),
    (mount("/"), "volumeMounts[0].mountPath"),
    (mount("/a/../dev/shm"), "volumeMounts[0].mountPath"),
    (mount("/a:b"), "volumeMounts[0].mountPath"),
    (mount("/a", subPath="../x"), "volumeMounts[0].subPath"),
    (mount("/a", subPath="/x"), "volumeMounts[0].subPath"),
    (
        {**volume(), "volumeMounts": [{"name": "v", "mountPath": "/a"}, {"name": "v", "mountPath": "/a/"}]},
        "volumeMounts[1].mountPath",
    ),
    ({"labels": {"llmfleet.io/service": "other"}}, "labels"),
    ({"labels": {"x.llmfleet.io/a": "b"}}, "labels"),
    ({"labels": {"bad key": "b"}}, "labels"),
    ({"labels": {"a": "not a label"}}, "labels.a"),
    ({"annotations": {"llmfleet.io/draining": "true"}}, "annotations"),
    ({"annotations": {"controller.kubernetes.io/pod-deletion-cost": "5"}}, "annotations"),
    ({"resources": {"limits": {"nvidia.com/gpu": "8"}}}, "resources.limits"),
    ({"resources": {"requests": {"cpu": "lots"}}}, "resources.requests.cpu"),
    ({"resources": {"requests": {"cpu": "-1"}}}, "resources.requests.cpu"),
    ({"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "500m"}}}, "resources.requests.cpu"),
    ({"tolerations": [{}]}, "tolerations[0].key"),
    ({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}, "tolerations[0].value"),
    ({"tolerations": [{"key": "a", "tolerationSeconds": 5}]}, "tolerations[0].tolerationSeconds"),
    ({"imagePullSecrets": ["Not A Name"]}, "imagePullSecrets[0]"),
    ({"runtimeClassName": "Bad_Name"}, "runtimeClassName"),
]


@pytest.mark.parametrize(("overlay", "field"), BROKEN_OVERLAYS)
def test_an_overlay_that_would_break_the_pod_is_refused_with_its_field(overlay: dict[str, Any], field: str) -> None:
    error = refused(overlay)
    assert error.reason == "InvalidOverlay"
    assert error.where == f"LLMService ns/chat: spec.podOverlay.{field}"
    assert error.accepted
    assert repr(error.value) in str(error)


def test_a_gpu_types_overlay_is_named_as_such() -> None:
    with pytest.raises(InvalidSpec, match=r"GPUType l4: spec\.podOverlay\.volumes\[0\]\.name: 'tmp' is refused"):
        render_template(llm_service(), gpu_type(podOverlay=volume("tmp")), L4)


def test_the_sum_of_two_sound_overlays_is_checked_too() -> None:
    kind = gpu_type(podOverlay={"resources": {"limits": {"memory": "1Gi"}}})
    service = llm_service(podOverlay={"resources": {"requests": {"memory": "2Gi"}}})
    with pytest.raises(InvalidSpec, match="no more than the limit, 1Gi"):
        render_template(service, kind, L4)


def test_engines_of_a_variant_are_spread_over_nodes_and_see_no_other_services() -> None:
    spec = render_template(llm_service(), gpu_type(), L4)["spec"]
    (spread,) = spec["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert spread["labelSelector"]["matchLabels"]["llmfleet.io/variant"] == "l4"
    # VLLM_PORT and the like of a Service called vllm would be taken for vLLM's own settings.
    assert spec["enableServiceLinks"] is False


def test_engines_of_a_service_are_spread_over_zones_where_that_is_preferred_whatever_their_variant() -> None:
    service = llm_service(zoneSpread="preferred")
    nodes, zones = render_template(service, gpu_type(), L4)["spec"]["topologySpreadConstraints"]
    assert nodes == render_template(llm_service(), gpu_type(), L4)["spec"]["topologySpreadConstraints"][0]
    assert (zones["topologyKey"], zones["whenUnsatisfiable"]) == ("topology.kubernetes.io/zone", "ScheduleAnyway")
    selected = zones["labelSelector"]["matchLabels"]
    assert selected == {"llmfleet.io/component": "engine", "llmfleet.io/service": "chat"}
    assert selected.items() <= render_template(service, gpu_type(), L4)["metadata"]["labels"].items()
    assert inputs_hash(service, gpu_type(), L4) != inputs_hash(llm_service(), gpu_type(), L4)
    assert inputs_hash(llm_service(zoneSpread="none"), gpu_type(), L4) == inputs_hash(llm_service(), gpu_type(), L4)
