"""The addresses of a node-profile cluster and the one link that joins it to the host.

A cluster gets a /16 that overlaps nothing the host knows a route to (its own networks, a VPN, other clusters), and
divides it: pods, services, and a veth pair between the host and the cluster's network namespace. Two routes on the
host then reach pods and cluster IPs directly; they vanish with the link. Nothing else of the host's network is
touched: no firewall rule, no forwarding, and so no way from a pod to the internet.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network

from e2e.cluster.state import ClusterError


@dataclass(frozen=True)
class NodeNetwork:
    """The parts of one cluster's /16 (written as CIDR strings and plain addresses)."""

    block: str

    def _part(self, third: int, prefix_bits: int) -> str:
        first, second, *_ = self.block.split(".")
        return f"{first}.{second}.{third}.0/{prefix_bits}"

    @property
    def pods(self) -> str:
        return self._part(0, 24)

    @property
    def services(self) -> str:
        return self._part(128, 20)

    @property
    def host_address(self) -> str:
        return self._part(255, 30).replace(".0/30", ".1")

    @property
    def node_address(self) -> str:
        return self._part(255, 30).replace(".0/30", ".2")


def _candidates() -> Iterator[IPv4Network]:
    """Private and shared address space (RFC 1918, RFC 6598), the parts that others use least first."""
    for pattern, seconds in (("10.{}.0.0/16", range(208, 240)), ("100.{}.0.0/16", range(64, 128))):
        yield from (IPv4Network(pattern.format(second)) for second in seconds)
    yield from (IPv4Network(f"172.{second}.0.0/16") for second in range(18, 32))


def choose_block(used: Iterable[IPv4Network]) -> str:
    """A /16 that overlaps none of `used`. Raises ClusterError if none is left."""
    used = list(used)
    for candidate in _candidates():
        if not any(candidate.overlaps(network) for network in used):
            return str(candidate)
    raise ClusterError("no address range is free: every /16 in 10.208/12, 100.64/10 and 172.16/12 is routed or taken")


def host_networks() -> list[IPv4Network]:
    """Everything the host has a route to, other than by default."""
    routes = json.loads(_ip("-json", "-4", "route", "show", "table", "all"))
    destinations = {route["dst"] for route in routes} - {"default"}
    return [IPv4Network(destination, strict=False) for destination in destinations]


def connect(network: NodeNetwork, host_link: str, node_link: str, namespace_pid: int) -> None:
    """Make the veth pair, its far end in the namespace of `namespace_pid`, and the host's two routes.

    The far end still needs its address from inside.
    """
    _ip("link", "add", host_link, "type", "veth", "peer", "name", node_link, "netns", str(namespace_pid))
    _ip("address", "add", f"{network.host_address}/30", "dev", host_link)
    _ip("link", "set", host_link, "up")
    for destination in (network.pods, network.services):
        _ip("route", "add", destination, "via", network.node_address, "dev", host_link)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"ip {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout
