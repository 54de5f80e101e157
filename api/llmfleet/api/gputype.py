"""GPUType: one pool of accelerators that the fleet may use, what they cost, and where their nodes are.

Written by the platform team, one object per type; the same hardware bought otherwise (as spot capacity) or standing
elsewhere (another zone) is a type of its own, a pool that `sameHardwareAs` ties to the first. How many there are is
*observed*, not written: allocatable of Ready, schedulable nodes, less what pods of others request, plus what
`provisionable` says an autoscaler may add.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from llmfleet.api.meta import ApiModel, Conditions, Name, PrinterColumn, Resource, Rule, cel
from llmfleet.api.pod import PodOverlay, Toleration

CONDITION_AVAILABLE = "Available"
"""Engines may be planned on this type."""

RESOURCE_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
"""Name of an extended resource: a domain and a name."""


class PricePerHour(ApiModel):
    """Price of one device for one hour, in the currency of your price book (the same for all types)."""

    on_demand: float = Field(ge=0, le=1e6)
    """Price of one device-hour on demand."""
    spot: float | None = Field(default=None, ge=0, le=1e6)
    """Price of one device-hour as spot capacity; needed where `capacityClass` is `spot`."""


class Provisionable(ApiModel):
    """Capacity that a node autoscaler may add."""

    devices: int = Field(ge=0, le=1_000_000)
    """Devices that may be added beyond those on present nodes."""
    startup_seconds: int = Field(default=300, ge=0, le=86_400)
    """Time from a pending pod to a Ready node, in seconds. A pod that stays Pending longer than this plus the
    fleet's `pendingDeadlineSeconds` makes the capacity count as unavailable for a while."""


class Hardware(ApiModel):
    """Published figures of one device, without sparsity. They bound what a measured profile may claim."""

    memory_bandwidth_gb_per_second: float = Field(gt=0)
    """Memory bandwidth in GB/s. Decoding one token cannot be faster than reading the weights once."""
    dense_tflops: float = Field(gt=0)
    """Dense 16-bit TFLOPS. Prefill cannot be faster than two operations per parameter and token."""
    dense_tflops_8bit: float | None = Field(default=None, gt=0)
    """Dense 8-bit TFLOPS; absent: 8-bit weights are computed with at 16 bits."""
    dense_tflops_4bit: float | None = Field(default=None, gt=0)
    """Dense 4-bit TFLOPS; absent: 4-bit weights are computed with at 8 or 16 bits."""
    link_gb_per_second: float | None = Field(default=None, gt=0)
    """Bandwidth between the devices of a replica, one direction, in GB/s; absent: the published figure where the
    type's name is that of a known device, else 32, PCIe 4.0 x16."""


class Watts(ApiModel):
    """Electrical power of one device."""

    idle: float = Field(ge=0, le=1e6)
    """Power of an idle device, in watts."""
    peak: float = Field(gt=0, le=1e6)
    """Power at full load, in watts; a plan's power is counted with it."""


class GPUTypeSpec(ApiModel):
    """What a device of this type is, costs, and where it is found."""

    model_config = ConfigDict(
        json_schema_extra=cel(
            Rule(
                "self.capacityClass != 'spot' || has(self.pricePerHour.spot)",
                "pricePerHour.spot is required where capacityClass is spot",
                field=".pricePerHour.spot",
            ),
            Rule(
                "!has(self.watts) || self.watts.idle <= self.watts.peak",
                "watts.idle must not exceed watts.peak",
                got=("idle %s and peak %s", "self.watts.idle", "self.watts.peak"),
                field=".watts.idle",
            ),
            Rule(
                "!has(self.billing) || self.billing != 'node' || has(self.devicesPerNode)",
                "devicesPerNode is required where billing is node",
                field=".devicesPerNode",
            ),
        )
    )

    resource_name: str = Field(
        min_length=1,
        max_length=253,
        pattern=RESOURCE_PATTERN,
        json_schema_extra=cel(
            Rule(
                "self == oldSelf",
                "resourceName is immutable: create another GPUType",
                got=("%s where it was %s", "self", "oldSelf"),
            )
        ),
    )
    """Extended resource that pods request, with its domain, for example `nvidia.com/gpu`. Immutable."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that carry this type. Empty: every node that offers the resource."""
    tolerations: list[Toleration] = Field(default_factory=list, max_length=16)
    """Taints of those nodes that engine pods tolerate."""
    memory_gib: float = Field(gt=0, le=1e6)
    """Memory of one device, in GiB."""
    price_per_hour: PricePerHour
    """Price of one device."""
    capacity_class: Literal["onDemand", "spot"] = "onDemand"
    """How these nodes are billed, so which price counts."""
    watts: Watts | None = None
    """Power of one device."""
    hardware: Hardware | None = None
    """Published figures of one device."""
    kv_transfer_gb_per_second: float | None = Field(default=None, gt=0, le=1e6)
    """How fast one device's KV cache gets to a device of another replica, one direction, in GB/s: its share of the
    node's network. Absent: replicas of this type prefill and decode themselves."""
    same_hardware_as: Name | None = None
    """Name of the GPUType whose devices these are too, in another pool: spot nodes, a zone. What profiles measured and
    learnt there counts here; its `hardware` and `watts` do where absent here."""
    devices_per_node: int | None = Field(default=None, ge=1, le=1024)
    """Devices of one node. A replica lies within a node, so none of more devices is planned; absent: not checked."""
    billing: Literal["device", "node"] = "device"
    """What the cloud bills: `device`: those in use; `node`: whole nodes of `devicesPerNode`, used or not."""
    limit: int | None = Field(default=None, ge=0)
    """Largest number of devices that the fleet may use; absent: as many as there are."""
    provisionable: Provisionable | None = None
    """Capacity that an autoscaler may add."""
    pod_overlay: PodOverlay | None = None
    """What every engine pod on this type needs beside the defaults; the service's overlay wins over it."""

    @model_validator(mode="after")
    def _same_rules_as_admission(self) -> Self:
        if self.capacity_class == "spot" and self.price_per_hour.spot is None:
            raise ValueError("pricePerHour.spot is required where capacityClass is spot")
        if self.billing == "node" and self.devices_per_node is None:
            raise ValueError("devicesPerNode is required where billing is node")
        if self.watts is not None and self.watts.idle > self.watts.peak:
            raise ValueError(
                f"watts.idle must not exceed watts.peak, got idle {self.watts.idle:g} and peak {self.watts.peak:g}"
            )
        return self

    @property
    def device_price_per_hour(self) -> float:
        """Price of one device-hour in this type's capacity class."""
        spot = self.price_per_hour.spot
        return spot if self.capacity_class == "spot" and spot is not None else self.price_per_hour.on_demand


