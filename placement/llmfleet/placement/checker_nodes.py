"""The check of what whole nodes cost: nodes are counted again, replica by replica.

    Plan, GPUTypes --kept_by_nodes--> the violations of its figures for nodes
                   --idle_cost--> what idle devices add to a budget

Like all of the checker it shares no code with what made the plan. Nodes are filled with the largest replicas first,
each in the first node that has room, and every replica is put there by itself, for which no sizes need be nice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llmfleet.api import GPUType, Plan, ServicePlan
from llmfleet.placement.violation import Violation, money


@dataclass(frozen=True)
class _Nodes:
    """What a type takes, with all plans and with those alone that stay in force."""

    size: int
    price: float
    nodes: int
    devices: int
    idle_before: int

    @property
    def idle(self) -> int:
        return self.size * self.nodes - self.devices


def kept_by_nodes(plan: Plan, gpu_types: Iterable[GPUType]) -> Iterator[Violation]:
    """Where the plan says other nodes than its replicas take, or shares out another bill."""
    said = {one.gpu_type: one for one in plan.nodes or []}
    added = 0.0
    for name, right in _counted(plan, gpu_types).items():
        one = said.pop(name, None)
        found = None if one is None else (one.nodes, one.devices_per_node, one.idle_devices)
        if found != (right.nodes, right.size, right.idle):
            figure = "none" if one is None else f"{one.nodes} of {one.devices_per_node}, {one.idle_devices} idle"
            yield Violation("nodes", f"GPUType {name}", figure, f"{right.nodes} of {right.size}, {right.idle} idle")
        if one is not None:
            yield from money(
                "cost", f"idle devices of GPUType {name}", one.idle_cost_per_hour, right.price * right.idle
            )
        added += right.price * (right.idle - right.idle_before)
    for name, one in said.items():
        yield Violation("nodes", f"GPUType {name}", one.nodes, "none: it has no replicas, or is not billed by the node")
    shared = math.fsum(part.idle_cost_per_hour or 0.0 for part in plan.services)
    yield from money("cost", "idle devices of all services", shared, added)


def idle_cost(plan: Plan, gpu_types: Iterable[GPUType]) -> tuple[float, float]:
    """What is paid per hour for idle devices beside the plans that stay in force, and more than that beside all."""
    counted = _counted(plan, gpu_types).values()
    held = math.fsum(one.price * one.idle_before for one in counted)
    return held, math.fsum(one.price * one.idle for one in counted) - held


def _counted(plan: Plan, gpu_types: Iterable[GPUType]) -> dict[str, _Nodes]:
    """By name, the types with replicas that are billed by the node."""
    found = {}
    for gpu_type in gpu_types:
        name, spec = gpu_type.metadata.name, gpu_type.spec
        if spec.billing != "node" or spec.devices_per_node is None:
            continue
        size = spec.devices_per_node
        kept, engines = _engines(plan.kept, name), _engines([*plan.kept, *plan.services], name)
        if engines:
            before = size * _packed(kept, size) - sum(kept)
            found[name] = _Nodes(size, spec.device_price_per_hour, _packed(engines, size), sum(engines), before)
    return found


def _engines(parts: Sequence[ServicePlan], name: str) -> list[int]:
    """Devices of every replica of a type."""
    return [v.devices for part in parts for v in part.variants if v.gpu_type == name for _ in range(v.replicas)]


def _packed(engines: list[int], size: int) -> int:
    free: list[int] = []
    more = 0
    for devices in sorted(engines, reverse=True):
        if devices > size:
            more += math.ceil(devices / size)
            continue
        place = next((n for n, left in enumerate(free) if left >= devices), None)
        if place is None:
            free.append(size - devices)
        else:
            free[place] -= devices
            if not free[place]:
                free.pop(place)
                more += 1
    return more + len(free)
