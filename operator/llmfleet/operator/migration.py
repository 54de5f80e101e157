"""What an engine pod needs so that its requests can move to another one, and why it may not get it.

    service, GPUType, variant, overlay --why_not--> None, or (reason, sentence) for the condition NoMigration
                                       --equip----> the pod template with the plug-in in it

A pod with the plug-in has our Python beside its own (`plugin_package`), a named port, the service's peer key, and a
command that starts with `llmfleet.engine.launch`, which looks at the vLLM that is there before it adds the plug-in's
arguments. All of it is left out where it is known beforehand that nothing would come of it, or that it would be in the
way of what the user has asked for: an engine serves without migration as well.

The peer key's Secret is made by the edge (`ProvideMigration`), once, and never read here. Its volume is optional: an
engine whose Secret has gone starts, without migration.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from llmfleet.api import GPUType, LLMService, PodOverlay
from llmfleet.api.configuration import sets
from llmfleet.api.meta import MIGRATION_PORT_NAME, PEER_KEY
from llmfleet.migration.engine_arguments import EngineSettings, engine_arguments
from llmfleet.operator.engine_variant import Variant, engine_args
from llmfleet.operator.model import Finding, Manifest, PluginPackage
from llmfleet.operator.plugin_package import ARCHIVE_KEY

CONTROL_PORT = 7070
"""Where gateways ask the plug-in. Ranks send and take blocks at the ports after it."""
METRICS_PORT = 7069
VOLUME = "llmfleet"
MOUNT = "/llmfleet"
LAUNCH = "llmfleet.engine.launch"

_FOREIGN_MEMORY = re.compile(r"(.*\.)?(nvidia|amd|intel|habana|google|amazon|huawei|qualcomm|furiosa)\.(com|ai)/")
"""Extended resources of devices with a memory of their own. What else there is, the launcher finds out in the pod."""
_PYTHON = re.compile(r"(.*/)?python(3(\.[0-9]+)?)?")
_POD_IP = "LLMFLEET_POD_IP"
_OWN_OPTIONS = ("--scheduler-cls", "--worker-cls", "--additional-config", "--kv-transfer-config")
_EXECUTOR = "--distributed-executor-backend"


def peer_key_secret(service: LLMService) -> str:
    """Name of the Secret with a service's peer key: another one for a service of the same name that is made later."""
    return f"{service.metadata.name}-peer-key-{service.metadata.uid[:8]}"


def why_not(service: LLMService, gpu_type: GPUType, variant: Variant, overlay: PodOverlay) -> Finding | None:
    """Why an engine of this variant gets no plug-in, as (reason, sentence); None where it gets it.

    `overlay` is the merged one. What only the pod can know, such as its vLLM's version, is not decided here.
    """
    resource = gpu_type.spec.resource_name
    if _FOREIGN_MEMORY.match(resource):
        return "DeviceMemory", f"{variant.name} runs on {resource}; the KV cache of such devices cannot be copied yet"
    if variant.pipeline_parallel > 1:
        return "PipelineStages", f"{variant.name} has {variant.pipeline_parallel} pipeline stages; accepted is 1"
    if interpreter(service) is None:
        command = service.spec.engine.command[0]
        return "EngineCommand", f"spec.engine.command begins with {command!r}; accepted is `vllm` or a Python"
    for argument in engine_args(service, variant, 0):
        if any(sets(argument, option) for option in _OWN_OPTIONS):
            accepted = f"arguments without {', '.join(_OWN_OPTIONS)}, which are the plug-in's to set"
            return "EngineArguments", f"{variant.name} has {argument!r}; accepted are {accepted}"
    executor = _executor(engine_args(service, variant, 0))
    if executor not in (None, "uni", "mp"):
        return "EngineArguments", f"{variant.name} has {_EXECUTOR} {executor!r}; accepted are uni and mp"
    for variable in overlay.env:
        if variable.name == "PYTHONPATH" and variable.value is None:
            return "PodOverlay", "PYTHONPATH comes from a Secret; accepted is a value in the overlay itself"
    for mount in overlay.volume_mounts:
        path = posixpath.normpath(mount.mount_path)
        if f"{path}/".startswith(f"{MOUNT}/"):
            return "PodOverlay", f"a volume is mounted at {mount.mount_path}; accepted are paths outside {MOUNT}"
    if any(volume.name == VOLUME for volume in overlay.volumes):
        return "PodOverlay", f"a volume has the name {VOLUME!r}; accepted is any other"
    return None


