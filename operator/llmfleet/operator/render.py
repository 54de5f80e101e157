"""From a service, a GPUType and a variant to a Deployment: one per (service, variant).

    spec + GPUType + variant --inputs_hash--> 16 hex digits        what the template depends on
                             --render_template--> pod template      how this version of the operator writes it
    template + replicas      --deployment--> manifest               ready for server-side apply

The hash is over the *inputs*, not over the rendered template, and is kept on the Deployment and on its pods. As long
as it is the live one, the template as it was applied last is sent again verbatim, so a new version of the operator that
renders a template in another way never restarts a fleet by itself; it takes hold where the user changes something. The
spec as applied is kept on the Deployment, so that what others change of it is noticed (`drift`).

What is rendered meets Pod Security `restricted`. An engine is ready when `/health` answers, which vLLM does only
once it can serve. It leaves in three steps: gateways see the draining annotation or the deletion and send nothing
more; preStop waits until the engine's own count of requests is zero, within the grace period; then SIGTERM.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llmfleet.api import GPUType, LLMService, PodOverlay
from llmfleet.api.meta import (
    API_VERSION,
    COMPONENT_ENGINE,
    LABEL_COMPONENT,
    LABEL_REVISION,
    LABEL_SERVICE,
    LABEL_VARIANT,
)
from llmfleet.operator import migration
from llmfleet.operator.engine_variant import Variant, check_configuration, engine_args, revision
from llmfleet.operator.model import ANNOTATION_APPLIED, ANNOTATION_CONTENT, ANNOTATION_INPUTS, Manifest, PluginPackage
from llmfleet.operator.overlay import (
    MOUNT_HOME,
    MOUNT_SHM,
    MOUNT_TMP,
    MOUNT_WEIGHTS,
    VOLUME_HOME,
    VOLUME_SHM,
    VOLUME_TMP,
    VOLUME_WEIGHTS,
    check_engine_args,
    check_overlay,
    check_toleration,
    merge_overlays,
)
from llmfleet.operator.parse import ENGINE_CONTAINER

PORT = 8000
"""Port of the OpenAI server in the pod."""
USER_ID = 1000
"""User of the engine process where no overlay says another."""
SHM_GIB_PER_DEVICE = 2
"""vLLM's processes talk through /dev/shm: 160 MiB for the smallest model, NCCL's buffers on top per device."""
STARTUP_PERIOD_SECONDS = 1
READINESS_PERIOD_SECONDS = 1
LIVENESS_PERIOD_SECONDS = 10
LIVENESS_FAILURES = 12
"""An engine busy with a long prefill may be slow to answer; only two silent minutes count as dead."""
MIN_READY_SECONDS = 2
SHUTDOWN_SECONDS = 10
"""Part of the grace period that is left to the engine after preStop, to end by itself on SIGTERM."""

PRE_STOP = """\
import sys, time, urllib.request
patience_s, urls = float(sys.argv[1]), sys.argv[2:]
deadline = time.monotonic() + patience_s
names = ("llmfleet_migration_requests", "vllm:num_requests_running", "vllm:num_requests_waiting")
time.sleep(min(2.0, patience_s))  # gateways see the deletion; what they had already sent has arrived
quiet = 0
while quiet < 2 and time.monotonic() < deadline:
    try:
        lines = urllib.request.urlopen(urls[0], timeout=5).read().decode().splitlines()
    except OSError:
        urls = urls[1:]
        if not urls:
            break  # the engine is gone: nobody is left to wait for
        continue
    rows = [line.rpartition(" ") for line in lines]
    in_flight = sum(float(count) for series, _, count in rows if series.partition("{")[0] in names)
    quiet = quiet + 1 if in_flight == 0 else 0
    time.sleep(0.5)
"""
"""Waits until the engine has no requests, twice in a row, by the first of its metrics that answer. Arguments: seconds,
and the URLs of the plug-in's metrics and of vLLM's, or of vLLM's alone."""

_PYTHON = re.compile(r"(.*/)?python(3(\.[0-9]+)?)?")
_INPUTS_VERSION = 1


