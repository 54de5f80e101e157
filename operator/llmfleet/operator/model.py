"""What the operator sees and what it may do: the vocabulary of its pure core.

    raw Kubernetes JSON --parse--> Observed*  --reconcile(desired, observed)-->  Action, Action, ...

Everything here is a frozen value. The edge (watches, leader, apply) fills `Observed` from its caches and carries the
actions out; the core never sees a client, a clock or an event loop, so each decision can be replayed from its
inputs. Nothing that a decision depends on lives only in memory: what must survive a restart is in the objects
themselves (Deployments, pod annotations, the routing ConfigMap, status).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, TypeAlias

from llmfleet.api import (
    FleetPolicySpec,
    GPUType,
    LLMService,
    LLMServiceStatus,
    Refusal,
    ServicePlan,
)
from llmfleet.api.meta import GROUP

Manifest: TypeAlias = dict[str, Any]
"""A Kubernetes object as JSON, ready for server-side apply."""
Finding: TypeAlias = tuple[str, str]
"""(reason, message) of a condition."""

FIELD_MANAGER = "llmfleet-operator"
"""The one field manager under which specs are applied."""
ANNOTATION_INPUTS = f"{GROUP}/inputs"
"""Hash of what a pod template was rendered from; on the Deployment and, through its template, on each pod."""
ANNOTATION_CONTENT = f"{GROUP}/content"
"""Hash of an applied manifest; an object whose hash is already live is not sent again."""
ANNOTATION_APPLIED = f"{GROUP}/applied"
"""The spec of a Deployment as it was applied last, as JSON."""
LABEL_GPU_TYPE = f"{GROUP}/gpu-type"
"""GPUType of a Deployment and its pods."""
LABEL_TENSOR_PARALLEL = f"{GROUP}/tensor-parallel"
"""Devices that share every layer, on a Deployment and its pods."""
LABEL_PIPELINE_PARALLEL = f"{GROUP}/pipeline-parallel"
"""Stages of such devices, on a Deployment and its pods; absent where there is one."""
ANNOTATION_DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Kubernetes removes pods with a lower cost first when a ReplicaSet shrinks."""
_VOLUME = re.compile(r"persistent ?volume|volume node affinity", re.IGNORECASE)
"""In the scheduler's message: a claim that does not exist, is not bound, or is bound elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedPod:
    """An engine pod."""

    namespace: str
    name: str
    uid: str
    service: str
    variant: str
    gpu_type: str
    template_hash: str
    """Inputs hash of the template it was made from (its ANNOTATION_INPUTS); empty when absent."""
    created_at: datetime
    scheduled: bool
    """It has a node."""
    ready: bool
    terminating: bool = False
    """It has a deletion timestamp."""
    draining: bool = False
    """It carries the draining annotation."""
    deletion_cost: int = 0
    phase: str = "Pending"
    waiting_reason: str = ""
    """Why its engine container waits: `CrashLoopBackOff`, `ImagePullBackOff`, `ContainerCreating`, ..."""
    message: str = ""
    """The end of the engine's last words (termination message), else why it waits or is not scheduled."""
    restarts: int = 0
    node: str = ""
    resource_name: str = ""
    """Extended resource that the engine requests; empty when it requests none."""
    devices: int = 0
    """Devices that the engine requests."""

    @property
    def key(self) -> str:
        """`namespace/service`, the key of its LLMService."""
        return f"{self.namespace}/{self.service}"

    @property
    def finished(self) -> bool:
        """It will never run again, and its devices are free."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def lacks_room(self) -> bool:
        """It has no node, and not only for a volume of its own: a claim that is missing says nothing of devices."""
        return not self.scheduled and ("Insufficient" in self.message or _VOLUME.search(self.message) is None)

    @property
    def serving(self) -> bool:
        """A gateway may send it new requests."""
        return self.ready and not self.terminating and not self.draining


@dataclass(frozen=True, slots=True)
class Drift:
    """A field of a Deployment that the operator applied and that is otherwise now."""

    path: str
    """`spec.template.spec.containers[engine].image`."""
    live: str
    """Its value as JSON; empty where it is gone."""
    removed: bool = False
    """It is gone, and it said something: the API server leaves out what is empty, zero or false by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedDeployment:
    """The Deployment of one (service, variant)."""

    namespace: str
    name: str
    uid: str
    service: str
    variant: str
    gpu_type: str
    tensor_parallel: int
    pipeline_parallel: int = 1
    replicas: int
    """spec.replicas."""
    template: Mapping[str, Any]
    """spec.template as it was applied last; where that is not known, as live, with the API server's defaults. To apply
    it changes no pod, but for what others have changed since."""
    recorded: bool = True
    """What was applied last is known."""
    applied_replicas: int | None = None
    """spec.replicas as applied last."""
    drift: tuple[Drift, ...] = ()
    """What others have changed since, but `replicas`."""
    applied_at: datetime | None = None
    """When the operator last changed a field of it."""
    edited_by: tuple[str, ...] = ()
    """Field managers of others that have changed a part of the spec since then, the newest first."""
    input_hash: str
    """ANNOTATION_INPUTS of the Deployment: what the live template was rendered from."""
    content_hash: str = ""
    """ANNOTATION_CONTENT of the Deployment: the manifest that was applied last."""
    generation: int = 0
    observed_generation: int = 0
    status_replicas: int = 0
    updated_replicas: int = 0
    ready_replicas: int = 0
    surge: bool = True
    """Its rolling update may make a new pod before an old one is gone."""
    failure: str = ""
    """Why pods cannot be made (quota, Pod Security, admission); empty when they can."""
    terminating: bool = False

    @property
    def devices(self) -> int:
        """Devices per replica."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def key(self) -> str:
        """`namespace/service`, the key of its LLMService."""
        return f"{self.namespace}/{self.service}"

    @property
    def template_hash(self) -> str:
        """Inputs hash that the live template gives to new pods; empty when absent."""
        annotations = (self.template.get("metadata") or {}).get("annotations") or {}
        return str(annotations.get(ANNOTATION_INPUTS, ""))

    @property
    def rolling(self) -> bool:
        """A change of the template has not reached all replicas yet, or the controller has not seen it."""
        return (
            self.observed_generation < self.generation
            or self.updated_replicas < self.replicas
            or self.status_replicas > self.updated_replicas
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedNode:
    """A node, as far as inventory cares."""

    name: str
    ready: bool
    schedulable: bool
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, str], ...] = ()
    allocatable: Mapping[str, int] = field(default_factory=dict)
    """Whole extended resources (names with a `/`); CPU and memory are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignUse:
    """Extended resources that pods which are not ours request on one node. Several entries per node add up."""

    node: str
    requests: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedConfigMap:
    """A routing ConfigMap."""

    namespace: str
    name: str
    service: str
    data: Mapping[str, str]
    content_hash: str = ""

    @property
    def key(self) -> str:
        """`namespace/service`, the key of its LLMService."""
        return f"{self.namespace}/{self.service}"


