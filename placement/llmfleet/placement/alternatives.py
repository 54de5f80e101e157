"""Other ways to serve one service: the cheapest replicas under one more condition, as true as the plan itself.

In flow a service as it was planned, what it may use, and a condition on its replicas; out flow the cheapest replicas
that meet it and serve no less. Like those of a plan, the pools of an alternative are judged at the mix that they would
get, and solved again with lines through what they hold (`rounds.py`): what looks cheaper than the plan only because
nobody asked whether it keeps the objective is no alternative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from llmfleet.api import FleetPolicySpec
from llmfleet.placement.fleet import FleetSolver
from llmfleet.placement.highs import ROUNDING, Deadline
from llmfleet.placement.program import FleetProgram
from llmfleet.placement.rounds import ROUNDS, Reduced, next_margins, reduce, routed_at
from llmfleet.placement.rows import SharedRow
from llmfleet.placement.service_program import Replicas
from llmfleet.placement.warm_state import WarmState
from llmfleet.placement.whole_nodes import NodeType

Condition = Callable[[FleetProgram], bool]
"""Adds itself to the program of one service; False where it cannot be met."""


def cheapest_where(
    condition: Condition,
    item: Reduced,
    replicas: Replicas,
    served_rps: float,
    *,
    room: Mapping[str, float],
    rows: Iterable[SharedRow],
    policy: FleetPolicySpec,
    deadline: Deadline,
    nodes: tuple[NodeType, ...] = (),
) -> Replicas | None:
    """The cheapest replicas under the condition, change having no price; None where none serves as much.

    `replicas` and `served_rps` are what the service has now, `room` what it may use of devices and rows, `nodes` the
    types that are billed by the node, with the replicas of all others on them.
    """
    shared = tuple(rows)
    missing = item.program.missing(replicas)
    item = reduce(item.prepared, policy, None, shared, item.margins)
    found: tuple[Replicas, ...] | None = None
    for number in range(ROUNDS):
        program = item.program
        unserved_rps = float(program.rates.sum()) - served_rps
        if unserved_rps < -ROUNDING * max(1.0, served_rps):
            return None
        alternative = FleetProgram([program], room, nodes)
        solver = FleetSolver(room, gap=policy.optimality_gap, deadline=deadline, warm=WarmState())
        at_risk = solver.at_risk(program, replicas) if program.losses else 0.0
        alternative.hold_shortage(0, max(0.0, unserved_rps), missing, at_risk)
        if not condition(alternative):
            return None
        found = alternative.cheapest(gap=policy.optimality_gap / 2, deadline=deadline)
        if found is None:
            return None
        routed = routed_at(item, found[0], solver, None)
        margins = next_margins(routed, policy, number)
        if margins is item.margins:
            return found[0]
        short = any(pool.short for pool in routed.pools)
        item = reduce(item.prepared, policy, None, shared, margins)
    return None if found is None or short else found[0]