def deployment_name(service: str, variant: str) -> str:
    """`chat-l4`, or `chat--l4-tp2` where the variant has a dash: another name for every (service, variant).

    With one dash `a` on `b-c` would be called as `a-b` on `c`. So a single dash stands only before a variant without
    any, and two stand only between service and variant. Where that cannot be told (two dashes inside a name) or the
    name is longer than 63 characters, a hash of both ends it.
    """
    name = f"{service}--{variant}" if "-" in variant else f"{service}-{variant}"
    if len(name) <= 63 and "--" not in service and "--" not in variant:
        return name
    digest = hashlib.sha256(f"{service}/{variant}".encode()).hexdigest()[:8]
    return f"{name[:54].rstrip('-')}-{digest}"


def engine_labels(service: str, variant: str) -> dict[str, str]:
    """Labels that select a variant's pods, and nothing else, inside the service's namespace."""
    return {LABEL_COMPONENT: COMPONENT_ENGINE, LABEL_SERVICE: service, LABEL_VARIANT: variant}


def owner_reference(service: LLMService) -> dict[str, Any]:
    """Children go with their service, and the service waits for them in a foreground deletion."""
    return {
        "apiVersion": API_VERSION,
        "kind": LLMService.KIND,
        "name": service.metadata.name,
        "uid": service.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def digest_of(document: object) -> str:
    """16 hex digits over the canonical JSON of a document."""
    return hashlib.sha256(_canonical(document).encode()).hexdigest()[:16]


def _canonical(document: object) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def inputs_hash(service: LLMService, gpu_type: GPUType, variant: Variant) -> str:
    """Hash of everything that a user can change and that reaches the pod template.

    The fields are named one by one: a field that a later version adds must enter only where it is set, or that
    version would restart every fleet.
    """
    model, engine, gpu = service.spec.model, service.spec.engine, gpu_type.spec
    # What came later, where it is set.
    added: dict[str, Any] = {}
    if variant.pipeline_parallel > 1:
        added["pipelineParallel"] = variant.pipeline_parallel
    if service.spec.zone_spread != "none":
        added["zoneSpread"] = service.spec.zone_spread
    if (run := variant.configuration) is not None:
        added["configuration"] = [run.name, run.model, run.revision, run.engine_args()]
    if engine.migration == "off":
        added["migration"] = "off"
    return digest_of(
        added
        | {
            "version": _INPUTS_VERSION,
            "service": service.metadata.name,
            "servedName": service.served_name,
            "variant": [variant.name, variant.gpu_type, variant.tensor_parallel],
            "model": {
                "source": model.source,
                "name": model.name,
                "revision": model.revision,
                "contextLength": model.context_length,
                "claim": model.claim,
                "tokenSecret": model.token_secret.to_wire() if model.token_secret else None,
            },
            "engine": {
                "image": engine.image,
                "command": engine.command,
                "args": engine.args,
                "terminationGracePeriodSeconds": engine.termination_grace_period_seconds,
                "startupDeadlineSeconds": engine.startup_deadline_seconds,
            },
            "gpu": {
                "resourceName": gpu.resource_name,
                "nodeSelector": gpu.node_selector,
                "tolerations": [toleration.to_wire() for toleration in gpu.tolerations],
            },
            "overlays": [
                overlay.model_dump(mode="json", by_alias=True, exclude_defaults=True) if overlay else {}
                for overlay in (gpu.pod_overlay, service.spec.pod_overlay)
            ],
        }
    )


def render_template(
    service: LLMService, gpu_type: GPUType, variant: Variant, plugin: PluginPackage | None = None
) -> Manifest:
    """The pod template of a variant, with the plug-in where it is given and the variant can have it.

    Raises `overlay.InvalidSpec` where it would not make a working pod.
    """
    overlay = checked_overlay(service, gpu_type)
    check_configuration(service, variant.configuration)
    labels = {
        **overlay.labels,
        **engine_labels(service.metadata.name, variant.name),
        **variant.labels,
        LABEL_REVISION: digest_of(revision(service, variant)),
    }
    annotations = {**overlay.annotations, ANNOTATION_INPUTS: inputs_hash(service, gpu_type, variant)}
    user_id = USER_ID if overlay.run_as_user is None else overlay.run_as_user
    security: dict[str, Any] = {
        "runAsNonRoot": user_id != 0,
        "runAsUser": user_id,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if service.spec.model.source == "hf" and service.spec.model.claim is not None:
        security |= {"fsGroup": user_id, "fsGroupChangePolicy": "OnRootMismatch"}
    tolerations = list(dict.fromkeys((*gpu_type.spec.tolerations, *overlay.tolerations)))
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": security,
        "terminationGracePeriodSeconds": service.spec.engine.termination_grace_period_seconds,
        "topologySpreadConstraints": list(_spread(service, variant)),
        "containers": [_container(service, gpu_type, variant, overlay)],
        "volumes": [*_volumes(service, variant), *(volume.to_wire() for volume in overlay.volumes)],
    }
    if gpu_type.spec.node_selector:
        spec["nodeSelector"] = dict(gpu_type.spec.node_selector)
    if tolerations:
        spec["tolerations"] = [toleration.to_wire() for toleration in tolerations]
    if overlay.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in overlay.image_pull_secrets]
    if overlay.runtime_class_name is not None:
        spec["runtimeClassName"] = overlay.runtime_class_name
    template = {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec}
    wanted = plugin is not None and service.spec.engine.migration == "auto"
    if plugin is None or not wanted or migration.why_not(service, gpu_type, variant, overlay):
        return template
    return migration.equip(template, service, variant, plugin)