def equip(template: Manifest, service: LLMService, variant: Variant, package: PluginPackage) -> Manifest:
    """The pod template with the plug-in in its first container. `why_not` has found nothing."""
    spec = template["spec"]
    container, *others = spec["containers"]
    python = interpreter(service)
    assert python is not None
    key_file = f"{MOUNT}/{PEER_KEY}"
    launch = [python, "-m", LAUNCH, "--peer-key-file", key_file, "--arguments", _arguments(variant, key_file)]
    ours = {"PYTHONPATH": {"value": _python_path(container["env"])}}
    equipped = {
        **container,
        # `$(LLMFLEET_POD_IP)` in them is filled in by the kubelet, as in any command.
        "command": [*launch, "--"],
        "args": [*container["command"], *container["args"]],
        "env": [
            {"name": _POD_IP, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            *({"name": name, **source} for name, source in ours.items()),
            *(variable for variable in container["env"] if variable["name"] not in {_POD_IP, *ours}),
        ],
        "ports": [*container["ports"], *_ports(variant)],
        "lifecycle": _asking_the_plug_in(container["lifecycle"]),
        "volumeMounts": [*container["volumeMounts"], {"name": VOLUME, "mountPath": MOUNT, "readOnly": True}],
    }
    volumes = [*spec["volumes"], _volume(service, package)]
    return {**template, "spec": {**spec, "containers": [equipped, *others], "volumes": volumes}}


def _asking_the_plug_in(lifecycle: Mapping[str, Any]) -> dict[str, Any]:
    """The same preStop, with the plug-in's metrics before vLLM's: those stay as the last step left them, and a request
    that moves away leaves without a step."""
    *command, vllm = lifecycle["preStop"]["exec"]["command"]
    return {"preStop": {"exec": {"command": [*command, f"http://127.0.0.1:{METRICS_PORT}/metrics", vllm]}}}


def is_equipped(template: Mapping[str, Any]) -> bool:
    """Whether pods of this template have the plug-in."""
    containers = (template.get("spec") or {}).get("containers") or ()
    ports = (port for container in containers for port in container.get("ports") or ())
    return any(port.get("name") == MIGRATION_PORT_NAME for port in ports)


def interpreter(service: LLMService) -> str | None:
    """The Python that the engine's command runs on; None where that cannot be told from the command."""
    first = service.spec.engine.command[0]
    if _PYTHON.fullmatch(first):
        return first
    folder, name = posixpath.split(first)
    if name != "vllm":
        return None
    # A script stands beside the interpreter that it was installed for.
    return posixpath.join(folder, "python3")


def _arguments(variant: Variant, key_file: str) -> str:
    """Only engines on CPUs are given them (`launch`)."""
    settings = EngineSettings(
        listen=f"$({_POD_IP}):{CONTROL_PORT}",
        peer_key_file=key_file,
        data_listen=f"$({_POD_IP}):{CONTROL_PORT + 1}",
        # Asked inside the pod too, before it ends.
        metrics_listen=f"0.0.0.0:{METRICS_PORT}",
    )
    words = engine_arguments(settings, platform="cpu", async_scheduling=False, tensor_parallel=variant.tensor_parallel)
    return json.dumps(words, separators=(",", ":"))


def _ports(variant: Variant) -> list[dict[str, Any]]:
    named = {MIGRATION_PORT_NAME: CONTROL_PORT, "plug-in-metrics": METRICS_PORT}
    named |= {f"blocks-{rank}": CONTROL_PORT + 1 + rank for rank in range(variant.tensor_parallel)}
    return [{"name": name, "containerPort": port, "protocol": "TCP"} for name, port in named.items()]


def _volume(service: LLMService, package: PluginPackage) -> dict[str, Any]:
    key = {"name": peer_key_secret(service), "items": [{"key": PEER_KEY, "path": PEER_KEY}]}
    code = {"name": package.name, "items": [{"key": ARCHIVE_KEY, "path": ARCHIVE_KEY}]}
    # Readable to all in the container, which is to its one user: a group would be given to the user's claims as well.
    sources = [{"configMap": code}, {"secret": {**key, "optional": True}}]
    return {"name": VOLUME, "projected": {"defaultMode": 0o444, "sources": sources}}


def _python_path(env: list[dict[str, Any]]) -> str:
    theirs = next((variable["value"] for variable in env if variable["name"] == "PYTHONPATH"), "")
    return f"{MOUNT}/{ARCHIVE_KEY}" + (f":{theirs}" if theirs else "")


def _executor(words: list[str]) -> str | None:
    """Value of the last option that chooses the executor; None where there is none."""
    found = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if sets(word, _EXECUTOR):
            found = word.partition("=")[2] if "=" in word else following
    return found
