"""Devices that are paid for by the node: of a node, all or none.

Services are charged by the device, as ever; what this adds to the problem is what stands **idle** on the nodes that
hold everybody's replicas, so that the sum is the bill:

    idle[g] = size[g] nodes[g] - devices[g],   nodes[g] the fewest that hold all replicas, whosever they are

Idle devices are never fewer than none, so every bound that is proven by the device is a bound of the bill: the prices,
the programs of single services and their cuts need to know nothing of nodes. Only where plans are chosen (the master
program, the closing step, the judgement of a plan) nodes are columns of their own, whole ones.

How many nodes replicas take is a packing. Where every size divides the next larger one and the node, they fit without
loss. Else nodes are filled with the largest replicas first, each in the first node with room, and the programs see as
lower bounds all of `measures`: for each, what the replicas of one node take together is at most 1 (dual feasible
functions; Fekete and Schepers, Math. Program. 91, 2001), three of a node of eight counting as a half, not as 3/8.

Engines that are not planned now but stand on the same nodes are `held`: what they leave idle by themselves is nobody's
here, and a replica that goes there costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llmfleet.placement.solver.problem import Array, Replicas, WholeNodes


def nodes_for(size: int, replicas: Mapping[int, int]) -> int:
    """Nodes of `size` devices for so many replicas by the devices of one, filled with the largest first. A replica of
    more devices than a node takes nodes of its own."""
    sizes = sorted((devices for devices, count in replicas.items() if count > 0 and devices <= size), reverse=True)
    larger = sum(count * -(-devices // size) for devices, count in replicas.items() if devices > size and count > 0)
    if _nested(size, sizes):
        return larger + -(-sum(devices * replicas[devices] for devices in sizes) // size)
    groups: list[tuple[int, int]] = []
    """(devices left, nodes), in the order in which nodes were begun."""
    for devices in sizes:
        left, now = replicas[devices], []
        for free, count in groups:
            each = free // devices
            full, rest = (0, 0) if each == 0 else divmod(min(left, each * count), each)
            left -= each * full + rest
            now += [(free - each * devices, full)] if full else []
            now += [(free - rest * devices, 1)] if rest else []
            now += [(free, count - full - bool(rest))] if count > full + bool(rest) else []
        each = size // devices
        full, rest = divmod(left, each)
        now += [(size - each * devices, full)] if full else []
        now += [(size - rest * devices, 1)] if rest else []
        groups = now
    return larger + sum(count for _, count in groups)


def idle_devices(size: int, replicas: Mapping[int, int]) -> int:
    """Devices that nobody uses on the nodes that hold these replicas."""
    used = sum(count * devices for devices, count in replicas.items())
    return size * nodes_for(size, replicas) - used


def _nested(size: int, sizes: Sequence[int]) -> bool:
    """Whether each of these sizes, descending, divides the one before, and all the node."""
    return all(larger % smaller == 0 for larger, smaller in zip([size, *sizes], sizes, strict=False))


def measures(size: int, sizes: Iterable[int]) -> list[dict[int, float]]:
    """By devices of a replica what it takes of a node, in ways by each of which a node holds no more than 1."""
    present = sorted(set(sizes), reverse=True)
    share = {devices: devices / size for devices in present}
    found = [share]
    if _nested(size, [devices for devices in present if devices <= size]):
        return found
    for k in range(1, size):
        stepped = {
            devices: share[devices]
            if devices > size or ((k + 1) * devices) % size == 0
            else ((k + 1) * devices // size) / k
            for devices in present
        }
        if stepped not in found:
            found.append(stepped)
    return found


def clean(amounts: Array) -> Array:
    """Without what is left of equal amounts by rounding."""
    return np.where(np.abs(amounts) < 1e-9, 0.0, amounts)


class Packing:
    """The node types of a problem, stacked: G types, and M measures of what their nodes hold."""

    def __init__(self, nodes: Sequence[WholeNodes], uses: Sequence[Array], rows: int) -> None:
        """`uses`: by service what a replica takes of each row, shape (rows, variants); `rows`: how many a phase has,
        those that it adds included."""
        self.nodes, self.rows = tuple(nodes), rows
        self.of: list[int] = []
        """Type of each measure."""
        self._takes_of_node: list[dict[int, float]] = []
        for g, one in enumerate(self.nodes):
            sizes = {int(devices) for use in uses for devices in use[one.row] if devices > 0}
            for measure in measures(one.size, sizes | dict(one.held).keys()):
                self.of.append(g)
                self._takes_of_node.append(measure)
        self.price = np.array([one.price for one in self.nodes])
        """Of an idle device-hour, shape (G,)."""
        self.size = np.array([float(one.size) for one in self.nodes])
        """Devices of a node, shape (G,)."""
        self.takes = np.zeros((len(self.nodes), rows))
        """What an idle device takes of each row, shape (G, rows)."""
        for g, one in enumerate(self.nodes):
            for row, amount in one.takes:
                self.takes[g, row] = amount
        self.held = np.array([float(sum(d * n for d, n in one.held)) for one in self.nodes])
        """Devices of what is held, shape (G,)."""
        self.held_idle = np.array([float(idle_devices(one.size, dict(one.held))) for one in self.nodes])
        """What it leaves idle by itself, shape (G,)."""
        self.held_nodes = np.array(
            [
                sum(count * measure.get(devices, 0.0) for devices, count in self.nodes[g].held)
                for g, measure in zip(self.of, self._takes_of_node, strict=True)
            ]
        )
        """What it takes of nodes by each measure, shape (M,)."""

    def __bool__(self) -> bool:
        return bool(self.nodes)

    @property
    def dearest(self) -> float:
        """Price of the dearest node."""
        return float((self.price * self.size).max()) if self.nodes else 0.0

    @property
    def before(self) -> float:
        """Price of what is idle before anything is planned."""
        return float(self.price @ self.held_idle)

    def devices(self, use: Array) -> Array:
        """Devices of each type that replicas take, shape (G, variants)."""
        devices: Array = use[[one.row for one in self.nodes]]
        return devices

    def weights(self, use: Array) -> Array:
        """What replicas take of nodes by each measure, shape (M, variants). Of sizes that came after the measures were
        made, they say nothing, which is as true."""
        return np.array(
            [
                [measure.get(int(devices), 0.0) for devices in use[self.nodes[g].row]]
                for g, measure in zip(self.of, self._takes_of_node, strict=True)
            ]
        )

    def idle(self, uses: Iterable[Array], replicas: Iterable[Replicas]) -> Array:
        """Devices of each type that nobody uses, shape (G,)."""
        counts = [Counter(dict(one.held)) for one in self.nodes]
        for use, of_service in zip(uses, replicas, strict=True):
            for v, count in enumerate(of_service):
                if count:
                    for of_type, one in zip(counts, self.nodes, strict=True):
                        of_type[int(use[one.row, v])] += count
        found = [
            idle_devices(one.size, {d: n for d, n in of.items() if d})
            for one, of in zip(self.nodes, counts, strict=True)
        ]
        return np.array(found, dtype=np.float64)

    def whole(self, taken: Array) -> Array:
        """The fewest nodes of each type for what is taken by each measure, shape (G,)."""
        least = np.zeros(len(self.nodes))
        np.maximum.at(least, self.of, np.ceil(taken + self.held_nodes - 1e-9))
        return least