def deployment(
    service: LLMService,
    variant: Variant,
    *,
    template: Mapping[str, Any],
    inputs: str,
    replicas: int,
    surge: bool,
    max_unavailable: int,
    startup_deadline_seconds: int,
) -> Manifest:
    """The Deployment around a template, rendered now or earlier. `inputs` is the hash that the template has."""
    rolling = {"maxSurge": 1, "maxUnavailable": 0} if surge else {"maxSurge": 0, "maxUnavailable": max_unavailable}
    labels = engine_labels(service.metadata.name, variant.name)
    manifest: Manifest = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": deployment_name(service.metadata.name, variant.name),
            "namespace": service.metadata.namespace,
            "labels": {**labels, **variant.labels},
            "annotations": {ANNOTATION_INPUTS: inputs},
            "ownerReferences": [owner_reference(service)],
        },
        "spec": {
            "replicas": replicas,
            "revisionHistoryLimit": 2,
            "minReadySeconds": MIN_READY_SECONDS,
            "progressDeadlineSeconds": startup_deadline_seconds + MIN_READY_SECONDS + 1,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": rolling},
        },
    }
    # The template counts by its inputs: once live it carries the API server's defaults, which are no change.
    manifest["metadata"]["annotations"][ANNOTATION_CONTENT] = digest_of(manifest)
    manifest["spec"]["template"] = dict(template)
    manifest["metadata"]["annotations"][ANNOTATION_APPLIED] = _canonical(manifest["spec"])
    return manifest


def check_service(service: LLMService) -> None:
    """What can be told of a service's engine arguments and overlay without a GPUType. Raises `overlay.InvalidSpec`."""
    subject = f"LLMService {service.key}"
    check_engine_args(service.spec.engine.args, f"{subject}: spec.engine.args")
    if service.spec.pod_overlay is not None:
        check_overlay(service.spec.pod_overlay, f"{subject}: spec.podOverlay")


def checked_overlay(service: LLMService, gpu_type: GPUType) -> PodOverlay:
    """Both overlays, checked and merged, after the engine's arguments. Raises `overlay.InvalidSpec`."""
    subject, kind = f"LLMService {service.key}", f"GPUType {gpu_type.metadata.name}"
    check_service(service)
    for index, toleration in enumerate(gpu_type.spec.tolerations):
        check_toleration(toleration, f"{kind}: spec.tolerations[{index}]")
    if gpu_type.spec.pod_overlay is not None:
        check_overlay(gpu_type.spec.pod_overlay, f"{kind}: spec.podOverlay")
    return merge_overlays(gpu_type.spec.pod_overlay, service.spec.pod_overlay, f"{subject}: spec.podOverlay")


def _spread(service: LLMService, variant: Variant) -> Iterator[dict[str, Any]]:
    """A variant's engines over nodes, and where asked for, all engines of the service over zones. Never a reason not to
    start an engine: the plan does not know where there is room."""
    labels = engine_labels(service.metadata.name, variant.name)
    over = {"kubernetes.io/hostname": labels}
    if service.spec.zone_spread == "preferred":
        over["topology.kubernetes.io/zone"] = {name: labels[name] for name in (LABEL_COMPONENT, LABEL_SERVICE)}
    for key, of in over.items():
        yield {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": of},
        }


