"""Pools whose cloud bills whole nodes: what stands idle beside replicas, and whose bill that is.

    GPUTypes with `billing: node`, plans that stay in force --node_types--> NodeType ...
    NodeType, replicas --idle--> devices that are paid for and used by nobody

A fleet's bill is the price of its devices in use and that of the devices beside them, on the fewest nodes that hold all
replicas of all services (`solver.nodes`). Three rules make figures out of it that add up:

* plans that stay in force are what they were: what is counted here is what the services planned now **add** to the
  bill. A replica in a gap on a node that stands anyway adds nothing;
* idle devices are shared among the services that have replicas of the type, in proportion to their devices, and
  are part of each one's cost per hour;
* a budget of the whole fleet counts the bill; a limit of one namespace counts devices in use, since what is idle is no
  namespace's own.

Nodes that others use in part are counted whole: a cloud bills them whole, and nobody here knows who pays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from llmfleet.api import GPUType, ServicePlan
from llmfleet.api.plan import PlannedNodes
from llmfleet.placement.rows import SharedRow
from llmfleet.placement.service_program import LEAST_PRICE_PER_DEVICE, Replicas, ServiceProgram
from llmfleet.placement.solver import WholeNodes, idle_devices, nodes_for


@dataclass(frozen=True)
class NodeType:
    """A GPU type that is billed by the node."""

    name: str
    """Of the GPUType."""
    size: int
    """Devices of a node."""
    price: float
    """Of a device-hour."""
    rows: tuple[str, ...] = ()
    """Rows that count the bill."""
    held: tuple[tuple[int, int], ...] = ()
    """(devices of a replica, replicas) of what stays where it is."""

    @property
    def charged(self) -> float:
        """What an idle device-hour counts for in a decision: a little less than one in use, so that of what is paid for
        anyway no more is used than is needed."""
        return max(self.price, LEAST_PRICE_PER_DEVICE) - LEAST_PRICE_PER_DEVICE

    def numbers(self, rows: list[str]) -> WholeNodes:
        """The same for the solver, whose rows these are."""
        takes = tuple((rows.index(name), self.price) for name in self.rows)
        return WholeNodes(rows.index(self.name), self.size, self.charged, takes, self.held)

    @property
    def held_idle(self) -> int:
        """Idle devices beside what stays where it is."""
        return idle_devices(self.size, dict(self.held))

    def with_held(self, more: Iterable[tuple[int, int]]) -> NodeType:
        """With more replicas, by the devices of one, that stay where they are."""
        counts = Counter(dict(self.held))
        for devices, count in more:
            counts[devices] += count
        return replace(self, held=tuple(sorted(counts.items())))

    def all(self, services: Iterable[tuple[ServiceProgram, Replicas]]) -> Counter[int]:
        """All replicas of the type, those that stay included, by the devices of one."""
        counts = Counter(dict(self.held))
        for program, replicas in services:
            for name, devices, count in zip(program.types, program.devices, replicas, strict=True):
                if name == self.name and count:
                    counts[devices] += count
        return counts

    def idle(self, services: Iterable[tuple[ServiceProgram, Replicas]]) -> int:
        """Idle devices beside these replicas, beyond those that are idle without them; negative where they fill
        gaps."""
        return idle_devices(self.size, self.all(services)) - self.held_idle


def node_types(
    gpu_types: Iterable[GPUType], rows: Iterable[SharedRow], kept: Iterable[ServicePlan] = ()
) -> tuple[NodeType, ...]:
    """The types that are billed by the node, by name. `kept`: plans that stay in force."""
    counting = [row for row in rows if row.unit == "cost" and row.namespace is None]
    found = []
    for gpu_type in sorted(gpu_types, key=lambda one: one.metadata.name):
        name, spec = gpu_type.metadata.name, gpu_type.spec
        if spec.billing == "node" and spec.devices_per_node is not None:
            rows_of_type = tuple(row.name for row in counting)
            found.append(NodeType(name, spec.devices_per_node, spec.device_price_per_hour, rows_of_type))
    return beside(found, kept)


def beside(nodes: Iterable[NodeType], kept: Iterable[ServicePlan]) -> tuple[NodeType, ...]:
    """The types with the replicas of these plans staying where they are."""
    variants = [variant for plan in kept for variant in plan.variants if variant.replicas]
    return tuple(
        one.with_held((variant.devices, variant.replicas) for variant in variants if variant.gpu_type == one.name)
        for one in nodes
    )


def planned_nodes(nodes: Iterable[NodeType]) -> list[PlannedNodes]:
    """The nodes of each type that hold all that stays where it is, where that is anything."""
    return [
        PlannedNodes(
            gpu_type=one.name,
            devices_per_node=one.size,
            nodes=nodes_for(one.size, dict(one.held)),
            idle_devices=one.held_idle,
            idle_cost_per_hour=one.price * one.held_idle,
        )
        for one in nodes
        if one.held
    ]


def idle_cost_of(plan: ServicePlan, nodes: Iterable[NodeType]) -> float:
    """What stands idle beside a plan, per hour, beyond what is idle without it."""
    return sum(one.price * (now.held_idle - one.held_idle) for one in nodes for now in beside([one], [plan]))


def without_held_idle(limits: Mapping[str, float], nodes: Iterable[NodeType]) -> dict[str, float]:
    """What is left of limits beside what already stands idle; never below 0."""
    left = dict(limits)
    for one in nodes:
        for name in one.rows:
            left[name] = max(0.0, left[name] - one.price * one.held_idle)
    return left


def with_held_idle(limits: Mapping[str, float], nodes: Iterable[NodeType]) -> Mapping[str, float]:
    """The same limits if nothing stood idle."""
    more = dict(limits)
    for one in nodes:
        for name in one.rows:
            more[name] += one.price * one.held_idle
    return more


def shares(nodes: Iterable[NodeType], services: list[tuple[ServiceProgram, Replicas]]) -> list[float]:
    """By service its share of what stands idle, per hour: in proportion to its devices of each type."""
    found = [0.0] * len(services)
    for one in nodes:
        used = [program.use(replicas).get(one.name, 0) for program, replicas in services]
        total, price = sum(used), one.price * one.idle(services)
        if total and price:
            found = [share + price * devices / total for share, devices in zip(found, used, strict=True)]
    return found


class Bill:
    """The bill of a solved fleet, and what it would be with other replicas of one service."""

    def __init__(self, nodes: tuple[NodeType, ...], services: list[tuple[ServiceProgram, Replicas]]) -> None:
        """`nodes` with the plans that stay in force on them; `services` are those planned now."""
        self._nodes = nodes
        self._replicas = {program.key: counts for program, counts in services} if nodes else {}
        self._all = {one.name: one.all(services) for one in nodes}
        keys = [program.key for program, _ in services]
        self._shares = dict(zip(keys, shares(nodes, services), strict=True)) if nodes else {}

    def share(self, program: ServiceProgram) -> float | None:
        """What a service pays for idle devices, per hour; None where it has none of a type billed by the node."""
        if not self._nodes:
            return None
        used = program.use(self._replicas[program.key])
        return self._shares[program.key] if any(used.get(one.name) for one in self._nodes) else None

    def planned(self) -> list[PlannedNodes]:
        """The nodes of each type that is used."""
        return planned_nodes(replace(one, held=tuple(self._all[one.name].items())) for one in self._nodes)

    def beside(self, program: ServiceProgram) -> tuple[NodeType, ...]:
        """The types that a service may use, with the replicas of all others staying where they are."""
        found = []
        for one in self._nodes:
            if one.name in program.types:
                own = replace(one, held=()).all([(program, self._replicas[program.key])])
                held = self._all[one.name] - own
                found.append(replace(one, held=tuple(sorted(held.items()))))
        return tuple(found)

    def room(self, program: ServiceProgram, room: Mapping[str, float]) -> Mapping[str, float]:
        """What one service may use of each row, what stands idle for it now included."""
        more = dict(room)
        for one in self.beside(program):
            for name in one.rows:
                more[name] += one.price * one.idle([(program, self._replicas[program.key])])
        return more

    def cost_with(self, program: ServiceProgram, replicas: Replicas) -> float:
        """What a service costs with other replicas, all that its change would do to the bill being its own."""
        cost = program.cost_of(replicas)
        for one in self.beside(program):
            now = one.idle([(program, self._replicas[program.key])])
            cost += one.price * (one.idle([(program, replicas)]) - now)
        return cost + (self.share(program) or 0.0)
