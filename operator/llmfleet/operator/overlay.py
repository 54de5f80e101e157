"""What a user may add to engine pods, checked before it can break one, and merged.

Overlays come from the GPUType and from the LLMService; the service's wins, by name (environment, volumes, labels),
by path (mounts) or by resource. The API server knows the shape of each field from the CRD; what it cannot know is
what the operator renders beside it: its volumes, its mounts, its arguments, its labels, its device request. A pod
that would be refused, or would start and then not serve, is refused here, in words that name object, field, value
and what is accepted.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from llmfleet.api.configuration import sets
from llmfleet.api.llmservice import RESERVED_ENGINE_ARGS
from llmfleet.api.meta import GROUP
from llmfleet.api.pod import EnvVar, PodOverlay, Resources, Toleration, Volume, VolumeMount
from llmfleet.operator.model import ANNOTATION_DELETION_COST
from llmfleet.operator.quantity import quantity

VOLUME_SHM, VOLUME_TMP, VOLUME_HOME, VOLUME_WEIGHTS = "shm", "tmp", "home", "weights"
MOUNT_SHM, MOUNT_TMP, MOUNT_HOME, MOUNT_WEIGHTS = "/dev/shm", "/tmp", "/home/engine", "/weights"
RESERVED_VOLUMES = (VOLUME_SHM, VOLUME_TMP, VOLUME_HOME, VOLUME_WEIGHTS)
RESERVED_MOUNTS = (MOUNT_SHM, MOUNT_TMP, MOUNT_HOME, MOUNT_WEIGHTS, "/proc", "/sys")
"""Nothing may be mounted at or above them."""
WRITABLE_MOUNTS = (MOUNT_TMP, MOUNT_HOME)
"""Below these, and only these of them, something may."""

FILE_ARGS = ("--config",)
"""They read further arguments from a file, which may hold any of the refused ones."""
DEVICE_COUNT_ARGS = (
    *("--pipeline-parallel-size", "-pp", "--prefill-context-parallel-size", "-pcp", "--data-parallel-size", "-dp"),
    *("--nnodes", "-n", "--node-rank", "-r", "--headless", "--device-ids"),
)
"""They change how many devices or pods one replica needs, which the plan decides."""
UNREACHABLE_ARGS = (
    *("--uds", "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--root-path", "--disable-log-stats"),
    *("--grpc", "--tokens-only"),
)
"""They take away the plain HTTP endpoint or the metrics by which gateways, probes and draining see the engine."""
RESERVED_ENV = ("VLLM_API_KEY", "VLLM_PORT")
"""An engine key locks the gateway out; vLLM's own port setting moves the endpoint."""
RESOURCES = ("cpu", "memory", "ephemeral-storage")
RESERVED_KEYS = (ANNOTATION_DELETION_COST,)

_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")

T = TypeVar("T")


class InvalidSpec(ValueError):
    """A specification that would not make a working engine pod."""

    def __init__(self, reason: str, where: str, value: object, accepted: str) -> None:
        super().__init__(f"{where}: {value!r} is refused; accepted: {accepted}")
        self.reason = reason
        """CamelCase reason for the Planned condition: InvalidOverlay or InvalidEngineArgs."""
        self.where = where
        """Object and field."""
        self.value = value
        """The offending value."""
        self.accepted = accepted
        """What would be accepted."""


def check_engine_args(args: Sequence[str], where: str) -> None:
    """Refuses arguments that the operator renders itself or that break serving. Raises InvalidSpec.

    However they are written (`configuration.sets`).
    """
    if args and not args[0].startswith("-"):
        raise InvalidSpec("InvalidEngineArgs", f"{where}[0]", args[0], "an option; the model comes from spec.model")
    for index, argument in enumerate(args):
        if not argument.startswith("-"):
            continue
        if argument == "--":
            raise InvalidSpec("InvalidEngineArgs", f"{where}[{index}]", argument, "options only, with their values")
        for groups, accepted in (
            (RESERVED_ENGINE_ARGS, "options that the operator does not render itself from spec.model and the plan"),
            (FILE_ARGS, "the file's options one by one: a file may hold options that the operator renders itself"),
            (DEVICE_COUNT_ARGS, "options that keep a replica at the devices that the plan gives it"),
            (UNREACHABLE_ARGS, "options that keep the engine's plain HTTP endpoint and metrics"),
        ):
            if any(sets(argument, reserved) for reserved in groups):
                raise InvalidSpec("InvalidEngineArgs", f"{where}[{index}]", argument, accepted)