def _container(service: LLMService, gpu_type: GPUType, variant: Variant, overlay: PodOverlay) -> dict[str, Any]:
    engine = service.spec.engine
    devices = {gpu_type.spec.resource_name: str(variant.devices)}
    resources = overlay.resources
    return {
        "name": ENGINE_CONTAINER,
        "image": engine.image,
        "imagePullPolicy": "IfNotPresent",
        "command": list(engine.command),
        "args": engine_args(service, variant, PORT),
        "env": _env(service, overlay),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {
            "requests": {**(resources.requests if resources else {}), **devices},
            "limits": {**(resources.limits if resources else {}), **devices},
        },
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "startupProbe": _probe(
            STARTUP_PERIOD_SECONDS, math.ceil(engine.startup_deadline_seconds / STARTUP_PERIOD_SECONDS)
        ),
        "readinessProbe": _probe(READINESS_PERIOD_SECONDS, 3),
        "livenessProbe": _probe(LIVENESS_PERIOD_SECONDS, LIVENESS_FAILURES),
        "lifecycle": {"preStop": {"exec": {"command": _pre_stop(service)}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [*_mounts(service), *(mount.to_wire() for mount in overlay.volume_mounts)],
    }


def _env(service: LLMService, overlay: PodOverlay) -> list[dict[str, Any]]:
    model = service.spec.model
    hub = MOUNT_WEIGHTS if model.source == "hf" and model.claim is not None else f"{MOUNT_HOME}/huggingface"
    env: dict[str, dict[str, Any]] = {
        "HOME": {"value": MOUNT_HOME},
        "USER": {"value": "engine"},
        "HF_HOME": {"value": hub},
        "VLLM_NO_USAGE_STATS": {"value": "1"},
    }
    if model.source != "hf":
        env["HF_HUB_OFFLINE"] = {"value": "1"}
    if model.token_secret is not None:
        env["HF_TOKEN"] = {"valueFrom": {"secretKeyRef": model.token_secret.to_wire()}}
    for variable in overlay.env:
        secret = variable.value_from_secret
        env[variable.name] = (
            {"value": variable.value} if secret is None else {"valueFrom": {"secretKeyRef": secret.to_wire()}}
        )
    return [{"name": name, **source} for name, source in env.items()]


def _mounts(service: LLMService) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": VOLUME_SHM, "mountPath": MOUNT_SHM},
        {"name": VOLUME_TMP, "mountPath": MOUNT_TMP},
        {"name": VOLUME_HOME, "mountPath": MOUNT_HOME},
    ]
    if service.spec.model.claim is not None:
        read_only = {"readOnly": True} if service.spec.model.source == "pvc" else {}
        mounts.append({"name": VOLUME_WEIGHTS, "mountPath": MOUNT_WEIGHTS, **read_only})
    return mounts


def _volumes(service: LLMService, variant: Variant) -> list[dict[str, Any]]:
    size = f"{SHM_GIB_PER_DEVICE * variant.devices}Gi"
    volumes: list[dict[str, Any]] = [
        {"name": VOLUME_SHM, "emptyDir": {"medium": "Memory", "sizeLimit": size}},
        {"name": VOLUME_TMP, "emptyDir": {}},
        {"name": VOLUME_HOME, "emptyDir": {}},
    ]
    if service.spec.model.claim is not None:
        volumes.append({"name": VOLUME_WEIGHTS, "persistentVolumeClaim": {"claimName": service.spec.model.claim}})
    return volumes


def _probe(period_seconds: int, failure_threshold: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/health", "port": "http"},
        "periodSeconds": period_seconds,
        "timeoutSeconds": 5,
        "failureThreshold": failure_threshold,
    }


def _pre_stop(service: LLMService) -> list[str]:
    engine = service.spec.engine
    python = engine.command[0] if _PYTHON.fullmatch(engine.command[0]) else "python3"
    patience_s = max(1, engine.termination_grace_period_seconds - SHUTDOWN_SECONDS)
    return [python, "-c", PRE_STOP, str(patience_s), f"http://127.0.0.1:{PORT}/metrics"]