class GPUTypeStatus(ApiModel):
    """What was observed of this type."""

    observed_generation: int = 0
    """Generation of the spec that this status speaks of."""
    conditions: Conditions
    """Accepted: the spec parses and counts. Available: engines may be planned on it."""
    last_accepted: str | None = None
    """The last version that parsed, as JSON: it counts while a later one does not."""
    allocatable_devices: int = 0
    """Devices on Ready, schedulable nodes."""
    foreign_devices: int = 0
    """Devices that pods of others request."""
    fleet_devices: int = 0
    """Devices that engine pods of the fleet request."""
    available_devices: int = 0
    """Devices that the plan may use: allocatable less foreign plus provisionable, no more than `limit`, and no more
    than are in use while capacity counts as unavailable."""
    unavailable_until: datetime | None = None
    """Set after an engine pod stayed Pending too long: until then no more devices than now in use are planned."""


class GPUType(Resource):
    """One kind of accelerator that the fleet may use."""

    KIND: ClassVar[str] = "GPUType"
    PLURAL: ClassVar[str] = "gputypes"
    SHORT_NAMES: ClassVar[tuple[str, ...]] = ("gput",)
    NAMESPACED: ClassVar[bool] = False
    PRINTER_COLUMNS: ClassVar[tuple[PrinterColumn, ...]] = (
        PrinterColumn(name="Resource", type="string", json_path=".spec.resourceName"),
        PrinterColumn(name="Memory", type="number", json_path=".spec.memoryGib", description="GiB per device"),
        PrinterColumn(name="Class", type="string", json_path=".spec.capacityClass"),
        PrinterColumn(name="OnDemand", type="number", json_path=".spec.pricePerHour.onDemand"),
        PrinterColumn(name="Spot", type="number", json_path=".spec.pricePerHour.spot", priority=1),
        PrinterColumn(name="Limit", type="integer", json_path=".spec.limit"),
        PrinterColumn(name="Available", type="integer", json_path=".status.availableDevices"),
        PrinterColumn(name="InUse", type="integer", json_path=".status.fleetDevices"),
        PrinterColumn(
            name="UnavailableUntil",
            type="string",
            json_path=".status.unavailableUntil",
            priority=1,
            description="until then no more devices than now in use are planned",
        ),
        PrinterColumn(name="Age", type="date", json_path=".metadata.creationTimestamp"),
    )
    NAME_RULE: ClassVar[tuple[str, str] | None] = (
        r"^[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?$",
        "metadata.name of a GPUType must be a DNS label of at most 40 characters: it becomes part of pod labels",
    )

    spec: GPUTypeSpec
    status: GPUTypeStatus = Field(default_factory=GPUTypeStatus)


def objection(gpu_type: GPUType, gpu_types: Mapping[str, GPUType]) -> str | None:
    """Why a type cannot take over what its `sameHardwareAs` says, in words; None where it can, or says nothing.
    `gpu_types`: all, by name."""
    name, same = gpu_type.metadata.name, gpu_type.spec.same_hardware_as
    other = None if same is None else gpu_types.get(same)
    if same == name:
        return f"spec.sameHardwareAs is {same}, the type itself: name another GPUType or leave it out"
    if other is None:
        return None
    if other.spec.same_hardware_as is not None:
        return (
            f"spec.sameHardwareAs is {same}, itself a pool of {other.spec.same_hardware_as}: name the type that was "
            "measured"
        )
    if other.spec.memory_gib != gpu_type.spec.memory_gib:
        return (
            f"spec.sameHardwareAs is {same}, which has memoryGib {other.spec.memory_gib:g}, and this type has "
            f"{gpu_type.spec.memory_gib:g}: the same hardware has the same memory"
        )
    return None