@dataclass(frozen=True, slots=True)
class PluginPackage:
    """The plug-in that engine pods are given."""

    name: str
    """Of its ConfigMap; another one for other content."""
    archive: bytes = field(repr=False)
    """Zip archive of Python packages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that one service's reconcile depends on, beside what is desired."""

    service: LLMService
    """Spec, and the status as last written (conditions carry their transition times)."""
    deployments: Sequence[ObservedDeployment]
    """Those of this service."""
    pods: Sequence[ObservedPod]
    """Those of this service, terminating ones included."""
    routing: ObservedConfigMap | None
    gpu_types: Mapping[str, GPUType]
    """All, by name."""
    free_devices: Mapping[str, int]
    """Devices by GPUType that no engine of the fleet holds or is promised (`inventory.free_devices`): the room
    for new capacity beside the old."""
    unfit_nodes: Set[str]
    """Nodes that are cordoned or NotReady."""
    policy: FleetPolicySpec
    now: datetime
    """Aware UTC time."""
    wanted_devices: Mapping[str, int] = field(default_factory=dict)
    """Devices by GPUType that plans of the fleet ask for and that are not free (`inventory.wanted_devices`)."""
    plugin: PluginPackage | Finding | None = None
    """The plug-in for new pods, or why this service cannot have it; None: this operator gives none."""
    migration_provided: bool = False
    """The service's peer key and the plug-in were there not long ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedService:
    """What the last solve decided for one service."""

    plan_id: str
    plan: ServicePlan
    generation: int = 0
    """metadata.generation of the LLMService that was planned; 0: the one that is observed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """What the last solve would decide for one service, were it asked to: the policy's mode is `shadow`."""

    proposed: PlannedService
    in_force: PlannedService | None
    """What was decided while the mode was `apply`; None: what the ConfigMap remembers, if anything."""


Desired: TypeAlias = PlannedService | Refusal | Shadow | None
"""A plan; or why there is none; or one that is only shown; or None before the first solve. In the last three the plan
in force stays."""


@dataclass(frozen=True, slots=True)
class ApplyDeployment:
    """Server-side apply, forced, of a Deployment."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class ProvideMigration:
    """Creation of the Secret with the service's peer key, and of the plug-in's ConfigMap, where they are not there."""

    secret: str
    """Name of the Secret."""
    package: PluginPackage


@dataclass(frozen=True, slots=True)
class ApplyConfigMap:
    """Server-side apply, forced, of a ConfigMap."""

    manifest: Manifest


@dataclass(frozen=True, slots=True)
class AnnotatePod:
    """Merge-patch of a pod's annotations; None removes one. A pod that is gone (404) is no error."""

    namespace: str
    name: str
    annotations: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class DeleteDeployment:
    """Deletion of a Deployment that has no pods; `uid` is the precondition. Gone already (404) is no error."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Replacement of the LLMService's status."""

    namespace: str
    name: str
    status: LLMServiceStatus


@dataclass(frozen=True, slots=True)
class EmitEvent:
    """A Kubernetes Event on the LLMService."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


Action: TypeAlias = (
    ProvideMigration | ApplyDeployment | ApplyConfigMap | AnnotatePod | DeleteDeployment | WriteStatus | EmitEvent
)
"""Carried out in the order given; the first that fails ends the round, and the next round starts from what is so."""