def check_overlay(overlay: PodOverlay, where: str) -> None:
    """Checks one overlay by itself. `where` names it, such as `GPUType l4: spec.podOverlay`. Raises InvalidSpec."""
    for index, variable in enumerate(overlay.env):
        if variable.name in RESERVED_ENV:
            _refuse(f"{where}.env[{index}].name", variable.name, f"any variable but {', '.join(RESERVED_ENV)}")
    for index, volume in enumerate(overlay.volumes):
        _check_volume(volume, f"{where}.volumes[{index}]")
    paths: set[str] = set()
    for index, mount in enumerate(overlay.volume_mounts):
        path = posixpath.normpath(mount.mount_path)
        if path in paths:
            _refuse(f"{where}.volumeMounts[{index}].mountPath", mount.mount_path, "each path once")
        paths.add(path)
        _check_mount(mount, f"{where}.volumeMounts[{index}]")
    for index, toleration in enumerate(overlay.tolerations):
        check_toleration(toleration, f"{where}.tolerations[{index}]")
    for index, name in enumerate(overlay.image_pull_secrets):
        if _DNS_SUBDOMAIN.fullmatch(name) is None:
            _refuse(f"{where}.imagePullSecrets[{index}]", name, "the name of a Secret, such as registry-key")
    if overlay.runtime_class_name is not None and _DNS_SUBDOMAIN.fullmatch(overlay.runtime_class_name) is None:
        _refuse(f"{where}.runtimeClassName", overlay.runtime_class_name, "the name of a RuntimeClass, such as nvidia")
    if overlay.resources is not None:
        _check_resources(overlay.resources, f"{where}.resources")
    _check_keys(overlay.labels, f"{where}.labels", are_labels=True)
    _check_keys(overlay.annotations, f"{where}.annotations", are_labels=False)


def check_toleration(toleration: Toleration, where: str) -> None:
    """What the API server asks of a toleration. Raises InvalidSpec."""
    if toleration.key is None and toleration.operator != "Exists":
        _refuse(f"{where}.key", toleration.key, "a taint key, or operator Exists for every taint")
    if toleration.operator == "Exists" and toleration.value:
        _refuse(f"{where}.value", toleration.value, "no value where operator is Exists")
    if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
        _refuse(f"{where}.tolerationSeconds", toleration.toleration_seconds, "only with effect NoExecute")


def merge_overlays(base: PodOverlay | None, top: PodOverlay | None, where: str) -> PodOverlay:
    """`top` over `base`, both checked already; then checks what only the sum can show. Raises InvalidSpec."""
    base, top = base or PodOverlay(), top or PodOverlay()
    volumes = _by((*base.volumes, *top.volumes), lambda volume: volume.name)
    mounts = _by((*base.volume_mounts, *top.volume_mounts), lambda mount: posixpath.normpath(mount.mount_path))
    env: list[EnvVar] = _by((*base.env, *top.env), lambda variable: variable.name)
    resources = _merge_resources(base.resources, top.resources)
    names = {volume.name for volume in volumes}
    for mount in mounts:
        if mount.name not in names:
            accepted = f"one of the overlay's volumes: {', '.join(sorted(names)) or 'there are none'}"
            _refuse(f"{where}.volumeMounts[{mount.mount_path}].name", mount.name, accepted)
    for name, limit in resources.limits.items():
        request = resources.requests.get(name)
        if request is not None and quantity(request) > quantity(limit):
            _refuse(f"{where}.resources.requests.{name}", request, f"no more than the limit, {limit}")
    return PodOverlay(
        env=env,
        volumes=volumes,
        volume_mounts=mounts,
        tolerations=list(dict.fromkeys((*base.tolerations, *top.tolerations))),
        image_pull_secrets=list(dict.fromkeys((*base.image_pull_secrets, *top.image_pull_secrets))),
        resources=resources,
        runtime_class_name=top.runtime_class_name or base.runtime_class_name,
        run_as_user=base.run_as_user if top.run_as_user is None else top.run_as_user,
        labels={**base.labels, **top.labels},
        annotations={**base.annotations, **top.annotations},
    )


