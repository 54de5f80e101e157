"""The restricted pod overlay: what clusters need to add to engine pods, and nothing that could break them.

A whole PodSpec in a CRD weighs megabytes and lets a user overwrite what the operator must own (ports, probes,
labels, the serving container). So the overlay is a short list of fields, merged by name on top of the rendered
pod, first the GPUType's, then the service's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from llmfleet.api.meta import ApiModel, Rule, UniqueBy, cel

VOLUME_SOURCES = ("configMap", "emptyDir", "hostPath", "persistentVolumeClaim", "secret")
_GIVEN = "[" + ", ".join(f"has(self.{s}) ? '{s}' : ''" for s in VOLUME_SOURCES) + "].filter(x, x != '')"
ENV_FORM = "exactly one of value and valueFromSecret"


class Toleration(ApiModel):
    """A taint that pods tolerate, as in Kubernetes."""

    key: str | None = None
    """Taint key; absent with operator Exists: every taint."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether the value must be equal or the key only exist."""
    value: str | None = None
    """Taint value."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; absent: every effect."""
    toleration_seconds: int | None = Field(default=None, ge=0)
    """How long a NoExecute taint is tolerated, in seconds."""


class SecretKeyRef(ApiModel):
    """One key of a Secret in the service's namespace."""

    name: str = Field(min_length=1, max_length=253)
    """Name of the Secret."""
    key: str = Field(min_length=1, max_length=253)
    """Key inside the Secret."""


class EnvVar(ApiModel):
    """An environment variable of the engine container."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "has(self.value) != has(self.valueFromSecret)",
                f"set {ENV_FORM}",
                got=("%s for %s", "has(self.value) ? 'both' : 'neither'", "self.name"),
            )
        )
    )

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the variable."""
    value: str | None = Field(default=None, max_length=4096)
    """Literal value."""
    value_from_secret: SecretKeyRef | None = None
    """Secret key that holds the value."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.value is None) == (self.value_from_secret is None):
            raise ValueError(f"set {ENV_FORM}")
        return self


class VolumeMount(ApiModel):
    """Where a volume is mounted in the engine container."""

    name: str = Field(min_length=1, max_length=63)
    """Name of a volume of the overlay."""
    mount_path: str = Field(min_length=1, max_length=512, pattern=r"^/")
    """Absolute path in the container."""
    sub_path: str | None = Field(default=None, max_length=512)
    """Path inside the volume."""
    read_only: bool = False
    """Mount read-only."""


class Volume(ApiModel):
    """A volume: a name and exactly one source, written as in a pod."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                f"{_GIVEN}.size() == 1",
                f"set exactly one of {', '.join(VOLUME_SOURCES)}",
                got=("%s for %s", _GIVEN, "self.name"),
            )
        )
    )

    name: str = Field(min_length=1, max_length=63)
    """Name that volumeMounts refer to."""
    config_map: dict[str, Any] | None = None
    """A ConfigMap, as in a pod's volume."""
    empty_dir: dict[str, Any] | None = None
    """An empty directory, as in a pod's volume."""
    host_path: dict[str, Any] | None = None
    """A path of the node, as in a pod's volume. Refused by Pod Security `baseline` and `restricted`."""
    persistent_volume_claim: dict[str, Any] | None = None
    """A claim, as in a pod's volume."""
    secret: dict[str, Any] | None = None
    """A Secret, as in a pod's volume."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.config_map, self.empty_dir, self.host_path, self.persistent_volume_claim, self.secret]
        if sum(source is not None for source in given) != 1:
            raise ValueError(f"volume {self.name!r}: set exactly one of {', '.join(VOLUME_SOURCES)}")
        return self


class Resources(ApiModel):
    """CPU and memory of the engine container, as Kubernetes quantities. Devices come from the plan."""

    requests: dict[str, str] = Field(default_factory=dict)
    """Requests by resource, for example `cpu: "4"`."""
    limits: dict[str, str] = Field(default_factory=dict)
    """Limits by resource."""


class PodOverlay(ApiModel):
    """What a cluster needs to add to engine pods."""

    env: Annotated[list[EnvVar], UniqueBy("name")] = Field(default_factory=list, max_length=64)
    """Environment of the engine container; a name set here wins over the default."""
    volumes: Annotated[list[Volume], UniqueBy("name")] = Field(default_factory=list, max_length=32)
    """Additional volumes."""
    volume_mounts: Annotated[list[VolumeMount], UniqueBy("mountPath")] = Field(default_factory=list, max_length=32)
    """Where the additional volumes are mounted."""
    tolerations: list[Toleration] = Field(default_factory=list, max_length=16)
    """Additional tolerations."""
    image_pull_secrets: Annotated[list[str], UniqueBy()] = Field(default_factory=list, max_length=8)
    """Names of Secrets to pull images with."""
    resources: Resources | None = None
    """CPU and memory of the engine container."""
    runtime_class_name: str | None = Field(default=None, max_length=253)
    """RuntimeClass of the pod."""
    run_as_user: int | None = Field(default=None, ge=0, le=2_147_483_647)
    """User id of the engine process; absent: 1000. 0 (root) is refused by Pod Security `restricted`."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Additional pod labels; keys of `llmfleet.io` are refused."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Additional pod annotations; keys of `llmfleet.io` are refused."""
