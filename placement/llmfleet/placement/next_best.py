"""The next best set of variants of every service, found once and kept as long as it is true.

    service as planned, what it may use --NextBestSets.of--> the cheapest replicas with another set of variants, or None

One such answer takes as long as some plans do, and what others leave changes with each plan. So an answer is kept
while nothing else about the service has changed:

* what it may use has become less, and the answer still fits: it is still the cheapest;
* it has become more, and the answer still fits: it can still be had for what it says, and something cheaper may now be
  possible. It is looked for again when the answer is `_OLD` plans old, `_SEARCHED_AGAIN` in a plan;
* it does not fit any more: it is looked for at once, `_SEARCHED_ANEW` in a plan.

Of a fleet that is planned for the first time `_MOST_SEARCHED` services are answered. Services that have no answer yet
are answered by the next plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llmfleet.api import FleetPolicySpec
from llmfleet.placement.alternatives import cheapest_where
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.rounds import Routed
from llmfleet.placement.rows import SharedRow
from llmfleet.placement.service_program import Replicas
from llmfleet.placement.warm_state import OtherSet
from llmfleet.placement.whole_nodes import NodeType

_MOST_SEARCHED = 100
_SEARCHED_ANEW = 2
_SEARCHED_AGAIN = 1
_OLD = 10


class NextBestSets:
    """Those of one plan. They go through the solver's warm state from plan to plan."""

    def __init__(self, solver: FleetSolver, rows: tuple[SharedRow, ...], policy: FleetPolicySpec) -> None:
        self._solver, self._rows, self._policy = solver, rows, policy
        self._searches = _SEARCHED_ANEW if solver.warm.next_best else _MOST_SEARCHED
        self._again = _SEARCHED_AGAIN

    def of(
        self, routed: Routed, served_rps: float, room: Mapping[str, float], nodes: tuple[NodeType, ...] = ()
    ) -> Replicas | None:
        """The cheapest replicas with another set of variants that serve no less within `room`, by row; None where
        there are none, or none was looked for yet. `nodes`: types billed by the node, the others' replicas on them."""
        program = routed.item.program.unmoved
        if len(program.types) == 1 or not any(routed.replicas):
            return None
        usable = {name: min(amount, program.enough[name]) for name, amount in room.items()}
        nodes = tuple(one for one in nodes if one.name in program.types)
        slot = (*program.fingerprint, routed.replicas, *nodes)
        known = self._solver.warm.next_best.get(slot)
        if known is not None:
            known = self._still(known, usable, program.takes(known.replicas) if known.replicas else {})
        if known is None:
            if self._searches == 0:
                return None
            self._searches -= 1
            known = OtherSet(usable, self._search(routed, served_rps, room, nodes), 0)
            if self._solver.deadline.hit:
                return known.replicas
        self._solver.used.next_best[slot] = known
        return known.replicas

    def _still(self, known: OtherSet, room: Mapping[str, float], taken: Mapping[str, float]) -> OtherSet | None:
        """An earlier answer, a plan older; None where it has to be looked for again."""
        if any(amount > room[name] for name, amount in taken.items()):
            return None
        if all(room[name] <= amount for name, amount in known.room.items()):
            return replace(known, plans=0)
        if known.plans >= _OLD and self._again > 0:
            self._again -= 1
            return None
        return replace(known, plans=known.plans + 1)

    def _search(
        self, routed: Routed, served_rps: float, room: Mapping[str, float], nodes: tuple[NodeType, ...]
    ) -> Replicas | None:
        return cheapest_where(
            lambda alternative: alternative.require_another_set(0, routed.replicas),
            routed.item,
            routed.replicas,
            served_rps,
            room=room,
            rows=self._rows,
            policy=self._policy,
            deadline=self._solver.deadline,
            nodes=nodes,
        )