def _refuse(where: str, value: object, accepted: str) -> None:
    raise InvalidSpec("InvalidOverlay", where, value, accepted)


def _check_volume(volume: Volume, where: str) -> None:
    if _DNS_LABEL.fullmatch(volume.name) is None:
        _refuse(f"{where}.name", volume.name, "a DNS label, such as model-files")
    if volume.name in RESERVED_VOLUMES:
        _refuse(f"{where}.name", volume.name, f"any name but {', '.join(RESERVED_VOLUMES)}, which the operator uses")
    for source, field, key in (
        (volume.config_map, "configMap", "name"),
        (volume.secret, "secret", "secretName"),
        (volume.persistent_volume_claim, "persistentVolumeClaim", "claimName"),
        (volume.host_path, "hostPath", "path"),
    ):
        if source is not None and not (isinstance(source.get(key), str) and source[key]):
            _refuse(f"{where}.{field}.{key}", source.get(key), f"{key} of the {field}, a string")


def _check_mount(mount: VolumeMount, where: str) -> None:
    path = posixpath.normpath(mount.mount_path)
    if path in ("/", "//") or ".." in mount.mount_path.split("/") or ":" in mount.mount_path:
        _refuse(f"{where}.mountPath", mount.mount_path, "an absolute path below /, without .. and :")
    for reserved in RESERVED_MOUNTS:
        below = path.startswith(f"{reserved}/") and reserved not in WRITABLE_MOUNTS
        if path == reserved or below or reserved.startswith(f"{path}/"):
            accepted = f"a path that leaves {', '.join(RESERVED_MOUNTS)} alone, which the operator needs"
            _refuse(f"{where}.mountPath", mount.mount_path, accepted)
    if mount.name in RESERVED_VOLUMES:
        _refuse(f"{where}.name", mount.name, f"a volume of the overlay, not {', '.join(RESERVED_VOLUMES)}")
    if mount.sub_path is not None and (mount.sub_path.startswith("/") or ".." in mount.sub_path.split("/")):
        _refuse(f"{where}.subPath", mount.sub_path, "a relative path without ..")


def _check_resources(resources: Resources, where: str) -> None:
    for field, amounts in (("requests", resources.requests), ("limits", resources.limits)):
        for name, amount in amounts.items():
            if name not in RESOURCES and not name.startswith("hugepages-"):
                accepted = f"{', '.join(RESOURCES)} or hugepages-*; devices come from the plan"
                _refuse(f"{where}.{field}", name, accepted)
            try:
                valid = quantity(amount) >= 0
            except ValueError:
                valid = False
            if not valid:
                _refuse(f"{where}.{field}.{name}", amount, "a quantity of at least 0, such as 500m, 2 or 4Gi")


def _check_keys(entries: Mapping[str, str], where: str, *, are_labels: bool) -> None:
    for key, value in entries.items():
        prefix, _, name = key.rpartition("/")
        if prefix == GROUP or prefix.endswith(f".{GROUP}") or key in RESERVED_KEYS:
            _refuse(where, key, f"keys outside {GROUP} and other than {', '.join(RESERVED_KEYS)}")
        if _LABEL_NAME.fullmatch(name) is None or ("/" in key and _DNS_SUBDOMAIN.fullmatch(prefix) is None):
            _refuse(where, key, "a key such as team or example.com/team")
        if are_labels and value and _LABEL_NAME.fullmatch(value) is None:
            _refuse(
                f"{where}.{key}", value, "at most 63 letters, digits, -, _ and ., with a letter or digit at both ends"
            )


def _by(items: Iterable[T], key: Callable[[T], str]) -> list[T]:
    """Later items win, at the place of the first of their name."""
    merged: dict[str, T] = {}
    for item in items:
        merged[key(item)] = item
    return list(merged.values())


def _merge_resources(base: Resources | None, top: Resources | None) -> Resources:
    base, top = base or Resources(), top or Resources()
    return Resources(requests={**base.requests, **top.requests}, limits={**base.limits, **top.limits})
