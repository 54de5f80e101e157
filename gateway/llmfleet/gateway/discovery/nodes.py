"""Which nodes are about to go, by what they say themselves: a cordon, or a taint that announces an end.

    Node (spec.unschedulable, spec.taints) --departure--> Leaving, or None --NodeIndex--> by node name

Nothing else of a node is kept. Clouds and autoscalers announce a node's end by taints of their own, seconds to minutes
before it comes; the keys are a setting, with those of the common ones as the default.
"""

from __future__ import annotations

from collections.abc import Collection

from lightkube.resources.core_v1 import Node

from llmfleet.gateway.fleet import Leaving, LeavingReason


def departure(node: Node, taints: Collection[str]) -> Leaving | None:
    """Why the engines of a node should be left, None where they may stay. A taint tells more than a cordon."""
    spec = node.spec
    if spec is None:
        return None
    if any(taint.key in taints for taint in spec.taints or ()):
        return Leaving(LeavingReason.TAINTED)
    return Leaving(LeavingReason.CORDONED) if spec.unschedulable else None


class NodeIndex:
    """The nodes that are about to go."""

    def __init__(self, taints: Collection[str]) -> None:
        self._taints = frozenset(taints)
        self._leaving: dict[str, Leaving] = {}

    def names(self) -> set[str]:
        """Those nodes."""
        return set(self._leaving)

    def put(self, name: str, node: Node | None) -> bool:
        """Takes in a node, or forgets it. Says whether its engines are to be seen otherwise now."""
        before = self._leaving.pop(name, None)
        now = departure(node, self._taints) if node is not None else None
        if now is not None:
            self._leaving[name] = now
        return before != now

    def leaving(self, name: str) -> Leaving | None:
        """Why the engines of a node should be left."""
        return self._leaving.get(name)
