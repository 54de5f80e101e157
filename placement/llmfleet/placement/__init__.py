"""Placement: which GPU types, how many replicas, and which requests go where, for the whole fleet in one solve.

    plan(inputs, previous, warm=None) -> (Plan, WarmState)      decides
    violations(inputs, plan, previous) -> [Violation]           checks it, independently
    explain(plan, inputs, key) -> Explanation                   says why, for one service

Pure: no Kubernetes, no files, no network; the clock is an argument. `PlanInputs` is everything a plan depends on.
"""

from llmfleet.placement.checker import violations
from llmfleet.placement.explain import ChosenVariant, Explanation, RejectedVariant, SingleType, explain
from llmfleet.placement.inputs import Demand, PlanInputs
from llmfleet.placement.planner import plan
from llmfleet.placement.violation import Violation
from llmfleet.placement.warm_state import WarmState

__all__ = [
    "ChosenVariant",
    "Demand",
    "Explanation",
    "PlanInputs",
    "RejectedVariant",
    "SingleType",
    "Violation",
    "WarmState",
    "explain",
    "plan",
    "violations",
]
