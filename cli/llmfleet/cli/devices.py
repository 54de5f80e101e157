"""How many devices of each GPUType a plan without a cluster may use.

The operator observes nodes; here the same number comes from the first of these that is there:

    --inventory l4=8,a100=4    devices on nodes, as stated; a type that is not named has none
    --inventory FILE           the same as a YAML or JSON map
    Node objects in the files  counted exactly as the operator counts them, less what Pods in the files request
    status of the GPUTypes     what an operator observed last (`kubectl get gputypes -o yaml`)
    nothing of it              as many as are needed: the question is then "what would I have to buy?"

To each of the first four, `spec.provisionable` adds what an autoscaler may bring. `spec.limit` is applied by the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from llmfleet.api import FleetPolicySpec, GPUType
from llmfleet.cli.manifests import Manifests
from llmfleet.cli.refused import RefusedError, shown

UNBOUNDED = 100_000
"""Devices per type where nothing is known: more than any plan of one fleet uses."""


@dataclass(frozen=True)
class Devices:
    """Devices by GPUType name, and where the numbers come from, in words."""

    count: Mapping[str, int]
    source: str


def devices(manifests: Manifests, stated: str | None, now: datetime) -> Devices:
    """Counts the devices of every type. `stated` is the value of `--inventory`. Raises RefusedError."""
    types = {gpu_type.metadata.name: gpu_type for gpu_type in manifests.gpu_types}
    if stated is not None:
        counts = parse_inventory(stated, known=sorted(types))
        return Devices({name: counts.get(name, 0) + _provisionable(t) for name, t in types.items()}, "as stated")
    if manifests.nodes:
        return Devices(_on_nodes(manifests, types, now), f"{len(manifests.nodes)} nodes in the files")
    if any(gpu_type.status.observed_generation for gpu_type in types.values()):
        return Devices({name: observed_devices(t, now) for name, t in types.items()}, "status of the GPUTypes")
    return Devices(dict.fromkeys(types, UNBOUNDED), "none given: as many devices as needed")


def parse_inventory(stated: str, *, known: list[str]) -> dict[str, int]:
    """Reads `type=n,...` or a file that maps type to n. Raises RefusedError naming type, value and what is known."""
    if "=" in stated and not Path(stated).exists():
        pairs = [(name.strip(), number.strip()) for name, _, number in (p.partition("=") for p in stated.split(","))]
        found: dict[str, object] = {name: int(number) if number.isdecimal() else number for name, number in pairs}
        if len(found) < len(pairs):
            raise RefusedError(f"--inventory {stated}: a GPUType is named twice")
        place = "--inventory"
    else:
        try:
            content = yaml.safe_load(Path(stated).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise RefusedError(
                f"--inventory {stated}: neither type=number,... nor a readable file: {reason}"
            ) from error
        if not isinstance(content, dict):
            raise RefusedError(f"--inventory {stated}: accepted is a map of GPUType to number, got {shown(content)}")
        found, place = content, f"--inventory {stated}"
    counts = {}
    for name, number in found.items():
        if name not in known:
            raise RefusedError(f"{place}: {name} is no GPUType in the files; known are {', '.join(known) or 'none'}")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise RefusedError(f"{place}: {name} is {shown(number)}; accepted is a whole number of devices, 0 or more")
        counts[name] = number
    return counts


def _on_nodes(manifests: Manifests, types: Mapping[str, GPUType], now: datetime) -> dict[str, int]:
    from llmfleet.operator.inventory import observe_inventory
    from llmfleet.operator.parse import foreign_use_from_object, node_from_object

    foreign = (use for use in map(foreign_use_from_object, manifests.pods) if use is not None)
    nodes = map(node_from_object, manifests.nodes)
    policy = manifests.policy.spec if manifests.policy is not None else FleetPolicySpec()
    return dict(observe_inventory(types, nodes, foreign, [], policy, now).devices)


def observed_devices(gpu_type: GPUType, now: datetime) -> int:
    """Devices that an operator saw last, as its status says: what it plans with, before `limit`."""
    status = gpu_type.status
    if status.unavailable_until is not None and status.unavailable_until > now:
        return min(status.available_devices, status.fleet_devices)
    return max(0, status.allocatable_devices - status.foreign_devices) + _provisionable(gpu_type)


def _provisionable(gpu_type: GPUType) -> int:
    return gpu_type.spec.provisionable.devices if gpu_type.spec.provisionable is not None else 0
